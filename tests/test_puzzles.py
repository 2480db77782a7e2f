"""Tests of the puzzles from photographs: their bytes, their answers, and that nothing but a look gives these away."""

import hashlib
import io
import random
import re
import warnings
from collections import Counter
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
from trainer.data.photos import load_photos
from trainer.data.puzzles import (
    FEATURES,
    KINDS,
    build_puzzles,
    camera_motion,
    chance_bounds,
    generate_puzzles,
    pixel_mean_accuracy,
    read_sides,
    stereo_pair,
    text_only_accuracy,
    views,
)
from trainer.data.puzzles.build import TURNS, _turn
from trainer.data.puzzles.canvas import GLYPHS, PLURALS, SHAPES, Random, encode_png, shape_masks
from trainer.data.puzzles.drawn import STEPS, _arrow, _paths
from trainer.data.shapes import COLORS


pytestmark = pytest.mark.any_release


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
    "Jigsaw": "418e3ef727982134b270b30f9ba2a62e4353de0c41287ef90f65332146468986",
    "Visual_Similarity": "c45a42d5b1d77b1b13e4485e5f6c646f648af4b1c86421564e1635a2da9adb00",
    "Multi-view_Reasoning": "ada68362360b5f771bb63a7d8675347091c8f8d1a6022752b19951fefb7d01de",
    "Visual_Correspondence": "43c99ee68c6ca626ceb9a5b18b8de5b707bc53540ee30e98e36a5b6c395f2287",
    "Counting": "24d0725e1945f65b6a04336eb435060e75e7b7a1435b782b53d8de596c17249e",
    "Object_Localization": "eb387ce6ff13ffb4c2326580317bcde4ff3873826109408e58bbd8a68977eeb3",
    "Spatial_Relation": "85c728a2e87135d66e6f5a3d13e7d0196453fd160faab04b36bcc91539d74e09",
    "IQ_Test": "8069bcbcb8626b1c8b9fb32d197837880e0715427c6ef63313ce1ccfc035ce80",
    "Multi-hop_Reasoning": "635f1b9e892518d80ef56c9a2be7cd5cfd8be2970adf4436e8ae7e4c1daf3afd",
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
def test_letters_and_contents_are_balanced_and_not_foretold_by_the_rows_before(kind):
    _, _, num_choices, num_cases, _ = KINDS[kind]
    block = TURNS * num_choices * num_cases
    turns = []
    for index in range(16 * block):
        letter, count = _turn(f"{kind}/letter", index, num_choices)
        turns.append((letter, _turn(f"{kind}/case/{letter}", count, num_cases)[0]))
    for start in range(0, len(turns), block):
        counts = Counter(turns[start : start + block])
        assert set(counts.values()) == {TURNS} and len(counts) == num_choices * num_cases
    letters = [letter for letter, _ in turns]
    for end in range(1, len(letters)):
        counts = [letters[end - end % block : end].count(letter) for letter in range(num_choices)]
        assert max(counts) - min(counts) <= TURNS
    hits = 0
    for i in range(block, len(letters)):
        before = letters[i - block : i][::-1]
        hits += letters[i] == max(range(num_choices), key=lambda letter: before.index(letter))
    assert (
        hits / (len(letters) - block) < 1 / num_choices + 0.12
    )  # 0.75 and 0.52 where each block has each letter once


def test_contents_take_their_turns_in_the_rows(sides):
    rows = list(generate_puzzles("Multi-view_Reasoning", 64, "train", 2, 0.5, SIZE, sides=sides))
    contents = Counter((row["answer"], row["choices"][answer_of(row)]) for row in rows)
    assert set(contents.values()) == {16} and len(contents) == 4


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
    train, val = build(sides, kind, 80), build(sides, kind, 80, "val")
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

    rows = build(sides, "Visual_Similarity", 150)
    for change in (brighter, closer):
        planted = rows.map(change, keep_in_memory=True)
        assert pixel_mean_accuracy(planted.select(range(100)), planted.select(range(100, 150))) > 0.65, change


def test_every_shape_has_as_many_pixels_and_as_many_edge_pixels():
    for side in range(10, 61):
        counts = {tuple(int(mask.sum()) for mask in shape_masks(shape, side)) for shape in SHAPES}
        assert len(counts) == 1, (side, counts)


def test_neither_the_nearest_letter_nor_one_ahead_is_the_right_one_more_often_than_another():
    for hops, grid in ((3, 5), (5, 6), (8, 8)):
        hits = ahead = 0.0
        for i in range(600):
            paths, asked = _paths(Random(f"{i}"), hops, grid)
            start = paths[asked][0]
            distances = [abs(path[-1][0] - start[0]) + abs(path[-1][1] - start[1]) for path in paths]
            nearest = [j for j, distance in enumerate(distances) if distance == min(distances)]
            hits += (asked in nearest) / len(nearest)
            second = paths[asked][1]
            gains = [
                distance - abs(path[-1][0] - second[0]) - abs(path[-1][1] - second[1])
                for path, distance in zip(paths, distances, strict=True)
            ]
            most = [j for j, gain in enumerate(gains) if gain == max(gains)]
            ahead += (asked in most) / len(most)
        low, high = chance_bounds(600, 0.25, level=0.999)
        assert low <= hits / 600 <= high
        assert ahead / 600 <= high  # of following the first arrow alone


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
        cuts = [((piece[0], frame[half - 1, half:]), (piece[:, 0], frame[half:, half - 1])) for piece in pieces]
        seams = [
            sum(abs(a - a.mean(0) - b + b.mean(0)).mean() for a, b in pair)  # pieces have a light of their own
            for pair in cuts
        ]
        hits += int(np.argmin(seams)) == answer_of(row)
    assert hits >= 54


def test_the_camera_moves_as_it_does_in_a_real_stereo_pair(sides):
    left, right = stereo_pair()
    assert camera_motion(left, right) == "right" and camera_motion(right, left) == "left"
    rows = build(sides, "Multi-view_Reasoning", 60, difficulty=0.1)
    hits = sum(camera_motion(*images_of(row)) == row["choices"][answer_of(row)] for row in rows)
    assert hits >= 54


def coarse(image, blocks):
    """Means over `blocks` x `blocks` squares of an image."""
    side = image.shape[0] // blocks
    cut = image[: side * blocks, : side * blocks].astype(float)
    return cut.reshape(blocks, side, blocks, side, 3).mean((1, 3)).ravel()


def test_neither_shot_of_a_pair_nor_a_coarse_look_at_both_tells_where_the_camera_went(sides):
    looks, right = [], []
    for row in generate_puzzles("Multi-view_Reasoning", 900, "train", 3, 0.0, SIZE, sides=sides):
        images = [np.asarray(Image.open(io.BytesIO(row[f"image_{i}"]["bytes"]))) for i in (1, 2)]
        looks.append([(coarse(image, 8), coarse(image, 4)) for image in images])
        right.append(row["choices"][answer_of(row)] == "right")
    fine, rough = (np.array([[look[i] for look in pair] for pair in looks]) for i in (0, 1))
    right = np.array(right)
    train, test = slice(500), slice(500, None)
    for image in (0, 1):  # the five nearest of the split's other rows vote: they were taken at the same place
        a, b = fine[test, image], fine[train, image]
        distances = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
        votes = right[train][np.argsort(distances, axis=1)[:, :5]].mean(1) > 0.5
        assert abs((votes == right[test]).mean() - 0.5) < 0.1
    inputs = np.concatenate([rough[:, 0], rough[:, 1]], axis=1)
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    a = inputs[train]
    weights = np.linalg.solve(a.T @ a + 30 * np.eye(a.shape[1]), a.T @ (right[train] - 0.5))
    assert abs(((inputs[test] @ weights > 0) == right[test]).mean() - 0.5) < 0.11


def fingerprints(pixels):
    """What a histogram of grey levels shows of a picture, level by level and channel by channel."""
    flat = pixels.reshape(-1, 3)
    modes = [np.bincount(channel, minlength=256).argmax() for channel in flat.T]
    return {"least": flat.min(0), "most": flat.max(0), "mode": np.array(modes), "median": np.median(flat, axis=0)}


def test_no_histogram_tells_the_missing_piece(sides):
    hits = Counter()
    for row in generate_puzzles("Jigsaw", 500, "train", 4, 0.5, SIZE, sides=sides):
        frame, *pieces = (np.asarray(Image.open(io.BytesIO(row[f"image_{i}"]["bytes"]))) for i in (1, 2, 3))
        shown = fingerprints(np.concatenate([frame[: SIZE // 2].reshape(-1, 3), frame[:, : SIZE // 2].reshape(-1, 3)]))
        found = [fingerprints(piece) for piece in pieces]
        for name, value in shown.items():
            first, second = (abs(marks[name] - value.astype(float)).sum() for marks in found)
            hits[name] += 0.5 if first == second else (second < first) == answer_of(row)
    low, high = chance_bounds(500, 0.5, level=0.999)
    assert all(low <= count / 500 <= high for count in hits.values()), hits


def test_one_number_of_texture_seldom_tells_which_place_is_the_same(sides):
    for difficulty, most in ((0.0, 0.8), (0.75, 0.68)):
        hits = 0
        for row in generate_puzzles("Visual_Similarity", 80, "train", 4, difficulty, SIZE, sides=sides):
            greys = [np.asarray(Image.open(io.BytesIO(row[f"image_{i}"]["bytes"]))).mean(-1) for i in (1, 2, 3)]
            edges = [sum(abs(np.diff(grey, axis=axis)).mean() for axis in (0, 1)) for grey in greys]
            hits += (abs(edges[2] - edges[0]) < abs(edges[1] - edges[0])) == answer_of(row)
        assert 0.35 < hits / 80 < most, (difficulty, hits)


def options_of(image):
    """The four lettered pictures of an IQ_Test."""
    size = image.shape[0]
    cell = size * 25 // 100
    gap, top = (size - 4 * cell) // 5, size - size // 50 - cell
    return [image[top : top + cell, left : left + cell] for left in range(gap, gap + 4 * (cell + gap), cell + gap)]


@pytest.mark.parametrize("size", [96, 128, 256])
@pytest.mark.parametrize("difficulty", [0.0, 0.5, 1.0])
def test_the_four_pictures_of_a_sequence_look_different(size, difficulty):
    for row in generate_puzzles("IQ_Test", 60, "train", 3, difficulty, size):
        options = options_of(np.asarray(Image.open(io.BytesIO(row["image_1"]["bytes"]))))
        for i, option in enumerate(options):
            for other in options[:i]:
                assert (option != other).any(-1).sum() >= 4 * size // 96


def test_no_sequence_is_in_both_splits():
    seen = {}
    for split in ("train", "val"):
        rows = generate_puzzles("IQ_Test", 500, split, 0, 0.0, SIZE)
        seen[split] = {
            frozenset(option.tobytes() for option in options_of(np.asarray(Image.open(io.BytesIO(png)))))
            for png in (row["image_1"]["bytes"] for row in rows)
        }
    assert len(seen["val"]) > 300 and not seen["train"] & seen["val"]


def basins(image, grid):
    """How many cells lead to each letter, by following the arrows in the picture, and how many point at it."""
    cell = image.shape[0] // grid
    border = (image.shape[0] - grid * cell) // 2
    next_of, letters = {}, {}
    for row, column in np.ndindex(grid, grid):
        top, left = border + row * cell, border + column * cell
        white = (image[top : top + cell, left : left + cell] == 255).all(-1)
        names = [name for name in STEPS if white[_arrow(name, cell)[0]].all()]
        if len(names) == 1:
            next_of[row, column] = (row + STEPS[names[0]][0], column + STEPS[names[0]][1])
        else:
            bits = [sum(1 << (4 - k) for k in range(5) if row_bits[k]) for row_bits in glyph_at(white)]
            letters[row, column] = next(name for name, glyph in GLYPHS.items() if list(glyph) == bits)
    sizes, incoming = Counter(), Counter()
    for place, following in next_of.items():
        incoming[letters.get(following)] += 1
        for _ in range(grid * grid):
            place = next_of.get(place, place)
        sizes[letters.get(place)] += 1
    return sizes, incoming


@pytest.mark.parametrize(("difficulty", "grid"), [(0.0, 5), (1.0, 8)])
def test_the_letter_that_most_arrows_lead_to_is_right_no_more_often_than_another(sides, difficulty, grid):
    hits = [0.0, 0.0]
    for row in generate_puzzles("Multi-hop_Reasoning", 300, "train", 5, difficulty, SIZE, sides=sides):
        for which, counts in enumerate(basins(np.asarray(Image.open(io.BytesIO(row["image_1"]["bytes"]))), grid)):
            most = [letter for letter in LETTERS if counts[letter] == max(counts[name] for name in LETTERS)]
            hits[which] += (LETTERS[answer_of(row)] in most) / len(most)
    low, high = chance_bounds(300, 0.25, level=0.999)
    assert all(low <= count / 300 <= high for count in hits), hits


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
        rows = build(sides, kind, 12, difficulty=difficulty)
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
    with pytest.raises(ValueError, match="'Visual_Similarity' needs at least 2 .* `split` 'val'.* leaves 1"):
        generate_puzzles("Visual_Similarity", 4, "val", image_dir=tmp_path)
    assert next(generate_puzzles("Visual_Similarity", 4, "train", image_size=SIZE, image_dir=tmp_path))
    write_noise(tmp_path, 7)
    for kind in KINDS:
        assert len(build_puzzles(kind, 4, "val", image_size=128, image_dir=tmp_path)) == 4
    for size in ((40, 400), (500, 60), (36, 24)):
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
    assert re.search(r"Jigsaw +12 +8 +\d/\d +50\.0", printed)
    assert re.search(r"IQ_Test +12 +8 +\d/\d/\d/\d +25\.0", printed)
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
