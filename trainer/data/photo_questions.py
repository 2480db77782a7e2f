"""Visual questions made from real photographs, offline: the data of the embedded default.

Each row is one square picture made from photographs, one question whose answer is known by construction, and a short
answer. The photographs are those inside scikit-image's wheel, or every image of a folder. A photograph serves either
training or held-out rows, never both. Every row has its own random generator, so row `i` does not depend on how many
rows are built.
"""

import io
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from PIL import Image, ImageDraw, ImageOps

from .photos import load_photos, split_photos


COLORS = {  # sRGB, 8 bits: far apart from each other, pure enough to be rare in photographs
    "red": (230, 20, 30),
    "green": (20, 170, 40),
    "blue": (30, 50, 240),
    "yellow": (250, 225, 20),
    "pink": (245, 60, 225),
    "cyan": (40, 225, 235),
}
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}  # (row, column) steps
CORNERS = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}  # (row, column)
GRID = 3  # objects are pasted into the cells of a GRID x GRID grid
PLACES = {  # (row, column) of each cell
    f"{row} {column}".replace("middle center", "center"): (i, j)
    for i, row in enumerate(("top", "middle", "bottom"))
    for j, column in enumerate(("left", "center", "right"))
}
PREPOSITIONS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
QUESTIONS = {
    "color": "What color is the shape at the {place}?",
    "counting": "How many {color} shapes are there?",
    "spatial_relation": "Where is the {target} shape relative to the {reference} shape?",
    "neighbor_color": "What color is the shape {where} the {reference} shape?",
    "odd_corner": "Which corner does not belong to the photo?",
}
SPLITS = ("train", "held_out")
MIN_IMAGE_SIZE = 48  # below, a cell has fewer than 16 x 16 pixels


class PastedObject(NamedTuple):
    """A coloured shape in one cell of the grid."""

    row: int
    column: int
    shape: str
    color: str


class Puzzle(NamedTuple):
    """What a kind of question makes of one random generator: picture, question, and the photograph behind it."""

    canvas: Image.Image  # RGB, image_size x image_size
    question: str
    photo: str
    answer: str


class _Photos:
    """The photographs of one side of the split."""

    def __init__(self, photos: dict[str, Image.Image]):
        self.photos = photos
        self.names = sorted(photos)

    def choose(self, rng: np.random.Generator, count: int) -> list[str]:
        return [self.names[i] for i in rng.permutation(len(self.names))[:count]]


def random_crop(rng: np.random.Generator, photo: Image.Image, size: int, low: float = 0.4, high: float = 1.0):
    """A random square whose side is `low` to `high` of a photograph's shorter side, mirrored half of the time."""
    side = rng.uniform(low, high) * min(photo.size)
    left, top = rng.uniform(0, photo.width - side), rng.uniform(0, photo.height - side)
    crop = photo.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    return ImageOps.mirror(crop) if rng.random() < 0.5 else crop


# ------------------------------------------------------------------------------
# Objects pasted on a photograph
# ------------------------------------------------------------------------------


def random_box(rng: np.random.Generator, cell: int, row: int, column: int, low: float, high: float):
    """A square somewhere within a cell of `cell` pixels, its side `low` to `high` of it: left, top, right, bottom."""
    size = int(rng.integers(round(low * cell), round(high * cell) + 1))
    x = column * cell + int(rng.integers(0, cell - size + 1))
    y = row * cell + int(rng.integers(0, cell - size + 1))
    return x, y, x + size - 1, y + size - 1


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, box: tuple[int, int, int, int], color: tuple[int, int, int]):
    """Draws a shape that fills a square, black-edged and without smoothing: its colour stays exact."""
    x, y, right, bottom = box
    style = {"fill": color, "outline": (0, 0, 0)}
    if shape == "circle":
        draw.ellipse(box, **style)
    elif shape == "square":
        draw.rectangle(box, **style)
    elif shape == "triangle":
        draw.polygon([((x + right) // 2, y), (right, bottom), (x, bottom)], **style)
    else:
        third = (right - x + 1) // 3
        xs, ys = (x, x + third, right - third, right), (y, y + third, bottom - third, bottom)
        corners = [(1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1)]
        draw.polygon([(xs[i], ys[j]) for i, j in corners], **style)


def _paste(rng: np.random.Generator, canvas: Image.Image, objects: Sequence[PastedObject]) -> None:
    """Draws each object somewhere within its cell."""
    draw = ImageDraw.Draw(canvas)
    for item in objects:
        box = random_box(rng, canvas.width // GRID, item.row, item.column, 0.75, 0.95)
        draw_shape(draw, item.shape, box, COLORS[item.color])


def _scene(
    rng: np.random.Generator,
    photos: _Photos,
    size: int,
    objects: Sequence[PastedObject],
    question: str,
    answer: str,
) -> Puzzle:
    (photo,) = photos.choose(rng, 1)
    canvas = random_crop(rng, photos.photos[photo], size)
    _paste(rng, canvas, objects)
    return Puzzle(canvas, question, photo, answer)


def _cells(rng: np.random.Generator) -> list[tuple[int, int]]:
    return [divmod(int(i), GRID) for i in rng.permutation(GRID * GRID)]


def _other(rng: np.random.Generator, options: Iterable[str], *excluded: str) -> str:
    return str(rng.choice([option for option in options if option not in excluded]))


def _objects(rng: np.random.Generator, cells: Iterable[tuple[int, int]], colors: Iterable[str]) -> list[PastedObject]:
    return [PastedObject(*cell, str(rng.choice(SHAPES)), color) for cell, color in zip(cells, colors, strict=True)]


def _color(rng: np.random.Generator, photos: _Photos, size: int, answer: str) -> Puzzle:
    cells = _cells(rng)[: rng.integers(2, 5)]
    objects = _objects(rng, cells, [answer, *rng.choice(list(COLORS), len(cells) - 1).tolist()])
    place = next(name for name, cell in PLACES.items() if cell == cells[0])
    return _scene(rng, photos, size, objects, QUESTIONS["color"].format(place=place), answer)


def _counting(rng: np.random.Generator, photos: _Photos, size: int, answer: str) -> Puzzle:
    color, count, num_others = _other(rng, COLORS), int(answer), int(rng.integers(1, 4))
    colors = [color] * count + [_other(rng, COLORS, color) for _ in range(num_others)]
    objects = _objects(rng, _cells(rng)[: count + num_others], colors)
    return _scene(rng, photos, size, objects, QUESTIONS["counting"].format(color=color), answer)


def _neighbors(rng: np.random.Generator, direction: str) -> list[tuple[int, int]]:
    """A cell, its neighbour in that direction, and the other cells in any order."""
    step = DIRECTIONS[direction]
    for cell in _cells(rng):
        neighbor = (cell[0] + step[0], cell[1] + step[1])
        if min(neighbor) >= 0 and max(neighbor) < GRID:
            return [cell, neighbor, *(other for other in _cells(rng) if other not in (cell, neighbor))]
    raise AssertionError("every direction has a neighbour in a grid of more than one cell")


def _spatial_relation(rng: np.random.Generator, photos: _Photos, size: int, answer: str) -> Puzzle:
    reference, target = rng.permutation(list(COLORS))[:2].tolist()
    objects = _objects(rng, _neighbors(rng, answer)[:2], [reference, target])
    question = QUESTIONS["spatial_relation"].format(target=target, reference=reference)
    return _scene(rng, photos, size, objects, question, answer)


def _neighbor_color(rng: np.random.Generator, photos: _Photos, size: int, answer: str) -> Puzzle:
    direction = str(rng.choice(list(DIRECTIONS)))
    reference, *others = rng.permutation([color for color in COLORS if color != answer])[:3].tolist()
    objects = _objects(rng, _neighbors(rng, direction)[:4], [reference, answer, *others])
    question = QUESTIONS["neighbor_color"].format(where=PREPOSITIONS[direction], reference=reference)
    return _scene(rng, photos, size, objects, question, answer)


# ------------------------------------------------------------------------------
# A photograph compared with another
# ------------------------------------------------------------------------------


def _odd_corner(rng: np.random.Generator, photos: _Photos, size: int, answer: str) -> Puzzle:
    photo, foreign = photos.choose(rng, 2)
    canvas = random_crop(rng, photos.photos[photo], size, low=0.5)
    half = size // 2
    row, column = CORNERS[answer]
    canvas.paste(random_crop(rng, photos.photos[foreign], half, low=0.25, high=0.5), (column * half, row * half))
    return Puzzle(canvas, QUESTIONS["odd_corner"], photo, answer)


class _Kind(NamedTuple):
    make: Callable[[np.random.Generator, _Photos, int, str], Puzzle]
    choices: tuple[str, ...]
    num_photos: int = 1  # photographs that one picture is made of


KINDS = {
    "color": _Kind(_color, tuple(COLORS)),
    "counting": _Kind(_counting, ("0", "1", "2", "3", "4")),
    "spatial_relation": _Kind(_spatial_relation, tuple(DIRECTIONS)),
    "neighbor_color": _Kind(_neighbor_color, tuple(COLORS)),
    "odd_corner": _Kind(_odd_corner, tuple(CORNERS), num_photos=2),
}

_CONTENT = datasets.List({"type": datasets.Value("string"), "text": datasets.Value("string")})
_MESSAGES = datasets.List({"role": datasets.Value("string"), "content": _CONTENT})
FEATURES = datasets.Features(
    {
        "images": datasets.List(datasets.Image()),
        "prompt": _MESSAGES,
        "completion": _MESSAGES,
        "kind": datasets.Value("string"),
        "photo": datasets.Value("string"),
        "choices": datasets.List(datasets.Value("string")),
    }
)


def to_row(puzzle: Puzzle, kind: str, choices: Sequence[str]) -> dict[str, Any]:
    """A puzzle in the columns of `FEATURES`."""
    buffer = io.BytesIO()
    puzzle.canvas.save(buffer, format="PNG", compress_level=1)
    user = [{"type": "image", "text": None}, {"type": "text", "text": puzzle.question}]
    return {
        "images": [{"bytes": buffer.getvalue(), "path": None}],
        "prompt": [{"role": "user", "content": user}],
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": puzzle.answer}]}],
        "kind": kind,
        "photo": puzzle.photo,
        "choices": list(choices),
    }


def check_arguments(kinds, known, split, num_rows, seed, image_size):
    """Refuses what no questions can be built from; `known` are the kinds that there are."""
    unknown = [kind for kind in kinds if kind not in known]
    if unknown or not kinds:
        raise ValueError(f"`kinds` must name some of {list(known)}, but got {list(kinds)}.")
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {list(SPLITS)}, but got '{split}'.")
    if num_rows < 1:
        raise ValueError(f"`num_rows` must be at least 1, but got {num_rows}.")
    if seed < 0:
        raise ValueError(f"`seed` must be zero or more, but got {seed}.")
    if image_size < MIN_IMAGE_SIZE or image_size % GRID:
        raise ValueError(
            f"`image_size` must be a multiple of {GRID}, at least {MIN_IMAGE_SIZE}, but got {image_size}."
        )


def build_photo_questions(
    num_rows: int,
    split: str = "train",
    seed: int = 0,
    image_size: int = MIN_IMAGE_SIZE,
    image_dir: str | Path | None = None,
    kinds: Sequence[str] | None = None,
    split_seed: int = 5,
) -> datasets.Dataset:
    """
    Builds visual questions with known answers from photographs.

    Kinds alternate from row to row, and within a kind the answers take turns, so that answers are balanced to within
    one row; shuffle the rows for training. The kinds are

    - `color`: the colour of the shape at a named place of a 3 x 3 grid;
    - `counting`: how many shapes of a colour;
    - `spatial_relation`: where one shape is relative to another;
    - `neighbor_color`: in two steps, the colour of the shape on one side of another;
    - `odd_corner`: which quarter was replaced by a piece of another photograph.

    Args:
        num_rows (`int`):
            Number of rows, at least one.
        split (`str`, *optional*, defaults to `"train"`):
            `"train"` or `"held_out"`: which photographs the rows are made of. No photograph serves both.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the rows, zero or more. The same arguments give the same bytes, and a longer dataset starts with
            the rows of a shorter one.
        image_size (`int`, *optional*, defaults to `48`):
            Width and height of each picture in pixels: a multiple of 4, at least 48.
        image_dir (`str` or `Path`, *optional*):
            Folder of the user's photographs. By default those inside scikit-image's wheel are used, without network.
        kinds (`Sequence[str]`, *optional*):
            The kinds of question to build, in this order of turns. All by default.
        split_seed (`int`, *optional*, defaults to `5`):
            Which photographs are held out. Give both splits the same value. The default deals colour and grey
            photographs of scikit-image to both sides.

    Returns:
        `datasets.Dataset`: columns `images` (one RGB image of `image_size` x `image_size`), `prompt` and `completion`
        (TRL's conversational format, one message each), `kind`, `photo` (name of the photograph behind the picture)
        and `choices` (the possible answers). An image part of a prompt carries `text: None`, as Arrow requires.

    Raises:
        ValueError: An argument is out of range, `image_dir` is unusable (see [`load_photos`]), or it holds too few
            photographs for the kinds asked for.
    """
    kinds = tuple(KINDS if kinds is None else kinds)
    check_arguments(kinds, KINDS, split, num_rows, seed, image_size)
    photos = load_photos(image_dir)
    names = split_photos(photos, split_seed)
    needed = max(KINDS[kind].num_photos for kind in kinds)
    short = {side: len(side_names) for side, side_names in names.items() if len(side_names) < needed}
    if short:
        raise ValueError(
            f"The kinds {list(kinds)} need at least {needed} different photograph(s) for training and as many held out, "
            f"but the {len(photos)} in `image_dir` leave {short}. Add photographs, or ask for fewer `kinds`."
        )

    side = _Photos({name: photos[name] for name in names[split]})
    rows = []
    for index in range(num_rows):
        turn, position = divmod(index, len(kinds))
        kind = kinds[position]
        choices = KINDS[kind].choices
        rng = np.random.default_rng((seed, SPLITS.index(split), index))
        rows.append(to_row(KINDS[kind].make(rng, side, image_size, choices[turn % len(choices)]), kind, choices))
    return datasets.Dataset.from_list(rows, features=FEATURES)


def question_words() -> list[str]:
    """Returns every word and mark that questions and answers use, sorted: what the demo's tokenizer is built from."""
    texts = [*QUESTIONS.values(), *PREPOSITIONS.values(), *PLACES, *COLORS]
    texts += [choice for kind in KINDS.values() for choice in kind.choices]
    return sorted({word for text in texts for word in re.findall(r"\w+|\?", re.sub(r"{\w+}", "", text))})


# ------------------------------------------------------------------------------
# What a score is compared with
# ------------------------------------------------------------------------------


def answer_text(row: dict[str, Any]) -> str:
    """Returns the answer of a row in TRL's prompt/completion format: the text of its completion."""
    return "".join(part["text"] for part in row["completion"][0]["content"] if part["type"] == "text")


def _labels(rows: datasets.Dataset) -> datasets.Dataset:
    return rows.select_columns(["kind", "choices", "completion"])  # leaves the pictures undecoded


def chance(rows: datasets.Dataset) -> dict[str, float]:
    """
    Accuracy of guessing among the choices, per kind, in kinds' order of appearance.

    Args:
        rows (`datasets.Dataset`): Rows with the columns `kind`, `choices` and `completion`.

    Returns:
        `dict[str, float]`: Mean of 1 / number of choices, in 0..1.
    """
    values = defaultdict(list)
    for row in _labels(rows):
        values[row["kind"]].append(1 / len(row["choices"]))
    return {kind: float(np.mean(kind_values)) for kind, kind_values in values.items()}


def constant_answer(rows: datasets.Dataset) -> dict[str, str]:
    """
    The most frequent answer per kind; among equals, the one that is first in the alphabet.

    Args:
        rows (`datasets.Dataset`): The training rows, with the columns `kind`, `choices` and `completion`.

    Returns:
        `dict[str, str]`: Answer by kind. [`constant_answer_accuracy`] scores it on held-out rows.
    """
    counts = defaultdict(Counter)
    for row in _labels(rows):
        counts[row["kind"]][answer_text(row)] += 1
    return {kind: min(counter, key=lambda answer: (-counter[answer], answer)) for kind, counter in counts.items()}


def constant_answer_accuracy(rows: datasets.Dataset, answers: dict[str, str]) -> dict[str, float]:
    """
    Accuracy per kind of always giving the same answer.

    Args:
        rows (`datasets.Dataset`): The rows to score, with the columns `kind`, `choices` and `completion`.
        answers (`dict[str, str]`): What [`constant_answer`] found on the training rows.

    Returns:
        `dict[str, float]`: Accuracy in 0..1 by kind.
    """
    hits = defaultdict(list)
    for row in _labels(rows):
        hits[row["kind"]].append(answer_text(row) == answers[row["kind"]])
    return {kind: float(np.mean(kind_hits)) for kind, kind_hits in hits.items()}
