"""A stream as batches of rows, in an order that hangs neither on workers nor on processes, its images not decoded yet."""

from itertools import islice

import torch
from torch.utils.data import IterableDataset, get_worker_info

from .step_batches import split_step


READ_AT_ONCE = 16  # rows


class StreamBatches(IterableDataset):
    """
    The batches of one process from a stream that all of them read, images as bytes or paths.

    A step takes the next rows of the stream, however they are split into batches and over processes and workers: each of these
    reads all rows, and passes over those that others take. At the end of a pass a step takes what is left.

    Args:
        stream (`datasets.IterableDataset`): rows.
        batch_size (`int`): rows of a batch.
        num_batches (`int`, defaults to 1): batches of a process in a step.
        num_ranks (`int`, defaults to 1): processes.
        rank (`int`, defaults to 0): which of them this is.
        drop_last (`bool`, defaults to `False`): leave out what is no whole step.
        even (`bool`, defaults to `False`): repeat rows of the last step until its batches are of one length.
        choose (`Callable`, *optional*): makes of all rows those that are wanted.
    """

    def __init__(
        self, stream, batch_size, num_batches=1, num_ranks=1, rank=0, drop_last=False, even=False, choose=iter
    ):
        self.stream = undecoded(stream)
        self.num_groups, self.num_ranks, self.rank = num_batches * num_ranks, num_ranks, rank
        self.rows_per_step = batch_size * self.num_groups
        self.drop_last, self.even, self.choose = drop_last, even, choose
        # Pass; the pass that a resumed run goes on in, and its batches that are done. Workers that persist see it change.
        self._place = torch.zeros(3, dtype=torch.int64).share_memory_()
        self.set_epoch(0)

    def set_epoch(self, epoch):
        self._place[0] = epoch
        # Here and not in each worker: `datasets` adds the difference in memory that workers share, and two at a time add it twice.
        self.stream.set_epoch(epoch)

    def skip(self, epoch, num_batches):
        """Gives, in one pass, so many empty lists in place of its first batches."""
        self._place[1], self._place[2] = epoch, num_batches

    def __iter__(self):
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        epoch, resumed_epoch, num_skipped = self._place.tolist()
        num_skipped = num_skipped if epoch == resumed_epoch else 0
        for number, batch in enumerate(self._batches()):
            if number % step == first:
                yield [] if number < num_skipped else batch

    def _batches(self):
        rows_left = self.choose(self._rows())
        while rows := list(islice(rows_left, self.rows_per_step)):
            if len(rows) == self.rows_per_step or not self.drop_last:
                groups = split_step(rows, self.num_groups, self.even)
                if self.even:
                    groups = with_own(groups, len(rows))
                yield from groups[self.rank :: self.num_ranks]

    def _rows(self):
        # `iter(stream)` would give a worker of a data loader some shards only.
        for columns in self.stream.iter(READ_AT_ONCE):
            yield from (dict(zip(columns, values)) for values in zip(*columns.values()))


class EvenBatch(list):
    """Rows of which the first `num_own` are not there to fill the batch up."""

    num_own = None


def with_own(groups, num_rows):
    """Groups of a step as [`EvenBatch`], of whose rows the first `num_rows` are its own."""
    batches, start = [EvenBatch(group) for group in groups], 0
    for batch in batches:
        batch.num_own = min(max(num_rows - start, 0), len(batch))
        start += len(batch)
    return batches


def undecoded(stream):
    """A stream whose images stay bytes or paths, for the collator; without known columns, rows are as whatever made them left them."""
    return stream.decode(False) if stream.features else stream
