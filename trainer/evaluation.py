"""Asks a model the questions of a dataset, by greedy generation, and scores the answers word for word."""

from collections import defaultdict

import torch
from tqdm.auto import tqdm

from .collator import AMVLDataCollator


# Where the latents of an answer come from. `posterior` reads the right answer: an upper bound, and a test of leakage.
LATENT_SOURCES = ("prior", "posterior", "no_latents")


@torch.no_grad()
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
    training = model.training
    model.eval()
    try:
        return _answers(model, processor, rows, source, has_latents, batch_size, max_new_tokens, description)
    finally:
        model.train(training)


def _answers(model, processor, rows, source, has_latents, batch_size, max_new_tokens, description):
    collator, answers = AMVLDataCollator(processor, allow_text_only=True), []
    for start in tqdm(range(0, len(rows), batch_size), desc=description, leave=False):
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


def accuracy_by_kind(answers, gold, kinds):
    """
    Share of answers that equal the gold text, per kind.

    Args:
        answers (`list[str]`), gold (`list[str]`), kinds (`list[str]`): one entry per row.

    Returns:
        `dict[str, float]`: by kind in order of appearance, and `"mean"`, the unweighted mean over kinds.
    """
    hits = defaultdict(list)
    for answer, right, kind in zip(answers, gold, kinds, strict=True):
        hits[kind].append(answer == right.strip())
    scores = {kind: sum(values) / len(values) for kind, values in hits.items()}
    return {**scores, "mean": sum(scores.values()) / len(scores)}


def format_table(columns, row_names):
    """
    A table of scores as Markdown, aligned for a terminal.

    Args:
        columns (`dict[str, dict[str, float]]`): scores in 0..1 by column and row.
        row_names (`list[str]`): rows in their order.

    Returns:
        `str`: scores in per cent.
    """
    first = max(len("kind"), *map(len, row_names))
    widths = {name: max(len(name), 5) for name in columns}
    lines = [
        f"| {'kind':<{first}} | " + " | ".join(f"{name:>{widths[name]}}" for name in columns) + " |",
        f"|{'-' * (first + 2)}|" + "|".join("-" * (widths[name] + 1) + ":" for name in columns) + "|",
    ]
    for row in row_names:
        cells = (f"{100 * column[row]:>{widths[name]}.1f}" for name, column in columns.items())
        lines.append(f"| {row:<{first}} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
