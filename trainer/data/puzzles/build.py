"""Builds datasets of puzzles: any number of rows in BLINK's columns, the same bytes from the same seed everywhere."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from ..photos import SCIKIT_IMAGE_PHOTOS, group_copies, load_photos, split_photos
from .camera import Photos
from .canvas import Puzzle, Random, encode_png
from .drawn import iq_test, multi_hop_reasoning
from .objects import counting, object_localization, spatial_relation
from .views import jigsaw, multi_view_reasoning, visual_correspondence, visual_similarity


SPLITS = {"train": "train", "val": "held_out"}  # as BLINK calls them, and as `split_photos` does
IMAGE_SIZES = (96, 1024)  # pixels: in less the letters fill the picture; files are not compressed
MAX_IMAGES = 4
LETTERS = "ABCD"
TURNS = 4  # how often each letter comes in a block of rows: balanced in few rows, and still not told by those before


class Kind(NamedTuple):
    """A kind of puzzle: the function that makes one, and what it needs."""

    make: Callable[..., Puzzle]
    num_images: int
    num_choices: int
    num_cases: int = 1  # contents whose number is balanced too, within each letter: yes and no, left and right
    num_photos: int = 1


KINDS = {
    "Jigsaw": Kind(jigsaw, 3, 2),
    "Visual_Similarity": Kind(visual_similarity, 3, 2, num_photos=2),
    "Multi-view_Reasoning": Kind(multi_view_reasoning, 2, 2, num_cases=2),
    "Visual_Correspondence": Kind(visual_correspondence, 2, 4),
    "Counting": Kind(counting, 1, 4, num_cases=4),
    "Object_Localization": Kind(object_localization, 1, 2),
    "Spatial_Relation": Kind(spatial_relation, 1, 2, num_cases=2),
    "IQ_Test": Kind(iq_test, 1, 4, num_photos=0),
    "Multi-hop_Reasoning": Kind(multi_hop_reasoning, 1, 4),
}

FEATURES = datasets.Features(
    {
        "idx": datasets.Value("string"),
        "question": datasets.Value("string"),
        "sub_task": datasets.Value("string"),
        **{f"image_{i + 1}": datasets.Image() for i in range(MAX_IMAGES)},
        "choices": datasets.List(datasets.Value("string")),
        "answer": datasets.Value("string"),
        "prompt": datasets.Value("string"),
        "explanation": datasets.Value("string"),
    }
)


def _turn(key: str, index: int, count: int) -> tuple[int, int]:
    """
    Of `count` values the one whose turn it is, and how often it came before.

    Every block of `TURNS * count` rows has each value `TURNS` times, in an order of its own, which is long enough for
    the rows before to say little of the next.
    """
    block, position = divmod(index, TURNS * count)
    order = Random(f"{key}/{block}").shuffled(list(range(count)) * TURNS)
    value = order[position]
    return value, TURNS * block + order[:position].count(value)


def _check(kind: str, num_rows: int, split: str, seed: int, difficulty, image_size: int) -> tuple[float, float]:
    """Refuses arguments out of range; returns the least and the greatest difficulty."""
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {list(KINDS)}, but got {kind!r}.")
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {list(SPLITS)}, but got {split!r}.")
    for name, value, least in (("num_rows", num_rows, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"`{name}` must be a whole number of at least {least}, but got {value!r}.")
    low, high = IMAGE_SIZES
    if not isinstance(image_size, int) or not low <= image_size <= high:
        raise ValueError(f"`image_size` must be a whole number from {low} to {high}, but got {image_size!r}.")
    pair = difficulty if isinstance(difficulty, (tuple, list)) else (difficulty, difficulty)
    numbers = len(pair) == 2 and all(isinstance(value, (int, float)) for value in pair)
    if not numbers or not 0 <= pair[0] <= pair[1] <= 1:
        raise ValueError(
            f"`difficulty` must be a number from 0 to 1, or a pair of them in ascending order, but got {difficulty!r}."
        )
    return float(pair[0]), float(pair[1])


def read_sides(image_dir: str | Path | None = None, image_size: int = 256, split_seed: int = 5) -> dict[str, Photos]:
    """
    Reads the photographs and deals them out to the two splits, once for any number of datasets.

    Args:
        image_dir, image_size, split_seed: As in [`build_puzzles`].

    Returns:
        `dict[str, Photos]`: `"train"` and `"val"`, without a photograph in common; of copies of one only the first.

    Raises:
        ValueError: `image_dir` is unusable, see [`load_photos`].
    """
    photos = load_photos(image_dir, min_side=2 * image_size)
    sides = split_photos([group[0] for group in group_copies(photos)], split_seed)
    # The JPEGs of scikit-image stay out: what a JPEG decodes to depends on the decoder, a PNG does not.
    left_out = {name for name in SCIKIT_IMAGE_PHOTOS if not name.endswith(".png")} if image_dir is None else set()
    return {
        split: Photos({name: photos[name] for name in sides[side] if name not in left_out}, side == "held_out")
        for split, side in SPLITS.items()
    }


def generate_puzzles(
    kind: str,
    num_rows: int,
    split: str = "train",
    seed: int = 0,
    difficulty: float | tuple[float, float] = 0.5,
    image_size: int = 256,
    image_dir: str | Path | None = None,
    split_seed: int = 5,
    sides: dict[str, Photos] | None = None,
) -> Iterator[dict[str, Any]]:
    """
    Makes puzzles one after another, for more rows than fit in memory; see [`build_puzzles`].

    Arguments are checked and photographs read by the call itself, before the first row is asked for.

    Args:
        kind, num_rows, split, seed, difficulty, image_size, image_dir, split_seed, sides: As in [`build_puzzles`].

    Returns:
        `Iterator[dict]`: Rows in BLINK's columns; an image is a `dict` of `bytes` and `path`, as `datasets` stores it.

    Raises:
        ValueError: As [`build_puzzles`].
    """
    low, high = _check(kind, num_rows, split, seed, difficulty, image_size)
    if KINDS[kind].num_photos == 0:
        sides = {split: Photos({}, SPLITS[split] == "held_out")}
    elif sides is None:
        sides = read_sides(image_dir, image_size, split_seed)
    needed, found = KINDS[kind].num_photos, len(sides[split].photos)
    if found < needed:
        raise ValueError(
            f"`kind` {kind!r} needs at least {needed} different photograph(s) for `split` {split!r}, but `image_dir` "
            f"leaves {found}, copies counted once. Add photographs to it."
        )
    return _rows(kind, num_rows, split, seed, low, high, image_size, sides[split])


def _rows(
    kind: str, num_rows: int, split: str, seed: int, low: float, high: float, image_size: int, photos: Photos
) -> Iterator[dict[str, Any]]:
    make, num_images, num_choices, num_cases, _ = KINDS[kind]
    too_even = photos.too_even
    for index in range(num_rows):
        key = f"{seed}/{split}/{kind}"
        answer, count = _turn(f"{key}/letter", index, num_choices)
        case, _ = _turn(f"{key}/case/{answer}", count, num_cases)
        rng = Random(f"{key}/row/{index}")
        difficulty = rng.uniform(low, high)
        puzzle = make(rng, photos, image_size, difficulty, answer, case)
        options = "\n".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, puzzle.choices))
        images = [{"bytes": encode_png(image), "path": None} for image in puzzle.images]
        names = ", ".join(puzzle.photos) or "none"
        yield {
            "idx": f"{split}_{kind}_{index + 1}",
            "question": puzzle.question,
            "sub_task": kind,
            **{f"image_{i + 1}": images[i] if i < num_images else None for i in range(MAX_IMAGES)},
            "choices": puzzle.choices,
            "answer": f"({LETTERS[answer]})",
            "prompt": f"{puzzle.question} Select from the following choices.\n{options}",
            "explanation": f"{puzzle.explanation} [difficulty {difficulty:.2f}; photos: {names}]",
        }
    too_even = photos.too_even - too_even
    if too_even:
        warnings.warn(
            f"{too_even} place(s) in {num_rows} rows of {kind} come from photographs too even to hold on to: they "
            "may have no answer that an eye can find. Take such photographs out of `image_dir`.",
            stacklevel=2,
        )


def build_puzzles(
    kind: str,
    num_rows: int,
    split: str = "train",
    seed: int = 0,
    difficulty: float | tuple[float, float] = 0.5,
    image_size: int = 256,
    image_dir: str | Path | None = None,
    split_seed: int = 5,
    sides: dict[str, Photos] | None = None,
) -> datasets.Dataset:
    """
    Builds labelled questions about photographs in the columns of BLINK (arXiv 2404.12390).

    The kinds, and what difficulty 0 and 1 mean:

    - `Jigsaw`: which piece of the same photograph fills the black corner. The wrong one lies 2 to 0.4 sides of a piece
      away from the right one.
    - `Visual_Similarity`: which image shows the place of the first. Its two views lie 0.1 to 0.75 of a side apart, and
      size, light and sharpness differ more and more. The other image has about as fine a texture.
    - `Multi-view_Reasoning`: whether the camera moved left or right. The scene moves by 0.26 to 0.08 of the width.
    - `Visual_Correspondence`: which point is the marked one. Others are at least 0.22 to 0.11 of the width away, in
      views that differ more and more.
    - `Counting`: how many objects have one shape, of 8 to 20 objects.
    - `Object_Localization`: which box fits a sticker. The other overlaps it by 0.2 to 0.7 (intersection over union).
    - `Spatial_Relation`: whether one object lies on a side of another, which is 0.1 to 0.75 times as far off that
      direction as along it, among 0 to 6 other objects.
    - `IQ_Test`: which drawing continues a sequence of 1 to 3 rules. No photograph is needed.
    - `Multi-hop_Reasoning`: which letter 3 to 8 arrows lead to.

    Letters take turns, each four times in a block of rows that the seed permutes, and so do yes and no, left and right,
    and the place of the right number among the four. Which candidate is right is decided by a coin after all candidates
    are drawn, so that question, options and means of the pictures say nothing; [`text_only_accuracy`] and
    [`pixel_mean_accuracy`] measure it. Row `i` depends on seed, split, kind and `i`, and a longer dataset starts with the rows of a shorter one.

    The same arguments give the same bytes on every machine, from photographs that decode to the same pixels: PNG files
    do, as those of scikit-image that are used by default; JPEG files do with the same version of libjpeg-turbo.

    Args:
        kind (`str`):
            One of `KINDS`: a sub-task of BLINK, or `"Multi-hop_Reasoning"`, which BLINK has not.
        num_rows (`int`):
            Number of rows, at least one.
        split (`str`, *optional*, defaults to `"train"`):
            `"train"` or `"val"`: which photographs the rows are made of. No photograph, and no copy of one, is in both,
            nor are the four pictures of an `IQ_Test`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the rows, zero or more.
        difficulty (`float` or `tuple[float, float]`, *optional*, defaults to `0.5`):
            From 0 to 1; of a pair, each row draws its own between the two.
        image_size (`int`, *optional*, defaults to `256`):
            Width and height of each picture in pixels, 96 to 1024; the pieces of Jigsaw are half as wide. From 128 on
            the small shapes of hard puzzles are told apart easily.
        image_dir (`str` or `Path`, *optional*):
            Folder of the user's photographs. All are held in memory, shrunk by a whole factor to a shorter side of less
            than `4 * image_size` pixels. By default those inside scikit-image's wheel are used, without network.
        split_seed (`int`, *optional*, defaults to `5`):
            Which photographs are held out, see [`split_photos`]. Give both splits the same value.
        sides (`dict[str, Photos]`, *optional*):
            What [`read_sides`] returned, to read photographs once for many datasets. `image_dir` and `split_seed` are
            then without effect, and `image_size` should be the same.

    Returns:
        `datasets.Dataset`: columns `idx` (`val_Jigsaw_1`), `question`, `sub_task`, `image_1` to `image_4` (`None` where
        the kind has fewer), `choices`, `answer` (`(A)`), `prompt` (question and lettered options) and `explanation`,
        which says why and ends in `[difficulty 0.50; photos: coffee.png]`.

    Raises:
        ValueError: An argument is out of range, `image_dir` is unusable (see [`load_photos`]), or it holds too few
            photographs for the kind.
    """
    rows = generate_puzzles(kind, num_rows, split, seed, difficulty, image_size, image_dir, split_seed, sides)
    return datasets.Dataset.from_list(list(rows), features=FEATURES)
