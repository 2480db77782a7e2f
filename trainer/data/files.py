"""Finds the files of a source: in a local folder, or in a dataset repository of the Hub, downloaded whole or one by one."""

import functools
import json
import re
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.constants import is_offline_mode

from .images import allowed_folders, check_name, find_image
from .rows import BadRow, brief


HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def is_hub_id(name):
    """Whether a name is a repository's and no existing path."""
    return HUB_ID.fullmatch(str(name)) is not None and not Path(name).exists()


def hub_address(name, revision=None):
    """A dataset's repository as `datasets` writes where it has downloaded from: a card finds it there, see trainer/describing.py."""
    return f"hf://datasets/{name}" + (f"@{revision}" if revision else "")


def refuse_outside(source, folder, paths):
    """
    Refuses data files that lead out of a source's folder, as links or by their names.

    Args:
        source (`str`): how an error calls the source.
        folder (`Path`): its folder.
        paths (`dict[Path, str]`): how an error calls each file.

    Raises:
        ValueError: one does.
    """
    allowed = allowed_folders(folder)
    for path, shown in paths.items():
        if not any(path.resolve().is_relative_to(parent) for parent in allowed):
            raise ValueError(
                f"`{source}` has {shown!r}, which leads out of it: name the folder that the files are in."
            )


class SourceFiles:
    """
    The files of a source.

    Args:
        name (`str`): an existing folder, one file, or the id of a dataset repository.
        image_root (`str`, *optional*): the folder that the records' image paths start from; by default the source's own.
        revision (`str`, *optional*): of the repository.
        patterns (`list[str]`, *optional*): which files of the repository are wanted.
        lazy (`bool`, defaults to `False`): fetch each file of the repository when it is asked for, instead of all first.

    Raises:
        ValueError: neither a path nor a repository; a repository that cannot be reached.
    """

    def __init__(self, name, image_root=None, revision=None, patterns=None, lazy=False):
        self.name, self.repository, path = str(name), None, Path(name).absolute()
        self.hub_address = None  # of the repository at its commit, as `datasets` writes it
        if path.is_dir():
            self.folder = path
        elif path.is_file():
            self.folder = path.parent
        elif is_hub_id(name):
            try:
                if lazy:
                    self.folder, self.repository = None, str(name)
                    self.hub_address = hub_address(name)
                    self.revision, self.listing = revision, []
                    if not is_offline_mode():  # then what lies in a cache is found by its name
                        self.revision = HfApi().dataset_info(self.repository, revision=revision).sha
                        self.hub_address = hub_address(name, self.revision)
                        self.listing = HfApi().list_repo_files(
                            self.repository, repo_type="dataset", revision=self.revision
                        )
                else:
                    self.folder = Path(
                        snapshot_download(str(name), repo_type="dataset", revision=revision, allow_patterns=patterns)
                    )
                    self.hub_address = hub_address(name, self.folder.name)  # the cache calls a snapshot by its commit
            except Exception as error:  # of the network, of the Hub, of a name that it refuses
                raise ValueError(
                    f"`{name}` is no local path, and the Hub does not give a dataset of this name: {error}"
                ) from error
        else:
            raise ValueError(f"`{name}` is neither an existing folder or file nor the id of a dataset on the Hub.")
        if image_root is not None and not Path(str(image_root)).is_dir():
            raise ValueError(f"`image_root` must be an existing folder, got {str(image_root)!r}.")
        images = self.folder if image_root is None else str(image_root)
        self.image_folders = [] if images is None else allowed_folders(images)  # absolute

    def glob(self, pattern):
        """The files that a pattern names, relative to the folder, sorted."""
        if self.repository:  # `match` looks at the end of a path alone
            anywhere, depth = pattern.startswith("**/"), pattern.count("/")
            found = [path for path in self.listing if PurePosixPath(path).match(pattern.removeprefix("**/"))]
            return sorted(path for path in found if anywhere or path.count("/") == depth)
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.glob(pattern) if path.is_file())

    def path(self, relative):
        """
        A data file's path on this machine.

        Raises:
            ValueError: it leads out of the folder, as a link or by its name.
        """
        if self.repository:
            return Path(hf_hub_download(self.repository, relative, repo_type="dataset", revision=self.revision))
        refuse_outside(self.name, self.folder, {self.folder / relative: relative})
        return self.folder / relative

    def image(self, name):
        """
        Where an image is that a record names.

        Raises:
            BadRow: missing, or outside the folder.
        """
        if self.image_folders:
            return find_image(name, self.image_folders)
        if isinstance(name, str):  # how `datasets` names a file that it streams
            name = name.removeprefix(f"hf://datasets/{self.repository}@{self.revision}/")
        check_name(name)
        relative = PurePosixPath(name.replace("\\", "/"))
        if relative.is_absolute() or ".." in relative.parts:
            raise BadRow("an image outside the data folder", brief(name))
        if relative.as_posix() not in self._known:
            raise BadRow("an image file that is missing", brief(name))
        return self.path(relative.as_posix())

    @functools.cached_property
    def _known(self):
        return frozenset(self.listing)


class BadLine(str):
    """A line of a file that is no JSON: what the parser says of it."""


def read_records(path):
    """
    The records of a JSON file that holds a list, or of a file with one JSON value a line.

    Args:
        path (`Path`): to a `.json` or `.jsonl` file.

    Returns:
        `list`: the records; a [`BadLine`] for a line that cannot be parsed.

    Raises:
        ValueError: no JSON, or no list.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"`{path}` cannot be read ({error}): check that it exists and may be read.") from error
    if path.suffix == ".jsonl":
        lines = enumerate(data.split(b"\n"), start=1)
        return [_parse_line(line, f"{path.name}, line {number}") for number, line in lines if line.strip()]
    try:
        records = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`{path}` is no JSON ({error}): download it again.") from error
    if not isinstance(records, list):
        raise ValueError(f"`{path}` holds a {type(records).__name__}: it must be a list of records.")
    return records


def _parse_line(line, name):
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number of too many digits
        return BadLine(f"{name}: {error}")
