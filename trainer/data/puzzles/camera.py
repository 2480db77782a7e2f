"""Looks at photographs, in arithmetic that is the same on every machine: crops, views by homography, changed light.

Coordinates are in pixels of the photograph, the upper left corner of its upper left pixel being (0, 0).
"""

import math
from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np
from PIL import Image

from .canvas import Random


BLOCK = 8  # pixels: side of the squares whose mean and texture are known beforehand
LEVELS = np.arange(256, dtype=np.int64)
MIN_PHOTO_SIDE = 64  # pixels: smaller photographs are enlarged by a whole factor
MIN_TEXTURE = 3  # grey levels from a pixel to its neighbours to the right and below, added: less is too even


class Box(NamedTuple):
    """A square of a photograph."""

    left: float
    top: float
    side: float


class Photo:
    """
    One photograph: its pixels at every halved size, and what is known of its squares.

    Args:
        name (`str`): Its name.
        image (`PIL.Image.Image`): RGB.
    """

    def __init__(self, name: str, image: Image.Image):
        pixels = np.array(image)
        factor = -(-MIN_PHOTO_SIDE // min(image.size))
        if factor > 1:
            pixels = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
        self.name = name
        self.levels = [pixels]
        self.height, self.width = pixels.shape[:2]
        self.shorter = min(self.height, self.width)

    def level(self, step: float) -> int:
        """How often to halve the photograph for a picture whose pixels are `step` of its pixels apart."""
        level = 0
        while step >= 1.5 and min(self.levels[level].shape[:2]) >= 4:
            if level + 1 == len(self.levels):
                pixels = self.levels[level]
                height, width = pixels.shape[0] // 2 * 2, pixels.shape[1] // 2 * 2
                total = pixels[:height:2, :width:2].astype(np.uint16)
                for rows, columns in ((0, 1), (1, 0), (1, 1)):
                    total += pixels[rows:height:2, columns:width:2]
                self.levels.append(((total + 2) >> 2).astype(np.uint8))
            level, step = level + 1, step / 2
        return level

    @cached_property
    def _blocks(self) -> tuple[np.ndarray, np.ndarray]:
        """Sums over squares of BLOCK x BLOCK pixels: colours (rows, columns, 3) and texture (rows, columns)."""
        pixels = self.levels[0].astype(np.int64)
        grey = pixels.sum(-1)
        slope = abs(np.diff(grey, axis=0, append=grey[-1:])) + abs(np.diff(grey, axis=1, append=grey[:, -1:]))
        rows, columns = self.height // BLOCK, self.width // BLOCK
        cut = (slice(rows * BLOCK), slice(columns * BLOCK))
        shape = (rows, BLOCK, columns, BLOCK)
        return pixels[cut].reshape(*shape, 3).sum((1, 3)), slope[cut].reshape(shape).sum((1, 3)) // 3

    def _cells(self, box: Box) -> tuple[slice, slice]:
        rows, columns = self._blocks[1].shape
        top, left = min(int(box.top) // BLOCK, rows - 1), min(int(box.left) // BLOCK, columns - 1)
        bottom, right = int(box.top + box.side) // BLOCK, int(box.left + box.side) // BLOCK
        return slice(top, max(bottom, top + 1)), slice(left, max(right, left + 1))

    def color(self, box: Box) -> list[int]:
        """Mean of each channel in a square, to a block's precision, in 0..255."""
        cells = self._blocks[0][self._cells(box)]
        return [int(value) // (cells.shape[0] * cells.shape[1] * BLOCK * BLOCK) for value in cells.sum((0, 1))]

    def texture(self, box: Box) -> int:
        """Mean change from a pixel to its neighbours in a square, to a block's precision, in grey levels."""
        cells = self._blocks[1][self._cells(box)]
        return int(cells.sum()) // (cells.size * BLOCK * BLOCK)


class Photos:
    """
    The photographs that one split may use.

    Args:
        photos (`Mapping[str, Image.Image]`): RGB photographs by name.
        held_out (`bool`, *optional*, defaults to `False`): Whether the split is that for validation.
    """

    def __init__(self, photos: Mapping[str, Image.Image], held_out: bool = False):
        self.held_out = held_out
        self.photos = [Photo(name, photos[name]) for name in sorted(photos)]
        self.too_even = 0  # puzzles whose photographs had no place with enough texture

    def search(self, rng: Random, draw, tries: int = 8, rounds: int = 4, exclude: Photo | None = None):
        """
        The cheapest of several draws from one photograph, or from the next ones where it has no texture.

        Args:
            draw: Function of a photograph that returns `((lack, rest), place)`, or `None` where nothing fits. `lack`
                is how far the texture is from enough, zero if it is enough; `rest` is what else to keep small.
            exclude (`Photo`, *optional*): Not this one.

        Returns:
            The photograph and the place.
        """
        best, chosen = None, None
        for _ in range(rounds):
            photo = rng.choice([photo for photo in self.photos if photo is not exclude])
            for _ in range(tries):
                drawn = draw(photo)
                if drawn is not None and (best is None or drawn[0] < best):
                    best, chosen = drawn[0], (photo, drawn[1])
                if best == (0, 0):
                    return chosen
            if best is not None and best[0] == 0:
                return chosen
        if best is None:
            raise AssertionError("every photograph holds a place, whatever its size")
        self.too_even += 1
        return chosen


def _bilinear(pixels: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pixels at continuous places, (height, width, 3), from coordinates that broadcast to (height, width)."""
    height, width = pixels.shape[:2]
    x = np.clip(np.floor(x * 256).astype(np.int32) - 128, 0, (width - 1) * 256 - 1)
    y = np.clip(np.floor(y * 256).astype(np.int32) - 128, 0, (height - 1) * 256 - 1)
    index = (y >> 8) * np.int32(width) + (x >> 8)
    x, y = (x & 255).astype(np.uint16)[..., None], (y & 255).astype(np.uint32)[..., None]
    flat = pixels.reshape(-1, 3)
    rest = np.uint16(256) - x
    upper = flat[index] * rest + flat[index + 1] * x
    index += np.int32(width)
    lower = flat[index] * rest + flat[index + 1] * x
    return ((upper * (np.uint32(256) - y) + lower * y + np.uint32(32768)) >> np.uint32(16)).astype(np.uint8)


def crop(photo: Photo, box: Box, size: int) -> np.ndarray:
    """A square of the photograph as a picture of `size` x `size` pixels."""
    step = box.side / size
    level = photo.level(step)
    centers = np.arange(size, dtype=np.float64) + 0.5
    x, y = ((centers * step + start) / 2**level for start in (box.left, box.top))
    return _bilinear(photo.levels[level], x[None], y[:, None])


def enlarge(pixels: np.ndarray, size: int) -> np.ndarray:
    """A square picture at `size` x `size` pixels."""
    places = (np.arange(size, dtype=np.float64) + 0.5) * pixels.shape[0] / size
    return _bilinear(pixels, places[None], places[:, None])


def warp(photo: Photo, homography: tuple[float, ...], size: int) -> np.ndarray:
    """
    The photograph seen through a homography, as a picture of `size` x `size` pixels.

    Args:
        homography (`tuple` of nine `float`): Row by row, from the picture's coordinates to the photograph's.
    """
    a, b, c, d, e, f, g, h, i = homography
    level = photo.level((abs(a) + abs(b) + abs(d) + abs(e)) / 2 / abs(i))
    centers = np.arange(size, dtype=np.float64) + 0.5
    x, y = centers[None], centers[:, None]
    depth = (g * x + h * y + i) * 2**level
    return _bilinear(photo.levels[level], (a * x + b * y + c) / depth, (d * x + e * y + f) / depth)


def project(homography: tuple[float, ...], x: float, y: float) -> tuple[float, float]:
    """Where a homography takes a point."""
    a, b, c, d, e, f, g, h, i = homography
    depth = g * x + h * y + i
    return (a * x + b * y + c) / depth, (d * x + e * y + f) / depth


def invert(homography: tuple[float, ...]) -> tuple[float, ...]:
    """The homography that takes points back, which needs no common scale."""
    a, b, c, d, e, f, g, h, i = homography
    return (
        e * i - f * h,
        c * h - b * i,
        b * f - c * e,
        f * g - d * i,
        a * i - c * g,
        c * d - a * f,
        d * h - e * g,
        b * g - a * h,
        a * e - b * d,
    )


def rotation(half_tangent: float) -> tuple[float, float]:
    """Cosine and sine of an angle from the tangent of its half, by additions, products and divisions alone."""
    square = half_tangent * half_tangent
    return (1 - square) / (1 + square), 2 * half_tangent / (1 + square)


def relight(pixels: np.ndarray, gains: list[int], offsets: list[int]) -> np.ndarray:
    """Multiplies each channel by its gain in 256ths and adds its offset in grey levels, cut off at 0 and 255."""
    changed = (pixels * np.array(gains, dtype=np.int32) >> 8) + np.array(offsets, dtype=np.int32)
    return changed.clip(0, 255).astype(np.uint8)


def means(pixels: np.ndarray) -> list[int]:
    """Mean of each channel, rounded down, in 0..255: sums of whole numbers, which may be added in any order."""
    return [int(total) * 3 // pixels.size for total in pixels.reshape(-1, 3).sum(0, dtype=np.int64)]


def add_noise(rng: Random, pixels: np.ndarray, most: int) -> np.ndarray:
    """Adds to each value of its own a whole number from `-most` to `most`, cut off at 0 and 255."""
    noise = np.frombuffer(rng.bytes(pixels.size), np.uint8).reshape(pixels.shape) % (2 * most + 1)
    return (pixels.astype(np.int16) + noise - most).clip(0, 255).astype(np.uint8)


def spreads(pixels: np.ndarray) -> list[int]:
    """Standard deviation of each channel, rounded down, in 0..127."""
    return [_moments(np.bincount(channel, minlength=256), LEVELS)[1] // 16 for channel in pixels.reshape(-1, 3).T]


def _moments(histogram: np.ndarray, values: np.ndarray) -> tuple[int, int]:
    """Mean and standard deviation of the values in sixteenths, weighted by a histogram, in whole numbers."""
    count, total = int(histogram.sum()), int((histogram * values).sum())
    square = int((histogram * values * values).sum())
    return 16 * total // count, math.isqrt(256 * (square * count - total * total) // (count * count))


def set_light(pixels: np.ndarray, target_means: list[int], target_spreads: list[int]) -> np.ndarray:
    """Changes the contrast and then the brightness of each channel until mean and standard deviation are as asked."""
    lit = np.empty_like(pixels)
    for channel, (mean, spread) in enumerate(zip(target_means, target_spreads, strict=True)):
        source = pixels[..., channel]
        histogram = np.bincount(source.ravel(), minlength=256).astype(np.int64)
        gain, offset = 256 * 16, 0  # in 4096ths and in 16ths of a grey level
        for _ in range(4):  # the later times mend what is cut off at 0 and 255
            table = ((LEVELS * gain // 16 + 16 * offset + 128) >> 8).clip(0, 255)
            now_mean, now_spread = _moments(histogram, table)
            new_gain = min(gain * 16 * spread // max(now_spread, 1), 8 * 4096)
            # Turned about the present mean, then moved to the mean asked for.
            offset += 16 * mean - now_mean - (now_mean - offset) * (new_gain - gain) // max(gain, 1)
            gain = new_gain
        table = ((LEVELS * gain // 16 + 16 * offset + 128) >> 8).clip(0, 255)
        lit[..., channel] = table.astype(np.uint8)[source]
    return lit
