"""AMVLSFTTrainer trains what it says, logs what the model computes, and refuses what would bypass the latents."""

import functools
import logging
import re
import shutil
import types
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from PIL import Image
from planted_errors import PLANTED, plant_bidirectional_attention, plant_shifted_positions
from safetensors.torch import load_file
from tiny import build_tiny_backbone
from transformers import BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from modeling_amvl import AMVLForConditionalGeneration, AMVLProcessor, branching_amvl
from trainer import AMVLDataCollator, AMVLSFTConfig, AMVLSFTTrainer, sft_trainer
from trainer.noise import row_noise
from trainer.objective import forward_kl, reverse_kl


NUM_LATENTS, LATENT_SIZE = 4, 16
ANSWERS = ("red", "top left", "blue, then green, then red", "2", "right of the circle", "cyan", "0", "no other color")


# ---------------------------------------------------------------------------------------------------------------------
# A tiny model, its processor, rows
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def make_parts():
    """Returns a function that builds one and the same stock model each time, and its stock processor."""
    return functools.partial(build_tiny_backbone, seed=0)


@pytest.fixture
def processor(make_parts):
    return AMVLProcessor.from_backbone(make_parts()[1])


@pytest.fixture
def make_model(make_parts, processor):
    """Returns a function that builds one and the same AMVL model each time."""

    def make(seed=0):
        backbone, _ = make_parts()
        torch.manual_seed(seed)
        model = AMVLForConditionalGeneration.from_backbone(
            backbone,
            num_latents=NUM_LATENTS,
            latent_size=LATENT_SIZE,
            latent_token_id=processor.latent_token_id,
        )
        # Prior and posterior start as one map, and the stock weights small: make every path matter.
        with torch.no_grad():
            for parameter in (*model.prior_head.parameters(), *model.posterior_head.parameters()):
                parameter.add_(0.05 * torch.randn_like(parameter))
        return model

    return make


def make_row(index, answer=None):
    pixels = np.random.default_rng(index).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    question = f"What color is the {('circle', 'square', 'cross')[index % 3]}?"
    return {
        "images": [Image.fromarray(pixels)],
        "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
        "completion": [
            {
                "role": "assistant",
                "content": [{"type": "text", "text": ANSWERS[index % len(ANSWERS)] if answer is None else answer}],
            }
        ],
    }


@pytest.fixture(scope="module")
def rows():
    return datasets.Dataset.from_list([make_row(index) for index in range(8)])


@pytest.fixture(scope="module")
def held_out():
    return datasets.Dataset.from_list([make_row(index) for index in range(100, 105)])


@pytest.fixture
def make_config(tmp_path):
    def make(folder="run", **settings):
        defaults = {
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "training_summary": False,
            "save_strategy": "no",
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 2,
            "max_steps": 2,
            "self_test": False,  # has tests of its own
            # The paper's objective, which the rows of its ablation depart from.
            "gamma": 0.001,
            "ntp_weight": 1.0,
            "prior_ntp_weight": 0.0,
            "kl_order": "forward_first",
            # Both KL terms at their full weight from the first step, unless the test is about the schedule.
            "kl_warmup_steps": 0,
            "kl_delay_steps": 0,
        }
        return AMVLSFTConfig(str(tmp_path / folder), **{**defaults, **settings})

    return make


@pytest.fixture
def make_trainer(make_model, make_config, processor, rows):
    def make(model=None, folder="run", train_dataset=rows, processing_class=processor, **settings):
        passed = {
            name: settings.pop(name)
            for name in ("eval_dataset", "peft_config", "callbacks", "data_collator", "compute_metrics")
            if name in settings
        }
        return AMVLSFTTrainer(
            make_model() if model is None else model,
            make_config(folder, **{"beta": 1.0, "gamma": 0.1, **settings}),
            train_dataset=train_dataset,
            processing_class=processing_class,
            **passed,
        )

    return make


@pytest.fixture
def train(make_trainer):
    """Builds a trainer and trains; a trainer seeds when it is built, so nothing may come in between."""

    def build_and_train(*args, **settings):
        trainer = make_trainer(*args, **settings)
        trainer.train()
        return trainer

    return build_and_train


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(before, model):
    """Names of the parameters that are no longer what they were."""
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def logged(trainer, key, wanted="loss"):
    """The values of `key` in the logs that also hold `wanted`, step by step."""
    return [entry[key] for entry in trainer.state.log_history if wanted in entry]


def a_batch(trainer, num_rows=4):
    return trainer.data_collator([trainer.train_dataset[index] for index in range(num_rows)])


def gradients(model, loss):
    assert model.training  # otherwise the trainer evaluates
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(actual, expected, tolerance=1e-5):
    """Equal up to `tolerance` of the largest; a missing gradient is zero."""
    scale = max(gradient.abs().max() for gradient in expected.values())
    assert scale > 0
    for name in actual.keys() | expected.keys():
        one, other = (gradients.get(name, torch.zeros(())) for gradients in (actual, expected))
        assert (one - other).abs().max() <= tolerance * scale, name


# ---------------------------------------------------------------------------------------------------------------------
# What moves
# ---------------------------------------------------------------------------------------------------------------------


def test_every_trainable_parameter_moves_and_the_frozen_vision_encoder_does_not(make_trainer):
    trainer = make_trainer()
    before = weights_of(trainer.model)
    trainer.train()
    vision = {name for name in before if "vision_tower." in name}
    assert vision
    assert moved(before, trainer.model) == before.keys() - vision
    assert {name for name, parameter in trainer.model.named_parameters() if not parameter.requires_grad} == vision


def test_the_vision_encoder_moves_when_it_is_not_frozen(make_trainer):
    trainer = make_trainer(freeze_vision=False)
    before = weights_of(trainer.model)
    trainer.train()
    # CLIP's last norm feeds the pooled output alone, which LLaVA does not read.
    unread = {name for name in before if "vision_tower." in name and "post_layernorm." in name}
    assert len(unread) == 2
    assert moved(before, trainer.model) == before.keys() - unread


def test_the_forward_term_alone_moves_the_priors_path_and_nothing_else(make_trainer):
    trainer = make_trainer(ntp_weight=0.0, gamma=0.0, max_steps=1)
    model = trainer.model.train()
    batch = a_batch(trainer)
    prompt = {name: value for name, value in batch.items() if not name.startswith("completion_")}

    # The reference: the posterior is a constant, the prior alone is differentiated.
    torch.manual_seed(1)
    actual = gradients(model, trainer.compute_loss(model, batch))
    with torch.no_grad():
        posterior = model.posterior(**batch)
    prior = model.prior(**prompt)
    expected = forward_kl((prior.mean, prior.log_variance), (posterior.mean, posterior.log_variance)).mean()
    expected = gradients(model, expected)
    assert_same_gradients(actual, expected)
    silent = {name for name in weights_of(model) if name.startswith(("posterior_head.", "latent_projection."))}
    assert len(silent) == 8
    assert all(actual.get(name, torch.zeros(1)).abs().max() == 0 for name in silent)

    before = weights_of(model)
    trainer.train()
    vision = {name for name in before if "vision_tower." in name}
    changed = moved(before, model)
    assert changed.isdisjoint(silent | vision)
    assert {name for name in before if name.startswith("prior_head.")} <= changed
    assert any(name.startswith("backbone.") for name in changed)  # the language model computes the prior


def test_the_reverse_term_alone_moves_the_posteriors_path_and_nothing_else(make_trainer):
    trainer = make_trainer(ntp_weight=0.0, beta=0.0, gamma=0.5, max_steps=1)
    model = trainer.model.train()
    batch = a_batch(trainer)
    prompt = {name: value for name, value in batch.items() if not name.startswith("completion_")}

    torch.manual_seed(1)
    actual = gradients(model, trainer.compute_loss(model, batch))
    with torch.no_grad():
        prior = model.prior(**prompt)
    posterior = model.posterior(**batch)
    expected = reverse_kl((prior.mean, prior.log_variance), (posterior.mean, posterior.log_variance)).mean()
    assert_same_gradients(actual, gradients(model, 0.5 * expected))
    silent = {name for name in weights_of(model) if name.startswith(("prior_head.", "latent_projection."))}
    assert len(silent) == 8
    assert all(actual.get(name, torch.zeros(1)).abs().max() == 0 for name in silent)

    before = weights_of(model)
    trainer.train()
    changed = moved(before, model)
    assert changed.isdisjoint(silent)
    assert {name for name in before if name.startswith("posterior_head.")} <= changed


def test_the_next_token_term_alone_does_not_touch_the_priors_head(make_trainer):
    trainer = make_trainer(beta=0.0, gamma=0.0)
    before = weights_of(trainer.model)
    trainer.train()
    untouched = {name for name in before if name.startswith("prior_head.") or "vision_tower." in name}
    assert moved(before, trainer.model) == before.keys() - untouched


def test_prior_ntp_weight_adds_the_gradient_of_decoding_from_the_prior(make_trainer):
    weight = 0.3
    plain, hybrid = make_trainer(), make_trainer(folder="hybrid", prior_ntp_weight=weight)
    plain.model.train()
    hybrid.model.train()
    batch = a_batch(plain)

    def step_gradients(trainer):
        return gradients(trainer.model, trainer.compute_loss(trainer.model, dict(batch)))

    def prior_gradients(model):
        noise = row_noise(plain.args.seed, 0, 0, len(batch["input_ids"]), NUM_LATENTS, LATENT_SIZE)
        return gradients(model, model(**batch, decode_prior=True, noise=noise).prior_loss)

    base, total, extra = step_gradients(plain), step_gradients(hybrid), prior_gradients(hybrid.model)
    expected = {name: base.get(name, 0) + weight * extra.get(name, torch.zeros(())) for name in base | extra}
    assert_same_gradients(total, expected)


def test_the_prior_ntp_term_alone_moves_the_priors_head_and_not_the_posteriors(make_trainer):
    trainer = make_trainer(ntp_weight=0.0, beta=0.0, gamma=0.0, prior_ntp_weight=1.0)
    before = weights_of(trainer.model)
    trainer.train()
    untouched = {name for name in before if name.startswith("posterior_head.") or "vision_tower." in name}
    assert moved(before, trainer.model) == before.keys() - untouched


# ---------------------------------------------------------------------------------------------------------------------
# The ablation
# ---------------------------------------------------------------------------------------------------------------------

# At the first and at the second step, with no warm-up and a delay of one step: (NTP weight, beta, gamma).
ABLATION = {
    "NTP only": [(1, 0, 0), (1, 0, 0)],
    "forward only": [(0, 1, 0), (0, 1, 0)],
    "reverse only": [(0, 0, 0), (0, 0, 0.1)],
    "NTP + forward": [(1, 1, 0), (1, 1, 0)],
    "NTP + reverse": [(1, 0, 0), (1, 0, 0.1)],
    "NTP + both, reverse first": [(1, 0, 0.1), (1, 1, 0.1)],
    "NTP + both, forward first": [(1, 1, 0), (1, 1, 0.1)],
}


def ablation_table():
    """Fields of each row of the table in the docstring of the configuration."""
    found = re.findall(r"^    \| (.+?) \| (.+?) \|$", AMVLSFTConfig.__doc__, re.MULTILINE)
    table = {name: fields.strip("`") for name, fields in found if name not in ("objective", "---")}
    return {name: "" if fields == "the default" else fields for name, fields in table.items()}


def test_the_documented_ablation_table_has_the_papers_rows():
    assert ablation_table().keys() == ABLATION.keys()


@pytest.mark.parametrize("objective", ABLATION)
def test_an_ablation_row_trains_with_the_weights_that_it_says(make_trainer, objective):
    fields = eval(f"dict({ablation_table()[objective]})")
    trainer = make_trainer(**fields, kl_delay_steps=1)
    before = weights_of(trainer.model)
    trainer.train()
    expected = ABLATION[objective]
    assert list(zip(logged(trainer, "beta"), logged(trainer, "gamma"), strict=True)) == [row[1:] for row in expected]
    for entry, (ntp_weight, beta, gamma) in zip(trainer.state.log_history[:2], expected, strict=True):
        total = ntp_weight * entry["ntp"] + (beta * entry["forward_kl"] + gamma * entry["reverse_kl"]) / LATENT_SIZE
        assert entry["loss"] == pytest.approx(total, rel=1e-5, abs=1e-6)
    assert moved(before, trainer.model)


def test_the_sum_over_slots_and_dimensions_is_one_field_away(make_trainer):
    trainer = make_trainer(kl_reduction="sum", beta=0.5, gamma=0.25, max_steps=1)
    trainer.train()
    entry = trainer.state.log_history[0]
    total = entry["ntp"] + NUM_LATENTS * (0.5 * entry["forward_kl"] + 0.25 * entry["reverse_kl"])
    assert entry["loss"] == pytest.approx(total, rel=1e-5)


def test_the_schedule_counts_optimiser_steps_of_the_run(make_trainer):
    trainer = make_trainer(
        max_steps=10,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=1,
        kl_warmup_steps=2,
        kl_delay_steps=0.5,
    )
    trainer.train()
    assert logged(trainer, "beta") == [0.5] + [1.0] * 9
    assert logged(trainer, "gamma") == pytest.approx([0.0] * 5 + [0.05] + [0.1] * 4)


# ---------------------------------------------------------------------------------------------------------------------
# A step
# ---------------------------------------------------------------------------------------------------------------------


def test_the_models_own_forward_runs_once_per_micro_batch(make_trainer, held_out, monkeypatch):
    calls = []
    forward = AMVLForConditionalGeneration.forward

    @functools.wraps(forward)
    def counted(self, *args, **kwargs):
        calls.append(self.training)
        return forward(self, *args, **kwargs)

    def refuse(*args, **kwargs):
        raise AssertionError("This is SFTTrainer's loss, which knows nothing of latents.")

    monkeypatch.setattr(AMVLForConditionalGeneration, "forward", counted)
    monkeypatch.setattr(SFTTrainer, "compute_loss", refuse)
    trainer = make_trainer(
        max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, eval_dataset=held_out
    )
    assert type(trainer.model).forward is counted and "forward" not in vars(trainer.model)
    trainer.train()
    assert calls == [True] * 6
    trainer.evaluate()
    assert calls[6:] == [False] * 3  # 5 rows in batches of 2


def test_the_fused_forward_of_sft_trainer_is_gone_under_lora_too(make_trainer):
    trainer = make_trainer(peft_config=lora())
    inner = trainer.model.get_base_model()
    assert inner.forward.__func__ is AMVLForConditionalGeneration.forward


def test_the_vision_encoder_runs_once_per_step(make_trainer):
    trainer = make_trainer(max_steps=1, prior_ntp_weight=1.0)
    calls = []
    trainer.model.get_encoder(modality="image").register_forward_hook(lambda *args: calls.append(1))
    trainer.train()
    assert len(calls) == 1


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_accumulating_eight_batches_of_one_is_one_batch_of_eight(train, make_model, reduction):
    settings = {"max_steps": 3, "kl_reduction": reduction, "prior_ntp_weight": 0.5, "optim": "sgd"}
    whole = train(per_device_train_batch_size=8, **settings)
    parts = train(folder="parts", per_device_train_batch_size=1, gradient_accumulation_steps=8, **settings)
    for key in ("loss", "grad_norm", "ntp", "forward_kl", "reverse_kl", "prior_std", "token_accuracy_posterior"):
        assert logged(parts, key) == pytest.approx(logged(whole, key), rel=1e-4, abs=1e-6), key
    assert len(set(logged(whole, "loss"))) == 3
    before = weights_of(make_model())
    for name, parameter in whole.model.named_parameters():
        step = (parameter - before[name]).abs().max()
        difference = (parameter - parts.model.get_parameter(name)).abs().max()
        assert difference <= 1e-3 * step + 1e-7, name


def test_the_noise_of_a_row_is_its_own_and_the_same_in_any_split_of_the_step():
    whole = row_noise(0, 3, 0, 8, NUM_LATENTS, LATENT_SIZE)
    assert whole.shape == (8, NUM_LATENTS, LATENT_SIZE) and whole.dtype == torch.float32
    assert torch.equal(
        torch.cat([row_noise(0, 3, first, 2, NUM_LATENTS, LATENT_SIZE) for first in range(0, 8, 2)]), whole
    )
    others = [row_noise(0, 4, 0, 8, NUM_LATENTS, LATENT_SIZE), row_noise(1, 3, 0, 8, NUM_LATENTS, LATENT_SIZE)]
    every = torch.cat([whole, *others]).flatten(1)
    correlations = torch.corrcoef(every).fill_diagonal_(0).abs()
    assert correlations.max() < 5 / every.shape[1] ** 0.5
    many = row_noise(2**32 - 1, 10**6, 10**6, 512, NUM_LATENTS, LATENT_SIZE)
    assert abs(many.mean()) < 0.03 and abs(many.std() - 1) < 0.03


def test_rows_of_a_step_weigh_by_their_tokens_not_by_their_micro_batch(train, make_model, processor, monkeypatch):
    monkeypatch.setattr(sft_trainer, "row_noise", lambda *args: torch.zeros(args[3:]))  # latents at their means
    # One short and one long answer: the mean over tokens is not the mean of the two means.
    pair = [make_row(0, "red"), make_row(1, "blue, then green, then red, then cyan")]
    trainer = train(
        train_dataset=datasets.Dataset.from_list(pair),
        max_steps=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        beta=0.0,
        gamma=0.0,
    )
    model, losses, counts = make_model(), [], []
    for row in pair:
        batch = AMVLDataCollator(processor)([row])
        with torch.no_grad():
            latents = model.posterior(**batch).mean
            losses.append(-model.log_prob(**batch, latents=latents).sum().item())
        counts.append(batch["completion_ids"].numel())
    by_token = sum(losses) / sum(counts)
    by_row = (losses[0] / counts[0] + losses[1] / counts[1]) / 2
    assert abs(by_token - by_row) > 1e-2
    assert logged(trainer, "loss") == pytest.approx([by_token], rel=1e-5)


@pytest.mark.parametrize("num_rows", [5, 8])
def test_the_last_step_of_an_epoch_may_be_smaller(make_trainer, rows, num_rows):
    trainer = make_trainer(
        train_dataset=rows.select(range(num_rows)),
        max_steps=-1,
        num_train_epochs=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    assert trainer.state.global_step == 2
    for entry in trainer.state.log_history[:2]:
        total = entry["ntp"] + (entry["forward_kl"] + 0.1 * entry["reverse_kl"]) / LATENT_SIZE
        assert entry["loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("multipass", ["shared", "full"])
def test_gradient_checkpointing_gives_the_same_losses(make_trainer, make_model, multipass):
    losses = []
    for checkpointing in (True, False):
        model = make_model()
        model.config.multipass = multipass
        trainer = make_trainer(
            model, folder=f"checkpointing-{checkpointing}", gradient_checkpointing=checkpointing, max_steps=3
        )
        trainer.train()
        assert model.is_gradient_checkpointing is checkpointing
        losses.append(logged(trainer, "loss") + logged(trainer, "grad_norm"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(set(losses[0])) == 6


def test_bf16_autocast_trains_close_to_fp32(train, make_model):
    settings = {"max_steps": 3, "optim": "sgd", "learning_rate": 1e-3}
    exact, mixed = train(**settings), train(folder="bf16", bf16=True, **settings)
    before = weights_of(make_model())
    assert logged(mixed, "loss") == pytest.approx(logged(exact, "loss"), rel=0.05)
    assert logged(mixed, "loss") != logged(exact, "loss")
    assert {parameter.dtype for parameter in mixed.model.parameters()} == {torch.float32}
    vision = {name for name in before if "vision_tower." in name}
    assert moved(before, mixed.model) == before.keys() - vision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision_train_and_stay_of_their_type(make_trainer, make_model, dtype):
    exact = make_trainer(max_steps=1)
    exact.train()
    trainer = make_trainer(make_model().to(dtype), folder="half", optim="sgd", max_steps=2)
    before = weights_of(trainer.model)
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(logged(exact, "loss")[0], rel=0.05)
    assert np.isfinite(logged(trainer, "loss")).all() and np.isfinite(logged(trainer, "grad_norm")).all()
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {dtype}
    assert any(name.startswith("prior_head.") for name in moved(before, trainer.model))


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation, checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def split_batch(batch):
    """What the model's public calls take of the prompt, and the answer's ids."""
    return {name: value for name, value in batch.items() if not name.startswith("completion_")}, batch[
        "completion_ids"
    ]


@torch.no_grad()
def measured(model, collator, rows, source):
    """NLL in nats per token, share of answers that greedy decoding gives, share of tokens, from the public calls."""
    nll, tokens, answers, first = 0.0, 0, 0, 0
    for row in rows:
        batch = collator([row])
        prompt, ids = split_batch(batch)
        if source == "no_latents":
            latents, generate = None, model.backbone.generate
        else:
            latents = model.prior(**prompt).mean if source == "prior" else model.posterior(**batch).mean
            generate = functools.partial(model.generate, latents=latents)
        nll -= model.log_prob(**batch, latents=latents).sum().item()
        generated = generate(**prompt, max_new_tokens=ids.shape[1], do_sample=False)[:, prompt["input_ids"].shape[1] :]
        answers += torch.equal(generated, ids)
        output = model(**batch, latent_temperature=0.0, decode_prior=True, decode_no_latents=True)
        logits = {"prior": output.prior_logits, "posterior": output.logits, "no_latents": output.no_latents_logits}
        first += (logits[source].argmax(-1) == ids).sum().item()
        tokens += ids.numel()
    return {
        f"eval_nll_{source}": nll / tokens,
        f"eval_accuracy_{source}": answers / len(rows),
        f"eval_token_accuracy_{source}": first / tokens,
    }


def test_evaluation_logs_what_the_model_computes_under_each_source_of_latents(make_trainer, rows, held_out):
    some = datasets.concatenate_datasets([rows, held_out])
    trainer = make_trainer(eval_dataset=some, max_steps=25, per_device_train_batch_size=8, learning_rate=5e-3)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.model.eval()
    expected = {}
    for source in ("prior", "posterior", "no_latents"):
        expected |= measured(trainer.model, trainer.data_collator, some, source)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert 0 < expected["eval_accuracy_posterior"] < 1  # some right, some wrong: the comparison has teeth
    assert len({round(expected[f"eval_nll_{source}"], 4) for source in ("prior", "posterior", "no_latents")}) == 3


def test_evaluation_does_not_depend_on_the_batch_size_and_draws_nothing(make_trainer, held_out):
    results = []
    for size in (1, 5):
        trainer = make_trainer(folder=f"batch-{size}", eval_dataset=held_out, per_device_eval_batch_size=size)
        state = torch.get_rng_state()
        results.append({k: v for k, v in trainer.evaluate().items() if re.match("eval_(nll|accuracy|token|.*_kl)", k)})
        del state
    assert len(results[0]) >= 11
    assert results[0] == pytest.approx(results[1], rel=1e-4, abs=1e-6)


def test_evaluation_samples_at_the_temperature_of_the_models_config(make_trainer, held_out):
    trainer = make_trainer(eval_dataset=held_out)
    still = [trainer.evaluate()["eval_nll_prior"] for _ in range(2)]
    trainer.model.config.latent_temperature = 1.0
    noisy = [trainer.evaluate()["eval_nll_prior"] for _ in range(2)]
    assert still[0] == still[1]
    assert len({*still, *noisy}) == 3


def test_each_of_several_evaluation_sets_is_measured(make_trainer, rows, held_out):
    trainer = make_trainer(eval_dataset={"seen": rows, "held_out": held_out})
    metrics = trainer.evaluate()
    assert metrics["eval_seen_loss"] != metrics["eval_held_out_loss"]
    logs = [entry for entry in trainer.state.log_history if "eval_nll_prior" in entry]
    assert len(logs) == 2
    for entry, dataset in zip(logs, (rows, held_out), strict=True):
        expected = measured(trainer.model.eval(), trainer.data_collator, dataset, "prior")
        assert entry["eval_nll_prior"] == pytest.approx(expected["eval_nll_prior"], rel=1e-4)


def test_metrics_of_the_user_get_the_priors_logits_and_the_answers(make_trainer, held_out):
    seen = {}

    def compute_metrics(prediction):
        counted = prediction.label_ids != -100
        shifted = prediction.predictions - prediction.predictions.max(-1, keepdims=True)
        log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        gold = np.take_along_axis(log_probs, np.where(counted, prediction.label_ids, 0)[..., None], -1)[..., 0]
        seen["rows"] = len(prediction.label_ids)
        return {"nll": -gold[counted].mean()}

    trainer = make_trainer(eval_dataset=held_out, compute_metrics=compute_metrics)
    metrics = trainer.evaluate()
    assert seen["rows"] == len(held_out)
    assert metrics["eval_nll"] == pytest.approx(metrics["eval_nll_prior"], rel=1e-4)


def test_logs_of_a_step_hold_every_quantity(make_trainer):
    trainer = make_trainer(prior_ntp_weight=0.5)
    trainer.train()
    entry = trainer.state.log_history[0]
    names = {"loss", "ntp", "ntp_prior", "forward_kl", "reverse_kl", "beta", "gamma", "prior_std", "posterior_std"}
    names |= {"active_units", "latent_norm_ratio", "token_accuracy_posterior", "token_accuracy_prior"}
    assert names <= entry.keys()
    assert 0 < entry["active_units"] <= NUM_LATENTS * LATENT_SIZE
    total = entry["ntp"] + 0.5 * entry["ntp_prior"] + (entry["forward_kl"] + 0.1 * entry["reverse_kl"]) / LATENT_SIZE
    assert entry["loss"] == pytest.approx(total, rel=1e-5)


def test_a_log_over_several_steps_is_the_mean_of_their_logs(train):
    each = train(max_steps=4, logging_steps=1)
    pairs = train(folder="pairs", max_steps=4, logging_steps=2)
    for key in ("loss", "forward_kl", "beta", "prior_std", "latent_norm_ratio"):
        values = logged(each, key)
        assert logged(pairs, key) == pytest.approx([np.mean(values[:2]), np.mean(values[2:])], rel=1e-5), key


@pytest.mark.parametrize("peft", [False, True], ids=["whole", "lora"])
def test_resuming_gives_the_losses_and_weights_of_the_uninterrupted_run(train, make_trainer, peft):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "kl_warmup_steps": 3, "kl_delay_steps": 1}
    settings |= {"lr_scheduler_type": "linear", "per_device_train_batch_size": 2}
    whole = train(peft_config=lora() if peft else None, **settings)
    resumed = make_trainer(folder="resumed", peft_config=lora() if peft else None, **settings)
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir, "checkpoint-2")))
    for key in ("loss", "ntp", "forward_kl", "beta", "gamma", "grad_norm"):
        assert logged(resumed, key) == pytest.approx(logged(whole, key), rel=1e-6), key
    assert len(set(logged(resumed, "loss"))) == 4
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(resumed.model.get_parameter(name), parameter, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("peft", [False, True], ids=["whole", "lora"])
def test_the_best_checkpoint_is_loaded_at_the_end(make_trainer, held_out, peft):
    class Recorder(TrainerCallback):
        weights = {}

        def on_save(self, args, state, control, model, **kwargs):
            self.weights[state.global_step] = weights_of(model)

    recorder = Recorder()
    trainer = make_trainer(
        eval_dataset=held_out,
        callbacks=[recorder],
        peft_config=lora() if peft else None,
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_nll_prior",
        greater_is_better=True,  # the worst of a run that learns: an early checkpoint
    )
    trainer.train()
    values = logged(trainer, "eval_nll_prior", wanted="eval_nll_prior")
    best = 1 + int(np.argmax(values))
    assert best < 3 and values[best - 1] != values[-1]
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert not moved(recorder.weights[best], trainer.model)
    assert moved(recorder.weights[3], trainer.model)
    assert trainer.evaluate()["eval_nll_prior"] == pytest.approx(values[best - 1], rel=1e-6)


def test_a_checkpoint_loads_by_itself_and_computes_the_same(make_trainer, processor):
    trainer = make_trainer(save_strategy="steps", save_steps=2)
    trainer.train()
    checkpoint = Path(trainer.args.output_dir, "checkpoint-2")
    loaded = AMVLForConditionalGeneration.from_pretrained(checkpoint).eval()
    reread = AMVLProcessor.from_pretrained(checkpoint)
    batch, again = a_batch(trainer), AMVLDataCollator(reread)([make_row(index) for index in range(4)])
    prompt, _ = split_batch(batch)
    trainer.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.prior(**split_batch(again)[0]).mean, trainer.model.prior(**prompt).mean, rtol=1e-6, atol=1e-6
        )
    assert not list(checkpoint.glob("pytorch_model*")) and list(checkpoint.glob("*.safetensors"))


# ---------------------------------------------------------------------------------------------------------------------
# LoRA
# ---------------------------------------------------------------------------------------------------------------------


def lora(**settings):
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0, **settings})


HEADS = {"prior_head", "posterior_head", "latent_projection"}


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"], ids=["attention", "all-linear"])
def test_lora_keeps_heads_and_projection_trainable_and_leaves_frozen_vision_alone(make_trainer, targets):
    trainer = make_trainer(peft_config=lora(target_modules=targets))
    before = weights_of(trainer.model)
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert set(trainer.model.peft_config["default"].modules_to_save) == HEADS
    of_heads = {name for name in trainable if ".modules_to_save." in name}
    rows = {name for name in trainable if "trainable_tokens_delta" in name}
    assert len(rows) == 1  # the placeholder's
    adapters = trainable - of_heads - rows
    assert {name.split(".modules_to_save.")[0].rsplit(".", 1)[-1] for name in of_heads} == HEADS
    assert any(".language_model." in name for name in adapters)
    assert all("lora_" in name and "vision_tower." not in name for name in adapters)
    assert not any("lora_" in name for name in of_heads)  # they are trained whole
    assert not any("lora_" in name for name in before if "vision_tower." in name)
    trainer.train()
    assert moved(before, trainer.model) == trainable


def test_modules_to_save_of_the_user_are_kept(make_trainer):
    trainer = make_trainer(peft_config=lora(modules_to_save=["multi_modal_projector"]))
    assert set(trainer.model.peft_config["default"].modules_to_save) == {*HEADS, "multi_modal_projector"}


def test_lora_adapts_the_vision_encoder_when_it_is_not_frozen(make_trainer):
    trainer = make_trainer(peft_config=lora(), freeze_vision=False)
    assert any("lora_" in name for name, _ in trainer.model.named_parameters() if "vision_tower." in name)


def test_modules_that_the_user_excludes_do_not_bring_adapters_back_into_frozen_vision(make_trainer):
    trainer = make_trainer(peft_config=lora(exclude_modules=["o_proj"]))
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert not any("vision_tower." in name for name in trainable)


def test_an_adapter_folder_restores_the_trained_model(make_trainer, make_model, tmp_path):
    trainer = make_trainer(peft_config=lora(), save_strategy="steps", save_steps=2)
    trainer.train()
    checkpoint = Path(trainer.args.output_dir, "checkpoint-2")
    stored = load_file(checkpoint / "adapter_model.safetensors")
    for name in HEADS:
        assert any(f"{name}." in key for key in stored), name
    assert not any("vision_tower." in key for key in stored)

    batch = a_batch(trainer)
    model = trainer.model.eval()

    def logits(model):
        with torch.no_grad():
            output = model(**batch, latent_temperature=0.0, decode_prior=True)
        return output.logits, output.prior_logits, output.prior_mean

    fresh = make_model().eval()
    assert not torch.allclose(logits(fresh)[1], logits(model)[1], atol=1e-2)  # training did something
    restored = PeftModel.from_pretrained(fresh, checkpoint).eval()
    torch.testing.assert_close(logits(restored), logits(model), rtol=1e-5, atol=1e-5)

    merged = restored.merge_and_unload()
    assert type(merged) is AMVLForConditionalGeneration
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    reloaded = AMVLForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(reloaded), logits(model), rtol=1e-4, atol=1e-4)


def test_a_peft_model_with_trainable_heads_is_accepted_as_it_is(make_trainer, make_model):
    model = get_peft_model(make_model(), lora(modules_to_save=sorted(HEADS)))
    trainer = make_trainer(model)
    before = weights_of(trainer.model)
    trainer.train()
    changed = moved(before, trainer.model)
    for name in HEADS:
        assert any(f"{name}.modules_to_save." in key for key in changed), name
    assert not any("vision_tower." in key for key in changed)


def test_lora_generates_with_latents(make_trainer):
    trainer = make_trainer(peft_config=lora())
    trainer.train()
    prompt, _ = split_batch(a_batch(trainer))
    output = trainer.model.eval().generate(
        **prompt, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    assert output.latents.shape == (4, NUM_LATENTS, LATENT_SIZE)
    with torch.no_grad():
        torch.testing.assert_close(output.latents, trainer.model.get_base_model().prior(**prompt).mean)


# ---------------------------------------------------------------------------------------------------------------------
# Models and data of other forms
# ---------------------------------------------------------------------------------------------------------------------


def test_a_folder_of_a_stock_model_is_wrapped_with_its_own_processor(make_trainer, make_parts, tmp_path):
    backbone, stock_processor = make_parts()
    backbone.save_pretrained(tmp_path / "stock")
    stock_processor.save_pretrained(tmp_path / "stock")
    trainer = make_trainer(str(tmp_path / "stock"), processing_class=None, max_steps=1)
    model = trainer.model
    assert type(model) is AMVLForConditionalGeneration
    assert (model.config.num_latents, model.config.latent_size) == (8, 512)
    assert isinstance(trainer.processing_class, AMVLProcessor)
    assert model.config.latent_token_id == trainer.processing_class.latent_token_id
    torch.testing.assert_close(
        model.backbone.get_parameter("model.multi_modal_projector.linear_1.weight"),
        backbone.get_parameter("model.multi_modal_projector.linear_1.weight"),
    )
    trainer.train()


def test_a_folder_of_an_amvl_checkpoint_is_loaded_as_it_is(make_trainer, make_model, processor, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "amvl")
    processor.save_pretrained(tmp_path / "amvl")
    trainer = make_trainer(str(tmp_path / "amvl"), processing_class=None, max_steps=1)
    assert not moved(weights_of(model), trainer.model)
    assert (trainer.model.config.num_latents, trainer.model.config.latent_size) == (NUM_LATENTS, LATENT_SIZE)
    assert trainer.processing_class.latent_token == processor.latent_token
    trainer.train()


def test_model_init_kwargs_reach_a_model_given_by_name(make_trainer, make_model, processor, tmp_path):
    make_model().save_pretrained(tmp_path / "amvl")
    trainer = make_trainer(str(tmp_path / "amvl"), model_init_kwargs={"dtype": torch.bfloat16})
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.bfloat16}


def test_a_loaded_model_that_knows_its_folder_needs_no_processing_class(make_trainer, make_model, processor, tmp_path):
    make_model().save_pretrained(tmp_path / "amvl")
    processor.save_pretrained(tmp_path / "amvl")
    model = AMVLForConditionalGeneration.from_pretrained(tmp_path / "amvl")
    trainer = make_trainer(model, processing_class=None)
    assert trainer.processing_class.latent_token_id == model.config.latent_token_id


def test_a_stock_processor_is_made_an_amvl_one(make_trainer, make_parts, make_model):
    stock = make_parts()[1]
    trainer = make_trainer(processing_class=stock)
    assert isinstance(trainer.processing_class, AMVLProcessor)
    assert trainer.processing_class.latent_token_id == trainer.model.config.latent_token_id
    trainer.train()


def test_a_streamed_dataset_trains_as_the_stored_one(train, rows):
    stored = train(folder="stored", train_sampling_strategy="sequential")
    streamed = train(train_dataset=rows.to_iterable_dataset())
    assert logged(streamed, "loss") == pytest.approx(logged(stored, "loss"), rel=1e-6)


def test_a_bad_row_of_a_streamed_dataset_stops_training_by_name(make_trainer):
    bad = datasets.Dataset.from_list([make_row(0), {**make_row(1), "images": []}]).to_iterable_dataset()
    trainer = make_trainer(train_dataset=bad)  # nothing can be checked before
    with pytest.raises(ValueError, match="Row 1 of `train_dataset` cannot be trained on: .* has no image"):
        trainer.train()


@pytest.mark.parametrize("form", ["messages", "plain text", "image"])
def test_rows_of_every_form_give_the_same_training(make_trainer, rows, form):
    def convert(index):
        row = make_row(index)
        question = row["prompt"][0]["content"][1]["text"]
        answer = row["completion"][0]["content"][0]["text"]
        return {
            "messages": {"images": row["images"], "messages": row["prompt"] + row["completion"]},
            "plain text": {
                "images": row["images"],
                "prompt": f"<s><|user|><image>{question}<|end|><|assistant|>",
                "completion": answer,
            },
            "image": {"image": row["images"][0], "prompt": row["prompt"], "completion": row["completion"]},
        }[form]

    reference = make_trainer()
    reference.train()
    trainer = make_trainer(folder="form", train_dataset=datasets.Dataset.from_list([convert(n) for n in range(8)]))
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx(logged(reference, "loss"), rel=1e-6)


def test_a_dataset_with_a_transform_is_checked_and_trained_through_it(make_trainer, rows):
    def transform(batch):
        converted = [make_row(int(number)) for number in batch["prompt"]]
        return {name: [row[name] for row in converted] for name in converted[0]}

    numbers = datasets.Dataset.from_dict({"prompt": [str(number) for number in range(8)]}).with_transform(transform)
    reference, trainer = make_trainer(folder="reference"), make_trainer(train_dataset=numbers)
    batch, expected = trainer.data_collator([trainer.train_dataset[3]]), a_batch(reference, 4)
    torch.testing.assert_close(batch["pixel_values"][0], expected["pixel_values"][3])
    trainer.train()


@pytest.mark.parametrize("with_column", [True, False], ids=["empty images", "no column of images"])
def test_text_only_rows_train_where_allowed(make_trainer, with_column):
    def convert(index):
        row = make_row(index)
        row["prompt"][0]["content"] = row["prompt"][0]["content"][1:]
        return {"prompt": row["prompt"], "completion": row["completion"]} | ({"images": []} if with_column else {})

    features = datasets.Features(images=datasets.List(datasets.Image())) if with_column else None
    text_only = datasets.Dataset.from_list([convert(index) for index in range(8)])
    if with_column:
        text_only = text_only.cast_column("images", features["images"])
    trainer = make_trainer(train_dataset=text_only, allow_text_only_rows=True)
    before = weights_of(trainer.model)
    trainer.train()
    assert any(name.startswith("prior_head.") for name in moved(before, trainer.model))


def test_a_stock_trainer_trains_on_input_ids_and_labels(make_model, processor, rows, tmp_path, monkeypatch):
    def collate(batch):
        apart = AMVLDataCollator(processor)(batch)
        prompt, ids = split_batch(apart)
        whole = torch.cat([prompt.pop("input_ids"), ids], dim=1)
        mask = torch.cat([prompt.pop("attention_mask"), apart["completion_mask"]], dim=1)
        labels = whole.masked_fill(mask == 0, -100)
        labels[:, : whole.shape[1] - ids.shape[1]] = -100
        return {**prompt, "input_ids": whole, "attention_mask": mask, "labels": labels}

    args = TrainingArguments(
        str(tmp_path / "stock"),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        remove_unused_columns=False,
    )
    model = make_model()
    before = weights_of(model)
    trainer = Trainer(model, args, train_dataset=rows, data_collator=collate)
    trainer.train()
    losses = logged(trainer, "loss")
    assert np.isfinite(losses).all()
    # One pass over the latents: the model's own loss is the next-token term, decoded from the posterior.
    changed = moved(before, model)
    assert {name for name in before if name.startswith(("posterior_head.", "latent_projection."))} <= changed
    assert not any(name.startswith("prior_head.") for name in changed)

    monkeypatch.setattr(sft_trainer, "row_noise", lambda *args: torch.randn(args[3:]))  # as the model draws it
    ours = AMVLSFTTrainer(
        make_model(),
        AMVLSFTConfig(
            str(tmp_path / "ours"),
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            training_summary=False,
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            beta=0.0,
            gamma=0.0,
            ntp_weight=1.0,
            prior_ntp_weight=0.0,
            freeze_vision=False,
        ),
        train_dataset=rows,
        processing_class=processor,
    )
    ours.train()
    assert losses == pytest.approx(logged(ours, "loss"), rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# The card
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluated_trainer(make_trainer, held_out):
    trainer = make_trainer(
        eval_dataset=held_out, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=2, max_steps=2
    )
    trainer.train()
    return trainer


def assert_shows_evaluation(card, trainer):
    values = [entry for entry in trainer.state.log_history if "eval_nll_prior" in entry][-1]
    for key, name in (("prior", "prior"), ("posterior", "posterior"), ("no_latents", "no latents")):
        line = f"| {name} | {values[f'eval_nll_{key}']:.4f} | {values[f'eval_accuracy_{key}']:.3f} |"
        assert line in card.text, line


def test_the_card_is_valid_and_shows_settings_and_the_last_evaluation(evaluated_trainer):
    card = ModelCard.load(Path(evaluated_trainer.args.output_dir, "README.md"))
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-text-to-text"
    assert {"amvl", "latent-reasoning"} <= set(card.data.tags)
    assert card.text.lstrip().startswith("# run")
    assert "2607.00461" in card.text
    assert "| `beta` | 1.0 |" in card.text and "| `optimiser steps` | 2 |" in card.text
    assert "{{" not in card.text and "{%" not in card.text
    assert f"{NUM_LATENTS} continuous latent slots of size {LATENT_SIZE}" in " ".join(card.text.split())
    assert_shows_evaluation(card, evaluated_trainer)


@pytest.mark.parametrize("peft", [False, True], ids=["whole", "lora"])
def test_every_checkpoint_folder_has_the_card(make_trainer, held_out, peft):
    trainer = make_trainer(
        eval_dataset=held_out,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        peft_config=lora() if peft else None,
    )
    trainer.train()
    for step in (1, 2):
        card = ModelCard.load(Path(trainer.args.output_dir, f"checkpoint-{step}", "README.md"))
        assert "amvl" in card.data.tags and f"| `optimiser steps` | {step} |" in card.text


def test_a_card_made_after_training_still_shows_the_evaluation(evaluated_trainer):
    evaluated_trainer.create_model_card(model_name="after")
    card = ModelCard.load(Path(evaluated_trainer.args.output_dir, "README.md"))
    assert card.text.lstrip().startswith("# after")
    assert_shows_evaluation(card, evaluated_trainer)


def test_the_card_says_when_nothing_was_measured(make_trainer):
    trainer = make_trainer(save_strategy="steps", save_steps=2)
    trainer.train()
    assert "Not measured" in ModelCard.load(Path(trainer.args.output_dir, "README.md")).text


def test_the_card_names_the_backbone_and_the_data(make_trainer, make_parts, processor, tmp_path):
    backbone, _ = make_parts()
    backbone.config._name_or_path = "someone/tiny-llava"
    model = AMVLForConditionalGeneration.from_backbone(backbone, 2, 8, processor.latent_token_id)
    trainer = make_trainer(model)
    trainer.create_model_card(model_name="named", dataset_name="someone/photos")
    card = ModelCard.load(Path(trainer.args.output_dir, "README.md"))
    assert card.data.base_model == "someone/tiny-llava"
    assert card.data.datasets == ["someone/photos"]


# ---------------------------------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------------------------------


REFUSED_SETTINGS = {
    "beta": ({"beta": -0.1}, r"`beta` must be 0 or more, got -0\.1"),
    "gamma": ({"gamma": -1.0}, r"`gamma` must be 0 or more, got -1\.0"),
    "beta not a number": ({"beta": float("nan")}, "`beta` must be 0 or more, got nan"),
    "gamma infinite": ({"gamma": float("inf")}, "`gamma` must be 0 or more, got inf"),
    "ntp_weight": ({"ntp_weight": -1.0}, "`ntp_weight` must be 0 or more"),
    "prior_ntp_weight": ({"prior_ntp_weight": -1.0}, "`prior_ntp_weight` must be 0 or more"),
    "kl_warmup_steps": ({"kl_warmup_steps": -1}, "`kl_warmup_steps` must be 0 or more"),
    "kl_delay_steps": ({"kl_delay_steps": -0.5}, "`kl_delay_steps` must be 0 or more"),
    "all zero": ({"ntp_weight": 0.0, "beta": 0.0, "gamma": 0.0}, "are all 0: nothing would be trained"),
    "kl_reduction": ({"kl_reduction": "max"}, "`kl_reduction` must be one of .*'mean', 'sum'.*got 'max'"),
    "kl_order": ({"kl_order": "backward"}, "`kl_order` must be one of .*got 'backward'"),
    "max_length": ({"max_length": 0}, "`max_length` must be at least 1, got 0"),
    "max_completion_length": ({"max_completion_length": 0}, "`max_completion_length` must be at least 1, got 0"),
    "packing": ({"packing": True}, "`packing=True` would bypass the latents"),
    "padding_free": ({"padding_free": True}, "`padding_free=True` would bypass"),
    "assistant_only_loss": ({"assistant_only_loss": True}, "`assistant_only_loss=True` would bypass"),
    "completion_only_loss": ({"completion_only_loss": False}, "`completion_only_loss=False` would bypass"),
    "dft": ({"loss_type": "dft"}, "`loss_type='dft'` would bypass"),
    "label smoothing": ({"label_smoothing_factor": 0.1}, r"`label_smoothing_factor=0\.1` would bypass"),
    "router_aux_loss_coef": ({"router_aux_loss_coef": 0.01}, r"`router_aux_loss_coef=0\.01` would bypass"),
    "liger": ({"use_liger_kernel": True}, "`use_liger_kernel=True` would bypass|liger"),
    "use_reentrant": ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "`use_reentrant` to `False`"),
}


@pytest.mark.parametrize("setting", REFUSED_SETTINGS)
def test_a_setting_that_would_harm_the_latents_is_refused(make_config, setting):
    fields, message = REFUSED_SETTINGS[setting]
    make_config()  # without it, all is well
    with pytest.raises((ValueError, ImportError), match=message):
        make_config(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"beta": 0.0, "gamma": 0.0},
        {"ntp_weight": 0.0, "beta": 0.0, "gamma": 0.0, "prior_ntp_weight": 1.0},
        {"completion_only_loss": True},
        {"router_aux_loss_coef": None},
        {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": False, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ],
)
def test_a_harmless_setting_is_accepted(make_config, fields):
    make_config(**fields)


@pytest.mark.parametrize("name", ["compute_loss_func", "formatting_func"])
def test_a_function_that_would_bypass_the_latents_is_refused(make_model, make_config, processor, rows, name):
    with pytest.raises(ValueError, match=f"`{name}` would bypass the latents: leave it out"):
        AMVLSFTTrainer(
            make_model(), make_config(), train_dataset=rows, processing_class=processor, **{name: lambda *args: None}
        )


def test_arguments_of_another_class_are_refused(make_model, processor, rows, tmp_path):
    args = SFTConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    with pytest.raises(TypeError, match="`args` must be an `AMVLSFTConfig`, got `SFTConfig`"):
        AMVLSFTTrainer(make_model(), args, train_dataset=rows, processing_class=processor)


def test_a_stock_model_is_refused(make_trainer, make_parts):
    with pytest.raises(ValueError, match="`LlavaForConditionalGeneration` without latents.*from_backbone"):
        make_trainer(make_parts()[0])


def test_a_peft_model_over_a_stock_model_is_refused(make_trainer, make_parts):
    with pytest.raises(ValueError, match="`LlavaForConditionalGeneration` without latents"):
        make_trainer(get_peft_model(make_parts()[0], lora()))


@pytest.mark.parametrize("frozen", sorted(HEADS))
def test_a_peft_model_with_a_frozen_head_is_refused(make_trainer, make_model, frozen):
    model = get_peft_model(make_model(), lora(modules_to_save=sorted(HEADS - {frozen})))
    with pytest.raises(ValueError, match=f"`{frozen}` is frozen.*modules_to_save"):
        make_trainer(model)


def test_a_peft_model_and_a_peft_config_together_are_refused(make_trainer, make_model):
    model = get_peft_model(make_model(), lora(modules_to_save=sorted(HEADS)))
    with pytest.raises(ValueError, match="`PeftModel` instance together with a `peft_config`"):
        make_trainer(model, peft_config=lora())


def test_prompt_learning_is_refused_by_name(make_trainer):
    with pytest.raises(ValueError, match="`?PromptTuningConfig"):
        make_trainer(peft_config=PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))


def test_a_model_without_name_needs_a_processing_class(make_trainer):
    with pytest.raises(ValueError, match="`processing_class` is needed"):
        make_trainer(processing_class=None)


def test_a_tokenizer_for_a_processor_is_refused(make_trainer, processor):
    with pytest.raises(TypeError, match="must be a processor"):
        make_trainer(processing_class=processor.tokenizer)


def test_a_collator_that_does_not_keep_the_answer_apart_is_refused(make_trainer, processor):
    def collate(batch):
        prompt, ids = split_batch(AMVLDataCollator(processor)(batch))
        return {**prompt, "labels": prompt["input_ids"]}

    trainer = make_trainer(data_collator=collate)
    with pytest.raises(ValueError, match="`data_collator` must return `completion_ids`.*AMVLDataCollator"):
        trainer.train()


def test_a_vision_encoder_that_is_not_one_of_its_own_is_refused(make_trainer, make_model, monkeypatch):
    model = make_model()
    monkeypatch.setattr(
        model.backbone, "get_encoder", types.MethodType(lambda self, modality=None: self, model.backbone)
    )
    with pytest.raises(ValueError, match="no vision encoder of its own to freeze.*`freeze_vision=False`"):
        make_trainer(model)


def test_a_folder_of_a_text_model_is_refused(make_trainer, make_parts, processor, tmp_path):
    backbone, stock_processor = make_parts()
    shutil.rmtree(tmp_path / "text", ignore_errors=True)
    stock_processor.save_pretrained(tmp_path / "text")
    backbone.config.text_config.save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="no image-text-to-text model"):
        make_trainer(str(tmp_path / "text"))


def test_quantisation_is_not_silently_ignored(make_model, make_config, processor, rows, tmp_path):
    # TRL hands it to the model that it loads by name; this trainer loads the model itself.
    make_model().save_pretrained(tmp_path / "amvl")
    with pytest.raises((ValueError, ImportError), match="quantization_config|bitsandbytes"):
        AMVLSFTTrainer(
            str(tmp_path / "amvl"),
            make_config(),
            train_dataset=rows,
            processing_class=processor,
            quantization_config=BitsAndBytesConfig(load_in_4bit=True),
        )


# ---------------------------------------------------------------------------------------------------------------------
# The self-test of the first batch
# ---------------------------------------------------------------------------------------------------------------------


def test_a_run_is_the_same_with_and_without_its_self_test(make_trainer, capsys):
    trainers = []
    for given in (True, False):
        trainers.append(make_trainer(self_test=given, max_steps=3))  # which seeds the process
        trainers[-1].train()
    assert logged(trainers[0], "loss") == logged(trainers[1], "loss")
    for name, weight in trainers[0].model.state_dict().items():
        assert torch.equal(weight, trainers[1].model.state_dict()[name]), name
    assert capsys.readouterr().out.count("Self-test passed in ") == 1  # of the run that has one, on its first batch


@pytest.mark.parametrize(("plant", "message"), PLANTED.values(), ids=PLANTED)
def test_a_run_falls_back_to_the_full_plan_and_names_the_check(make_trainer, plant, message, monkeypatch, caplog):
    expected = make_trainer(self_test=False)
    expected.model.config.multipass = "full"
    expected.train()
    plant(monkeypatch)
    trainer = make_trainer(self_test=True)
    trainer.train()
    (warning,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert message in warning and "Training goes on with the full plan" in warning
    assert (trainer.model.config.multipass, trainer.model.auto_plan) == ("auto", "full")
    assert logged(trainer, "loss") == logged(expected, "loss")


def test_a_run_that_asks_for_the_shared_plan_stops(make_trainer, monkeypatch):
    plant_shifted_positions(monkeypatch)
    trainer = make_trainer(self_test=True)
    trainer.model.config.multipass = "shared"
    with pytest.raises(ValueError, match="Set `multipass='full'`"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_self_test_that_is_switched_off_does_not_look(make_trainer, monkeypatch):
    plant_shifted_positions(monkeypatch)
    trainer = make_trainer(self_test=False)
    trainer.train()
    assert trainer.model.auto_plan == "shared"


@pytest.mark.parametrize("plan", ["auto", "full"])
def test_a_run_whose_attention_sees_the_answer_ahead_stops(make_trainer, plan, monkeypatch):
    plant_bidirectional_attention(monkeypatch)
    trainer = make_trainer(self_test=True)
    trainer.model.config.multipass = plan
    with pytest.raises(ValueError, match="cannot be trained as it is set up here: .* not causal"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_without_memory_for_three_forwards_the_run_goes_on_and_says_so(make_trainer, monkeypatch, caplog):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(branching_amvl.RepeatedPrompt, "branch", out_of_memory)
    trainer = make_trainer(self_test=True)
    trainer.train()
    assert "goes on unchecked: OutOfMemoryError" in caplog.text
    assert trainer.state.global_step == 2


def test_an_evaluation_before_training_is_self_tested_too(make_trainer, held_out, monkeypatch, caplog):
    plant_shifted_positions(monkeypatch)
    trainer = make_trainer(self_test=True, eval_dataset=held_out)
    trainer.evaluate()
    assert "the posterior differs by" in caplog.text and "gradient" not in caplog.text
    assert trainer.model.auto_plan == "full"
