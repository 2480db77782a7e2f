"""The processor of an AMVL model: the backbone's own processor, plus the latent token and left padding."""

import copy
import functools
import os

import transformers
from transformers import AutoProcessor, ProcessorMixin


class AMVLProcessor(ProcessorMixin):
    """Stock processor of a vision-language model that also knows the latent token and pads on the left.

    Made by [`~AMVLProcessor.from_backbone`] or [`~AMVLProcessor.from_pretrained`], never directly: both return an
    instance of a class that inherits from `AMVLProcessor` and from the stock class (such as `LlavaProcessor`), so
    everything that is not written here, `__call__` and the chat template included, is the stock behaviour.

    Attributes:
        backbone_processor_class (`type`): The stock class, of `transformers` itself.
        latent_token (`str`): The special token that marks a latent slot.
    """

    backbone_processor_class: type[ProcessorMixin] | None = None
    latent_token: str | None = None

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
        cls, backbone: ProcessorMixin | str | os.PathLike, latent_token: str = "<latent>", **kwargs
    ) -> "AMVLProcessor":
        """Turns the processor of a vision-language model into an AMVL processor.

        Args:
            backbone (`ProcessorMixin` or `str` or `os.PathLike`): A stock processor, the hub id of one or a folder
                that holds one. An instance is copied, never changed. An `AMVLProcessor` is returned as it is.
            latent_token (`str`, defaults to `"<latent>"`): The token that marks a latent slot: added as a special
                token if the tokenizer does not have it, else used with the id it has.
            **kwargs: Passed to `AutoProcessor.from_pretrained` where `backbone` is an id or a folder.

        Returns:
            `AMVLProcessor`: Its `latent_token_id` is the id to give to the model.

        Raises:
            TypeError: If `backbone` is not a processor with a tokenizer and an image or video processor, or if its
                class is not one of `transformers` itself.
            ValueError: If `latent_token` is empty, has another role in the tokenizer (such as end of sequence or
                image), or differs from that of the `AMVLProcessor` given.
        """
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
        return processor._set_latent_token(latent_token)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "AMVLProcessor":
        """Loads a saved AMVL processor.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Hub id or folder written by `save_pretrained`.
            **kwargs: As for `ProcessorMixin.from_pretrained`.

        Returns:
            `AMVLProcessor`: Over the stock class that `processor_config.json` names.

        Raises:
            ValueError: If the folder holds no AMVL processor, or if its stock class is not available.
        """
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
        return stock.from_pretrained(pretrained_model_name_or_path, **kwargs)._set_latent_token(
            processor_dict["latent_token"]
        )

    @property
    def latent_token_id(self) -> int:
        """`int`: Id of the latent token in the tokenizer."""
        return self.tokenizer.convert_tokens_to_ids(self.latent_token)

    def to_dict(self) -> dict:
        """Returns what `processor_config.json` holds: the stock content and what rebuilds this class."""
        return super().to_dict() | {
            "backbone_processor_class": self.backbone_processor_class.__name__,
            "latent_token": self.latent_token,
        }

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


def _quoted(names):
    return ", ".join(f"`{name}`" for name in sorted(names)) or "neither"


AMVLProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["AMVLProcessor"]
