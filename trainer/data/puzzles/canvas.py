"""Random numbers, drawing and PNG files that come out the same, bit for bit, on every machine.

Nothing here depends on the rounding, the order or the version of a library: randomness is `random.Random.random`, the
one method whose numbers Python guarantees; pixels come from whole numbers, or from single additions, multiplications
and divisions of float64, which IEEE 754 fixes; files are written without compression. Lengths called `sub` are in
sixteenths of a pixel, and the centre of pixel (x, y) lies at (16 x + 8, 16 y + 8).
"""

import functools
import hashlib
import random
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..shapes import COLORS


SUB = 16  # drawing units per pixel
BLACK, WHITE = (0, 0, 0), (255, 255, 255)
PLURALS = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "diamond": "diamonds",
    "cross": "crosses",
    "star": "stars",
}
SHAPES = tuple(PLURALS)
NAMES = tuple(COLORS)
GLYPH_WIDTH, GLYPH_HEIGHT = 5, 7
GLYPHS = {  # one number a row, its highest bit on the left
    "A": (14, 17, 17, 31, 17, 17, 17),
    "B": (30, 17, 17, 30, 17, 17, 30),
    "C": (14, 17, 16, 16, 16, 17, 14),
    "D": (30, 17, 17, 17, 17, 17, 30),
    "E": (31, 16, 16, 30, 16, 16, 31),
    "F": (31, 16, 16, 30, 16, 16, 16),
    "R": (30, 17, 17, 30, 20, 18, 17),
    "?": (14, 17, 1, 2, 4, 0, 4),
}


class Puzzle(NamedTuple):
    """One puzzle as its kind makes it: `images` are RGB arrays of uint8, the right one of `choices` is not in it."""

    images: list[np.ndarray]
    question: str
    choices: list[str]
    explanation: str
    photos: list[str]


class Random:
    """
    Random numbers from a text, the same in every version of Python.

    Args:
        seed (`str`):
            Any text; different texts give unrelated numbers.
    """

    def __init__(self, seed: str):
        self.random = random.Random(int.from_bytes(hashlib.sha256(seed.encode()).digest(), "big")).random

    def integer(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return low + int(self.random() * (high - low + 1))

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.random()

    def coin(self) -> bool:
        return self.random() < 0.5

    def sign(self) -> int:
        return 1 if self.coin() else -1

    def bytes(self, count: int) -> bytes:
        """So many random bytes, all at once."""
        return hashlib.shake_256(str(self.integer(0, 2**53 - 1)).encode()).digest(count)

    def choice(self, items: Sequence):
        return items[self.integer(0, len(items) - 1)]

    def sample(self, items: Sequence, count: int) -> list:
        """`count` different items in random order."""
        pool = list(items)
        for i in range(count):
            j = self.integer(i, len(pool) - 1)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:count]

    def shuffled(self, items: Sequence) -> list:
        return self.sample(items, len(items))


def between(easy: float, hard: float, difficulty: float) -> float:
    """The value at `difficulty` on the line from `easy` at 0 to `hard` at 1."""
    return easy + (hard - easy) * difficulty


def place_answer(rng: Random, wrong: Sequence, right, answer: int) -> list:
    """The options in random order, with the right one at index `answer`."""
    options = rng.shuffled(wrong)
    options.insert(answer, right)
    return options


# ------------------------------------------------------------------------------
# Drawing
# ------------------------------------------------------------------------------


def _window(canvas: np.ndarray, left: int, top: int, right: int, bottom: int):
    """The part of the canvas that a box in `sub` touches, and the centres of its pixels: (1, width), (height, 1)."""
    x0, y0 = max(left // SUB, 0), max(top // SUB, 0)
    x1, y1 = min(right // SUB + 1, canvas.shape[1]), min(bottom // SUB + 1, canvas.shape[0])
    x = np.arange(x0, max(x1, x0), dtype=np.int64)[None] * SUB + SUB // 2
    y = np.arange(y0, max(y1, y0), dtype=np.int64)[:, None] * SUB + SUB // 2
    return canvas[y0:y1, x0:x1], x, y


def draw_ring(canvas: np.ndarray, x: int, y: int, inner: int, outer: int, color) -> None:
    """Paints what lies from `inner` to `outer` around (x, y), all in `sub`; a disc where `inner` is 0."""
    window, px, py = _window(canvas, x - outer, y - outer, x + outer, y + outer)
    distance = (px - x) ** 2 + (py - y) ** 2
    window[(distance >= inner * inner) & (distance <= outer * outer)] = color


def draw_polygon(canvas: np.ndarray, points: Sequence[tuple[int, int]], color) -> None:
    """Paints a convex polygon whose corners are in `sub`, in either direction."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    window, px, py = _window(canvas, min(xs), min(ys), max(xs), max(ys))
    sides = [
        (bx - ax) * (py - ay) - (by - ay) * (px - ax)
        for (ax, ay), (bx, by) in zip(points, [*points[1:], points[0]], strict=True)
    ]
    inside, outside = np.ones((2, *sides[0].shape), dtype=bool)
    for side in sides:
        inside &= side >= 0
        outside &= side <= 0
    window[inside | outside] = color


def draw_segment(canvas: np.ndarray, x0: int, y0: int, x1: int, y1: int, width: int, color) -> None:
    """Paints a line with round ends, all in `sub`."""
    half = width // 2
    window, px, py = _window(canvas, min(x0, x1) - half, min(y0, y1) - half, max(x0, x1) + half, max(y0, y1) + half)
    dx, dy = x1 - x0, y1 - y0
    length = dx * dx + dy * dy
    along = (px - x0) * dx + (py - y0) * dy
    across = (px - x0) * dy - (py - y0) * dx
    body = (along >= 0) & (along <= length) & (across * across <= half * half * length)
    for x, y in ((x0, y0), (x1, y1)):
        body |= (px - x) ** 2 + (py - y) ** 2 <= half * half
    window[body] = color


def draw_frame(canvas: np.ndarray, left: int, top: int, width: int, height: int, line: int, color) -> None:
    """Paints the outline of a box in whole pixels; its line of `line` pixels lies outside the box."""
    right, bottom = left + width, top + height
    canvas[top - line : top, left - line : right + line] = color
    canvas[bottom : bottom + line, left - line : right + line] = color
    canvas[top:bottom, left - line : left] = color
    canvas[top:bottom, right : right + line] = color


@functools.lru_cache(maxsize=256)
def _glyphs(text: str, scale: int) -> np.ndarray:
    """A bitmap of a text with one column between letters and a margin of one pixel, all times `scale`."""
    mask = np.zeros((GLYPH_HEIGHT + 2, (GLYPH_WIDTH + 1) * len(text) + 1), dtype=bool)
    for i, letter in enumerate(text):
        for j, row in enumerate(GLYPHS[letter]):
            for k in range(GLYPH_WIDTH):
                mask[1 + j, 1 + (GLYPH_WIDTH + 1) * i + k] = row >> (GLYPH_WIDTH - 1 - k) & 1
    return mask.repeat(scale, axis=0).repeat(scale, axis=1)


def text_scale(size: int) -> int:
    """How many times its bitmap a letter is drawn in a picture of `size` pixels."""
    return max(1, size // 112)


def text_size(text: str, scale: int) -> tuple[int, int]:
    """Width and height of a text's box in pixels."""
    height, width = _glyphs(text, scale).shape
    return width, height


def draw_text(canvas: np.ndarray, text: str, left: int, top: int, scale: int, ink=WHITE, paper=BLACK) -> None:
    """Paints letters on a box whose upper left corner is given in pixels and lies, with the box, on the canvas."""
    mask = _glyphs(text, scale)
    window = canvas[top : top + mask.shape[0], left : left + mask.shape[1]]
    window[:] = paper
    window[mask] = ink


def dark(color) -> bool:
    """Whether white letters are easier to read on the colour than black ones."""
    return 2 * color[0] + 5 * color[1] + color[2] < 8 * 120


# ------------------------------------------------------------------------------
# Shapes of one area
# ------------------------------------------------------------------------------


def _gauge(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """How large the shape around the origin must be to reach (u, v), in whole numbers, the same scale not needed."""
    au, av = abs(u), abs(v)
    if shape == "circle":
        return u * u + v * v
    if shape == "square":
        return np.maximum(au, av) + 0 * (u + v)
    if shape == "diamond":
        return au + av
    if shape == "cross":
        return np.minimum(np.maximum(au, 3 * av), np.maximum(3 * au, av))
    if shape == "star":  # of four points
        return np.minimum(au + 2 * av, 2 * au + av)
    return np.maximum(
        30 * v, 26 * au - 15 * v
    )  # an equilateral triangle, its tip above; 26 / 15 is near the root of 3


@functools.lru_cache(maxsize=256)
def shape_masks(shape: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    """
    The pixels of a shape, and those of its black edge among them.

    Every shape of one side has exactly the same number of pixels, and of edge pixels, so that neither the mean of a
    picture nor its spread tells which shapes are in it: the pixels that the growing shape reaches first are taken.

    Args:
        shape (`str`): One of `SHAPES`.
        side (`int`): Width and height of the masks in pixels.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Both of bool, (side, side).
    """
    u = (2 * np.arange(side, dtype=np.int64) + 1 - side)[None]
    v = u.T
    rank = _gauge(shape, u, v - side // 6 if shape == "triangle" else v)
    area = 8 * side * side // 25
    order = np.argsort(rank, axis=None, kind="stable")[:area]
    body, edge = np.zeros((2, side * side), dtype=bool)
    body[order] = True
    edge[order[area - (area * 3 // 10 if side >= 20 else 0) :]] = True  # it would hide a small shape
    return body.reshape(side, side), edge.reshape(side, side)


def draw_shape(canvas: np.ndarray, shape: str, color, left: int, top: int, side: int) -> None:
    """Paints a shape with a black edge into the square of `side` pixels at (left, top), which lies on the canvas."""
    body, edge = shape_masks(shape, side)
    window = canvas[top : top + side, left : left + side]
    window[body] = color
    window[edge] = BLACK


# ------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------


def encode_png(pixels: np.ndarray) -> bytes:
    """
    Writes a PNG without compression, since what a compressor writes depends on its version.

    Args:
        pixels (`np.ndarray`): RGB, (height, width, 3), uint8.

    Returns:
        `bytes`: The file.
    """
    height, width, _ = pixels.shape
    rows = np.zeros((height, 1 + 3 * width), dtype=np.uint8)  # each row starts with its filter: none
    rows[:, 1:] = pixels.reshape(height, -1)
    data = rows.tobytes()
    stream = [b"\x78\x01"]
    for start in range(0, len(data), 65535):
        block = data[start : start + 65535]
        last = start + 65535 >= len(data)
        stream += [struct.pack("<BHH", last, len(block), 65535 - len(block)), block]
    stream.append(struct.pack(">I", zlib.adler32(data)))

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"".join(stream)) + chunk(b"IEND", b"")
