"""The models of an evaluation: what each is, before its weights are loaded, and whether it can be asked as was asked for."""

import functools
import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoModelForImageTextToText, PreTrainedConfig

from modeling_amvl import AMVLForConditionalGeneration, AMVLProcessor


logger = logging.getLogger(__name__)

LATENTS = {"prior": "prior", "none": "no_latents"}  # as the command calls a source of latents, and `answer_batch`
RESERVED = ("chance", "constant")  # columns of every table
READ_WITH_A_MODEL = (".safetensors", ".bin", ".json", ".jinja", ".txt", ".model")
# A file above the limit goes into the fingerprint by its time and by blocks, for it takes minutes to read.
MAX_HASHED, BLOCKS, BLOCK_SIZE = 2**32, 64, 2**16


@dataclass
class Arm:
    """
    A model, asked in one way.

    Args:
        name (`str`): of the column.
        path (`str`): Hub id or folder.
        model_type (`str`): `"amvl"`, or the stock model's.
        source (`"prior"` or `"no_latents"`): where the latents come from.
        num_latents (`int`, *optional*), temperature (`float`, *optional*): k and tau; `None` without latents.
        image_budget (`dict`): of its processor.
        version (`dict`): what tells its weights from others: the Hub's commit, or a fingerprint of the files.
    """

    name: str
    path: str
    model_type: str
    source: str
    num_latents: int | None
    temperature: float | None
    image_budget: dict
    version: dict
    processor: object = None


def parse_models(models):
    """
    Names and paths of the models to compare.

    Args:
        models (`list[str]`): each `name=path`.

    Returns:
        `dict[str, str]`: path by name.

    Raises:
        ValueError: another form, a name twice, or one of `RESERVED`.
    """
    if not models:
        raise ValueError("`models` is empty: give `--models base=PATH amvl=PATH`, a name and a Hub id or folder each.")
    named = {}
    for given in models:
        name, _, path = given.partition("=")
        if (
            not path
            or not name
            or not all(letter.isalnum() or letter in "-_." for letter in name)
            or name.startswith(".")
        ):
            raise ValueError(
                f"`models` has {given!r}: write `name=path`, the name of letters, digits, '-', '_' and '.'."
            )
        if name in RESERVED:
            raise ValueError(f"`models` has the name {name!r}, which is a column of every table: use another name.")
        if name in named:
            raise ValueError(f"`models` has the name {name!r} twice: a name is a column of the table.")
        named[name] = path
    return named


def plan_arms(
    models, latents=None, temperature=None, num_latents=None, min_pixels=None, max_pixels=None, revisions=None
):
    """
    What will be asked, checked against each model's configuration and processor; no weight is loaded.

    Args:
        models (`dict[str, str]`): path by name.
        latents (`list[str]`, *optional*): of `"prior"` and `"none"`, each an arm of every AMVL model; the prior by default.
        temperature (`float`, *optional*): tau of every AMVL model; by default its configuration's.
        num_latents (`int`, *optional*): what k must be.
        min_pixels (`int`, *optional*), max_pixels (`int`, *optional*): the image budget of all; each model's own by default.
        revisions (`dict[str, str]`, *optional*): of a model's repository, by name.

    Returns:
        `list[Arm]`.

    Raises:
        ValueError: a model that cannot be read, a setting of latents that would change nothing, also `latents` itself, an
            image budget that a processor cannot be given.
    """
    given, latents = latents, ["prior"] if latents is None else list(dict.fromkeys(latents))
    if not latents or (unknown := sorted(set(latents) - set(LATENTS))):
        raise ValueError(f"`latents` must be of {list(LATENTS)}, got {latents if not latents else unknown}.")
    if temperature is not None and not 0 <= temperature < float("inf"):
        raise ValueError(f"`latent_temperature` must be 0 or more, got {temperature}.")
    revisions, arms = revisions or {}, []
    if unknown := sorted(set(revisions) - set(models)):
        raise ValueError(f"`revisions` names {unknown}, but the models are {list(models)}.")
    for name, path in models.items():
        revision = revisions.get(name)
        try:
            config, why = PreTrainedConfig.get_config_dict(path, revision=revision)[0], "it names no `model_type`."
        except OSError as error:
            config, why = {}, str(error)
        if config.get("model_type") is None:
            raise ValueError(
                f"`models` has {name}={path!r}, which has no configuration that can be read: {why} A LoRA run saves its "
                "merged model in the folder `merged`."
            )
        is_amvl = config.get("model_type") == "amvl"
        load = AMVLProcessor.from_pretrained if is_amvl else AMVLProcessor.from_backbone
        processor = load(path, min_pixels=min_pixels, max_pixels=max_pixels, revision=revision)
        if is_amvl and num_latents is not None and config["num_latents"] != num_latents:
            raise ValueError(
                f"`num_latents` is {num_latents}, but `{path}` was trained with {config['num_latents']}: leave it out."
            )
        version = _version(path, config)
        for source in latents if is_amvl else ["none"]:
            has = source == "prior"
            arms.append(
                Arm(
                    name=f"{name}-latents-off" if is_amvl and not has else name,
                    path=path,
                    model_type=config.get("model_type"),
                    source=LATENTS[source],
                    num_latents=config["num_latents"] if has else None,
                    temperature=(config.get("latent_temperature", 0.0) if temperature is None else temperature)
                    if has
                    else None,
                    image_budget=processor.image_budget,
                    version=version | ({"revision": revision} if revision else {}),
                    processor=processor,
                )
            )
    names = [arm.name for arm in arms]
    if len(set(names)) != len(names):
        raise ValueError(f"`models` gives the columns {names}, one of them twice: use other names.")
    if not any(arm.source == "prior" for arm in arms):
        for key, value in (("latent_temperature", temperature), ("num_latents", num_latents)):
            if value is not None:
                raise ValueError(
                    f"`{key}` is {value}, but no model is asked with latents, and it would change nothing: leave it out."
                )
        if given is not None and not any(arm.model_type == "amvl" for arm in arms):
            raise ValueError(f"`latents` is {latents}, but none of {list(models)} is an AMVL model: leave it out.")
    _warn_of_budgets(arms)
    return arms


def _warn_of_budgets(arms):
    budgets = {json.dumps(arm.image_budget, sort_keys=True) for arm in arms}
    if len(budgets) > 1:
        shown = "; ".join(f"{arm.name}: {arm.image_budget}" for arm in arms)
        logger.warning(
            "The models see images under different budgets, which alone may change their scores: %s. Set `min_pixels` and "
            "`max_pixels` for all of them.",
            shown,
        )


def load_model(arm, device, dtype="auto", attn_implementation=None):
    """The model of an arm, in evaluation mode on a device."""
    load = AMVLForConditionalGeneration if arm.model_type == "amvl" else AutoModelForImageTextToText
    settings = {"dtype": dtype, "revision": arm.version.get("revision")}
    if attn_implementation is not None:
        settings["attn_implementation"] = attn_implementation
    return load.from_pretrained(arm.path, **settings).eval().to(device)


def _version(path, config):
    """The commit of a repository; of a folder, a hash of its weights and of what its processor is read from."""
    if not Path(path).is_dir():
        return {"commit": config.get("_commit_hash")}
    digest = hashlib.sha256()
    for file in sorted(file for file in Path(path).iterdir() if file.suffix in READ_WITH_A_MODEL and file.is_file()):
        state = file.stat()
        digest.update(f"{file.name} {_hash_of_file(file, state.st_size, state.st_mtime_ns)}\n".encode())
    return {"weights": digest.hexdigest()[:16]}


@functools.cache
def _hash_of_file(file, size, changed):
    with open(file, "rb") as stream:
        if size <= MAX_HASHED:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        digest = hashlib.sha256(f"{size} {changed}".encode())
        for block in range(BLOCKS):
            stream.seek(block * (size // BLOCKS))
            digest.update(stream.read(BLOCK_SIZE))
        return digest.hexdigest()
