"""A model without storage, from a config alone, and its parameters by part."""

import torch
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForImageTextToText

from modeling_amvl import AMVLConfig, AMVLForConditionalGeneration
from modeling_amvl.branching_amvl import output_embeddings
from modeling_amvl.refusals_amvl import named_tokens, refuse_backbone, refuse_config

from ..adapters import LATENT_MODULES, prepare_peft_config, settle_adapter
from ..sft_trainer import AMVLSFTTrainer, amvl_model
from .kept import refuse_below_one


def wrap_config(config, num_latents=None, latent_size=None):
    """
    The config of an AMVL model around a stock one.

    Args:
        config (`PreTrainedConfig`): of a stock backbone, or of a trained AMVL model.
        num_latents (`int`, *optional*), latent_size (`int`, *optional*): K and Z; by default those of [`AMVLConfig`], or as trained.

    Returns:
        [`AMVLConfig`].

    Raises:
        ValueError: a backbone that cannot carry latents, or a number that is none or another than was trained.
    """
    latents = {"num_latents": num_latents, "latent_size": latent_size}
    latents = {key: value for key, value in latents.items() if value is not None}
    for key, value in latents.items():
        refuse_below_one(key, value)
    if config.model_type == AMVLConfig.model_type:
        for key, value in latents.items():
            if value != getattr(config, key):
                raise ValueError(
                    f"`{key}` is {value}, but the model was trained with {getattr(config, key)}: leave it out."
                )
        refuse_config(config.backbone_config)
        return config
    refuse_config(config)
    wrapped = AMVLConfig(**latents, latent_token_id=ordinary_token(config))
    wrapped.backbone_config = config  # not passed above: that would overwrite its attention implementation
    return wrapped


def ordinary_token(config):
    """The first id that no setting of a config names."""
    named = {token for _, token in named_tokens(config)}
    return next(token for token in range(len(named) + 1) if token not in named)


def build_model(
    config, dtype, peft_config=None, gradient_checkpointing=False, attn_implementation=None, freeze_vision=True
):
    """
    An AMVL model without storage, ready to be trained as [`AMVLSFTTrainer`] trains it: vision frozen, LoRA in place.

    Args:
        config ([`AMVLConfig`]): see [`wrap_config`].
        dtype (`torch.dtype`): of the weights as they are loaded.
        peft_config (`PeftConfig`, *optional*): LoRA.
        gradient_checkpointing (`bool`, defaults to `False`): as in the training settings.
        attn_implementation (`str`, *optional*): `"sdpa"` or `"eager"`.
        freeze_vision (`bool`, defaults to `True`): `False` for a backbone without a vision encoder of its own.

    Returns:
        [`AMVLForConditionalGeneration`] or `PeftModel`: of fake tensors, said to be on the CPU.

    Raises:
        ValueError: a backbone that cannot carry latents, has no vision encoder to freeze, or has one that is to be trained.
    """
    with torch.device("meta"):
        backbone = AutoModelForImageTextToText.from_config(
            config.backbone_config, dtype=dtype, attn_implementation=attn_implementation
        )
        refuse_backbone(backbone)
        model = AMVLForConditionalGeneration._from_config(config, backbone=backbone, dtype=dtype)
    if peft_config is not None:
        peft_config = prepare_peft_config(peft_config, model)
    if freeze_vision:
        AMVLSFTTrainer._freeze_vision(model, peft_config)
    elif vision_encoder(backbone) is not None:
        raise ValueError(
            "`freeze_vision=False` is not planned: what a vision encoder keeps for its backward pass depends on its images. "
            "Leave it out."
        )
    if gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if peft_config is not None:
        model = get_peft_model(model, peft_config, low_cpu_mem_usage=True)
        settle_adapter(model)
        if gradient_checkpointing:
            model.enable_input_require_grads()
    _say_on_cpu(model)
    return model.train()


def _say_on_cpu(model):
    """Makes tensors on the meta device fake ones that say they are on the CPU: their kernels are those of a real step."""
    mode, fakes = FakeTensorMode(allow_non_fake_inputs=True), {}

    def fake(tensor):
        if id(tensor) not in fakes:
            with mode:
                empty = torch.empty_like(tensor, device="cpu")
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            fakes[id(tensor)] = torch.nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return fakes[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers, vars(module)):
            for name, tensor in tensors.items():
                if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                    tensors[name] = fake(tensor)


def vision_encoder(backbone):
    """The vision encoder of a backbone, `None` where it has none of its own."""
    encoder = backbone.get_encoder(modality="image")
    return None if encoder is backbone or encoder is backbone.base_model else encoder


def parts_of(model):
    """
    Parameters by part.

    Args:
        model ([`AMVLForConditionalGeneration`] or `PeftModel`): with or without storage.

    Returns:
        `dict[str, tuple[int, int]]`: parameters of each part, all and trained ones; each counts once. What lies between vision
        encoder and language model is the projector; with some families, Qwen2.5-VL say, it is part of the encoder.
    """
    inner = amvl_model(model)
    backbone = inner.backbone
    # The first to claim a parameter has it.
    claims = {name.replace("_", " "): getattr(inner, name).parameters() for name in LATENT_MODULES}
    claims["LoRA"] = (p for name, p in backbone.named_parameters() if "lora_" in name)
    tables = (backbone.get_input_embeddings(), output_embeddings(backbone))
    claims["embeddings and head"] = (p for table in tables for p in table.parameters())
    encoder = vision_encoder(backbone)
    claims["vision encoder"] = () if encoder is None else encoder.parameters()
    claims["language model"] = backbone.get_decoder().parameters()
    claims["projector"] = backbone.parameters()
    taken, parts = set(), {}
    for part, claimed in claims.items():
        found = {p for p in claimed if p not in taken}
        taken |= found
        parts[part] = (sum(p.numel() for p in found), sum(p.numel() for p in found if p.requires_grad))
    first = ("vision encoder", "projector", "language model", "embeddings and head", "LoRA")
    return {part: parts[part] for part in (*first, *parts) if parts[part][0]}
