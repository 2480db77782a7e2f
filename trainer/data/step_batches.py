"""What a process gets of each step: one order for all processes, cut into steps, and each step into batches."""

from itertools import pairwise

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import BatchRebalanceSampler, get_length_grouped_indices


BY_LENGTH = ("group_by_length", "batch_rebalance")


def split_step(rows, num_groups, even=False):
    """
    Cuts the rows of a step into consecutive groups whose lengths differ by one at most.

    Args:
        rows (`list`): at least one.
        num_groups (`int`): how many groups; where there are fewer rows, they are repeated from the first on.
        even (`bool`, defaults to `False`): repeat rows until all groups are of one length.

    Returns:
        `list[list]`: none of them empty.
    """
    num_rows = max(len(rows), num_groups)
    if even:
        num_rows += -num_rows % num_groups
    rows = [rows[index % len(rows)] for index in range(num_rows)]
    return [rows[start:stop] for start, stop in pairwise(num_rows * g // num_groups for g in range(num_groups + 1))]


class StepBatches(Sampler):
    """
    The batches of row numbers of one process.

    A step takes the next rows of the epoch's order, however they are split into batches and over processes; the last one takes
    what is left, in as few batches as hold it, and the loss weighs each of its rows as in any other step.

    Args:
        order (`Callable`): gives the epoch's row numbers from its number.
        num_rows (`int`): of an epoch.
        batch_size (`int`): rows of a batch.
        num_batches (`int`): batches of a process in a step.
        num_ranks (`int`): processes.
        rank (`int`): which of them this is.
        drop_last (`bool`, defaults to `False`): leave out what is no whole step.
    """

    def __init__(self, order, num_rows, batch_size, num_batches, num_ranks, rank, drop_last=False):
        self.order, self.num_rows, self.num_batches = order, num_rows, num_batches
        self.num_ranks, self.rank = num_ranks, rank
        self.rows_per_step = batch_size * num_batches * num_ranks
        num_left = 0 if drop_last else num_rows % self.rows_per_step
        self.num_last_batches = -(-num_left // (batch_size * num_ranks))
        self.epoch = 0

    def __len__(self):
        return self.num_rows // self.rows_per_step * self.num_batches + self.num_last_batches

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = self.order(self.epoch)
        for start in range(0, self.num_rows, self.rows_per_step):
            rows = order[start : start + self.rows_per_step]
            is_whole = len(rows) == self.rows_per_step
            if num_batches := self.num_batches if is_whole else self.num_last_batches:
                yield from split_step(rows, num_batches * self.num_ranks)[self.rank :: self.num_ranks]


def step_batches(strategy, num_rows, lengths, seed, batch_size, num_batches, num_ranks, rank, drop_last=False):
    """
    The batches of one process in the order that transformers' `train_sampling_strategy` names, from seed and epoch alone.

    Args:
        strategy (`str`): `"random"`, `"sequential"`, `"group_by_length"` (steps of rows of about one length) or `"batch_rebalance"`
            (the steps of `"random"`, each split into batches of about one cost).
        num_rows (`int`): of an epoch.
        lengths (`list[int]` or `None`): tokens of each row, for the last two.
        seed (`int`): of the order.
        batch_size, num_batches, num_ranks, rank, drop_last: as in [`StepBatches`].

    Returns:
        `Sampler`: of lists of row numbers.

    Raises:
        ValueError: `drop_last` leaves nothing.
    """
    rows_per_step = batch_size * num_batches * num_ranks
    if drop_last and num_rows < rows_per_step:
        raise ValueError(
            f"`dataloader_drop_last=True` leaves none of the {num_rows} rows, since a step takes {rows_per_step}: set it to "
            "`False`."
        )
    if strategy == "batch_rebalance":
        return BatchRebalanceSampler(
            lengths, rows_per_step, num_ranks, num_batches, seed=seed, rank=rank, drop_last=drop_last
        )

    def order(epoch):
        generator = torch.Generator().manual_seed(seed + epoch)
        if strategy == "sequential":
            return list(range(num_rows))
        if strategy == "group_by_length":
            return get_length_grouped_indices(lengths, rows_per_step, generator=generator)
        return torch.randperm(num_rows, generator=generator).tolist()

    return StepBatches(order, num_rows, batch_size, num_batches, num_ranks, rank, drop_last)
