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
    Collates rows that come with their numbers, as [`NumberedRows`] gives them.

    Whichever process fetches a bad row, the row that takes its place is the same: the next one that can be collated.

    Args:
        collator (`Callable`): of rows.
        name (`str`): how an error calls the dataset.
        others ([`NumberedRows`], *optional*): to take another row from in place of a bad one; by default that raises.
        most_in_a_row (`int`, defaults to 0): bad rows that may follow each other.

    Returns:
        `dict`: the collator's batch, with `skipped_rows`, a list of numbers and reasons, if there were any.

    Raises:
        ValueError: a bad row, or too many in a row.
    """

    def __init__(self, collator, name, others=None, most_in_a_row=0):
        self.collator, self.name, self.others, self.most_in_a_row = collator, name, others, most_in_a_row

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
            if self.others is None:
                use, remedy = "evaluated on", ""
                if self.name == "train_dataset":
                    use, remedy = "trained on", ", or set `on_bad_row='skip'`"
                raise ValueError(
                    f"Row {index} of `{self.name}` cannot be {use}: {error} Repair or drop it{remedy}."
                ) from error
            skipped.append((int(index), str(error)))
            index, row = self.others[(index + 1) % len(self.others)]
        raise too_many(self.most_in_a_row, error)


def good_rows(rows, collator, most_in_a_row):
    """
    The rows of a stream that can be collated, each tried by itself.

    Args:
        rows (`Iterable[dict]`): as they come, images undecoded, since a stream that raises has ended.
        collator (`Callable`): of rows.
        most_in_a_row (`int`): bad rows that may follow each other.

    Yields:
        `dict`: a row; with `skipped_rows`, numbers and reasons of the bad ones before it, and after the last, if there were any.

    Raises:
        ValueError: too many in a row, or no good one.
    """
    held, skipped = None, []
    for number, row in enumerate(rows):
        error = why_bad(row, collator)
        if error is None:
            if held is not None:
                yield held
            held, skipped = row | {"skipped_rows": skipped} if skipped else row, []
            continue
        skipped.append((number, str(error)))
        if len(skipped) > most_in_a_row:
            raise too_many(most_in_a_row, error)
    if held is not None:
        yield held | {"skipped_rows": held.get("skipped_rows", []) + skipped} if skipped else held
    elif skipped:
        raise ValueError(
            f"None of the {len(skipped)} rows of the stream can be trained on, the last one: {skipped[-1][1]} Is it the right dataset?"
        )


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
