"""The model class: both plans of a step give what the obvious implementation gives, and bad input is refused.

Tolerances are relative: norm of the difference over norm of the expected tensor.
"""

import functools

import pytest
import torch
from families import (
    CORE_FAMILIES,
    FAMILIES,
    HIDDEN_SIZE,
    IMAGE,
    SPARE_ROWS,
    VOCAB_SIZE,
    Row,
    build_backbone,
    make_answers,
    make_prompts,
)
from planted_errors import plant_leak, plant_shifted_positions
from reference import reference_step
from transformers import LlamaConfig, LlamaForCausalLM, UdopConfig, UdopForConditionalGeneration

from modeling_amvl import AMVLConfig, AMVLForConditionalGeneration, branching_amvl


SEED = 3
LATENT_TOKEN = SPARE_ROWS.start
DISTRIBUTIONS = ("prior_mean", "prior_log_variance", "posterior_mean", "posterior_log_variance")
OUTPUTS = (*DISTRIBUTIONS, "latents", "logits")
UNPADDED = [Row(seed=0), Row(seed=1), Row(seed=2)]
PADDED = [Row(seed=0, num_words=5), Row(seed=1, num_words=9), Row(seed=2, num_words=3)]
SEVERAL_IMAGES = [Row(seed=0, num_images=2), Row(seed=1, num_images=1), Row(seed=2, num_images=3, num_words=4)]
SOME_WITHOUT_IMAGE = [Row(seed=0, num_images=0), Row(seed=1, num_words=4), Row(seed=2, num_images=2, num_words=3)]
UNEQUAL, EQUAL = (5, 2, 3), (4, 4, 4)

families = pytest.mark.parametrize("family", CORE_FAMILIES)
plans = pytest.mark.parametrize("plan", ["shared", "full"])


def build_model(family, num_latents=3, latent_size=8, dtype=torch.float32, **settings):
    settings = {"latent_token_id": LATENT_TOKEN, **settings}
    backbone = build_backbone(family, dtype)
    torch.manual_seed(0)
    model = AMVLForConditionalGeneration.from_backbone(
        backbone, num_latents=num_latents, latent_size=latent_size, **settings
    )
    for parameter in model.posterior_head.parameters():  # a fresh posterior is a copy of the prior
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def probe(output):
    """A scalar that every distribution and every logit moves, each by its own random weight."""
    generator = torch.Generator().manual_seed(SEED)
    scalar = 0.0
    for name in OUTPUTS:
        for tensor in output[name]:
            weights = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
            scalar = scalar + (weights * tensor).sum()
    return scalar


def without_padding(output, answers):
    """The output as a dict; the logits as a list of `(A_i, V)`."""
    lengths = answers["completion_mask"].sum(1)
    logits = [row[:length] for row, length in zip(output.logits, lengths, strict=True)]
    return dict(output) | {"logits": logits}


def step(model, prompts, answers, plan):
    """Outputs of a step under a plan, and its gradients by name; `None` where a parameter has none."""
    model.config.multipass = plan
    torch.manual_seed(SEED)
    return differentiated(model, without_padding(model(**prompts, **answers), answers))


def differentiated(model, output):
    model.zero_grad()
    probe(output).backward()
    return output, {name: parameter.grad for name, parameter in model.named_parameters()}


def relative(got, expected):
    return float((got - expected).detach().norm() / expected.detach().norm())


def assert_same_step(got, expected, tolerance):
    """Each output, the whole gradient and each parameter's gradient agree."""
    (outputs, gradients), (expected_outputs, expected_gradients) = got, expected
    for name in OUTPUTS:
        for row, expected_row in zip(outputs[name], expected_outputs[name], strict=True):
            assert relative(row, expected_row) < tolerance, name
    if "loss" in expected_outputs:
        assert relative(outputs["loss"], expected_outputs["loss"]) < tolerance
    assert gradients.keys() == expected_gradients.keys()
    reached = [name for name, gradient in expected_gradients.items() if gradient is not None]
    assert reached == [name for name, gradient in gradients.items() if gradient is not None]
    whole = [torch.cat([of[name].flatten() for name in reached]) for of in (gradients, expected_gradients)]
    assert relative(*whole) < tolerance
    for name in reached:
        # Against a norm of at least 1e-3 of the whole: the smallest gradients are sums of terms that cancel.
        scale = max(float(expected_gradients[name].norm()), 1e-3 * float(whole[1].norm()))
        assert float((gradients[name] - expected_gradients[name]).norm()) / scale < tolerance, name


def enable_checkpointing(model):
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


class Calls:
    """Counts the forwards of a module, and what each was given."""

    def __init__(self, module):
        self.shapes = []
        module.register_forward_pre_hook(self._count)  # a recomputation stops early, before the hooks behind it

    def _count(self, module, args):
        self.shapes.append(tuple(args[0].shape) if args else None)

    def __len__(self):
        return len(self.shapes)


# ---------------------------------------------------------------------------------------------------------------------
# The two plans and the reference
# ---------------------------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("rows", [UNPADDED, PADDED], ids=["unpadded", "padded"])
@pytest.mark.parametrize("lengths", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_shared_plan_matches_three_full_forwards(family, checkpointing, rows, lengths):
    model = build_model(family).train()
    if checkpointing:
        enable_checkpointing(model)
    calls = Calls(decoder_layers(model)[0].self_attn)
    prompts, answers = make_prompts(family, rows), make_answers(lengths)
    shared = step(model, prompts, answers, "shared")
    assert len(calls) == (6 if checkpointing else 3)  # the backward pass ran each of the three forwards once more
    assert_same_step(shared, step(model, prompts, answers, "full"), 1e-5)


@families
def test_shared_plan_matches_three_full_forwards_when_every_second_layer_is_checkpointed(family):
    model = build_model(family).train()
    model.activation_checkpointing_enable(every_n_layers=2)
    prompts, answers = make_prompts(family, PADDED), make_answers(UNEQUAL)
    assert_same_step(step(model, prompts, answers, "shared"), step(model, prompts, answers, "full"), 1e-5)


def decoder_layers(model):
    return model.backbone.get_decoder().layers


@families
@plans
@pytest.mark.parametrize(
    "rows",
    [UNPADDED, PADDED, SEVERAL_IMAGES, SOME_WITHOUT_IMAGE],
    ids=["unpadded", "padded", "several_images", "some_without_image"],
)
def test_a_step_matches_the_obvious_reference(family, plan, rows):
    model = build_model(family)
    answers = make_answers(UNEQUAL)
    got = step(model, make_prompts(family, rows), answers, plan)
    assert_same_step(got, reference(model, family, rows, answers), 1e-5)


@families
@plans
def test_eager_attention_matches_the_obvious_reference(family, plan):
    model = build_model(family)
    model.set_attn_implementation("eager")
    assert model.backbone.get_decoder().config._attn_implementation == "eager"
    answers = make_answers(UNEQUAL)
    got = step(model, make_prompts(family, PADDED), answers, plan)
    assert_same_step(got, reference(model, family, PADDED, answers), 1e-5)


@families
def test_under_autocast_both_plans_agree_and_distributions_stay_in_fp32(family):
    model = build_model(family)
    prompts, answers = make_prompts(family, PADDED), make_answers(UNEQUAL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (shared, gradients), (full, _) = (step(model, prompts, answers, plan) for plan in ("shared", "full"))
    assert shared["logits"][0].dtype == torch.bfloat16
    for name in DISTRIBUTIONS:
        assert shared[name].dtype == torch.float32
        assert relative(shared[name], full[name]) < 3e-2  # bfloat16
    assert all(gradient.isfinite().all() for gradient in gradients.values() if gradient is not None)


def reference(model, family, rows, answers):
    prompts = [make_prompts(family, [row], model.dtype) for row in rows]
    ids = [row[mask == 1] for row, mask in zip(answers["completion_ids"], answers["completion_mask"], strict=True)]
    torch.manual_seed(SEED)
    noise = torch.randn(len(rows), model.config.num_latents, model.config.latent_size, dtype=model.dtype)
    return differentiated(model, reference_step(model, prompts, ids, noise))


@families
@plans
def test_a_step_matches_the_obvious_reference_to_the_last_digits_of_float64(family, plan):
    model = build_model(family, dtype=torch.float64)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):  # the stock ones compute in fp32
            module.forward = functools.partial(_rms_norm, module)
    model.get_encoder("image").requires_grad_(False)  # the rotary embedding of Qwen's computes in fp32
    answers = make_answers(UNEQUAL)
    got = step(model, make_prompts(family, SEVERAL_IMAGES, torch.float64), answers, plan)
    assert got[0]["logits"][0].dtype == torch.float64
    assert_same_step(got, reference(model, family, SEVERAL_IMAGES, answers), 1e-12)


def _rms_norm(module, hidden):
    return torch.nn.functional.rms_norm(hidden, module.weight.shape, module.weight, module.variance_epsilon)


@families
@plans
@pytest.mark.parametrize("lengths", [UNEQUAL, (1, 1, 1)], ids=["unequal", "one_token"])
def test_one_latent_slot_matches_the_obvious_reference(family, plan, lengths):
    model = build_model(family, num_latents=1)
    answers = make_answers(lengths)
    got = step(model, make_prompts(family, PADDED), answers, plan)
    assert_same_step(got, reference(model, family, PADDED, answers), 1e-5)


@families
def test_the_images_of_the_tests_matter(family):
    """Else every comparison above would pass with the images left out."""
    model = build_model(family).eval()
    prompts, answers = make_prompts(family, PADDED), make_answers(UNEQUAL)
    before = model(**prompts, **answers, latent_temperature=0.0)
    other = prompts | {"pixel_values": prompts["pixel_values"].flip(-1)}
    after = model(**other, **answers, latent_temperature=0.0)
    for name in OUTPUTS:
        assert relative(after[name], before[name]) > 1e-3, name


@families
def test_branches_leave_the_cache_of_the_prompt_bitwise_unchanged(family):
    model = build_model(family).train()
    prompts, answers = make_prompts(family, PADDED), make_answers(UNEQUAL)
    input_ids = prompts.pop("input_ids")
    prompt = branching_amvl.SharedPrompt(model.backbone, input_ids, prompts)

    def state():
        return [(layer.keys.clone(), layer.values.clone()) for layer in prompt.cache.layers]

    before = state()
    assert len(before) == len(decoder_layers(model)) and prompt.cache.get_seq_length() == input_ids.shape[1]
    hidden, logits = prompt.branch(answers["completion_ids"], answers["completion_mask"])
    again, _ = prompt.branch(answers["completion_ids"], answers["completion_mask"])
    assert torch.equal(hidden, again) and logits is None
    hidden.sum().backward()
    assert prompt.cache.get_seq_length() == input_ids.shape[1]
    for (keys, values), (old_keys, old_values) in zip(state(), before, strict=True):
        assert torch.equal(keys, old_keys) and torch.equal(values, old_values)


@families
@plans
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_the_vision_encoder_runs_once_per_step(family, plan, checkpointing):
    model = build_model(family).train()
    if checkpointing:
        enable_checkpointing(model)
    calls = Calls(model.get_encoder("image"))
    step(model, make_prompts(family, PADDED), make_answers(UNEQUAL), plan)
    assert len(calls) == 1


def test_the_plan_can_be_changed_on_a_live_model():
    model = build_model("llava", num_latents=3)
    calls = Calls(model.get_input_embeddings())
    prompts, answers = make_prompts("llava", UNPADDED), make_answers(EQUAL)
    length = prompts["input_ids"].shape[1]
    sequences = {
        "auto": [length + 3, 4 + 3, 3 + 4],  # the prior's slots run with the prompt
        "full": [length + 3, length + 4 + 3, length + 3 + 4],
        "shared": [length + 3, 4 + 3, 3 + 4],
    }
    for plan, expected in sequences.items():
        calls.shapes.clear()
        step(model, prompts, answers, plan)
        assert [shape[1] for shape in calls.shapes] == expected
    with pytest.raises(Exception, match="multipass"):
        model.config.multipass = "both"


# ---------------------------------------------------------------------------------------------------------------------
# The comparison above notices what it is there for
# ---------------------------------------------------------------------------------------------------------------------


@families
def test_a_branch_that_leaks_into_the_next_is_noticed(family, monkeypatch):
    model = build_model(family)
    prompts, answers = make_prompts(family, PADDED), make_answers(UNEQUAL)
    expected, _ = step(model, prompts, answers, "full")
    plant_leak(monkeypatch)
    leaked, _ = step(model, prompts, answers, "shared")
    assert relative(leaked["posterior_mean"], expected["posterior_mean"]) < 1e-5  # the first branch still is right
    assert relative(leaked["logits"][0], expected["logits"][0]) > 1e-3


@families
def test_a_branch_whose_positions_are_shifted_is_noticed(family, monkeypatch):
    model = build_model(family)
    prompts, answers = make_prompts(family, PADDED), make_answers(UNEQUAL)
    expected, _ = step(model, prompts, answers, "full")
    plant_shifted_positions(monkeypatch)
    got, _ = step(model, prompts, answers, "shared")
    assert relative(got["posterior_mean"], expected["posterior_mean"]) > 1e-3


@families
@plans
def test_latents_that_do_not_enter_the_backbone_raise(family, plan, monkeypatch):
    model = build_model(family)
    unused = torch.nn.Embedding(VOCAB_SIZE, HIDDEN_SIZE)
    monkeypatch.setattr(model.backbone, "get_input_embeddings", lambda: unused)
    with pytest.raises(RuntimeError, match="entered .* 0 times instead of once"):
        step(model, make_prompts(family, PADDED), make_answers(UNEQUAL), plan)


@plans
def test_hidden_states_that_bypass_the_output_embeddings_raise(plan, monkeypatch):
    model = build_model("llava")
    unused = torch.nn.Linear(HIDDEN_SIZE, VOCAB_SIZE)
    monkeypatch.setattr(model.backbone, "get_output_embeddings", lambda: unused)
    with pytest.raises(RuntimeError, match="did not pass its hidden states"):
        step(model, make_prompts("llava", PADDED), make_answers(UNEQUAL), plan)


def hooks(model):
    return {
        (name, hook)
        for name, module in model.named_modules()
        for hook in (*module._forward_hooks, *module._forward_pre_hooks)
    }


@plans
def test_a_failed_step_leaves_no_hook_behind(plan, monkeypatch):
    model = build_model("llava")
    prompts, answers = make_prompts("llava", PADDED), make_answers(UNEQUAL)
    expected, _ = step(model, prompts, answers, plan)
    before = hooks(model)  # transformers leaves some of its own
    with monkeypatch.context() as patch:
        patch.setattr(model.backbone.lm_head, "forward", lambda hidden: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            step(model, prompts, answers, plan)
    assert hooks(model) == before
    got, _ = step(model, prompts, answers, plan)
    assert torch.equal(got["loss"], expected["loss"])


def test_reentrant_checkpointing_is_refused():
    model = build_model("llava").train()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant"):
        step(model, make_prompts("llava", PADDED), make_answers(UNEQUAL), "shared")


# ---------------------------------------------------------------------------------------------------------------------
# What a step means
# ---------------------------------------------------------------------------------------------------------------------


def without_gradient(model):
    return {name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()}


@families
@plans
def test_every_parameter_gets_a_gradient(family, plan):
    model = build_model(family).train()
    step(model, make_prompts(family, PADDED), make_answers(UNEQUAL), plan)
    # LLaVA reads its vision tower before the last layer.
    unread = ("vision_tower.encoder.layers.1.", "vision_tower.post_layernorm.") if family == "llava" else ()
    names = without_gradient(model)
    assert {name for name in names if not any(part in name for part in unread)} == set()
    assert all(any(part in name for name in names) for part in unread)


@families
def test_the_answer_loss_moves_everything_but_the_prior_head(family):
    model = build_model(family).train()
    model.backbone.requires_grad_(False)
    model(**make_prompts(family, PADDED), **make_answers(UNEQUAL)).loss.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {name.split(".")[0] for name in reached} == {"posterior_head", "latent_projection"}


@families
def test_changing_latents_changes_the_answer(family):
    model = build_model(family)
    prompts, answers = make_prompts(family, PADDED), make_answers(UNEQUAL)
    latents = torch.randn(3, 3, 8)
    before = model.log_prob(**prompts, **answers, latents=latents)
    latents[1, 2] += 1.0  # one slot of one row
    after = model.log_prob(**prompts, **answers, latents=latents)
    assert relative(after[1], before[1]) > 1e-3
    assert torch.equal(after[[0, 2]], before[[0, 2]])


@families
@plans
def test_the_posterior_reads_the_whole_answer_and_nothing_behind_it(family, plan):
    model = build_model(family, multipass=plan)
    prompts, answers = make_prompts(family, PADDED), make_answers(UNEQUAL)
    before = model.posterior(**prompts, **answers)
    ids, mask = answers["completion_ids"], answers["completion_mask"]
    padding = ids.masked_fill(mask == 0, 77)
    assert not torch.equal(padding, ids)
    after = model.posterior(**prompts, completion_ids=padding, completion_mask=mask)
    assert torch.equal(after.mean, before.mean) and torch.equal(after.log_variance, before.log_variance)
    for row, length in enumerate(UNEQUAL):
        for position in (0, length - 1):
            changed = ids.clone()
            changed[row, position] = (ids[row, position] + 1) % 90 + 3
            after = model.posterior(**prompts, completion_ids=changed, completion_mask=mask)
            assert relative(after.mean[row], before.mean[row]) > 1e-4
            others = [other for other in range(3) if other != row]
            assert torch.equal(after.mean[others], before.mean[others])


@families
@plans
def test_the_prior_does_not_depend_on_the_answer(family, plan):
    model = build_model(family, multipass=plan)
    prompts = make_prompts(family, PADDED)
    priors = [model(**prompts, **make_answers(UNEQUAL, seed=seed)) for seed in (0, 1)]
    assert not torch.equal(priors[0].posterior_mean, priors[1].posterior_mean)
    assert torch.equal(priors[0].prior_mean, priors[1].prior_mean)
    assert torch.equal(priors[0].prior_log_variance, priors[1].prior_log_variance)


@families
@plans
def test_the_analysis_calls_agree_with_forward(family, plan):
    model = build_model(family, multipass=plan)
    prompts, answers = make_prompts(family, PADDED), make_answers(UNEQUAL)
    output = model(**prompts, **answers)
    prior, posterior = model.prior(**prompts), model.posterior(**prompts, **answers)
    torch.testing.assert_close(prior.mean, output.prior_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(prior.log_variance, output.prior_log_variance, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(posterior.mean, output.posterior_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(posterior.log_variance, output.posterior_log_variance, rtol=1e-6, atol=1e-6)
    log_prob = model.log_prob(**prompts, **answers, latents=output.latents)
    ids, mask = answers["completion_ids"], answers["completion_mask"]
    expected = output.logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0] * mask
    torch.testing.assert_close(log_prob, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(-log_prob.sum() / mask.sum(), output.loss, rtol=1e-5, atol=1e-5)


@families
@plans
def test_without_latents_the_answer_is_that_of_the_bare_backbone(family, plan):
    model = build_model(family, multipass=plan)
    prompts, answers = make_prompts(family, UNPADDED), make_answers(EQUAL)
    length = prompts["input_ids"].shape[1]
    whole = prompts | {
        "input_ids": torch.cat([prompts["input_ids"], answers["completion_ids"]], dim=1),
        "attention_mask": torch.cat([prompts["attention_mask"], answers["completion_mask"]], dim=1),
    }
    if "mm_token_type_ids" in whole:
        whole["mm_token_type_ids"] = torch.nn.functional.pad(whole["mm_token_type_ids"], (0, 4))
    logits = model.backbone(**whole).logits[:, length - 1 : -1]
    expected = logits.log_softmax(-1).gather(-1, answers["completion_ids"][..., None])[..., 0]
    log_prob = model.log_prob(**prompts, **answers, latents=None)
    torch.testing.assert_close(log_prob, expected, rtol=1e-5, atol=1e-5)
    output = model(**prompts, **answers, decode_no_latents=True)
    torch.testing.assert_close(output.no_latents_logits, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.no_latents_loss, -expected.mean(), rtol=1e-5, atol=1e-5)


@plans
def test_the_prior_can_be_decoded_with_the_same_noise(plan):
    model = build_model("llava", multipass=plan)
    prompts, answers = make_prompts("llava", PADDED), make_answers(UNEQUAL)
    output = model(**prompts, **answers, decode_prior=True)
    noise = (output.latents - output.posterior_mean) / (output.posterior_log_variance / 2).exp()
    latents = output.prior_mean + (output.prior_log_variance / 2).exp() * noise
    log_prob = model.log_prob(**prompts, **answers, latents=latents)
    loss = -log_prob.sum() / answers["completion_mask"].sum()
    torch.testing.assert_close(output.prior_loss, loss, rtol=1e-5, atol=1e-5)
    assert relative(output.prior_logits, output.logits) > 1e-3


def test_temperature_zero_decodes_the_mean_and_temperature_scales_the_noise():
    model = build_model("llava")
    prompts, answers = make_prompts("llava", PADDED), make_answers(UNEQUAL)
    mean = model(**prompts, **answers, latent_temperature=0.0)
    assert torch.equal(mean.latents, mean.posterior_mean)
    deviations = []
    for temperature in (1.0, 0.5):
        torch.manual_seed(SEED)
        output = model(**prompts, **answers, latent_temperature=temperature)
        deviations.append(output.latents - output.posterior_mean)
    torch.testing.assert_close(deviations[1], 0.5 * deviations[0], rtol=1e-5, atol=1e-6)
    assert deviations[0].norm() > 0.1


def test_the_loss_is_divided_by_the_items_of_the_whole_batch_when_they_are_given():
    model = build_model("llava")
    prompts, answers = make_prompts("llava", PADDED), make_answers(UNEQUAL)
    mean = model(**prompts, **answers, latent_temperature=0.0).loss
    for num_items in (40, torch.tensor(40)):
        shared = model(**prompts, **answers, latent_temperature=0.0, num_items_in_batch=num_items).loss
        torch.testing.assert_close(shared, mean * sum(UNEQUAL) / 40, rtol=1e-6, atol=0)


def test_a_tuple_holds_what_the_output_holds():
    model = build_model("llava")
    prompts, answers = make_prompts("llava", PADDED), make_answers(UNEQUAL)
    output = model(**prompts, **answers, latent_temperature=0.0)
    values = model(**prompts, **answers, latent_temperature=0.0, return_dict=False)
    assert isinstance(values, tuple) and all(torch.equal(*pair) for pair in zip(values, output.values(), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# The stock form: `input_ids` and `labels`
# ---------------------------------------------------------------------------------------------------------------------


def stock_form(family, rows, answers, side):
    """Prompts and answers in one sequence per row, padded on a side, as a stock collator makes them."""
    sequences = []
    for row, ids, mask in zip(rows, answers["completion_ids"], answers["completion_mask"], strict=True):
        prompt, answer = make_prompts(family, [row]), ids[mask == 1]
        x = prompt["input_ids"][0]
        sequence = {
            "input_ids": torch.cat([x, answer]),
            "attention_mask": torch.ones(len(x) + len(answer), dtype=torch.long),
            "labels": torch.cat([torch.full_like(x, -100), answer]),
        }
        if "mm_token_type_ids" in prompt:
            sequence["mm_token_type_ids"] = torch.cat([prompt["mm_token_type_ids"][0], torch.zeros_like(answer)])
        sequences.append(sequence)
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side=side)
    inputs = make_prompts(family, rows)
    for key in sequences[0]:
        inputs[key] = pad([row[key] for row in sequences], padding_value=-100 if key == "labels" else 0)
    return inputs


@families
@plans
@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_give_what_completions_give(family, plan, side):
    model = build_model(family)
    answers = make_answers(UNEQUAL)
    expected = step(model, make_prompts(family, SEVERAL_IMAGES), answers, plan)
    inputs = stock_form(family, SEVERAL_IMAGES, answers, side)
    assert inputs["attention_mask"].min() == 0
    torch.manual_seed(SEED)
    output = model(**inputs)
    got = differentiated(model, without_padding(output, answers))
    assert_same_step(got, expected, 1e-6)


def test_tokens_of_the_answer_without_a_label_are_read_but_not_learnt():
    model = build_model("llava")
    answers = make_answers(UNEQUAL)
    inputs = stock_form("llava", PADDED, answers, "right")
    whole = model(**inputs, latent_temperature=0.0)
    first, row = int((inputs["labels"][0] != -100).int().argmax()), 0
    inputs["labels"][row, first + 2] = -100
    part = model(**inputs, latent_temperature=0.0)
    assert torch.equal(part.logits, whole.logits)
    losses = -whole.logits.log_softmax(-1).gather(-1, answers["completion_ids"][..., None])[..., 0]
    kept = answers["completion_mask"].clone()
    kept[row, 2] = 0
    torch.testing.assert_close(part.loss, (losses * kept).sum() / kept.sum(), rtol=1e-5, atol=1e-6)


def _no_label(inputs):
    inputs["labels"][1] = -100


def _no_prompt(inputs):
    inputs["labels"][1] = inputs["input_ids"][1].masked_fill(inputs["attention_mask"][1] == 0, -100)


def _both_forms(inputs):
    inputs.update(make_answers(UNEQUAL))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_no_label, "Row 1 of `labels` has no label"),
        (_no_prompt, "Row 1 of `labels` has no token before its first label"),
        (_both_forms, "`labels` and `completion_ids`"),
    ],
)
def test_labels_that_fit_no_prompt_and_answer_are_refused(spoil, message):
    model = build_model("llava")
    inputs = stock_form("llava", PADDED, make_answers(UNEQUAL), "right")
    spoil(inputs)
    with pytest.raises(ValueError, match=message):
        model(**inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completion_ids": torch.ones(2, 4, dtype=torch.long)}, r"`completion_ids` must be of shape \(3, A\)"),
        ({"completion_ids": torch.ones(4, dtype=torch.long)}, r"`completion_ids` must be of shape \(3, A\)"),
        ({"completion_mask": torch.ones(3, 4, dtype=torch.long)}, "must have the shape of `completion_ids`"),
        ({"completion_mask": torch.tensor([[0, 1, 1, 1, 1]] * 3)}, "must start with 1 in every row"),
        ({"completion_mask": torch.tensor([[1, 0, 1, 1, 1]] * 3)}, "must be 1s followed by 0s"),
        (
            {"completion_ids": torch.ones(3, 0).long(), "completion_mask": torch.ones(3, 0).long()},
            "must start with 1 in every row",
        ),
    ],
)
@pytest.mark.parametrize("call", ["forward", "posterior", "log_prob"])
def test_answers_that_are_empty_or_not_right_padded_are_refused(call, change, message):
    model = build_model("llava")
    inputs = make_prompts("llava", PADDED) | make_answers(UNEQUAL) | change
    if change.keys() == {"completion_ids"}:
        inputs["completion_mask"] = torch.ones_like(inputs["completion_ids"])
    if call == "log_prob":
        inputs["latents"] = torch.zeros(3, 3, 8)
    with pytest.raises(ValueError, match=message):
        getattr(model, call)(**inputs)


@pytest.mark.parametrize("call", ["forward", "prior", "posterior", "log_prob"])
def test_right_padded_prompts_are_refused(call):
    """Behind padding the prior and the first token of the answer would be off by a tenth, without an error."""
    model = build_model("llava")
    prompts = make_prompts("llava", PADDED)
    inputs = prompts | {key: prompts[key].flip(1) for key in ("input_ids", "attention_mask")}
    if call != "prior":
        inputs |= make_answers(UNEQUAL)
    if call == "log_prob":
        inputs["latents"] = None
    with pytest.raises(ValueError, match="left-padded"):
        getattr(model, call)(**inputs)


@pytest.mark.parametrize("latents", [torch.zeros(2, 3, 8), torch.zeros(3, 8), torch.zeros(3, 3, 9), 0.0])
def test_latents_of_another_shape_are_refused(latents):
    model = build_model("llava")
    with pytest.raises(ValueError, match=r"`latents` must be a tensor of shape \(3, 3, 8\), got"):
        model.log_prob(**make_prompts("llava", PADDED), **make_answers(UNEQUAL), latents=latents)


# ---------------------------------------------------------------------------------------------------------------------
# From a stock model
# ---------------------------------------------------------------------------------------------------------------------


@families
def test_wrapping_keeps_the_weights_and_a_spare_row_keeps_the_table(family):
    backbone = build_backbone(family)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    model = AMVLForConditionalGeneration.from_backbone(backbone, latent_token_id=LATENT_TOKEN)
    assert model.backbone is backbone and model.config.backbone_config is backbone.config
    assert (model.config.num_latents, model.config.latent_size, model.config.latent_temperature) == (8, 512, 0.0)
    assert model.training is backbone.training is False
    after = backbone.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@families
@pytest.mark.parametrize("latent_token_id", [LATENT_TOKEN, None], ids=["spare row", "new row"])
def test_the_placeholder_starts_as_the_token_that_is_named(family, latent_token_id):
    backbone = build_backbone(family)
    before = backbone.get_input_embeddings().weight.detach().clone()
    model = AMVLForConditionalGeneration.from_backbone(backbone, latent_token_id=latent_token_id, initial_token_id=7)
    table, row = model.get_input_embeddings().weight, model.config.latent_token_id
    assert torch.equal(table[row], before[7])
    others = torch.arange(len(before)) != row
    assert torch.equal(table[: len(before)][others], before[others])
    assert model.generation_config.suppress_tokens == [row]


@pytest.mark.parametrize("latents", ["prior", "off"])
def test_a_placeholder_that_shares_its_row_with_the_output_is_never_said(latents):
    """In a tied table it is as likely as the token it was copied from, here one that the model loves to say."""
    backbone = build_backbone("llava")
    backbone.get_output_embeddings().weight = backbone.get_input_embeddings().weight
    prompts = make_prompts("llava", PADDED)
    with torch.no_grad():
        favourite = int(backbone(**prompts).logits[:, -1].mean(0).argmax())
        backbone.get_output_embeddings().weight[favourite] *= 3
    model = AMVLForConditionalGeneration.from_backbone(
        backbone, 3, 8, latent_token_id=LATENT_TOKEN, initial_token_id=favourite
    ).eval()
    torch.manual_seed(0)
    decoder = model if latents == "prior" else model.backbone
    said = decoder.generate(**prompts, do_sample=True, max_new_tokens=20, eos_token_id=None)
    said = said[:, prompts["input_ids"].shape[1] :]
    assert (said == favourite).any() and not (said == LATENT_TOKEN).any()


@families
def test_a_table_without_a_spare_row_grows_by_the_mean_of_its_rows(family):
    backbone = build_backbone(family)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    prompts = make_prompts(family, PADDED)
    with torch.no_grad():
        logits = backbone(**prompts).logits
    model = AMVLForConditionalGeneration.from_backbone(backbone)
    assert model.config.latent_token_id == VOCAB_SIZE
    tables = [backbone.get_input_embeddings().weight, backbone.get_output_embeddings().weight]
    resized = {name for name, tensor in backbone.state_dict().items() if tensor.shape != before[name].shape}
    assert len(resized) == 2
    for name in before.keys() - resized:
        assert torch.equal(backbone.state_dict()[name], before[name])
    for table, name in zip(tables, sorted(resized, key=lambda name: "lm_head" in name), strict=True):
        assert table.shape == (192, HIDDEN_SIZE)  # the next multiple of 64
        assert torch.equal(table[:VOCAB_SIZE], before[name])
        torch.testing.assert_close(table[VOCAB_SIZE], before[name].mean(0))
    assert model.config.get_text_config(decoder=True).vocab_size == 192
    assert torch.equal(backbone(**prompts).logits[..., :VOCAB_SIZE], logits)
    model(**prompts, **make_answers(UNEQUAL)).loss.backward()


@families
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_fresh_latent_enters_with_the_norm_of_a_typical_token(family, temperature):
    model = build_model(family, num_latents=8, latent_size=64)
    typical = model.get_input_embeddings().weight.detach().norm(dim=-1).median()
    assert model.typical_embedding_norm() == pytest.approx(float(typical), rel=1e-2)
    prior = model.prior(**make_prompts(family, UNPADDED))
    latents = prior.mean + temperature * (prior.log_variance / 2).exp() * torch.randn_like(prior.mean)
    norms = model.latent_projection(latents).norm(dim=-1)
    assert 0.75 < norms.mean() / typical < 1.25
    assert norms.min() / typical > 0.5 and norms.max() / typical < 2


@pytest.mark.parametrize("latent_size", [HIDDEN_SIZE, 3 * HIDDEN_SIZE, HIDDEN_SIZE // 2])
def test_a_fresh_latent_enters_as_the_state_that_it_was_read_off(latent_size):
    model = build_model("llava", latent_size=latent_size)
    states = torch.randn(50, HIDDEN_SIZE)
    with torch.no_grad():
        entered = model.latent_projection(model.prior_head(states)[0])
    cosine = torch.nn.functional.cosine_similarity(entered, model.prior_head.norm(states).detach(), dim=-1)
    if latent_size < HIDDEN_SIZE:  # as the part of it that they hold: half of its square
        assert float(cosine.mean()) == pytest.approx(0.5**0.5, abs=0.05)
    else:
        assert cosine.min() > 0.999
    assert float(entered.norm(dim=-1).mean()) == pytest.approx(model.typical_embedding_norm(), rel=0.1)


@families
def test_a_fresh_posterior_is_the_prior(family):
    model = AMVLForConditionalGeneration.from_backbone(build_backbone(family), latent_token_id=LATENT_TOKEN)
    for name, weight in model.prior_head.state_dict().items():
        assert torch.equal(model.posterior_head.state_dict()[name], weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_latent_parts_take_the_type_of_the_backbone(dtype):
    model = build_model("llava", dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    output = model(**make_prompts("llava", PADDED, dtype), **make_answers(UNEQUAL))
    assert output.prior_mean.dtype == torch.promote_types(dtype, torch.float32)
    assert output.loss.isfinite()
    output.loss.backward()


def test_a_folder_of_a_stock_model_can_be_wrapped(tmp_path):
    backbone = build_backbone("llava")
    backbone.save_pretrained(tmp_path)
    model = AMVLForConditionalGeneration.from_backbone(str(tmp_path), num_latents=2, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.config.num_latents == 2
    weights = model.backbone.state_dict()
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert torch.equal(weights[name], backbone.state_dict()[name].bfloat16())


def test_a_folder_may_be_a_path(tmp_path):
    build_backbone("llava").save_pretrained(tmp_path)
    assert AMVLForConditionalGeneration.from_backbone(tmp_path, num_latents=2).config.num_latents == 2


def _text_only():
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )


def _encoder_decoder():
    return UdopForConditionalGeneration(
        UdopConfig(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_text_only, "`llama` is no image-text-to-text model"),
        (_encoder_decoder, "`udop` is an encoder-decoder"),
        (lambda: build_model("llava"), "is an AMVL model already"),
        (lambda: build_backbone("llava").model, "has no output embeddings|cannot generate text"),
    ],
    ids=["text_only", "encoder_decoder", "amvl_again", "no_head"],
)
def test_a_model_that_cannot_carry_latents_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        AMVLForConditionalGeneration.from_backbone(make())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_text_only, "`llama` is no image-text-to-text model"),
        (_encoder_decoder, "`udop` is an encoder-decoder"),
        (lambda: build_model("llava"), "is an AMVL model already"),
    ],
    ids=["text_only", "encoder_decoder", "amvl_again"],
)
def test_a_folder_that_cannot_carry_latents_is_refused(make, message, tmp_path):
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AMVLForConditionalGeneration.from_backbone(str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_latents": 0}, ValueError, "`num_latents` must be at least 1, got 0"),
        ({"num_latents": -1}, ValueError, "`num_latents` must be at least 1, got -1"),
        ({"num_latents": 2.5}, ValueError, "num_latents"),
        ({"latent_size": 0}, ValueError, "`latent_size` must be at least 1, got 0"),
        ({"latent_temperature": -0.1}, ValueError, "`latent_temperature` must be 0 or more, got -0.1"),
        ({"latent_temperature": "warm"}, ValueError, "latent_temperature"),
        ({"multipass": "both"}, ValueError, "multipass"),
        (
            {"min_log_variance": 4.0},
            ValueError,
            "`min_log_variance` must be below `max_log_variance`, got 4.0 and 4.0",
        ),
        ({"latent_token_id": -1}, ValueError, "`latent_token_id` must be a row of the embedding table, got -1"),
        ({"latent_token_id": IMAGE}, ValueError, f"`latent_token_id` {IMAGE} is the model's `image_token"),
        ({"latent_token_id": 2}, ValueError, "`latent_token_id` 2 is the model's `eos_token_id`"),
        ({"latent_token_id": 10**6}, ValueError, f"is 1000000, but the embedding table has {VOCAB_SIZE} rows"),
        ({"initial_token_id": VOCAB_SIZE}, ValueError, f"`initial_token_id` is {VOCAB_SIZE}: it must be a row"),
        ({"initial_token_id": -1}, ValueError, "`initial_token_id` is -1"),
        ({"initial_token_id": "<s>"}, ValueError, "`initial_token_id` is '<s>'"),
        ({"initial_token_id": True}, ValueError, "`initial_token_id` is True"),
        (
            {"initial_token_id": 5, "latent_token_id": 5},
            ValueError,
            "`initial_token_id` is 5: it must be .* than `latent_token_id`",
        ),
        ({"num_latent": 4}, TypeError, "`num_latent` is no argument of `from_backbone`"),
        ({"dtype": torch.bfloat16}, TypeError, "`dtype` is no argument of `from_backbone`"),
    ],
    ids=str,
)
def test_a_bad_setting_is_refused(settings, error, message):
    backbone = build_backbone("llava")
    with pytest.raises(error, match=message):
        AMVLForConditionalGeneration.from_backbone(backbone, **settings)
    assert backbone.get_input_embeddings().weight.shape[0] == VOCAB_SIZE  # refused before anything was changed


@pytest.mark.parametrize("value", [None, 7, torch.nn.Linear(1, 1)], ids=["none", "number", "module"])
def test_what_is_no_transformers_model_is_refused(value):
    with pytest.raises(TypeError, match="`model_or_id` must be a transformers model"):
        AMVLForConditionalGeneration.from_backbone(value)


def test_the_class_refuses_the_config_of_a_stock_model():
    with pytest.raises(ValueError, match="`config.model_type` must be `amvl`, got `llava`"):
        AMVLForConditionalGeneration(FAMILIES["llava"].config)


@plans
def test_a_setting_changed_to_nonsense_on_a_live_model_is_refused(plan):
    model = build_model("llava", multipass=plan)
    model.config.num_latents = 0
    with pytest.raises(ValueError, match="`num_latents` must be at least 1, got 0"):
        model(**make_prompts("llava", PADDED), **make_answers(UNEQUAL))


def test_the_config_comes_back_from_its_dict():
    config = build_model("qwen2_5_vl", num_latents=5).config
    again = AMVLConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert type(again.backbone_config) is type(FAMILIES["qwen2_5_vl"].config)
    assert again.get_text_config(decoder=True).hidden_size == HIDDEN_SIZE
