"""Asks a model questions, by greedy generation."""

import time
from contextlib import contextmanager

import torch

from ..bars import bar
from ..collator import AMVLDataCollator
from .letters import draw_latents, letter_log_probs


# Where the latents of an answer come from. `posterior` reads the right answer: an upper bound, and a test of leakage.
LATENT_SOURCES = ("prior", "posterior", "no_latents")


@contextmanager
def evaluating(model):
    """In evaluation mode, without gradients; the training mode comes back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def answer_questions(
    model, processor, rows, source="prior", batch_size=64, max_new_tokens=16, description="Answering"
):
    """
    Greedy answers to the prompts of a dataset.

    Args:
        model ([`AMVLForConditionalGeneration`] or a stock model): put into evaluation mode while it answers.
        processor ([`AMVLProcessor`]): pads on the left.
        rows (`datasets.Dataset`): rows as [`AMVLDataCollator`] takes them; their answers are read by `posterior` alone.
        source (`"prior"`, `"posterior"` or `"no_latents"`, defaults to `"prior"`): where the latents come from, their
            means. A stock model has `"no_latents"` only.
        batch_size (`int`, defaults to 64), max_new_tokens (`int`, defaults to 16): of generation.
        description (`str`): of the progress bar.

    Returns:
        `list[str]`: one answer per row, stripped.
    """
    if source not in LATENT_SOURCES:
        raise ValueError(f"`source` must be one of {LATENT_SOURCES}, got {source!r}.")
    has_latents = model.config.model_type == "amvl"
    if source != "no_latents" and not has_latents:
        raise ValueError(f"`source={source!r}` needs an AMVL model, got a `{type(model).__name__}`: use 'no_latents'.")
    with evaluating(model):
        return _answers(model, processor, rows, source, has_latents, batch_size, max_new_tokens, description)


def _answers(model, processor, rows, source, has_latents, batch_size, max_new_tokens, description):
    collator, answers = AMVLDataCollator(processor, allow_text_only=True), []
    for start in bar(range(0, len(rows), batch_size), desc=description, leave=False):
        indices = range(start, min(start + batch_size, len(rows)))
        batch = {key: value.to(model.device) for key, value in collator([rows[index] for index in indices]).items()}
        completion = {name: batch.pop(name) for name in ("completion_ids", "completion_mask")}
        settings = dict(max_new_tokens=max_new_tokens, do_sample=False)
        if source == "no_latents":
            decoder = model.backbone if has_latents else model
            sequences = decoder.generate(**batch, **settings)
        else:
            latents = model.posterior(**batch, **completion).mean if source == "posterior" else None
            sequences = model.generate(**batch, **settings, latents=latents, latent_temperature=0.0)
        texts = processor.batch_decode(sequences[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        answers.extend(text.strip() for text in texts)
    return answers


@torch.no_grad()
def answer_batch(
    model, processor, questions, numbers, source, temperature=0.0, seed=0, max_new_tokens=512, letter_scores=True
):
    """
    Greedy answers to some questions of a benchmark, with what they cost.

    Args:
        model ([`AMVLForConditionalGeneration`] or a stock model): in evaluation mode.
        processor ([`AMVLProcessor`]): pads on the left.
        questions (`list[Question]`): asked as one batch.
        numbers (`list[int]`): the place of each in the benchmark; seeds its noise, whatever batch it is in.
        source (`"prior"` or `"no_latents"`): where the latents come from.
        temperature (`float`, defaults to 0): of the latents.
        seed (`int`, defaults to 0): of their noise.
        max_new_tokens (`int`, defaults to 512): of generation.
        letter_scores (`bool`, defaults to `True`): also ask for the likelihood of each letter, see [`letter_log_probs`].

    Returns:
        `list[dict]`: `text`, `num_tokens` (with the end of the turn), `seconds` (of generating, shared out over the batch) and
        `letter_scores`, a list in nats or `None`.
    """
    collator = AMVLDataCollator(processor, allow_text_only=True)
    batch = collator([question.row() for question in questions])
    batch = {key: value.to(model.device) for key, value in batch.items() if not key.startswith("completion")}
    settings = dict(max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
    _synchronize(model.device)
    start = time.perf_counter()
    latents = None
    if source == "no_latents":
        decoder = model.backbone if model.config.model_type == "amvl" else model
        sequences = decoder.generate(**batch, **settings)
    elif temperature == 0:
        sequences = model.generate(**batch, **settings, latent_temperature=0.0)
    else:
        latents = draw_latents(model, batch, numbers, temperature, seed)
        sequences = model.generate(**batch, **settings, latents=latents)
    _synchronize(model.device)
    seconds = (time.perf_counter() - start) / len(questions)
    new = sequences[:, batch["input_ids"].shape[1] :]
    texts = processor.batch_decode(new, skip_special_tokens=True)
    scores = [None] * len(questions)
    if letter_scores:
        if source == "prior" and latents is None:
            latents = draw_latents(model, batch, numbers, 0.0, seed)
        num_letters = max(question.num_options for question in questions)
        scores = letter_log_probs(model, processor, batch, latents, num_letters).tolist()
    lengths = _lengths(new, model.generation_config.eos_token_id)
    return [
        {
            "text": text.strip(),
            "num_tokens": length,
            "seconds": round(seconds, 6),
            "letter_scores": row and [round(value, 5) for value in row[: question.num_options]],
        }
        for text, length, row, question in zip(texts, lengths, scores, questions, strict=True)
    ]


def _synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _lengths(new, eos_token_id):
    """Tokens of each row `(B, A)` up to the end of the turn and with it."""
    if eos_token_id is None:
        return [new.shape[1]] * len(new)
    ends = torch.isin(new, torch.as_tensor(eos_token_id, device=new.device))
    first = torch.where(ends.any(1), ends.int().argmax(1) + 1, new.shape[1])
    return first.tolist()
