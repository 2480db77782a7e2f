"""The diagnosis of planted models, run end to end: used, unused, leaking and alike are told apart, and the rules are conservative."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from planted_latents import COLORS, colored_rows, planted
from tiny import build_tiny_backbone

from model_cards import TrainingFacts, render_card, update_card, weights_fingerprint, write_card
from modeling_amvl import AMVLForConditionalGeneration, AMVLProcessor
from recipes import diagnose_amvl
from trainer.diagnostics.diagnose import ask_control, compare_control, diagnose
from trainer.diagnostics.leakage import copying, divergence, norm_ratio
from trainer.diagnostics.pictures import draw_kl_history, draw_relevance
from trainer.diagnostics.questions import read_questions
from trainer.diagnostics.relevance import movement, occlude, relevance_maps
from trainer.diagnostics.structure import cosines, probe, relative_distance, typical_distance
from trainer.diagnostics.verdict import BUT, LEAK, UNDECIDED, UNUSED, USED, decide


NUM_ROWS = 60
SETTINGS = {"data": "colors", "seed": 0}


def run(**plant):
    model, processor = planted(**plant)
    return diagnose(model, processor, colored_rows(NUM_ROWS), max_new_tokens=1, num_sweep_rows=12)[0]


@pytest.fixture(scope="module")
def used():
    return run()


# ---------------------------------------------------------------------------------------------------------------------
# Planted models
# ---------------------------------------------------------------------------------------------------------------------


def test_a_model_whose_answer_is_its_latent_uses_it(used):
    changes = used["changes"]
    assert used["verdict"]["word"] == USED, used["verdict"]
    assert changes["own"]["accuracy"] == 1 and changes["own"]["flip_rate"] == 0
    for name in ("swapped", "swapped, same question", "shared mean", "zero", "latents off", "slot 1 alone"):
        assert changes[name]["high"] < -0.3 and changes[name]["log_prob_high"] < -0.3, name
    assert (
        changes["slot 2 alone"]["accuracy"] == changes["first slot repeated"]["accuracy"] == 1
    )  # the slot that is read
    assert used["copying"]["rate"] == 0  # a posterior like the prior hands nothing over
    assert used["divergence"]["forward_kl"] == used["divergence"]["active_units"] == 0
    kept = used["sweeps"]["slots_kept"]
    assert [point["at"] for point in kept] == [0, 1, 2] and kept[2]["accuracy"] == 1 > kept[1]["accuracy"]
    assert "100.0%" in used["verdict"]["paragraph"] and f"on {NUM_ROWS} rows" in used["verdict"]["paragraph"]


def test_its_latents_depend_on_the_image_alone_and_hold_the_answer(used):
    assert used["sensitivity"]["text"]["distance"] < 1e-5
    assert 0.5 < used["sensitivity"]["image"]["distance"] < 1.5
    assert used["probe"]["prior"]["accuracy"] == 1 and used["probe"]["prior"]["majority"] < 0.5
    assert used["structure"]["Z"]["within"] == pytest.approx(1)  # both slots are written alike
    assert used["structure"]["Z"]["across"] < 0.6
    names = ("text tokens", "image tokens")
    assert all(
        f"{name}, {where}" in used["structure"] for name in names for where in ("at the input", "after the last layer")
    )


def test_a_model_that_ignores_its_latents_is_found_out():
    found = run(reads=False)
    assert found["verdict"]["word"] == UNUSED and "Nothing moves" in found["verdict"]["paragraph"]
    for name in ("swapped", "shared mean", "zero", "matched-norm noise", "posterior", "wrong posterior"):
        assert found["changes"][name]["flip_rate"] == 0 and abs(found["changes"][name]["log_prob"]) < 1e-5, name


def test_a_posterior_that_copies_the_answer_is_caught():
    found = run(sees=False, copies=True)
    assert found["verdict"]["word"] == LEAK, found["verdict"]
    assert found["copying"]["rate"] == 1 and found["copying"]["low"] > 0.9
    assert found["changes"]["posterior"]["accuracy"] == 1 > found["changes"]["own"]["accuracy"]
    assert found["probe"]["posterior"]["accuracy"] == 1 > found["probe"]["prior"]["accuracy"]
    assert found["divergence"]["forward_kl"] > 1


def test_a_leak_beside_latents_that_are_used_is_named():
    verdict = run(sees=True, copies=True)["verdict"]
    assert verdict["word"] == BUT and "But the posterior leaks." in verdict["paragraph"]


def test_one_latent_for_all_rows_tells_nothing_of_any():
    model, processor = planted()
    model._latents = lambda color, brightness: type(model)._latents(model, None, 0 * brightness)
    found, _ = diagnose(model, processor, colored_rows(NUM_ROWS), max_new_tokens=1, num_sweep_rows=2)
    assert found["verdict"]["word"] == UNUSED and "one and the same Z" in found["verdict"]["paragraph"]
    assert found["changes"]["swapped"] is found["by_kind"] is found["sensitivity"]["image"] is None


def test_latents_far_from_the_origin_are_told_apart():
    model, processor = planted()
    look = model._latents

    def far(color, brightness):
        found = look(color, brightness)
        found.mean[..., 3] = 3000
        return found

    model._latents = far
    found, _ = diagnose(model, processor, colored_rows(NUM_ROWS), max_new_tokens=1, num_sweep_rows=2)
    assert found["verdict"]["word"] == USED, found["verdict"]


def test_rows_that_cannot_be_answered_in_time_are_refused_before_the_model_runs():
    model, processor = planted()
    model.prior = None
    rows = colored_rows(3)
    with pytest.raises(ValueError, match="at least two rows, got 1"):
        diagnose(model, processor, rows.select([0]))
    rows = rows.map(
        lambda row: {"completion": [{"role": "assistant", "content": [{"type": "text", "text": "a b c d"}]}]}
    )
    with pytest.raises(ValueError, match="`max_new_tokens` is 2, but the answer of row 0 has"):
        diagnose(model, processor, rows, max_new_tokens=2)


# ---------------------------------------------------------------------------------------------------------------------
# The rules
# ---------------------------------------------------------------------------------------------------------------------


def numbers(
    num_rows=500, own=0.5, constant=0.2, controls=None, copied=(0.3, 0.2), flips=(0.3, 0.3), num_same=500, **given
):
    """A model that uses its latents, but for what is given: (difference, low, high[, nats, low, high]) of an arm."""

    def arm(difference, low, high, *nats):
        nats = nats or (-0.5, -0.7, -0.3)
        found = {"num_rows": num_rows, "num_groups": num_rows, "accuracy": own + difference}
        found |= {"flip_rate": flips[0], "text_flip_rate": flips[1]}
        found |= {"difference": difference, "low": low, "high": high}
        return found | dict(zip(("log_prob", "log_prob_low", "log_prob_high"), nats))

    fall = (-0.2, -0.25, -0.15)
    names = ("own", "swapped", "swapped, same question", "shared mean", "zero", "latents off")
    changes = {name: arm(*given.get(name.replace(", ", "_").replace(" ", "_"), fall)) for name in names}
    changes["own"]["accuracy"] = own
    changes["swapped, same question"]["num_groups"] = num_same
    rate, base_rate = copied
    return {
        "num_rows": num_rows,
        "baselines": {"constant": constant},
        "changes": changes,
        "controls": controls or {},
        "copying": {
            "num_groups": num_rows,
            "rate": rate,
            "base_rate": base_rate,
            "difference": rate - base_rate,
            "low": rate - base_rate - 0.05,
            "high": rate - base_rate + 0.05,
        },
    }


NOTHING = (0.0, -0.01, 0.01, 0.0, -0.005, 0.005)


@pytest.mark.parametrize(
    ("given", "word", "says"),
    [
        ({}, USED, "-20.0 points (-25.0 to -15.0)"),
        ({"swapped": (-0.2, -0.4, 0.0)}, UNDECIDED, "neither shown nor excluded"),
        ({"swapped": NOTHING}, UNUSED, "A loss of 2 points is excluded."),
        ({"swapped": NOTHING, "zero": NOTHING}, UNUSED, "excluded."),
        ({"swapped": NOTHING, "num_rows": 149}, UNDECIDED, "more images than 149"),
        ({"swapped": NOTHING, "num_rows": 29}, UNDECIDED, "too few rows"),
        ({"num_rows": 29}, UNDECIDED, "too few rows"),
        ({"swapped": NOTHING, "own": 0.21}, UNDECIDED, "there is none to lose"),
        ({"swapped": (0.0, -0.01, 0.01, -0.3, -0.4, -0.2)}, UNDECIDED, "move what the model finds likely"),
        ({"swapped": NOTHING, "copied": (0.9, 0.2)}, LEAK, "90.0%"),
        ({"swapped": (-0.1, -0.3, 0.1), "copied": (0.9, 0.2)}, LEAK, "neither shown"),
        ({"copied": (0.9, 0.2)}, BUT, "the posterior leaks"),
        ({"copied": (0.34, 0.2)}, USED, ""),
        ({"shared_mean": NOTHING}, BUT, "one tensor shared by all rows"),
        ({"latents_off": (0.1, 0.05, 0.15)}, BUT, "latents switched off"),
        ({"copied": (0.9, 0.2), "num_rows": 29}, UNDECIDED, "too few rows"),
        ({"flips": (0.01, 0.9)}, UNDECIDED, "Only the form of the reply moves"),
        ({"flips": (0.01, 0.9), "swapped": (-0.01, -0.019, -0.001)}, UNDECIDED, "the exact form"),
        ({"flips": (0.01, 0.01)}, USED, ""),
        ({"swapped": NOTHING, "flips": (0.0, 0.9)}, UNUSED, "Only the form of the reply moves"),
        ({"swapped_same_question": NOTHING}, BUT, "tell images apart"),
        ({"swapped_same_question": NOTHING, "num_same": 29}, USED, "left open: 29 images"),
        ({"controls": {"sft": {"accuracy": 0.6, "difference": 0.1, "low": 0.05, "high": 0.15}}}, BUT, "`sft` is better"),
        ({"controls": {"sft": {"accuracy": 0.5, "difference": 0, "low": -0.1, "high": 0.1}}}, BUT, "not shown to be worse"),
        ({"controls": {"sft": {"accuracy": 0.3, "difference": -0.2, "low": -0.3, "high": -0.1}}}, USED, ""),
    ],
)  # fmt: skip
def test_the_verdict_follows_from_the_intervals(given, word, says):
    verdict = decide(numbers(**given))
    assert verdict["word"] == word and says in verdict["paragraph"], verdict
    compared = "sft" in given.get("controls", {})
    assert compared != verdict["paragraph"].endswith("Not compared with same-data SFT.")


def test_no_two_rows_to_swap_is_no_proof_where_their_mean_moves_the_answers():
    given = numbers()
    given["changes"]["swapped"] = None
    assert decide(given)["word"] == UNDECIDED and "yet the mean of all" in decide(given)["paragraph"]
    given["changes"]["shared mean"] |= {"text_flip_rate": 0, "log_prob_low": 0, "log_prob_high": 0}
    assert decide(given)["word"] == UNUSED


# ---------------------------------------------------------------------------------------------------------------------
# The parts
# ---------------------------------------------------------------------------------------------------------------------


def test_cosines_are_means_over_the_pairs_that_they_name():
    vectors = torch.randn(5, 3, 4) + 0.5
    unit = vectors / vectors.norm(dim=-1, keepdim=True)
    found = cosines(vectors)
    within = [float(unit[n, i] @ unit[n, j]) for n in range(5) for i in range(3) for j in range(3) if i != j]
    across = [float(unit[n, i] @ unit[m, i]) for n in range(5) for m in range(5) for i in range(3) if n != m]
    assert found["within"] == pytest.approx(np.mean(within), abs=1e-6)
    assert found["across"] == pytest.approx(np.mean(across), abs=1e-6)
    pairs = [float(unit[n, 0] @ unit[m, 2]) for n in range(5) for m in range(5) if n != m]
    assert found["across_matrix"][0][2] == pytest.approx(np.mean(pairs), abs=1e-6)
    assert cosines(vectors[:, :1])["within"] is None


def test_distances_are_in_units_of_the_distance_between_rows():
    latents = torch.tensor([0.0, 4.0, 10.0])[:, None, None]
    typical = typical_distance(latents, torch.tensor([1, 0, -1]))
    assert typical == 4 and relative_distance(latents, latents + 1, typical) == 0.25


def test_a_probe_reads_what_is_planted_on_rows_held_out_and_nothing_from_noise():
    labels = [list(COLORS)[row % 3] for row in range(240)]
    noise = torch.randn(240, 2, 8)
    planted_latents = noise.clone()
    planted_latents[:, 1, :3] += 6 * torch.nn.functional.one_hot(torch.arange(240) % 3, 3)
    assert probe(planted_latents, labels)["accuracy"] > 0.95
    found = probe(noise, labels)
    assert 0.2 < found["accuracy"] < 0.47 and found["majority"] == found["chance"] == pytest.approx(1 / 3)
    # Rows that differ in nothing but their photograph are kept together: remembering them helps nothing.
    photo = torch.arange(240) // 8
    remembered = 20 * torch.nn.functional.one_hot(photo, 30).float()[:, None]
    of_photo = [list(COLORS)[int(index) % 3] for index in torch.randperm(30)[photo]]
    assert (
        probe(remembered, of_photo)["accuracy"] > 0.95 > 0.7 > probe(remembered, of_photo, photo.tolist())["accuracy"]
    )
    # An answer that one image has cannot be both learnt and held out.
    assert probe(noise[:70], ["yes"] * 30 + ["no"] * 40, [0] * 30 + list(range(1, 41))) is None
    assert probe(noise, ["red"] * 240) is None and probe(noise[:20], [str(row) for row in range(20)]) is None


def test_copying_is_paired_with_what_is_said_anyway():
    found = copying([True] * 60 + [False] * 40, [True] * 20 + [False] * 80)
    assert (found["rate"], found["base_rate"]) == (0.6, 0.2) and found["difference"] == pytest.approx(0.4)
    assert 0.3 < found["low"] < 0.4 < found["high"] < 0.5


def test_divergence_is_per_slot_and_counts_the_units_that_carry_something():
    mean, log_variance = torch.zeros(50, 2, 3), torch.zeros(50, 2, 3)
    shifted = mean.clone()
    shifted[:, 1, 0] = 2.0
    found = divergence((mean, log_variance), (shifted, log_variance))
    assert found["forward_kl_by_slot"] == found["reverse_kl_by_slot"] == [0, 2]  # 2^2 / 2
    assert (found["active_units"], found["num_units"], found["forward_kl"]) == (1, 6, 1)
    assert found["prior_std"] == 1 and found["prior_spread"] == 0
    assert norm_ratio(torch.full((2, 3, 4), 1.5), 2.0) == 1.5


def test_relevance_lies_where_the_latents_look():
    """A prior that sees the brightness of the picture's lower right ninth moves there and nowhere else."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8))
    copies = occlude(image, 3)
    changed = [np.abs(np.asarray(part).astype(int) - np.asarray(image)).sum(-1) > 0 for part in copies]
    assert changed[5][16:32, 32:].mean() > 0.9 and changed[5].sum() == changed[5][16:32, 32:].sum()
    latents = torch.tensor([[1.0], [3.0]])
    moved = movement(latents, torch.stack([latents, latents + 2, latents, latents]), torch.tensor([1.0, 4.0]))
    assert moved.tolist() == [[[0, 2], [0, 0]], [[0, 0.5], [0, 0]]]
    moved = movement(latents, torch.stack([latents, latents + 2, latents, latents]), torch.tensor([1e-6, 4.0]))
    assert moved.tolist() == [[[0, 0], [0, 0]], [[0, 0.5], [0, 0]]]  # the first slot is the same for all rows

    model, processor = planted()
    corner = slice(32, 48)
    look = model._latents
    model.prior = lambda input_ids, pixel_values=None, **_: look(
        None, pixel_values[..., corner, corner].mean((1, 2, 3))
    )
    rows = colored_rows(4)
    questions = read_questions(rows)
    latents = torch.randn(4, 2, 4)
    ((drawn, relevance),) = relevance_maps(model, processor, rows, questions, [2], latents, torch.tensor([1, 2, 3, 0]))
    assert drawn.size == (48, 48) and relevance.shape == (2, 6, 6)
    inside = relevance[:, 4:, 4:]
    assert (inside > 0).any() and relevance.sum() == inside.sum()


def test_a_control_is_compared_row_by_row():
    model, processor = planted(reads=False)
    rows = colored_rows(30)
    questions = read_questions(rows)
    texts = ask_control(model.backbone, processor, rows, max_new_tokens=1)
    assert not set(texts) & set(COLORS)
    found = compare_control(texts, [True] * 15 + [False] * 15, questions)
    assert (found["accuracy"], found["difference"]) == (0, -0.5) and -0.7 < found["low"] < found["high"] < -0.3


def test_the_kl_is_drawn_if_it_was_logged(tmp_path):
    assert draw_kl_history([{"step": 1, "loss": 2.0}], tmp_path / "kl.png") is None
    history = [{"step": step, "forward_kl": 1.0 + step, "reverse_kl": 2.0} for step in range(3)]
    with Image.open(draw_kl_history(history, tmp_path / "kl.png")) as picture:
        assert picture.format == "PNG"


def test_dollars_in_a_question_are_no_formula(tmp_path):
    maps = [(Image.new("RGB", (20, 20)), torch.rand(2, 6, 6))]
    assert draw_relevance(maps, [r"Is it $5 {or $6, or $x^2^3$?"], tmp_path / "relevance.png").is_file()


# ---------------------------------------------------------------------------------------------------------------------
# The card and the command
# ---------------------------------------------------------------------------------------------------------------------


def test_the_card_carries_verdict_and_table_and_a_later_one_replaces_it(used, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    diagnosis = {**used, "settings": SETTINGS, "weights_sha256": weights_fingerprint(tmp_path)}
    scores = {name: {"nll": 0.5, "accuracy": 0.5} for name in ("prior", "posterior", "no_latents")}
    facts = TrainingFacts("m", {"num_latents": 2, "latent_size": 8, "latent_temperature": 0.0}, is_trained=True)
    evaluated = dataclasses.replace(facts, evaluation={"step": 1, **scores})
    card = render_card(evaluated, diagnosis=diagnosis).text
    assert (
        f"**Verdict: used.** {used['verdict']['paragraph']}" in card
        and "| swapped | 60 |" in card
        and "| prior | 0.5" in card
    )
    for known, shown in ((facts, None), (evaluated, None), (facts, diagnosis)):
        path = tmp_path / "README.md"
        render_card(known, diagnosis=shown).save(path)
        update_card(path, {**diagnosis, "verdict": {"word": "unused", "paragraph": "New."}})
        once = path.read_text()
        update_card(path, {**diagnosis, "verdict": {"word": "unused", "paragraph": "New."}})
        assert path.read_text() == once and once.count("**Verdict: ") == 1 and "**Verdict: unused.** New." in once
        assert (
            "Not measured: this run" not in once
            and "was not measured" not in once
            and once.index("## Does it use") < once.index("Verdict") < once.index("## Training")
        )
        assert ("| prior | 0.5" in once) == (known is evaluated)
    for other, message in ((None, "does not say which weights"), ("0" * 64, "trained on since or another model")):
        with pytest.raises(ValueError, match=message):
            update_card(path, {**diagnosis, "weights_sha256": other})
        assert path.read_text() == once
    path.write_text("# Another card\n")
    update_card(path, diagnosis)
    assert path.read_text().startswith(
        "# Another card\n\n## Does it use its latents?\n\n<!-- diagnosis -->\n**Verdict: used"
    )
    with pytest.raises(ValueError, match="no card to update"):
        update_card(tmp_path / "absent.md", diagnosis)


HEADING, START, END = "## Does it use its latents?", "<!-- diagnosis -->", "<!-- /diagnosis -->"
NOT_MEASURED = "Not measured: no evaluation was made before this was saved."


def test_only_whole_lines_of_a_card_are_markers_and_headings(used, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    path = tmp_path / "README.md"
    diagnosis = {**used, "settings": SETTINGS, "weights_sha256": weights_fingerprint(tmp_path)}
    before, after = f"See `{HEADING}`; `{START}` and `{END}` mark it.\n\n", f"\n\n## More\n\n{NOT_MEASURED}\n"
    path.write_text(f"{before}{HEADING}\n\n{NOT_MEASURED}{after}")
    for _ in range(2):
        update_card(path, diagnosis)
        text = path.read_text()
        assert text.startswith(f"{before}{HEADING}\n\n{START}\n**Verdict") and text.endswith(f"{END}{after}")
        assert text.count(NOT_MEASURED) == 1
    for markers in (f"{START}\n", f"{END}\n", f"{END}\n{START}\n"):
        path.write_text(markers + "mine")
        with pytest.raises(ValueError, match="once each, in this order"):
            update_card(path, diagnosis)
        assert path.read_text() == markers + "mine"
        with pytest.raises(ValueError, match="once each, in this order"):
            command(tmp_path, "color_steps", "--update_card")  # before anything is spent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A stock folder, and an AMVL checkpoint as a trainer leaves it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    backbone, stock_processor = build_tiny_backbone()
    for part in (backbone, stock_processor):
        part.save_pretrained(folder / "stock")
    processor = AMVLProcessor.from_backbone(stock_processor)
    model = AMVLForConditionalGeneration.from_backbone(
        backbone, num_latents=2, latent_size=8, latent_token_id=processor.latent_token_id
    )
    for part in (model, processor):
        part.save_pretrained(folder / "amvl")
    write_card(folder / "amvl")
    log = [{"step": step, "forward_kl": 1.0, "reverse_kl": 2.0} for step in (1, 2)]
    (folder / "amvl" / "checkpoint-10").mkdir()
    (folder / "amvl" / "checkpoint-10" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    return folder


def command(*words):
    parser = diagnose_amvl.HfArgumentParser(diagnose_amvl.DiagnoseArguments)
    return parser.parse_args_into_dataclasses(diagnose_amvl.with_names([str(word) for word in words]))[0]


def test_the_command_leaves_verdict_tables_pictures_and_card(checkpoint, tmp_path, capsys):
    words = ("--max_rows", 40, "--num_sweep_rows", 4, "--batch_size", 40, "--max_new_tokens", 4, "--update_card")
    words += ("--kinds", "location", "4_steps")
    controls = ("--controls", f"sft={checkpoint / 'stock'}", f"other={checkpoint / 'amvl'}")
    arguments = command(checkpoint / "amvl", "color_steps", "--output_dir", tmp_path, *words, *controls)
    diagnosis = diagnose_amvl.main(arguments)
    word, paragraph = diagnosis["verdict"].values()
    assert f"{word}: {paragraph}" in capsys.readouterr().out
    assert json.loads((tmp_path / "diagnosis.json").read_text())["verdict"]["word"] == word
    page = (tmp_path / "diagnosis.md").read_text()
    assert page.startswith(f"# Are the latents used?\n\n**Verdict: {word}.** {paragraph}")
    assert (
        "| `sft` |" in page
        and "| location | 20 |" in page
        and "| 4_steps | 20 |" in page
        and "nan" not in page.lower()
    )
    files = {"interventions.png", "gap.png", "sweeps.png", "cosines.png", "kl.png", "relevance.png"}
    assert set(diagnosis["pictures"].values()) == files and diagnosis["left_out"] == []
    for name in files:
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG" and len(np.unique(np.asarray(picture.convert("L")))) > 10
    assert diagnosis["controls"]["other"]["difference"] == 0  # the checkpoint itself
    card = (checkpoint / "amvl" / "README.md").read_text()
    assert f"**Verdict: {word}.** {paragraph}" in card and str(tmp_path) not in page + card


def test_nothing_is_lost_where_drawing_fails(checkpoint, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no picture")

    monkeypatch.setattr(diagnose_amvl.pictures, "draw_changes", fail)
    words = ("--max_rows", 10, "--num_sweep_rows", 2, "--max_new_tokens", 4, "--output_dir", tmp_path)
    with pytest.raises(RuntimeError, match="no picture"):
        diagnose_amvl.main(command(checkpoint / "amvl", "color_steps", *words))
    page = (tmp_path / "diagnosis.md").read_text()
    assert "**Verdict:" in page and page.endswith("Not compared with same-data SFT.\n")
    assert (tmp_path / "diagnosis.json").is_file()


def test_a_library_that_is_missing_is_named_before_anything_is_spent(checkpoint, monkeypatch):
    monkeypatch.setattr(diagnose_amvl.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="`scikit-learn` is needed"):
        command(checkpoint / "amvl", "color_steps")


def test_the_history_is_that_of_the_last_checkpoint(tmp_path):
    for name, log in (("checkpoint-9", [{"step": 9}]), ("checkpoint-10", [{"step": 10}]), ("checkpoint-best", [])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    assert diagnose_amvl.training_history(tmp_path) == [{"step": 10}]
    (tmp_path / "trainer_state.json").write_text("{}")
    assert diagnose_amvl.training_history(tmp_path) == []


def test_a_stock_model_and_data_that_nobody_knows_are_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="stock model, `llava`, and has no latents"):
        diagnose_amvl.main(command(checkpoint / "stock", "color_steps", "--output_dir", tmp_path))
    with pytest.raises(ValueError, match="name its `dataset_format`"):
        diagnose_amvl.main(command(checkpoint / "amvl", tmp_path, "--output_dir", tmp_path))
    for words, message in (
        (("--controls", "sft"), "`controls` has 'sft'"),
        (("--controls", "a=x", "a=y"), "a name of its own"),
        (("--max_rows", "1"), "`max_rows` must be at least 2, got 1"),
        (("--seed", "-1"), "`seed` must be at least 0, got -1"),
        (("--dataset_format", "csv"), "`dataset_format` must be one of"),
        (("--dataset_format", "blink", "--kinds", "color"), r"`kinds` is \['color'\], but `color_steps` has its own"),
    ):
        with pytest.raises(ValueError, match=message):
            command(checkpoint / "amvl", "color_steps", *words)
    with pytest.raises(ValueError, match="`update_card` needs a card"):
        command(checkpoint / "stock", "color_steps", "--update_card")
