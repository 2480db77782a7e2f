"""Tests of the pictures whose colours point to each other: what is asked is what is drawn."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from trainer.data.color_steps import CAPTIONS, KINDS, MULTI_HOP, build_color_steps
from trainer.data.photos import load_photos, split_photos
from trainer.data.shapes import ALL_COLORS, DIRECTIONS, PLACES, PREPOSITIONS
from trainer.evaluation import answer_text


pytestmark = pytest.mark.any_release


ROWS = 8 * len(KINDS)
CELL = 24  # pixels


@pytest.fixture(scope="module")
def rows():
    return build_color_steps(ROWS, kinds=KINDS, seed=3)


def seen(row):
    """What pixels alone say: by cell, the colour that most of them have, and the next one, which is the core's."""
    pixels = np.asarray(row["images"][0].convert("RGB"))
    found = {}
    for place, (i, j) in PLACES.items():
        patch = pixels[i * CELL : (i + 1) * CELL, j * CELL : (j + 1) * CELL]
        counts = {name: int((patch == rgb).all(-1).sum()) for name, rgb in ALL_COLORS.items()}
        outer, core = sorted(counts, key=counts.get, reverse=True)[:2]
        if counts[core] >= 8:  # single pixels of a photograph may have such a colour
            found[place] = (outer, core)
    return found


def asked(row):
    return row["prompt"][0]["content"][1]["text"].rstrip("?").split()


def right_answer(kind, words, shapes):
    core_of = dict(shapes.values())
    place_of = {outer: place for place, (outer, _) in shapes.items()}
    if kind in ("list_colors", "list_insides"):
        part = ("list_colors", "list_insides").index(kind)
        return " ".join(shapes[place][part] if place in shapes else "none" for place in PLACES)
    if kind == "walk":
        colors = [words[-1]]
        for _ in range(7):
            colors.append(core_of[colors[-1]])
        return " ".join(colors[1:])
    if kind == "color":
        return shapes[" ".join(words[2:])][0]
    if kind == "counting":
        return str(sum(outer == words[1] for outer, _ in shapes.values()))
    if kind == "location":
        return place_of[words[-1]]
    if kind == "neighbor_color":
        (step,) = (DIRECTIONS[side] for side, said in PREPOSITIONS.items() if said == " ".join(words[1:-1]))
        row, column = PLACES[place_of[words[-1]]]
        (place,) = (name for name, cell in PLACES.items() if cell == (row + step[0], column + step[1]))
        return shapes[place][0]
    color = words[-1]
    for _ in range(int(words[0])):
        color = core_of[color]
    return color


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_every_answer_can_be_read_off_the_pixels(split):
    checked = Counter()
    for row in build_color_steps(ROWS, split, kinds=KINDS, seed=9):
        if row["kind"] in ("shape", "list_shapes"):  # outlines are not told apart here
            continue
        assert answer_text(row) == right_answer(row["kind"], asked(row), seen(row)), row["kind"]
        checked[row["kind"]] += 1
    assert set(checked.values()) == {8} and len(checked) == len(KINDS) - 2


def test_rows_are_in_trl_prompt_completion_format(rows):
    for row in rows:
        assert set(row) == {"images", "prompt", "completion", "kind", "photo", "choices"}
        assert [image.size for image in row["images"]] == [(3 * CELL, 3 * CELL)]
        assert [part["type"] for part in row["prompt"][0]["content"]] == ["image", "text"]
        assert row["prompt"][0]["role"] == "user" and row["completion"][0]["role"] == "assistant"


def test_listed_outlines_are_those_asked_for_one_by_one(rows):
    assert all(answer_text(row) in row["choices"] for row in rows if row["kind"] not in CAPTIONS)
    for row in rows:
        if row["kind"] == "list_shapes":
            words = answer_text(row).split()
            assert [word == "none" for word in words] == [place not in seen(row) for place in PLACES]


def test_a_hop_reaches_no_colour_that_fewer_hops_reach(rows):
    for row in rows:
        if row["kind"] in MULTI_HOP:
            start, cores = asked(row)[-1], dict(seen(row).values())
            path = [start]
            for _ in range(int(row["kind"][0])):
                path.append(cores[path[-1]])
            assert len(set(path)) == len(path) and answer_text(row) == path[-1]


def test_answers_and_starts_take_turns():
    rows = build_color_steps(16 * 10, kinds=("2_steps", "counting"))
    starts = Counter(asked(row)[-1] for row in rows if row["kind"] == "2_steps")
    counts = Counter(answer_text(row) for row in rows if row["kind"] == "counting")
    assert set(starts.values()) == {10} and set(counts.values()) == {16}
    likeliest = Counter(answer_text(row) for row in rows if row["kind"] == "2_steps").most_common(1)[0][1]
    assert likeliest < 24  # of 80 rows and eight answers


def test_rows_depend_on_seed_and_place_alone(rows):
    again = build_color_steps(13, kinds=KINDS, seed=3)
    other = build_color_steps(13, kinds=KINDS, seed=4)
    assert again.with_format("arrow")[:].to_pylist() == rows.with_format("arrow")[:13].to_pylist()  # also the pictures
    assert again.with_format("arrow")[:].to_pylist() != other.with_format("arrow")[:].to_pylist()


def test_no_photograph_serves_both_splits(rows):
    held_out = build_color_steps(40, "held_out")
    sides = split_photos(load_photos(), 5)
    assert set(rows["photo"]) <= set(sides["train"]) and set(held_out["photo"]) <= set(sides["held_out"])
    assert not set(rows["photo"]) & set(held_out["photo"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_rows": 0}, "`num_rows` must be at least 1, but got 0"),
        ({"split": "test"}, "`split` must be one of .*'test'"),
        ({"seed": -1}, "`seed` must be zero or more, but got -1"),
        ({"kinds": ("9_steps",)}, "`kinds` must name some of .*9_steps"),
        ({"kinds": ()}, "`kinds` must name some of"),
        ({"image_size": 50}, "`image_size` must be a multiple of 3, at least 48, but got 50"),
        ({"image_size": 45}, "`image_size` must be a multiple of 3, at least 48, but got 45"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_color_steps(**{"num_rows": 1, **arguments})


def test_a_folder_whose_one_photograph_trains_holds_none_out(tmp_path):
    Image.new("RGB", (80, 60), (90, 20, 30)).save(tmp_path / "photo.png")
    assert build_color_steps(2, image_dir=tmp_path)["photo"] == ["photo.png"] * 2
    with pytest.raises(ValueError, match="leaves no photograph for 'held_out'"):
        build_color_steps(2, "held_out", image_dir=tmp_path)
