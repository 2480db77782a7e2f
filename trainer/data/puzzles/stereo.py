"""A check on Multi-view_Reasoning that knows nothing of how its pictures are made: a real pair of cameras.

`motorcycle_left.png` and `motorcycle_right.png` inside scikit-image's wheel are what the left and the right eye of a
stereo camera saw (Middlebury 2014, `skimage.data.stereo_motorcycle`).
"""

from importlib import resources

import numpy as np
from PIL import Image


def stereo_pair() -> tuple[np.ndarray, np.ndarray]:
    """What the left and what the right camera saw: RGB, 125 x 186 pixels."""
    folder = resources.files("skimage") / "data"
    pair = []
    for eye in ("left", "right"):
        with (folder / f"motorcycle_{eye}.png").open("rb") as file, Image.open(file) as image:
            pair.append(np.asarray(image.convert("RGB").reduce(4)))
    return tuple(pair)


def camera_motion(first: np.ndarray, second: np.ndarray) -> str:
    """
    Which way a camera moved between two pictures of a still scene: against the way that the scene moves in them.

    Args:
        first, second (`np.ndarray`): RGB, (height, width, 3), of the same size.

    Returns:
        `str`: `"left"` or `"right"`, by the shift at which what both show correlates best, of up to half the width.
    """
    first, second = (image.astype(float).mean(-1) for image in (first, second))
    width = first.shape[1]
    best = None
    for shift in range(-width // 2, width // 2 + 1):
        a, b = (first[:, max(0, -shift) : width - max(0, shift)], second[:, max(0, shift) : width - max(0, -shift)])
        alike = ((a - a.mean()) * (b - b.mean())).mean() / (a.std() * b.std() + 1e-9)
        if best is None or alike > best[0]:
            best = alike, shift
    return "left" if best[1] > 0 else "right"
