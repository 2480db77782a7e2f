"""Rows to batches: prompts left-padded with their images, answers apart and right-padded."""

import io
import os
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image, ImageOps
from transformers import ProcessorMixin
from trl.data_utils import prepare_multimodal_messages


ROLES = ("system", "user", "assistant", "tool")


@dataclass
class AMVLDataCollator:
    """
    Collates rows in TRL's vision formats for [`AMVLForConditionalGeneration`].

    A row holds `images` (or `image`) and `prompt` + `completion`, each a list of messages or a string; or `messages`,
    whose last turn is the answer. x is everything up to and including the assistant header, y is the answer and what the
    chat template closes it with.

    Args:
        processor (`ProcessorMixin`): an [`AMVLProcessor`], or a stock processor.
        max_length (`int`, *optional*): most tokens of prompt and answer together. Longer rows raise: cutting would
            remove image tokens or the answer.
        max_completion_length (`int`, *optional*): most tokens of an answer.
        allow_text_only (`bool`, defaults to `False`): accept rows without an image.

    Returns:
        `dict`: `input_ids` and `attention_mask` `(B, P)`, `completion_ids` and `completion_mask` `(B, A)`, and the image
        inputs of the processor.

    Raises:
        ValueError: a row that cannot be trained on; the message names the row and the remedy.
    """

    processor: ProcessorMixin
    max_length: int | None = None
    max_completion_length: int | None = None
    allow_text_only: bool = False

    def __call__(self, rows):
        rows = [self.render(row, f"Row {index} of the batch") for index, row in enumerate(rows)]
        images = [row["images"] for row in rows]
        batch = self.processor(
            images=images if any(images) else None,
            text=[row["prompt"] for row in rows],
            padding=True,
            padding_side="left",
            return_tensors="pt",
            add_special_tokens=False,  # the template wrote them
        )
        batch = dict(batch)
        answers = self.processor.tokenizer(
            [row["completion"] for row in rows],
            padding=True,
            padding_side="right",
            return_tensors="pt",
            add_special_tokens=False,
        )
        batch["completion_ids"], batch["completion_mask"] = answers["input_ids"], answers["attention_mask"]
        lengths = batch["completion_mask"].sum(1)
        self.check_answer_length(int(lengths.max()), f"Row {int(lengths.argmax())} of the batch")
        if self.max_length is not None:
            lengths = batch["attention_mask"].sum(1) + lengths
            if int(lengths.max()) > self.max_length:
                raise ValueError(
                    f"Row {int(lengths.argmax())} of the batch has {int(lengths.max())} tokens with its images, more "
                    f"than `max_length` ({self.max_length}): raise the limit, set it to `None`, or lower the "
                    "processor's image budget."
                )
        return batch

    def render(self, row, name, open_images=True):
        """
        Checks one row and renders its texts.

        Args:
            row (`dict`): as in the dataset.
            name (`str`): how an error calls the row, `"Row 3"`.
            open_images (`bool`, defaults to `True`): decode the images. Otherwise only look whether they can be read, and
                check the lengths, which the collator reads off the batch.

        Returns:
            `dict`: `prompt` and `completion` as text, `images` as a list of RGB images.
        """
        prompt, completion = split_turns(row, name)
        images = images_of(row)
        if not images and not self.allow_text_only:
            raise ValueError(f"{name} has no image: give it one, or set `allow_text_only_rows=True`.")
        images = [read_image(image, f"{name}, image {number}", open_images) for number, image in enumerate(images)]
        image_token = getattr(self.processor, "image_token", None)  # a few processors have none
        if isinstance(prompt, str):
            num_placeholders = len(images) if image_token is None else prompt.count(image_token)
            eos = self.processor.tokenizer.eos_token or ""
            answer = completion.removesuffix(eos)
            texts = {"prompt": prompt, "completion": answer + eos}
            written = completion
        else:
            num_placeholders = count_placeholders(prompt, len(images))
            answer = text_of(completion, f"{name}, `completion`")
            written = (
                text_of(
                    [
                        {**message, "content": [part for part in parts_of(message) if part["type"] == "text"]}
                        for message in prompt
                    ],
                    name,
                )
                + answer
            )
        if not answer.strip():
            raise ValueError(f"{name} has an empty answer, {answer!r}: drop the row or fill in its `completion`.")
        if image_token is not None and image_token in written:
            raise ValueError(
                f"{name} has the image placeholder {image_token!r} written into a text, where it would "
                "count as an image: use a part of type 'image', or remove it."
            )
        if num_placeholders != len(images):
            raise ValueError(
                f"{name} has {num_placeholders} image placeholders in its `prompt` and {len(images)} `images`: they must "
                "be as many."
            )
        if not isinstance(prompt, str):
            try:
                texts = self.render_turns(
                    prepare_multimodal_messages(prompt, images=[None] * len(images)),
                    prepare_multimodal_messages(completion),
                )
            except Exception as error:
                raise ValueError(f"{name} does not go through the chat template: {error}") from error
            if not texts["completion"]:
                raise ValueError(f"{name}: the chat template renders its answer {answer!r} as nothing.")
        if not open_images and (self.max_completion_length is not None or self.max_length is not None):
            lengths = {
                key: len(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])
                for key, text in texts.items()
            }
            self.check_answer_length(lengths["completion"], name)
            if self.max_length is not None and sum(lengths.values()) > self.max_length:
                raise ValueError(
                    f"{name} has {sum(lengths.values())} tokens even before its images are counted, more than "
                    f"`max_length` ({self.max_length}): raise the limit or drop the row."
                )
        return {"prompt": texts["prompt"], "completion": texts["completion"], "images": images}

    def render_turns(self, prompt, completion):
        """The texts that TRL's `apply_chat_template` gives, whose loop over characters takes long on a long prompt."""
        last_role = prompt[-1]["role"]
        if last_role == "system":
            raise ValueError(f"Invalid role in the last message: {last_role}")
        start = self.processor.apply_chat_template(
            prompt,
            add_generation_prompt=last_role != "assistant",
            continue_final_message=last_role == "assistant",
            tokenize=False,
        )
        whole = self.processor.apply_chat_template(prompt + completion, tokenize=False)
        if not whole.startswith(start):  # the header of an answer to come may hold more than that of a given one
            start = os.path.commonprefix([start, whole])
        return {"prompt": start, "completion": whole[len(start) :]}

    def check_answer_length(self, length, name):
        if self.max_completion_length is not None and length > self.max_completion_length:
            raise ValueError(
                f"{name} has an answer of {length} tokens, more than `max_completion_length` "
                f"({self.max_completion_length}): raise the limit or drop the row."
            )


def images_of(row):
    """The images of a row as a list, as they are stored."""
    images = row.get("image") if row.get("images") is None else row["images"]
    return [] if images is None else images if isinstance(images, (list, tuple)) else [images]


def split_turns(row, name):
    """x and y of a row: its `prompt` and `completion`, or the turns before the last of its `messages` and that one."""
    if row.get("messages"):
        *prompt, last = read_messages(row["messages"], f"{name}, `messages`")
        if last["role"] != "assistant":
            raise ValueError(
                f"{name} has `messages` whose last turn is by {last['role']!r}: it must be the assistant's answer."
            )
        if not prompt:
            raise ValueError(f"{name} has `messages` that are one answer: put the turns that it answers before it.")
        return prompt, [last]
    prompt, completion = row.get("prompt"), row.get("completion")
    if prompt is None or completion is None:
        raise ValueError(
            f"{name} has no `{'prompt' if prompt is None else 'completion'}`, only {sorted(row)}: rows hold `images`, "
            "`prompt` and `completion`, or `images` and `messages`."
        )
    for key, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, (str, list)):
            raise ValueError(f"{name} has a `{key}` that is neither a text nor a list of messages, {value!r:.80}.")
    if isinstance(prompt, str) != isinstance(completion, str):
        raise ValueError(f"{name} mixes a text with messages in `prompt` and `completion`: use one form for both.")
    if not prompt:
        raise ValueError(f"{name} has an empty `prompt`: fill it in or drop the row.")
    if isinstance(prompt, str):
        return prompt, completion
    prompt = read_messages(prompt, f"{name}, `prompt`")
    completion = read_messages(completion, f"{name}, `completion`")
    if any(message["role"] != "assistant" for message in completion):
        roles = [message["role"] for message in completion]
        raise ValueError(f"{name} has a `completion` by {roles}: it must be the assistant's answer.")
    return prompt, completion


def read_messages(messages, name):
    """Messages whose parts are text or images, without the `None` that Arrow fills in where others have a key."""

    def refuse(what, value):
        raise ValueError(
            f"{name} holds {what}, {value!r:.80}: a message is `{{'role': ..., 'content': ...}}`, its content a text or "
            "a list of parts of type 'text' or 'image'."
        )

    if not isinstance(messages, list):
        refuse("no list of messages", messages)
    cleaned = []
    for message in messages:
        if not isinstance(message, dict):
            refuse("something else than a message", message)
        if message.get("role") not in ROLES:
            refuse(f"a message whose role is none of {ROLES}", message.get("role"))
        content = message.get("content")
        if isinstance(content, list):
            for part in content:
                if not isinstance(part, dict) or part.get("type") not in ("text", "image"):
                    refuse("a part without a known type", part)
                if part["type"] == "text" and not isinstance(part.get("text"), str):
                    refuse("a text part without a text", part.get("text"))
            content = [{key: value for key, value in part.items() if value is not None} for part in content]
        elif content is not None and not isinstance(content, str):
            refuse("a content that is neither a text nor a list of parts", content)
        cleaned.append({**message, "content": content})
    return cleaned


def parts_of(message):
    """The content of a message as a list of parts; a text is one part."""
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return content or []


def count_placeholders(prompt, num_images):
    """Image parts of a list of messages; plain texts alone stand for all images before the first of them."""
    user_turns = [message for message in prompt if message["role"] == "user"]
    if user_turns and all(isinstance(message["content"], str) for message in user_turns):
        return num_images
    return sum(part["type"] == "image" for message in prompt for part in parts_of(message))


def text_of(messages, name):
    """The text of the messages of an answer, which may hold nothing else."""
    parts = [part for message in messages for part in parts_of(message)]
    other = [part["type"] for part in parts if part["type"] != "text"]
    if other:
        raise ValueError(f"{name} holds a part of type {other[0]!r}: an answer is text.")
    return "".join(part.get("text", "") for part in parts)


def read_image(image, name, decode=True):
    """
    An upright RGB image from what a dataset column may hold.

    Args:
        image (`PIL.Image.Image`, `str`, `Path` or `dict`): an image, a path, or the `bytes` and `path` of `datasets`.
        name (`str`): how an error calls it.
        decode (`bool`, defaults to `True`): `False` decodes only where a file cut short would not show otherwise.

    Raises:
        ValueError: missing, no image, or one of more than 8 bits that Pillow would clip.
    """
    source = image
    try:
        if isinstance(image, dict):
            source = image.get("path")
            image = io.BytesIO(image["bytes"]) if image.get("bytes") is not None else source
        if isinstance(image, (str, Path, io.BytesIO)):
            with Image.open(image) as opened:
                return to_rgb(opened, decode or not is_whole(opened))
        if not isinstance(image, Image.Image):
            raise TypeError(f"a `{type(image).__name__}` is no image")
        return to_rgb(image, decode)
    except Exception as error:  # Pillow's plugins also raise SyntaxError, RuntimeError and NotImplementedError
        raise ValueError(f"{name} cannot be read ({source!r:.200}): {error}. Repair or drop it.") from error


def to_rgb(image, decode):
    """What transformers' `load_image`, and so serving, makes of an image; `None` if it need not be decoded."""
    if image.mode.startswith(("I", "F")):  # "I;16" and its like; Pillow scales only files of 16-bit colors itself
        raise ValueError(
            f"its mode is {image.mode!r}, of which Pillow's conversion to RGB makes white above 255: scale it to 8 bits"
        )
    if not decode:
        return None
    if ExifTags.Base.Orientation in image.getexif():  # `exif_transpose` would copy the others
        image = ImageOps.exif_transpose(image)
    return image.convert("RGB")


def is_whole(image):
    """Whether an opened image file is sound as far as that can be told without decoding it; damaged PNGs raise."""
    if image.format == "PNG":
        image.verify()  # reads the checksum of every chunk
        return True
    if image.format != "JPEG":
        return False
    position = image.fp.tell()
    image.fp.seek(-min(image.fp.seek(0, io.SEEK_END), 64), io.SEEK_END)
    tail = image.fp.read()
    image.fp.seek(position)
    return tail.rstrip(b"\0").endswith(b"\xff\xd9")
