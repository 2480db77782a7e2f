"""Rows that turn out bad when they are fetched: named, or skipped for the next good one."""

import torch


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


def good_rows(rows, collator, most_in_a_row):
    """
    The rows of a stream that can be collated, each tried by itself.

    Args:
        rows (`Iterable[dict]`): as they come, images undecoded, since a stream that raises has ended.
        collator (`Callable`): of rows.
        most_in_a_row (`int`): bad rows that may follow each other.

    Yields:
        `dict`: a row; with `skipped_rows`, numbers and reasons of the bad ones before it, if there were any.

    Raises:
        ValueError: too many in a row.
    """
    skipped = []
    for number, row in enumerate(rows):
        error = why_bad(row, collator)
        if error is None:
            yield row | {"skipped_rows": skipped} if skipped else row
            skipped = []
            continue
        skipped.append((number, str(error)))
        if len(skipped) > most_in_a_row:
            raise too_many(most_in_a_row, error)


class CountingCollator:
    """Collates rows of [`good_rows`], and hands on what was skipped before them."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, rows):
        skipped = [pair for row in rows for pair in row.get("skipped_rows", ())]
        batch = self.collator(rows)
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
