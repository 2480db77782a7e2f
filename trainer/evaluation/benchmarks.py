"""What each benchmark holds, where it is, and what question a record of it is.

One form for all: the images in order, then the question, its options as `(A) text` a line each, and last the line
`Answer with the option's letter from the given choices directly.` BLINK and our puzzles have such a text ready in
their column `prompt`, V* in `text`; the line is added to BLINK's, not to V*'s, which has it, and not to the puzzles', whose
`prompt` is what models train on. `answer_line` sets it for all.
"""

import base64
import binascii
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..data.files import SourceFiles, is_hub_id, read_records
from ..data.rows import BadRow, brief, is_blank, is_given
from ..data.tables import SourceTables
from .options import match_option, same_option
from .reply import LETTERS, plain
from .results import TOTAL


DIRECT_ANSWER = "Answer with the option's letter from the given choices directly."
NUM_PUZZLES = 100  # of each kind, where they are made on the fly
BLINK_TASKS = (
    "Art_Style",
    "Counting",
    "Forensic_Detection",
    "Functional_Correspondence",
    "IQ_Test",
    "Jigsaw",
    "Multi-view_Reasoning",
    "Object_Localization",
    "Relative_Depth",
    "Relative_Reflectance",
    "Semantic_Correspondence",
    "Spatial_Relation",
    "Visual_Correspondence",
    "Visual_Similarity",
)
# Inferred from the averages that the paper reports; it names five of them.
PAPER_TASKS = (
    "Art_Style",
    "IQ_Test",
    "Jigsaw",
    "Object_Localization",
    "Multi-view_Reasoning",
    "Visual_Similarity",
    "Spatial_Relation",
)
OPTION_LINE = re.compile(r"^[ \t]*\(?([A-Z])[).:][ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
IMAGE_SIZE = re.compile(r"(?<!\d)([48]k)(?![a-z0-9])", re.IGNORECASE)  # in the name of a file of HR-Bench
LETTER = re.compile(r"\s*[(\[]?\s*([A-Za-z])\s*[)\]]?[.:]?\s*")


class Draft(NamedTuple):
    """What a record asks, before its images are opened."""

    row_id: str
    task: str
    images: list  # cells, or paths
    prompt: str
    options: list[str] | None
    num_options: int
    gold: str
    group: str | None = None  # what its rotations share, with the image


class Benchmark(NamedTuple):
    """Where a benchmark is, how its rows make a score, and what reads a record."""

    hub_id: str | None
    rule: str
    convert: Callable
    tasks: tuple[str, ...] | None = None
    split: str | None = None  # `None` takes the only one
    answer_line: str = DIRECT_ANSWER


def gold_letter(answer, options, num_options):
    """
    The letter that an answer names, `(B)`, `B` or the text of an option.

    Raises:
        BadRow: hidden, none, or none of the options.
    """
    if answer == "hidden":
        raise BadRow("a hidden answer")
    if not isinstance(answer, str) or is_blank(answer):
        raise BadRow("no answer", brief(answer))
    match = LETTER.fullmatch(answer)
    if match and match[1].upper() in LETTERS[:num_options]:
        return match[1].upper()
    found = match_option(plain(answer), [plain(option) for option in options or ()])
    if found is None:
        raise BadRow("an answer that is not among the options", brief(answer))
    return LETTERS[found]


def texts_of_options(options):
    """Options as a list of texts; `None` if there are none."""
    if options is None or (isinstance(options, (list, tuple, str)) and not len(options)):
        return None
    if not isinstance(options, (list, tuple)) or any(
        option is None or isinstance(option, (list, dict)) for option in options
    ):
        raise BadRow("options that are no texts", brief(options))
    if not 2 <= len(options) <= len(LETTERS):
        raise BadRow("another number of options than 2 to 26", str(len(options)))
    return [str(option) for option in options]


def options_in(text):
    """The options that a question has on lines of their own, `(A) text`, in the order of their letters; or `None`."""
    found = OPTION_LINE.findall(text)
    for start in range(len(found) - 1, -1, -1):  # the last list of them
        if found[start][0] == "A":
            options = found[start:]
            in_order = [letter for letter, _ in options] == list(LETTERS[: len(options)])
            return [option for _, option in options] if in_order and len(options) > 1 else None
    return None


def question_text(question, options):
    """A question and its options."""
    if not isinstance(question, str) or is_blank(question):
        raise BadRow("a question that is no text", brief(question))
    lines = [f"({LETTERS[index]}) {option}" for index, option in enumerate(options)]
    return "\n".join([question.strip(), *lines])


def task_name(value):
    """
    A task or category as one line of a table: `"all"` where there is none, and never the name of the row of totals.

    Raises:
        BadRow: neither a text nor a whole number.
    """
    if isinstance(value, bool) or not (value is None or isinstance(value, (str, int))):
        raise BadRow("a category that is no text", brief(value))
    name = " ".join(("" if value is None else str(value)).split()).replace("|", "/")
    return f"{name} (category)" if name == TOTAL else name or "all"


def _name(record, keys, number):
    names = (record.get(key) for key in keys)
    return next((str(name) for name in names if isinstance(name, (str, int)) and str(name)), f"row {number}")


def convert_blink(record, task, number):
    """BLINK's columns: four images at most, `prompt`, `choices`, `answer`."""
    prompt = record.get("prompt")
    if not isinstance(prompt, str) or is_blank(prompt):
        raise BadRow("a question that is no text", brief(prompt))
    cells = [record.get(f"image_{place}") for place in range(1, 5)]
    listed = options_in(prompt)
    options = texts_of_options(record.get("choices")) or listed
    if options is None:
        raise BadRow("no options", brief(prompt))
    gold = gold_letter(record.get("answer"), options, len(options))
    if listed and not _same_texts(options, listed):
        raise BadRow("choices that are not the options in its prompt", brief(options))
    images = [cell for cell in cells if is_given(cell)]
    if any(not is_given(cell) for cell in cells[: len(images)]):
        raise BadRow("an image that is missing", f"{len(images)} images, not the first ones")
    name, task = _name(record, ("idx", "id"), number), task_name(task or record.get("sub_task"))
    return Draft(name, task, images, prompt, options, len(options), gold)


def _same_texts(options, listed):
    """Whether options are those that a text lists a line each; of an option of several lines, its first."""
    firsts = [(option.splitlines() or [""])[0] for option in options]
    return len(options) == len(listed) and all(
        " ".join(first.split()) == " ".join(line.split()) or same_option(first, [line])
        for first, line in zip(firsts, listed)
    )


def convert_vstar(record, task, number):
    """V*: `image` (a path, or an image in the mirror), `text` with its options, `label`, `category`."""
    text = record.get("text")
    if not isinstance(text, str) or is_blank(text):
        raise BadRow("a question that is no text", brief(text))
    if (options := options_in(text)) is None:
        raise BadRow("no options", brief(text))
    gold = gold_letter(record.get("label"), options, len(options))
    name, category = _name(record, ("question_id", "id"), number), task_name(record.get("category"))
    return Draft(f"{category}/{name}", category, [record.get("image")], text, options, len(options), gold)


def convert_hrbench(record, task, number):
    """HR-Bench: `image` in base64, `A` to `D`; the four rotations of a question make one group."""
    options = [record.get(letter) for letter in "ABCD"]
    if any(option is None or is_blank(str(option)) for option in options):
        raise BadRow("no options", brief(options))
    options = [str(option) for option in options]
    image = record.get("image")
    if isinstance(image, str):
        try:
            image = base64.b64decode("".join((image.partition("base64,")[2] or image).split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise BadRow("an image that is no base64", brief(image)) from error
    prompt = question_text(record.get("question"), options)
    gold = gold_letter(record.get("answer"), options, 4)
    name, category = _name(record, ("index", "id"), number), task_name(record.get("category"))
    question, *texts = (" ".join(text.split()) for text in (record["question"], *options))
    group = "\n".join([question, *sorted(texts)])
    return Draft(name, category, [image], prompt, options, 4, gold, group)


def convert_visual_puzzles(record, task, number):
    """VisualPuzzles: `image`, `question`, `options` or none where the picture has them, `answer`, `category`."""
    options = record.get("options")
    if isinstance(options, list) and all(option is None or is_blank(str(option)) for option in options):
        options = None  # in the picture
    options = texts_of_options(options)
    num_options = 4 if options is None else len(options)
    prompt = question_text(record.get("question"), options or ())
    if options is None:
        prompt += "\nThe options (A), (B), (C) and (D) are in the picture."
    gold = gold_letter(record.get("answer"), options, num_options)
    name, category = _name(record, ("id",), number), task_name(record.get("category"))
    return Draft(name, category, [record.get("image")], prompt, options, num_options, gold)


BENCHMARKS = {
    "blink": Benchmark("BLINK-Benchmark/BLINK", "mean over tasks", convert_blink, BLINK_TASKS, "val"),
    "blink_paper": Benchmark("BLINK-Benchmark/BLINK", "mean over tasks", convert_blink, PAPER_TASKS, "val"),
    "vstar": Benchmark("craigwu/vstar_bench", "mean over rows", convert_vstar),
    "hrbench_4k": Benchmark("DreamMr/HR-Bench", "mean over rows", convert_hrbench, None, "hrbench_4k"),
    "hrbench_8k": Benchmark("DreamMr/HR-Bench", "mean over rows", convert_hrbench, None, "hrbench_8k"),
    "visualpuzzles": Benchmark("neulab/VisualPuzzles", "mean over rows", convert_visual_puzzles),
    "puzzles": Benchmark(None, "mean over tasks", convert_blink, None, "val", answer_line=""),
}
HRBENCH_CONFIG = "hrbench_version_split"


def read_records_of(name, data=None, revision=None, max_rows=None, seed=0):
    """
    The records of a benchmark, task after task.

    Args:
        name (`str`): one of `BENCHMARKS`.
        data (`str`, *optional*): Hub id or local folder of the same shape; by default where it was published, and for
            `"puzzles"` freshly made ones, of `seed`.
        revision (`str`, *optional*): of the Hub's repository.
        max_rows (`int`, *optional*): most records of each task, or of all where the benchmark has none.
        seed (`int`, defaults to 0): of puzzles that are made here.

    Returns:
        `tuple[SourceFiles | None, Iterator]`: where images named by path lie, and pairs of config or `None` and record.

    Raises:
        ValueError: a source that is not there, or has no such split, or images of another size.
    """
    benchmark = BENCHMARKS[name]
    if data is None and benchmark.hub_id is None:
        return None, _made_puzzles(max_rows or NUM_PUZZLES, seed)
    data = str(data or benchmark.hub_id)
    if not Path(data).exists() and not is_hub_id(data):
        raise ValueError(f"`data` is {data!r}, which is neither a folder or file nor the id of a dataset on the Hub.")
    files = SourceFiles(data, revision=revision, lazy=True)
    if name == "vstar" and (listed := _json_file(files)):
        return files, ((None, record) for record in read_records(files.path(listed))[:max_rows])
    tables = SourceTables(data, Path(data).absolute(), files.folder, benchmark.split, revision, streaming=False)
    if name.startswith("hrbench") and (paths := _files_of_size(data, files, name)):
        shards = [SourceTables(data, path, files.folder, benchmark.split, revision, streaming=False) for path in paths]
        opened = [(config, shard.split(config)) for shard in shards for config in shard.wanted(None)]
        return files, _records(opened, max_rows)
    configs = tables.wanted(None)
    if HRBENCH_CONFIG in configs:
        configs = [HRBENCH_CONFIG]
    if benchmark.tasks and configs != [None]:
        configs = [task for task in benchmark.tasks if task in configs]
        if not configs:
            raise ValueError(f"`{data}` has none of the tasks {list(benchmark.tasks)}: it has {tables.wanted(None)}.")
    splits = list(tables.splits(configs[0]))
    if benchmark.split is None and len(splits) != 1:
        raise ValueError(f"`{data}` has the splits {splits}, but one was expected: name a folder with that one alone.")
    # Without a card that says otherwise, `datasets` calls the files `val-*` by another name.
    without_card = benchmark.split == "val" and "val" not in splits and "validation" in splits
    tables.split_name = "validation" if without_card else benchmark.split or splits[0]
    opened = [(config, tables.split(config)) for config in configs]  # before a record is read
    in_one_table = benchmark.convert is convert_blink and configs == [None]  # which has rows of all tasks
    return files, _records(opened, max_rows, in_one_table, benchmark.tasks)


def _records(opened, max_rows, in_one_table=False, tasks=None):
    """Pairs of config and record, `max_rows` of each config, or of each `sub_task` of a table that holds several."""
    counts = Counter()
    for config, table in opened:
        for batch in table.iter(batch_size=1):
            record = {key: values[0] for key, values in batch.items()}
            task = str(record.get("sub_task")) if in_one_table else config
            if in_one_table and tasks and task in BLINK_TASKS and task not in tasks:
                continue
            if counts[task] == max_rows:
                if not in_one_table:
                    break
                continue
            counts[task] += 1
            yield config, record


def _made_puzzles(num_rows, seed):
    from ..data.puzzles import KINDS, generate_puzzles, read_sides  # photographs come with the extra `demo`

    sides = read_sides()
    for kind in KINDS:
        for record in generate_puzzles(kind, num_rows, "val", seed, sides=sides):
            yield kind, record


def _json_file(files):
    found = [name for pattern in ("*.jsonl", "*.json") for name in files.glob(pattern)]
    return next((name for name in found if Path(name).stem.startswith("test")), None)


def _files_of_size(data, files, name):
    """The files of one size, by their paths, where no card tells the splits apart; none if no path names a size."""
    wanted, path = name.removeprefix("hrbench_"), Path(data)
    if path.is_file():
        found = [path.name]
    elif path.is_dir() and not (path / "README.md").is_file():
        found = files.glob("**/*.parquet")
    else:
        return []
    sizes = {file: sizes[-1].lower() for file in found if (sizes := IMAGE_SIZE.findall(file))}
    if sizes and wanted not in sizes.values():
        raise ValueError(
            f"`data` has files of another size than `benchmark` {name!r}, {sorted(sizes)}: name those of {wanted}, or "
            "the other benchmark."
        )
    return [files.path(file) for file, size in sizes.items() if size == wanted]
