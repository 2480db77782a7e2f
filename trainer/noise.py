"""The noise of the latents in a training step: the same however a step's rows are shared out over batches and devices."""

import numpy as np
import torch


def row_noise(seed, step, first_row, num_rows, num_latents, latent_size):
    """
    Standard normal noise that depends on nothing but the run's seed, the step and a row's place in that step.

    So one device gives the latents that eight give, accumulation those of one batch, and a resumed run those of a run that was
    never cut; the generators that dropout draws from are not touched. Philox is counter-based (Salmon et al. 2011): step and row
    are its counter.

    Args:
        seed (`int`): of the run.
        step (`int`): optimiser steps done.
        first_row (`int`): place of the first row among all rows of the step.
        num_rows (`int`): how many rows follow each other from there, B.
        num_latents (`int`): K.
        latent_size (`int`): Z.

    Returns:
        `torch.Tensor`: `(B, K, Z)`, fp32, on the CPU.
    """
    rows = [
        np.random.Generator(np.random.Philox(key=seed, counter=(0, 0, row, step))).standard_normal(
            (num_latents, latent_size), dtype=np.float32
        )
        for row in range(first_row, first_row + num_rows)
    ]
    return torch.from_numpy(np.stack(rows))
