"""AMVL's step, written the slow and obvious way: what the model class is compared with.

Each row alone and without padding, one whole stock forward per distribution, no cache, no plan of `branching_amvl`:
prior from `[x, L]`, posterior from `[x, y, L]`, answer from `[x, z, y]`. Positions are the stock forward's own.

Shapes: A answer, K latent slots, Z latent size, D model size, S sequence, V vocabulary.
"""

import contextlib

import torch
from torch.nn import functional as F

from modeling_amvl.branching_amvl import output_embeddings


@contextlib.contextmanager
def _embeddings_replaced(backbone, start, embedded):
    """The embeddings `(1, S, D)` from position `start` on become `embedded` `(K, D)`."""

    def replace(module, args, output):
        if output.ndim != 3 or output.shape[1] < start + len(embedded):
            return output  # chameleon and emu3 embed the codes of an image by themselves
        output = output.clone()
        output[0, start : start + len(embedded)] = embedded
        return output

    handle = backbone.get_input_embeddings().register_forward_hook(replace)
    yield
    handle.remove()


# Per-token inputs of a prompt, and what they hold for the text that follows; else 0, text.
REPEATS_LAST = ("cross_attention_mask", "image_attention_mask")
ONES = {"paligemma": ("token_type_ids",)}  # 0 is its prompt


def _extended(backbone, name, value, length, total):
    """An input of a prompt of `length` tokens for a sequence of `total`."""
    if not torch.is_tensor(value) or value.shape[:2] != (1, length) or name.startswith("pixel"):
        return value
    if name in REPEATS_LAST:
        more = value[:, -1:].expand(-1, total - length, *[-1] * (value.ndim - 2))
    elif name in ONES.get(backbone.config.model_type, ()):
        more = value.new_ones(1, total - length)
    else:
        more = value.new_zeros(1, total - length)
    return torch.cat([value, more], dim=1)


def _stock_forward(backbone, ids, prompt):
    """Final hidden states `(S, D)` and logits `(S, V)` of one sequence of ids, without a cache."""
    length = prompt["input_ids"].shape[1]
    inputs = {
        name: _extended(backbone, name, value, length, len(ids))
        for name, value in prompt.items()
        if name not in ("input_ids", "attention_mask")
    }
    hidden = []
    handle = output_embeddings(backbone).register_forward_pre_hook(
        lambda module, args: hidden.append(args[0][0, -len(ids) :])  # git puts its image before the ids
    )
    outputs = backbone(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], use_cache=False, **inputs)
    handle.remove()
    return hidden[0], outputs.logits[0, -len(ids) :]


def _distribution(head, hidden, config):
    """Mean and log-variance `(K, Z)` that a head reads off hidden states `(K, D)`."""
    centred = hidden - hidden.mean(-1, keepdim=True)
    normed = centred / (centred.pow(2).mean(-1, keepdim=True) + head.norm.eps).sqrt() * head.norm.weight
    normed = normed + head.norm.bias
    mean = normed @ head.mean.weight.T + head.mean.bias
    raw = normed @ head.log_variance.weight.T + head.log_variance.bias
    below = config.max_log_variance - F.softplus(config.max_log_variance - raw)
    return mean, config.min_log_variance + F.softplus(below - config.min_log_variance)


def reference_row(model, prompt, answer, noise):
    """
    One row of a step.

    Args:
        model (`AMVLForConditionalGeneration`): whose weights are used; its `forward` is not.
        prompt (`dict`): inputs of one prompt, batch size 1, not padded.
        answer (`torch.LongTensor`): `(A,)`.
        noise (`torch.Tensor`): `(K, Z)`, standard normal.

    Returns:
        `dict[str, torch.Tensor]`: means, log-variances and latents `(K, Z)`, logits `(A, V)`, and `losses` `(A,)`.
    """
    config, backbone = model.config, model.backbone
    x = prompt["input_ids"][0]
    placeholders = torch.full((config.num_latents,), config.latent_token_id)

    hidden, _ = _stock_forward(backbone, torch.cat([x, placeholders]), prompt)
    prior_mean, prior_log_variance = _distribution(model.prior_head, hidden[len(x) :], config)

    hidden, _ = _stock_forward(backbone, torch.cat([x, answer, placeholders]), prompt)
    mean, log_variance = _distribution(model.posterior_head, hidden[len(x) + len(answer) :], config)

    latents = mean + (log_variance / 2).exp() * noise
    embedded = latents @ model.latent_projection.weight.T + model.latent_projection.bias
    with _embeddings_replaced(backbone, len(x), embedded):
        _, logits = _stock_forward(backbone, torch.cat([x, placeholders, answer]), prompt)
    logits = logits[len(x) + config.num_latents - 1 : -1]
    return {
        "prior_mean": prior_mean,
        "prior_log_variance": prior_log_variance,
        "posterior_mean": mean,
        "posterior_log_variance": log_variance,
        "latents": latents,
        "logits": logits,
        "losses": F.cross_entropy(logits, answer, reduction="none"),
    }


def reference_step(model, prompts, answers, noise):
    """
    A step over rows of unequal length.

    Args:
        model (`AMVLForConditionalGeneration`).
        prompts (`list[dict]`), answers (`list[torch.LongTensor]`): a row each, see `reference_row`.
        noise (`torch.Tensor`): `(B, K, Z)`.

    Returns:
        `dict`: as `AMVLOutput`; `logits` is a list of `(A_i, V)`.
    """
    rows = [reference_row(model, *row) for row in zip(prompts, answers, noise, strict=True)]
    output = {key: [row[key] for row in rows] for key in rows[0]}
    loss = torch.cat(output.pop("losses")).mean()
    logits = output.pop("logits")
    return {key: torch.stack(values) for key, values in output.items()} | {"loss": loss, "logits": logits}
