"""A second reading of what a model answers: how likely each letter is as the start of its answer.

Shapes: B batch, K latent slots, Z latent size, N tokens of a continuation, V vocabulary, O letters.
"""

import numpy as np
import torch

from modeling_amvl.branching_amvl import PLANS
from modeling_amvl.latents_amvl import sample_latents, upcast

from .reply import LETTERS


FORMS = ("{}", "({}", " {}", " ({}")  # as models begin: `B`, and `(B)` as BLINK writes it, also behind a space


def draw_latents(model, batch, numbers, temperature, seed):
    """
    Latents of the prior, each row with noise of its own: the same in every batch and every process.

    Args:
        model ([`AMVLForConditionalGeneration`]): whose prior is read.
        batch (`dict`): prompts as the processor gives them.
        numbers (`list[int]`): a number for each row, which seeds its noise with `seed`.
        temperature (`float`): 0 gives the means.
        seed (`int`): of the noise.

    Returns:
        `torch.Tensor`: `(B, K, Z)`.
    """
    prior = model.prior(**batch)
    if temperature == 0:
        return prior.mean
    # numpy's: torch's generator on the CPU reads 32 bits of its seed only.
    noise = np.stack(
        [np.random.default_rng([seed, number]).standard_normal(prior.mean.shape[1:]) for number in numbers]
    )
    return sample_latents(prior.mean, prior.log_variance, temperature, noise=torch.from_numpy(noise).to(prior.mean))


@torch.no_grad()
def letter_log_probs(model, processor, batch, latents, num_letters):
    """
    log of the probability that an answer starts with a letter, plain or behind a bracket, with a space before or not.

    Args:
        model ([`AMVLForConditionalGeneration`] or a stock model): in evaluation mode.
        processor (`ProcessorMixin`): whose tokenizer writes the letters.
        batch (`dict`): prompts as the processor gives them.
        latents (`torch.Tensor`, *optional*): `(B, K, Z)`; `None` asks the bare backbone.
        num_letters (`int`): O.

    Returns:
        `torch.Tensor`: `(B, O)`, in nats, log(p("B") + p("(B") + p(" B") + p(" (B")), of each way to write it once. The largest among a row's options is its answer.

    Raises:
        ValueError: the tokenizer writes two letters alike.
    """
    batch = dict(batch)
    input_ids, attention_mask = batch.pop("input_ids"), batch.pop("attention_mask", None)
    is_amvl = model.config.model_type == "amvl"
    if is_amvl:
        prompt = model.read_prompt(input_ids, attention_mask, batch)
    else:  # whole forwards, which are exact whatever the model
        prompt = PLANS["full"](model, input_ids, {"attention_mask": attention_mask, **batch}, None)
    written = [
        sorted(
            {tuple(processor.tokenizer(form.format(letter), add_special_tokens=False)["input_ids"]) for form in FORMS}
        )
        for letter in LETTERS[:num_letters]
    ]
    if len({ids for forms in written for ids in forms}) != sum(map(len, written)):
        raise ValueError(
            "`letter_scores` cannot be had: the tokenizer writes several letters alike. Switch them off with "
            "`--letter_scores false`."
        )
    embedded, slots = None, input_ids[:, :0]
    if latents is not None:
        embedded = model.embed_latents(latents)
        slots = input_ids.new_full(latents.shape[:2], model.config.latent_token_id)  # (B, K)
    scores = {}
    for prefix in sorted({ids[:-1] for forms in written for ids in forms}):
        # One branch for all letters behind the same tokens; its last token, which is only predicted, may be any.
        continuation = input_ids.new_tensor([*prefix, written[0][0][-1]]).expand(len(input_ids), -1)
        ids = torch.cat([slots, continuation], dim=1)
        _, logits = prompt.branch(ids, torch.ones_like(ids), embedded, num_predicted=continuation.shape[1])
        log_probs = upcast(logits).log_softmax(-1)  # (B, N, V)
        of_prefix = sum(log_probs[:, place, token] for place, token in enumerate(prefix))
        for forms in written:
            for ids in forms:
                if ids[:-1] == prefix:
                    scores[ids] = of_prefix + log_probs[:, -1, ids[-1]]
    return torch.stack([torch.stack([scores[ids] for ids in forms]).logsumexp(0) for forms in written], dim=1)
