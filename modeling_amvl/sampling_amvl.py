"""Several latents per prompt: what the prompt left is repeated for each, and their answers are put to a vote.

Shapes: B prompts, n samples of each, R rows of the decoding loop, P prompt, S sequence, K latent slots, Z latent size.
"""

import collections

import torch

from .latents_amvl import draw_noise


def draw_rows(like, num_prompts, num_rows, num_samples, num_beams, generator):
    """
    Noise for the rows of a decoding loop.

    One sample per prompt draws for each row, beams of a prompt apart, which share. Several samples draw n times and all prompts
    take the same noise: what a prompt is answered depends on the seed, never on the batch around it, and the first of n
    samples are those of fewer.

    Args:
        like (`torch.Tensor`): `(*, K, Z)`, for type and place.
        num_prompts (`int`): B.
        num_rows (`int`): R, prompts outermost, beams innermost.
        num_samples (`int`): n.
        num_beams (`int`): rows of a sample.
        generator (`torch.Generator`, *optional*): source of the noise.

    Returns:
        `torch.Tensor`: `(R, K, Z)`.
    """
    if num_samples == 1:
        rows = num_prompts if num_beams > 1 else num_rows
        return draw_noise(like, rows, generator).repeat_interleave(num_rows // rows, dim=0)
    samples = torch.cat([draw_noise(like, 1, generator) for _ in range(num_samples)])  # (n, K, Z)
    return samples.repeat_interleave(num_beams, dim=0).repeat(num_prompts, 1, 1)


def repeat_cache(cache, num_prompts, repeats):
    """
    Gives each of B rows of `cache` `repeats` rows, next to each other, in place.

    As beam search reorders it: `Cache.batch_repeat_interleave` leaves out the states of convolutions and recurrent layers.
    """
    cache.reorder_cache(torch.arange(num_prompts).repeat_interleave(repeats))


def per_prompt(function, num_samples):
    """A `prefix_allowed_tokens_fn` that is asked with the number of the prompt, as without samples."""
    if function is None:
        return None
    return lambda row, ids: function(row // num_samples, ids)


def keep_majority(outputs, prompt_length, num_samples, end_tokens):
    """
    Keeps the most frequent answer to each prompt.

    Args:
        outputs (`torch.LongTensor` or `ModelOutput`): of `generate`, its sequences `(B * n, S)`, prompts outermost.
        prompt_length (`int`): P.
        num_samples (`int`): n.
        end_tokens (`int`, `list[int]` or `torch.Tensor`, *optional*): an answer ends with the first of these; what follows has
            no vote.

    Returns:
        the sequences `(B, S)`; or the outputs with these, `sample_sequences` `(B * n, S)` and `majority_share` `(B,)`.
    """
    end_tokens = [] if end_tokens is None else torch.as_tensor(end_tokens).flatten().tolist()
    if torch.is_tensor(outputs):
        return outputs[vote(outputs[:, prompt_length:], num_samples, end_tokens)[0]]
    sequences = outputs.sequences
    rows, shares = vote(sequences[:, prompt_length:], num_samples, end_tokens)
    outputs["sequences"], outputs["sample_sequences"], outputs["majority_share"] = sequences[rows], sequences, shares
    return outputs


def vote(answers, num_samples, end_tokens):
    """
    The most frequent of n answers; of several equally frequent ones the first drawn.

    Args:
        answers (`torch.LongTensor`): `(B * n, A)`, prompts outermost.
        num_samples (`int`): n.
        end_tokens (`list[int]`): an answer ends with the first of these.

    Returns:
        `tuple`: the rows `(B,)` where the winners were drawn first, and the share `(B,)` of the samples that agree with them.
    """
    ended = [_until(answer, end_tokens) for answer in answers.tolist()]
    rows, shares = [], []
    for start in range(0, len(ended), num_samples):
        of_prompt = ended[start : start + num_samples]
        winner, count = collections.Counter(of_prompt).most_common(1)[0]  # of equals the first it met
        rows.append(start + of_prompt.index(winner))
        shares.append(count / num_samples)
    return torch.tensor(rows, device=answers.device), torch.tensor(shares, device=answers.device)


def _until(answer, end_tokens):
    ends = [answer.index(token) for token in end_tokens if token in answer]
    return tuple(answer[: min(ends)] if ends else answer)
