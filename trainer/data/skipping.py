"""Rows that turn out bad when they are fetched: named, or skipped for the next good one."""

import torch
from datasets import Dataset, IterableDataset


class SkippingMixin:
    """Has the training rows of a [`~transformers.Trainer`] fetched so that a bad one is named, or skipped: `on_bad_row`."""

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
        args, given = self.args, self.data_collator
        streamed = isinstance(dataset, torch.utils.data.IterableDataset)
        if is_training and streamed and args.on_bad_row == "skip":
            if isinstance(dataset, IterableDataset) and dataset.features is not None:
                dataset = dataset.decode(False)  # the collator decodes: a stream that raises has ended
            collator = self._get_collator_with_removed_columns(given, description)
            dataset = CheckedStream(dataset, collator, args.max_skips_in_a_row)
            self.data_collator = dataset.collate
        elif is_training and not streamed:
            unwrapped = self._remove_unused_columns(dataset, description) if isinstance(dataset, Dataset) else dataset
            dataset, given_fn = NumberedRows(unwrapped), sampler_fn
            sampler_fn = given_fn and (lambda rows: given_fn(rows.rows))
            self.data_collator = NumberedCollator(given, dataset, args.on_bad_row == "skip", args.max_skips_in_a_row)
        try:
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        finally:
            self.data_collator = given


class NumberedRows(torch.utils.data.Dataset):
    """Rows with their numbers; one that cannot be read comes as its exception."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        try:
            return index, self.rows[index]
        except Exception as error:
            return index, error


class NumberedCollator:
    """
    Collates what [`NumberedRows`] gives.

    Whichever process fetches a bad row, the row that takes its place is the same: the next one that can be collated.

    Args:
        collator (`Callable`): of rows.
        rows ([`NumberedRows`]): to take others from.
        skip (`bool`): `False` raises instead, with the row's number.
        most_in_a_row (`int`): bad rows that may follow each other.

    Returns:
        `dict`: the collator's batch, with `skipped_rows`, a list of numbers and reasons, if there were any.

    Raises:
        ValueError: a bad row, or too many in a row.
    """

    def __init__(self, collator, rows, skip, most_in_a_row):
        self.collator, self.rows, self.skip, self.most_in_a_row = collator, rows, skip, most_in_a_row

    def __call__(self, items):
        if not any(isinstance(row, Exception) for _, row in items):
            try:
                return self.collator([row for _, row in items])
            except Exception:
                pass  # which row it was is found out below; if none by itself, it is raised there
        skipped = []
        batch = self.collator([self.good_row(index, row, skipped) for index, row in items])
        return batch | {"skipped_rows": skipped} if skipped else batch

    def good_row(self, index, row, skipped):
        for _ in range(self.most_in_a_row + 1):
            error = why_bad(row, self.collator)
            if error is None:
                return row
            if not self.skip:
                raise ValueError(
                    f"Row {index} of `train_dataset` cannot be trained on: {error} Repair or drop it, or set "
                    "`on_bad_row='skip'`."
                ) from error
            skipped.append((int(index), str(error)))
            index, row = self.rows[(index + 1) % len(self.rows)]
        raise too_many(self.most_in_a_row, error)


class CheckedStream(torch.utils.data.IterableDataset):
    """
    A stream without its bad rows, each good one with the bad ones before it; every row is collated to see whether it is good.

    Args:
        rows (`datasets.IterableDataset`): as they come, images undecoded.
        collator (`Callable`): of rows.
        most_in_a_row (`int`): bad rows that may follow each other.

    Raises:
        ValueError: too many in a row.
    """

    def __init__(self, rows, collator, most_in_a_row):
        self.rows, self.collator, self.most_in_a_row = rows, collator, most_in_a_row

    def __iter__(self):
        skipped = []
        for number, row in enumerate(self.rows):
            error = why_bad(row, self.collator)
            if error is None:
                yield skipped, row
                skipped = []
                continue
            skipped.append((number, str(error)))
            if len(skipped) > self.most_in_a_row:
                raise too_many(self.most_in_a_row, error)

    def set_epoch(self, epoch):
        self.rows.set_epoch(epoch)

    def collate(self, items):
        skipped = [pair for pairs, _ in items for pair in pairs]
        batch = self.collator([row for _, row in items])
        return batch | {"skipped_rows": skipped} if skipped else batch


def why_bad(row, collator):
    """The error that a row, or what was raised instead of it, comes to in a batch of its own; `None` for a good one."""
    if isinstance(row, Exception):
        return row
    try:
        collator([row])
    except Exception as error:
        return error
    return None


def too_many(most_in_a_row, error):
    return ValueError(
        f"More than {most_in_a_row} rows in a row (`max_skips_in_a_row`) cannot be trained on, the last one: {error} Is it "
        "the right dataset?"
    )
