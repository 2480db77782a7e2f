"""Runs every test over a dataset: latents read once, then one pass of questions for all interventions.

Shapes: N rows, K latent slots, Z latent size, D model size.
"""

from collections import Counter
from dataclasses import asdict

import numpy as np
import torch

from modeling_amvl.latents_amvl import sample_latents

from ..evaluation import answer_questions
from ..evaluation.scores import paired_difference
from .asking import ask, read_latents, read_token_states
from .interventions import (
    NO_PARTNER,
    change,
    cost_by_kind,
    derange,
    first_slot_repeated,
    first_slots,
    gaussian_noise,
    matched_norm_noise,
    only_slot,
    same_latents,
    shared_mean,
    swapped,
    zero,
)
from .leakage import copying, divergence, norm_ratio
from .questions import is_right, read_letter, read_questions, with_wrong_answers
from .structure import cosines, probe, relative_distance, typical_distance
from .verdict import decide


TEMPERATURES = (0.2, 0.5, 1.0, 1.5)
NUM_NOISE_SEEDS = 3
NUM_REFERENCE_ROWS = (
    100  # whose tokens are compared; every layer's states of a batch are held, so batches are small, too
)


def diagnose(model, processor, rows, controls=None, batch_size=64, seed=0, max_new_tokens=16, num_sweep_rows=256):
    """
    Whether the latents of a model are used.

    Args:
        model ([`AMVLForConditionalGeneration`]), processor ([`AMVLProcessor`]): of a checkpoint.
        rows (`datasets.Dataset`): questions as [`AMVLDataCollator`] takes them; `choices`, `kind` and `source` are read where
            there are any.
        controls (`dict[str, list[str]]`, *optional*): answers of other models to the same rows, by name, see [`ask_control`].
        batch_size (`int`, defaults to 64), max_new_tokens (`int`, defaults to 16): of generation.
        seed (`int`, defaults to 0): of partners, noise, wrong answers, folds and bootstrap.
        num_sweep_rows (`int`, defaults to 256): the first rows, on which temperature and number of slots are varied.

    Returns:
        `tuple[dict, dict]`: the diagnosis, of which JSON can be made; and what relevance maps need: `questions`, `latents`
        `(N, K, Z)` and `partners` `(N,)`.

    Raises:
        ValueError: rows that cannot be asked, fewer than two, or answers longer than `max_new_tokens`; before the model runs.
    """
    questions = read_questions(rows)
    check_questions(questions, processor, max_new_tokens)
    wrong = with_wrong_answers(questions, seed)
    read = read_latents(model, processor, rows, questions, batch_size, wrong)
    latents, num_slots = read.prior[0], read.prior[0].shape[1]
    alike = same_latents(latents)
    partners = derange(alike, seed=seed)
    same_question = derange(read.images, [question.text for question in questions], seed)
    same_question[alike[same_question] == alike] = NO_PARTNER

    arms = interventions(latents, partners, same_question, seed)
    arms |= {"latents off": None, "posterior": read.posterior[0], "wrong posterior": read.wrong_posterior[0]}
    answers = ask(model, processor, rows, questions, arms, batch_size, max_new_tokens)
    own = answers["own"]
    kept = {
        "swapped": (partners != NO_PARTNER).nonzero()[:, 0].tolist(),
        "swapped, same question": (same_question != NO_PARTNER).nonzero()[:, 0].tolist(),
    }
    groups = read.groups
    changes = {name: change(own, answers[name], questions, kept.get(name), seed, groups) for name in arms}
    changes = {name: None if found is None else asdict(found) for name, found in changes.items()}
    right = {name: [is_right(text, q) for text, q in zip(answers[name].texts, questions)] for name in arms}
    says_wrong = {
        name: [is_right(text, other) for text, other in zip(answers[name].texts, wrong)]
        for name in ("own", "wrong posterior")
    }
    numbers = {
        "num_rows": len(questions),
        "baselines": baselines(questions),
        "changes": changes,
        "copying": copying(says_wrong["wrong posterior"], says_wrong["own"], seed, groups),
        "controls": {
            name: compare_control(texts, right["own"], questions, seed, groups)
            for name, texts in (controls or {}).items()
        },
    }
    diagnosis = {
        "verdict": decide(numbers),
        **numbers,
        "num_unparsed": sum(
            q.letter is not None and read_letter(text, q) is None for text, q in zip(own.texts, questions)
        ),
        "by_kind": by_kind(right, questions, kept["swapped"], seed, groups),
        "nll": {name: -float(answers[name].log_prob.mean()) for name in ("own", "posterior", "latents off")},
        "divergence": divergence(read.prior, read.posterior),
        "norm_ratio": embedded_norm_ratio(model, latents),
        "structure": structure(model, processor, rows, questions, latents, batch_size),
        "sensitivity": sensitivity(model, processor, rows, questions, read, partners, batch_size, seed),
        "probe": {
            name: probe(part[0], [question.gold for question in questions], groups, seed)
            for name, part in (("prior", read.prior), ("posterior", read.posterior))
        },
        "sweeps": sweeps(model, processor, rows, questions, read, num_sweep_rows, batch_size, max_new_tokens, seed),
        "num_latents": num_slots,
    }
    return diagnosis, {"questions": questions, "latents": latents, "partners": partners}


def check_questions(questions, processor, max_new_tokens):
    """Refuses a dataset that cannot be diagnosed, before the model runs."""
    if len(questions) < 2:
        raise ValueError(
            f"A diagnosis needs at least two rows, got {len(questions)}: name other data or raise `max_rows`."
        )
    lengths = [len(processor.tokenizer(q.gold, add_special_tokens=False)["input_ids"]) for q in questions]
    if max(lengths) > max_new_tokens:
        row = int(np.argmax(lengths))
        raise ValueError(
            f"`max_new_tokens` is {max_new_tokens}, but the answer of row {row} has {max(lengths)} tokens and could never be right: "
            "raise it."
        )


def interventions(latents, partners, same_question, seed=0):
    """
    Every intervention on the rows' own Z, `(N, K, Z)` by name, `own` first.

    Those that change nothing where there is one slot are left out there.
    """
    arms = {
        "own": latents,
        "swapped": swapped(latents, partners),
        "swapped, same question": swapped(latents, same_question),
        "shared mean": shared_mean(latents),
        "zero": zero(latents),
        "matched-norm noise": matched_norm_noise(latents, seed),
        "Gaussian noise": gaussian_noise(latents, seed),
    }
    num_slots = latents.shape[1]
    if num_slots > 1:
        arms["first slot repeated"] = first_slot_repeated(latents)
        arms |= {f"slot {slot + 1} alone": only_slot(latents, slot) for slot in range(num_slots)}
    return arms


def by_kind(right, questions, kept, seed, groups):
    """What a swap costs by kind, on the rows that have a partner; `None` where none has."""
    if not kept:
        return None
    own, other, kinds = (
        [side[row] for row in kept] for side in (right["own"], right["swapped"], [q.kind for q in questions])
    )
    return cost_by_kind(own, other, kinds, seed, [groups[row] for row in kept])


def ask_control(model, processor, rows, batch_size=64, max_new_tokens=16):
    """Answers of a control, a stock model or an AMVL model with its prior's Z."""
    source = "prior" if model.config.model_type == "amvl" else "no_latents"
    return answer_questions(model, processor, rows, source, batch_size, max_new_tokens, description="Asking a control")


def compare_control(texts, own_right, questions, seed=0, groups=None):
    """A control's accuracy, and its difference from the model's own, paired."""
    right = [float(is_right(text, question)) for text, question in zip(texts, questions)]
    return {"accuracy": float(np.mean(right)), **paired_difference(own_right, right, groups, seed)}


def baselines(questions):
    """
    What needs no look at the picture.

    Returns:
        `dict`: `constant`, always the answer that is most frequent among the rows of a kind, and `chance`, `None` where some
        question has no options; in 0..1, mean over rows.
    """
    counts = {}
    for question in questions:
        counts.setdefault(question.kind, Counter())[question.gold] += 1
    constant = sum(max(counter.values()) for counter in counts.values()) / len(questions)
    closed = all(question.options for question in questions)
    chance = float(np.mean([1 / len(question.options) for question in questions])) if closed else None
    return {"constant": constant, "chance": chance}


@torch.no_grad()
def embedded_norm_ratio(model, latents):
    return norm_ratio(model.embed_latents(latents.to(model.device)), model.typical_embedding_norm())


@torch.no_grad()
def structure(model, processor, rows, questions, latents, batch_size):
    """Cosines of Z, of Z as it enters the decoder, and of text and image tokens beside them, where those can be told apart."""
    named = {"Z": latents, "Z, embedded": model.embed_latents(latents.to(model.device)).float().cpu()}
    named |= read_token_states(
        model, processor, rows, questions[:NUM_REFERENCE_ROWS], latents.shape[1], max(1, batch_size // 16)
    )
    return {name: cosines(vectors) for name, vectors in named.items() if len(vectors) > 1}


def sensitivity(model, processor, rows, questions, read, partners, batch_size, seed):
    """
    How far Z moves when a row gets another row's image, or another row's question, over the distance between rows.

    Returns:
        `dict[str, dict]`: `image` and `text`, each with `distance` (see [`relative_distance`]) and `num_rows`; `None` where no two
        rows can be exchanged, or all rows have one Z.
    """
    found = {}
    for name, labels in (("image", read.images), ("text", [question.text for question in questions])):
        others = derange(labels, read.num_images, seed)
        exchanged = (others != NO_PARTNER).nonzero()[:, 0]
        if not len(exchanged) or bool((partners == NO_PARTNER).all()):
            found[name] = None
            continue
        from_image = exchanged if name == "text" else others[exchanged]
        from_text = exchanged if name == "image" else others[exchanged]
        changed = read_latents(
            model,
            processor,
            rows,
            [questions[row] for row in from_text],
            batch_size,
            posterior=False,
            image_from=from_image,
        ).prior[0]
        found[name] = {
            "distance": relative_distance(
                read.prior[0][exchanged], changed, typical_distance(read.prior[0], partners)
            ),
            "num_rows": len(exchanged),
        }
    return found


def sweeps(model, processor, rows, questions, read, num_rows, batch_size, max_new_tokens, seed):
    """
    Accuracy over the temperature of the latents, and over the number of slots kept.

    Returns:
        `dict[str, list[dict]]`: `temperature` and `slots_kept`, each point with `at`, `accuracy`, and `difference`, `low` and
        `high` against the prior's mean in all slots; a temperature is a mean over noise seeds, row by row.
    """
    questions = questions[:num_rows]
    mean, log_variance = (part[: len(questions)] for part in read.prior)
    arms = {("own", 0): mean}
    for temperature in TEMPERATURES:
        for number in range(NUM_NOISE_SEEDS):
            generator = torch.Generator().manual_seed(seed + number)
            arms["temperature", temperature, number] = sample_latents(mean, log_variance, temperature, generator)
    for num_kept in range(mean.shape[1]):
        arms["slots_kept", num_kept, 0] = first_slots(read.prior[0], num_kept)[: len(questions)]
    answers = ask(model, processor, rows, questions, arms, batch_size, max_new_tokens, with_log_prob=False)
    right = {
        arm: np.asarray([is_right(text, q) for text, q in zip(answers[arm].texts, questions)], dtype=float)
        for arm in arms
    }
    own, groups = right["own", 0], read.groups[: len(questions)]

    def point(at, scores):
        return {"at": at, "accuracy": float(scores.mean()), **paired_difference(own, scores, groups, seed)}

    return {
        "num_rows": len(questions),
        "temperature": [point(0.0, own)]
        + [
            point(at, np.mean([right["temperature", at, number] for number in range(NUM_NOISE_SEEDS)], axis=0))
            for at in TEMPERATURES
        ],
        "slots_kept": [point(at, right["slots_kept", at, 0]) for at in range(mean.shape[1])]
        + [point(mean.shape[1], own)],
    }
