"""A benchmark's questions in one form, written to a folder once: each picture one file, each bad record counted."""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from ..bars import bar
from ..data.files import BadLine
from ..data.images import check_image, store_image
from ..data.report import write_atomically
from ..data.rows import IMAGE, BadRow, brief, is_given, message
from .benchmarks import BENCHMARKS, DIRECT_ANSWER, read_records_of


# Of a local folder, as they are read; not what a run writes, which may lie in the same folder.
DATA_FILES = ("**/*.parquet", "**/*.arrow", "*.jsonl", "test*.json", "README.md")
MAX_EXAMPLES = 3  # of each reason why a record is no question


@dataclass
class Question:
    """
    One question of a benchmark.

    Args:
        row_id (`str`), task (`str`): as the benchmark calls them.
        images (`list[str]`): paths of its images in order.
        prompt (`str`): the text after the images.
        options (`list[str]`, *optional*): `None` where they are in the picture.
        num_options (`int`): how many there are.
        gold (`str`): the right letter.
        group (`str`): questions of one group are one question in other words.
    """

    row_id: str
    task: str
    images: list[str]
    prompt: str
    options: list[str] | None
    num_options: int
    gold: str
    group: str

    def row(self):
        """The question as [`AMVLDataCollator`] takes it; its answer is the gold letter, which only a posterior reads."""
        prompt = [message("user", *[IMAGE] * len(self.images), self.prompt)]
        return {"images": self.images, "prompt": prompt, "completion": [message("assistant", f"({self.gold})")]}


@dataclass
class QuestionSet:
    """
    The questions of a benchmark, and what became of its records.

    Args:
        benchmark (`str`): one of `BENCHMARKS`.
        questions (`list[Question]`): in the benchmark's order.
        report (`dict`): `read`, `kept`, `repaired` and `dropped`, by reason with examples; `missing_tasks`.
        digest (`str`): of the questions and their pictures.
        settings (`dict`): under which they were read.
    """

    benchmark: str
    questions: list[Question]
    report: dict
    digest: str
    settings: dict

    @property
    def rule(self):
        """How rows make the benchmark's score."""
        return BENCHMARKS[self.benchmark].rule


def prepare_questions(benchmark, folder, data=None, revision=None, answer_line=None, max_rows=None, seed=0):
    """
    Reads a benchmark into a folder, or finds it there.

    Args:
        benchmark (`str`): one of `BENCHMARKS`.
        folder (`str` or `Path`): where the questions and their pictures go; all or nothing is written.
        data, revision, max_rows, seed: see [`read_records_of`].
        answer_line (`str`, *optional*): last line of every prompt that does not have it, in place of `DIRECT_ANSWER`
            where a prompt ends so; the benchmark's by default.

    Returns:
        `QuestionSet`.

    Raises:
        ValueError: an unknown benchmark, a source that cannot be read, no usable row, a revision of what is no
            repository, or a folder with other questions, also where local data files have changed since.
    """
    if benchmark not in BENCHMARKS:
        raise ValueError(f"`benchmark` must be one of {list(BENCHMARKS)}, got {benchmark!r}.")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"`max_rows` must be at least 1, got {max_rows}.")
    answer_line = BENCHMARKS[benchmark].answer_line if answer_line is None else answer_line
    data = BENCHMARKS[benchmark].hub_id if data is None else str(data)
    settings = dict(
        benchmark=benchmark, data=data, revision=revision, answer_line=answer_line, max_rows=max_rows, seed=seed
    )
    if data is not None:
        del settings["seed"]
    is_local = data is not None and Path(data).exists()
    if revision is not None and (data is None or is_local):
        raise ValueError(
            f"`data_revision` is {revision!r}, but `data` is {data!r}, no repository, and it would change nothing: leave it out."
        )
    if is_local:
        settings["data_files"] = _state_of_files(Path(data))
    folder = Path(folder)
    if folder.exists():
        return load_questions(folder, settings)
    files, records = read_records_of(benchmark, data, revision, max_rows, seed)
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "images").mkdir(parents=True)
    try:
        questions, report = _read(benchmark, files, records, scratch, answer_line)
        lines = [json.dumps(asdict(question), ensure_ascii=False) for question in questions]
        digest = hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()[:16]
        values = {"settings": settings, "digest": digest, "report": report, "questions": list(map(json.loads, lines))}
        write_atomically(scratch / "questions.json", json.dumps(values, indent=1))
        os.rename(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return load_questions(folder, settings)


def _state_of_files(path):
    """A hash of the names, sizes and times of the data files of a folder, or of one file; images are not looked at."""
    files = [path] if path.is_file() else [file for pattern in DATA_FILES for file in path.glob(pattern)]
    states = ((file.relative_to(path).as_posix(), file.stat()) for file in sorted(files) if file.is_file())
    return _digest("".join(f"{name} {state.st_size} {state.st_mtime_ns}\n" for name, state in states).encode())


def load_questions(folder, settings):
    """The questions of a folder, whose settings must be the ones given."""
    values = json.loads((Path(folder) / "questions.json").read_text(encoding="utf-8"))
    refuse_other_settings(folder, values["settings"], settings)
    questions = [Question(**question) for question in values["questions"]]
    for question in questions:
        question.images = [str(Path(folder) / "images" / name) for name in question.images]
    return QuestionSet(settings["benchmark"], questions, values["report"], values["digest"], values["settings"])


def refuse_other_settings(folder, written, given):
    """Refuses to go on in a folder that was begun under other settings, naming those that differ."""
    given = json.loads(json.dumps(given))
    differing = [key for key in {**written, **given} if written.get(key) != given.get(key)]
    if differing:
        shown = "; ".join(f"`{key}` was {written.get(key)!r} and is {given.get(key)!r}" for key in differing)
        raise ValueError(
            f"`{folder}` was written under other settings: {shown}. Name another `output_dir`, or remove it."
        )


def _read(benchmark, files, records, folder, answer_line):
    convert, questions, repaired, dropped, num_read = BENCHMARKS[benchmark].convert, [], {}, {}, 0
    for number, (task, record) in enumerate(bar(records, desc=f"Reading {benchmark}", unit="row")):
        num_read += 1
        try:
            if not isinstance(record, dict):
                reason = "a line that is no JSON" if isinstance(record, BadLine) else "a record that is no record"
                raise BadRow(reason, brief(record))
            draft = convert(record, task, number)
            _check_texts(draft, BENCHMARKS[benchmark].tasks)
            if not draft.images:
                raise BadRow("no image")
            stored = [_save_image(cell, files, folder / "images", repaired) for cell in draft.images]
        except BadRow as error:
            entry = dropped.setdefault(error.reason, {"rows": 0, "examples": []})
            entry["rows"] += 1
            if len(entry["examples"]) < MAX_EXAMPLES:
                name = record.get("idx", number) if isinstance(record, dict) else number
                example = f"{task or benchmark}, {name}: {error.detail}"
                entry["examples"].append(example.encode("utf-8", "backslashreplace").decode())
            continue
        prompt = draft.prompt.rstrip()
        if answer_line != BENCHMARKS[benchmark].answer_line:  # in place of V*'s own
            prompt = prompt.removesuffix(DIRECT_ANSWER).rstrip()
        if answer_line and answer_line not in prompt:
            prompt += f"\n{answer_line}"
        group = f"row {number}" if draft.group is None else _digest(f"{stored}{draft.group}".encode())
        fields = (draft.row_id, draft.task, stored, prompt, draft.options, draft.num_options, draft.gold, group)
        questions.append(Question(*fields))
    report = {"read": num_read, "kept": len(questions), "repaired": repaired, "dropped": dropped}
    tasks = BENCHMARKS[benchmark].tasks or ()
    report["commit"] = (getattr(files, "hub_address", None) or "").partition("@")[2] or None
    report["missing_tasks"] = sorted(set(tasks) - {question.task for question in questions})
    if not questions:
        reasons = ", ".join(f"{entry['rows']} rows with {reason}" for reason, entry in dropped.items()) or "no row"
        raise ValueError(f"`data` has no question that can be asked of `benchmark` {benchmark!r}: {reasons}.")
    return questions, report


def _check_texts(draft, tasks):
    texts = [draft.row_id, draft.task, draft.prompt, *(draft.options or ())]
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow("a text that is no Unicode", str(error)) from error
    if any("<image>" in text for text in texts):
        raise BadRow("an image placeholder in its text", brief(draft.prompt))
    if tasks and draft.task not in tasks:
        raise BadRow("another task than those of the benchmark", brief(draft.task))


def _digest(data):
    return hashlib.sha256(data).hexdigest()[:24]


def _save_image(cell, files, folder, repaired):
    """Writes an image, mended where that is needed, under a name that is its content's."""
    if not is_given(cell):
        raise BadRow("an image that is missing")
    if files is not None and isinstance(cell, dict) and cell.get("bytes") is None:
        cell = cell.get("path")
    if files is not None and isinstance(cell, str):
        stored = {"bytes": None, "path": str(files.image(cell))}
    else:
        stored = store_image(cell, files.image_folders if files else [])
    stored, _, problem = check_image(stored, repair=True)
    if problem:
        repaired[problem] = repaired.get(problem, 0) + 1
    data = Path(stored["path"]).read_bytes() if stored["bytes"] is None else stored["bytes"]
    path = folder / _digest(data)
    if not path.exists():
        path.write_bytes(data)
    return path.name
