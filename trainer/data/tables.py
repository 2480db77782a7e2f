"""Finds the tables of a source: parquet, Arrow or saved to disk, in a folder, in one file or on the Hub."""

import json
from pathlib import Path, PurePosixPath

from datasets import Dataset, get_dataset_config_names, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import DatasetCard

from .files import refuse_outside


SAVED_TO_DISK = ("dataset_info.json", "dataset_dict.json")
ROWS_PER_SHARD = 500  # of a dataset saved to disk; parquet has its row groups
LOADERS = {".parquet": "parquet", ".arrow": "arrow"}


class SourceTables:
    """
    The tables of a source by config and split, images undecoded. Each is opened once in a process.

    Args:
        name (`str`): a folder, a file, or the id of a dataset repository, as messages call it.
        path (`Path`): the same as an absolute path.
        folder (`Path`, *optional*): where its files are; `None` is a repository, which `datasets` reads.
        split (`str`): which split is read.
        revision (`str`, *optional*): of the repository.
        streaming (`bool`): read the repository without downloading it first.
    """

    def __init__(self, name, path, folder, split, revision, streaming):
        self.name, self.path, self.folder, self.split_name = name, path, folder, split
        self.revision, self.streaming = revision, streaming
        self._subfolders, self._opened = [], {}

    def __getstate__(self):
        return {**self.__dict__, "_opened": {}}  # opened again by the process that reads

    def wanted(self, configs):
        """
        The configs to read.

        Args:
            configs (`list[str]`, *optional*): those asked for; all by default.

        Returns:
            `list[str | None]`: `None` is the only one of a source without configs.

        Raises:
            ValueError: one that the source has not; a card that names files outside its folder.
        """
        names = ["default"]
        self._refuse_links()
        if not self.path.is_file() and not self._is_saved_to_disk():
            self._refuse_files_outside()
            try:
                names = get_dataset_config_names(str(self.folder or self.name), revision=self.revision)
            except (OSError, ValueError) as error:
                raise ValueError(f"`{self.name}` cannot be read as a dataset: {error}") from error
            if names == ["default"] and self.folder is not None and not any(self.folder.glob("*.parquet")):
                # No README tells them; `datasets` writes a single one to the folder `data`.
                found = list(dict.fromkeys(path.parent.name for path in sorted(self.folder.glob("*/*.parquet"))))
                self._subfolders = [] if found == ["data"] else found
                names = self._subfolders or names
        if unknown := sorted(set(configs or ()) - set(names)):
            raise ValueError(f"`config` names {unknown}, but `{self.name}` has {names}.")
        return configs or ([None] if names in (["default"], []) else names)

    def splits(self, config):
        """The splits of a config by name, as `datasets` opened them."""
        if config not in self._opened:
            self._opened[config] = self._open(config)
        return self._opened[config]

    def split(self, config):
        """
        The split that is read, of a config.

        Returns:
            `IterableDataset`: images are `dict`s of `bytes` and `path`.

        Raises:
            ValueError: there is no such split.
        """
        splits = self.splits(config)
        if self.split_name not in splits:
            raise ValueError(f"`split` is {self.split_name!r}, but `{self.name}` has {list(splits)}.")
        table = splits[self.split_name]
        if isinstance(table, Dataset):
            table = table.to_iterable_dataset(num_shards=max(1, -(-len(table) // ROWS_PER_SHARD)))
        elif self.folder is not None:  # of a file that is not here, that would be many requests
            table = table.reshard()
        return table.decode(False)

    def _is_dict(self):
        return (self.folder / "dataset_dict.json").exists()

    def _is_saved_to_disk(self):
        return self.folder is not None and any((self.folder / name).exists() for name in SAVED_TO_DISK)

    def _refuse_links(self):
        """Neither a link nor a saved dataset's list of files may lead out of the folder."""
        if self.folder is None:
            return
        paths = [path for suffix in LOADERS for path in self.folder.rglob(f"*{suffix}")]
        for state in self.folder.rglob("state.json"):
            try:
                paths += [state.parent / file["filename"] for file in json.loads(state.read_bytes())["_data_files"]]
            except (OSError, ValueError, KeyError, TypeError):  # another program's; `datasets` says so if it is none
                continue
        refuse_outside(self.name, self.folder, {path: path.name for path in paths})

    def _refuse_files_outside(self):
        """A card may name data files anywhere on this machine, and `datasets` would read them."""
        card = None if self.folder is None else self.folder / "README.md"
        if card is None or not card.is_file():
            return
        try:
            named = [*_texts_in(DatasetCard.load(card).data.to_dict().get("configs"))]
        except Exception as error:  # the parser's own kinds
            raise ValueError(f"`{self.name}` cannot be read as a dataset: its README.md is broken, {error}") from error
        for path in named:
            if path.startswith(("/", "~")) or ".." in PurePosixPath(path.replace("\\", "/")).parts or "://" in path:
                raise ValueError(f"`{self.name}` has a README.md that names {path!r}, which is outside its folder.")

    def _open(self, config):
        path = self.path
        if self.folder is None:
            where = {"path": self.name, "revision": self.revision, "streaming": self.streaming}
        elif path.is_file():
            if path.suffix not in LOADERS:
                raise ValueError(f"`{self.name}` is of a kind that is not read: give .parquet, .json or .jsonl.")
            where = {"path": LOADERS[path.suffix], "data_files": {self.split_name: str(path)}, "streaming": True}
        elif self._is_saved_to_disk():
            try:
                names = (
                    json.loads((self.folder / "dataset_dict.json").read_bytes())["splits"] if self._is_dict() else []
                )
                if any(not isinstance(name, str) or Path(name).name != name for name in names):
                    raise ValueError(f"its splits are {names}, which are no names of folders in it")
                tables = load_from_disk(str(self.folder))
            except (OSError, ValueError, KeyError) as error:
                raise ValueError(f"`{self.name}` cannot be read as a saved dataset: {error}") from error
            return tables if isinstance(tables, dict) else {self.split_name: tables}
        else:  # local files are streamed too, which writes no copy of them
            where = {"path": str(self.folder), "streaming": True}
            if config in self._subfolders:
                where["data_dir"], config = config, None
        try:
            return load_dataset(**where, name=config)
        except (OSError, ValueError, DatasetGenerationError) as error:
            raise ValueError(f"`{self.name}` cannot be read as a dataset: {error}") from error


def _texts_in(value):
    if isinstance(value, str):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts_in(part)
