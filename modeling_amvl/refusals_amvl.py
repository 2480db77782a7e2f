"""What AMVL cannot wrap or run, each with the sentence that says why; all raise `ValueError`."""

import inspect

from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from .branching_amvl import output_embeddings
from .cache_amvl import CACHE_ARGUMENT
from .configuration_amvl import AMVLConfig
from .families_amvl import NO_NEXT_TOKEN


# A table that has to grow does so to a multiple of this, the step in which matrix kernels are fast.
EMBEDDING_ROWS_MULTIPLE = 64

COMPILE_LAYERS = (
    "Latents enter a backbone by hooks, which compiled code skips: compile its layers instead, `for layer in "
    "model.backbone.get_decoder().layers: layer.compile()`."
)


def refuse_model_type(model_type, name):
    if model_type != AMVLConfig.model_type:
        raise ValueError(
            f"`{name}` holds a `{model_type}` model, not an `{AMVLConfig.model_type}` one: wrap it with "
            "`AMVLForConditionalGeneration.from_backbone`."
        )


def refuse_config(config):
    name = f"`{config.model_type}`"
    if config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder: its decoder reads no prompt that latents could follow.")
    if config.model_type in NO_NEXT_TOKEN:
        raise ValueError(
            f"{name} {NO_NEXT_TOKEN[config.model_type]}: it predicts no next token, before which latents could stand."
        )
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ValueError(f"{name} is no image-text-to-text model of transformers: pass a vision-language model.")


def refuse_backbone(backbone):
    if backbone.config.model_type == AMVLConfig.model_type:
        raise ValueError("`model_or_id` is an AMVL model already: pass the stock model, `model.backbone`.")
    refuse_config(backbone.config)
    name = f"`{type(backbone).__name__}`"
    if not backbone.can_generate():
        raise ValueError(f"{name} cannot generate text: pass a model with a language-modelling head.")
    if output_embeddings(backbone) is None:
        raise ValueError(f"{name} has no output embeddings, whose input the latents are read from.")
    parameters = inspect.signature(backbone.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if CACHE_ARGUMENT not in parameters and not takes_any:
        raise ValueError(f"{name} takes no `{CACHE_ARGUMENT}`, in which latents would live.")


def refuse_compiled(backbone):
    if not isinstance(backbone, PreTrainedModel) or backbone._compiled_call_impl is not None:
        raise ValueError(f"`backbone` is a compiled `{type(backbone).__name__}`. {COMPILE_LAYERS}")


def refuse_token(backbone, latent_token_id, num_rows):
    if latent_token_id > num_rows + EMBEDDING_ROWS_MULTIPLE:
        raise ValueError(
            f"`latent_token_id` is {latent_token_id}, but the embedding table has {num_rows} rows: take a row of it, or "
            "the next one."
        )
    for key, token in named_tokens(backbone.config):
        if token == latent_token_id:
            raise ValueError(
                f"`latent_token_id` {latent_token_id} is the model's `{key}`: give the latents one of their own."
            )


def named_tokens(config):
    """The tokens to which a config, or its text part, gives a role: (name of the setting, id) each."""
    for part in (config, config.get_text_config(decoder=True)):
        for key, value in part.to_dict().items():
            if key.endswith(("token_id", "token_index")):
                yield from ((key, token) for token in (value if isinstance(value, list) else [value]))


def refuse_initial_token(initial_token_id, latent_token_id, num_rows):
    if initial_token_id is None:
        return
    is_row = type(initial_token_id) is int and 0 <= initial_token_id < num_rows  # a `bool` is an `int`, too
    if not is_row or initial_token_id == latent_token_id:
        raise ValueError(
            f"`initial_token_id` is {initial_token_id!r}: it must be a row of the embedding table, which has {num_rows}, and "
            f"another than `latent_token_id`, {latent_token_id}. `AMVLProcessor.answer_start_id` is one."
        )


def refuse_right_padding(attention_mask):
    if attention_mask is not None and not attention_mask[:, -1].all():
        raise ValueError(
            "`attention_mask` ends with 0 in some row: prompts must be left-padded (`padding_side='left'`), as an "
            "`AMVLProcessor` does."
        )


def refuse_completion(input_ids, completion_ids, completion_mask):
    if completion_ids.ndim != 2 or completion_ids.shape[0] != input_ids.shape[0]:
        raise ValueError(
            f"`completion_ids` must be of shape ({input_ids.shape[0]}, A), got {tuple(completion_ids.shape)}."
        )
    if completion_mask.shape != completion_ids.shape:
        raise ValueError(
            f"`completion_mask` {tuple(completion_mask.shape)} must have the shape of `completion_ids` "
            f"{tuple(completion_ids.shape)}."
        )
    if completion_ids.shape[1] == 0 or not (completion_mask[:, 0] == 1).all():
        raise ValueError("`completion_mask` must start with 1 in every row: answers are right-padded and not empty.")
    if (completion_mask[:, 1:] > completion_mask[:, :-1]).any():
        raise ValueError("`completion_mask` must be 1s followed by 0s: answers are right-padded.")
