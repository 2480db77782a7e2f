"""The processor of an AMVL model: the backbone's own processor, plus the latent token, left padding, image budget."""

import collections
import copy
import functools
import json
import os

import transformers
from transformers import AutoProcessor, ProcessorMixin
from transformers.utils import logging


logger = logging.get_logger(__name__)

# An image processor's setting whose name holds one of these decides the size of an image, and so its number of tokens.
SIZE_WORDS = (
    *("size", "pixels", "edge", "side", "resolution", "pinpoints", "crop", "pan_and_scan"),
    *("split", "slice", "tiles", "patches", "tokens"),
)
# What `generate` takes, and a pipeline hands to its processor unless it comes as `generate_kwargs`.
OF_GENERATE = ("latent_temperature", "latents", "generator", "num_latent_samples", "return_majority")
LONGEST_EDGE = 2**16 - 1  # of a JPEG: a default `size["longest_edge"]` beyond it bounds the area of an image


class AMVLProcessor(ProcessorMixin):
    """Stock processor of a vision-language model that also knows the latent token and pads on the left.

    Made by [`~AMVLProcessor.from_backbone`] or [`~AMVLProcessor.from_pretrained`], never directly: both return an
    instance of a class that inherits from `AMVLProcessor` and from the stock class (such as `LlavaProcessor`), so
    everything that is not written here, `__call__` and the chat template included, is the stock behaviour.

    Attributes:
        backbone_processor_class (`type`): The stock class, of `transformers` itself.
        latent_token (`str`): The special token that marks a latent slot.
        image_budget (`dict`): What decides how many tokens an image becomes. Saved with the processor; loading or
            calling it with another one warns.
    """

    backbone_processor_class: type[ProcessorMixin] | None = None
    latent_token: str | None = None
    _warned_of_image_budget = False

    def __new__(cls, *args, **kwargs):
        if cls.backbone_processor_class is None:
            raise TypeError(
                "`AMVLProcessor` is built over a stock processor: call `AMVLProcessor.from_backbone(processor_or_id)` "
                "or `AMVLProcessor.from_pretrained(path)`."
            )
        return super().__new__(cls)

    def __reduce__(self):
        # The class is made at run time: pickle (data loader workers, `datasets`) rebuilds it from the stock class.
        return _new_processor, (self.backbone_processor_class,), self.__dict__

    @classmethod
    def from_backbone(
        cls,
        backbone: ProcessorMixin | str | os.PathLike,
        latent_token: str = "<latent>",
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **kwargs,
    ) -> "AMVLProcessor":
        """Turns the processor of a vision-language model into an AMVL processor.

        Args:
            backbone (`ProcessorMixin` or `str` or `os.PathLike`): A stock processor, the hub id of one or a folder
                that holds one. An instance is copied, never changed. An `AMVLProcessor` is returned as it is.
            latent_token (`str`, defaults to `"<latent>"`): The token that marks a latent slot: added as a special
                token if the tokenizer does not have it, else used with the id it has.
            min_pixels (`int`, *optional*): Fewest pixels of an image: a smaller one is enlarged. Height times width,
                except that the GLM-4V family counts an image as two frames.
            max_pixels (`int`, *optional*): Most pixels of an image: a larger one is shrunk. Both default to those of
                `backbone`, and leave videos as they are.
            **kwargs: Passed to `AutoProcessor.from_pretrained` where `backbone` is an id or a folder.

        Returns:
            `AMVLProcessor`: Its `latent_token_id` is the id to give to the model.

        Raises:
            TypeError: If `backbone` is not a processor with a tokenizer and an image or video processor, or if its
                class is not one of `transformers` itself.
            ValueError: If `latent_token` is empty, has another role in the tokenizer (such as end of sequence or
                image), or differs from that of the `AMVLProcessor` given; if `min_pixels` or `max_pixels` is no
                positive integer, exceeds the other or differs from the budget of the `AMVLProcessor` given, or if the
                image processor has no budget of pixels.
        """
        pixels = _pixels(min_pixels, max_pixels)
        if isinstance(backbone, (str, os.PathLike)):
            backbone = AutoProcessor.from_pretrained(backbone, **kwargs)
        elif kwargs:
            raise TypeError(
                f"{_quoted(kwargs)} only apply where `backbone` is a hub id or a folder; got a "
                f"`{type(backbone).__name__}`."
            )
        if not isinstance(backbone, ProcessorMixin):
            raise TypeError(
                f"`backbone` must be a processor, a hub id or a folder of one; got `{type(backbone).__name__}`. Load "
                "it with `AutoProcessor.from_pretrained`."
            )
        if isinstance(backbone, AMVLProcessor):
            if backbone.latent_token != latent_token:
                raise ValueError(
                    f"`latent_token` is {latent_token!r}, but the `AMVLProcessor` given already uses "
                    f"{backbone.latent_token!r}: pass that one, or start from the stock processor."
                )
            if backbone.image_budget | pixels != backbone.image_budget:
                raise ValueError(
                    f"The image budget asked for is {pixels}, but the `AMVLProcessor` given has "
                    f"{backbone.image_budget}: start from the stock processor, or load a saved one with "
                    "`AMVLProcessor.from_pretrained(path, min_pixels=..., max_pixels=...)`."
                )
            return backbone
        parts = {name for name in backbone.get_attributes() if getattr(backbone, name, None) is not None}
        if "tokenizer" not in parts or not parts & {"image_processor", "video_processor"}:
            raise TypeError(
                f"`backbone` must have a `tokenizer` and an `image_processor` (or `video_processor`); the "
                f"`{type(backbone).__name__}` given has {_quoted(parts)}. Use the processor of a vision-language "
                "model."
            )
        name = type(backbone).__name__
        if getattr(transformers, name, None) is not type(backbone):
            raise TypeError(
                f"`backbone` is a `{name}` of `{type(backbone).__module__}`, but only classes of `transformers` "
                "itself can be found again when the saved processor is loaded: remote code and your own subclasses "
                "cannot be wrapped."
            )
        processor = _new_processor(type(backbone))
        processor.__dict__.update(copy.deepcopy(backbone.__dict__))
        return processor._set_latent_token(latent_token)._set_pixels(pixels)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **kwargs,
    ) -> "AMVLProcessor":
        """Loads a saved AMVL processor; warns where its image budget is not the one it was saved with.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Hub id or folder written by `save_pretrained`.
            min_pixels (`int`, *optional*): Another fewest number of pixels of an image than the saved one.
            max_pixels (`int`, *optional*): Another largest number of pixels of an image than the saved one.
            **kwargs: As for `ProcessorMixin.from_pretrained`.

        Returns:
            `AMVLProcessor`: Over the stock class that `processor_config.json` names.

        Raises:
            ValueError: If the folder holds no AMVL processor, if its stock class is not available, or if `min_pixels`
                or `max_pixels` cannot be set, as for [`~AMVLProcessor.from_backbone`].
        """
        pixels = _pixels(min_pixels, max_pixels)
        processor_dict, _ = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)
        name = processor_dict.get("backbone_processor_class")
        if name is None:
            raise ValueError(
                f"`{pretrained_model_name_or_path}` holds no AMVL processor: its `processor_config.json` has no "
                "`backbone_processor_class`. For a stock processor call `AMVLProcessor.from_backbone`."
            )
        backbone_processor_class = getattr(transformers, name, None)
        if not (isinstance(backbone_processor_class, type) and issubclass(backbone_processor_class, ProcessorMixin)):
            raise ValueError(
                f"`{pretrained_model_name_or_path}` needs the processor class `{name}`, which transformers "
                f"{transformers.__version__} does not offer here: it is remote code (not supported), belongs to "
                "another version of transformers, or needs a package that is not installed (often torchvision)."
            )
        # Past this class in the method resolution order: the stock `from_pretrained`, bound to the class with both.
        stock = super(AMVLProcessor, _processor_class(backbone_processor_class))
        processor = stock.from_pretrained(pretrained_model_name_or_path, **kwargs)
        processor._set_latent_token(processor_dict["latent_token"])._set_pixels(pixels)
        saved, budget = processor_dict.get("image_budget", {}), processor.image_budget
        # A setting that is not recorded, such as one that a later transformers adds, makes no difference.
        if any(budget.get(name) != value for name, value in saved.items()):
            logger.warning(
                f"The image budget of `{pretrained_model_name_or_path}` is {dict(sorted(budget.items()))}, but it was "
                f"saved with {dict(sorted(saved.items()))}: images may become another number of tokens than in "
                "training. If that is not meant, leave out the arguments that change it, or restore the edited file; "
                "if it is, save the processor again."
            )
        return processor

    @property
    def latent_token_id(self) -> int:
        """`int`: Id of the latent token in the tokenizer."""
        return self.tokenizer.convert_tokens_to_ids(self.latent_token)

    @property
    def answer_start_id(self) -> int | None:
        """`int`: Id of the token that an answer follows in a chat, such as the last one of the assistant's header.

        What `AMVLForConditionalGeneration.from_backbone` takes as `initial_token_id`. `None`, with a warning, where there is
        no chat template or where it renders no such turn.
        """
        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": "!"}]}
        try:
            prompt = self.apply_chat_template([question], add_generation_prompt=True, tokenize=False)
            chat = self.apply_chat_template([question, answer], tokenize=False)
        except Exception as error:  # templates raise what they like
            reason = str(error)
        else:
            # As in training: a prompt may hold more than the header that precedes an answer already given.
            start = os.path.commonprefix([prompt, chat])
            if ids := self.tokenizer(start, add_special_tokens=False)["input_ids"]:
                return ids[-1]
            reason = "a question renders as nothing"
        logger.warning(
            f"The chat template gives no token that an answer follows ({reason}): the `{self.latent_token}` placeholder will "
            "start as it is, which takes longer to learn. Pass an `initial_token_id` of your own to `from_backbone`."
        )
        return None

    @property
    def image_budget(self) -> dict:
        """`dict`: What decides the size of an image in a call that says nothing else about it, as plain JSON data.

        `{"min_pixels": int, "max_pixels": int}` where the image processor bounds the area of an image (Qwen2-VL and
        its kin), else all its settings about sizes, such as `size`, `crop_size` or `max_patches`.
        """
        settings = self._size_settings()
        if (bounds := self._pixel_bounds(settings)) is None:
            return settings
        # An attribute of the same name precedes `size` where the image processor reads it at all.
        read = {*bounds.values(), *self.image_processor.valid_kwargs.__annotations__} & settings.keys()
        return {name: settings[name] if name in read else settings["size"][key] for name, key in bounds.items()}

    @staticmethod
    def majority(texts: list[str]) -> tuple[str, float]:
        """The most frequent of several answers to one question, and its share: how sure a model is over its latents.

        Case, white space and a full stop at the end make no difference. `generate(..., return_majority=True)` votes
        token by token instead.

        Args:
            texts (`list[str]`): Decoded answers, in the order in which they were drawn; the first drawn wins a tie.

        Returns:
            `tuple[str, float]`: The answer as it was first drawn, without white space around it, and its share of `texts`.

        Raises:
            ValueError: If `texts` is no list of strings, or empty.
        """
        if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"`texts` must be a list of the answers to one question, got {texts!r}: pass what `batch_decode` returns "
                "for its samples."
            )
        votes = [" ".join(text.split()).removesuffix(".").rstrip().casefold() for text in texts]
        winner, count = collections.Counter(votes).most_common(1)[0]  # of equals the first it met
        return texts[votes.index(winner)].strip(), count / len(texts)

    def apply_chat_template(self, conversation, *args, **kwargs):
        _refuse_arguments_of_generate(kwargs)
        return super().apply_chat_template(conversation, *args, **kwargs)

    def to_dict(self) -> dict:
        """Returns what `processor_config.json` holds: the stock content and what rebuilds this class."""
        return super().to_dict() | {
            "backbone_processor_class": self.backbone_processor_class.__name__,
            "latent_token": self.latent_token,
            "image_budget": self.image_budget,
        }

    def _merge_kwargs(self, *args, **kwargs) -> dict[str, dict]:
        _refuse_arguments_of_generate(kwargs)
        # What every stock `__call__` merges its arguments with, whatever their names and nesting.
        merged = super()._merge_kwargs(*args, **kwargs)
        called = {name: value for name, value in _sizes(merged["images_kwargs"]).items() if value is not None}
        if called and not self._warned_of_image_budget:
            budget = self.image_budget
            own = self._size_settings() | budget
            if other := {name: value for name, value in called.items() if value != own.get(name)}:
                self._warned_of_image_budget = True
                logger.warning(
                    f"This processor is called with {other}, but its image budget is {budget}: images may become "
                    "another number of tokens than in training. Leave the arguments out, or set them once, in "
                    "`AMVLProcessor.from_backbone` before training. This is said once."
                )
        return merged

    def _size_settings(self) -> dict:
        if getattr(self, "image_processor", None) is None:
            return {}
        # A stock class has defaults of its own, and what the tokenizer was loaded with comes before them: `max_pixels`
        # too, which the stock `from_pretrained(..., max_pixels=...)` also gives to the tokenizer, to be saved there.
        defaults = super()._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs)["images_kwargs"]
        return _sizes(self.image_processor.to_dict() | defaults)

    def _pixel_bounds(self, settings: dict) -> dict[str, str] | None:
        # The keys of `size` that bound the area of an image, None if none do.
        size = settings.get("size")
        if not isinstance(size, dict) or settings.get("do_resize") is False:
            return None
        if size.keys() == {"min_pixels", "max_pixels"}:  # Emu3
            return {"min_pixels": "min_pixels", "max_pixels": "max_pixels"}
        if size.keys() == {"shortest_edge", "longest_edge"}:  # areas of Qwen2-VL and its kin, but edges of Idefics2
            default = getattr(type(self.image_processor), "size", None)
            if isinstance(default, dict) and default.get("longest_edge", 0) > LONGEST_EDGE:
                return {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
        return None

    def _set_pixels(self, pixels: dict[str, int]) -> "AMVLProcessor":
        if not pixels:
            return self
        image_processor, settings = getattr(self, "image_processor", None), self._size_settings()
        if (bounds := self._pixel_bounds(settings)) is None:
            raise ValueError(
                f"{_quoted(pixels)} cannot be set, got {pixels}: `{type(image_processor).__name__}` does not bound the "
                f"pixels of an image. These settings decide its size: {settings}. Leave {_quoted(pixels)} out, or "
                "change those settings of `processor.image_processor`."
            )
        pixels = _pixels(**(self.image_budget | pixels))
        size = image_processor.size  # a `SizeDict`, or a dict
        image_processor.size = type(size)(**(dict(size) | {bounds[name]: value for name, value in pixels.items()}))
        for name, value in pixels.items():
            if hasattr(image_processor, name):  # what Emu3 reads instead
                setattr(image_processor, name, value)
        for name in ("size", *pixels):  # would precede the image processor's, see `_size_settings`
            self.tokenizer.init_kwargs.pop(name, None)
        return self

    def _set_latent_token(self, latent_token: str) -> "AMVLProcessor":
        tokenizer = self.tokenizer
        if not isinstance(latent_token, str) or not latent_token.strip():
            raise ValueError(f"`latent_token` must be a token such as '<latent>'; got {latent_token!r}.")
        roles = tokenizer.special_tokens_map | {
            name: getattr(self, name, None) for name in ("image_token", "video_token", "audio_token")
        }
        taken = [role for role, token in roles.items() if token == latent_token]
        if taken:
            raise ValueError(
                f"`latent_token` is {latent_token!r}, which is already the {_quoted(taken)} of the tokenizer: choose "
                "a token of its own."
            )
        # Also done after loading: some stock classes (Idefics3) reset the list of extra special tokens when built.
        tokenizer.add_special_tokens({"extra_special_tokens": [latent_token]}, replace_extra_special_tokens=False)
        # `init_kwargs` is what gets saved, and what precedes a family's own default side when the processor is called.
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
        self.latent_token = latent_token
        return self


@functools.cache
def _processor_class(backbone_processor_class: type[ProcessorMixin]) -> type[AMVLProcessor]:
    # Named as its parent: the name is saved as `processor_class` and in `auto_map`, and read back from this module.
    return type(
        AMVLProcessor.__name__,
        (AMVLProcessor, backbone_processor_class),
        {
            "__module__": __name__,
            "__doc__": AMVLProcessor.__doc__,
            "backbone_processor_class": backbone_processor_class,
        },
    )


def _new_processor(backbone_processor_class: type[ProcessorMixin]) -> AMVLProcessor:
    processor_class = _processor_class(backbone_processor_class)
    return processor_class.__new__(processor_class)


def _sizes(settings: dict) -> dict:
    sizes = {name: value for name, value in settings.items() if any(word in name for word in SIZE_WORDS)}
    # As read back from a file; `default` is asked about numpy's numbers and a `SizeDict`.
    return json.loads(json.dumps(sizes, default=lambda value: value.item() if hasattr(value, "item") else dict(value)))


def _pixels(min_pixels: int | None, max_pixels: int | None) -> dict[str, int]:
    pixels = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    pixels = {name: value for name, value in pixels.items() if value is not None}
    for name, value in pixels.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"`{name}` must be a positive number of pixels, such as {256 * 28 * 28}; got {value!r}.")
    if len(pixels) == 2 and min_pixels > max_pixels:
        raise ValueError(
            f"`min_pixels` is {min_pixels} and `max_pixels` is {max_pixels}: give both, the smaller as `min_pixels`."
        )
    return pixels


def _refuse_arguments_of_generate(kwargs: dict) -> None:
    for name in OF_GENERATE:
        if name in kwargs:
            raise ValueError(
                f"`{name}` is an argument of `generate`, not of a processor, got {kwargs[name]!r}, which would be ignored: "
                f"call `pipeline(..., generate_kwargs={{'{name}': ...}})`, or pass it to `generate`."
            )


def _quoted(names):
    return ", ".join(f"`{name}`" for name in sorted(names)) or "neither"


AMVLProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["AMVLProcessor"]
