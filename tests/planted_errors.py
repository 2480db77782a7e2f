"""Errors put in on purpose, into the shared plan and below it, to see that the comparisons notice them."""

import torch

from modeling_amvl import branching_amvl


def plant_leak(monkeypatch):
    """Every branch leaves its trace in the prompt's own cache, whatever that holds; its length stays."""
    native = branching_amvl.SharedPrompt.branch

    def branch(self, *args, **kwargs):
        outputs = native(self, *args, **kwargs)
        for layer in self.cache.layers:
            for name, value in vars(layer).items():
                setattr(layer, name, _traced(value))
        return outputs

    monkeypatch.setattr(branching_amvl.SharedPrompt, "branch", branch)


def _traced(value):
    if isinstance(value, dict):  # of conv and recurrent states
        return {key: _traced(item) for key, item in value.items()}
    return value * 1.1 if torch.is_tensor(value) and value.is_floating_point() else value


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
    "shifted": (plant_shifted_positions, "the posterior differs by"),
    "skipped": (plant_skipped_injection, "the gradient differs by"),
}
