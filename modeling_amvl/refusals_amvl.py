"""What AMVL cannot wrap or run, each with the sentence that says why; all raise `ValueError`."""

import inspect
import math
import numbers

import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from .branching_amvl import output_embeddings
from .cache_amvl import CACHE_ARGUMENT
from .configuration_amvl import AMVLConfig
from .families_amvl import NO_CHUNKED_PREFILL, NO_NEXT_TOKEN, NO_STATIC_CACHE


# A table that has to grow does so to a multiple of this, the step in which matrix kernels are fast.
EMBEDDING_ROWS_MULTIPLE = 64

COMPILE_LAYERS = (
    "Latents enter a backbone by hooks, which compiled code skips: compile its layers instead, `for layer in "
    "model.backbone.get_decoder().layers: layer.compile()`."
)

# What `generate` cannot do with latents in the cache, and why.
_ROLLS_BACK = "assisted decoding rolls the cache back over the latents"
_LOOP_OF_ITS_OWN = "it is no longer part of transformers, and remote code would not read the latents"
REFUSED_ARGUMENTS = {
    "assistant_model": _ROLLS_BACK,
    "prompt_lookup_num_tokens": _ROLLS_BACK,
    "assistant_early_exit": _ROLLS_BACK,
    "use_mtp": _ROLLS_BACK,
    "guidance_scale": "its unconditional half would run without latents",
    "custom_generate": "a decoding loop of your own would not read the latents",
    "penalty_alpha": _LOOP_OF_ITS_OWN,
    "dola_layers": _LOOP_OF_ITS_OWN,
    "num_beam_groups": _LOOP_OF_ITS_OWN,
    "constraints": _LOOP_OF_ITS_OWN,
    "force_words_ids": _LOOP_OF_ITS_OWN,
    "token_healing": "it generates within the prompt, where no latents are",
    "past_key_values": "a given cache holds no latents",
    "cache": "a given cache holds no latents",
    "inputs_embeds": "the prompt is needed as `input_ids`",
}
# At these values they do nothing.
NEUTRAL = {"guidance_scale": 1, "penalty_alpha": 0, "num_beam_groups": 1}
# Arguments of `generate`, which `GenerationConfig` would take and nothing read.
OWN_ARGUMENTS = ("latent_temperature", "latents", "generator", "num_latent_samples", "return_majority")


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


def refuse_decoding(setting, backbone):
    """Refuses ways of decoding that latents do not go with; `setting` gives the value of a setting, wherever it was made."""
    for name, reason in REFUSED_ARGUMENTS.items():
        value = setting(name)
        if value is None or value is False or (name in NEUTRAL and value == NEUTRAL[name]):
            continue
        got = f"={value!r}" if isinstance(value, (bool, int, float, str)) else f" (a `{type(value).__name__}`)"
        raise ValueError(
            f"`{name}` does not go with latents: {reason}. Got `{name}{got}`: leave it out, or use `model.backbone`."
        )
    for name in OWN_ARGUMENTS:
        if (value := setting(name)) is not None:
            raise ValueError(
                f"`{name}` is an argument of `generate`, no setting of a `generation_config`, got {value!r} there: pass "
                f"`generate(..., {name}=...)`."
            )
    if (use_cache := setting("use_cache")) not in (None, True):
        raise ValueError(f"`use_cache={use_cache!r}` does not go with latents, which live in the cache: leave it out.")
    cache = setting("cache_implementation")
    if cache == "paged":
        raise ValueError(
            "`cache_implementation='paged'` does not go with latents: it batches without a prefill. Leave it out."
        )
    if cache is not None and "offloaded" in cache:
        raise ValueError(
            f"`cache_implementation={cache!r}` was never tried with latents, since it needs a GPU: leave it out, or take "
            "'quantized' to save memory."
        )
    model_type = backbone.config.model_type
    if cache not in (None, "dynamic", "quantized", "hybrid") and model_type in NO_STATIC_CACHE:
        raise ValueError(
            f"`cache_implementation={cache!r}` does not go with `{model_type}`, which does not answer with it as it does "
            "without: leave it out."
        )
    if setting("prefill_chunk_size") is not None and model_type in NO_CHUNKED_PREFILL:
        raise ValueError(
            f"`prefill_chunk_size={setting('prefill_chunk_size')}` does not go with `{model_type}`, which reads its images in "
            "one piece: leave it out."
        )


def refuse_temperature(latent_temperature):
    is_number = isinstance(latent_temperature, numbers.Real) and not isinstance(latent_temperature, bool)
    if not is_number or not 0 <= latent_temperature < math.inf:
        raise ValueError(f"`latent_temperature` must be 0 or more, got {latent_temperature!r}.")


def refuse_generator(generator):
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(
            f"`generator` must be a `torch.Generator`, got {generator!r}: pass `torch.Generator().manual_seed(0)`, one for all rows."
        )


def refuse_latents_that_are_not_finite(latents, given, temperature):
    if not latents.isfinite().all():
        cause = "those that were given" if given else f"drawn at `latent_temperature` {temperature}"
        raise ValueError(
            f"The latents, {cause}, are not finite (NaN or infinite), and no answer follows from them: lower the temperature, or look for "
            "what overflows in them."
        )


def refuse_samples(num_latent_samples, return_majority, temperature, latents, setting):
    """
    Refuses what `num_latent_samples` and `return_majority` do not go with.

    Raises:
        ValueError: no positive integer, samples that would all be the same, or a setting that takes one sequence per prompt.
    """
    if num_latent_samples is not None and (type(num_latent_samples) is not int or num_latent_samples < 1):
        raise ValueError(
            f"`num_latent_samples` must be a positive integer or `None`, got {num_latent_samples!r}: how many latents are "
            "drawn per prompt."
        )
    if type(return_majority) is not bool:
        raise ValueError(f"`return_majority` must be `True` or `False`, got {return_majority!r}.")
    several = num_latent_samples is not None and num_latent_samples > 1
    if return_majority and not several:
        raise ValueError(
            f"`return_majority=True` needs several samples to vote, got `num_latent_samples={num_latent_samples}`: pass "
            "`num_latent_samples=8` and `latent_temperature=1.0`."
        )
    if not several:
        return
    name = f"`num_latent_samples={num_latent_samples}`"
    if latents is None and temperature == 0:
        raise ValueError(
            f"{name} at `latent_temperature` {temperature} would be the same sample {num_latent_samples} times: pass "
            "`latent_temperature=1.0`."
        )
    if (num_return_sequences := setting("num_return_sequences", 1)) > 1:
        raise ValueError(
            f"{name} does not go with `num_return_sequences={num_return_sequences}`: each sample gives one sequence. Leave "
            "`num_return_sequences` out, and with `do_sample=True` ask for more samples."
        )
    if (streamer := setting("streamer")) is not None:
        raise ValueError(
            f"{name} does not go with a `streamer`, got a `{type(streamer).__name__}`: it takes one sequence, and the samples "
            "are generated side by side. Leave one of the two out."
        )
    for stop in ("stopping_criteria", "stop_strings"):
        if return_majority and setting(stop) and setting("eos_token_id") is None:
            raise ValueError(
                f"`return_majority=True` does not go with `{stop}` where no `eos_token_id` is set: a row that is stopped goes on "
                "as long as others do, and its vote would be about what came after. Set `eos_token_id`."
            )
