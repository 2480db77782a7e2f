"""Every family of transformers, by the checks of tests/family_matrix.py; five of them in seconds: `-m "not all_families"`."""

import re
from pathlib import Path

import family_matrix
import pytest
from families import ALL_FAMILIES, FAMILIES, build_backbone
from family_matrix import CHECKS, FP32, build_model, distance, readable_batches, step
from planted_errors import plant_leak, plant_shifted_positions, plant_skipped_injection

from modeling_amvl import AMVLForConditionalGeneration


# Plain attention, positions in three dimensions, sliding windows, recurrent states, attention across to the image.
FIVE = ("llava", "qwen2_5_vl", "gemma3", "qwen3_5", "mllama")
# Their branches read more of the prompt than its cache.
IN_ONE_PASS = ("blip-2", "instructblip", "instructblipvideo", "kosmos-2")
DRIVEN = [name for name, family in FAMILIES.items() if not family.refused]
REFUSED = [name for name, family in FAMILIES.items() if family.refused]
PAGE = Path(__file__).parent / "FAMILIES.md"


def _marks(name):
    reason = FAMILIES[name].broken_here
    broken = pytest.mark.skipif(bool(reason), reason=reason)
    return [broken] if name in FIVE else [broken, pytest.mark.all_families]


driven_families = pytest.mark.parametrize("family", [pytest.param(name, marks=_marks(name)) for name in DRIVEN])


@driven_families
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_family(family, check):
    assert check(family) < CHECKS[check]


@driven_families
def test_stages_give_the_gradients_of_one_pass(family):
    model = build_model(family).train()
    rows = readable_batches(family)[0]
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    in_stages = step(model, family, rows, "shared", in_stages=True)
    assert (in_stages is None) == (family in IN_ONE_PASS)
    if in_stages is not None:
        assert distance(in_stages["gradient"], step(model, family, rows, "shared")["gradient"]) < 1e-5


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_carry_latents_is_refused_in_one_sentence(family):
    with pytest.raises(ValueError) as error:
        AMVLForConditionalGeneration.from_backbone(build_backbone(family))
    assert re.fullmatch(r"`\w[^.]*\.", str(error.value)), error.value


def test_nearly_all_families_are_driven():
    assert len(DRIVEN) >= 88 and len(REFUSED) == 9


# ---------------------------------------------------------------------------------------------------------------------
# The checks notice what they are there for
# ---------------------------------------------------------------------------------------------------------------------


# They count positions by themselves, or have none.
WITHOUT_POSITIONS = {
    "blip",
    "blip-2",
    "exaone4_5",
    "glm5_next",
    "hyperclovax_vision_v2",
    "inkling2",
    "inkling2_loop",
    "inkling_mm_model",
    "instructblip",
    "instructblipvideo",
    "kosmos-2",
    "kosmos-2.5",
    "nemotron_h_omni",
}


@driven_families
@pytest.mark.parametrize(
    "plant", [plant_leak, plant_shifted_positions, plant_skipped_injection], ids=["leak", "shifted", "skipped"]
)
def test_an_error_in_the_shared_plan_is_noticed(family, plant, monkeypatch):
    if plant is plant_shifted_positions and family in WITHOUT_POSITIONS:
        pytest.skip("the family takes no positions that could be shifted")
    plant(monkeypatch)
    assert family_matrix.shared_is_full(family) > FP32


@driven_families
def test_the_latents_reach_the_answer(family):
    """Else every comparison would pass with both plans leaving them out."""
    model = build_model(family)
    rows = family_matrix.readable_batches(family)[0]
    before = step(model, family, rows, "shared")
    model.latent_projection.weight.data.neg_()  # scaled, some families would norm it away
    after = step(model, family, rows, "shared")
    assert distance(after["words"], before["words"]) > 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


def test_the_page_is_about_the_families_of_its_release_and_the_checks_of_today():
    text = PAGE.read_text()
    release = re.search(r"families of transformers (\d+\.\d+)", text)[1]
    families = {name: family for name, family in ALL_FAMILIES.items() if family.is_in(release)}
    plans = {
        name: "refused" if family.refused else "broken" if release in family.broken else "shared"
        for name, family in families.items()
    }
    lines = text.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    header, *rows = rows
    assert header[3:] == [check.__name__ for check in CHECKS]
    assert {row[0]: row[1] for row in rows} == plans
    assert not any("**" in cell for row in rows for cell in row)
