"""Publishes a Space that asks an AMVL model of the Hub, at one commit of it.

    python recipes/push_space.py you/amvl-space --model you/amvl-demo

A Space of that name is written over. `hf auth login` comes first; ZeroGPU or another GPU is chosen in the Space's settings.
"""

import argparse
import json
import re
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, SpaceCard
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError


SPACE = Path(__file__).resolve().parents[1] / "model_cards" / "space"
CONFIGS = {  # where transformers looks for the names of code, as in app.py
    *("config.json", "processor_config.json", "tokenizer_config.json"),
    *("preprocessor_config.json", "video_preprocessor_config.json"),
}


def read_config(path):
    """What a JSON file holds, and each `auto_map` in it, at any depth, as text."""
    maps = []

    def note(found):
        maps.append(json.dumps(found.get("auto_map")))
        return found

    return json.loads(Path(path).read_text(encoding="utf-8"), object_hook=note), maps


def find_model(api, model, revision):
    """
    The commit that a revision of an AMVL model is.

    Args:
        api (`HfApi`): logged in where the model is private.
        model (`str`): `"user/name"`.
        revision (`str`): a branch, a tag or a commit.

    Returns:
        `str`: 40 digits.

    Raises:
        ValueError: no such model or revision, or none that the Space can load.
    """
    try:
        commit = api.model_info(model, revision=revision).sha
        files = set(api.list_repo_files(model, revision=commit))
        paths = {name: api.hf_hub_download(model, name, revision=commit) for name in sorted(CONFIGS & files)}
    except RevisionNotFoundError as error:
        raise ValueError(
            f"`revision` is {revision!r}, which `{model}` does not have: name a branch or a commit of it."
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"`model` is {model!r}, which is not on the Hub or private: push it first (`trainer.hub.push_folder`), or log in."
        ) from error
    if "adapter_config.json" in files:
        raise ValueError(
            f"`model` is {model!r}, an adapter: push the merged model (`trainer.adapters.merge_adapter`)."
        )
    config, maps = {}, {}
    for name, path in paths.items():
        try:
            settings, maps[name] = read_config(path)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"`model` is {model!r}, whose {name} cannot be read: {error}: push it anew.") from error
        if name == "config.json" and isinstance(settings, dict):
            config = settings
    auto_map = config.get("auto_map")
    is_named = isinstance(auto_map, dict) and isinstance(auto_map.get("AutoModelForImageTextToText"), str)
    if config.get("model_type") != "amvl" or not is_named:
        raise ValueError(
            f"`model` is {model!r}, whose config.json is of type {config.get('model_type')!r} with code "
            f"{auto_map}: the Space asks an AMVL model, as `save_pretrained` writes it with its code."
        )
    for name, classes in ((name, classes) for name, found in maps.items() for classes in found):
        if "--" in classes:
            raise ValueError(
                f"`model` is {model!r}, whose {name} takes its code from another repository, {classes[:200]}, at no "
                "commit that the Space could name: push the model with its own code, as `trainer.hub.push_folder` does."
            )
    if "configuration_files" in config:
        raise ValueError(
            f"`model` is {model!r}, whose config.json has `configuration_files`, which would be read in its place: leave them out."
        )
    return commit


def space_files(model, commit):
    """
    What the Space holds: the files of model_cards/space, asking one commit of a model.

    Args:
        model (`str`), commit (`str`): of the Hub.

    Returns:
        `dict[str, bytes]`: by name.
    """
    code = (SPACE / "app.py").read_text(encoding="utf-8")
    for name, value in {"MODEL": model, "REVISION": commit}.items():
        line = f"{name} = os.environ.get({json.dumps(name)}, {json.dumps(value)})"
        code, num_found = re.subn(rf"^{name} = os\.environ\.get\(.*\)$", line, code, flags=re.MULTILINE)
        assert num_found == 1, f"{SPACE}/app.py sets `{name}` {num_found} times"
    card = SpaceCard.load(SPACE / "README.md")
    card.data["models"] = [model]
    requirements = (SPACE / "requirements.txt").read_bytes()
    return {"app.py": code.encode(), "README.md": str(card).encode(), "requirements.txt": requirements}


def push_space(space, model, revision="main", token=None, private=None):
    """
    Publishes the Space in one commit, and makes it where there is none.

    Args:
        space (`str`): `"user/name"`.
        model (`str`), revision (`str`, defaults to `"main"`): the AMVL model; a branch is resolved to its commit.
        token (`str`, *optional*): by default the one of `HF_TOKEN` or of `hf auth login`.
        private (`bool`, *optional*): only for a new Space.

    Returns:
        `tuple[str, str]`: the Space's address, and the commit of the model.

    Raises:
        ValueError: the model cannot be asked, see [`find_model`], or the Space not be written to.
    """
    api = HfApi(token=token)
    commit = find_model(api, model, revision)
    operations = [CommitOperationAdd(name, data) for name, data in space_files(model, commit).items()]
    try:
        made = api.create_repo(space, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        api.create_commit(made.repo_id, operations, repo_type="space", commit_message=f"Ask {model} at {commit[:8]}")
    except HfHubHTTPError as error:
        raise ValueError(
            f"`space` is {space!r}, to which nothing can be pushed: {error}\nLog in with `hf auth login`, by a token that may write there."
        ) from error
    return str(made), commit


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("space", help="The Space, as `user/name`.")
    parser.add_argument("--model", required=True, help="An AMVL model on the Hub, as `user/name`.")
    parser.add_argument("--revision", default="main", help="Branch, tag or commit of the model; `main` by default.")
    parser.add_argument("--private", action="store_true", default=None, help="Make a new Space private.")
    arguments = parser.parse_args()
    try:
        address, commit = push_space(arguments.space, arguments.model, arguments.revision, private=arguments.private)
    except (ValueError, HTTPError) as error:
        raise SystemExit(f"{parser.prog}: {error}") from error
    print(f"{address} asks {arguments.model} at {commit}.")


if __name__ == "__main__":
    main()
