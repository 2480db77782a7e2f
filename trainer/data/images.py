"""Opens an image that a record names: inside its data folder, whole, upright, 8 bits, of a usable size, or says what is wrong."""

import hashlib
import io
import re
import warnings
from pathlib import Path, PurePosixPath

import imagehash
import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from .rows import BadRow, brief, is_blank


MAX_PIXELS = 89_478_485  # beyond it Pillow warns of a decompression bomb, unless a program tells it not to
MIN_SIDE = 8  # pixels: a side of 1 or 3 is also taken for the channels by image processors
SMALL_SIDE = 128  # pixels: what a picture to look at has at least, if its file has
MAX_ASPECT_RATIO = 200  # what the image processors of the Qwen-VL families refuse
# Formats of pictures. Pillow also knows some that it hands to other programs, EPS to Ghostscript.
Image.init()
FORMATS = [
    name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000") if name in Image.OPEN
]
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
SIXTEEN_BIT_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
# Of 256. Copies of scikit-image's photographs differ by up to 18, different ones by 76 or more.
NEAR_DUPLICATE_BITS = 28
FLAT_SIDE, FLAT_CONTRAST = 64, 4.0  # pixels; grey levels, standard deviation over so small a picture
ORIENTATION = 0x0112  # EXIF


def find_image(name, folders):
    """
    The file that a record names, if it lies in one of the folders.

    Args:
        name (`str`): path relative to the first folder, or absolute.
        folders (`list[Path]`): resolved; nothing outside them is ever opened.

    Raises:
        BadRow: outside the folders, also by a link; missing; no path at all.
    """
    check_name(name)
    path = folders[0] / name.replace("\\", "/")
    try:
        resolved = path.resolve()
        if not any(resolved.is_relative_to(folder) for folder in folders):
            raise BadRow("an image outside the data folder", brief(name))
        if not resolved.is_file():
            raise BadRow("an image file that is missing", brief(name))
    except (OSError, RuntimeError) as error:  # a name that is too long, a ring of links
        raise BadRow("an image file that is missing", brief(name)) from error
    return path


def check_name(name):
    """Raises a [`BadRow`] for what is no text, or is the address of something that is no file of the source."""
    if not isinstance(name, str) or is_blank(name):
        raise BadRow("an image that is no path", brief(name))
    if "\0" in name or re.match(r"(?:[A-Za-z][\w+.-]*://|data:|file:)", name):
        raise BadRow("an image outside the data folder", brief(name))
    if re.search("[\ud800-\udfff]", name):  # half a character, which no table can store
        raise BadRow("an image file that is missing", brief(name))


def allowed_folders(folder):
    """The resolved folders that images of a data folder may lie in: itself, and the blobs that the Hub's cache links to."""
    folder = Path(folder).resolve()
    snapshots = [
        path for path in folder.parents if path.name == "snapshots" and path.parent.name.startswith("datasets--")
    ]
    return [folder, *(path.with_name("blobs") for path in snapshots)]


def check_image(stored, repair=False):
    """
    Looks at an image as a whole.

    Args:
        stored (`dict`): `bytes`, or else `path`, as `datasets.Image` stores them.
        repair (`bool`, defaults to `False`): turn an image upright and convert CMYK and 16 bits to RGB, instead of refusing it.

    Returns:
        `tuple[dict, PIL.Image.Image, str]`: what to store (`bytes` of a PNG if repaired); a picture of it in RGB, smaller
        where that is faster to decode (its `info["size"]` is the stored width and height); what was repaired, or `""`.

    Raises:
        BadRow: what is wrong, in a phrase.
    """
    lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False  # some package may have set it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its size, which is looked at, and of odd metadata
            return _check_image(stored, repair)
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def _check_image(stored, repair):
    name = PurePosixPath(stored.get("path") or "inline").name
    try:
        opened = Image.open(_source(stored), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadRow("an image of more than 89 megapixels", f"{name}: {error}") from error
    except Exception as error:  # Pillow's plugins raise many kinds
        cause = "no image" if isinstance(error, UnidentifiedImageError) else error
        raise BadRow("an image that cannot be read", f"{name}: {cause}") from error
    with opened:
        size, mode = opened.size, opened.mode
        width, height = size
        if width * height > MAX_PIXELS:
            raise BadRow("an image of more than 89 megapixels", f"{name}: {width} x {height}")
        if min(size) < MIN_SIDE:
            raise BadRow(f"an image with a side of less than {MIN_SIDE} pixels", f"{name}: {width} x {height}")
        if max(size) > MAX_ASPECT_RATIO * min(size):
            raise BadRow(f"an image more than {MAX_ASPECT_RATIO} times as long as wide", f"{name}: {width} x {height}")
        try:
            if getattr(opened, "is_animated", False) and opened.format != "MPO":  # many telephones write MPO
                raise BadRow("an image of several frames", f"{name}: {opened.n_frames} frames")
            if opened.format == "PNG":
                _check_sums(stored)
            problem = _repairable(opened)  # of a PNG, that decodes it
            if problem and not repair:
                raise BadRow(problem, f"{name}: mode {mode}; `bad_rows='repair'` mends it")
            if not problem:
                # JPEG: all of the file is read, an eighth of it computed; of a small picture more, for its hash.
                opened.draft("RGB", [max(side // 8, SMALL_SIDE) for side in size])
            picture = mended(opened) if problem else opened.convert("RGB")
        except BadRow:
            raise
        except Exception as error:
            raise BadRow("an image that is damaged or cut short", f"{name}: {error}") from error
    if problem:
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        stored, size = {"bytes": buffer.getvalue(), "path": None}, picture.size
    picture.info["size"] = size
    return stored, picture, problem


def _source(stored):
    return stored["path"] if stored.get("bytes") is None else io.BytesIO(stored["bytes"])


def _check_sums(stored):
    """Reads the checksum of every chunk of a PNG, which decoding does not do."""
    with Image.open(_source(stored), formats=["PNG"]) as again:
        again.verify()


def _repairable(image):
    if image.mode == "CMYK":
        return "an image in CMYK"
    deep = any(
        ";16" in str(tile.args) for tile in getattr(image, "tile", ())
    )  # RGB too, which Pillow brings to 8 bits
    if deep or image.mode in SIXTEEN_BIT_MODES:
        return "an image of more than 8 bits"
    if image.getexif().get(ORIENTATION, 1) in range(2, 9):
        return "an image that its EXIF data rotate"
    return ""


def mended(image):
    """An open image upright, in RGB, of 8 bits: those of 16 by their highest eight, others from least to greatest value."""
    image = ImageOps.exif_transpose(image)
    if image.mode in SIXTEEN_BIT_MODES:
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError("it has values that are no numbers")
        is_16_bit = image.mode.startswith("I") and 255 < values.max() <= 65535
        low, high = (0.0, 65535.0) if is_16_bit else (values.min(), values.max())
        scale = 255.0 / (high - low) if high > low else 0.0
        image = Image.fromarray(((values - low) * scale).round().astype(np.uint8))
    return image.convert("RGB")


def store_image(value, folders):
    """
    What a table's cell holds as an image, as `datasets.Image` stores it.

    Args:
        value (`dict`, `str`, `bytes` or `PIL.Image.Image`): the cell, undecoded.
        folders (`list[Path]`): where a path may lead, see [`find_image`].

    Raises:
        BadRow: none of these, or a path that leads nowhere.
    """
    if isinstance(value, Image.Image):
        buffer = io.BytesIO()
        try:
            value.save(buffer, format="PNG" if value.mode in PNG_MODES else "TIFF")
        except OSError as error:  # cut short, or of a mode that is not stored
            raise BadRow("an image that cannot be read", str(error)) from error
        value = buffer.getvalue()
    if isinstance(value, bytes):
        value = {"bytes": value, "path": None}
    match value:
        case {"bytes": bytes(data)}:
            return {"bytes": data, "path": None}
        case {"path": str(path)} | str(path):
            return {"bytes": None, "path": str(find_image(path, folders))}
        case None | {"path": None}:
            raise BadRow("an image that is missing")
    raise BadRow("an image that is no path", brief(value))


def is_flat(image):
    """Whether an image has so little contrast that a [`perceptual_hash`] of it is made of noise, or of nothing."""
    small = image.resize((FLAT_SIDE, FLAT_SIDE), Image.Resampling.BOX)
    return np.asarray(small, np.float32).mean(-1).std() < FLAT_CONTRAST


def perceptual_hash(image):
    """A 256-bit hash (`int`) that copies of a picture share but for a few bits, resized or recompressed as they are."""
    return int.from_bytes(np.packbits(imagehash.phash(image, hash_size=16).hash).tobytes(), "big")


def pixel_hash(image):
    """A 256-bit hash (`int`) of an image's size and pixels."""
    return int.from_bytes(hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest(), "big")


def is_near_duplicate(hash_a, hash_b):
    """Whether two [`perceptual_hash`]es are of the same picture: they differ in 28 bits at most."""
    return (hash_a ^ hash_b).bit_count() <= NEAR_DUPLICATE_BITS


def fingerprints(image):
    """
    What tells an image in RGB from others: hashes of 256 bits, which [`KnownImages`] compares.

    Returns:
        `list[int]`: one of its pixels, and a [`perceptual_hash`] unless the image shows too little for one.
    """
    return [pixel_hash(image), *([] if is_flat(image) else [perceptual_hash(image)])]


class KnownImages:
    """
    Images to be found again, as they are or as copies, by their [`fingerprints`].

    Args:
        hashes (`list[int]`): of all of them.
    """

    def __init__(self, hashes):
        data = b"".join(value.to_bytes(32, "big") for value in hashes)
        self._bits = np.frombuffer(data, np.uint64).reshape(-1, 4)

    def has(self, image):
        """Whether an image in RGB is one of them: hashes of different pixels differ in about half of their bits."""
        for value in fingerprints(image) if len(self._bits) else ():
            own = np.frombuffer(value.to_bytes(32, "big"), np.uint64)
            if np.bitwise_count(self._bits ^ own).sum(1).min() <= NEAR_DUPLICATE_BITS:
                return True
        return False
