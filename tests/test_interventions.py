"""Interventions change Z as they say and nothing else, partners never share a Z, and a planted swap costs what it must."""

from collections import Counter
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from planted_latents import COLORS, colored_rows, planted

from trainer.diagnostics.asking import Answers, ask, read_latents
from trainer.diagnostics.interventions import (
    change,
    derange,
    first_slot_repeated,
    first_slots,
    gaussian_noise,
    matched_norm_noise,
    only_slot,
    same_latents,
    shared_mean,
    swap_cost,
    swapped,
    zero,
)
from trainer.diagnostics.questions import Question, is_right, read_options, read_questions, said, wrong_answers


NUM_ROWS = 60


def latents(num_rows=200, num_slots=3, size=5):
    scale = torch.arange(1, size + 1)
    return 2 + scale * torch.randn(num_rows, num_slots, size, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------------------------------------------------------
# On Z
# ---------------------------------------------------------------------------------------------------------------------


def test_each_intervention_does_what_its_name_says_and_leaves_its_input():
    given = latents()
    before, mean = given.clone(), given.mean(0)
    assert zero(given).abs().max() == 0
    torch.testing.assert_close(shared_mean(given), mean.expand_as(given))
    torch.testing.assert_close(first_slot_repeated(given), torch.stack([given[:, 0]] * 3, dim=1))
    alone = only_slot(given, 1)
    assert torch.equal(alone[:, 1], given[:, 1])
    torch.testing.assert_close(alone[:, [0, 2]], mean[[0, 2]].expand(200, 2, 5))
    kept = first_slots(given, 2)
    assert torch.equal(kept[:, :2], given[:, :2]) and torch.allclose(kept[:, 2], mean[2].expand(200, 5))
    assert torch.equal(first_slots(given, 3), given) and torch.allclose(first_slots(given, 0), shared_mean(given))
    assert torch.equal(given, before)


def test_noise_has_the_norm_or_the_moments_of_the_latents_and_depends_on_the_seed_alone():
    given = latents(num_rows=4000)
    noise = matched_norm_noise(given, seed=1)  # not the seed of the latents
    torch.testing.assert_close(noise.norm(dim=-1), given.norm(dim=-1))
    assert torch.cosine_similarity(noise, given, dim=-1).mean().abs() < 0.05
    gaussian = gaussian_noise(given)
    torch.testing.assert_close(gaussian.mean(0), given.mean(0), atol=0.4, rtol=0)  # 5 / sqrt(4000), five deviations
    torch.testing.assert_close(gaussian.std(0), given.std(0), atol=0, rtol=0.1)
    for make in (matched_norm_noise, gaussian_noise):
        assert torch.equal(make(given, 1), make(given, 1)) and not torch.equal(make(given, 1), make(given, 2))


def test_a_swap_takes_the_partners_and_a_row_without_one_keeps_its_own():
    given = latents(num_rows=3)
    assert torch.equal(swapped(given, [2, -1, 0]), given[[2, 1, 0]])


# ---------------------------------------------------------------------------------------------------------------------
# Partners
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_partners_are_a_permutation_within_groups_without_a_pair_of_one_label(seed):
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 4, 120)
    labels = rng.integers(0, 5, 120)  # none has half of a group
    for group in range(4):
        assert max(Counter(labels[groups == group]).values()) <= (groups == group).sum() / 2
    partners = derange(labels, groups, seed).numpy()
    assert sorted(partners) == list(range(120))
    assert (labels[partners] != labels).all() and (groups[partners] == groups).all()
    assert (partners == derange(labels, groups, seed).numpy()).all()
    assert (partners != derange(labels, groups, seed + 1).numpy()).any()


def test_rows_whose_label_has_more_than_half_meet_another_label_or_nobody():
    labels = np.asarray([0] * 9 + [1] * 3 + [2])
    partners = derange(labels).numpy()
    given = partners >= 0
    assert (labels[partners[given]] != labels[given]).all()
    assert given.sum() == 8 and len(set(partners[given])) == 8  # each of the four others is met and meets one
    assert (derange([7] * 5) == -1).all() and (derange(["a"]) == -1).all()


def test_latents_that_are_one_are_found_whatever_rounding_did_to_them():
    given = latents(num_rows=6)
    given[3] = given[0] * (1 + 1e-6)
    given[5] = given[1]
    groups = same_latents(given, chunk=2)
    assert groups[3] == groups[0] and groups[5] == groups[1] and len(set(groups)) == 4
    assert len(set(same_latents(torch.ones(4, 2, 2)))) == 1
    apart = latents(num_rows=6) + torch.tensor([3000.0, 0, 0, 0, 0])  # an offset that all rows share hides nothing
    assert len(set(same_latents(apart))) == 6
    chained = torch.linspace(0, 1, 2500)[:, None, None]  # each close to the next, the ends far apart
    assert len(set(same_latents(chained))) > 500


# ---------------------------------------------------------------------------------------------------------------------
# Right and wrong answers
# ---------------------------------------------------------------------------------------------------------------------


def question(gold, options=(), text="?", kind="all"):
    return Question(prompt="", completion="", text=text, gold=gold, options=list(options), kind=kind)


def test_an_answer_is_right_if_it_is_the_gold_text_or_reads_as_its_letter():
    options = ["a cat", "a dog"]
    assert is_right(" red ", question("red", COLORS)) and not is_right("Red", question("red", COLORS))
    for answer in ("(B)", "B", "The answer is B.", "a dog"):
        assert is_right(answer, question("(B)", options)), answer
    for answer in ("(A)", "a cat", "A or B", ""):
        assert not is_right(answer, question("(B)", options)), answer


def test_options_of_lettered_rows_are_read_off_the_question():
    text = "Which?\n(A) the second image\n(B) the third image"
    row = {
        "prompt": [{"role": "user", "content": text}],
        "completion": [{"role": "assistant", "content": "(B)"}],
        "source": "Jigsaw",
    }
    (found,) = read_questions(datasets.Dataset.from_list([row]))
    assert found.options == ["the second image", "the third image"] and found.letter == "B" and found.kind == "Jigsaw"


def test_options_are_the_last_run_of_lines_in_order():
    assert read_options("Is it (A) or (B)?\n(A) cat (black)\n(B) dog") == ["cat (black)", "dog"]
    assert read_options("Which?\nA. cat\nB. dog\nC. cow") == ["cat", "dog", "cow"]
    assert read_options("(A) one\n(B) two\n\n(A) three\n(B) four") == ["three", "four"]
    assert read_options("(A) one\n(C) two") == read_options("(B) one\n(B) two") == []


def test_what_is_said_is_free_of_its_form():
    lettered, open_question = question("(B)", ["x", "y"]), question("red")
    assert said("(B)", lettered) == said("B.", lettered) != said("(A)", lettered)
    assert said("red", open_question) == said(" Red.", open_question) != said("blue", open_question)


def test_a_wrong_answer_is_another_option_or_letter_or_answer_of_its_kind_and_never_right():
    colors = [question(color, COLORS) for color in list(COLORS) * 10]
    wrong = wrong_answers(colors)
    assert all(answer in COLORS and answer != q.gold for answer, q in zip(wrong, colors))
    assert len(set(zip(wrong, [q.gold for q in colors]))) == 6  # every wrong option is drawn
    assert wrong_answers([question("(B)", ["x", "y"])]) == ["(A)"]
    open_questions = [question("7", kind="n"), question("8", kind="n"), question("cat", kind="n2")]
    assert wrong_answers(open_questions)[:2] == ["8", "7"] and wrong_answers(open_questions)[2] in ("7", "8")
    with pytest.raises(ValueError, match="'7' and no `choices`"):
        wrong_answers([question("7"), question("7")])


# ---------------------------------------------------------------------------------------------------------------------
# What a swap costs
# ---------------------------------------------------------------------------------------------------------------------


def test_a_change_counts_rows_flips_and_nats_in_pairs():
    questions = [question("red") for _ in range(40)]
    own = Answers(["red"] * 30 + ["blue"] * 10, torch.zeros(40))
    other = Answers(["green"] * 20 + ["red"] * 10 + ["green"] * 10, -torch.ones(40))
    found = change(own, other, questions)
    assert (found.num_rows, found.accuracy, found.difference, found.flip_rate) == (40, 0.25, -0.5, 0.75)
    assert -0.7 < found.low < -0.5 < found.high < -0.3
    assert found.log_prob == found.log_prob_low == found.log_prob_high == -1
    part = change(own, other, questions, kept=range(20, 30))
    assert (part.num_rows, part.difference, part.flip_rate) == (10, 0, 0)
    assert change(own, other, questions, kept=[]) is None
    form = change(own, Answers([f"{text.title()}." for text in own.texts]), questions)
    assert (form.flip_rate, form.text_flip_rate) == (0, 1)


def test_rows_of_one_image_are_no_further_evidence():
    questions, groups = [question("red")] * 10, list(range(10))
    own, other = Answers(["red"] * 10), Answers(["red"] * 7 + ["blue"] * 3)
    once = change(own, other, questions, groups=groups)
    often = change(Answers(own.texts * 30), Answers(other.texts * 30), questions * 30, groups=groups * 30)
    assert (often.num_rows, often.num_groups) == (300, 10) and (often.low, often.high) == (once.low, once.high)


def test_a_swap_costs_everything_where_the_answer_is_the_latent_and_nothing_where_it_is_not_read():
    rows = colored_rows(NUM_ROWS)
    model, processor = planted()
    cost = swap_cost(model, processor, rows, batch_size=32, max_new_tokens=1)
    prior = read_latents(model, processor, rows, read_questions(rows)).prior[0]
    partners = derange(same_latents(prior))
    says = [golds(rows)[partner] for partner in partners]
    assert cost["own_right"] == [True] * NUM_ROWS
    assert cost["swapped_right"] == [one == other for one, other in zip(says, golds(rows))]
    assert cost["kinds"] == list(rows["kind"]) and cost["num_without_partner"] == 0
    assert set(cost["by_kind"]) == {"all", "one step", "two steps"}
    for kind, found in cost["by_kind"].items():
        hits = [hit for hit, name in zip(cost["swapped_right"], cost["kinds"]) if kind in ("all", name)]
        assert found["own"] == 1 and found["swapped"] == pytest.approx(sum(hits) / len(hits))
        assert found["num_rows"] == len(hits) and found["low"] < found["difference"] < found["high"] < -0.3, kind
    blind = swap_cost(*planted(reads=False), rows, batch_size=32, max_new_tokens=1)
    assert blind["own_right"] == blind["swapped_right"] == [gold == "red" for gold in golds(rows)]
    assert {found["difference"] for found in blind["by_kind"].values()} == {0.0}


def golds(rows):
    return [found.gold for found in read_questions(rows)]


def test_asking_gives_each_row_its_own_latents_in_any_batch():
    """With Z that names any colour, not the image's, each row says the colour of its Z, and log p(gold) tells them apart."""
    rows = colored_rows(7)
    model, processor = planted()
    questions = read_questions(rows)
    read = read_latents(model, processor, rows, questions, batch_size=3)
    assert len(set(read.images)) == 7 and read.num_images == [1] * 7 and read.groups == read.images
    assert replace(read, num_images=[1, 0, 0] + [1] * 4).groups[1:3] == ["row 1", "row 2"]
    torch.testing.assert_close(read.posterior[0], read.prior[0])
    colors = torch.tensor([0, 1, 2, 0, 2, 1, 1])
    written = torch.nn.functional.one_hot(colors, 4).float()[:, None].repeat(1, 2, 1)
    model.train()
    answers = ask(model, processor, rows, questions, {"own": read.prior[0], "written": written, "off": None}, 3, 1)
    assert model.training
    assert answers["own"].texts == golds(rows)
    assert answers["written"].texts == [list(COLORS)[color] for color in colors]
    better = answers["own"].log_prob > answers["written"].log_prob
    assert better.tolist() == [a != b for a, b in zip(answers["own"].texts, answers["written"].texts)]
    assert not set(answers["off"].texts) & set(COLORS) and answers["off"].log_prob.shape == (7,)
