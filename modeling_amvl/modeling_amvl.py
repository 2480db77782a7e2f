"""AMVL around any vision-language model: prior, posterior and decoder over continuous latent slots.

Asymmetric Mutual Variational Learning, arXiv 2607.00461. One language model computes three distributions: the prior
p(Z | x) from `[x, L]`, the posterior q(Z | x, y) from `[x, y, L]`, and the decoder p(y | x, Z) from `[x, z, y]`, where x
is the prompt, y the answer, L are K placeholders and z their embeddings made from Z.

Shapes: B batch, S sequence, P prompt, A answer, K latent slots, Z latent size, D model size, V vocabulary.
"""

import os
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.utils import ModelOutput

from .adapters_amvl import commit_of, find_adapter, load_base, put_adapter, refuse_other_latents, save_beside_adapter
from .branching_amvl import PLANS, Cuts, as_leaf, output_embeddings
from .configuration_amvl import AMVLConfig
from .generation_amvl import LatentDecoding, effective_settings, generate_with_latents
from .latents_amvl import GaussianHead, draw_noise, reset_projection, sample_latents, upcast
from .refusals_amvl import (
    EMBEDDING_ROWS_MULTIPLE,
    refuse_backbone,
    refuse_compiled,
    refuse_completion,
    refuse_config,
    refuse_decoding,
    refuse_generator,
    refuse_initial_token,
    refuse_model_type,
    refuse_right_padding,
    refuse_samples,
    refuse_temperature,
    refuse_token,
)
from .sampling_amvl import keep_majority
from .sharding_amvl import whole


# What transformers, PEFT, TRL and accelerate look at to tell that weights are quantised.
QUANTISED = {"hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"}


@dataclass
class LatentDistribution(ModelOutput):
    """
    A diagonal Gaussian over the latent slots.

    Args:
        mean (`torch.Tensor`): `(B, K, Z)`.
        log_variance (`torch.Tensor`): `(B, K, Z)`, in nats.
    """

    mean: torch.Tensor | None = None
    log_variance: torch.Tensor | None = None


@dataclass
class AMVLOutput(ModelOutput):
    """
    What a step computes; the KL terms and their weights belong to the trainer.

    Args:
        loss (`torch.Tensor`): scalar, mean next-token loss on y in nats, decoded from the posterior's sample.
        logits (`torch.Tensor`): `(B, A, V)`, position i predicts `completion_ids[:, i]`. Without a completion
            `(B, 1, V)`: the first token of the answer, decoded from the prior.
        prior_mean, prior_log_variance (`torch.Tensor`): `(B, K, Z)`.
        posterior_mean, posterior_log_variance (`torch.Tensor`): `(B, K, Z)`.
        latents (`torch.Tensor`): `(B, K, Z)`, what the decoder read.
        latent_norm (`torch.Tensor`): `(B,)`, mean norm with which a row's latents entered the decoder; without gradient.
        prior_loss, prior_logits (`torch.Tensor`): as `loss` and `logits`, decoded from a sample of the prior; with
            `decode_prior=True` only.
        no_latents_loss, no_latents_logits (`torch.Tensor`): as `loss` and `logits`, decoded by the bare backbone from
            `[x, y]`; with `decode_no_latents=True` only.
        cuts ([`Cuts`]): where the graph was cut; with `in_stages=True` only, and where the plan allows it.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    prior_mean: torch.Tensor | None = None
    prior_log_variance: torch.Tensor | None = None
    posterior_mean: torch.Tensor | None = None
    posterior_log_variance: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    latent_norm: torch.Tensor | None = None
    prior_loss: torch.Tensor | None = None
    prior_logits: torch.Tensor | None = None
    no_latents_loss: torch.Tensor | None = None
    no_latents_logits: torch.Tensor | None = None
    cuts: Cuts | None = None


class AMVLForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """
    A stock vision-language model, `self.backbone`, that thinks in K continuous latent slots before it answers.

    Build one from a stock model with [`~AMVLForConditionalGeneration.from_backbone`], load a trained one with
    `AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True)`.

    Latents stand between the prompt and the answer that is being generated, once. In a chat of several turns the earlier answers
    are plain text of the prompt, as in training, and their latents are gone: what the chat template makes of a chat is asked as
    any prompt of that text is.

    Args:
        config ([`AMVLConfig`]): what to build.
        backbone (`PreTrainedModel`, *optional*): the model to wrap; built from `config.backbone_config` if not given.
    """

    config_class = AMVLConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # A quantiser leaves them as they are.
    _keep_in_fp32_modules = ["prior_head", "posterior_head", "latent_projection"]
    _tied_weights_keys = {}  # PEFT collects those of the backbone, but not beside `None`

    def __init__(self, config, backbone=None):
        if config.model_type != AMVLConfig.model_type:
            raise ValueError(
                f"`config.model_type` must be `{AMVLConfig.model_type}`, got `{config.model_type}`: wrap a stock model with "
                "`AMVLForConditionalGeneration.from_backbone`."
            )
        super().__init__(config)
        hidden_size = config.get_text_config(decoder=True).hidden_size
        bounds = config.min_log_variance, config.max_log_variance
        self.backbone = (
            AutoModelForImageTextToText.from_config(config.backbone_config) if backbone is None else backbone
        )
        self.prior_head = GaussianHead(hidden_size, config.latent_size, *bounds)
        self.posterior_head = GaussianHead(hidden_size, config.latent_size, *bounds)
        self.latent_projection = nn.Linear(config.latent_size, hidden_size)
        self._note_tied_table()
        self.base_commit = None  # of the Hub's repository that it was loaded from
        self.auto_plan = "shared"  # what `multipass="auto"` stands for; the trainer's self-test may change it
        self.post_init()
        # FSDP looks each of them up, and CLIP's vision tower alone, say, also names a layer of its text tower.
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = set(self._no_split_modules or ()) & present

    # -----------------------------------------------------------------------------------------------------------------
    # From a stock model, and back from disk
    # -----------------------------------------------------------------------------------------------------------------

    @classmethod
    def from_backbone(
        cls,
        model_or_id,
        num_latents=8,
        latent_size=512,
        latent_token_id=None,
        initial_token_id=None,
        initial_log_variance=-6.0,
        min_log_variance=-8.0,
        max_log_variance=4.0,
        latent_temperature=0.0,
        multipass="auto",
        **model_kwargs,
    ):
        """
        Wraps a stock image-text-to-text model; its weights are not copied, and stay as they are but for the placeholder's row.

        Args:
            model_or_id (`PreTrainedModel`, `str` or `os.PathLike`): a stock model, a Hub id or a local folder.
            num_latents (`int`, defaults to 8): K.
            latent_size (`int`, defaults to 512): Z.
            latent_token_id (`int`, *optional*): id of the placeholder, best `AMVLProcessor.latent_token_id`. By default
                the first row that the tokenizer of `model_or_id` leaves free; behind the table where that is a model, which
                has no tokenizer. The table grows only if it has no such row; a row that is new starts at its mean.
            initial_token_id (`int`, *optional*): id of the token whose embedding the placeholder starts as, best
                `AMVLProcessor.answer_start_id`: what the model knows to say after the prompt is then in the latents from the
                start. By default its row stays as it is. Not stated in the paper. `generate` never says the placeholder.
            initial_log_variance, min_log_variance, max_log_variance, latent_temperature, multipass: see [`AMVLConfig`].
            **model_kwargs: passed to `from_pretrained` where `model_or_id` is a string, `dtype` or `device_map` say.

        Returns:
            [`AMVLForConditionalGeneration`]: in the training mode, type and place of the backbone.

        Raises:
            ValueError: the backbone cannot carry latents, or a setting under which they would do nothing.
        """
        # Drawn before the backbone is loaded, which takes random numbers of its own under some engines.
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        commit = None
        if isinstance(model_or_id, (str, os.PathLike)):
            revision = {key: model_kwargs[key] for key in ("revision", "token", "cache_dir") if key in model_kwargs}
            backbone_config = AutoConfig.from_pretrained(model_or_id, **revision)
            refuse_config(backbone_config)
            if latent_token_id is None:
                latent_token_id = _first_free_id(model_or_id, revision)
            commit = commit_of(model_or_id, **revision)
            backbone = AutoModelForImageTextToText.from_pretrained(model_or_id, **model_kwargs)
        elif isinstance(model_or_id, nn.Module) and (
            isinstance(model_or_id, PreTrainedModel) or hasattr(model_or_id, "_orig_mod")
        ):
            if model_kwargs:
                raise TypeError(
                    f"`{next(iter(model_kwargs))}` is no argument of `from_backbone`; arguments of `from_pretrained` go "
                    "with a model id, not with a model that is already loaded."
                )
            backbone = model_or_id
        else:
            raise TypeError(
                f"`model_or_id` must be a transformers model, a Hub id or a local folder, got `{type(model_or_id).__name__}`."
            )
        refuse_compiled(backbone)
        refuse_backbone(backbone)
        embeddings = backbone.get_input_embeddings()
        with whole(embeddings.weight):
            num_rows = embeddings.weight.shape[0]
        latent_token_id = num_rows if latent_token_id is None else latent_token_id
        try:
            config = cls.config_class(
                num_latents=num_latents,
                latent_size=latent_size,
                latent_token_id=latent_token_id,
                initial_log_variance=initial_log_variance,
                min_log_variance=min_log_variance,
                max_log_variance=max_log_variance,
                latent_temperature=latent_temperature,
                multipass=multipass,
            )
        except Exception as error:  # transformers raises its own type, which no caller expects from a bad value
            raise ValueError(str(error.__cause__ or error)) from error
        # Not passed above: a new config would overwrite the attention implementation of every config inside it.
        config.backbone_config = backbone.config
        refuse_token(backbone, latent_token_id, num_rows)
        refuse_initial_token(initial_token_id, latent_token_id, num_rows)
        config.initial_token_id = initial_token_id
        _reserve_latent_token(backbone, latent_token_id, num_rows)
        if initial_token_id is not None:
            table = backbone.get_input_embeddings().weight
            with torch.no_grad(), whole(table):
                table[latent_token_id] = table[initial_token_id]
        # Where the table is the output layer's, too, the placeholder may be as likely as that token, or become so when an
        # adapter brings its row.
        suppressed = backbone.generation_config.suppress_tokens or []
        backbone.generation_config.suppress_tokens = sorted({*suppressed, latent_token_id})

        training = backbone.training
        model = cls(config, backbone)
        weight = backbone.get_input_embeddings().weight
        for part in (model.prior_head, model.posterior_head, model.latent_projection):
            part.to(device=weight.device, dtype=backbone.dtype)
        model.reset_latents(generator)
        model.generation_config = backbone.generation_config
        model.base_commit = commit
        for key in QUANTISED & vars(backbone).keys():
            setattr(model, key, getattr(backbone, key))
        if "quantization_config" in vars(backbone.config):
            config.quantization_config = backbone.config.quantization_config
        return model.train(training)

    def reset_latents(self, generator=None):
        """
        Starts prior and posterior as the same map, and the projection as its way back, at the norm of a typical token embedding.

        A fresh latent so enters the decoder as the state that it was read off, as in Coconut (arXiv 2412.06769); with fewer
        dimensions than the model has, as the part that they hold. Not stated in the paper.

        Args:
            generator (`torch.Generator`, *optional*): on the CPU, what the weights are drawn from.
        """
        config = self.config
        log_variance = min(max(config.initial_log_variance, config.min_log_variance), config.max_log_variance)
        self.prior_head.reset(log_variance, generator)
        self.posterior_head.load_state_dict(self.prior_head.state_dict())
        reset_projection(self.latent_projection, self.prior_head.mean, self.typical_embedding_norm(), log_variance)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """
        Loads a trained AMVL model, see `PreTrainedModel.from_pretrained`; an adapter on the base that it was trained on.

        Raises:
            ValueError: the checkpoint is another model type, or lacks the latent parts.
        """
        name = pretrained_model_name_or_path
        wants_loading_info = kwargs.pop("output_loading_info", False)
        if (found := find_adapter(name, kwargs)) is not None:
            model = put_adapter(load_base(cls, *found, **kwargs), *found).get_base_model()
            model._hf_peft_config_loaded = True  # for the methods that transformers has for adapters
            return (model, {}) if wants_loading_info else model
        config = kwargs.get("config")
        if isinstance(config, PreTrainedConfig):
            model_type = config.model_type
        else:
            given = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "subfolder") if key in kwargs}
            model_type = cls.config_class.get_config_dict(config or name, **given)[0].get("model_type")
        refuse_model_type(model_type, name)
        kwargs.setdefault("use_safetensors", True)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        parts = ("prior_head.", "posterior_head.", "latent_projection.")
        mismatched = {key for key, *_ in info["mismatched_keys"]}
        missing = sorted(key for key in {*info["missing_keys"], *mismatched} if key.startswith(parts))
        if missing:
            raise ValueError(
                f"`{name}` has no fitting weights for {missing}: its latents would be random. Save the "
                "whole model with `save_pretrained`, or wrap a stock model with `from_backbone`."
            )
        # With the latents off it is the backbone that generates; the file of settings is read for the whole alone.
        model.backbone.generation_config = model.generation_config
        model._note_tied_table()  # it was not tied yet when it was built
        hub = {key: kwargs[key] for key in ("revision", "token", "cache_dir") if key in kwargs}
        model.base_commit = commit_of(name, **hub)
        return (model, info) if wants_loading_info else model

    def save_pretrained(self, save_directory, *args, save_original_format=False, **kwargs):
        """
        Saves weights, configuration and this code, see `PreTrainedModel.save_pretrained`.

        Weights keep the names they have in this model. The default of transformers renames those of some backbones to an
        older form, which a trainer that resumes or loads its best checkpoint does not read back.
        """
        # torch's FSDP2 gives a model a class of its own, whose files would be saved as the model's code.
        sharded_class = type(self)
        self.__class__ = next(cls for cls in sharded_class.__mro__ if not cls.__module__.startswith("torch."))
        try:
            super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)
        finally:
            self.__class__ = sharded_class
        if self._hf_peft_config_loaded:  # transformers saves the adapter alone
            save_beside_adapter(self, save_directory)

    def _note_tied_table(self):
        """Where PEFT looks for it; it then changes the placeholder's row in both."""
        self.config.tie_word_embeddings = output_embeddings(self.backbone).weight is self.get_input_embeddings().weight

    @property
    def peft_config(self):
        """The adapters on this model, by name. PEFT sets it; an adapter that was trained around another model is refused."""
        if "_adapters" not in vars(self):
            raise AttributeError("`peft_config`: there is no adapter.")
        return vars(self)["_adapters"]

    @peft_config.setter
    def peft_config(self, adapters):
        refuse_other_latents(self.config, adapters)
        vars(self)["_adapters"] = adapters

    @peft_config.deleter
    def peft_config(self):
        del vars(self)["_adapters"]

    def get_input_embeddings(self):
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, value):
        self.backbone.set_output_embeddings(value)

    def get_encoder(self, modality=None):
        return self.backbone.get_encoder(modality=modality)

    # -----------------------------------------------------------------------------------------------------------------
    # A training step
    # -----------------------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids,
        attention_mask=None,
        completion_ids=None,
        completion_mask=None,
        labels=None,
        decode_prior=False,
        decode_no_latents=False,
        latent_temperature=None,
        noise=None,
        num_items_in_batch=None,
        in_stages=False,
        return_dict=None,
        **inputs,
    ):
        """
        One step: prior and posterior over the latents, and the answer decoded from the posterior's sample.

        Args:
            input_ids (`torch.LongTensor`): `(B, P)`, the prompts, left-padded. With `labels` `(B, S)`, prompts and
                answers in one sequence.
            attention_mask (`torch.LongTensor`, *optional*): of the shape of `input_ids`.
            completion_ids (`torch.LongTensor`, *optional*): `(B, A)`, the answers, right-padded.
            completion_mask (`torch.LongTensor`, *optional*): `(B, A)`, 0 on padding.
            labels (`torch.LongTensor`, *optional*): `(B, S)`, the stock form: the prompt is what precedes a row's first
                label, -100 elsewhere.
            decode_prior (`bool`, defaults to `False`): also decode from a sample of the prior, with the same noise.
            decode_no_latents (`bool`, defaults to `False`): also decode with the latents off.
            latent_temperature (`float`, *optional*): of every sample; by default 1 in a step, and the config's without an
                answer. 0 decodes from the means.
            noise (`torch.Tensor`, *optional*): `(B, K, Z)`, standard normal; of every sample. Drawn if not given.
            num_items_in_batch (`int`, *optional*): divides the summed loss instead of the number of answer tokens here.
            in_stages (`bool`, defaults to `False`): cut the graph between prompt, posterior and decoders, see `AMVLOutput.cuts`.
            return_dict (`bool`, *optional*): `False` gives a tuple. PEFT passes `None`.
            **inputs: the backbone's image inputs and per-token inputs of the prompt, as its processor returns them.

        Returns:
            [`AMVLOutput`].

        Raises:
            ValueError: answers without a token, or inputs that do not fit together.
        """
        if labels is not None:
            if completion_ids is not None:
                raise ValueError(
                    "`labels` and `completion_ids` are two forms of one thing, got both: pass one of them."
                )
            input_ids, attention_mask, completion_ids, completion_mask, targets, inputs = split_at_first_label(
                input_ids, attention_mask, labels, inputs
            )
        elif completion_ids is not None:
            completion_mask = torch.ones_like(completion_ids) if completion_mask is None else completion_mask
            refuse_completion(input_ids, completion_ids, completion_mask)
            targets = completion_ids.masked_fill(completion_mask == 0, -100)
        prompt = self.read_prompt(input_ids, attention_mask, inputs, with_prior=True)
        cuts = None
        if in_stages and completion_ids is not None:
            (prior_mean, prior_log_variance), cuts = self._read_prior_apart(prompt)
        else:
            prior_mean, prior_log_variance = self._read_prior(prompt)
        if noise is not None:
            self._refuse_slots("noise", noise, (input_ids.shape[0],))
            noise = noise.to(prior_mean.device, prior_mean.dtype)
        output = AMVLOutput(prior_mean=prior_mean, prior_log_variance=prior_log_variance)
        if completion_ids is None:
            temperature = self.config.latent_temperature if latent_temperature is None else latent_temperature
            output.latents = sample_latents(prior_mean, prior_log_variance, temperature, noise=noise)
            next_ids = input_ids.new_zeros(input_ids.shape[0], 1)  # its logits do not depend on it
            embedded = self.embed_latents(output.latents)
            output.logits = self._decode(prompt, next_ids, torch.ones_like(next_ids), embedded)
            return output.to_tuple() if return_dict is False else output

        mean, log_variance = self._read_posterior(prompt, completion_ids, completion_mask)
        temperature = 1.0 if latent_temperature is None else latent_temperature
        noise = draw_noise(mean, mean.shape[0]) if noise is None else noise
        output.posterior_mean, output.posterior_log_variance = mean, log_variance
        output.latents = sample_latents(mean, log_variance, temperature, noise=noise)
        embedded = self.embed_latents(output.latents)  # (B, K, D)
        if cuts is not None:
            output.cuts = Cuts([[], *cuts])
            embedded = as_leaf(embedded, output.cuts.stages[0])
        output.latent_norm = embedded.detach().float().norm(dim=-1).mean(-1)  # (B,)
        output.logits = self._decode(prompt, completion_ids, completion_mask, embedded)
        output.loss = next_token_loss(output.logits, targets, num_items_in_batch)
        if decode_prior:
            latents = sample_latents(prior_mean, prior_log_variance, temperature, noise=noise)
            embedded = self.embed_latents(latents)
            if cuts is not None:
                embedded = as_leaf(embedded, output.cuts.stages[0])
            output.prior_logits = self._decode(prompt, completion_ids, completion_mask, embedded)
            output.prior_loss = next_token_loss(output.prior_logits, targets, num_items_in_batch)
        if decode_no_latents:
            output.no_latents_logits = self._decode(prompt, completion_ids, completion_mask, None)
            output.no_latents_loss = next_token_loss(output.no_latents_logits, targets, num_items_in_batch)
        return output.to_tuple() if return_dict is False else output

    def embed_latents(self, latents):
        """What enters the decoder, `(B, K, D)`, of latents `(B, K, Z)`."""
        return self.latent_projection(latents.to(self.latent_projection.weight.dtype))

    def read_prompt(self, input_ids, attention_mask, inputs, with_prior=False):
        """The prompts of a step, ready to be continued, under the plan in use; where it can, with the prior's slots."""
        refuse_right_padding(attention_mask)
        refuse_compiled(self.backbone)
        self.config.validate_latents()
        refuse_other_latents(self.config, vars(self).get("_adapters", {}))
        plan = self.auto_plan if self.config.multipass == "auto" else self.config.multipass
        placeholders = self._placeholders(input_ids) if with_prior else None
        return PLANS[plan](self.backbone, input_ids, {"attention_mask": attention_mask, **inputs}, placeholders)

    def _placeholders(self, input_ids):
        return input_ids.new_full((input_ids.shape[0], self.config.num_latents), self.config.latent_token_id)  # (B, K)

    def _read_prior(self, prompt):
        hidden = prompt.hidden
        if hidden is None:
            placeholders = self._placeholders(prompt.input_ids)
            hidden, _ = prompt.branch(placeholders, torch.ones_like(placeholders))
        return self.prior_head(hidden)

    def _read_prior_apart(self, prompt):
        """The prior as leaves, and the cuts behind it and behind the prompt; as ever and `None` where there can be none."""
        with_prompt = prompt.hidden is not None
        of_prior, of_prompt = [], prompt.cut()
        prior = self._read_prior(prompt)
        if of_prompt is None:
            return prior, None
        prior = tuple(as_leaf(tensor, of_prior) for tensor in prior)
        return prior, [of_prior + of_prompt] if with_prompt else [of_prior, of_prompt]

    def _read_posterior(self, prompt, completion_ids, completion_mask):
        # The placeholders stand right behind each row's own last token, [y_i, L, padding]: with padding in between,
        # sliding windows, convolutions and recurrent states would read it.
        placeholders = self._placeholders(prompt.input_ids)
        num_rows, num_latents = placeholders.shape
        lengths = completion_mask.sum(1, keepdim=True).long()  # (B, 1)
        slots = lengths + torch.arange(num_latents, device=lengths.device)  # (B, K)
        ids = torch.cat([completion_ids, torch.zeros_like(placeholders)], dim=1).scatter(1, slots, placeholders)
        positions = torch.arange(ids.shape[1], device=lengths.device)
        mask = (positions < lengths + num_latents).to(completion_mask.dtype)  # (B, A + K)
        hidden, _ = prompt.branch(ids, mask)
        return self.posterior_head(hidden[torch.arange(num_rows, device=slots.device)[:, None], slots])

    def _decode(self, prompt, completion_ids, completion_mask, embedded):
        num_answer = completion_ids.shape[1]
        if embedded is None:
            return prompt.branch(completion_ids, completion_mask, num_predicted=num_answer)[1]
        placeholders = self._placeholders(prompt.input_ids)
        ids = torch.cat([placeholders, completion_ids], dim=1)
        mask = torch.cat([torch.ones_like(placeholders, dtype=completion_mask.dtype), completion_mask], dim=1)
        return prompt.branch(ids, mask, embedded, num_predicted=num_answer)[1]

    # -----------------------------------------------------------------------------------------------------------------
    # Analysis
    # -----------------------------------------------------------------------------------------------------------------

    def prior(self, input_ids, attention_mask=None, **inputs):
        """
        The prior p(Z | x) of prompts.

        Args:
            input_ids (`torch.LongTensor`): `(B, P)`, left-padded.
            attention_mask (`torch.LongTensor`, *optional*): `(B, P)`.
            **inputs: the backbone's image inputs.

        Returns:
            [`LatentDistribution`]: `(B, K, Z)` each.
        """
        return LatentDistribution(
            *self._read_prior(self.read_prompt(input_ids, attention_mask, inputs, with_prior=True))
        )

    def posterior(self, input_ids, completion_ids, attention_mask=None, completion_mask=None, **inputs):
        """
        The posterior q(Z | x, y) of prompts and their answers.

        Args:
            input_ids (`torch.LongTensor`): `(B, P)`, left-padded.
            completion_ids (`torch.LongTensor`): `(B, A)`, right-padded.
            attention_mask (`torch.LongTensor`, *optional*): `(B, P)`.
            completion_mask (`torch.LongTensor`, *optional*): `(B, A)`.
            **inputs: the backbone's image inputs.

        Returns:
            [`LatentDistribution`]: `(B, K, Z)` each.
        """
        completion_mask = torch.ones_like(completion_ids) if completion_mask is None else completion_mask
        refuse_completion(input_ids, completion_ids, completion_mask)
        prompt = self.read_prompt(input_ids, attention_mask, inputs)
        return LatentDistribution(*self._read_posterior(prompt, completion_ids, completion_mask))

    def log_prob(self, input_ids, completion_ids, latents, attention_mask=None, completion_mask=None, **inputs):
        """
        log p(y | x, Z) token by token, for given latents.

        Args:
            input_ids (`torch.LongTensor`): `(B, P)`, left-padded.
            completion_ids (`torch.LongTensor`): `(B, A)`, right-padded.
            latents (`torch.Tensor` or `None`): `(B, K, Z)`; `None` switches the latents off, log p(y | x) of the bare
                backbone.
            attention_mask (`torch.LongTensor`, *optional*): `(B, P)`.
            completion_mask (`torch.LongTensor`, *optional*): `(B, A)`.
            **inputs: the backbone's image inputs.

        Returns:
            `torch.Tensor`: `(B, A)`, in nats, 0 on padding; the sum over a row is log p(y | x, Z).
        """
        completion_mask = torch.ones_like(completion_ids) if completion_mask is None else completion_mask
        refuse_completion(input_ids, completion_ids, completion_mask)
        if latents is not None:
            self._refuse_slots("latents", latents, (input_ids.shape[0],))
        prompt = self.read_prompt(input_ids, attention_mask, inputs)
        embedded = None if latents is None else self.embed_latents(latents)
        logits = self._decode(prompt, completion_ids, completion_mask, embedded)  # (B, A, V)
        log_probs = upcast(logits).log_softmax(-1).gather(-1, completion_ids[..., None].to(logits.device))[..., 0]
        return log_probs.masked_fill(completion_mask.to(log_probs.device) == 0, 0.0)

    @torch.no_grad()
    def typical_embedding_norm(self, num_sampled=4096):
        """
        Median norm of a token embedding as it enters the language model, over rows that are not zero.

        Args:
            num_sampled (`int`, defaults to 4096): rows of the table looked at, evenly spread.

        Returns:
            `float`.
        """
        embeddings = self.get_input_embeddings()
        num_rows = self.config.get_text_config(decoder=True).vocab_size
        device = embeddings.weight.device
        ids = torch.linspace(0, num_rows - 1, min(num_rows, num_sampled), device=device).long()
        with whole(*embeddings.parameters()):
            norms = embeddings(ids[None])[0].float().norm(dim=-1)
        return float(norms[norms > 0].median())

    def _refuse_slots(self, name, value, num_rows):
        slots = (self.config.num_latents, self.config.latent_size)
        if not torch.is_tensor(value) or value.ndim != 3 or value.shape[1:] != slots or value.shape[0] not in num_rows:
            got = tuple(value.shape) if torch.is_tensor(value) else type(value).__name__
            rows = " or ".join(str(rows) for rows in num_rows)
            raise ValueError(f"`{name}` must be a tensor of shape ({rows}, {slots[0]}, {slots[1]}), got {got}.")

    # -----------------------------------------------------------------------------------------------------------------
    # Generation
    # -----------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        inputs=None,
        generation_config=None,
        latent_temperature=None,
        latents=None,
        generator=None,
        num_latent_samples=None,
        return_majority=False,
        **kwargs,
    ):
        """
        The backbone's `generate`, with latents between prompt and answer; takes what the processor returns.

        Args:
            inputs (`torch.LongTensor`, *optional*): `(B, P)`, left-padded prompts; or pass them as `input_ids`.
            generation_config (`GenerationConfig`, *optional*): as in the stock `generate`.
            latent_temperature (`float`, *optional*): a latent is `mean + latent_temperature * std * noise`; defaults to
                the config's. One sample per prompt, per returned sequence when sampling.
            latents (`torch.Tensor`, *optional*): `(B, K, Z)`, or a row per returned sequence: used instead of the prior's.
                With `num_latent_samples` `(B * n, K, Z)`.
            generator (`torch.Generator`, *optional*): seeds the noise of the latents.
            num_latent_samples (`int`, *optional*): n latents are drawn per prompt and each is answered, `(B * n, S)`, those of a
                prompt next to each other; 1 by default. The prompt runs once. Needs a temperature above 0. All prompts of a
                batch take the same n draws of noise, so that what a prompt is answered does not depend on the others, and
                the first of n samples are those of fewer.
            return_majority (`bool`, defaults to `False`): return the most frequent of the n answers alone, `(B, S)`. Answers
                are compared token by token up to the first end token; the first drawn wins a tie. To vote by text see
                `AMVLProcessor.majority`.
            **kwargs: as in the stock `generate`: image inputs, `max_new_tokens`, `do_sample`, `num_beams`, `streamer`, ...

        Returns:
            `torch.LongTensor` `(R, P + new)`, prompt and answer ids without latents; or the stock output class, with
            `latents` `(R, K, Z)` added, under `return_dict_in_generate`. With `return_majority` it also has
            `sample_sequences` `(B * n, S)` and `majority_share` `(B,)`, the share of the samples that gave the answer.

        Raises:
            ValueError: an argument that latents do not go with.
            RuntimeError: no latent reached the decoder.
        """
        if kwargs.get("use_cache", True) is None:
            del kwargs["use_cache"]  # the stock `generate` takes it for no cache
        setting = effective_settings(kwargs, generation_config, self.generation_config)
        refuse_decoding(setting, self.backbone)
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        if not torch.is_tensor(input_ids) or input_ids.ndim != 2:
            got = tuple(input_ids.shape) if torch.is_tensor(input_ids) else type(input_ids).__name__
            raise ValueError(
                f"`input_ids` must be a tensor of shape (B, P), got {got}: pass what the processor returns."
            )
        refuse_right_padding(kwargs.get("attention_mask"))
        refuse_compiled(self.backbone)
        self.config.validate_latents()
        refuse_other_latents(self.config, vars(self).get("_adapters", {}))
        temperature = self.config.latent_temperature if latent_temperature is None else latent_temperature
        refuse_temperature(temperature)
        refuse_generator(generator)
        num_rows, num_beams = input_ids.shape[0], setting("num_beams", 1)
        refuse_samples(num_latent_samples, return_majority, temperature, latents, setting)
        num_samples = num_latent_samples or 1
        if latents is not None:
            per_sequence = num_rows * max(num_beams, setting("num_return_sequences", 1))
            rows = (num_rows, per_sequence) if num_samples == 1 else (num_rows * num_samples,)
            self._refuse_slots("latents", latents, rows)
        decoding = LatentDecoding(self, num_rows, latents, temperature, generator, num_samples, num_beams)
        outputs = generate_with_latents(self.backbone, decoding, inputs, generation_config=generation_config, **kwargs)
        return (
            keep_majority(outputs, input_ids.shape[1], num_samples, setting("eos_token_id"))
            if return_majority
            else outputs
        )

    def generate_batch(self, *args, **kwargs):
        """Refused: continuous batching runs without a prefill of its own, so that no latent would reach the decoder."""
        raise NotImplementedError("`generate_batch` does not go with latents: call `generate` on a padded batch.")

    def init_continuous_batching(self, *args, **kwargs):
        """Refused, as `generate_batch` is."""
        raise NotImplementedError(
            "`init_continuous_batching` does not go with latents: call `generate` on a padded batch."
        )


# ---------------------------------------------------------------------------------------------------------------------
# Pure functions
# ---------------------------------------------------------------------------------------------------------------------


def next_token_loss(logits, targets, num_items_in_batch=None):
    """
    Next-token cross-entropy.

    Args:
        logits (`torch.Tensor`): `(B, A, V)`, position i predicts `targets[:, i]`.
        targets (`torch.LongTensor`): `(B, A)`, -100 where nothing counts.
        num_items_in_batch (`int`, *optional*): divides the sum; by default the number of targets.

    Returns:
        `torch.Tensor`: scalar, in nats per token.
    """
    targets = targets.to(logits.device)
    total = nn.functional.cross_entropy(upcast(logits.flatten(0, 1)), targets.flatten(), reduction="sum")
    return total / ((targets != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


def split_at_first_label(input_ids, attention_mask, labels, inputs):
    """
    Takes prompts and answers apart where the first label stands, whatever the padding side.

    Args:
        input_ids (`torch.LongTensor`): `(B, S)`.
        attention_mask (`torch.LongTensor`, *optional*): `(B, S)`.
        labels (`torch.LongTensor`): `(B, S)`, -100 where nothing counts.
        inputs (`dict`): the backbone's other inputs; those of shape `(B, S, ...)` are cut and moved like `input_ids`.

    Returns:
        `tuple`: prompts `(B, P)` left-padded and their mask, completions `(B, A)` right-padded, their mask and labels, and
        the other inputs of the prompts.

    Raises:
        ValueError: a row without a label, or whose first label stands at its first token.
    """
    num_rows, length = input_ids.shape
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    attended, labelled = attention_mask.bool(), (labels != -100) & attention_mask.bool()
    first = torch.where(labelled.any(1), labelled.int().argmax(1), length)[:, None]  # (B, 1)
    positions = torch.arange(length, device=input_ids.device)
    in_prompt, in_completion = attended & (positions < first), attended & (positions >= first)
    for name, kept in (("label", in_completion), ("token before its first label", in_prompt)):
        if not kept.any(1).all():
            row = int((~kept.any(1)).nonzero()[0])
            raise ValueError(f"Row {row} of `labels` has no {name}: a row needs a prompt and an answer.")

    def gather(kept, tensor, fill, left):
        size = int(kept.sum(1).max())
        # A stable sort brings the kept tokens of each row together, on the side away from the padding.
        order = kept.int().argsort(dim=1, stable=True, descending=not left)
        order = order[:, -size:] if left else order[:, :size]
        rows = torch.arange(num_rows, device=order.device)[:, None]
        dropped = ~kept.gather(1, order)
        return tensor[rows, order].masked_fill(dropped.view(*dropped.shape, *[1] * (tensor.ndim - 2)), fill)

    def of_prompt(tensor):
        return gather(in_prompt, tensor, 0, left=True)

    inputs = {
        key: of_prompt(value) if torch.is_tensor(value) and value.shape[:2] == input_ids.shape else value
        for key, value in inputs.items()
    }
    return (
        of_prompt(input_ids),
        of_prompt(attention_mask),
        gather(in_completion, input_ids, 0, left=False),
        gather(in_completion, attention_mask, 0, left=False),
        gather(in_completion, labels, -100, left=False),
        inputs,
    )


def _first_free_id(name, revision):
    """The id that the tokenizer of a Hub id or a folder gives to the next token; `None` where there is no tokenizer."""
    try:
        return len(AutoTokenizer.from_pretrained(name, **revision))
    except (OSError, ValueError):
        return None


def _reserve_latent_token(backbone, latent_token_id, num_rows):
    if latent_token_id >= num_rows:
        backbone.resize_token_embeddings(
            latent_token_id + 1, pad_to_multiple_of=EMBEDDING_ROWS_MULTIPLE, mean_resizing=False
        )
        tables = (backbone.get_input_embeddings(), backbone.get_output_embeddings())
        with torch.no_grad(), whole(*{table.weight: None for table in tables}):
            for module in tables:
                module.weight[num_rows:] = module.weight[:num_rows].float().mean(0).to(module.weight.dtype)


AMVLConfig.register_for_auto_class()
AMVLForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
