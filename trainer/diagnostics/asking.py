"""Runs the model over a dataset: reads its latents, and asks its questions with latents that were made elsewhere.

Shapes: N rows, B batch, K latent slots, Z latent size.
"""

import hashlib
from dataclasses import dataclass

import torch

from ..bars import bar
from ..collator import AMVLDataCollator
from ..evaluation.answering import evaluating


@dataclass
class Latents:
    """
    What a model makes of a dataset; on the CPU, fp32.

    Args:
        prior, posterior, wrong_posterior (`tuple[torch.Tensor, torch.Tensor]`, *optional*): mean and log-variance, each
            `(N, K, Z)`; the last has read a wrong answer.
        images (`list[str]`): a fingerprint of each row's images.
        num_images (`list[int]`): how many each row has.
    """

    prior: tuple
    images: list
    num_images: list
    posterior: tuple | None = None
    wrong_posterior: tuple | None = None

    @property
    def groups(self):
        """What is drawn together in a bootstrap: the image of each row, or the row where it has none."""
        return [
            image if number else f"row {row}" for row, (image, number) in enumerate(zip(self.images, self.num_images))
        ]


@dataclass
class Answers:
    """
    What a model says under one choice of latents.

    Args:
        texts (`list[str]`): greedy answers, stripped.
        log_prob (`torch.Tensor`, *optional*): `(N,)`, log p(gold | x, Z) in nats, the end of the turn included.
    """

    texts: list
    log_prob: torch.Tensor | None = None


def batches(model, processor, rows, questions, batch_size, description, image_from=None):
    """
    The batches of a dataset on the model's device.

    Args:
        rows (`datasets.Dataset`): whose images are read.
        questions (`list[Question]`): of the rows.
        description (`str` or `None`): of the progress bar; `None` shows none.
        image_from (`Sequence[int]`, *optional*): the row whose images a row gets, its own by default.

    Yields:
        `tuple`: the indices of the rows as a slice, their images, the prompt's inputs, and the two of the completion.
    """
    collator = AMVLDataCollator(processor, allow_text_only=True)
    for start in bar(range(0, len(questions), batch_size), desc=description, leave=False, disable=description is None):
        indices = range(start, min(start + batch_size, len(questions)))
        images = [_images_of(rows[index if image_from is None else int(image_from[index])]) for index in indices]
        batch = collator(
            [
                {"images": pictures, "prompt": questions[index].prompt, "completion": questions[index].completion}
                for index, pictures in zip(indices, images)
            ]
        )
        batch = {key: value.to(model.device) for key, value in batch.items()}
        completion = {name: batch.pop(name) for name in ("completion_ids", "completion_mask")}
        yield slice(indices.start, indices.stop), images, batch, completion


def _images_of(row):
    images = row.get("image") if row.get("images") is None else row["images"]
    return [] if images is None else images if isinstance(images, list) else [images]


def read_latents(model, processor, rows, questions, batch_size=64, wrong=None, posterior=True, image_from=None):
    """
    Prior and posterior of every row.

    Args:
        model ([`AMVLForConditionalGeneration`]), processor ([`AMVLProcessor`]): of a checkpoint.
        rows (`datasets.Dataset`), questions (`list[Question]`): see [`batches`].
        batch_size (`int`, defaults to 64): rows at a time.
        wrong (`list[Question]`, *optional*): the questions with a wrong answer, for a posterior that reads it.
        posterior (`bool`, defaults to `True`): read the posterior, too.
        image_from (`Sequence[int]`, *optional*): see [`batches`].

    Returns:
        [`Latents`].
    """
    parts = {"prior": [], "posterior": [], "wrong_posterior": []}
    fingerprints, num_images = [], []
    others = None
    if wrong is not None:
        others = batches(model, processor, rows, wrong, batch_size, None)
    with evaluating(model):
        for _, images, batch, completion in batches(
            model, processor, rows, questions, batch_size, "Reading latents", image_from
        ):
            fingerprints += [_fingerprint(pictures) for pictures in images]
            num_images += [len(pictures) for pictures in images]
            parts["prior"].append(model.prior(**batch))
            if posterior:
                parts["posterior"].append(model.posterior(**batch, **completion))
            if others is not None:
                _, _, batch, completion = next(others)
                parts["wrong_posterior"].append(model.posterior(**batch, **completion))
    joined = {
        name: tuple(
            torch.cat([getattr(one, part).float().cpu() for one in found]) for part in ("mean", "log_variance")
        )
        for name, found in parts.items()
        if found
    }
    return Latents(images=fingerprints, num_images=num_images, **joined)


def _fingerprint(images):
    digest = hashlib.blake2b(digest_size=16)
    for image in images:
        digest.update(repr(image.size).encode() + image.convert("RGB").tobytes())
    return digest.hexdigest()


def ask(model, processor, rows, questions, arms, batch_size=64, max_new_tokens=16, with_log_prob=True):
    """
    Greedy answers and log p(gold) under each of several choices of latents, with all else fixed.

    Args:
        arms (`dict[str, torch.Tensor | None]`): `(N, K, Z)` by name; `None` switches the latents off.
        max_new_tokens (`int`, defaults to 16): of an answer.
        with_log_prob (`bool`, defaults to `True`): also score the gold answers.

    Returns:
        `dict[str, Answers]`: by name.
    """
    texts, log_probs = {name: [] for name in arms}, {name: [] for name in arms}
    settings = dict(max_new_tokens=max_new_tokens, do_sample=False)
    with evaluating(model):
        for place, _, batch, completion in batches(model, processor, rows, questions, batch_size, "Asking"):
            for name, latents in arms.items():
                latents = None if latents is None else latents[place].to(model.device)
                if latents is None:
                    sequences = model.backbone.generate(**batch, **settings)
                else:
                    sequences = model.generate(**batch, **settings, latents=latents)
                answers = processor.batch_decode(sequences[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
                texts[name] += [answer.strip() for answer in answers]
                if with_log_prob:
                    log_probs[name].append(model.log_prob(**batch, **completion, latents=latents).sum(1).float().cpu())
    return {name: Answers(texts[name], torch.cat(log_probs[name]) if with_log_prob else None) for name in arms}


def read_token_states(model, processor, rows, questions, num_tokens, batch_size=64):
    """
    States of the prompt's tokens, a reference for the latents: as tokens enter the language model, and after its last layer.

    Args:
        questions (`list[Question]`): of the first rows.
        num_tokens (`int`): T, tokens of a row, evenly spread over its text and over its images.

    Returns:
        `dict[str, torch.Tensor]`: `(N, T, D)` by name, over the rows that have as many tokens. Nothing for a backbone whose states
        do not line up with its tokens, and no image tokens where the processor names none.
    """
    image_token = getattr(processor, "image_token", None)
    image_id = None if image_token is None else processor.tokenizer.convert_tokens_to_ids(image_token)
    states = {}
    with evaluating(model):
        for _, _, batch, _ in batches(model, processor, rows, questions, batch_size, "Reading tokens"):
            hidden = getattr(model.backbone(**batch, output_hidden_states=True), "hidden_states", None)
            ids = batch["input_ids"]
            if not hidden or hidden[0].shape[:2] != ids.shape:
                return {}
            is_image = torch.zeros_like(ids, dtype=torch.bool) if image_id is None else ids == image_id
            attended = batch["attention_mask"].bool()
            for kind, mask in (("text tokens", attended & ~is_image), ("image tokens", attended & is_image)):
                for row in range(len(ids)):
                    places = mask[row].nonzero()[:, 0]
                    if len(places) < num_tokens:
                        continue
                    places = places[
                        torch.linspace(0, len(places) - 1, num_tokens, device=places.device).round().long()
                    ]
                    for where, layer in (("at the input", hidden[0]), ("after the last layer", hidden[-1])):
                        states.setdefault(f"{kind}, {where}", []).append(layer[row, places].float().cpu())
    return {name: torch.stack(found) for name, found in states.items()}
