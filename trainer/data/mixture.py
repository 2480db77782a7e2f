"""A mixture: which sources are trained on, how often each, filtered how, and which images belong to the evaluation."""

import logging
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml
from datasets import concatenate_datasets

from modeling_amvl import AMVLProcessor

from .files import is_hub_id
from .images import check_image, fingerprints
from .reader import BAD_ROWS, licence_text, scratch_folder
from .report import DataReport
from .rows import ANSWERS, BadRow
from .sources import READERS, open_source


logger = logging.getLogger(__name__)

SPLITS = ("train", "test")
# What a source may say; the rest of a reader's settings is the mixture's.
OF_A_SOURCE = [
    "format",
    "name",
    "config",
    "split",
    "revision",
    "image_root",
    "max_rows",
    "weight",
    "filters",
    "source",
]
OF_A_SOURCE += ["licence", "answer", "bad_rows"]


@dataclass
class Mixture:
    """
    What a YAML file says of the data.

    Args:
        sources (`list[dict]`): each with `format` and the settings of its [`Reader`]: `name`, `config`, `split`, `weight`, `filters`,
            `licence`, `max_rows`, `image_root`, `source`, `revision`, and `answer` and `bad_rows` where they differ.
        evaluation (`list[dict]`, *optional*): sources of the split `test`. No training row has an image of theirs, as far as a
            perceptual hash can tell; images of records whose answers are hidden count, too.
        answer (`str`, defaults to `"answer"`), bad_rows (`str`, defaults to `"drop"`), seed (`int`, defaults to 0): for all sources.
        processor (`str`, *optional*): Hub id or folder. Rows that it cannot take are dropped; the report counts tokens with it.
        min_pixels (`int`, *optional*), max_pixels (`int`, *optional*): the image budget of `processor`, of training on the rows, and
            so of the checkpoint. Images are stored as they are.

    Raises:
        ValueError: an unknown key, no source, or a setting that no reader takes.
    """

    sources: list[dict]
    evaluation: list[dict] = field(default_factory=list)
    answer: str = "answer"
    bad_rows: str = "drop"
    seed: int = 0
    processor: str | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None

    def __post_init__(self):
        self.evaluation = self.evaluation or []
        for name, choices in (("answer", ANSWERS), ("bad_rows", BAD_ROWS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {choices}, got {getattr(self, name)!r}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"`seed` must be a whole number, got {self.seed!r}.")
        for name in ("sources", "evaluation"):
            for number, source in enumerate(_list_of(getattr(self, name), name)):
                if not isinstance(source, dict) or source.get("format") not in list(READERS):
                    raise ValueError(
                        f"`{name}` number {number + 1} is {source!r:.200}: it must have a `format`, one of {list(READERS)}."
                    )
                if unknown := sorted(map(str, set(source) - set(OF_A_SOURCE))):
                    raise ValueError(
                        f"`{name}` number {number + 1} has {unknown}, which no source has: choose among {OF_A_SOURCE}."
                    )
        if self.processor is not None and not isinstance(self.processor, str):
            raise ValueError(f"`processor` must be a Hub id or a folder, got {self.processor!r}.")
        if not self.sources:
            raise ValueError("`sources` is empty: name at least one source to train on.")
        if self.processor is None and (self.min_pixels is not None or self.max_pixels is not None):
            raise ValueError(
                f"`min_pixels` ({self.min_pixels}) and `max_pixels` ({self.max_pixels}) are a processor's image budget: name "
                "a `processor`, or leave them out."
            )

    @classmethod
    def from_yaml(cls, path):
        """
        The mixture that a file describes.

        Args:
            path (`str` or `Path`): to a YAML file with the fields of this class.
        """
        if not Path(path).is_file():
            raise ValueError(f"the mixture `{path}` does not exist: give the path of a YAML file.")
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"the mixture `{path}` is no YAML: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"the mixture `{path}` holds a {type(values).__name__}: it must have a key `sources`.")
        known = [setting.name for setting in fields(cls)]
        if unknown := sorted(map(str, set(values) - set(known))):
            raise ValueError(
                f"the mixture `{path}` has the keys {unknown}, which nothing reads: choose among {known}."
            )
        if "sources" not in values:
            raise ValueError(f"the mixture `{path}` has no `sources`: list at least one.")
        return cls(**values)

    def load_processor(self):
        """The processor with its image budget, or `None`."""
        if self.processor is None:
            return None
        is_amvl = "backbone_processor_class" in AMVLProcessor.get_processor_dict(self.processor)[0]
        load = AMVLProcessor.from_pretrained if is_amvl else AMVLProcessor.from_backbone
        return load(self.processor, min_pixels=self.min_pixels, max_pixels=self.max_pixels)

    def readers(self, split, report_dir, processor=None, evaluation_hashes=()):
        """
        The readers of a split.

        Args:
            split (`"train"` or `"test"`): `sources`, or `evaluation`.
            report_dir (`str`): where they write their counts.
            processor (`ProcessorMixin`, *optional*): what [`Mixture.load_processor`] gave.
            evaluation_hashes (`list[int]`): images that the rows must not have.

        Returns:
            `list[Reader]`.
        """
        common = {"answer": self.answer, "bad_rows": self.bad_rows, "seed": self.seed}
        common |= {"processor": processor, "report_dir": str(report_dir), "evaluation_hashes": evaluation_hashes}
        sources = self.sources if split == "train" else self.evaluation
        readers = [open_source(**{**common, **source}) for source in sources]
        _tell_apart(readers, split)
        return readers

    def read(self, processor=None):
        """
        All rows at once, without preparing them: for what fits.

        Args:
            processor (`ProcessorMixin`, *optional*): of the model that is trained, instead of `processor`.

        Returns:
            `tuple[Dataset, Dataset | None, dict[str, DataReport]]`: the rows of the splits `train` and `test`, and the report of each.

        Raises:
            ValueError: no record of `sources` can be trained on.
        """
        processor = processor or self.load_processor()
        rows, reports, hashes = dict.fromkeys(SPLITS), {}, []
        for split in reversed(SPLITS):
            folder = scratch_folder()
            readers = self.readers(split, folder, processor, hashes)
            if split == "test":
                hashes = [
                    value for reader in readers for shard in reader.all_shards for value in hashes_of(reader, shard)
                ]
            parts = [dataset for reader in readers if (dataset := reader.read_or_none()) is not None]
            if readers:
                settings = readers[0].report.settings
                reports[split] = DataReport(folder, licences_of(readers), settings=settings)
                warn_of_empty(reports[split])
            if parts:
                rows[split] = concatenate_datasets(parts)
                rows[split].info.license = licence_text(licences_of(readers))
        if rows["train"] is None:
            raise ValueError(f"the mixture has no row that can be trained on: {reports['train']}")
        return rows["train"], rows["test"], reports


def _tell_apart(readers, split):
    """Gives sources of one name, `trl` say, the names of their folders, too: reports and licences go by the name."""
    counts = Counter(name for reader in readers for name in reader.licences())
    for reader in readers:
        names = list(reader.licences())
        if reader.source is None and names == [reader.format] and counts[reader.format] > 1:
            reader.source = f"{reader.format} ({reader.name if is_hub_id(reader.name) else Path(reader.name).name})"
    seen = {}
    for number, reader in enumerate(readers, start=1):
        for name in reader.licences():
            if name in seen:
                raise ValueError(
                    f"{split} sources number {seen[name]} and {number} both call their rows {name!r}, so that neither report nor "
                    "licences could tell them apart: give one of them a `source`, a name of its own."
                )
            seen[name] = number


def licences_of(readers):
    """Licences by source."""
    return {name: licence for reader in readers for name, licence in reader.licences().items()}


def warn_of_empty(report):
    """Warns of each source that has no row left."""
    for name in report.licences:
        if not report.kept.get(name):
            logger.warning("The source `%s` has no row left: look at the report for the reasons.", name)


def hashes_of(reader, shard):
    """
    Fingerprints of the images of a shard's questions, also of records that no row can be made of.

    Args:
        reader ([`Reader`]): of an evaluation source.
        shard ([`Shard`]): one of its `all_shards`.

    Yields:
        `int`: [`fingerprints`] of each image that can be opened.
    """
    for _, _, record in reader.records(shard):
        for value in _images_of(reader, record, shard.source):
            try:
                yield from fingerprints(check_image(reader.stored(value), repair=True)[1])
            except BadRow:  # what cannot be opened cannot be trained on either
                continue


def _images_of(reader, record, subset):
    try:
        drafts = reader.convert(record, subset) if isinstance(record, dict) else []
    except BadRow:  # a hidden answer, say
        return [value for value in record.values() if isinstance(value, dict) and {"bytes", "path"} <= set(value)]
    drafts = drafts if isinstance(drafts, list) else [drafts]
    return [value for draft in drafts if not isinstance(draft, BadRow) for value in draft.images]


def _list_of(value, name):
    if not isinstance(value, list):
        raise ValueError(f"`{name}` must be a list of sources, got {value!r:.200}.")
    return value
