"""Puzzles drawn cell by cell: IQ_Test, which continues a sequence, and Multi-hop_Reasoning, which follows arrows."""

import functools

import numpy as np

from ..photo_questions import COLORS
from .camera import Box, Photos, crop
from .canvas import (
    BLACK,
    NAMES,
    SHAPES,
    SUB,
    WHITE,
    Puzzle,
    Random,
    between,
    draw_frame,
    draw_polygon,
    draw_ring,
    draw_segment,
    draw_shape,
    draw_text,
    text_scale,
    text_size,
)


LETTERS = "ABCD"

# ------------------------------------------------------------------------------
# Sequences
# ------------------------------------------------------------------------------

SHOWN = 5  # terms of a sequence before the one that is asked for
NUM_RULES = (1, 3)  # at work at once, at difficulty 0 and 1
COMPASS = ((0, -12), (8, -8), (12, 0), (8, 8), (0, 12), (-8, 8), (-12, 0), (-8, -8))  # eight directions, clockwise
SIZES = 9  # steps of size, and of number
CYCLES = {"shape": SHAPES, "color": NAMES}  # three values in turn
TURNS = ("hand", "dot")  # eight directions, by a fixed step
GROWTHS = ("size", "bars")  # one more or one less each time
RULES = {
    "shape": "the shapes take turns",
    "color": "the colors take turns",
    "hand": "the hand turns by a fixed angle",
    "dot": "the dot moves round by a fixed step",
    "size": "the shape grows or shrinks",
    "bars": "the number of bars goes up or down by one",
}


def _sequence(rng: Random, rule: str, values: list, right) -> list:
    """The terms of a sequence that goes on with `right`, one of `values`; the others appear in it where they can."""
    if rule in CYCLES:
        wrong = rng.shuffled([value for value in values if value != right])
        others = [*wrong, *rng.shuffled([value for value in CYCLES[rule] if value not in values])][:2]
        others = rng.shuffled(others)
        return [[right, *others][(i - SHOWN) % 3] for i in range(SHOWN)]
    if rule in TURNS:
        step = rng.choice((1, 2, 3)) * rng.sign()
        return [(right + step * (i - SHOWN)) % len(COMPASS) for i in range(SHOWN)]
    step = 1 if min(values) > SHOWN else -1
    return [right + step * (i - SHOWN) for i in range(SHOWN)]


def _values(rng: Random, rule: str, count: int) -> list:
    """`count` different values of a rule, each of which can be the next of some sequence."""
    if rule in CYCLES:
        return rng.sample(CYCLES[rule], count)
    if rule in TURNS:
        return rng.sample(range(len(COMPASS)), count)
    values = rng.choice((range(1, SIZES - SHOWN + 1), range(SHOWN + 1, SIZES + 1)))  # to shrink to, to grow to
    if rule == "size" and count == 2:  # two sizes that an eye tells apart
        return rng.shuffled([values[0] + rng.integer(0, 1), values[3]])
    return rng.sample(values, count)


def _draw_term(canvas: np.ndarray, left: int, top: int, cell: int, term: dict) -> None:
    """Draws one term into the square of `cell` pixels at (left, top)."""
    draw_frame(canvas, left + 1, top + 1, cell - 2, cell - 2, 1, (150, 150, 150))
    unit = SUB * cell // 64  # a 64th of the cell in drawing units
    x, y = left * SUB + cell * SUB // 2, top * SUB + cell * SUB * 28 // 64
    side = cell * (8 + 4 * term["size"] if "size" in term else 30 if "dot" in term else 44) // 64
    draw_shape(canvas, term["shape"], COLORS[term["color"]], left + (cell - side) // 2, y // SUB - side // 2, side)
    if "hand" in term:
        dx, dy = COMPASS[term["hand"]]
        width = max(4 * unit, SUB * 3 // 2)
        draw_segment(canvas, x, y, x + dx * 7 * unit // 4, y + dy * 7 * unit // 4, width + SUB, WHITE)
        draw_segment(canvas, x, y, x + dx * 7 * unit // 4, y + dy * 7 * unit // 4, width, BLACK)
        draw_ring(canvas, x, y, 0, width, BLACK)
    if "dot" in term:
        dx, dy = COMPASS[term["dot"]]
        draw_ring(canvas, x + dx * 7 * unit // 4, y + dy * 7 * unit // 4, 0, 7 * unit // 2, BLACK)
    if "bars" in term:
        for i in range(term["bars"]):
            start = left * SUB + cell * SUB * (6 + 6 * i) // 64
            end = start + max(3 * unit, SUB)
            bottom = top * SUB + cell * SUB * 61 // 64
            high = bottom - cell * SUB * 9 // 64
            draw_polygon(canvas, [(start, high), (end, high), (end, bottom), (start, bottom)], BLACK)


def iq_test(rng: Random, photos: Photos, size: int, difficulty: float, answer: int, case: int) -> Puzzle:
    """
    Which of four pictures goes on with a sequence of five.

    The four are drawn first, such that each value of each changing property is in as many of them as any other; the
    coin says which is right, and the sequence is reckoned back from it. So the four alone say nothing.
    """
    num_rules = round(between(*NUM_RULES, difficulty))
    rules = rng.shuffled([rule for rule in RULES if num_rules > 1 or rule != "size"])
    # One thing at the middle's edge at a time, and a size that keeps the shape clear of it.
    chosen = []
    for rule in rules:
        clash = {"hand": {"dot", "size"}, "dot": {"hand", "size"}, "size": {"hand", "dot"}}.get(rule, set())
        if len(chosen) < num_rules and not clash & set(chosen):
            chosen.append(rule)
    values = {rule: _values(rng, rule, 4 if num_rules == 1 else 2) for rule in chosen}
    if num_rules == 1:
        codes = [(i,) for i in range(4)]
    elif num_rules == 2:
        codes = [(i, j) for i in range(2) for j in range(2)]
    else:  # half of the eight combinations: each value of each property in two of the four
        flip = rng.integer(0, 1)
        codes = [(i, j, (i + j + flip) % 2) for i in range(2) for j in range(2)]
    codes = rng.shuffled(codes)
    right = codes[answer]
    still = {"shape": rng.choice(SHAPES), "color": rng.choice(NAMES)}
    options = [still | {rule: values[rule][value] for rule, value in zip(chosen, code, strict=True)} for code in codes]
    sequences = {
        rule: _sequence(rng, rule, values[rule], values[rule][value])
        for rule, value in zip(chosen, right, strict=True)
    }
    picture = np.full((size, size, 3), 255, dtype=np.uint8)
    cell = size * 25 // 100
    scale = text_scale(size)
    gap = (size - 4 * cell) // 5
    for i in range(SHOWN + 1):
        row, column = divmod(i, 3)
        left, top = size // 2 - 3 * cell // 2 + column * cell, size // 50 + row * cell
        if i < SHOWN:
            _draw_term(picture, left, top, cell, still | {rule: terms[i] for rule, terms in sequences.items()})
            continue
        draw_frame(picture, left + 1, top + 1, cell - 2, cell - 2, 1, (150, 150, 150))
        width, height = text_size("?", 2 * scale)
        draw_text(picture, "?", left + (cell - width) // 2, top + (cell - height) // 2, 2 * scale, BLACK, WHITE)
    width, height = text_size("A", scale)
    top = size - size // 50 - cell
    for i, option in enumerate(options):
        left = gap + i * (cell + gap)
        _draw_term(picture, left, top, cell, option)
        draw_text(picture, LETTERS[i], left + (cell - width) // 2, top - height - 1, scale)
    return Puzzle(
        [picture],
        "The upper two rows show a sequence, to be read from left to right and row by row. Which of the four lettered "
        "pictures below takes the place of the question mark?",
        [f"picture {letter}" for letter in LETTERS],
        f"From picture to picture {' and '.join(RULES[rule] for rule in chosen)}: picture {LETTERS[answer]} comes next.",
        [],
    )


# ------------------------------------------------------------------------------
# Arrows
# ------------------------------------------------------------------------------

NUM_HOPS = (2, 8)  # arrows from the start to the letter
STEPS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}  # (row, column)


@functools.lru_cache(maxsize=64)
def _arrow(direction: str, cell: int) -> tuple[np.ndarray, np.ndarray]:
    """The pixels of an arrow in a cell, and those of its edge."""
    down, across = STEPS[direction]
    pictures = []
    for grow in (0, max(1, cell // 24)):
        picture = np.zeros((cell, cell, 1), dtype=np.uint8)
        unit, middle, more = SUB * cell // 32, SUB * cell // 2, grow * SUB

        def place(along, aside, unit=unit, middle=middle):
            along, aside = along * unit, aside * unit
            return middle + across * along - down * aside, middle + down * along + across * aside

        tip = [place(12, 0), place(1, 8), place(1, -8)]
        shaft = [place(-11, 3), place(2, 3), place(2, -3), place(-11, -3)]
        for polygon in (tip, shaft):
            draw_polygon(picture, polygon, 1)
            for (x0, y0), (x1, y1) in zip(polygon, [*polygon[1:], polygon[0]], strict=True):
                if more:
                    draw_segment(picture, x0, y0, x1, y1, 2 * more, 1)
        pictures.append(picture[..., 0] > 0)
    body, grown = pictures
    return body, grown & ~body


def _neighbors(cell: tuple[int, int], grid: int) -> list[tuple[int, int]]:
    row, column = cell
    return [
        (row + down, column + across)
        for down, across in STEPS.values()
        if 0 <= row + down < grid and 0 <= column + across < grid
    ]


def _walk(
    rng: Random, start: tuple[int, int], steps: int, blocked: set, grid: int, end: tuple[int, int] | None = None
) -> list[tuple[int, int]] | None:
    """A random path of so many steps that enters no cell twice, to `end` if given; `None` where it ran into a corner."""
    path = [start]
    for left in range(steps - 1, -1, -1):
        free = [
            cell
            for cell in _neighbors(path[-1], grid)
            if cell not in blocked
            and cell not in path
            and (end is None or abs(cell[0] - end[0]) + abs(cell[1] - end[1]) <= left)
            and (left == 0 or cell != end)
        ]
        if not free:
            return None
        path.append(rng.choice(free))
    return path


def _paths(rng: Random, hops: int, grid: int) -> tuple[list[list[tuple[int, int]]], int]:
    """
    Four paths of `hops` steps that share no cell, and which of them is the one that the puzzle asks about.

    The four ends are drawn among all cells that the start can reach in so many steps, and only then the coin decides
    to which of them its path leads: where the letters stand says nothing.
    """
    cells = [(row, column) for row in range(grid) for column in range(grid)]
    while True:
        start = rng.choice(cells)
        reach = []
        for cell in cells:
            distance = abs(cell[0] - start[0]) + abs(cell[1] - start[1])
            if 0 < distance <= hops and (hops - distance) % 2 == 0:
                reach.append(cell)
        if len(reach) < 4:
            continue
        ends = rng.sample(reach, 4)
        routes = [_route(rng, start, end, hops, set(ends) - {end}, grid) for end in ends]
        if None in routes:
            continue
        layouts = [_beside(rng, routes, asked, grid) for asked in range(4)]
        if None not in layouts:  # each of the four could have been the right one
            asked = rng.integer(0, 3)
            return layouts[asked], asked


def _route(rng: Random, start, end, hops: int, blocked: set, grid: int, tries: int = 12):
    """A random path from `start` to `end`, or anywhere if that is `None`, of several tries; `None` if all failed."""
    for _ in range(tries):
        path = _walk(rng, start, hops, blocked, grid, end)
        if path is not None:
            return path
    return None


def _beside(rng: Random, routes: list, asked: int, grid: int) -> list[list[tuple[int, int]]] | None:
    """The asked route, and beside it paths from elsewhere that lead to the other three ends."""
    ends = {route[-1] for route in routes}
    for _ in range(12):
        paths, taken = [], set(routes[asked]) | ends
        for index, route in enumerate(routes):
            if index == asked:
                paths.append(route)
                continue
            backward = _route(rng, route[-1], None, len(route) - 1, taken - {route[-1]}, grid)
            if backward is None:
                break
            taken |= set(backward)
            paths.append(backward[::-1])
        if len(paths) == len(routes):
            return paths
    return None


def multi_hop_reasoning(rng: Random, photos: Photos, size: int, difficulty: float, answer: int, case: int) -> Puzzle:
    """Which letter the arrows lead to from a marked cell, one look after another."""
    hops = round(between(*NUM_HOPS, difficulty))
    grid = 5 if hops <= 3 else 6 if hops <= 5 else 7 if hops <= 7 else 8
    paths, asked = _paths(rng, hops, grid)
    right = paths.pop(asked)
    paths = rng.shuffled(paths)
    paths.insert(answer, right)
    arrows = {}
    for path in paths:
        for cell, following in zip(path, path[1:]):
            step = (following[0] - cell[0], following[1] - cell[1])
            arrows[cell] = next(name for name, value in STEPS.items() if value == step)
    letters = {path[-1]: letter for path, letter in zip(paths, LETTERS, strict=True)}

    photo = rng.choice(photos.photos)
    side = photo.shorter * rng.uniform(0.6, 1.0)
    box = Box(rng.uniform(0, photo.width - side), rng.uniform(0, photo.height - side), side)
    picture = crop(photo, box, size) // 2 + 64  # less contrast than the arrows
    cell_size = size // grid
    border = (size - grid * cell_size) // 2
    scale = text_scale(size)
    for row in range(grid):
        for column in range(grid):
            left, top = border + column * cell_size, border + row * cell_size
            cell = (row, column)
            if cell in letters:
                width, height = text_size("A", scale)
                window = picture[top + 1 : top + cell_size - 1, left + 1 : left + cell_size - 1]
                window[:] = BLACK
                x, y = left + (cell_size - width) // 2, top + (cell_size - height) // 2
                draw_text(picture, letters[cell], x, y, scale)
                continue
            options = [name for name, (a, b) in STEPS.items() if 0 <= row + a < grid and 0 <= column + b < grid]
            direction = arrows.get(cell) or rng.choice(options)
            body, edge = _arrow(direction, cell_size)
            window = picture[top : top + cell_size, left : left + cell_size]
            if cell == right[0]:
                line = max(1, cell_size // 12)
                draw_frame(
                    picture,
                    left + line,
                    top + line,
                    cell_size - 2 * line,
                    cell_size - 2 * line,
                    line,
                    (255, 40, 40),
                )
            window[edge] = BLACK
            window[body] = WHITE
    return Puzzle(
        [picture],
        "Start in the cell with the red frame. Follow its arrow to the next cell, follow the arrow there, and so on "
        "until you come to a letter. Which letter is it?",
        [f"letter {letter}" for letter in LETTERS],
        f"The arrows lead {', '.join(arrows[cell] for cell in right[:-1])}: after {hops} steps one comes to letter "
        f"{LETTERS[answer]}.",
        [photo.name],
    )
