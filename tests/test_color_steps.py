"""Tests of the pictures whose colours point to each other: what is asked is what is drawn."""

from collections import Counter

import numpy as np
import pytest

from trainer.data.color_steps import ALL_COLORS, CAPTIONS, KINDS, MULTI_HOP, build_color_steps
from trainer.data.photo_questions import DIRECTIONS, PLACES, PREPOSITIONS, answer_text
from trainer.data.photos import load_photos, split_photos


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


def test_every_answer_can_be_read_off_the_pixels(rows):
    checked = Counter()
    for row in rows:
        if row["kind"] in ("shape", "list_shapes"):  # outlines are not told apart here
            continue
        assert answer_text(row) == right_answer(row["kind"], asked(row), seen(row)), row["kind"]
        checked[row["kind"]] += 1
    assert set(checked.values()) == {8} and len(checked) == len(KINDS) - 2


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
    assert again.with_format("arrow")[:].to_pylist() == rows.with_format("arrow")[:13].to_pylist()
    assert again.with_format("arrow")[:].to_pylist() != other.with_format("arrow")[:].to_pylist()


def test_no_photograph_serves_both_splits(rows):
    held_out = build_color_steps(40, "held_out")
    sides = split_photos(load_photos(), 5)
    assert set(rows["photo"]) <= set(sides["train"]) and set(held_out["photo"]) <= set(sides["held_out"])
    assert not set(rows["photo"]) & set(held_out["photo"])


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"num_rows": 0}, "num_rows"),
        ({"split": "test"}, "split"),
        ({"seed": -1}, "seed"),
        ({"kinds": ("9_steps",)}, "kinds"),
        ({"kinds": ()}, "kinds"),
        ({"image_size": 50}, "image_size"),
    ],
)
def test_a_bad_argument_is_named(arguments, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        build_color_steps(**{"num_rows": 1, **arguments})
