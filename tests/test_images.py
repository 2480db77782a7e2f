"""An image is opened inside its folder alone, whole and usable or refused with a reason, and known again as a copy."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import ExifTags, Image
from skimage import data

from trainer.data.images import (
    MAX_PIXELS,
    allowed_folders,
    check_image,
    find_image,
    is_near_duplicate,
    perceptual_hash,
    store_image,
)
from trainer.data.rows import BadRow


pytestmark = pytest.mark.any_release
# Its last 40 bytes; can go when gradio, and with it constraints.txt, takes Pillow 13.
reads_ycbcr = pytest.mark.skipif(PIL.__version__ < "13", reason="Pillow 12 misses bytes of the YCbCr TIFF it wrote")


def encoded(image, format="PNG", **settings):
    buffer = io.BytesIO()
    image.save(buffer, format=format, **settings)
    return buffer.getvalue()


def inline(image, format="PNG", **settings):
    return {"bytes": encoded(image, format, **settings), "path": None}


def gradient(mode="RGB", size=(64, 40)):
    return Image.linear_gradient("L").resize(size).convert(mode)


def noise(size=(200, 120)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8))


# ---------------------------------------------------------------------------------------------------------------------
# Where an image may lie
# ---------------------------------------------------------------------------------------------------------------------


def test_a_path_may_be_relative_or_absolute_and_lead_through_links_inside_the_folders(tmp_path):
    root, blobs = tmp_path / "root", tmp_path / "blobs"
    for folder in (root / "a", blobs):
        folder.mkdir(parents=True)
        gradient().save(folder / "x.png")
    (root / "inside.png").symlink_to("a/x.png")
    (root / "blob.png").symlink_to(blobs / "x.png")
    folders = [root.resolve(), blobs.resolve()]
    for name in ("a/x.png", "a\\x.png", "./a/../a/x.png", str(root / "a" / "x.png"), "inside.png", "blob.png"):
        assert find_image(name, folders).is_file()
    with pytest.raises(BadRow, match="outside"):
        find_image("blob.png", folders[:1])


@pytest.mark.parametrize("name", [None, 7, b"a/x.png", ["a/x.png"], "", " \t", "\u200b"], ids=repr)
def test_what_is_no_path_is_said_to_be_none(name, tmp_path):
    with pytest.raises(BadRow) as raised:
        find_image(name, [tmp_path])
    assert raised.value.reason == "an image that is no path"


def test_the_hubs_cache_may_link_from_a_snapshot_to_its_blobs_alone(tmp_path):
    snapshot = tmp_path / "datasets--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "datasets--a--b" / "blobs"
    for folder in (snapshot / "train", blobs, tmp_path / "datasets--a--c" / "blobs"):
        folder.mkdir(parents=True)
        gradient().save(folder / "x.png")
    (snapshot / "own.png").symlink_to(blobs / "x.png")
    (snapshot / "other.png").symlink_to(tmp_path / "datasets--a--c" / "blobs" / "x.png")
    for folder, name in ((snapshot, "own.png"), (snapshot / "train", "../own.png")):
        folders = allowed_folders(folder)
        assert folders == [folder.resolve(), blobs.resolve()]
        assert find_image(name, folders).is_file()
    with pytest.raises(BadRow, match="outside"):
        find_image("other.png", allowed_folders(snapshot))
    assert allowed_folders(tmp_path) == [tmp_path.resolve()]


# ---------------------------------------------------------------------------------------------------------------------
# What an image must be
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "format"),
    [
        ("RGB", "PNG"),
        ("RGB", "JPEG"),
        ("L", "JPEG"),
        ("L", "PNG"),
        ("1", "PNG"),
        ("P", "GIF"),
        ("P", "PNG"),
        ("LA", "PNG"),
        ("RGBA", "PNG"),
        ("RGBA", "WEBP"),
        ("RGB", "BMP"),
        ("RGB", "TIFF"),
        pytest.param("YCbCr", "TIFF", marks=reads_ycbcr),
        ("RGB", "PPM"),
    ],
)
def test_a_usable_image_is_stored_as_it_is_and_looked_at_in_rgb(mode, format):
    stored = inline(gradient(mode), format)
    kept, picture, problem = check_image(stored, repair=True)
    assert kept is stored and not problem
    assert picture.mode == "RGB" and picture.size == picture.info["size"] == (64, 40)


def test_a_file_is_looked_at_where_it_lies(tmp_path):
    noise().save(tmp_path / "x.jpg")
    stored = {"bytes": None, "path": str(tmp_path / "x.jpg")}
    assert check_image(stored)[0] is stored


def test_a_large_jpeg_is_looked_at_small_and_knows_its_size():
    _, picture, _ = check_image(inline(gradient(size=(2048, 1200)), "JPEG"))
    assert picture.size == (256, 150) and picture.info["size"] == (2048, 1200)


@pytest.mark.parametrize("removed", [1, 2, 3, 50, 2000, 0.5])
def test_a_jpeg_cut_short_anywhere_is_refused(removed):
    whole = encoded(noise(), "JPEG")
    removed = int(removed * len(whole)) if removed < 1 else removed
    for repair in (False, True):
        with pytest.raises(BadRow) as raised:
            check_image({"bytes": whole[:-removed], "path": "folder/name.jpg"}, repair)
        assert raised.value.reason == "an image that is damaged or cut short"
        assert raised.value.detail.startswith("name.jpg: ")


@pytest.mark.parametrize("place", ["header", "pixels", "checksum of pixels"])
def test_a_png_with_a_wrong_bit_is_refused(place):
    whole = bytearray(encoded(noise((60, 40))))
    whole[{"header": 17, "pixels": len(whole) // 2, "checksum of pixels": len(whole) - 13}[place]] ^= 1
    with pytest.raises(BadRow, match="damaged or cut short|cannot be read"):
        check_image({"bytes": bytes(whole), "path": None})


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((1, 1), "an image with a side of less than 8 pixels"),
        ((7, 100), "an image with a side of less than 8 pixels"),
        ((8, 1601), "an image more than 200 times as long as wide"),
        ((9459, 9460), "an image of more than 89 megapixels"),
    ],
)
def test_sizes_that_no_processor_takes_are_refused(size, reason):
    with pytest.raises(BadRow) as raised:
        check_image(inline(Image.new("1", size)), repair=True)
    assert raised.value.reason == reason and f"{size[0]} x {size[1]}" in raised.value.detail


def test_sizes_at_the_limits_are_taken():
    assert 8 * 1600 < 9459 * 9459 < MAX_PIXELS
    for size in ((8, 8), (8, 1600), (1600, 8)):
        assert check_image(inline(Image.new("1", size)))[1].info["size"] == size


def test_an_animation_is_refused_and_a_telephones_second_picture_is_not():
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "green", "blue")]
    for format in ("GIF", "PNG", "WEBP", "TIFF"):
        with pytest.raises(BadRow, match="several frames"):
            check_image(inline(frames[0], format, save_all=True, append_images=frames[1:]))
    _, picture, problem = check_image(inline(frames[0], "MPO", save_all=True, append_images=frames[1:]))
    assert not problem and picture.getpixel((3, 3))[0] > 200


def rotated(orientation, format):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return inline(gradient(), format, exif=exif)


MENDED = {
    "CMYK": (inline(gradient("CMYK"), "JPEG"), "an image in CMYK", (64, 40)),
    "16 bits": (inline(gradient("I;16")), "an image of more than 8 bits", (64, 40)),
    "16 bits in a TIFF": (inline(gradient("I;16"), "TIFF"), "an image of more than 8 bits", (64, 40)),
    "32 bits": (inline(gradient("I"), "TIFF"), "an image of more than 8 bits", (64, 40)),
    "floating point": (inline(gradient("F"), "TIFF"), "an image of more than 8 bits", (64, 40)),
    "lying": (rotated(6, "JPEG"), "an image that its EXIF data rotate", (40, 64)),
    "lying PNG": (rotated(8, "PNG"), "an image that its EXIF data rotate", (40, 64)),
    "upside down": (rotated(3, "WEBP"), "an image that its EXIF data rotate", (64, 40)),
}


@pytest.mark.parametrize("name", MENDED)
def test_what_can_be_mended_is_refused_or_mended(name):
    stored, reason, size = MENDED[name]
    with pytest.raises(BadRow) as raised:
        check_image(stored)
    assert raised.value.reason == reason and "`bad_rows='repair'`" in raised.value.detail
    kept, picture, problem = check_image(stored, repair=True)
    assert problem == reason and picture.size == picture.info["size"] == size
    with Image.open(io.BytesIO(kept["bytes"])) as again:
        assert again.format == "PNG" and again.mode == "RGB" and again.size == size
        assert ExifTags.Base.Orientation not in again.getexif()
    assert check_image(kept)[2] == ""
    upright = {"lying": Image.Transpose.ROTATE_270, "lying PNG": Image.Transpose.ROTATE_90, "upside down": 3}
    expected = gradient().transpose(Image.Transpose(upright[name])) if name in upright else gradient()
    assert np.abs(np.asarray(picture, float) - np.asarray(expected, float)).mean() < 8


def test_sixteen_bits_keep_their_scale():
    values = np.array([[0, 16384, 32768, 65535]] * 8, np.uint16).repeat(4, 1)
    _, picture, _ = check_image(inline(Image.fromarray(values)), repair=True)
    assert [picture.getpixel((4 * i, 0))[0] for i in range(4)] == [0, 64, 128, 255]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_not_mended(value):
    values = np.full((20, 20), 0.5, np.float32)
    values[3, 4] = value
    with pytest.raises(BadRow, match="damaged"):
        check_image(inline(Image.fromarray(values), "TIFF"), repair=True)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"words",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
        b"GIF89a",
        b"RIFF\0\0\0\0WEBP",
        b"II*\0\xff\xff\xff\xff",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n",
        b"<svg xmlns='http://www.w3.org/2000/svg' width='20' height='20'/>",
        b"%PDF-1.4",
    ],
    ids=lambda content: repr(content[:12]),
)
def test_what_is_no_picture_is_refused(content):
    for repair in (False, True):
        with pytest.raises(BadRow) as raised:
            check_image({"bytes": content, "path": None}, repair)
        assert raised.value.reason in ("an image that cannot be read", "an image that is damaged or cut short")


def test_no_damage_to_a_file_raises_anything_else():
    generator = np.random.default_rng(0)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for format in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"):
        whole = encoded(gradient(size=(24, 20)), format, **({} if format in ("GIF", "BMP", "PPM") else {"exif": exif}))
        for _ in range(60):
            broken = bytearray(whole)
            for place in generator.integers(0, min(len(whole), 200), 4):
                broken[place] = generator.integers(256)
            broken = bytes(broken[: generator.integers(len(whole) // 2, len(whole) + 1)])
            try:
                check_image({"bytes": broken, "path": None}, repair=True)
            except BadRow as error:
                assert error.reason.startswith("an image")


# ---------------------------------------------------------------------------------------------------------------------
# What a table's cell holds
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode",
    ["RGB", "L", "1", "P", "RGBA", "LA", "I;16", "CMYK", "F", "I", pytest.param("YCbCr", marks=reads_ycbcr)],
)
def test_a_decoded_image_is_stored_in_its_own_mode(mode):
    stored = store_image(gradient(mode), [])
    with Image.open(io.BytesIO(stored["bytes"])) as again:
        assert again.mode == mode and stored["path"] is None


def test_bytes_are_taken_as_they_are_and_their_name_is_not(tmp_path):
    content = encoded(gradient())
    for value in (content, {"bytes": content, "path": "/etc/passwd"}, {"bytes": content}):
        assert store_image(value, [tmp_path]) == {"bytes": content, "path": None}


def test_paths_are_looked_for_in_the_folders(tmp_path):
    gradient().save(tmp_path / "x.png")
    for value in ("x.png", {"path": "x.png"}, {"bytes": None, "path": "x.png"}):
        assert store_image(value, [tmp_path.resolve()]) == {"bytes": None, "path": str(tmp_path / "x.png")}
    for value in ("../x.png", {"bytes": None, "path": str(Path(__file__))}):
        with pytest.raises(BadRow, match="outside"):
            store_image(value, [tmp_path.resolve()])


@pytest.mark.parametrize("value", [7, [], {}, {"bytes": None}, {"bytes": "x"}, {"path": 7}, True, 0.5, ["x.png"]], ids=repr)  # fmt: skip
def test_what_holds_no_image_is_refused(value, tmp_path):
    with pytest.raises(BadRow, match="an image that is no path"):
        store_image(value, [tmp_path])


@pytest.mark.parametrize("value", [None, {"path": None}, {"bytes": None, "path": None}], ids=repr)
def test_nothing_is_a_missing_image(value, tmp_path):
    with pytest.raises(BadRow) as raised:
        store_image(value, [tmp_path])
    assert raised.value.reason == "an image that is missing"


# ---------------------------------------------------------------------------------------------------------------------
# Copies
# ---------------------------------------------------------------------------------------------------------------------


PHOTOS = ("astronaut", "brick", "chelsea", "coffee", "coins", "grass", "moon", "rocket")


def hash_of(image, format="PNG", **settings):
    """As a reader sees it."""
    return perceptual_hash(check_image(inline(image, format, **settings))[1])


def test_copies_of_photographs_are_known_and_other_photographs_are_not():
    hashes = {}
    for name in PHOTOS:
        photo = Image.fromarray(getattr(data, name)()).convert("RGB")
        photo.thumbnail((512, 512))
        half = photo.resize((photo.width // 2, photo.height // 2), Image.Resampling.LANCZOS)
        hashes[name] = own = hash_of(photo)
        assert 0 <= own < 2**256
        copies = {
            "half": hash_of(half),
            "half as a JPEG": hash_of(half, "JPEG", quality=30),
            "JPEG": hash_of(photo, "JPEG", quality=30),
            "grey": hash_of(photo.convert("L")),
            "small JPEG": hash_of(photo.resize((photo.width // 3, photo.height // 3)), "JPEG"),
        }
        for kind, copy in copies.items():
            assert is_near_duplicate(own, copy) and is_near_duplicate(copy, own), (name, kind)
    for name in PHOTOS:
        for other in PHOTOS:
            assert is_near_duplicate(hashes[name], hashes[other]) == (name == other)


def test_a_turned_or_cropped_photograph_is_another():
    photo = Image.fromarray(data.coffee())
    for other in (photo.rotate(90, expand=True), photo.crop((0, 0, 300, 200))):
        assert not is_near_duplicate(hash_of(photo), hash_of(other))


def test_the_limit_of_near_duplicates_is_in_bits():
    assert is_near_duplicate(0, 2**28 - 1) and not is_near_duplicate(0, 2**29 - 1)


def test_flat_images_have_no_structure_to_tell_them_apart():
    assert is_near_duplicate(hash_of(Image.new("RGB", (64, 64), "red")), hash_of(Image.new("RGB", (80, 40), "grey")))
    assert not is_near_duplicate(hash_of(Image.new("RGB", (64, 64), "red")), hash_of(Image.fromarray(data.coffee())))


def test_sixteen_bits_of_red_green_and_blue_are_sixteen_bits():
    row = b"\0" + bytes(64 * 6)
    header = struct.pack(">IIBBBBB", 64, 64, 16, 2, 0, 0, 0)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    data = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * 64)) + chunk(b"IEND", b"")
    )
    with pytest.raises(BadRow, match="an image of more than 8 bits"):
        check_image({"bytes": data, "path": None})
    stored, picture, problem = check_image({"bytes": data, "path": None}, repair=True)
    assert problem == "an image of more than 8 bits" and picture.getextrema() == ((0, 0),) * 3
    assert check_image(stored)[2] == ""
