"""FlashAttention-2's two functions in plain torch, for a machine that has no GPU to run the kernels on.

What is real is all of transformers' code around them: how masks become lengths, and what is unpadded and padded. The
functions follow the documentation of flash-attn 2.8: the causal mask is aligned to the bottom right, a window counts from
there, a row of queries that sees nothing gives zeros.

Shapes: B batch, N queries, S keys, H heads, G key heads, D head size, T tokens of all sequences.
"""

import torch
from transformers import PreTrainedModel, modeling_flash_attention_utils


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
    """Attention of queries `(B, N, H, D)` over keys and values `(B, S, G, D)`; returns `(B, N, H, D)`."""
    assert dropout_p == 0.0, "The tests run without dropout."
    num_queries, num_keys = q.shape[1], k.shape[1]
    k, v = (tensor.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for tensor in (k, v))
    scores = torch.einsum("bnhd,bshd->bhns", q, k) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(num_keys) - (torch.arange(num_queries)[:, None] + num_keys - num_queries)  # (N, S)
    left, right = window_size
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool)
    if causal or right >= 0:
        seen &= distance <= (0 if causal else right)
    if left >= 0:
        seen &= distance >= -left
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhns,bshd->bnhd", weights, v)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
):
    """The same over sequences laid end to end: queries `(T, H, D)`, cumulated lengths `(B + 1,)`."""
    outputs = []
    for row in range(len(cu_seqlens_q) - 1):
        queries = slice(int(cu_seqlens_q[row]), int(cu_seqlens_q[row + 1]))
        keys = slice(int(cu_seqlens_k[row]), int(cu_seqlens_k[row + 1]))
        settings = dropout_p, softmax_scale, causal, window_size, softcap
        outputs.append(flash_attn_func(q[None, queries], k[None, keys], v[None, keys], *settings)[0])
    return torch.cat(outputs)


def install(monkeypatch):
    """Lets `attn_implementation="flash_attention_2"` run the functions above until the end of the test."""
    utils = modeling_flash_attention_utils
    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_pad_fn", "_unpad_fn"):
        monkeypatch.setattr(utils, name, getattr(utils, name))  # put back afterwards, the import below fills them
    monkeypatch.setattr(utils, "_loaded_implementation", None)
    monkeypatch.setattr(
        utils,
        "_lazy_imports",
        lambda *args, **kwargs: (
            flash_attn_func,
            flash_attn_varlen_func,
            None,
            utils._pad_input,
            utils._unpad_input,
        ),
    )
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *args, **kwargs: True)
