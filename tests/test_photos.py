"""Tests of reading photographs and of keeping the two splits apart."""

import hashlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from trainer.data.photos import SCIKIT_IMAGE_PHOTOS, group_copies, load_photos, split_photos


pytestmark = pytest.mark.any_release


@pytest.fixture(scope="module")
def photos():
    return load_photos()


def test_scikit_images_photos_are_each_their_own_group_and_split_as_their_names(photos):
    assert group_copies(photos) == [[name] for name in sorted(SCIKIT_IMAGE_PHOTOS)]
    assert split_photos(photos) == split_photos(SCIKIT_IMAGE_PHOTOS)
    assert split_photos(photos)["held_out"] == ["astronaut.png", "chelsea.png", "coffee.png", "grass.png", "page.png"]


def write_copies(photos, folder):
    """Every photograph three times: as it is, resized, and compressed hard, under names that sort far apart."""
    for name, photo in photos.items():
        stem = name.split(".")[0]
        photo.save(folder / f"{stem}.png")
        photo.resize((photo.width * 3 // 5, photo.height * 3 // 5)).save(folder / f"a_{hash_of(stem)}.png")
        photo.save(folder / f"z_{hash_of(stem)}.jpg", quality=30)


def hash_of(stem):
    return hashlib.sha256(stem.encode()).hexdigest()[:8]


def test_copies_of_a_photo_never_meet_across_the_split(photos, tmp_path):
    write_copies(photos, tmp_path)
    read = load_photos(tmp_path)
    assert len(read) == 3 * len(photos)
    for split_seed in (0, 5):
        side_of = {name: side for side, names in split_photos(read, split_seed).items() for name in names}
        assert set(side_of) == set(read) and set(side_of.values()) == {"train", "held_out"}
        for stem in (name.split(".")[0] for name in photos):
            names = (f"{stem}.png", f"a_{hash_of(stem)}.png", f"z_{hash_of(stem)}.jpg")
            assert len({side_of[name] for name in names}) == 1
    names_only = split_photos(list(read))  # which knows nothing of copies: what the test would miss without them
    assert any(f"{name.split('.')[0]}.png" in names_only["train"] for name in photos) and any(
        (f"{stem}.png" in names_only["train"]) != (f"a_{hash_of(stem)}.png" in names_only["train"])
        for stem in (name.split(".")[0] for name in photos)
    )


def test_even_photos_are_copies_only_of_their_own_color():
    photos = {
        name: Image.new("RGB", (80, 60), color)
        for name, color in {"a": (90, 20, 30), "b": (99, 20, 40), "c": (90, 21, 30)}.items()
    }
    assert group_copies(photos) == [["a", "c"], ["b"]]


def test_whole_factors_shrink_by_exact_means(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (130, 200, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    assert load_photos(tmp_path, min_side=70)["noise.png"].size == (200, 130)
    small = np.asarray(load_photos(tmp_path, min_side=60)["noise.png"])
    total = sum(pixels[i::2, j::2].astype(int) for i in (0, 1) for j in (0, 1))
    np.testing.assert_array_equal(small, (total + 2) // 4)


def cut(photo, part):
    """The middle of a photograph, without so much of its width and height on each side."""
    width, height = photo.size
    return photo.crop((int(width * part), int(height * part), int(width * (1 - part)), int(height * (1 - part))))


@pytest.mark.parametrize(
    ("change", "least"),
    [
        (ImageOps.mirror, 17),
        (ImageOps.flip, 17),
        (lambda photo: photo.rotate(90, expand=True), 17),
        (lambda photo: photo.rotate(180), 17),
        (lambda photo: photo.rotate(270, expand=True), 17),
        (lambda photo: cut(photo, 0.03), 16),
        (lambda photo: cut(photo, 0.05), 16),
        (lambda photo: cut(photo, 0.1), 16),
    ],
)
def test_mirrored_turned_and_cropped_copies_are_found(photos, change, least):
    changed = {f"copy of {name}": change(photo) for name, photo in photos.items()}
    groups = group_copies({**photos, **changed})
    assert all(len({name.removeprefix("copy of ") for name in group}) == 1 for group in groups)
    assert sum(len(group) == 2 for group in groups) >= least


def test_photos_of_16_bits_are_read_as_they_look(photos, tmp_path):
    grey = np.asarray(photos["coins.png"].convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(np.asarray(load_photos(tmp_path)["deep.png"])[..., 0], grey)


def test_hidden_files_and_what_is_no_picture_are_passed_over(photos, tmp_path):
    photos["coins.png"].save(tmp_path / "coins.png")
    for name in ("._coins.png", "notes.pdf", "clip.mpg", "data.h5", ".cache/other.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"none")
    assert list(load_photos(tmp_path)) == ["coins.png"]


def test_unusable_folders_are_refused(photos, tmp_path):
    with pytest.raises(ValueError, match="`image_dir` must be an existing folder.*nowhere"):
        load_photos(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no image"):
        load_photos(tmp_path)
    photos["coins.png"].save(tmp_path / "coins.png")
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"1 unreadable image\(s\): broken.jpg"):
        load_photos(tmp_path)


def test_the_same_file_twice_is_read_once(photos, tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("coins.png", "sub/copy.png"):
        photos["coins.png"].save(tmp_path / name)
    assert list(load_photos(tmp_path)) == ["coins.png"]
