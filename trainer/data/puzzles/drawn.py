"""Puzzles drawn cell by cell: IQ_Test, which continues a sequence, and Multi-hop_Reasoning, which follows arrows."""

import functools
import hashlib

import numpy as np

from ..shapes import COLORS
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
CLEAR_SIDE = 14  # pixels: smaller shapes look alike
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


def _side(cell: int, term: dict) -> int:
    """Side of a term's shape in a cell, in pixels."""
    return cell * (16 + 4 * term["size"] if "size" in term else 36 if "dot" in term else 44) // 64


def _draw_term(canvas: np.ndarray, left: int, top: int, cell: int, term: dict) -> None:
    """Draws one term into the square of `cell` pixels at (left, top)."""
    draw_frame(canvas, left + 1, top + 1, cell - 2, cell - 2, 1, (150, 150, 150))
    unit = SUB * cell // 64  # a 64th of the cell in drawing units
    x, y = left * SUB + cell * SUB // 2, top * SUB + cell * SUB * 28 // 64
    side = _side(cell, term)
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


def _options(rng: Random, num_rules: int, cell: int) -> tuple[list[str], list[tuple], list[dict], dict[str, list]]:
    """The rules at work, four options, the numbers of their values, and what those values are."""
    rules = rng.shuffled([rule for rule in RULES if num_rules > 1 or rule != "size"])
    # One thing at the middle's edge at a time, a size that keeps the shape clear of it, and no shape too small to tell.
    clashes = {"hand": {"dot", "size"}, "dot": {"hand", "size"}, "size": {"hand", "dot"}}
    if _side(cell, {"size": 1}) < CLEAR_SIDE:
        clashes["size"] = {"hand", "dot", "shape"}
        clashes["shape"] = {"size"}
    chosen = []
    for rule in rules:
        if len(chosen) < num_rules and not clashes.get(rule, set()) & set(chosen):
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
    still = {"shape": rng.choice(SHAPES), "color": rng.choice(NAMES)}
    options = [still | {rule: values[rule][value] for rule, value in zip(chosen, code, strict=True)} for code in codes]
    return chosen, codes, options, values


def iq_test(rng: Random, photos: Photos, size: int, difficulty: float, answer: int, case: int) -> Puzzle:
    """
    Which of four pictures goes on with a sequence of five.

    The four are drawn first, such that each value of each changing property is in as many of them as any other; the
    coin says which is right, and the sequence is reckoned back from it. So the four alone say nothing.
    """
    num_rules = round(between(*NUM_RULES, difficulty))
    cell = size * 25 // 100
    while True:
        chosen, codes, options, values = _options(rng, num_rules, cell)
        # Which split a set of options belongs to: no picture is in both, and a set says nothing of the right one.
        if (
            hashlib.sha256(repr(sorted(sorted(option.items()) for option in options)).encode()).digest()[0] % 2
            == photos.held_out
        ):
            break
    right = codes[answer]
    sequences = {
        rule: _sequence(rng, rule, values[rule], values[rule][value])
        for rule, value in zip(chosen, right, strict=True)
    }
    picture = np.full((size, size, 3), 255, dtype=np.uint8)
    scale = text_scale(size)
    gap = (size - 4 * cell) // 5
    for i in range(SHOWN + 1):
        row, column = divmod(i, 3)
        left, top = size // 2 - 3 * cell // 2 + column * cell, size // 50 + row * cell
        if i < SHOWN:
            _draw_term(picture, left, top, cell, options[0] | {rule: terms[i] for rule, terms in sequences.items()})
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

NUM_HOPS = (3, 8)  # arrows from the start to the letter
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


def _walk(rng: Random, steps: int, blocked: set, grid: int) -> list[tuple[int, int]] | None:
    """A random path of so many steps that enters no cell twice; `None` where it ran into a corner."""
    free = [(row, column) for row in range(grid) for column in range(grid) if (row, column) not in blocked]
    path = []
    for _ in range(steps + 1):
        if not free:
            return None
        path.append(rng.choice(free))
        free = [cell for cell in _neighbors(path[-1], grid) if cell not in blocked and cell not in path]
    return path


def _distance(a: tuple[int, int], b: tuple[int, int]) -> int:
    return abs(a[0] - b[0]) + abs(a[1] - b[1])


def _paths(rng: Random, hops: int, grid: int) -> tuple[list[list[tuple[int, int]]], int]:
    """
    Four paths of `hops` steps that share no cell, and which of them is the one that the puzzle asks about.

    All four are drawn in the same way. A coin says how many of the other ends shall be nearer to the asked start than
    its own; and where the first arrow leads nearer to its end, so it does to two others: so neither the nearest letter
    nor one in the first arrow's direction is often right.
    """
    nearer = rng.integer(0, 3)
    while True:
        paths = []
        while len(paths) < 4:
            path = _walk(rng, hops, {cell for path in paths for cell in path}, grid)
            if path is None:
                break
            paths.append(path)
        if len(paths) < 4:
            continue
        fitting = []
        for index, path in enumerate(paths):
            distances = [(_distance(other[-1], path[0]), rng.random()) for other in paths]
            ahead = [_distance(other[-1], path[1]) < _distance(other[-1], path[0]) for other in paths]
            if sorted(distances).index(distances[index]) == nearer and (not ahead[index] or sum(ahead) > 2):
                fitting.append(index)
        if fitting:
            return paths, rng.choice(fitting)


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
