"""Counts what reading a source gave: rows kept and dropped and why, lengths, image sizes, forms of answers, ten rows to look at."""

import base64
import hashlib
import io
import json
import os
from collections import Counter
from pathlib import Path

from .images import MIN_SIDE
from .rows import form_of, texts_of


NUM_SHOWN = 10  # rows of a source on the page
NUM_MEASURED = 200  # rows of a source whose tokens are counted, with their images
NUM_SIZES = 1000  # rows of a source whose image sizes are kept
NUM_EXAMPLES = 3  # rows named for a reason
THUMBNAIL = 192  # pixels: the longer side of a picture on the page


def priority(*words):
    """A number in 0..1 that depends on the words alone (seed, row id, ...): the same rows are drawn on every machine."""
    digest = hashlib.sha256("\0".join(map(str, words)).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


class Sample:
    """
    A random sample of what passes by, which can be merged with others: the `size` values of lowest priority.

    Args:
        size (`int`): most values kept.
        values (`list[list]`, *optional*): pairs of priority and value.
    """

    def __init__(self, size, values=()):
        self.size, self.values = size, sorted(values, key=lambda pair: pair[0])[:size]

    def wants(self, priority):
        """Whether a value of this priority would be kept: values that are dear to compute are computed only then."""
        return len(self.values) < self.size or priority < self.values[-1][0]

    def add(self, priority, value):
        """Adds a value, and lets the one of highest priority go if there are too many."""
        self.values = sorted([*self.values, [priority, value]], key=lambda pair: pair[0])[: self.size]

    def __iter__(self):
        return (value for _, value in self.values)


class SourceReport:
    """What reading a source, or a part of it, gave. Everything in it can be written as JSON, and added up."""

    COUNTERS = ("dropped", "repaired", "answers")
    NUMBERS = ("read", "kept", "not_sampled", "copies")
    SAMPLES = {"shown": NUM_SHOWN, "sizes": NUM_SIZES, "tokens": NUM_MEASURED}

    def __init__(self):
        self.read = self.kept = self.not_sampled = self.copies = 0
        self.dropped, self.repaired, self.answers = Counter(), Counter(), Counter()
        self.examples = {}  # by reason
        self.images_per_row = Counter()
        self.extent = None  # fewest and most pixels of an image: [width, height] each
        self.shown, self.sizes, self.tokens = (Sample(size) for size in self.SAMPLES.values())

    def drop(self, error, row_id):
        """Counts a row that a [`BadRow`] keeps out."""
        self.dropped[error.reason] += 1
        examples = self.examples.setdefault(error.reason, [])
        if len(examples) < NUM_EXAMPLES:
            examples.append({"row_id": row_id, "detail": error.detail})

    def keep(self, row, pictures, count_tokens=None, copies=0):
        """
        Counts a record that goes out as a row.

        Args:
            row (`dict`): with the columns of `FEATURES`.
            pictures (`list[PIL.Image.Image]`): of its images, see [`~trainer.data.images.check_image`].
            count_tokens (`Callable`, *optional*): gives the tokens of x and of y of a row.
            copies (`int`, defaults to 0): how often it goes out once more.
        """
        self.kept += 1
        self.copies += copies
        answer = "".join(texts_of(row["completion"]))
        self.answers[form_of(answer)] += 1
        self.images_per_row[str(len(pictures))] += 1
        rank = priority(row["row_id"])
        sizes = [list(picture.info["size"]) for picture in pictures]
        for size in sizes:
            least, most = self.extent or (size, size)
            self.extent = [min(least, size, key=_area), max(most, size, key=_area)]
        if self.sizes.wants(rank):
            self.sizes.add(rank, sizes)
        if self.shown.wants(rank):
            question = "\n".join(texts_of(row["prompt"], "user"))
            shown = {"row_id": row["row_id"], "question": question, "answer": answer, "sizes": sizes}
            self.shown.add(rank, {**shown, "images": [thumbnail(picture) for picture in pictures]})
        if count_tokens is not None and self.tokens.wants(rank):
            self.tokens.add(rank, count_tokens(row))

    def to_dict(self):
        """Everything, as JSON can hold it; [`SourceReport.from_dict`] reads it back."""
        plain = {name: getattr(self, name) for name in (*self.NUMBERS, "examples", "extent")}
        counts = {name: dict(getattr(self, name)) for name in (*self.COUNTERS, "images_per_row")}
        return plain | counts | {name: getattr(self, name).values for name in self.SAMPLES}

    @classmethod
    def from_dict(cls, values):
        """What [`SourceReport.to_dict`] gave."""
        report = cls()
        for name in (*cls.NUMBERS, "examples", "extent"):
            setattr(report, name, values[name])
        for name in (*cls.COUNTERS, "images_per_row"):
            setattr(report, name, Counter(values[name]))
        for name, size in cls.SAMPLES.items():
            setattr(report, name, Sample(size, values[name]))
        return report

    def add(self, other):
        """Adds the counts and samples of another part of the same source."""
        for name in (*self.NUMBERS, *self.COUNTERS, "images_per_row"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for reason, examples in other.examples.items():
            self.examples[reason] = [*self.examples.get(reason, []), *examples][:NUM_EXAMPLES]
        ends = [end for extent in (self.extent, other.extent) if extent for end in extent]
        self.extent = [min(ends, key=_area), max(ends, key=_area)] if ends else None
        for name, size in self.SAMPLES.items():
            setattr(self, name, Sample(size, [*getattr(self, name).values, *getattr(other, name).values]))

    def summary(self):
        """
        What a person wants to know.

        Returns:
            `dict`: `read`, which is `kept`, `not_sampled` and all of `dropped` together; `rows`, which is `kept` and their copies;
            `dropped` with count and examples by reason; `repaired`; `answers` as shares of the rows kept; `images_per_row`;
            `image_size` (width and height of the smallest, the median and the largest) and `tokens` of x and y (median, 95th
            percentile, most; over how many rows).
        """
        sizes = sorted((size for row in self.sizes for size in row), key=_area)
        least, most = self.extent or (None, None)
        return {
            "read": self.read,
            "kept": self.kept,
            "not_sampled": self.not_sampled,
            "rows": self.kept + self.copies,
            "dropped": {
                reason: {"rows": number, "examples": self.examples[reason]}
                for reason, number in self.dropped.most_common()
            },
            "repaired": dict(self.repaired.most_common()),
            "answers": {form: number / self.kept for form, number in self.answers.most_common()},
            "images_per_row": dict(sorted(self.images_per_row.items(), key=lambda pair: int(pair[0]))),
            "image_size": {"smallest": least, "median": sizes[len(sizes) // 2] if sizes else None, "largest": most},
            "tokens": {
                "rows": len(self.tokens.values),
                **{name: _spread([row[i] for row in self.tokens]) for i, name in enumerate(("x", "y"))},
            },
        }


def _area(size):
    return size[0] * size[1], size


def _spread(values):
    values = sorted(values)
    if not values:
        return None
    return {"median": values[len(values) // 2], "p95": values[int(0.95 * (len(values) - 1))], "most": values[-1]}


def thumbnail(picture):
    """A picture as the base64 text of a small JPEG."""
    small = picture.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    if min(small.size) < MIN_SIDE:
        small = small.resize([max(side, MIN_SIDE) for side in small.size])
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


class DataReport:
    """
    What reading some sources gave, gathered from the files that every process leaves for each shard it has read.

    Args:
        folder (`str` or `Path`): where those files are, `<shard>.part.json` each.
        licences (`dict[str, str]`, *optional*): of the sources, by name.
        parts (`list[str]`, *optional*): the names of the shards that count; all that the folder has by default.
        settings (`dict`, *optional*): under which they were read: `answer`, `processor`, `min_pixels`, `max_pixels`.

    Attributes:
        sources (`dict[str, SourceReport]`): by the name in the rows' column `source`, as they are now: while a dataset streams,
            they grow.
    """

    def __init__(self, folder, licences=None, parts=None, settings=None):
        self.folder, self.parts = Path(folder), parts
        self.licences, self.settings = dict(licences or {}), dict(settings or {})
        self._merged, self._versions = {}, None

    @property
    def sources(self):
        paths = sorted(self.folder.glob("*.part.json"))
        if self.parts is not None:  # others were left by a reading under other settings
            paths = [path for path in paths if path.name.removesuffix(".part.json") in self.parts]
        versions = [(path, stat.st_ino, stat.st_mtime_ns) for path in paths for stat in [path.stat()]]
        if versions != self._versions:
            merged = {}
            for path in paths:
                for name, values in json.loads(path.read_text(encoding="utf-8")).items():
                    merged.setdefault(name, SourceReport()).add(SourceReport.from_dict(values))
            self._merged, self._versions = merged, versions
        return self._merged

    @property
    def kept(self):
        """`dict[str, int]`: rows kept, by source."""
        return {name: source.kept for name, source in self.sources.items() if source.kept}

    @property
    def num_dropped(self):
        """`Counter`: rows dropped, by reason."""
        return sum((source.dropped for source in self.sources.values()), Counter())

    @property
    def dropped(self):
        """`dict[str, list[str]]`: up to three row ids, by reason."""
        examples = {}
        for source in self.sources.values():
            for reason, rows in source.examples.items():
                examples[reason] = [*examples.get(reason, []), *(row["row_id"] for row in rows)][:NUM_EXAMPLES]
        return examples

    def to_dict(self):
        """The summary of each source and the number of rows of all, as `report.json` has it."""
        sources = {
            name: {"licence": self.licences.get(name, "not stated"), **source.summary()}
            for name, source in self.sources.items()
        }
        totals = {
            "read": sum(source["read"] for source in sources.values()),
            "kept": sum(source["kept"] for source in sources.values()),
            "rows": sum(source["rows"] for source in sources.values()),
            "dropped": sum(reason["rows"] for source in sources.values() for reason in source["dropped"].values()),
            "not_sampled": sum(source["not_sampled"] for source in sources.values()),
        }
        return {"settings": self.settings, "total": totals, "sources": sources}

    def __str__(self):
        lines = [f"kept {sum(self.kept.values())} rows: " + ", ".join(f"{k} {v}" for k, v in self.kept.items())]
        dropped = self.dropped
        sources = self.sources.values()
        for what, number in (
            ("copies of them", sum(source.copies for source in sources)),
            ("not taken, by the `weight` of their source", sum(source.not_sampled for source in sources)),
        ):
            lines += [f"{number} {what}"] if number else []
        for reason, number in self.num_dropped.items():
            lines.append(f"dropped {number}: {reason}, for example {', '.join(map(str, dropped[reason]))}")
        return "\n".join(lines)


def write_part(folder, name, sources):
    """
    Writes what one process counted in one shard, unless more of it has been counted before: a second epoch that is cut short
    takes nothing back.

    Args:
        folder (`str`): of the parts.
        name (`str`): of the shard.
        sources (`dict[str, SourceReport]`): by name.
    """
    path = Path(folder) / f"{name}.part.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if sum(values["read"] for values in before.values()) > sum(source.read for source in sources.values()):
            return
    write_atomically(path, json.dumps({key: source.to_dict() for key, source in sources.items()}))


def write_atomically(path, text):
    """Writes a file whole or not at all."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8", errors="surrogatepass")
    os.replace(scratch, path)
