"""Reads the photographs that questions are made from, and keeps training and held-out photographs apart.

The photographs are those inside scikit-image's wheel, or every image of a folder.
"""

import hashlib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from .images import FLAT_CONTRAST, FORMATS, NEAR_DUPLICATE_BITS, mended, perceptual_hash, pixel_hash


# The real photographs in the wheel of scikit-image: no download. Left out: drawings (logo, horse, colour wheel,
# chessboards, phantom), a phase map (cell), crops of 102 pixels and less, and `motorcycle_right.png`, the other eye's
# view of the same scene, which would put one scene on both sides of the split.
SCIKIT_IMAGE_PHOTOS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "page.png",
    "retina.jpg",
    "rocket.jpg",
    "text.png",
)

MAX_PHOTO_SIDE = 256  # pixels: the shorter side of a photograph in memory
THUMBNAIL_SIDE = 8  # pixels
HASHED_SIDE = 128  # pixels: of the square from which crops and turns are hashed
CROPS = tuple(part / 50 for part in range(39, 50))  # of each side, about the middle
TURNS = tuple(Image.Transpose)  # the seven ways to mirror and turn a picture
SAME_COLOR = 3.0  # grey levels, difference of flat photographs' mean colours. JPEG at quality 10 makes 1.5 at most
HASH_BITS = 256
ROWS_AT_ONCE = 1024  # of the table of distances between all pairs of photographs


def _read_photo(path, min_side: int | None) -> Image.Image:
    with path.open("rb") as file, Image.open(file) as image:
        photo = mended(image)  # upright, and RGB of 8 bits
    shorter = min(photo.size)
    if min_side is not None:
        return photo.reduce(shorter // min_side) if shorter >= 2 * min_side else photo
    if shorter > MAX_PHOTO_SIDE:
        scale = MAX_PHOTO_SIDE / shorter
        photo = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.BOX)
    return photo


def load_photos(image_dir: str | Path | None = None, min_side: int | None = None) -> dict[str, Image.Image]:
    """
    Reads the photographs, sorted by name, and shrinks large ones.

    Args:
        image_dir (`str` or `Path`, *optional*):
            Folder whose images (subfolders included; JPEG, PNG, WebP, TIFF and such by their suffix; no hidden ones) are
            read. By default the photographs inside scikit-image's wheel are, which needs no network.
        min_side (`int`, *optional*):
            Shrink by the largest whole factor that leaves the shorter side this many pixels, which is whole-number
            arithmetic and so the same on every machine. By default shrink to a shorter side of 256 pixels exactly.

    Returns:
        `dict[str, Image.Image]`: RGB photographs by name, which is the path relative to the folder. Of files with the
        same pixels only the first stays, so that a copy under another name cannot end up on the other side of a split.

    Raises:
        ValueError: `image_dir` does not exist, is no folder, holds no image, or holds images that cannot be read.
        FileNotFoundError: The installed scikit-image lacks one of its photographs.
    """
    if image_dir is None:
        root = resources.files("skimage") / "data"
        paths = {name: root / name for name in SCIKIT_IMAGE_PHOTOS}
        missing = [name for name, path in paths.items() if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"The installed scikit-image does not ship {missing}. Install `scikit-image>=0.26`, or pass your own "
                "photographs with `image_dir`."
            )
    else:
        root = Path(image_dir)
        if not root.is_dir():
            raise ValueError(f"`image_dir` must be an existing folder of images, but got '{image_dir}'.")
        suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
        paths = {}
        for path in sorted(root.rglob("*")):
            name = path.relative_to(root)
            hidden = any(part.startswith(".") for part in name.parts)  # "._photo.jpg", which macOS leaves behind
            if path.suffix.lower() in suffixes and path.is_file() and not hidden:
                paths[name.as_posix()] = path
        if not paths:
            raise ValueError(f"`image_dir` '{image_dir}' holds no image. Put photographs (.jpg, .png, ...) into it.")

    photos, unreadable, seen = {}, [], set()
    for name, path in paths.items():
        try:
            photo = _read_photo(path, min_side)
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            unreadable.append(f"{name} ({error})")
            continue
        digest = pixel_hash(photo)
        if digest not in seen:
            seen.add(digest)
            photos[name] = photo
    if unreadable:
        more = f" and {len(unreadable) - 5} more" if len(unreadable) > 5 else ""
        raise ValueError(
            f"`image_dir` '{image_dir}' holds {len(unreadable)} unreadable image(s): {'; '.join(unreadable[:5])}{more}. "
            "Repair or remove them."
        )
    return photos


def _hashes(photo: Image.Image) -> list[list[int]]:
    """Perceptual hashes, as lists of bytes, of a photograph, of its turned and mirrored copies, and of its middle."""
    square = photo.resize((HASHED_SIDE, HASHED_SIDE), Image.Resampling.BOX)
    looks = [photo, *(square.transpose(turn) for turn in TURNS)]
    for part in CROPS:
        rest = (1 - part) / 2
        box = (photo.width * rest, photo.height * rest, photo.width * (1 - rest), photo.height * (1 - rest))
        looks.append(photo.resize((HASHED_SIDE, HASHED_SIDE), Image.Resampling.BOX, box=box))
    return [list(perceptual_hash(look).to_bytes(HASH_BITS // 8, "big")) for look in looks]


def group_copies(photos: Mapping[str, Image.Image]) -> list[list[str]]:
    """
    Groups the names of photographs that show the same picture, resized, recompressed, mirrored, turned or cropped.

    Two photographs are copies when their perceptual hashes differ in few bits, see [`is_near_duplicate`], or those of
    one and of the other mirrored, turned by a right angle, or cropped about its middle by up to a fifth of its sides;
    of two photographs without contrast, whose hashes are made of noise, when also their colours agree. Copies of copies
    are in the same group.

    Args:
        photos (`Mapping[str, Image.Image]`):
            Photographs by name.

    Returns:
        `list[list[str]]`: Sorted groups of sorted names; a photograph without copies is a group of its own.
    """
    names = sorted(photos)
    hashes = np.array([_hashes(photos[name]) for name in names], np.uint8)  # (N, ways to look at one, bytes)
    signs = np.unpackbits(hashes, axis=2).astype(np.float32) * 2 - 1  # +1, -1: bits that agree less bits that do not
    thumbnails = [
        np.asarray(photos[name].resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX), np.float32)
        for name in names
    ]
    flat = [thumbnail.mean(-1).std() < FLAT_CONTRAST for thumbnail in thumbnails]
    colors = [thumbnail.mean((0, 1)) for thumbnail in thumbnails]

    leader = list(range(len(names)))  # of each photograph's group, by a path of ever smaller numbers

    def find(index: int) -> int:
        while leader[index] != index:
            index = leader[index]
        return index

    for start in range(0, len(names), ROWS_AT_ONCE):
        rows = signs[start : start + ROWS_AT_ONCE, 0]
        for way in range(signs.shape[1]):
            distances = (HASH_BITS - rows @ signs[:, way].T) / 2  # whole numbers: exact in float32
            for row, column in np.argwhere(distances <= NEAR_DUPLICATE_BITS).tolist():
                a, b = start + row, column
                if flat[a] and flat[b] and np.abs(colors[a] - colors[b]).mean() > SAME_COLOR:
                    continue
                a, b = find(a), find(b)
                leader[max(a, b)] = min(a, b)
    groups = {}
    for index, name in enumerate(names):
        groups.setdefault(find(index), []).append(name)
    return sorted(groups.values())


def split_photos(photos: Mapping[str, Image.Image] | Iterable[str], split_seed: int = 5) -> dict[str, list[str]]:
    """
    Deals photographs out to training and held-out rows: a fixed shuffle, of which three tenths are held out.

    Args:
        photos (`Mapping[str, Image.Image]` or `Iterable[str]`):
            Photographs by name, in any order; copies of one photograph, see [`group_copies`], go to the same side.
            Names alone are taken to be of different photographs.
        split_seed (`int`, *optional*, defaults to `5`):
            Chooses the split; the default deals scikit-image's colour and grey photographs to both sides. It is not
            the seed of the rows, which may therefore differ between the two sides.

    Returns:
        `dict[str, list[str]]`: `"train"` and `"held_out"`, both sorted and disjoint.
    """
    groups = group_copies(photos) if isinstance(photos, Mapping) else [[name] for name in set(photos)]
    shuffled = sorted(groups, key=lambda group: hashlib.sha256(f"{split_seed}/{group[0]}".encode()).digest())
    num_held_out = round(0.3 * len(shuffled))
    return {
        "train": sorted(sum(shuffled[num_held_out:], [])),
        "held_out": sorted(sum(shuffled[:num_held_out], [])),
    }
