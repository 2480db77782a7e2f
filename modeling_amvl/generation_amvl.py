"""Latents first, then the stock `generate`: the prompt, k latent positions, and the answer share one cache.

`generate` runs the backbone's own decoding loops. Only the prefill differs: after the prompt it adds the latents to the
cache, so that ids, streamers, processors and stopping criteria see the prompt and the answer and never a latent.

With several samples per prompt the prompt still runs once: what it leaves is repeated, see sampling_amvl.py.

Shapes: B rows of the prompt, R rows of the decoding loop (B times samples, beams or returned sequences), P prompt, K latents.
"""

import functools

import torch
from transformers.generation import GenerationMixin
from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL

from .branching_amvl import (
    SharedPrompt,
    complete_inputs,
    extend_model_kwargs,
    keep_encoded_images,
    required_inputs,
    run_prompt,
    tapped,
    without_checkpointing,
)
from .cache_amvl import CACHE_ARGUMENT, takes_back
from .families_amvl import IMAGES_IN_A_ROW
from .latents_amvl import sample_latents
from .refusals_amvl import refuse_latents_that_are_not_finite
from .sampling_amvl import draw_rows, per_prompt, repeat_cache


def effective_settings(arguments, generation_config, model_generation_config):
    """
    What each setting of a call of `generate` comes to, as there: arguments, then what the two configs set.

    Args:
        arguments (`dict`): keyword arguments of the call.
        generation_config (`GenerationConfig`, *optional*): passed to the call.
        model_generation_config (`GenerationConfig`): the model's, from the checkpoint's file say.

    Returns:
        `Callable`: from the name of a setting, and a default in place of `None`, to its value.
    """

    def setting(name, default=None):
        value = arguments.get(name)
        if name not in arguments:
            value = getattr(generation_config, name, None)
            value = getattr(model_generation_config, name, None) if value is None else value
        return default if value is None else value

    return setting


class LatentDecoding:
    """
    Puts the latents between a prompt and its answer, once per call of `generate`.

    Args:
        model ([`AMVLForConditionalGeneration`]): owner of the heads.
        num_rows (`int`): B.
        latents (`torch.Tensor`, *optional*): `(B, K, Z)` or `(R, K, Z)`, used instead of the prior's.
        temperature (`float`): of the prior's sample.
        generator (`torch.Generator`, *optional*): source of the noise.
        num_samples (`int`): latents drawn per prompt.
        num_beams (`int`): rows of the decoding loop that share a sample.
    """

    def __init__(self, model, num_rows, latents, temperature, generator, num_samples, num_beams):
        self.model = model
        self.num_rows = num_rows
        self.latents = latents
        self.temperature = temperature
        self.generator = generator
        self.num_samples = num_samples
        self.num_beams = num_beams
        # Rows of the loop for each one that the prompt runs in: samples share it, beams and returned sequences are on their own.
        self.repeats = num_samples * num_beams if num_samples > 1 else 1
        self.num_prompt_tokens = None
        self.decoded_latents = None

    def placeholders(self, num_rows, device):
        """Ids `(num_rows, K)` of the latent placeholder."""
        config = self.model.config
        return torch.full((num_rows, config.num_latents), config.latent_token_id, dtype=torch.long, device=device)

    def given_latents(self, num_rows, device):
        """The latents that `generate` was given, for R rows: `(R, K, Z)`."""
        repeats = num_rows // self.latents.shape[0]
        return self.latents.to(device).repeat_interleave(repeats, dim=0)

    def sample(self, hidden, num_rows):
        """A sample of the prior, `(R, K, Z)`, read off the hidden states `(*, K, D)` of the placeholders."""
        mean, log_variance = self.model.prior_head(hidden)
        noise = None
        if self.temperature != 0:
            noise = draw_rows(mean, self.num_rows, num_rows, self.num_samples, self.num_beams, self.generator)
        repeats = num_rows // hidden.shape[0]
        mean, log_variance = (part.repeat_interleave(repeats, dim=0) for part in (mean, log_variance))
        return sample_latents(mean, log_variance, self.temperature, noise=noise)


class LatentDecodingMixin:
    """Mixed in before a backbone's class: its own `generate`, with latents behind the prompt."""

    latent_decoding: LatentDecoding

    def _prefill(self, input_ids, generation_config, model_kwargs, is_first_iteration=True):
        decoding = self.latent_decoding
        if not model_kwargs.get("use_cache"):
            raise RuntimeError("`generate` runs without a cache, in which latents live: set `use_cache=True`.")
        cache = model_kwargs[CACHE_ARGUMENT]
        num_rows, repeats = input_ids.shape[0], decoding.repeats
        prompt_ids = input_ids[::repeats]
        placeholders = decoding.placeholders(prompt_ids.shape[0], input_ids.device)
        reads_prior, hidden = decoding.latents is None, None
        if reads_prior and generation_config.prefill_chunk_size is None and takes_back(self, cache):
            # One forward less: the placeholders run behind the prompt and leave the cache again.
            outputs, hidden = run_prompt(self, prompt_ids, model_kwargs, placeholders)
            cache.crop(-placeholders.shape[1])
        else:
            outputs = super()._prefill(prompt_ids, generation_config, model_kwargs, is_first_iteration)
        keep_encoded_images(self, model_kwargs, outputs)
        if not reads_prior:
            latents = decoding.given_latents(num_rows, input_ids.device)
        else:
            if hidden is None:
                prompt = SharedPrompt.resume(self, prompt_ids, model_kwargs, outputs, cache)
                hidden, _ = prompt.branch(placeholders, torch.ones_like(placeholders))
            latents = decoding.sample(hidden, num_rows)
        refuse_latents_that_are_not_finite(latents, not reads_prior, decoding.temperature)

        num_latents = latents.shape[1]
        decoding.num_prompt_tokens = input_ids.shape[1]
        extended = extend_model_kwargs(self, model_kwargs, outputs, input_ids.shape[1], num_latents)
        if repeats > 1:
            repeat_cache(cache, prompt_ids.shape[0], repeats)
            extended = self._repeat_model_kwargs(prompt_ids, extended, repeats)
        extended[CACHE_ARGUMENT] = cache
        # In place: the decoding loop goes on with this very dictionary.
        model_kwargs.clear()
        model_kwargs.update(extended)
        model_inputs = self.prepare_inputs_for_generation(
            input_ids, next_sequence_length=num_latents, is_first_iteration=False, **model_kwargs
        )
        model_inputs.pop("logits_to_keep", None)  # the tap below keeps the last position itself
        embedded = decoding.model.embed_latents(latents)
        with tapped(self, (num_rows, num_latents), slice(-1, None), embedded):
            outputs = self(**model_inputs, return_dict=True)
        decoding.decoded_latents = latents
        return outputs

    def _repeat_model_kwargs(self, prompt_ids, model_kwargs, repeats):
        # Pictures that no later forward reads are not repeated.
        read = required_inputs(type(self))
        rest = {
            key: value
            for key, value in model_kwargs.items()
            if read or key not in MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL
        }
        images = rest.pop(name := IMAGES_IN_A_ROW.get(self.config.model_type), None)
        _, repeated = super()._expand_inputs_for_generation(
            input_ids=prompt_ids, expand_size=repeats, is_encoder_decoder=False, **rest
        )
        if images is not None:
            by_row = images.unflatten(0, (prompt_ids.shape[0], -1))
            repeated[name] = by_row.repeat_interleave(repeats, dim=0).flatten(0, 1)
        return repeated

    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
        decoding = self.latent_decoding
        if decoding.num_prompt_tokens is not None:
            prompt, answer = input_ids.tensor_split([decoding.num_prompt_tokens], dim=1)
            placeholders = decoding.placeholders(input_ids.shape[0], input_ids.device)
            input_ids = torch.cat([prompt, placeholders, answer], dim=1)
        model_inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        return complete_inputs(self, input_ids, kwargs, model_inputs)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        repeats = self.latent_decoding.repeats
        if repeats == 1:
            return super()._expand_inputs_for_generation(
                expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
            )
        # The ids alone, by which the decoding loop counts its rows: the prompt runs once.
        return input_ids.repeat_interleave(repeats, dim=0), model_kwargs

    def _get_logits_processor(
        self,
        generation_config,
        *args,
        encoder_input_ids=None,
        prefix_allowed_tokens_fn=None,
        model_kwargs=None,
        **kwargs,
    ):
        decoding = self.latent_decoding
        if decoding.repeats > 1:  # processors that look prompts up find them, row by row
            encoder_input_ids = encoder_input_ids.repeat_interleave(decoding.repeats, dim=0)
            prefix_allowed_tokens_fn = per_prompt(prefix_allowed_tokens_fn, decoding.num_samples)
            if (mask := model_kwargs.get("attention_mask")) is not None:
                model_kwargs = {**model_kwargs, "attention_mask": mask.repeat_interleave(decoding.repeats, dim=0)}
        return super()._get_logits_processor(
            generation_config,
            *args,
            encoder_input_ids=encoder_input_ids,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            model_kwargs=model_kwargs,
            **kwargs,
        )

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        max_cache_length += self.latent_decoding.model.config.num_latents
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )


@functools.cache
def _decoder_class(native_class):
    # Named as the backbone's class: transformers looks some behaviour up by class name.
    namespace = {"__module__": native_class.__module__, "main_input_name": "input_ids"}
    return type(native_class.__name__, (LatentDecodingMixin, native_class), namespace)


def generate_with_latents(backbone, decoding, inputs, **kwargs):
    """
    Runs the stock `generate` on `backbone` with `decoding` behind the prompt; `backbone` itself stays as it is.

    Returns:
        what the stock `generate` returns; with `return_dict_in_generate` also `latents` `(R, K, Z)`.

    Raises:
        RuntimeError: no latent reached the decoder.
    """
    native_class = type(backbone)
    decoder = object.__new__(_decoder_class(native_class))  # shares every module and hook with the backbone
    settings = decoding.model.generation_config
    vars(decoder).update(vars(backbone), latent_decoding=decoding, generation_config=settings)
    # transformers takes the cache from checkpointed layers; without gradients there is nothing to checkpoint.
    with without_checkpointing(backbone.modules()):
        outputs = GenerationMixin.generate(decoder, inputs, **kwargs)
    if decoding.decoded_latents is None:
        raise RuntimeError(
            f"No latent reached the decoder of `{native_class.__name__}`: its `generate` has no prefill."
        )
    if not torch.is_tensor(outputs):
        outputs["latents"] = decoding.decoded_latents
    return outputs
