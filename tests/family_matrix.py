"""What holds for a family, as functions: the tests run them on all families, this script prints them as a table.

    PYTHONPATH=. python tests/family_matrix.py tests/FAMILIES.md

Distances are relative: norm of the difference over norm of the expected tensor.
"""

import argparse
import collections
import contextlib
import time
from pathlib import Path

import torch
import transformers
from families import (
    FAMILIES,
    IMAGE,
    SPARE_ROWS,
    WORDS,
    Row,
    build_backbone,
    has_prompts,
    is_same_as_alone,
    make_answers,
    make_prompts,
)
from reference import reference_step
from transformers import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

from modeling_amvl import AMVLForConditionalGeneration
from trainer.staged_backward import run_stages, stages_are_apart


SEED = 3
DISTRIBUTIONS = ("prior_mean", "prior_log_variance", "posterior_mean", "posterior_log_variance")
FP32, FP64 = 1e-4, 1e-12
FLOAT32, TENSOR_TO, TENSOR_FLOAT = torch.float32, torch.Tensor.to, torch.Tensor.float

# Left padding, several images in a row, rows with different numbers of them and text-only rows among them.
BATCHES = (
    (Row(seed=0, num_words=5), Row(seed=1, num_words=9), Row(seed=2, num_words=3)),
    (Row(seed=0, num_images=2, num_words=3), Row(seed=1), Row(seed=2, num_images=3, num_words=2)),
    (Row(seed=0, num_images=0), Row(seed=1, num_words=4), Row(seed=2, num_images=2, num_words=3)),
)
EQUAL = (Row(seed=0), Row(seed=1), Row(seed=2))
ALONE = (Row(seed=0),)
UNEQUAL_ANSWERS = (5, 2, 3)


def build_model(family, num_latents=3, dtype=torch.float32):
    backbone = build_backbone(family, dtype)
    torch.manual_seed(0)
    model = AMVLForConditionalGeneration.from_backbone(
        backbone, num_latents=num_latents, latent_size=8, latent_token_id=SPARE_ROWS.start
    )
    for parameter in model.posterior_head.parameters():  # a fresh posterior is a copy of the prior
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def distance(got, expected):
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())


def _differentiated(model, outputs, cuts=None):
    """Outputs by name, with `gradient`: of a scalar that each moves by random weights, in all parameters."""
    generator = torch.Generator().manual_seed(SEED)
    moved = {}
    for name in (*DISTRIBUTIONS, "words"):
        weights = torch.randn(outputs[name].shape, generator=generator, dtype=FLOAT32)
        moved[name] = (weights.to(outputs[name].dtype) * outputs[name]).sum()
    decoded, read = outputs["loss"] + moved.pop("words"), sum(moved.values())
    model.zero_grad()
    if cuts is None:
        (decoded + read).backward()
    else:
        terms = {"ntp": decoded, "forward": read, "reverse": torch.zeros(())}
        run_stages(terms, cuts, torch.Tensor.backward).backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return outputs | {"gradient": torch.cat([gradient.flatten() for gradient in gradients])}


def _words(logits, lengths):
    """Logits of words at the answers' tokens; chameleon sets those of its image codes to the least number there is."""
    return torch.cat([row[:length, WORDS.start : WORDS.stop] for row, length in zip(logits, lengths, strict=True)])


def step(model, family, rows, plan, lengths=UNEQUAL_ANSWERS, dtype=torch.float32, in_stages=False):
    """Outputs and gradients of a step under a plan; in stages where the backbone allows them, as the trainer finds out."""
    answers = make_answers(lengths[: len(rows)])
    model.config.multipass = plan
    torch.manual_seed(SEED)
    output = model(**make_prompts(family, rows, dtype), **answers, in_stages=in_stages)
    if in_stages and not stages_are_apart(output):
        return None
    words = _words(output.logits, answers["completion_mask"].sum(1))
    named = {name: output[name] for name in ("loss", *DISTRIBUTIONS)} | {"words": words}
    return _differentiated(model, named, output.get("cuts"))


def reference(model, family, rows):
    """The same by the obvious implementation, row by row."""
    answers = make_answers(UNEQUAL_ANSWERS[: len(rows)])
    lengths = answers["completion_mask"].sum(1)
    ids = [row[:length] for row, length in zip(answers["completion_ids"], lengths, strict=True)]
    torch.manual_seed(SEED)
    noise = torch.randn(len(rows), model.config.num_latents, model.config.latent_size)
    output = reference_step(model, [make_prompts(family, [row]) for row in rows], ids, noise)
    words = _words(output["logits"], lengths)
    return _differentiated(model, {name: output[name] for name in ("loss", *DISTRIBUTIONS)} | {"words": words})


def worst(got, expected):
    return max(distance(got[name], expected[name]) for name in expected)


def readable_batches(family):
    """The batches that the family's stock model reads."""
    return [rows for rows in (*BATCHES, EQUAL) if has_prompts(family, rows)]


# ---------------------------------------------------------------------------------------------------------------------
# The checks: each gives the largest relative distance it saw
# ---------------------------------------------------------------------------------------------------------------------


def shared_is_reference(family):
    """The shared plan against three stock forwards of each row alone, outputs and gradients."""
    return _from_reference(family, "shared")


def full_is_reference(family):
    """The full plan against the same."""
    return _from_reference(family, "full")


def _from_reference(family, plan):
    model = build_model(family)
    batches = [
        rows
        for rows in (*BATCHES, EQUAL, ALONE)
        if is_same_as_alone(family, rows)
        and all(has_prompts(family, part) for part in (rows, *([row] for row in rows)))
    ]
    return max(worst(step(model, family, rows, plan), reference(model, family, rows)) for rows in batches)


def shared_is_full(family):
    """The two plans, in every batch the stock model reads."""
    model = build_model(family)
    return max(
        worst(step(model, family, rows, "shared"), step(model, family, rows, "full"))
        for rows in readable_batches(family)
    )


def one_slot(family):
    """The two plans with one latent slot, and answers of one token."""
    model = build_model(family, num_latents=1)
    return max(
        worst(*(step(model, family, readable_batches(family)[0], plan, lengths) for plan in ("shared", "full")))
        for lengths in (UNEQUAL_ANSWERS, (1, 1, 1))
    )


def checkpointed(family):
    """The shared plan with every decoder layer recomputed in the backward pass, against itself without."""
    rows = readable_batches(family)[0]
    model = build_model(family).train()
    calls = []
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            for part in layer.children():
                part.register_forward_pre_hook(lambda module, args: calls.append(1))
    expected, num_calls = step(model, family, rows, "shared"), len(calls)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    got = step(model, family, rows, "shared")
    assert len(calls) - num_calls > num_calls, "No layer ran again in the backward pass."
    return worst(got, expected)


def exact_in_float64(family):
    """The two plans in double precision, what models compute in single precision by themselves included."""
    with all_in_float64():
        model = build_model(family, dtype=torch.float64)
        model.backbone.set_experts_implementation("eager")  # the grouped kernel has no double precision
        return max(
            worst(*(step(model, family, rows, plan, dtype=torch.float64) for plan in ("shared", "full")))
            for rows in readable_batches(family)
        )


def causal(family):
    """What another last token of the answer does to the tokens before it, under both plans."""
    model = build_model(family)
    prompts = make_prompts(family, readable_batches(family)[0])
    answers = make_answers((4, 4, 4))["completion_ids"]
    other = torch.cat([answers[:, :-1], (answers[:, -1:] + 1 - WORDS.start) % len(WORDS) + WORDS.start], dim=1)
    latents = torch.randn(3, model.config.num_latents, model.config.latent_size)
    distances = []
    for plan in ("shared", "full"):
        model.config.multipass = plan
        with torch.no_grad():
            before, after = (
                model.log_prob(**prompts, completion_ids=ids, latents=latents)[:, :-1] for ids in (answers, other)
            )
        distances.append(distance(after, before))
    return max(distances)


def generates_as_it_is_taught(family):
    """Logits of `generate`, step by step, against those of the full plan for the tokens it chose."""
    model = build_model(family)
    distances = []
    for rows in readable_batches(family):
        prompts = make_prompts(family, rows)
        output = model.generate(
            **prompts,
            min_new_tokens=4,
            max_new_tokens=4,
            suppress_tokens=[token for token in range(IMAGE + 20) if token not in WORDS],
            return_dict_in_generate=True,
            output_logits=True,
        )
        model.config.multipass = "full"
        with torch.no_grad():
            answers = output.sequences[:, prompts["input_ids"].shape[1] :]
            taught = model(**prompts, completion_ids=answers, decode_prior=True, latent_temperature=0.0)
        words = slice(WORDS.start, WORDS.stop)
        distances.append(distance(torch.stack(output.logits, 1)[..., words], taught.prior_logits[..., words]))
        distances.append(distance(output.latents, taught.prior_mean))
    return max(distances)


def samples_are_what_each_gives_alone(family, num_samples=3):
    """Logits of several samples of a prompt against those of its latents, one call each; their tokens have to be the same."""
    model = build_model(family)
    words = slice(WORDS.start, WORDS.stop)
    settings = {
        "min_new_tokens": 4,
        "max_new_tokens": 4,
        "suppress_tokens": [token for token in range(IMAGE + 20) if token not in WORDS],
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    distances = []
    for rows in readable_batches(family):
        prompts = make_prompts(family, rows)
        samples = model.generate(**prompts, num_latent_samples=num_samples, latent_temperature=2.0, **settings)
        for sample in range(num_samples):
            alone = model.generate(**prompts, latents=samples.latents[sample::num_samples], **settings)
            assert torch.equal(samples.sequences[sample::num_samples], alone.sequences), f"sample {sample} of {rows}"
            distances.extend(
                distance(got[sample::num_samples, words], expected[:, words])
                for got, expected in zip(samples.logits, alone.logits, strict=True)
            )
    return max(distances)


CHECKS = {
    shared_is_reference: FP32,
    full_is_reference: FP32,
    shared_is_full: FP32,
    one_slot: FP32,
    checkpointed: FP32,
    exact_in_float64: FP64,
    causal: FP32,
    generates_as_it_is_taught: FP32,
}


@contextlib.contextmanager
def all_in_float64():
    """Whatever asks for single precision gets double: norms and softmaxes do, whatever the type of the model."""

    def to(tensor, *args, **kwargs):
        args = [torch.float64 if value is FLOAT32 else value for value in args]
        if kwargs.get("dtype") is FLOAT32:
            kwargs["dtype"] = torch.float64
        return TENSOR_TO(tensor, *args, **kwargs)

    torch.float32 = torch.float = torch.float64
    torch.Tensor.to, torch.Tensor.float = to, torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.float32 = torch.float = FLOAT32
        torch.set_default_dtype(FLOAT32)
        torch.Tensor.to, torch.Tensor.float = TENSOR_TO, TENSOR_FLOAT


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


def cache_layers(family):
    """The kinds of cache layers of the tiny model, and how many there are of each."""
    cache = DynamicCache(config=FAMILIES[family].config.get_text_config(decoder=True))
    kinds = collections.Counter(type(layer).__name__.removesuffix("Layer") for layer in cache.layers)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "Dynamic, as it fills"


def row(family):
    """A family's row of the table, and whether it passed every check."""
    for plan, reason in (("refused", FAMILIES[family].refused), ("broken", FAMILIES[family].broken_here)):
        if reason:
            return [family, plan, reason, *[""] * len(CHECKS)], False
    cells, passed = [], True
    for check, tolerance in CHECKS.items():
        try:
            found = check(family)
            passed &= found < tolerance
            cells.append(f"{found:.0e}" if found < tolerance else f"**{found:.0e}**")
        except Exception as error:
            passed = False
            cells.append(f"**{type(error).__name__}**")
    return [family, "shared", cache_layers(family), *cells], passed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", type=Path, help="Markdown file to write; else the table is printed.")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), help="All by default.")
    arguments = parser.parse_args()
    unknown = set(arguments.families) - set(FAMILIES)
    if unknown:
        raise ValueError(
            f"`families` has {sorted(unknown)}, which transformers does not map: choose of {list(FAMILIES)}."
        )
    start, lines = time.perf_counter(), []
    num_passed = 0
    for family in arguments.families:
        cells, passed = row(family)
        num_passed += passed
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    num_refused = sum(bool(FAMILIES[family].refused) for family in arguments.families)
    num_broken = sum(bool(FAMILIES[family].broken_here) for family in arguments.families)
    broken = f", {num_broken} fail in their stock forward already" if num_broken else ""
    text = PAGE.format(
        version=transformers.__version__,
        torch=torch.__version__,
        num_families=len(arguments.families),
        num_passed=num_passed,
        num_refused=num_refused,
        broken=broken,
        checks="\n".join(
            f"- `{check.__name__}` (below {tolerance:.0e}): {check.__doc__}" for check, tolerance in CHECKS.items()
        ),
        header=" | ".join(check.__name__ for check in CHECKS),
        rule="|".join(["---"] * (3 + len(CHECKS))),
        rows="\n".join(lines),
    )
    if arguments.path is not None:
        arguments.path.write_text(text)
    print(
        f"{num_passed} families pass every check, {num_refused} are refused{broken}, "
        f"in {time.perf_counter() - start:.0f} s."
    )


PAGE = """# Families

The {num_families} image-text-to-text families of transformers {version}, as tiny random models (torch {torch}, CPU): {num_passed} pass
every check, {num_refused} are refused with a sentence by `from_backbone`{broken}. Written by
`PYTHONPATH=. python tests/family_matrix.py tests/FAMILIES.md`; `tests/test_family_matrix.py` runs the same checks.

A figure is the largest relative distance that a check saw, over outputs and gradients and over batches with left padding,
answers of unequal length, several images in a row, rows with different numbers of images and text-only rows, as far as the
stock model reads them (`tests/family_data.py` says what one does not, and why). Bold is a failure.

{checks}

| family | plan | cache layers, or why not | {header} |
|{rule}|
{rows}
"""

if __name__ == "__main__":
    main()
