"""The readers by the name of their format."""

import inspect

from .blink import BlinkReader
from .llava import LlavaReader
from .monet import MonetReader
from .reader import Reader
from .refocus import ReFocusReader
from .trl_format import TRLReader
from .visual_cot import VisualCoTReader
from .zebra_cot import ZebraCoTReader


READERS = {
    reader.format: reader
    for reader in (MonetReader, VisualCoTReader, ReFocusReader, ZebraCoTReader, TRLReader, LlavaReader, BlinkReader)
}


def open_source(format, name=None, **settings):
    """
    The reader of a source.

    Args:
        format (`str`): `"monet"`, `"visual_cot"`, `"refocus"`, `"zebra_cot"`, `"trl"`, `"llava"` or `"blink"`. CogCoM is a folder of
            Monet-SFT-125K: `"monet"` with `config="CogCoM"`.
        name (`str`, *optional*): Hub id or local path; by default where the source is found on the Hub.
        **settings: of [`Reader`].

    Returns:
        [`Reader`]: its `read()` gives the rows and the report.

    Raises:
        ValueError: no such format; no name where there is no default; a setting that cannot be used.
    """
    if format not in list(READERS):
        raise ValueError(f"`format` must be one of {list(READERS)}, got {format!r}.")
    reader = READERS[format]
    name = name or reader.hub_id
    if not name:
        raise ValueError(f"`name` is needed with the format {format!r}: a Hub id or a local path.")
    known = [*inspect.signature(Reader).parameters]
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(f"`{name}` is given {unknown}, which no reader knows: choose among {known}.")
    return reader(name, **settings)


def read_rows(format, name=None, **settings):
    """
    The rows of a source and what became of its records: [`open_source`] and `read()` in one call.

    Returns:
        `tuple[Dataset | IterableDataset, DataReport]`: columns `images`, `prompt`, `completion`, `source` and `row_id`.
    """
    return open_source(format, name, **settings).read()
