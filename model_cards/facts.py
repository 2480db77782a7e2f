"""What is known of a checkpoint's training: written beside it when it is saved, safe to publish, read for its card."""

import json
import logging
import os
import re
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from pathlib import Path, PurePosixPath, PureWindowsPath

from .markdown import one_line
from .provenance import weights_sample


logger = logging.getLogger(__name__)

FACTS = "amvl_training.json"
SECRET = re.compile(
    r"(^|_)(hub_token|auth_token|use_auth_token|access_token|api_key|apikey)$|^token$|secret|passw|credential", re.I
)
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{6,}|(?<=://)[^\s/@]+:[^\s/@]+@")
# The folders of an absolute path inside of a text; not those of an address.
FOLDERS = re.compile(r"(?<![\w.~/:\\-])(?:file:/+|[A-Za-z]:[\\/]|~?[\\/])(?:[^\s/\\'\"`,;:()\[\]{}<>|]+[\\/]+)+")


def public(value):
    """
    A value that anybody may read: no token, no path of this machine but its last part, nothing that JSON cannot hold.

    Args:
        value (`object`): dicts and lists are gone through; keys that name a token are left out.

    Returns:
        `object`: of `dict`, `list`, `str`, numbers, `bool` and `None`.
    """
    if isinstance(value, dict):
        return {public(str(key)): public(inner) for key, inner in value.items() if not SECRET.search(str(key).lower())}
    if isinstance(value, Enum):
        return public(value.value)
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [public(inner) for inner in value]
        return sorted(items, key=str) if isinstance(value, (set, frozenset)) else items
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else str(value)
    text = one_line(value)
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(text).is_absolute():
            text = kind(text).name
    if text.startswith(("~/", "~\\")):
        text = PureWindowsPath(text).name
    text = FOLDERS.sub("", text)
    for home in {str(Path.home()), os.path.expanduser("~")} - {"/", ""}:
        text = text.replace(home, "")
    return TOKEN.sub("", text).strip()


@dataclass
class TrainingFacts:
    """
    What a card says of a checkpoint, apart from results and a diagnosis. Whatever is not known is empty or `None`.

    Args:
        title (`str`): the model's name.
        latents (`dict`): of its config: `num_latents`, `latent_size`, `latent_temperature`, `latent_token_id`, `initial_token_id`,
            `min_log_variance`, `max_log_variance`.
        hub_model_id (`str`, *optional*): where it will be found.
        base (`str`, *optional*), base_revision (`str`, *optional*): Hub id and commit of what was trained on.
        base_is_amvl (`bool`, defaults to `False`): the base was an AMVL model already.
        is_adapter (`bool`, defaults to `False`): a PEFT adapter, to be loaded on its base.
        is_trained (`bool`, defaults to `False`): what follows is known.
        num_steps (`int`, *optional*): optimiser steps behind these weights.
        settings (`dict`): of the training, to show, in their order.
        arguments (`dict`): all settings that differ from their defaults.
        evaluation (`dict`, *optional*): the last one while training: `step`, and by `prior`, `posterior` and `no_latents` the `nll`
            and `accuracy`.
        datasets (`dict[str, str | None]`): commit by Hub id, of all sources.
        licences (`dict[str, str]`): of the data, by source.
        license (`str`, *optional*): of the weights, an id of the Hub.
        device (`str`, *optional*): what it was trained on.
        code (`dict`): see [`~model_cards.provenance.code_version`].
        versions (`dict[str, str]`): of the libraries.
        weights (`str`, *optional*): see [`~model_cards.provenance.weights_sample`]: which weights all this is of.
    """

    title: str
    latents: dict
    hub_model_id: str | None = None
    base: str | None = None
    base_revision: str | None = None
    base_is_amvl: bool = False
    is_adapter: bool = False
    is_trained: bool = False
    num_steps: int | None = None
    settings: dict = field(default_factory=dict)
    arguments: dict = field(default_factory=dict)
    evaluation: dict | None = None
    datasets: dict = field(default_factory=dict)
    licences: dict = field(default_factory=dict)
    license: str | None = None
    device: str | None = None
    code: dict = field(default_factory=dict)
    versions: dict = field(default_factory=dict)
    weights: str | None = None

    def save(self, folder):
        """Writes them into a folder beside its weights, as they may be published."""
        self.weights = weights_sample(folder)
        text = json.dumps(public(asdict(self)), indent=1, ensure_ascii=False)
        (Path(folder) / FACTS).write_text(text + "\n", encoding="utf-8")


def read_facts(folder):
    """
    The facts of a checkpoint's folder; of one without `amvl_training.json`, or with weights that were saved over those that it is of,
    what its configuration says.

    Args:
        folder (`str` or `Path`): with the `config.json` of an AMVL model.

    Returns:
        [`TrainingFacts`].

    Raises:
        ValueError: no checkpoint of an AMVL model, or files that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`{folder}` is no folder: name the one that a checkpoint was saved in.")
    config = read_json(folder / "config.json", "a configuration, so that this is no checkpoint") or {}
    if config.get("model_type") != "amvl":
        raise ValueError(
            f"`{folder}` has no config.json of an AMVL model, its `model_type` is {config.get('model_type')!r}: name the folder of a "
            "saved checkpoint."
        )
    latents = {name: config.get(name) for name in LATENTS}
    if not isinstance(latents["num_latents"], int) or not isinstance(latents["latent_size"], int):
        raise ValueError(f"`{folder / 'config.json'}` has no `num_latents` and `latent_size`: save the model again.")
    values = read_json(folder / FACTS, "the facts that the trainer wrote")
    adapter = (folder / "adapter_config.json").is_file()
    bare = TrainingFacts(folder.resolve().name, latents, is_adapter=adapter)
    if values is None:
        return bare
    kinds = {setting.name: setting.type for setting in fields(TrainingFacts)}
    wrong = [name for name, kind in kinds.items() if name in values and not isinstance(values[name], kind)]
    wrong += sorted({"title", "latents"} - values.keys()) + sorted(values.keys() - kinds.keys())
    wrong += [f"evaluation.{name}" for name in _wrong_in_evaluation(values.get("evaluation"))]
    if wrong:
        raise ValueError(
            f"`{folder / FACTS}` has no, other or unknown values of {wrong}: it is not as the trainer wrote it. Remove it, and the "
            "card says that the training is not known."
        )
    if values.get("weights") is not None and values["weights"] != weights_sample(folder):
        logger.warning("Left out of the card: `%s` is of other weights than `%s` has now.", folder / FACTS, folder)
        return bare
    return TrainingFacts(**{**values, "latents": latents})  # the configuration is what will be loaded


def note_weights(folder):
    """Says in the facts of a folder that the weights there are theirs: for whoever writes them in another form."""
    path = Path(folder) / FACTS
    values = read_json(path, "the facts that the trainer wrote")
    if values is not None:
        values["weights"] = weights_sample(folder)
        path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


LATENTS = (
    "num_latents",
    "latent_size",
    "latent_temperature",
    "latent_token_id",
    "initial_token_id",
    "min_log_variance",
    "max_log_variance",
)
SOURCES = ("prior", "posterior", "no_latents")


def _wrong_in_evaluation(evaluation):
    if not isinstance(evaluation, dict):
        return []
    numbers = {"step": evaluation.get("step")}
    for source in SOURCES:
        values = evaluation.get(source)
        for key in ("nll", "accuracy"):
            numbers[f"{source}.{key}"] = value = values.get(key) if isinstance(values, dict) else None
            if value in ("nan", "inf", "-inf"):  # of a run that failed, see `public`
                numbers[f"{source}.{key}"] = values[key] = float(value)
    return [name for name, value in numbers.items() if isinstance(value, bool) or not isinstance(value, (int, float))]


def read_json(path, what):
    """
    The object in a JSON file; `None` if there is no file.

    Args:
        path (`Path`): the file.
        what (`str`): what an error says that it should hold.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"`{path}` cannot be read as JSON ({error}): it should hold {what}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"`{path}` holds a {type(values).__name__}: it should hold {what}.")
    return values
