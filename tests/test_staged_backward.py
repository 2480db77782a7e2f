"""A step's backward pass in stages, through the trainer, against one pass; every family is in tests/test_family_matrix.py."""

import pytest
import torch
from peft import LoraConfig
from tiny import build_tiny_backbone
from transformers import set_seed
from transformers.training_args import OptimizerNames

from modeling_amvl import AMVLForConditionalGeneration, AMVLProcessor
from modeling_amvl.branching_amvl import Cuts
from trainer import AMVLSFTConfig, AMVLSFTTrainer, staged_backward
from trainer.data.color_steps import build_color_steps


@pytest.fixture(scope="module")
def rows():
    return build_color_steps(8, image_size=48).select_columns(["images", "prompt", "completion"])


@pytest.fixture
def make_trainer(rows, tmp_path):
    def make(peft_config=None, **settings):
        backbone, processor = build_tiny_backbone(seed=0)
        processor = AMVLProcessor.from_backbone(processor)
        set_seed(0)
        model = AMVLForConditionalGeneration.from_backbone(
            backbone, latent_token_id=processor.latent_token_id, num_latents=2, latent_size=8
        )
        settings = {"bf16": False, "report_to": "none", "use_cpu": True, "self_test": False} | settings
        args = AMVLSFTConfig(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=8,
            disable_tqdm=True,
            training_summary=False,
            **settings,
        )
        return AMVLSFTTrainer(model, args, train_dataset=rows, processing_class=processor, peft_config=peft_config)

    return make


def gradients_of(trainer, in_stages, monkeypatch):
    """Of the run's one step, and in how many parts its backward pass came before the last."""
    parts, gradients = [], {}
    if not in_stages:
        trainer._stages_are_apart = False
    run = trainer._backward
    monkeypatch.setattr(trainer, "_backward", lambda loss: (parts.append(1), run(loss)))

    def keep(*args, **kwargs):
        gradients.update({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None})

    monkeypatch.setattr(trainer, "_clip_grad_norm", keep)
    trainer.train()
    return gradients, len(parts)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prior_ntp_weight": 0.0, "ntp_weight": 1.0},
        {"prior_ntp_weight": 0.0, "ntp_weight": 1.0, "beta": 0.0, "gamma": 0.0},
        {"ntp_weight": 0.0, "gamma": 0.0},
        {"activation_checkpointing": False, "freeze_vision": False},
        {"bf16": True},
    ],
    ids=str,
)
def test_stages_give_the_gradients_of_one_pass(make_trainer, settings, monkeypatch):
    whole, num_parts = gradients_of(make_trainer(**settings), False, monkeypatch)
    assert num_parts == 0
    staged, num_parts = gradients_of(make_trainer(**settings), True, monkeypatch)
    assert num_parts == (3 if settings.get("prior_ntp_weight", 1.0) else 2)
    scale = max(gradient.abs().max() for gradient in whole.values())
    for name in whole.keys() | staged.keys():
        one, other = (gradients.get(name, torch.zeros(())) for gradients in (whole, staged))
        # Under autocast each stage rounds what it hands a weight to bfloat16.
        assert (one - other).abs().max() <= (2e-2 if settings.get("bf16") else 1e-5) * scale, name


def test_an_adapter_and_optimizers_that_step_in_the_backward_pass_take_one_pass(make_trainer):
    assert make_trainer()._allows_stages()
    assert not make_trainer(peft_config=LoraConfig(r=2, target_modules=["q_proj"]))._allows_stages()
    for optim in (OptimizerNames.LOMO, OptimizerNames.ADALOMO, OptimizerNames.GALORE_ADAMW_LAYERWISE):
        trainer = make_trainer()
        trainer.args.optim = optim
        assert not trainer._allows_stages(), optim


def test_a_graph_that_stages_share_is_noticed():
    shared = torch.ones(3, requires_grad=True).exp()
    leaf = torch.ones(3, requires_grad=True)
    outputs = {"loss": (shared * leaf).sum(), "cuts": Cuts([[(shared.sin(), leaf)]])}
    assert not staged_backward.stages_are_apart(outputs)
    outputs["loss"] = leaf.sin().sum()
    assert staged_backward.stages_are_apart(outputs)
