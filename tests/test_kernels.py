"""The kernels people run: both plans and `generate` give under each what they give under SDPA, or it is refused.

Eager attention is tested in test_modeling.py. Liger's kernels are written in Triton, which needs a GPU: the trainer
refuses `use_liger_kernel`.
"""

import flash_attention
import pytest
import torch
from families import CORE_FAMILIES, IMAGE, make_answers, make_prompts
from family_matrix import BATCHES, build_model, distance
from torch.nn.attention import flex_attention as torch_flex
from transformers.integrations import flex_attention as transformers_flex

from modeling_amvl import AMVLForConditionalGeneration
from trainer import AMVLSFTConfig


SEED = 3
ROWS = BATCHES[0]
families = pytest.mark.parametrize("family", CORE_FAMILIES)


def step(model, family, plan):
    """Outputs and, where gradients are enabled, the gradient of all parameters in one vector."""
    model.config.multipass = plan
    model.zero_grad()
    torch.manual_seed(SEED)
    answers = make_answers((5, 2, 3))
    output = model(**make_prompts(family, ROWS), **answers)
    results = [output.loss, output.prior_mean, output.posterior_mean]
    results.append(output.logits * answers["completion_mask"][..., None])
    if torch.is_grad_enabled():
        (output.loss + output.prior_mean.square().mean() + output.posterior_mean.square().mean()).backward()
        results.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    return [result.detach() for result in results]


def assert_close(got, expected, tolerance=1e-5):
    assert len(got) == len(expected)
    for result, reference in zip(got, expected, strict=True):
        assert distance(result, reference) < tolerance


def generated(model, family):
    prompts = make_prompts(family, ROWS)
    output = model.generate(
        **prompts,
        min_new_tokens=4,
        max_new_tokens=4,
        suppress_tokens=[IMAGE],
        return_dict_in_generate=True,
        output_logits=True,
    )
    return [output.latents, torch.stack(output.logits, dim=1), output.sequences.float()]


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*CORE_FAMILIES, "aya_vision", "step3p7", "qwen3_5", "lfm2_vl", "instructblip"])
def test_flash_attention_2_gives_what_sdpa_gives(family, monkeypatch):
    """Sliding windows, hybrids and packed positions among them; the kernel's arithmetic stands in for the kernel."""
    model = build_model(family)
    expected, expected_tokens = step(model, family, "full"), generated(model, family)
    flash_attention.install(monkeypatch)
    model.set_attn_implementation("flash_attention_2")
    assert model.backbone.get_decoder().config._attn_implementation == "flash_attention_2"
    for plan in ("shared", "full"):
        assert_close(step(model, family, plan), expected, 1e-4)
    assert_close(generated(model, family), expected_tokens, 1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")
@families
def test_flex_attention_gives_what_sdpa_gives(family, monkeypatch):
    """Without gradients, which torch does not compute for it on a CPU; unfused, since its CPU compiler fails on masks."""
    model = build_model(family)
    if not model.backbone._supports_flex_attn:
        with pytest.raises(ValueError, match="does not support an attention implementation through torch's flex"):
            model.set_attn_implementation("flex_attention")
        return
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(transformers_flex.WrappedFlexAttention, "__call__", lambda self: torch_flex.flex_attention)
    with torch.no_grad():
        expected, expected_tokens = step(model, family, "full"), generated(model, family)
        model.set_attn_implementation("flex_attention")
        assert model.backbone.get_decoder().config._attn_implementation == "flex_attention"
        for plan in ("shared", "full"):
            assert_close(step(model, family, plan), expected)
        assert_close(generated(model, family), expected_tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Compilation
# ---------------------------------------------------------------------------------------------------------------------


def assert_compiled_is_the_same(family, compile_model, checkpointing=False):
    model = build_model(family).train()
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    expected, expected_tokens = step(model, family, "full"), generated(model, family)
    torch._dynamo.reset()
    compile_model(model)
    for plan in ("shared", "full", "shared"):
        assert_close(step(model, family, plan), expected)
    assert_close(generated(model, family), expected_tokens)


def compile_layers(model, **settings):
    for layer in model.backbone.get_decoder().layers:
        layer.compile(**settings)


@pytest.mark.slow
@pytest.mark.parametrize("family, checkpointing", [("llava", True), ("smolvlm", False)])
def test_compiled_layers_give_what_they_gave(family, checkpointing):
    assert_compiled_is_the_same(family, lambda model: compile_layers(model, backend="aot_eager"), checkpointing)


@pytest.mark.slow
def test_layers_compiled_to_machine_code_give_what_they_gave():
    assert_compiled_is_the_same("qwen2_5_vl", compile_layers)


def compiled_in_place(backbone):
    backbone.compile(backend="eager")
    return backbone


@families
@pytest.mark.parametrize(
    "compile_backbone",
    [lambda backbone: torch.compile(backbone, backend="eager"), compiled_in_place],
    ids=["wrapped", "in_place"],
)
def test_a_compiled_backbone_is_refused(family, compile_backbone):
    """Compiled code skips the hooks by which latents enter."""
    model = build_model(family)
    model.backbone = compile_backbone(model.backbone)
    prompts, answers = make_prompts(family, ROWS), make_answers((5, 2, 3))
    for call in (
        lambda: model(**prompts, **answers),
        lambda: model.generate(**prompts),
        lambda: AMVLForConditionalGeneration.from_backbone(model.backbone),
    ):
        with pytest.raises(ValueError, match=r"`backbone` is a compiled .*compile its layers instead"):
            call()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"torch_compile": True}, "layer.compile()"),
        ({"torch_compile_mode": "reduce-overhead"}, "layer.compile()"),
        ({"use_liger_kernel": True}, "`use_liger_kernel=True` would bypass the latents"),
    ],
    ids=str,
)
def test_a_kernel_that_does_not_go_with_latents_is_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        AMVLSFTConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)
