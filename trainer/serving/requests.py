"""What a client may ask the server for: one pydantic model, and one sentence for whatever it refuses."""

import base64
import binascii
import io
import re
import warnings
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ..data.images import check_image
from ..data.rows import brief


DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII)
PART_TYPES = ("text", "image_url")
MAX_COMPLETION_TOKENS = 2**20  # any model's window is checked besides
# What a request may hold before anything of it is decoded or tokenised, both of which keep other clients waiting.
MAX_CHARACTERS = 2**18  # of all texts together
MAX_MESSAGES = 256
MAX_PARTS = 64  # of a message
MAX_IMAGES = 32
MAX_NAME = 256  # of a model or a field
MAX_PIXELS = 2**25  # of all images together
MIN_TEMPERATURE = 0.01
MAX_LATENT_TEMPERATURE = 100  # standard deviations of a latent; beyond, numbers overflow
SEEDS = 2**63  # what torch takes


def read_data_url(url, info):
    """
    The image that a `data:` URL holds, checked as images of training data are.

    Args:
        url (`str`): `data:image/png;base64,...`; nothing else is ever opened, neither an address nor a file of the server.
        info (`pydantic.ValidationInfo`): its context counts the `pixels` of all images of the request.

    Returns:
        `PIL.Image.Image`.

    Raises:
        ValueError: no such URL, or an image that cannot be used, and why.
    """
    if not isinstance(url, str) or not (header := DATA_URL.match(url)):
        raise ValueError(
            f"an image must come as `data:image/...;base64,...`, got {brief(url)}: this server opens no address and no file; "
            "send the image's bytes"
        )
    try:
        data = base64.b64decode("".join(url[header.end() :].split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"the image's base64 is broken: {error}") from error
    info.context["pixels"] += _pixels_of(data)  # before they are decoded
    if info.context["pixels"] > MAX_PIXELS:
        raise ValueError(
            f"the images of this request have more than {MAX_PIXELS} pixels together; send fewer or smaller ones"
        )
    stored, _, _ = check_image({"bytes": data, "path": None}, repair=True)
    return Image.open(io.BytesIO(stored["bytes"]))


def _pixels_of(data):
    """What an image's header says; 0 of what has none, which `check_image` refuses."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as picture:
            return picture.width * picture.height
    except Image.DecompressionBombError:
        return MAX_PIXELS + 1
    except Exception:  # as many kinds as there are broken files
        return 0


class Part(BaseModel):
    """A piece of a request; `null` stands for a field that is left out, as clients send back what they were sent."""

    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True)

    @model_validator(mode="before")
    @classmethod
    def known_fields(cls, value: Any):
        if not isinstance(value, dict):
            return value
        value = {key: item for key, item in value.items() if item is not None}
        # The first alone: `extra="forbid"` would make an error of each, of which a request may hold a million.
        for key in value:
            if key not in cls.model_fields:
                name = key[:MAX_NAME].encode("utf-8", "replace").decode()
                raise ValueError(f"`{name}` is not supported by this server: leave it out")
        return value


def refuse_surrogates(text):
    """Refuses halves of characters, which JSON can hold and no text: they can be neither tokenised nor sent back."""
    if isinstance(text, str) and not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"half of a character at position {error.start}: send whole ones") from None
    return text


String = Annotated[str, BeforeValidator(refuse_surrogates)]


class Text(Part):
    type: Literal["text"]
    text: String


class ImageURL(Part):
    url: Annotated[Image.Image, BeforeValidator(read_data_url)]
    detail: Literal["auto"] | None = None  # the checkpoint's own image budget


class ImagePart(Part):
    type: Literal["image_url"]
    image_url: ImageURL


def as_parts(content):
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(Part):
    role: Literal["system", "user", "assistant"]
    content: Annotated[list[Annotated[Text | ImagePart, Field(discriminator="type")]], BeforeValidator(as_parts)]


class StreamOptions(Part):
    include_usage: bool | None = None  # the last chunk has it in any case


class ResponseFormat(Part):
    type: Literal["text"]


StopText = Annotated[String, Field(min_length=1, max_length=200)]
StopTexts = Annotated[list[StopText], Field(max_length=4)]  # as many as OpenAI takes


def as_list(stop):
    return [stop] if isinstance(stop, str) else stop or None


def not_too_cold(temperature):
    """Logits are divided by it."""
    if temperature is not None and 0 < temperature < MIN_TEMPERATURE:
        raise ValueError(f"{temperature} is too small to divide by: send 0, or {MIN_TEMPERATURE} and more")
    return temperature


class ChatRequest(Part):
    """
    The body of `/v1/chat/completions`; a field that is not here is refused, and so is a value that would change nothing.

    `latent_temperature` is this project's own, sent by the stock client as `extra_body={"latent_temperature": 0.5}`.
    """

    model: Annotated[str, Field(max_length=MAX_NAME), BeforeValidator(refuse_surrogates)]
    messages: list[Message] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_COMPLETION_TOKENS)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_COMPLETION_TOKENS)
    temperature: Annotated[float | None, AfterValidator(not_too_cold)] = Field(
        default=None, ge=0, le=2, allow_inf_nan=False
    )
    top_p: float | None = Field(default=None, gt=0, le=1)
    frequency_penalty: float | None = Field(default=None, gt=-1, le=2)
    seed: int | None = Field(default=None, ge=-SEEDS, lt=SEEDS)
    stop: Annotated[StopTexts | None, BeforeValidator(as_list)] = None
    latent_temperature: float | None = Field(default=None, ge=0, le=MAX_LATENT_TEMPERATURE, allow_inf_nan=False)
    # What clients send by default; another value is refused.
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    presence_penalty: float | None = Field(default=None, ge=0, le=0)
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = Field(default=None, max_length=0)
    user: str | None = None

    @model_validator(mode="after")
    def samples_or_not(self):
        if self.top_p not in (None, 1) and not self.temperature:
            raise ValueError(f"`top_p` is {self.top_p}, but nothing is sampled: set a `temperature` above 0")
        return self


def read_request(body):
    """
    A request's body, checked and with its images read.

    Args:
        body (`dict`): the JSON as it came.

    Returns:
        [`ChatRequest`].

    Raises:
        ValueError: what is wrong, in one sentence that names the field, the value and the remedy.
    """
    _refuse_too_much(body)
    try:
        return ChatRequest.model_validate(body, context={"pixels": 0})
    except ValidationError as error:
        raise ValueError(_sentence(error.errors(include_url=False))) from error


def _refuse_too_much(body):
    """Counts messages, parts, images and characters, before any of them is looked at."""
    messages = body.get("messages") if isinstance(body, dict) else None
    if not isinstance(messages, list):
        return
    if len(messages) > MAX_MESSAGES:
        raise ValueError(f"`messages` are {len(messages)}, at most {MAX_MESSAGES} are taken: leave out early turns.")
    num_characters = num_images = 0
    for number, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        parts = content if isinstance(content, list) else [{"text": content}]
        if len(parts) > MAX_PARTS:
            raise ValueError(
                f"`messages.{number}.content` has {len(parts)} parts, at most {MAX_PARTS} are taken: send fewer."
            )
        parts = [part for part in parts if isinstance(part, dict)]
        num_characters += sum(len(part["text"]) for part in parts if isinstance(part.get("text"), str))
        num_images += sum("image_url" in part for part in parts)
    for name, found, most in (("characters", num_characters, MAX_CHARACTERS), ("images", num_images, MAX_IMAGES)):
        if found > most:
            raise ValueError(f"`messages` have {found} {name} together, at most {most} are taken: send fewer.")


def _sentence(problems):
    problem = problems[0]
    # Without pydantic's name for the kind of a part, which stands behind its number.
    steps = zip((None, *problem["loc"]), problem["loc"])
    where = ".".join(str(step) for before, step in steps if not (isinstance(before, int) and step in PART_TYPES))
    if problem["type"] == "missing":
        return f"`{where}` is missing."
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":  # names the value by itself
        return f"`{where}`: {message}." if where else f"{message}."
    return f"`{where}`: {message[0].lower()}{message[1:]}, got {brief(problem['input'])}."
