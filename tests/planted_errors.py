"""Errors put in on purpose, into the shared plan and below it, to see that the comparisons notice them."""

import functools

import torch

from modeling_amvl import branching_amvl


def plant_leak(monkeypatch):
    """Every branch writes into the prompt's own cache, whose length still reads as that of the prompt."""
    thaw, freeze = branching_amvl.thaw_cache, branching_amvl.freeze_cache

    def thaw_cache(frozen):
        cache = thaw(frozen)
        for layer in cache.layers:
            layer.update = functools.partial(_overwriting_update, layer)
        return cache

    def freeze_cache(cache):
        return cache if cache.get_seq_length() else freeze(cache)  # empty before the prompt's own forward

    monkeypatch.setattr(branching_amvl, "thaw_cache", thaw_cache)
    monkeypatch.setattr(branching_amvl, "freeze_cache", freeze_cache)


def _overwriting_update(layer, keys, values, *args, **kwargs):
    """Appends, and leaves a trace of the branch in the prompt's last position."""
    outputs = torch.cat([layer.keys, keys], dim=-2), torch.cat([layer.values, values], dim=-2)
    layer.keys = torch.cat([layer.keys[..., :-1, :], keys[..., -1:, :]], dim=-2)
    layer.values = torch.cat([layer.values[..., :-1, :], values[..., -1:, :]], dim=-2)
    return outputs


def plant_shifted_positions(monkeypatch):
    """Every branch starts one position late."""
    native = branching_amvl.SharedPrompt._extended

    def shifted(self, *args):
        ids, model_kwargs = native(self, *args)
        positions = model_kwargs["position_ids"].clone()
        positions[..., self.length :] += 1
        return ids, model_kwargs | {"position_ids": positions}

    monkeypatch.setattr(branching_amvl.SharedPrompt, "_extended", shifted)


def plant_skipped_injection(monkeypatch):
    """The decoder reads the placeholders' own embeddings instead of the latents."""
    native = branching_amvl.SharedPrompt.branch

    def branch(self, ids, mask, latents=None, num_predicted=0):
        return native(self, ids, mask, None, num_predicted)

    monkeypatch.setattr(branching_amvl.SharedPrompt, "branch", branch)


def plant_bidirectional_attention(monkeypatch):
    """Every token sees every other, in both plans and the bare backbone."""
    native = torch.nn.functional.scaled_dot_product_attention

    def bidirectional(query, key, value, attn_mask=None, is_causal=False, **kwargs):
        return native(query, key, value, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", bidirectional)


# What the self-test says of each error in the shared plan.
PLANTED = {
    "leak": (plant_leak, "cache is not the same after its branches"),
    "shifted": (plant_shifted_positions, "the prior differs by"),
    "skipped": (plant_skipped_injection, "the gradient differs by"),
}
