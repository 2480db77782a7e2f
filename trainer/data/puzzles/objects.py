"""Puzzles about objects pasted on a photograph: Counting, Object_Localization and Spatial_Relation."""

import numpy as np

from ..shapes import COLORS
from .camera import Box, Photo, Photos, crop
from .canvas import (
    BLACK,
    NAMES,
    PLURALS,
    SHAPES,
    WHITE,
    Puzzle,
    Random,
    between,
    dark,
    draw_frame,
    draw_shape,
    draw_text,
    place_answer,
    text_scale,
    text_size,
)


def _background(rng: Random, photos: Photos, size: int) -> tuple[Photo, np.ndarray]:
    """A photograph, and a part of it as a picture, mirrored half of the time."""
    photo = rng.choice(photos.photos)
    side = photo.shorter * rng.uniform(0.6, 1.0)
    box = Box(rng.uniform(0, photo.width - side), rng.uniform(0, photo.height - side), side)
    picture = crop(photo, box, size)
    return photo, picture[:, ::-1].copy() if rng.coin() else picture


# ------------------------------------------------------------------------------
# Counting
# ------------------------------------------------------------------------------

NUM_OBJECTS = (8, 20)  # in the picture, at difficulty 0 and 1
LEAST_COUNT = (1, 6)  # the smallest of the four numbers to choose from, at most


def counting(rng: Random, photos: Photos, size: int, difficulty: float, answer: int, case: int) -> Puzzle:
    """
    How many objects of one shape there are: the number is the `case`-th smallest of the four choices.

    How many objects there are at all depends on the difficulty alone, every shape has as many pixels, and colours are
    drawn without looking at shapes; so neither means nor the choices tell the number.
    """
    total = round(between(*NUM_OBJECTS, difficulty))
    least = rng.integer(1, round(between(2, LEAST_COUNT[1], difficulty)))
    count = least + case
    asked, *others = rng.shuffled(SHAPES)
    shapes = rng.shuffled([asked] * count + [rng.choice(others) for _ in range(total - count)])
    grid = next(grid for grid in range(1, total + 1) if 10 * grid * grid >= 13 * total)
    cell = size // grid
    side = max(cell * 9 // 10, 8)
    photo, picture = _background(rng, photos, size)
    for place, shape in zip(rng.sample(range(grid * grid), total), shapes, strict=True):
        row, column = divmod(place, grid)
        left, top = (index * cell + rng.integer(0, cell - side) for index in (column, row))
        draw_shape(picture, shape, COLORS[rng.choice(NAMES)], left, top, side)
    numbers = [least + i for i in range(4) if i != case]
    return Puzzle(
        [picture],
        f"How many {PLURALS[asked]} were pasted on the photo, whatever their color?",
        [str(number) for number in place_answer(rng, numbers, count, answer)],
        f"Of the {total} pasted shapes {count} {'is a ' + asked if count == 1 else 'are ' + PLURALS[asked]}.",
        [photo.name],
    )


# ------------------------------------------------------------------------------
# Object localization
# ------------------------------------------------------------------------------

WRONG_BOX_OVERLAP = (0.2, 0.7)  # intersection over union of the two boxes
STICKERS = {"round": "circle", "rectangular": "square", "triangular": "triangle", "diamond-shaped": "diamond"}


def _sticker(shape: str, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """How far out each pixel of a sticker lies, in thousandths, and which of them belong to it; it fills its box."""
    u = (2 * np.arange(width, dtype=np.int64) + 1 - width)[None]
    v = (2 * np.arange(height, dtype=np.int64) + 1 - height)[:, None]
    au, av = abs(u), abs(v)
    if shape == "circle":
        reach = (au * au * height * height + av * av * width * width) * 1000 // (width * width * height * height)
    elif shape == "square":
        reach = np.maximum(au * height, av * width) * 1000 // (width * height)
    elif shape == "diamond":
        reach = (au * height + av * width) * 1000 // (width * height + width + height)
    else:  # a triangle, its tip above, around its centroid, a third of its height above its base
        base = (3 * v - height) * 1000 // (2 * height)
        sides = 1000 + (1500 * np.maximum(au - 1, 0) * height - 750 * (v + height) * width) // (width * height)
        reach = np.maximum(base, sides)
    return reach, reach <= 1000


def object_localization(rng: Random, photos: Photos, size: int, difficulty: float, answer: int, case: int) -> Puzzle:
    """
    Which of two boxes of one size fits a sticker.

    Two places for the box are drawn, neither before the other, and the coin puts the sticker into one of them.
    """
    overlap = between(*WRONG_BOX_OVERLAP, difficulty)
    width, height = (rng.integer(size * 22 // 100, size * 34 // 100) for _ in range(2))
    shared = 2 * overlap / (1 + overlap)  # share of a box that lies in the other
    part = rng.random() * (1 - shared)
    dx = round(part * width) * rng.sign()
    dy = round((1 - shared / (1 - part)) * height) * rng.sign()
    line = max(2, size // 96)
    scale = text_scale(size)
    tag_width, tag_height = text_size("A", scale)
    room_x, room_y = line + 1, line + tag_height + 1
    left = rng.integer(room_x + max(0, -dx), size - room_x - width - max(0, dx))
    top = rng.integer(room_y + max(0, -dy), size - room_y - height - max(0, dy))
    places = [(left, top), (left + dx, top + dy)]
    photo, picture = _background(rng, photos, size)

    name = rng.choice(tuple(STICKERS))
    reach, inside = _sticker(STICKERS[name], width, height)
    filling = rng.choice([other for other in photos.photos if other is not photo] or [photo])
    side = filling.shorter * rng.uniform(0.4, 0.8)
    box = Box(rng.uniform(0, filling.width - side), rng.uniform(0, filling.height - side), side)
    patch = crop(filling, box, max(width, height))[:height, :width]
    patch[reach > 760] = WHITE
    patch[reach > 940] = BLACK
    if rng.coin():
        places.reverse()
    x, y = places[0]
    picture[y : y + height, x : x + width][inside] = patch[inside]

    colors = rng.sample(("red", "green", "blue", "yellow"), 2)
    boxes = [places[0]]
    boxes.insert(1 - answer, places[1])  # box A, box B
    drawn = [0, 1] if rng.coin() else [1, 0]
    for index in drawn:
        draw_frame(picture, *boxes[index], width, height, line, COLORS[colors[index]])
    for index in drawn:
        (x, y), (other_x, other_y) = boxes[index], boxes[1 - index]
        # Each letter sits at the box's corner that is farthest from the other box, outside.
        right = x > other_x or (x == other_x and index == 1)
        below = y > other_y or (y == other_y and index == 1)
        tag_left = x + width + line - tag_width if right else x - line
        tag_top = y + height + line if below else y - line - tag_height
        tag_top = min(max(tag_top, 0), size - tag_height)
        color = COLORS[colors[index]]
        draw_text(picture, "AB"[index], tag_left, tag_top, scale, WHITE if dark(color) else BLACK, color)
    covered = (width - abs(dx)) * (height - abs(dy))
    return Puzzle(
        [picture],
        f"A {name} sticker with a white edge is pasted on the photo. Which of the two boxes fits exactly around it?",
        [f"box A, the {colors[0]} one", f"box B, the {colors[1]} one"],
        f"Box {'AB'[answer]} touches the sticker on all four sides; the other box is as large but moved, with an "
        f"intersection over union of {covered / (2 * width * height - covered):.2f}.",
        sorted({photo.name, filling.name}),
    )


# ------------------------------------------------------------------------------
# Spatial relation
# ------------------------------------------------------------------------------

RELATIONS = {  # the words, and the step from the second object to the first: (x, y)
    "to the left of": (-1, 0),
    "to the right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
OFF_AXIS = (0.1, 0.75)  # how far the second object lies off the asked direction, in distances along it
NUM_OTHERS = (0, 6)  # objects that the question does not name


def spatial_relation(rng: Random, photos: Photos, size: int, difficulty: float, answer: int, case: int) -> Puzzle:
    """
    Whether one object lies on a side of another: `case` 0 is yes, 1 is no.

    In the asked direction the two are always far apart. Names, relation and places are drawn without looking at the
    answer, which decides only which of the two names goes to which place.
    """
    words = rng.choice(tuple(RELATIONS))
    horizontal = RELATIONS[words][0] != 0
    side = size * 15 // 100
    along = rng.integer(size * 30 // 100, size * 50 // 100)
    off = round(along * between(*OFF_AXIS, difficulty)) * rng.sign()
    dx, dy = (along, off) if horizontal else (off, along)
    x = rng.integer(max(0, -dx), size - side - max(0, dx))
    y = rng.integer(max(0, -dy), size - side - max(0, dy))
    places = [(x, y), (x + dx, y + dy)]  # the left or upper one first
    for _ in range(round(between(*NUM_OTHERS, difficulty))):
        for _ in range(20):
            x, y = rng.integer(0, size - side), rng.integer(0, size - side)
            if all(max(abs(x - a), abs(y - b)) > side for a, b in places):
                places.append((x, y))
                break
    pairs = rng.sample([(color, shape) for color in NAMES for shape in SHAPES], len(places))
    photo, picture = _background(rng, photos, size)
    for (x, y), (color, shape) in zip(places, pairs, strict=True):
        draw_shape(picture, shape, COLORS[color], x, y, side)
    first, second = (" ".join(pair) for pair in pairs[:2])
    backward = sum(RELATIONS[words]) > 0  # the first place is the left or upper one: it is not right of or below
    if (case == 1) != backward:
        first, second = second, first
    opposite = next(other for other, step in RELATIONS.items() if step == tuple(-s for s in RELATIONS[words]))
    choices = ["yes", "no"]
    choices = [choices[1 - case]]
    choices.insert(answer, ("yes", "no")[case])
    return Puzzle(
        [picture],
        f"Is the {first} {words} the {second}?",
        choices,
        f"The {first} is {opposite if case else words} the {second}.",
        [photo.name],
    )
