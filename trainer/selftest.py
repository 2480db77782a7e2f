"""On a run's first batch: does the shared plan give what three full forwards give, on this backbone, with these kernels?

Shapes: B batch, P prompt, D model size.
"""

import contextlib
import time
from dataclasses import dataclass, field

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from modeling_amvl.branching_amvl import output_embeddings

from .bars import bar


# Between two orders of the same arithmetic. Beyond that a difference is allowed that rounding alone makes: this many times
# what the last binary digit of the token embeddings does to the result. In half precision an error may hide in it.
RELATIVE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-4, torch.bfloat16: 5e-3, torch.float16: 2e-3}
ROUNDING_FACTOR = 4.0


@dataclass
class SelfTestReport:
    """
    What the self-test found.

    Args:
        differences (`dict[str, float]`): of `loss`, `prior`, `posterior` and `gradient`, relative to the full plan's.
        tolerances (`dict[str, float]`): what each may be.
        failed (`list[str]`): the checks that the shared plan failed, in words.
        full_failed (`list[str]`): those that the full plan failed, which is to say the backbone itself.
        seconds (`float`): how long it took.
    """

    differences: dict[str, float] = field(default_factory=dict)
    tolerances: dict[str, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    full_failed: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self):
        differences = (
            f"{name} {difference:.1e} (rounding: up to {self.tolerances[name]:.1e})"
            for name, difference in self.differences.items()
        )
        return f"relative differences {', '.join(differences)}"


def self_test(model, inputs, forward=None, shows_progress=False):
    """
    Compares the shared plan with the full plan on one batch, and the prompt's cache before and after its branches.

    Both plans are also asked whether the answer's tokens are read by what comes before them, as they are where a kernel
    ignores the causal mask. Neither parameters, their gradients nor the random state change. With gradients disabled,
    none is compared.

    Args:
        model ([`AMVLForConditionalGeneration`]): as it is trained; dropout is off while it is tested.
        inputs (`dict`): a batch as the collator returns it.
        forward (`Callable`, *optional*): what is called with `inputs`, a `PeftModel` around `model` say.
        shows_progress (`bool`, defaults to `False`): a bar over the five computations.

    Returns:
        [`SelfTestReport`].

    Raises:
        FloatingPointError: the full plan gives what is not finite, with which nothing can be compared.
        torch.OutOfMemoryError: three full forwards do not fit where the shared plan does.
    """
    start = time.perf_counter()
    report = SelfTestReport()
    device = model.get_input_embeddings().weight.device
    progress = bar(total=5, desc="Self-test", leave=False, disable=not shows_progress)

    def step(plan, **settings):
        results = _step(model, model if forward is None else forward, inputs, plan, **settings)
        progress.update()
        return results

    with progress, torch.random.fork_rng([device] if device.type == "cuda" else []), _without_dropout(model):
        expected, dtype = step("full")
        if dtype == torch.float32 and device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
            dtype = torch.float16  # TF32 has the digits of it
        rounded, _ = step("full", rounding=torch.finfo(dtype).eps)
        tolerances = {
            name: max(RELATIVE_TOLERANCE[dtype], ROUNDING_FACTOR * _relative(rounded[name], expected[name]))
            for name in expected
        }
        _check_causality(step, "full", expected, tolerances, report.full_failed)
        try:
            got, _ = step("shared", watch=report.failed)
            _check_causality(step, "shared", got, tolerances, report.failed)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            report.failed.append(f"the shared plan raised {type(error).__name__}: {error}")
            got = {}
    if names := [f"`{name}`" for name, value in expected.items() if not value.isfinite().all()]:
        raise FloatingPointError(f"under the full plan, {', '.join(names)} of this batch are not finite.")
    for name in ("loss", "prior", "posterior", "gradient"):
        if name in got:
            report.tolerances[name] = tolerances[name]
            report.differences[name] = _relative(got[name], expected[name])
            if not report.differences[name] <= tolerances[name]:  # NaN fails
                report.failed.append(
                    f"the {name} differs by {report.differences[name]:.1e}, more than {tolerances[name]:.1e}"
                )
    report.seconds = time.perf_counter() - start
    return report


def _check_causality(step, plan, before, tolerances, failed):
    with torch.no_grad():
        after, _ = step(plan, other_last_token=True)
    difference = _relative(after["answer"], before["answer"])
    if not difference <= tolerances["answer"]:
        failed.append(
            f"another last token changes what precedes it in the answer by {difference:.1e}, more than "
            f"{tolerances['answer']:.1e}: the attention is not causal"
        )


def _step(model, forward, inputs, plan, rounding=0.0, watch=None, other_last_token=False):
    """Results of a step under a plan by name, and the type it was computed in."""
    given_plan, read_prompt = model.config.multipass, model.read_prompt
    length = inputs["input_ids"].shape[1]
    with_gradient = torch.is_grad_enabled()
    embedded, snapshots, dtypes = [], [], []
    if other_last_token:
        ids = inputs["completion_ids"].clone()
        ids[:, -1] = inputs["input_ids"][:, -1]  # some token that is no image; where it is the same, nothing is tested
        inputs = inputs | {"completion_ids": ids}

    def embed(module, args, output):
        if output.ndim == 3 and output.shape[1] >= length:
            leaf = output.detach()
            if rounding:
                # Its own generator, so that the noise of the latents stays the same.
                generator = torch.Generator(leaf.device).manual_seed(len(embedded))
                noise = torch.randn(leaf.shape, generator=generator, device=leaf.device, dtype=leaf.dtype)
                leaf = leaf * (1.0 + rounding * noise)
            leaf.requires_grad_(with_gradient)
            embedded.append(leaf)
            return leaf.clone()  # some models write the images into it in place

    def prompt(*args, **kwargs):
        made = read_prompt(*args, **kwargs)
        if watch is not None:
            snapshots.append((made.cache, _snapshot(made.cache)))
        return made

    hooks = [
        model.get_input_embeddings().register_forward_hook(embed),
        # What the head gives, before a model casts it up: under autocast no weight shows the type.
        output_embeddings(model.backbone).register_forward_hook(
            lambda module, args, output: dtypes.append(output.dtype)
        ),
    ]
    model.config.multipass, model.read_prompt = plan, prompt
    torch.manual_seed(0)
    try:
        outputs = forward(**inputs, decode_no_latents=True)
    finally:
        model.config.multipass = given_plan
        del model.read_prompt
        for hook in hooks:
            hook.remove()
    results = {
        "loss": outputs["loss"],
        "prior": torch.cat([outputs["prior_mean"], outputs["prior_log_variance"]]),
        "posterior": torch.cat([outputs["posterior_mean"], outputs["posterior_log_variance"]]),
        # Decoded without latents: those of the posterior may well depend on the last token.
        "answer": outputs["no_latents_logits"].detach().float().softmax(-1),
    }
    if with_gradient:
        # Means have a variance of about one, so that none of the three branches drowns in another's gradient.
        objective = outputs["loss"] + outputs["prior_mean"].square().mean() + outputs["posterior_mean"].square().mean()
        # The prompt's embeddings are below every layer and in every plan whole, however parameters are sharded.
        prompts = embedded[:1] if plan == "shared" else embedded[:3]
        gradients = torch.autograd.grad(objective, prompts)
        results["gradient"] = sum(gradient[:, :length].double() for gradient in gradients)
    if any(not _unchanged(cache, before) for cache, before in snapshots):
        watch.append("the prompt's cache is not the same after its branches as before")
    return {name: value.detach() for name, value in results.items()}, dtypes[-1]


def _relative(got, expected):
    got, expected = got.double(), expected.to(got.device).double()
    return float((got - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float32).tiny))


def _tensors(cache):
    for layer in cache.layers:
        for value in vars(layer).values():
            values = value.values() if isinstance(value, dict) else (value,)
            yield from (item for item in values if torch.is_tensor(item))


def _snapshot(cache):
    return [tensor.detach().clone() for tensor in _tensors(cache)]


def _unchanged(cache, before):
    after = list(_tensors(cache))
    return len(after) == len(before) and all(torch.equal(*pair) for pair in zip(after, before, strict=True))


@contextlib.contextmanager
def _without_dropout(model):
    """Evaluation mode, but for the switch that lets layers checkpoint."""
    training = {module: module.training for module in model.modules()}
    rates = []
    model.eval()
    for layer in training:
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing and training[layer]:
            layer.training = True
            rates += [
                (layer, name, value)
                for name, value in vars(layer).items()
                if "dropout" in name and value.__class__ is float
            ]
    for layer, name, _ in rates:
        setattr(layer, name, 0.0)
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for layer, name, value in rates:
            setattr(layer, name, value)
