"""Pushes a folder to the Hub: in one commit, tried again where that may help, and saying what is where if it failed."""

import hashlib
import json
import logging
import shlex
import time
from concurrent.futures import wait
from fnmatch import fnmatch
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, run_as_future
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import filter_repo_objects, parse_ratelimit_headers


logger = logging.getLogger(__name__)

# huggingface_hub 2.4 does this itself for listings and for what is uploaded, but not where a repository is made or tried,
# where a card is checked, and for a commit.
WAITS = (1, 2, 4, 8, 8)  # seconds
TRANSIENT = (408, 429, 500, 502, 503, 504)

CARD, REFUSED_CARD = "README.md", "Invalid metadata in README.md"  # as huggingface_hub says it
TAKEN = ("library_name", "pipeline_tag", "tags")

# The last but one shows rows of the training data, the last quotes warnings, which name folders.
NOT_PUSHED = (
    *("_*", "README.before.md", "checkpoint-*", "weights-*", ".git/*", ".cache/*"),
    *("data_report/*", "training_summary.*"),
)
# Of an earlier save or push, in other pieces or as an adapter: transformers would load them instead of those of the folder.
WEIGHTS = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "adapter_config.json",
)
TRAINING_STATE = (
    "optimizer*",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*",
    "trainer_state.json",
    "progress.json",
    "latest",
    "zero_to_fp32.py",
)


def make_repository(repository, token=None, private=None):
    """
    Makes a model repository if there is none, and tries whether it may be written to.

    Args:
        repository (`str`): `"user/name"`, or a name in the namespace of the token.
        token (`str`, *optional*): by default the one of `HF_TOKEN` or of `hf auth login`.
        private (`bool`, *optional*): only for a new one; by default what the namespace has settled.

    Returns:
        `str`: `"user/name"`.

    Raises:
        ValueError: no name of a repository, or none that may be written to.
    """
    api = HfApi(token=token)
    try:
        name = _retried(lambda: api.create_repo(repository, private=private, exist_ok=True)).repo_id
        try:
            # `create_repo` does not mind a repository that is there and may only be read.
            _retried(lambda: api.auth_check(name, write=True))
        except HfHubHTTPError as error:
            if error.response.status_code in (401, 403):
                raise
        return name
    except (HTTPError, OSError, ValueError) as error:
        raise ValueError(
            f"`hub_model_id` is {repository!r}, to which nothing can be pushed: {_brief(error)}\nLog in with `hf auth "
            "login` or give a `hub_token` that may write there; or set `push_to_hub=False` and push the folder later."
        ) from error


def push_folder(folder, repository, token=None, revision=None, commit_message="Upload an AMVL model", path_in_repo=""):
    """
    Pushes a folder in one commit: all of it is in the repository afterwards, or what was there before.

    A card whose metadata the Hub refuses goes up without it, with a warning: weights are not lost for a licence that is misspelt.
    Weights of an earlier push that the folder does not have are deleted in that commit. Checkpoints, the data report and names
    with a leading underscore stay here.

    Args:
        folder (`str` or `Path`): what to push; only read.
        repository (`str`): `"user/name"`, see [`make_repository`].
        token (`str`, *optional*): by default the one of `HF_TOKEN` or of `hf auth login`.
        revision (`str`, *optional*): the branch, `main` by default.
        commit_message (`str`, defaults to `"Upload an AMVL model"`).
        path_in_repo (`str`, defaults to `""`): folder of the repository to push to.

    Returns:
        `huggingface_hub.CommitInfo`.

    Raises:
        ValueError: there are no weights to push.
        OSError: it failed; the message says which files are there, which are not, and how to go on.
    """
    api, folder = HfApi(token=token), Path(folder)
    files = {
        f"{path_in_repo}/{name}".lstrip("/"): folder / name
        for name in filter_repo_objects(
            sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()),
            ignore_patterns=list(NOT_PUSHED),
        )
    }

    if not any(name.endswith(".safetensors") for name in files):
        raise ValueError(
            f"`folder` ({folder}) has no weights, only {sorted(files)}: name the folder of a saved model."
        )

    def commit(**instead):
        # Made anew each time: it finds there what a commit has brought whose answer was lost.
        operations = [CommitOperationAdd(name, content) for name, content in (files | instead).items()]
        weights = [f"{path_in_repo}/{pattern}".lstrip("/") for pattern in WEIGHTS]
        for name in api.list_repo_files(repository, revision=revision):
            if name not in files and any(fnmatch(name, pattern) for pattern in weights):
                operations.append(CommitOperationDelete(name))
        return api.create_commit(repository, operations, commit_message=commit_message, revision=revision)

    try:
        try:
            return _retried(commit)
        except ValueError as error:
            if REFUSED_CARD not in str(error):
                raise
            card, left_out = _card_without_metadata(files[CARD])
            logger.warning(
                "The Hub refuses the metadata of the card: %s\nIt is pushed without %s; mend `%s` and push again.",
                _brief(error),
                left_out,
                files[CARD],
            )
            return _retried(lambda: commit(**{CARD: card}))
    except Exception as error:  # huggingface_hub raises a RuntimeError, too
        settings = {"revision": revision, "path_in_repo": path_in_repo or None}
        arguments = [json.dumps(str(folder.absolute())), json.dumps(repository)]
        arguments += [f"{name}={json.dumps(value)}" for name, value in settings.items() if value is not None]
        code = f"from trainer.hub import push_folder; push_folder({', '.join(arguments)})"
        raise OSError(
            f"`{folder}` could not be pushed to `{repository}`: {_brief(error)}\n"
            f"{_what_is_there(api, files, repository, revision)}\n"
            f"Nothing is lost: `{folder.absolute()}` holds all of it. Log in (`hf auth login`) and try again with\n"
            f"    python -c {shlex.quote(code)}"
        ) from error


def _card_without_metadata(path):
    """A card with what the Hub takes of any model, as bytes, and the keys that it lost."""
    text = path.read_text(encoding="utf-8", errors="replace")
    block = REGEX_YAML_BLOCK.search(text)
    try:
        found = yaml.safe_load(block[2]) if block else {}
    except yaml.YAMLError:
        found = {}
    found = found if isinstance(found, dict) else {}
    kept = {key: found[key] for key in TAKEN if key in found}
    head = f"---\n{yaml.safe_dump(kept, sort_keys=False)}---\n" if kept else ""
    body = text[block.end() :] if block else text
    return f"{head}{body}".encode(), sorted(map(str, found.keys() - kept.keys())) or "any"


def _retried(call):
    """Calls up to six times, as long as it fails for a reason that may pass, and waits as long as the Hub asks for."""
    for seconds in (*WAITS, None):
        try:
            return call()
        except (HTTPError, json.JSONDecodeError) as error:  # the latter is a gateway's page instead of an answer
            response = getattr(error, "response", None)
            if seconds is None or (response is not None and response.status_code not in TRANSIENT):
                raise
            if response is not None:
                limit, told = parse_ratelimit_headers(response.headers), response.headers.get("Retry-After", "")
                if limit is not None and limit.remaining == 0:
                    seconds = limit.reset_in_seconds + 1
                elif told.isdigit():
                    seconds = int(told) + 1
            logger.warning("The Hub failed: %s\nTrying again in %d s.", _brief(error), seconds)
        time.sleep(seconds)


def _brief(error):
    return " ".join(f"{error or type(error).__name__} {error.__cause__ or ''}".split())[:400]


def _what_is_there(api, files, repository, revision):
    try:
        tree = list(api.list_repo_tree(repository, recursive=True, revision=revision))
    except (HTTPError, OSError, ValueError) as error:
        return (
            f"What `{repository}` holds could not be asked ({_brief(error)}). A commit brings all files or none, so "
            f"that {sorted(files)} are most likely not there."
        )
    found = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    same = [name for name in files if name in found and _is_same(files[name], found[name])]
    older = [name for name in files if name in found and name not in same]
    absent = [name for name in files if name not in found]
    text = f"In `{repository}` are, as in the folder: {same}. There, but not as in the folder: {older}. Not there: {absent}."
    has_config = any(name.split("/")[-1] in ("config.json", "adapter_config.json") for name in found)
    if has_config and any(name.endswith(".safetensors") for name in absent + older):
        text += " Who loads it now gets a configuration without these weights."
    return text


def _is_same(path, entry):
    if entry.lfs is not None:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == entry.lfs.sha256
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == entry.blob_id


class HubMixin:
    """
    How a [`~transformers.Trainer`] pushes, all of it by [`push_folder`].

    The repository is made and tried before training. What is pushed while training loads, too: it has code and card. A push that
    failed meanwhile is told in a warning, and training goes on.
    """

    _pushes = ()  # in the background, in their order

    def init_hf_repo(self, token=None, private=None):
        if self.is_world_process_zero():
            self.hub_model_id = make_repository(
                self.args.hub_model_id or Path(self.args.output_dir).absolute().name,
                self.args.hub_token if token is None else token,
                self.args.hub_private_repo if private is None else private,
            )

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **card
    ):
        """
        Saves the model, its processor, its code and its card, and pushes them, see [`~transformers.Trainer.push_to_hub`].

        Raises:
            OSError: it failed; the message says what is where and how to go on.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = self.args.hub_token if token is None else token
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self._finish_current_push()  # first, since it reads the folder that is written now
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        card.setdefault("model_name", self.hub_model_id.split("/")[-1])
        self.create_model_card(**card)
        arguments = self.args.output_dir, self.hub_model_id, token, revision or self.args.hub_revision, commit_message
        if blocking:
            return push_folder(*arguments)
        self._pushes = [run_as_future(push_folder, *arguments)]
        return self._pushes[0]

    def _push_from_checkpoint(self, checkpoint_folder):
        args, folder = self.args, Path(checkpoint_folder)
        if not self.is_world_process_zero() or args.hub_strategy == "end":
            return
        if not args.hub_always_push and not all(push.done() for push in self._pushes):
            return
        self._finish_current_push()  # has to be waited for where `hub_always_push` is set: it reads the same folder
        self.callback_handler.on_push_begin(args, self.state, self.control)
        try:
            self._copy_to_output_dir(folder)
        except OSError as error:
            logger.warning("`%s` is not pushed, it could not be copied: %s", folder, error)
            return
        settings = self.hub_model_id, args.hub_token, args.hub_revision
        message = f"Training in progress, step {self.state.global_step}"
        self._pushes = [run_as_future(push_folder, args.output_dir, *settings, message)]
        if args.hub_strategy in ("checkpoint", "all_checkpoints"):
            name = "last-checkpoint" if args.hub_strategy == "checkpoint" else folder.name
            self._pushes.append(run_as_future(push_folder, folder, *settings, f"{message}, checkpoint", name))

    def _finish_current_push(self):
        wait(self._pushes)
        for push in self._pushes:
            if (error := push.exception()) is not None:
                logger.warning("A push while training failed; a later one sends all of it.\n%s", error)
        self._pushes = ()
