"""Pictures in which colours point to each other, on real photographs: questions of one look, and of several.

Eight shapes of eight colours lie in the cells of a 3 x 3 grid. Each has a core of another shape's colour, and so points to
it; the eight form one ring. `Where is red?` takes one look, `1 step from red?` one (the colour of red's core), and `3 steps from red?`
three that build on one another. Questions are as terse as that to keep sequences short.
"""

import io
from typing import NamedTuple

import datasets
import numpy as np
from PIL import ImageDraw

from .photos import load_photos, split_photos
from .shapes import (
    ALL_COLORS,
    DIRECTIONS,
    GRID,
    PLACES,
    PREPOSITIONS,
    SHAPES,
    draw_shape,
    random_box,
    random_crop,
)


IMAGE_SIZE = 72  # pixels: 24 for each cell of the grid
CAPTIONS = ("list_colors", "list_insides", "list_shapes", "walk")  # many looks, one for each word of the answer
ONE_LOOK = ("color", "shape", "counting", "location", "neighbor_color", "1_step")
MULTI_HOP = ("2_steps", "3_steps", "4_steps")
FIRST_STEPS = ("1_step", "2_steps")  # of the demo and the ablation: what the base was taught, and what it never was
KINDS = (*CAPTIONS, *ONE_LOOK, *MULTI_HOP)
NUM_TURNS = len(ALL_COLORS)  # after as many rows of a kind each of its start colours has had its turn
SPLITS = ("train", "held_out")
MIN_IMAGE_SIZE = 48  # pixels: below, a cell has fewer than 16 x 16 pixels

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


class Shape(NamedTuple):
    """What lies in a cell."""

    cell: tuple[int, int]  # row and column
    outline: str
    color: str
    core: str  # colour that it points to


def _ring(rng):
    """Eight shapes of all colours in random cells, each pointing to the next."""
    cells = [divmod(int(i), GRID) for i in rng.permutation(GRID * GRID)]
    colors = [list(ALL_COLORS)[i] for i in rng.permutation(len(ALL_COLORS))]
    return [
        Shape(cell, str(rng.choice(SHAPES)), color, core)
        for cell, color, core in zip(cells, colors, [*colors[1:], colors[0]])
    ]


def _heap(rng, color, count):
    """`count` shapes of a colour, and one to four of others."""
    others = [other for other in ALL_COLORS if other != color]
    colors = [color] * count + rng.choice(others, int(rng.integers(1, 5))).tolist()
    cells = [divmod(int(i), GRID) for i in rng.permutation(GRID * GRID)]
    shapes = []
    for cell, own in zip(cells, colors):
        core = str(rng.choice([other for other in ALL_COLORS if other != own]))
        shapes.append(Shape(cell, str(rng.choice(SHAPES)), own, core))
    return shapes


def _place(cell):
    return next(name for name, found in PLACES.items() if found == cell)


def _question(kind, shapes, start, rng):
    """Question and answer of a kind about a ring; `start` is the shape that it asks about."""
    by_cell = {shape.cell: shape for shape in shapes}
    by_color = {shape.color: shape for shape in shapes}
    if kind in CAPTIONS[:3]:
        part = {"list_colors": "color", "list_insides": "core", "list_shapes": "outline"}[kind]
        found = (by_cell.get(cell) for cell in PLACES.values())
        return f"List {kind[5:]}?", " ".join("none" if shape is None else getattr(shape, part) for shape in found)
    if kind == "walk":
        colors = [start.core]
        while by_color[colors[-1]].core != start.color:
            colors.append(by_color[colors[-1]].core)
        return f"Walk from {start.color}?", " ".join(colors)
    if kind == "color":
        return f"Color at {_place(start.cell)}?", start.color
    if kind == "shape":
        return f"Shape at {_place(start.cell)}?", start.outline
    if kind == "location":
        return f"Where is {start.color}?", _place(start.cell)
    if kind == "neighbor_color":
        # The shape asked for is `start`, so that answers take turns; its neighbour is what the question names.
        sides = {
            side: by_cell.get((start.cell[0] - step[0], start.cell[1] - step[1])) for side, step in DIRECTIONS.items()
        }
        side = str(rng.choice([side for side, shape in sides.items() if shape is not None]))
        return f"Color {PREPOSITIONS[side]} {sides[side].color}?", start.color
    num_steps, color = int(kind[0]), start.color
    for _ in range(num_steps):
        color = by_color[color].core
    return f"{num_steps} step{'s' * (num_steps > 1)} from {start.color}?", color


def choices_of(kind):
    """The answers that a kind can have; of captions none, since they are many."""
    if kind in CAPTIONS:
        return []
    return {"shape": list(SHAPES), "counting": ["0", "1", "2", "3", "4"], "location": list(PLACES)}.get(
        kind, list(ALL_COLORS)
    )


def draw_shapes(rng, canvas, shapes):
    """Draws shapes with their cores onto a picture, each somewhere in its cell."""
    draw = ImageDraw.Draw(canvas)
    for shape in shapes:
        box = random_box(rng, canvas.width // GRID, *shape.cell)
        draw_shape(draw, shape.outline, box, ALL_COLORS[shape.color])
        left, top, right, bottom = box
        size, middle = right - left + 1, (left + right) / 2
        center = top + 0.66 * size if shape.outline == "triangle" else (top + bottom) / 2  # where it is wide enough
        radius = 0.19 * size
        core = (middle - radius, center - radius, middle + radius, center + radius)
        draw_shape(draw, "circle", core, ALL_COLORS[shape.core])


def _check_arguments(kinds, split, num_rows, seed, image_size):
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"`kinds` must name some of {list(KINDS)}, but got {list(kinds)}.")
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


def build_color_steps(
    num_rows,
    split="train",
    seed=0,
    kinds=(*ONE_LOOK, *MULTI_HOP),
    image_size=IMAGE_SIZE,
    image_dir=None,
    split_seed=5,
) -> datasets.Dataset:
    """
    Builds questions about colours that point to each other.

    Kinds alternate from row to row, and within a kind the colours (or counts) asked about take turns; shuffle the rows for
    training. The kinds are

    - of one look: `color` and `shape` at a place, `counting` the shapes of a colour, `location` of a colour, `neighbor_color`
      beside another, `1_step`;
    - of several: `2_steps`, `3_steps` and `4_steps`, each from the core of a shape to the shape of that colour;
    - captions, for a base to learn from: `list_colors`, `list_insides`, `list_shapes` in reading order, and `walk`, the whole
      ring step by step.

    A ring has one shape of each of eight colours, so that no colour is more likely than another to be the answer; of `n` steps it is
    never the start, nor what fewer steps reach: guessing among the rest gives 1 / (8 - n).

    Args:
        num_rows (`int`): number of rows, at least one.
        split (`"train"` or `"held_out"`, defaults to `"train"`): which photographs lie behind the shapes; none serves both.
        seed (`int`, defaults to 0): zero or more. The same arguments give the same bytes, and a longer dataset starts with
            the rows of a shorter one.
        kinds (`Sequence[str]`): in their order of turns; all but the captions by default.
        image_size (`int`, defaults to 72): width and height in pixels, a multiple of 3, at least 48.
        image_dir (`str` or `Path`, *optional*): folder of photographs, those inside scikit-image's wheel by default.
        split_seed (`int`, defaults to 5): which photographs are held out.

    Returns:
        `datasets.Dataset`: columns `images` (one RGB image of `image_size` x `image_size`), `prompt` and `completion` (TRL's
        conversational format, one message each), `kind`, `photo` (name of the photograph behind the shapes) and `choices` (the
        possible answers; none for captions). An image part of a prompt carries `text: None`, as Arrow requires.

    Raises:
        ValueError: an argument out of range, or `image_dir` is unusable, see [`load_photos`].
    """
    kinds = tuple(kinds)
    _check_arguments(kinds, split, num_rows, seed, image_size)
    photos = load_photos(image_dir)
    names = sorted(split_photos(photos, split_seed)[split])
    if not names:
        raise ValueError(f"`image_dir` '{image_dir}' leaves no photograph for {split!r}: add some.")
    rows = []
    for index in range(num_rows):
        turn, position = divmod(index, len(kinds))
        rng = np.random.default_rng((seed, SPLITS.index(split), index))
        rows.append(_row(rng, kinds[position], turn, photos, names, image_size))
    return datasets.Dataset.from_list(rows, features=FEATURES)


def _row(rng, kind, turn, photos, names, image_size):
    photo = names[rng.integers(len(names))]
    canvas = random_crop(rng, photos[photo], image_size)
    color = list(ALL_COLORS)[turn % NUM_TURNS]
    if kind == "counting":
        count = turn % 5
        color = list(ALL_COLORS)[turn // 5 % NUM_TURNS]
        shapes, question, answer = _heap(rng, color, count), f"Count {color}?", str(count)
    else:
        shapes = _ring(rng)
        start = next(shape for shape in shapes if shape.color == color)
        question, answer = _question(kind, shapes, start, rng)
    draw_shapes(rng, canvas, shapes)
    buffer = io.BytesIO()
    canvas.save(buffer, format="PNG", compress_level=1)
    asked = [{"type": "image", "text": None}, {"type": "text", "text": question}]
    return {
        "images": [{"bytes": buffer.getvalue(), "path": None}],
        "prompt": [{"role": "user", "content": asked}],
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": answer}]}],
        "kind": kind,
        "photo": photo,
        "choices": choices_of(kind),
    }
