"""Filters that a mixture names: functions of a row that say whether it stays."""

import functools
import importlib
import importlib.util
import inspect
from pathlib import Path

from .rows import texts_of


def answer_words(row, most):
    """Keeps answers of at most `most` words."""
    return len(" ".join(texts_of(row["completion"])).split()) <= most


def question_words(row, fewest=1):
    """Keeps questions of at least `fewest` words."""
    return len(" ".join(texts_of(row["prompt"], "user")).split()) >= fewest


def image_side(row, fewest):
    """Keeps rows whose images are all at least `fewest` pixels wide and high, as stored."""
    return all(min(picture.info["size"]) >= fewest for picture in row["images"])


def load_filter(spec):
    """
    The function that a YAML file names.

    Args:
        spec (`str`, `dict` or `Callable`): `"package.module.function"`, `"path/to/file.py:function"`, or one of them with its
            arguments, `{"trainer.data.filters.answer_words": {"most": 5}}`. It gets a row, with the columns of a training row and
            `images` as PIL images in RGB, perhaps smaller than stored (`image.info["size"]` is the stored width and height).

    Returns:
        `tuple[str, Callable]`: its name and the function, arguments filled in.

    Raises:
        ValueError: it names no function.
    """
    if callable(spec):
        return getattr(spec, "__qualname__", repr(spec)), spec
    name, arguments = spec, {}
    if isinstance(spec, dict) and len(spec) == 1:
        ((name, arguments),) = spec.items()
    if not isinstance(name, str) or not isinstance(arguments or {}, dict):
        raise ValueError(
            f"`filters` holds {spec!r}: it must be the name of a function, or a name with its arguments, "
            "`{module.function: {argument: value}}`."
        )
    try:
        if ":" in name:
            path, function_name = name.rsplit(":", 1)
            module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
            module = importlib.util.module_from_spec(module_spec)
            module_spec.loader.exec_module(module)
        else:
            module_name, function_name = name.rsplit(".", 1)
            module = importlib.import_module(module_name)
        function = getattr(module, function_name)
    except Exception as error:  # whatever the module's own code raises
        raise ValueError(
            f"`filters` names {name!r}, which cannot be loaded ({error}): write 'package.module.function' or "
            "'path/to/file.py:function'."
        ) from error
    if not callable(function):
        raise ValueError(f"`filters` names {name!r}, which is a `{type(function).__name__}` and no function.")
    try:
        inspect.signature(function).bind({}, **(arguments or {}))
    except TypeError as error:
        raise ValueError(
            f"`filters` gives {name!r} a row and {arguments or 'no arguments'}, but it takes no such arguments: {error}."
        ) from error
    return Path(name).name, functools.partial(function, **(arguments or {}))
