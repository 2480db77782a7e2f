"""How many tokens each row of a dataset becomes, images included and not decoded."""

import functools
import io
import logging

from datasets.fingerprint import Hasher
from PIL import ExifTags, Image

from ..collator import images_of


logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 16  # that are held in memory, images included


def token_lengths(dataset, collator, num_proc=None):
    """
    Counts each row's tokens once; `datasets` caches them next to the dataset.

    Args:
        dataset (`datasets.Dataset`): rows as the collator takes them.
        collator ([`AMVLDataCollator`]): whose processor counts.
        num_proc (`int`, *optional*): processes that count.

    Returns:
        `list[int]`: tokens of prompt, images and answer.
    """
    rows = dataset
    if dataset.format["type"] != "custom":  # as Arrow stores them: images stay bytes or paths
        rows = dataset.with_format("arrow")
    count = functools.partial(row_length, collator=collator)
    if not hasattr(collator.processor, "_get_num_multimodal_tokens"):
        exact = True
    else:
        first = _as_rows(rows[:1])[0]
        exact = count(first, exact=False) != count(first, exact=True)
    if exact:
        logger.warning(
            "`%s` cannot tell how many tokens an image becomes from its size: images are decoded to count them, once.",
            type(collator.processor).__name__,
        )
    count = functools.partial(count, exact=exact)
    if rows is dataset:
        return [count(row) for row in rows]
    # Of what counts, not of the function: a tokenizer's pickle changes when it is first called.
    vocabulary = sorted(collator.processor.tokenizer.get_vocab().items())
    settings = [collator.processor.to_dict(), collator.processor.chat_template, vocabulary, exact]
    counted = rows.map(
        lambda table: {"length": [count(row) for row in _as_rows(table)]},
        batched=True,
        batch_size=ROWS_AT_ONCE,
        num_proc=num_proc,
        remove_columns=dataset.column_names,
        new_fingerprint=Hasher.hash([dataset._fingerprint, settings]),
        desc="Counting tokens",
    )
    return counted.with_format(None)["length"][:]


def _as_rows(table):
    if isinstance(table, dict):  # what a transform of the user's gives
        return [dict(zip(table, values)) for values in zip(*table.values())]
    return table.to_pylist()


def row_length(row, collator, exact=False):
    """
    The tokens of one row.

    Args:
        row (`dict`): as in the dataset.
        collator ([`AMVLDataCollator`]): whose processor counts.
        exact (`bool`, defaults to `False`): run the processor over the images, instead of asking it what a size gives.

    Returns:
        `int`: of prompt, images and answer; 0 for a row that cannot be trained on.
    """
    try:
        if exact:
            batch = collator([row])
            return int(batch["attention_mask"].sum() + batch["completion_mask"].sum())
        texts = collator.render(row, "A row", open_images=False)
    except ValueError:
        return 0  # what is wrong with the row is said when its turn comes
    tokenizer = collator.processor.tokenizer
    length = sum(len(tokenizer(texts[key], add_special_tokens=False)["input_ids"]) for key in ("prompt", "completion"))
    if sizes := [image_size(image) for image in images_of(row)]:
        # One token stands for each image in the text.
        length += sum(collator.processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"])
        length -= len(sizes)
    return length


def image_size(image):
    """Height and width of an image as [`read_image`] takes it, read off its header, as it is when upright."""
    if isinstance(image, dict):
        image = image["path"] if image.get("bytes") is None else io.BytesIO(image["bytes"])
    if not isinstance(image, Image.Image):
        with Image.open(image) as opened:
            return image_size(opened)
    # `getexif` would decode a PNG to look for EXIF data behind its pixels.
    has_exif = image.format != "PNG" or "exif" in image.info
    is_turned = has_exif and image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return list(image.size if is_turned else image.size[::-1])
