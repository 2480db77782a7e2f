"""What every reader does with a source: finds its records, checks what they became, counts, gives map-style or streamed rows."""

import atexit
import hashlib
import json
import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset
from datasets import config as datasets_config
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import DatasetCard

from ..bars import bar
from ..collator import AMVLDataCollator
from .files import BadLine, SourceFiles, read_records
from .filters import load_filter
from .images import KnownImages, check_image, store_image
from .report import DataReport, SourceReport, priority, write_part
from .rows import ANSWERS, FEATURES, BadRow, brief, check_texts, message
from .tables import LOADERS, SourceTables


JSON_SUFFIXES = (".json", ".jsonl")
METADATA = ("dataset_infos", "dataset_info", "dataset_dict", "state", "report", "report_test")  # names of no data
BAD_ROWS = ("drop", "repair", "raise")
RECORDS_PER_SHARD = 500  # of a JSON file
# Settings under which other counts come out.
COUNTED_UNDER = [
    "format",
    "name",
    "split",
    "configs",
    "answer",
    "bad_rows",
    "max_rows",
    "image_root",
    "revision",
    "weight",
    "filters",
    "source",
    "seed",
]
ROWS_PER_PART = 500  # a shard's counts are written at least this often


class Draft(NamedTuple):
    """What a record says, before it is known whether it can be trained on."""

    images: list[Any]  # as the record has them: paths, bytes, ...
    prompt: list[dict]  # messages
    answer: Any  # y


class Shard(NamedTuple):
    """A part of a source that is read in one go."""

    source: str  # subset or config, as in the rows' column `source`
    file: str | None  # a JSON file; `None` is a table
    index: int  # first record of the file, or which of the table's shards
    stop: int | None  # the record after the last one; `None` for a table


class Reader:
    """
    Reads one source into rows with the columns `images`, `prompt`, `completion`, `source` and `row_id`.

    x is `images` and `prompt`: only the question and its images, never an auxiliary image or any text of the answer. A
    subclass says which files there are and what x and y of a record are.

    Args:
        name (`str`): Hub id, local folder of the same shape, or one file of it.
        split (`str`, defaults to `"train"`): where the source has splits.
        config (`str` or `list[str]`, *optional*): which subsets or configs; all by default.
        answer (`"answer"` or `"rationale"`, defaults to `"answer"`): y is the answer alone, or rationale and answer. Which of them
            the paper trains on is not stated.
        bad_rows (`"drop"`, `"repair"` or `"raise"`, defaults to `"drop"`): what happens to a record that cannot be trained on: it is
            counted and left out; the same, but images in CMYK, of 16 bits or rotated by EXIF are mended; or reading stops.
        max_rows (`int`, *optional*): most records of each subset.
        image_root (`str`, *optional*): where the image paths of the records start, if not at `name`.
        revision (`str`, *optional*): of the Hub's repository.
        streaming (`bool`, defaults to `False`): give an `IterableDataset`, and fetch the files of a Hub id one by one.
        weight (`float`, defaults to 1): how often each row is taken: 0.1 takes a tenth of them, drawn by `seed`, 3 takes each three
            times.
        filters (`list`, *optional*): see [`load_filter`]; rows for which one is false are dropped.
        source (`str`, *optional*): what the column `source` says, instead of the subset or the format.
        licence (`str` or `list[str]`, *optional*): of the source; by default what its card says.
        processor (`ProcessorMixin`, *optional*): rows that it cannot take are dropped, and tokens are counted with it.
        seed (`int`, defaults to 0): of `weight`.
        report_dir (`str`, *optional*): where the counts of each shard are written; a temporary folder by default.
        evaluation_hashes (`list[int]`, *optional*): [`fingerprints`] of images that no row may have.

    Raises:
        ValueError: a setting, a folder or a file that cannot be used; before a row is read.
    """

    format = ""
    hub_id = ""
    default_licence = "not stated"
    missing_images_hint = ""
    json_first = False  # where a folder has tables, too

    def __init__(
        self,
        name,
        split="train",
        config=None,
        answer="answer",
        bad_rows="drop",
        max_rows=None,
        image_root=None,
        revision=None,
        streaming=False,
        weight=1.0,
        filters=(),
        source=None,
        licence=None,
        processor=None,
        seed=0,
        report_dir=None,
        evaluation_hashes=(),
    ):
        for argument, value, choices in (("answer", answer, ANSWERS), ("bad_rows", bad_rows, BAD_ROWS)):
            if value not in choices:
                *others, last = map(repr, choices)
                raise ValueError(f"`{argument}` must be {', '.join(others)} or {last}, got {value!r}.")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            raise ValueError(
                f"`weight` must be a number above 0, got {weight!r}: leave a source out to take none of it."
            )
        if max_rows is not None and (isinstance(max_rows, bool) or not isinstance(max_rows, int) or max_rows < 1):
            raise ValueError(f"`max_rows` must be at least 1, got {max_rows!r}; `None` reads all.")
        config = [config] if isinstance(config, str) else config
        are_names = isinstance(config, (list, tuple)) and all(isinstance(name, str) and name for name in config)
        if config is not None and not (are_names and config):
            raise ValueError(f"`config` must be a name or a list of names, got {config!r}; `None` reads all.")
        if licence is not None and _licence_name(licence) is None:
            raise ValueError(f"`licence` must be a text or a list of texts, got {licence!r}.")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"`seed` must be a whole number, got {seed!r}.")
        for argument, value in (("split", split), ("revision", revision), ("source", source)):
            may_lack = argument != "split" and value is None
            if not may_lack and not (isinstance(value, str) and value):
                raise ValueError(f"`{argument}` must be a text, got {value!r}.")
        if not isinstance(filters or (), (list, tuple)):
            raise ValueError(f"`filters` must be a list, got {filters!r}.")
        if not isinstance(streaming, bool):
            raise ValueError(f"`streaming` must be `True` or `False`, got {streaming!r}.")
        self.name, self.split, self.answer, self.bad_rows = str(name), split, answer, bad_rows
        self.configs = None if config is None else list(dict.fromkeys(config))
        self.max_rows, self.image_root, self.revision, self.streaming = max_rows, image_root, revision, streaming
        self.weight, self.filters, self.source, self.seed = weight, list(filters or ()), source, seed
        for spec in self.filters:
            load_filter(spec)
        self.processor, self.evaluation_hashes = processor, list(evaluation_hashes)
        self.path, self._pieces = Path(self.name).absolute(), None
        self.files = self.open_files()
        self.json_sources = self.json_files()
        self.tables = SourceTables(self.name, self.path, self.files.folder, split, revision, streaming)
        self.licence = _licence_name(licence) or self._licence_of_card() or self.default_licence
        self.report_dir = str(report_dir or scratch_folder())
        self.all_shards = self.shards()

    # -----------------------------------------------------------------------------------------------------------------
    # What a subclass says
    # -----------------------------------------------------------------------------------------------------------------

    def open_files(self):
        """The source's files; of a repository all of them are fetched first, if they are JSON and its images."""
        self.files = SourceFiles(self.name, self.image_root, self.revision, lazy=True)
        if self.files.repository and not self.streaming and self.json_files():
            return SourceFiles(self.name, self.image_root, self.revision)
        return self.files

    def json_files(self):
        """The JSON files to read, by what the rows' column `source` says of them; none means that the source is a table."""
        if self.path.is_file():
            if self.configs:
                raise ValueError(f"`config` names {self.configs}, but `{self.name}` is one file: leave it out.")
            if self.path.suffix not in JSON_SUFFIXES:
                return {}
            self._refuse_split([self.path.name])
            return {"": [self.path.name]}
        found = self._json_names()
        if not found or not self.json_first and any(map(self.files.glob, ("**/*.parquet", "**/*.arrow"))):
            return {}
        if self.configs:
            if unknown := sorted(set(self.configs) - set(found)):
                raise ValueError(f"`config` names {unknown}, but `{self.name}` has the files {found}.")
            self._refuse_split(self.configs)
            return {"": self.configs}
        if len(found) > 1:
            named = [name for name in found if Path(name).stem == self.split]
            if not named:
                raise ValueError(f"`{self.name}` has several files, {found}: name those to read as `config`.")
            return {"": named}
        self._refuse_split(found)
        return {"": found}

    def _json_names(self):
        found = [name for suffix in JSON_SUFFIXES for name in self.files.glob(f"*{suffix}")]
        return [name for name in found if Path(name).stem not in METADATA]

    def _refuse_split(self, names):
        if self.split not in ("train", *(Path(name).stem for name in names)):
            raise ValueError(
                f"`split` is {self.split!r}, but `{self.name}` has {names}: a JSON file has no splits, name another as `config`."
            )

    def convert(self, record, subset):
        """
        x and y of a record.

        Args:
            record (`dict`): as the source has it.
            subset (`str`): which subset or config it is from, or `""`.

        Returns:
            `Draft` or `list[Draft]`: most records are one row.

        Raises:
            BadRow: the record has another shape.
        """
        raise NotImplementedError

    def id_of(self, record, number):
        """What a record calls itself, or its number."""
        for key in ("id", "idx", "question_id", "sample_id"):
            if isinstance(record, dict) and isinstance(record.get(key), (str, int)) and record[key] != "":
                return str(record[key])
        return f"record {number}"

    # -----------------------------------------------------------------------------------------------------------------
    # Where the records are
    # -----------------------------------------------------------------------------------------------------------------

    def shards(self):
        """The parts of the source, in order; the records of a JSON file are laid out in pieces, one for each."""
        shards = []
        for source, files in self.json_sources.items():
            left = self.max_rows
            for file in files:
                records = read_records(self.files.path(file))[:left]
                left = None if left is None else left - len(records)
                for start in range(0, len(records), RECORDS_PER_SHARD):
                    shard = Shard(source, file, start, min(start + RECORDS_PER_SHARD, len(records)))
                    self._pieces = self._pieces or scratch_folder()
                    with open(self._piece(shard), "wb") as piece:
                        pickle.dump(records[start : shard.stop], piece)
                    shards.append(shard)
        if self.json_sources:
            return shards
        for config in self.tables.wanted(self.configs):
            table = self.tables.split(config)
            number = 1 if self.max_rows is not None else table.num_shards
            shards += [Shard(config or "", None, index, None) for index in range(number)]
        return shards

    def _piece(self, shard):
        digest = hashlib.sha256(f"{shard.source}/{shard.file}".encode("utf-8", "surrogatepass")).hexdigest()[:12]
        return Path(self._pieces) / f"{digest}-{shard.index}.pickle"

    def splits(self):
        """The splits that there are: of a table, or JSON files of their names."""
        if self.json_sources:
            return [] if self.path.is_file() or self.configs else [Path(name).stem for name in self._json_names()]
        return list(self.tables.splits(self.all_shards[0].source or None))

    def versions(self):
        """Name, size and time of change of the local files with the records: whether they are what they were."""
        names = [name for files in self.json_sources.values() for name in files]
        paths = [self.files.path(name) for name in names]
        if not names and self.path.is_file():
            paths = [self.path]
        elif not names and self.files.folder is not None:
            paths = sorted(path for suffix in LOADERS for path in self.files.folder.rglob(f"*{suffix}"))
        return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]

    def records(self, shard):
        """Row id, place and record, one after the other; a place is one record's alone, an id need not be."""
        if shard.file is not None:
            with open(self._piece(shard), "rb") as piece:
                records = pickle.load(piece)
            for number, record in enumerate(records, start=shard.index):
                yield self._row_id(shard, record, number), f"{shard.file}/{number}", record
            return
        table = self.tables.split(shard.source or None)
        if self.max_rows is not None:
            table = table.take(self.max_rows)
        elif table.num_shards > 1:
            table = table.shard(num_shards=table.num_shards, index=shard.index)
        # A data loader's worker that iterates over a table gets a part of it: but the shard is this worker's alone.
        for number, batch in enumerate(table.iter(batch_size=1)):
            record = {name: values[0] for name, values in batch.items()}
            place = f"{shard.index}-{number}"
            yield self._row_id(shard, record, place), f"{shard.source}/{place}", record

    def _row_id(self, shard, record, number):
        words = (shard.source, self.id_of(record, number))
        return "/".join(filter(None, words)).encode("utf-8", "replace").decode("utf-8")

    def _licence_of_card(self):
        try:
            card = DatasetCard.load(self.files.path("README.md"))
        except Exception:  # there is no card, or none that can be read
            return None
        licence = card.data.get("license")
        return _licence_name(card.data.get("license_name") or licence if licence in (None, "other") else licence)

    # -----------------------------------------------------------------------------------------------------------------
    # From a record to a row
    # -----------------------------------------------------------------------------------------------------------------

    def rows(self, shard):
        """
        The rows of a shard. Its counts are written into `report_dir` on the way.

        Args:
            shard ([`Shard`]): one of `all_shards`.

        Yields:
            `dict`: with the columns of `FEATURES`, images as `bytes` or `path`.

        Raises:
            ValueError: a record that cannot be trained on, if `bad_rows` is `"raise"`.
        """
        filters = [load_filter(spec) for spec in self.filters]
        known = KnownImages(self.evaluation_hashes)
        collator = None if self.processor is None else AMVLDataCollator(self.processor)
        count_tokens = None if collator is None else lambda row: _count_tokens(collator, row)
        source = self.source or shard.source or self.format
        report, part_name = SourceReport(), self.part_names()[self.all_shards.index(shard)]
        try:
            for number, (record_id, place, record) in enumerate(self.records(shard)):
                if number % ROWS_PER_PART == ROWS_PER_PART - 1:
                    write_part(self.report_dir, part_name, {source: report})
                for turn, (row_id, draft) in enumerate(self._drafts(record_id, record, shard.source)):
                    report.read += 1
                    copies = int(self.weight) + (priority(self.seed, place, turn) < self.weight % 1)
                    if not copies:
                        report.not_sampled += 1
                        continue
                    try:
                        row, pictures, repaired = self._finish(draft, source, row_id, collator, filters, known)
                    except BadRow as error:
                        if self.bad_rows == "raise" and not isinstance(error, _Filtered):
                            raise ValueError(
                                f"Row {row_id!r} of `{self.name}`: {error}. Repair it, or set `bad_rows='drop'`."
                            ) from error
                        report.drop(error, row_id)
                        continue
                    report.repaired.update(filter(None, repaired))
                    report.keep(row, pictures, count_tokens, copies - 1)
                    yield row
                    for copy in range(1, copies):
                        yield {**row, "row_id": f"{row_id} copy {copy + 1}"}
        finally:  # also when whoever reads has had enough
            write_part(self.report_dir, part_name, {source: report})

    def _drafts(self, record_id, record, subset):
        try:
            if isinstance(record, BadLine):
                raise BadRow("a line that is no JSON", str(record))
            if not isinstance(record, dict):
                raise BadRow("a record that is no record", brief(record))
            drafts = self.convert(record, subset)
        except BadRow as error:
            drafts = error
        if not isinstance(drafts, list):
            return [(record_id, drafts)]
        return [
            (f"{record_id} turn {number + 1}" if len(drafts) > 1 else record_id, d) for number, d in enumerate(drafts)
        ]

    def _finish(self, draft, source, row_id, collator, filters, known):
        if isinstance(draft, BadRow):
            raise draft
        check_texts(draft.prompt, draft.answer, len(draft.images))
        images, pictures, repaired = [], [], []
        for value in draft.images:
            stored, picture, problem = check_image(self.stored(value), repair=self.bad_rows == "repair")
            images.append(stored)
            pictures.append(picture)
            repaired.append(problem)
        row = {
            "images": images,
            "prompt": draft.prompt,
            "completion": [message("assistant", draft.answer)],
            "source": source,
            "row_id": row_id,
        }
        if any(map(known.has, pictures)):
            raise _Filtered("an image that is also in the evaluation rows")
        if collator is not None:
            try:
                collator.render({**row, "images": pictures}, "It", open_images=False)
            except ValueError as error:
                raise BadRow("a row that the processor cannot take", str(error)) from error
        for name, keeps in filters:
            try:
                kept = keeps({**row, "images": pictures})
            except Exception as error:
                raise ValueError(
                    f"The filter `{name}` fails on row {row_id!r} of `{self.name}`: {type(error).__name__}: {error}"
                ) from error
            if not kept:
                raise _Filtered(f"the filter `{name}`")
        return row, pictures, repaired

    def stored(self, value):
        """An image of a record as `datasets.Image` stores it; raises [`BadRow`]."""
        if self.files.repository:
            if isinstance(value, dict) and value.get("bytes") is None:
                value = value.get("path")
            if isinstance(value, str):
                return {"bytes": None, "path": str(self.files.image(value))}
        return store_image(value, self.files.image_folders)

    # -----------------------------------------------------------------------------------------------------------------
    # What comes out
    # -----------------------------------------------------------------------------------------------------------------

    def read(self):
        """
        The rows, and what became of the records.

        Returns:
            `tuple[Dataset | IterableDataset, DataReport]`: map-style rows are written once, to a folder that goes with the process;
            images of JSON sources stay files. Streamed rows can be shared out among data loader workers, and the report grows
            while they are read.

        Raises:
            ValueError: no record can be trained on; or the first bad one, if `bad_rows` is `"raise"`.
        """
        dataset = self.read_or_none()
        if dataset is None:
            raise ValueError(f"`{self.name}` has no row that can be trained on: {self.report}{self._hint()}")
        return dataset, self.report

    def read_or_none(self):
        """The rows alone; `None` if a map-style dataset would have none."""
        settings = {"features": FEATURES, "gen_kwargs": {"reader": self, "shards": self.all_shards}}
        if not self.all_shards:
            return None
        if self.streaming:
            dataset = IterableDataset.from_generator(_rows_of, **settings)
        else:
            try:
                dataset = Dataset.from_generator(_rows_shown, cache_dir=scratch_folder(), **settings)
            except DatasetGenerationError as error:  # hides what was raised
                raise error.__cause__ or error from None
            except ValueError:  # of a table without rows
                return None
        dataset.info.license = licence_text(self.licences())
        dataset.info.homepage = self.files.hub_address or ""
        return dataset

    @property
    def report(self):
        """`DataReport`: of what has been read so far, by all processes."""
        settings = {"answer": self.answer, "bad_rows": self.bad_rows}
        if self.processor is not None:
            settings["processor"] = self.processor.tokenizer.name_or_path or type(self.processor).__name__
        return DataReport(self.report_dir, self.licences(), self.part_names(), settings)

    def licences(self):
        """`dict[str, str]`: the licence of each source."""
        names = (
            [self.source] if self.source else dict.fromkeys(shard.source or self.format for shard in self.all_shards)
        )
        return dict.fromkeys(names, self.licence)

    def part_names(self):
        """The names of the files with the counts of the shards, in order: the same in every process and run."""
        settings = {key: getattr(self, key) for key in COUNTED_UNDER}
        digest = hashlib.sha256(json.dumps(settings, default=str, sort_keys=True).encode()).hexdigest()[:12]
        return [f"{digest}-{index:05d}" for index in range(len(self.all_shards))]

    def _hint(self):
        return f"\n{self.missing_images_hint}" if "an image file that is missing" in self.report.num_dropped else ""


class _Filtered(BadRow):
    """A row that is good and not wanted."""


def _licence_name(licence):
    """A licence as one text; `None` for what is none."""
    names = licence if isinstance(licence, list) and licence else [licence]
    return ", ".join(names) if all(isinstance(name, str) and name.strip() for name in names) else None


def licence_text(licences):
    """Licences by source, as `DatasetInfo.license` carries them to the model card: a line each."""
    return "\n".join(f"{source}: {licence}" for source, licence in licences.items())


def _rows_of(reader, shards):
    for shard in shards:
        yield from reader.rows(shard)


def _rows_shown(reader, shards):
    """The same with a bar over the shards; a table of one shard tells its rows alone."""
    with bar(total=len(shards), desc=f"Reading {Path(reader.name).name}", unit="shard", leave=False) as progress:
        num_rows = 0
        for shard in shards:
            for row in reader.rows(shard):
                num_rows += 1
                progress.set_postfix_str(f"{num_rows:,} rows", refresh=num_rows % 100 == 0)
                yield row
            progress.update()


def _count_tokens(collator, row):
    batch = collator([row])
    return [int(batch["attention_mask"].sum()), int(batch["completion_mask"].sum())]


def scratch_folder():
    """A folder for what a reader writes, on the disk of the datasets' cache; it goes with the process."""
    Path(datasets_config.HF_DATASETS_CACHE).mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix="amvl-", dir=datasets_config.HF_DATASETS_CACHE)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
