"""What a process gets of each step: one order for all processes, cut into steps, and each step into batches."""

from itertools import pairwise

from torch.utils.data import Sampler


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
