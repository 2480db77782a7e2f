"""Tests of the puzzles from photographs: their bytes, their answers, and that nothing but a look gives these away."""

import hashlib
import io
import random
import re
import warnings
from collections import Counter
from importlib import resources
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from recipes.make_puzzles import PuzzleArguments
from recipes.make_puzzles import main as make_puzzles
from trainer.data import read_rows
from trainer.data.blink import training_rows
from trainer.data.photo_questions import COLORS
from trainer.data.photos import load_photos
from trainer.data.puzzles import (
    FEATURES,
    KINDS,
    build_puzzles,
    chance_bounds,
    generate_puzzles,
    pixel_mean_accuracy,
    read_sides,
    text_only_accuracy,
    views,
)
from trainer.data.puzzles.canvas import GLYPHS, PLURALS, SHAPES, Random, encode_png, shape_masks
from trainer.data.puzzles.drawn import STEPS, _arrow, _paths


SIZE = 96
LETTERS = "ABCD"
PACKAGE = Path(__file__).resolve().parents[1] / "trainer" / "data" / "puzzles"


@pytest.fixture(scope="module")
def sides():
    return read_sides(image_size=SIZE)


def build(sides, kind, num_rows, split="train", seed=1, difficulty=0.5):
    return build_puzzles(kind, num_rows, split, seed, difficulty, SIZE, sides=sides)


def digest(rows):
    """Of everything that a row holds, images by their bytes."""
    found = hashlib.sha256()
    for row in rows:
        for name in sorted(row):
            value = row[name]
            found.update(value["bytes"] if isinstance(value, dict) else repr(value).encode())
    return found.hexdigest()


def images_of(row):
    return [np.asarray(row[f"image_{i}"]) for i in range(1, 5) if row[f"image_{i}"] is not None]


def answer_of(row):
    return LETTERS.index(row["answer"][1])


# ------------------------------------------------------------------------------
# Rows
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_rows_have_blinks_columns_and_say_why(sides, kind):
    rows = build(sides, kind, 8, "val")
    assert rows.features == FEATURES and list(rows.features) == [
        *("idx", "question", "sub_task", "image_1", "image_2", "image_3", "image_4", "choices", "answer", "prompt"),
        "explanation",
    ]
    for i, row in enumerate(rows, start=1):
        assert (row["idx"], row["sub_task"]) == (f"val_{kind}_{i}", kind)
        assert len(images_of(row)) == KINDS[kind].num_images
        assert all(row[f"image_{i + 1}"] is None for i in range(KINDS[kind].num_images, 4))
        assert len(set(row["choices"])) == len(row["choices"]) == KINDS[kind].num_choices
        options = [f"({letter}) {choice}" for letter, choice in zip(LETTERS, row["choices"])]
        assert row["prompt"].split("\n") == [f"{row['question']} Select from the following choices.", *options]
        assert row["answer"] in [f"({letter})" for letter in LETTERS[: len(options)]]
        assert re.search(r"\w\. \[difficulty 0\.50; photos: (none|[\w., ]+)\]$", row["explanation"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_depends_on_its_number_alone_and_seeds_differ(sides, kind):
    rows, longer, other = (
        list(generate_puzzles(kind, num_rows, "train", seed, (0, 1), SIZE, sides=sides))
        for num_rows, seed in ((9, 3), (14, 3), (9, 4))
    )
    assert digest(rows) == digest(longer[:9]) != digest(other)
    assert all(a["image_1"] != b["image_1"] for a, b in zip(rows, other))
    assert digest(generate_puzzles(kind, 9, "val", 3, (0, 1), SIZE, sides=sides)) != digest(rows)


GOLDEN = {  # of four rows each: who changes one changes everybody's data sets
    "Jigsaw": "002be56c5cc78f74026bff8e748b35df2ec6e6f89545318846dbba8756607238",
    "Visual_Similarity": "a30ea6e718aecd3bce1f6ed40736c4ded41618d407af5eba3c8a1a9a845fe826",
    "Multi-view_Reasoning": "4b444fa4289a1535bd952976a2897c47626d7ec68d7ee3578dde9f53b6496130",
    "Visual_Correspondence": "42e8f11e690827a835dfab5c00d25c272edb880d7f2886e566e27989ae38d3ff",
    "Counting": "5029f2f90d88a2b548f9781c5a15167de350ee431c0d67f6c4d1bbc3f3b98fe4",
    "Object_Localization": "60260fd6e724761b89b2e54444b8cd78df1af350c57a0fe7958316fb29d3c440",
    "Spatial_Relation": "ca3c87b80046100700377f19da6e25513b9b55618202d2b77ee5ff58ec5bbf90",
    "IQ_Test": "53eba3614a1227eabfbfbda6cd1aa9b5791ee9fd1a02d19cd670159fef3d9bd0",
    "Multi-hop_Reasoning": "1075057fd1dd9e2143fec9df7be2a6ea5831712ae34b181cbed00e0f30e7b382",
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_are_those_of_every_other_machine(kind, sides):
    assert digest(generate_puzzles(kind, 4, "train", 7, (0, 1), SIZE, sides=sides)) == GOLDEN[kind]


def test_nothing_that_rounds_or_draws_differently_elsewhere_makes_a_pixel():
    forbidden = (
        r"ImageDraw|ImageFont|np\.random|\.transform\(|\.resize\(|np\.(sin|cos|exp|tan|dot|einsum|mean)\b| @ |hash\("
    )
    for name in ("canvas", "camera", "views", "objects", "drawn"):
        assert not re.search(forbidden, (PACKAGE / f"{name}.py").read_text()), name
    reference = random.Random(int.from_bytes(hashlib.sha256(b"a").digest(), "big"))
    assert [Random("a").random() for _ in range(1)] == [reference.random()]


def test_written_pngs_open_to_the_same_pixels():
    for height, width in ((1, 1), (96, 96), (150, 151), (300, 300)):  # in one block and in several
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        data = encode_png(pixels)
        image = Image.open(io.BytesIO(data))
        assert image.mode == "RGB" and len(data) > pixels.size
        np.testing.assert_array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("kind", KINDS)
def test_letters_and_contents_are_balanced_in_an_order_of_their_own(sides, kind):
    rows = list(generate_puzzles(kind, 48, "train", 2, 0.5, SIZE, sides=sides))
    answers = [row["answer"] for row in rows]
    assert set(Counter(answers).values()) == {48 // KINDS[kind].num_choices}
    period = KINDS[kind].num_choices
    assert len({tuple(answers[i : i + period]) for i in range(0, 48, period)}) > 1
    if kind in ("Multi-view_Reasoning", "Spatial_Relation"):
        contents = Counter((row["answer"], row["choices"][answer_of(row)]) for row in rows)
        assert set(contents.values()) == {12}
    if kind == "Counting":
        ranks = Counter(
            (row["answer"], sorted(map(int, row["choices"])).index(int(row["choices"][answer_of(row)])))
            for row in rows
        )
        assert set(ranks.values()) == {3} and len(ranks) == 16


def test_no_photo_serves_both_splits(sides):
    assert not {photo.name for photo in sides["train"].photos} & {photo.name for photo in sides["val"].photos}
    for kind in KINDS:
        used = {}
        for split in ("train", "val"):
            names = [re.search(r"photos: (.*)\]", row["explanation"])[1] for row in build(sides, kind, 24, split)]
            used[split] = {name for text in names for name in text.split(", ")} - {"none"}
            assert used[split] <= {photo.name for photo in sides[split].photos}
            assert len(used[split]) >= 3 or kind == "IQ_Test"
        assert not used["train"] & used["val"]


def test_copies_of_a_photo_are_on_one_side_and_never_puzzle_against_each_other(tmp_path):
    for name, photo in load_photos().items():
        photo.save(tmp_path / f"{name}.png")
        photo.resize((photo.width * 2 // 3, photo.height * 2 // 3)).save(tmp_path / f"copy of {name}.png")
    own = read_sides(tmp_path, SIZE)
    names = [photo.name.removeprefix("copy of ") for side in own.values() for photo in side.photos]
    assert len(names) == len(set(names)) == 17


# ------------------------------------------------------------------------------
# Controls
# ------------------------------------------------------------------------------


def test_bounds_of_chance_are_those_of_the_binomial_distribution():
    assert chance_bounds(20, 0.5) == (6 / 20, 14 / 20)  # 5 or fewer heads of 20: 2.07 percent, 6 or fewer: 5.8
    low, high = chance_bounds(1000, 0.25)
    assert low == pytest.approx(0.223, abs=2e-3) and high == pytest.approx(0.277, abs=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_is_answered_above_chance_without_looking(sides, kind):
    train, val = build(sides, kind, 160), build(sides, kind, 160, "val")
    low, high = chance_bounds(len(val), 1 / KINDS[kind].num_choices, level=0.999)
    assert low <= text_only_accuracy(train, val) <= high
    assert low <= pixel_mean_accuracy(train, val) <= high


def test_the_text_only_control_finds_planted_shortcuts(sides):
    def plant(rows, change):
        return rows.map(change, keep_in_memory=True)

    def by_letter(row):  # one word of the question tells the letter
        return {"question": f"{row['question']} {row['answer'][1] * 3}"}

    def by_rank(row):  # the right number is the largest
        best = max(row["choices"], key=int)
        return {"answer": f"({LETTERS[row['choices'].index(best)]})"}

    def by_length(row):  # the right option is the longest
        choices = list(row["choices"])
        choices[answer_of(row)] += " indeed"
        return {"choices": choices}

    for kind, change in (("Jigsaw", by_letter), ("Counting", by_rank), ("Spatial_Relation", by_length)):
        rows = build(sides, kind, 120).remove_columns(["image_1", "image_2", "image_3", "image_4"])
        train, test = plant(rows.select(range(80)), change), plant(rows.select(range(80, 120)), change)
        assert text_only_accuracy(train, test) > 0.9, kind


def test_the_pixel_probe_finds_planted_shortcuts(sides):
    def brighter(row):  # the right candidate is a little brighter
        name = f"image_{2 + answer_of(row)}"
        pixels = np.asarray(row[name]).astype(int) + 25
        return {name: Image.fromarray(pixels.clip(0, 255).astype(np.uint8))}

    def closer(row):  # the right candidate has the mean of the first image
        shift = np.asarray(row["image_1"]).mean() - np.asarray(row["image_2"]).mean()
        name = f"image_{2 + answer_of(row)}"
        pixels = np.asarray(row[name]).astype(float) + shift
        return {name: Image.fromarray(pixels.clip(0, 255).astype(np.uint8))}

    rows = build(sides, "Visual_Similarity", 240)
    for change in (brighter, closer):
        planted = rows.map(change, keep_in_memory=True)
        assert pixel_mean_accuracy(planted.select(range(160)), planted.select(range(160, 240))) > 0.75, change


def test_every_shape_has_as_many_pixels_and_as_many_edge_pixels():
    for side in range(10, 61):
        counts = {tuple(int(mask.sum()) for mask in shape_masks(shape, side)) for shape in SHAPES}
        assert len(counts) == 1, (side, counts)


def test_the_nearest_letter_is_the_right_one_no_more_often_than_another():
    for hops, grid in ((3, 5), (5, 6)):
        hits = 0.0
        for i in range(600):
            paths, asked = _paths(Random(f"{i}"), hops, grid)
            start = paths[asked][0]
            distances = [abs(path[-1][0] - start[0]) + abs(path[-1][1] - start[1]) for path in paths]
            nearest = [j for j, distance in enumerate(distances) if distance == min(distances)]
            hits += (asked in nearest) / len(nearest)
        low, high = chance_bounds(600, 0.25, level=0.999)
        assert low <= hits / 600 <= high


# ------------------------------------------------------------------------------
# The answer is in the image
# ------------------------------------------------------------------------------


def test_the_missing_piece_continues_the_image(sides):
    hits = 0
    rows = build(sides, "Jigsaw", 60, difficulty=0.0)
    for row in rows:
        frame, *pieces = (image.astype(int) for image in images_of(row))
        half = SIZE // 2
        assert (frame[half:, half:] == 0).all() and pieces[0].shape == pieces[1].shape == (half, half, 3)
        seams = [
            abs(piece[0] - frame[half - 1, half:]).mean() + abs(piece[:, 0] - frame[half:, half - 1]).mean()
            for piece in pieces
        ]
        hits += int(np.argmin(seams)) == answer_of(row)
    assert hits >= 54


def camera_direction(first, second):
    """Which way the camera moved: against the way that the scene moves, found by matching columns of pixels."""
    first, second = (image.astype(float).mean(-1) for image in (first, second))
    width = first.shape[1]
    best = None
    for shift in range(-width // 2, width // 2 + 1):
        a, b = (first[:, max(0, -shift) : width - max(0, shift)], second[:, max(0, shift) : width - max(0, -shift)])
        error = ((a - a.mean()) * (b - b.mean())).mean() / (a.std() * b.std() + 1e-9)
        if best is None or error > best[0]:
            best = error, shift
    return "left" if best[1] > 0 else "right"


def test_the_camera_moves_as_it_does_in_a_real_stereo_pair(sides):
    folder = resources.files("skimage") / "data"
    left, right = (
        np.asarray(Image.open(folder / f"motorcycle_{eye}.png").convert("RGB").reduce(4)) for eye in ("left", "right")
    )
    assert camera_direction(left, right) == "right" and camera_direction(right, left) == "left"
    rows = build(sides, "Multi-view_Reasoning", 60, difficulty=0.1)
    hits = sum(camera_direction(*images_of(row)) == row["choices"][answer_of(row)] for row in rows)
    assert hits >= 54


@pytest.fixture
def unmarked(monkeypatch):
    """Leaves the rings out of Visual_Correspondence and notes where they would be: REF, then A to D, for each row."""
    marks = []
    monkeypatch.setattr(views, "_mark", lambda canvas, points, labels: marks.append(dict(zip(labels, points))))
    return marks


def test_the_marked_point_looks_like_the_right_one(sides, unmarked):
    hits, reach = 0, SIZE // 12
    rows = build(sides, "Visual_Correspondence", 60, difficulty=0.0)
    for row, (reference,), points in zip(rows, (m.values() for m in unmarked[::2]), unmarked[1::2], strict=True):
        first, second = (image.astype(float).mean(-1) for image in images_of(row))

        def patch(image, point):
            x, y = (min(max(int(value), reach), SIZE - reach) for value in point)
            cut = image[y - reach : y + reach, x - reach : x + reach]
            return (cut - cut.mean()) / (cut.std() + 1e-9)

        assert all(0 < value < SIZE for point in (reference, *points.values()) for value in point)
        scores = [(patch(first, reference) * patch(second, points[letter])).mean() for letter in LETTERS]
        hits += int(np.argmax(scores)) == answer_of(row)
    assert hits >= 54


def test_the_place_of_the_mark_does_not_tell_the_point(sides, unmarked):
    hits = 0
    rows = list(generate_puzzles("Visual_Correspondence", 400, "train", 9, 0.3, SIZE, sides=sides))
    for row, (reference,), points in zip(rows, (m.values() for m in unmarked[::2]), unmarked[1::2], strict=True):
        distances = [(points[name][0] - reference[0]) ** 2 + (points[name][1] - reference[1]) ** 2 for name in LETTERS]
        hits += int(np.argmin(distances)) == answer_of(row)
    low, high = chance_bounds(400, 0.25, level=0.999)
    assert low <= hits / 400 <= high, hits


def grid_of(hops):
    return 5 if hops <= 3 else 6 if hops <= 5 else 7 if hops <= 7 else 8


def test_following_the_arrows_in_the_image_gives_the_letter(sides):
    rows = list(build(sides, "Multi-hop_Reasoning", 30, difficulty=(0, 1)))
    assert len({row["answer"] for row in rows}) == 4
    for row in rows:
        (image,) = images_of(row)
        hops = int(re.search(r"after (\d+) steps", row["explanation"])[1])
        grid = grid_of(hops)
        cell = SIZE // grid
        border = (SIZE - grid * cell) // 2

        def window(row_index, column, image=image, cell=cell, border=border):
            top, left = border + row_index * cell, border + column * cell
            return image[top : top + cell, left : left + cell]

        reds = {place: int((window(*place) == (255, 40, 40)).all(-1).sum()) for place in np.ndindex(grid, grid)}
        place, looks = max(reds, key=reds.get), 0
        while True:
            pixels = window(*place)
            white = (pixels == 255).all(-1)
            matches = [name for name in STEPS if white[_arrow(name, cell)[0]].all()]
            if len(matches) != 1:
                break
            place = (place[0] + STEPS[matches[0]][0], place[1] + STEPS[matches[0]][1])
            looks += 1
        assert looks == hops
        rows_of_letter = [sum(1 << (4 - k) for k in range(5) if bits[k]) for bits in glyph_at(white)]
        letter = next(name for name, glyph in GLYPHS.items() if list(glyph) == rows_of_letter)
        assert f"({letter})" == row["answer"]


def glyph_at(white):
    """The five by seven pixels of the only letter in a cell."""
    ys, xs = np.nonzero(white)
    return white[ys.min() : ys.min() + 7, xs.min() : xs.min() + 5]


def shapes_in(image, side):
    """(shape, color, (x, y)) of every pasted object, by its exact colour and its pixels inside the edge."""
    templates = {}
    for shape in SHAPES:
        body, edge = shape_masks(shape, side)
        inner = body & ~edge
        ys, xs = np.nonzero(inner)
        templates[shape] = inner[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1], xs.min(), ys.min()
    found = []
    for color, rgb in COLORS.items():
        labels, _ = ndimage.label((image == rgb).all(-1))
        for label, box in enumerate(ndimage.find_objects(labels), start=1):
            mask = labels[box] == label
            for shape, (template, left, top) in templates.items():
                if mask.shape == template.shape and (mask == template).all():
                    found.append((shape, color, (box[1].start - left, box[0].start - top)))
    return found


def test_counting_the_shapes_gives_the_number():
    for row in build_puzzles("Counting", 24, "val", seed=5, difficulty=0.5, image_size=160):
        (image,) = images_of(row)
        cell = 160 // 5
        asked = next(shape for shape in SHAPES if f"many {PLURALS[shape]} " in row["question"])
        counts = Counter(shape for shape, _, _ in shapes_in(image, cell * 9 // 10))
        assert sum(counts.values()) == 14
        assert str(counts[asked]) == row["choices"][answer_of(row)]


def test_looking_at_the_two_objects_gives_the_relation():
    for row in build_puzzles("Spatial_Relation", 24, "val", seed=5, difficulty=0.7, image_size=160):
        (image,) = images_of(row)
        places = {f"{color} {shape}": place for shape, color, place in shapes_in(image, 160 * 15 // 100)}
        first, words, second = re.match(
            r"Is the (\w+ \w+) (to the left of|to the right of|above|below) the (\w+ \w+)\?", row["question"]
        ).groups()
        (x, y), (a, b) = places[first], places[second]
        holds = {"to the left of": x < a, "to the right of": x > a, "above": y < b, "below": y > b}[words]
        assert row["choices"][answer_of(row)] == ("yes" if holds else "no")


# ------------------------------------------------------------------------------
# Difficulty, refusals, the command
# ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "pattern", "rising"),
    [
        ("Jigsaw", r"([\d.]+) times a piece", False),
        ("Visual_Similarity", r"([\d.]+) times an image", True),
        ("Multi-view_Reasoning", r"about ([\d.]+)%", False),
        ("Visual_Correspondence", r"is ([\d.]+) of the image", False),
        ("Counting", r"Of the (\d+) pasted", True),
        ("Object_Localization", r"union of ([\d.]+)\.", True),
        ("Multi-hop_Reasoning", r"after (\d+) steps", True),
    ],
)
def test_difficulty_changes_what_it_says(sides, kind, pattern, rising):
    means = []
    for difficulty in (0.0, 0.25, 0.5, 0.75, 1.0):
        rows = build(sides, kind, 24, difficulty=difficulty)
        means.append(np.mean([float(re.search(pattern, text)[1]) for text in rows["explanation"]]))
    steps = np.diff(means)
    assert (steps > 0).all() if rising else (steps < 0).all()


def test_a_pair_of_difficulties_is_a_range(sides):
    rows = build(sides, "Counting", 40, difficulty=(0.2, 0.4))
    values = [float(re.search(r"difficulty ([\d.]+)", text)[1]) for text in rows["explanation"]]
    assert 0.2 <= min(values) < 0.25 and 0.35 < max(values) <= 0.4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "Poetry"}, "`kind` must be one of .*'Poetry'"),
        ({"split": "test"}, "`split` must be one of .*'test'"),
        ({"num_rows": 0}, "`num_rows` must be a whole number of at least 1, but got 0"),
        ({"seed": -1}, "`seed` must be a whole number of at least 0, but got -1"),
        ({"difficulty": 1.5}, "`difficulty` must be a number from 0 to 1.*1.5"),
        ({"difficulty": (0.8, 0.2)}, "`difficulty` must be .* ascending order"),
        ({"difficulty": float("nan")}, "`difficulty` must be a number from 0 to 1.*nan"),
        ({"image_size": 95}, "`image_size` must be a whole number from 96 to 1024, but got 95"),
        ({"image_size": 2000}, "`image_size` must be .* but got 2000"),
        ({"image_dir": "nowhere"}, "`image_dir` must be an existing folder.*nowhere"),
    ],
)
def test_arguments_out_of_range_are_refused_before_the_first_row(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate_puzzles(**{"kind": "Jigsaw", "num_rows": 4, **arguments})


def write_noise(folder, count, size=(120, 90)):
    for i in range(count):
        coarse = np.random.default_rng(i).integers(0, 256, (size[1] // 6, size[0] // 6, 3), dtype=np.uint8)
        Image.fromarray(coarse.repeat(6, 0).repeat(6, 1)).save(folder / f"photo{i}.png")


def test_too_few_photos_are_refused_and_enough_of_any_size_serve(tmp_path):
    write_noise(tmp_path, 3)
    with pytest.raises(ValueError, match="'Visual_Similarity' needs at least 2 .* leaves {'train': 2, 'val': 1}"):
        generate_puzzles("Visual_Similarity", 4, image_dir=tmp_path)
    write_noise(tmp_path, 7)
    for kind in KINDS:
        assert len(build_puzzles(kind, 4, "val", image_size=128, image_dir=tmp_path)) == 4
    for size in ((40, 400), (500, 60), (18, 12)):
        folder = tmp_path / f"{size}"
        folder.mkdir()
        write_noise(folder, 7, size)
        for kind in KINDS:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert len(build_puzzles(kind, 2, "train", image_size=96, image_dir=folder)) == 2


def test_photos_without_any_structure_are_warned_of(tmp_path):
    for i in range(7):
        Image.new("RGB", (200, 150), (30 * i, 255 - 30 * i, 40)).save(tmp_path / f"{i}.png")
    with pytest.warns(UserWarning, match="6 place.s. in 6 rows of Jigsaw come from photographs too even"):
        build_puzzles("Jigsaw", 6, image_size=96, image_dir=tmp_path)


def test_the_command_writes_what_load_dataset_reads(tmp_path, capsys):
    arguments = PuzzleArguments(
        output_dir=str(tmp_path / "out"), kinds=["Jigsaw", "IQ_Test"], num_rows=12, num_val_rows=8, image_size=96
    )
    make_puzzles(arguments)
    for kind in arguments.kinds:
        rows = datasets.load_dataset(str(tmp_path / "out"), kind, split="val", cache_dir=str(tmp_path / "cache"))
        expected = build_puzzles(kind, 8, "val", image_size=96)
        assert rows.features == FEATURES
        assert digest(rows.with_format("arrow")[:].to_pylist()) == digest(expected.with_format("arrow")[:].to_pylist())
        assert Image.open(tmp_path / "out" / f"{kind}.png").width > 500
    printed = capsys.readouterr().out
    assert re.search(r"Jigsaw +12 +8 +4/4 +50\.0", printed) and re.search(r"IQ_Test +12 +8 +2/2/2/2", printed)
    with pytest.raises(ValueError, match="`output_dir` .* is not empty.*--overwrite"):
        make_puzzles(arguments)
    (tmp_path / "out" / "own.txt").write_text("the user's")
    arguments.overwrite = True
    arguments.kinds = ["IQ_Test"]
    make_puzzles(arguments)
    assert not (tmp_path / "out" / "Jigsaw").exists() and (tmp_path / "out" / "own.txt").exists()


# ---------------------------------------------------------------------------------------------------------------------
# As training rows
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["answer", "rationale"])
def test_puzzles_become_the_same_training_rows_in_memory_and_from_a_folder(tmp_path, answer):
    for kind in ("Jigsaw", "Counting"):
        puzzles = build_puzzles(kind, 4, image_size=96)
        rows = training_rows(puzzles, answer)
        (tmp_path / kind).mkdir()
        puzzles.to_parquet(tmp_path / kind / "train.parquet")
        read, report = read_rows("blink", tmp_path, config=kind, answer=answer, bad_rows="raise")
        assert report.kept == {kind: 4}
        for row, same, puzzle in zip(rows, read, puzzles, strict=True):
            assert row["prompt"] == same["prompt"] and row["completion"] == same["completion"]
            images = [puzzle[f"image_{i + 1}"] for i in range(KINDS[kind].num_images)]
            for pair in zip(row["images"], same["images"], images, strict=True):
                assert len({image.tobytes() for image in pair}) == 1
            (turn,) = row["prompt"]
            assert [part["type"] for part in turn["content"]] == ["image"] * len(images) + ["text"]
            assert turn["content"][-1]["text"] == puzzle["prompt"]
            (text,) = (part["text"] for part in row["completion"][0]["content"])
            *explanation, letter = text.split("\n")
            assert letter == puzzle["answer"] and bool(explanation) == (answer == "rationale")
            assert "[difficulty" not in text and puzzle["explanation"].startswith("\n".join(explanation))
