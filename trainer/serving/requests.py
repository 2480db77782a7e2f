"""What a client may ask the server for: one pydantic model, and one sentence for whatever it refuses."""

import base64
import binascii
import io
import re
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ..data.images import MAX_PIXELS, check_image
from ..data.rows import brief


DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII)
PART_TYPES = ("text", "image_url")
MAX_COMPLETION_TOKENS = 2**20  # any model's window is checked besides
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
    stored, picture, _ = check_image({"bytes": data, "path": None}, repair=True)
    width, height = picture.info["size"]
    info.context["pixels"] += width * height
    if info.context["pixels"] > MAX_PIXELS:
        raise ValueError(
            f"the images of this request have more than {MAX_PIXELS} pixels together; send fewer or smaller ones"
        )
    return Image.open(io.BytesIO(stored["bytes"]))


class Part(BaseModel):
    """A piece of a request; `null` stands for a field that is left out, as clients send back what they were sent."""

    model_config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)

    @model_validator(mode="before")
    @classmethod
    def drop_null(cls, value: Any):
        return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value


class Text(Part):
    type: Literal["text"]
    text: str


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


StopText = Annotated[str, Field(min_length=1, max_length=200)]


def as_list(stop):
    return [stop] if isinstance(stop, str) else stop


class ChatRequest(Part):
    """
    The body of `/v1/chat/completions`; a field that is not here is refused, and so is a value that would change nothing.

    `latent_temperature` is this project's own, sent by the stock client as `extra_body={"latent_temperature": 0.5}`.
    """

    model: str
    messages: list[Message] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_COMPLETION_TOKENS)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_COMPLETION_TOKENS)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    frequency_penalty: float | None = Field(default=None, gt=-1, le=2)
    seed: int | None = Field(default=None, ge=-SEEDS, lt=SEEDS)
    stop: Annotated[list[StopText] | None, BeforeValidator(as_list), Field(max_length=4)] = (
        None  # as many as OpenAI takes
    )
    latent_temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False)
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
    try:
        return ChatRequest.model_validate(body, context={"pixels": 0})
    except ValidationError as error:
        raise ValueError(_sentence(error.errors(include_url=False))) from error


def _sentence(problems):
    problem = problems[0]
    # Without pydantic's name for the kind of a part, which stands behind its number.
    steps = zip((None, *problem["loc"]), problem["loc"])
    where = ".".join(str(step) for before, step in steps if not (isinstance(before, int) and step in PART_TYPES))
    if problem["type"] == "extra_forbidden":
        return f"`{where}` is not supported by this server: leave it out."
    if problem["type"] == "missing":
        return f"`{where}` is missing."
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":  # names the value by itself
        return f"`{where}`: {message}." if where else f"{message}."
    return f"`{where}`: {message[0].lower()}{message[1:]}, got {brief(problem['input'])}."
