"""The self-test of a run's first batch: silent where both plans agree, and by name about what it finds where not."""

import functools

import pytest
import torch
from families import CORE_FAMILIES, make_answers, make_prompts
from family_matrix import BATCHES, build_model
from planted_errors import PLANTED, plant_bidirectional_attention

from modeling_amvl import branching_amvl
from trainer.selftest import self_test


ROWS = BATCHES[0]
families = pytest.mark.parametrize("family", CORE_FAMILIES)
planted = pytest.mark.parametrize(("plant", "message"), PLANTED.values(), ids=PLANTED)


def make_batch(family, dtype=torch.float32):
    return make_prompts(family, ROWS, dtype) | make_answers((5, 2, 3))


def state(model):
    """Everything about a model and the process that a self-test must leave as it is."""
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
        "training": [module.training for module in model.modules()],
        "dropout": [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)],
        "random": torch.get_rng_state(),
        "plan": (model.config.multipass, model.auto_plan, sorted(vars(model))),
        "hooks": [len(module._forward_hooks) for module in model.modules()],
    }


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_same(got[name], value)
        elif torch.is_tensor(value):
            assert torch.equal(got[name], value), name
        else:
            assert got[name] == value, name


@families
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_where_the_plans_agree_it_finds_nothing_and_leaves_everything_as_it_was(family, checkpointing):
    model = build_model(family).train()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    self_test(model, make_batch(family))  # transformers leaves some hooks of its own at the first call
    before = state(model)
    report = self_test(model, make_batch(family))
    assert report.failed == report.full_failed == []
    assert set(report.differences) == {"loss", "prior", "posterior", "gradient"}
    assert all(difference < 1e-5 for difference in report.differences.values())
    assert_same(state(model), before)


@families
def test_without_gradients_it_compares_no_gradient(family):
    with torch.no_grad():
        report = self_test(build_model(family), make_batch(family))
    assert report.failed == [] and set(report.differences) == {"loss", "prior", "posterior"}


@families
def test_rounding_in_half_precision_is_no_disagreement(family):
    report = self_test(build_model(family, dtype=torch.bfloat16), make_batch(family, torch.bfloat16))
    assert report.failed == report.full_failed == []
    assert max(report.differences.values()) > 1e-4  # there was some
    assert report.tolerances["gradient"] < 0.5


@families
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["autocast", "bfloat16"])
def test_half_precision_is_seen_behind_logits_that_are_cast_up(family, weights):
    model = build_model(family, dtype=weights)
    native = model.backbone.forward

    def forward(*args, **kwargs):
        outputs = native(*args, **kwargs)
        outputs.logits = outputs.logits.float()
        return outputs

    model.backbone.forward = functools.wraps(native)(forward)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=weights == torch.float32):
        report = self_test(model, make_batch(family, weights))
    assert report.failed == report.full_failed == []
    assert min(report.tolerances.values()) >= 5e-3


@families
@planted
def test_a_planted_error_is_named(family, plant, message, monkeypatch):
    plant(monkeypatch)
    report = self_test(build_model(family), make_batch(family))
    assert any(message in found for found in report.failed), report.failed
    assert report.full_failed == []


@families
def test_a_shared_plan_that_raises_is_named(family, monkeypatch):
    monkeypatch.setattr(branching_amvl.SharedPrompt, "branch", lambda *args, **kwargs: [][0])
    report = self_test(build_model(family), make_batch(family))
    assert report.failed == ["the shared plan raised IndexError: list index out of range"]


@families
@pytest.mark.parametrize("part", ["latent_projection", "backbone"])
def test_a_batch_that_is_not_finite_under_either_plan_says_nothing_about_them(family, part):
    model = build_model(family)
    parameter = next(getattr(model, part).parameters())
    with torch.no_grad():
        parameter.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="under the full plan, `loss`.* are not finite"):
        self_test(model, make_batch(family))


@families
def test_an_attention_that_sees_the_answer_ahead_is_a_failure_of_the_backbone(family, monkeypatch):
    plant_bidirectional_attention(monkeypatch)
    report = self_test(build_model(family), make_batch(family))
    for failed in (report.failed, report.full_failed):
        assert any("the attention is not causal" in found for found in failed)
