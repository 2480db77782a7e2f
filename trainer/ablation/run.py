"""Trains one arm of the ablation with one seed, and measures it.

An arm starts from the embedded base, sees the same rows in the same order as every other arm of its seed, and is asked about the same
held-out rows. Another seed has other rows, another order and other initial heads.
"""

import time

import torch
from peft import LoraConfig

from ..base import add_latents, load_base
from ..data.color_steps import FIRST_STEPS, build_color_steps
from ..diagnostics.asking import ask, read_latents
from ..diagnostics.interventions import derange, same_latents, swapped
from ..diagnostics.leakage import divergence
from ..diagnostics.questions import is_right, read_questions, with_wrong_answers
from ..evaluation import answer_questions
from ..tiny_training import train_amvl, train_sft
from .arms import LATENTS


TEMPERATURES = (0.2, 0.5, 1.0)
PAUSE = "<pause>"


def run_arm(arm, seed, num_steps, num_train_rows, num_test_rows, batch_size, learning_rate, output_dir):
    """
    Trains an arm and measures it.

    Args:
        arm ([`Arm`]): which.
        seed (`int`): of rows, order and heads.
        num_steps (`int`), batch_size (`int`), learning_rate (`float`): of training, see [`train_sft`].
        num_train_rows (`int`), num_test_rows (`int`): about training and about held-out photographs.
        output_dir (`Path`): folder that the trainer may write to.

    Returns:
        `dict`: what [`measure`] returns, and `seconds_per_step`.
    """
    torch.set_num_threads(1)  # arms run side by side, one on a core
    train_rows, test_rows = (
        build_color_steps(num_rows, split, seed, FIRST_STEPS)
        for num_rows, split in ((num_train_rows, "train"), (num_test_rows, "held_out"))
    )
    shared = dict(
        num_steps=num_steps * arm.length,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        dataloader_num_workers=0,
        disable_tqdm=True,
        logging_strategy="no",
    )
    torch.manual_seed(seed)
    if arm.kind == "amvl":
        latents = {**LATENTS, **arm.latents}
        random_projection = latents.pop("random_projection", False)
        model, processor = add_latents(**latents)
        if random_projection:
            weight = model.latent_projection.weight
            torch.nn.init.normal_(weight, std=float(weight.detach().square().mean().sqrt()))
        start = time.perf_counter()
        peft_config = LoraConfig(**arm.lora) if arm.lora else None
        train_amvl(
            model,
            processor,
            train_rows,
            output_dir,
            peft_config=peft_config,
            **{**shared, **arm.training},
            training_summary=False,
        )
    else:
        model, processor = load_base()
        model.get_encoder(modality="image").requires_grad_(False)
        if arm.kind == "pause":
            add_pauses(model, processor, LATENTS["num_latents"])
        start = time.perf_counter()
        train_sft(model, processor, train_rows, output_dir, **{**shared, **arm.training})
    seconds = time.perf_counter() - start
    return {**measure(model, processor, test_rows, seed), "seconds_per_step": seconds / shared["num_steps"]}


def add_pauses(model, processor, num_pauses):
    """
    The pause-token control: as many further positions before the answer as there would be latents, without any.

    Args:
        model (`PreTrainedModel`), processor (`ProcessorMixin`): the embedded base, both changed in place. As for latents, the
            token's embedding starts as that of the assistant's header.
        num_pauses (`int`): tokens after the header of each answer.
    """
    tokenizer = processor.tokenizer
    header = tokenizer.convert_tokens_to_ids("<|assistant|>")
    tokenizer.add_special_tokens({"extra_special_tokens": [PAUSE]}, replace_extra_special_tokens=False)
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings[tokenizer.convert_tokens_to_ids(PAUSE)] = embeddings[header]
    given, to_come = "{{ '<|' + message['role'] + '|>' }}", "{{ '<|assistant|>' }}"
    pauses = PAUSE * num_pauses
    processor.chat_template = processor.chat_template.replace(
        given, given + "{%- if message['role'] == 'assistant' -%}" + pauses + "{%- endif -%}"
    ).replace(to_come, to_come + pauses)


def measure(model, processor, rows, seed):
    """
    What an arm answers to held-out rows, under every choice of latents.

    Args:
        model, processor: trained.
        rows (`datasets.Dataset`): questions of `FIRST_STEPS`.
        seed (`int`): of partners, wrong answers and noise.

    Returns:
        `dict`: `kinds`, and `right`, for each choice of latents a list of 0 and 1 by row. `"own"` is what inference gives; of an AMVL
        model also `"another's"`, `"posterior"`, `"off"` and `"tau 0.2"` and so on, `copied` and `copied_anyway`, lists of 0 and 1 by
        row (it says the wrong answer that the posterior has read; it says that one with its own Z), and what
        [`~trainer.diagnostics.leakage.divergence`] returns.
    """
    questions = read_questions(rows)
    record = {"kinds": [question.kind for question in questions]}
    if model.config.model_type != "amvl":
        texts = answer_questions(model, processor, rows, "no_latents")
        return record | {"right": {"own": [int(is_right(*pair)) for pair in zip(texts, questions)]}}
    wrong = with_wrong_answers(questions, seed)
    read = read_latents(model, processor, rows, questions, wrong=wrong)
    mean, log_variance = read.prior
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed))
    arms = {
        "own": mean,
        "another's": swapped(mean, derange(same_latents(mean), seed=seed)),
        "posterior": read.posterior[0],
        "off": None,
        **{f"tau {tau}": mean + tau * torch.exp(0.5 * log_variance) * noise for tau in TEMPERATURES},
        "wrong posterior": read.wrong_posterior[0],
    }
    answers = ask(model, processor, rows, questions, arms, with_log_prob=False)
    record["right"] = {
        name: [int(is_right(*pair)) for pair in zip(found.texts, questions)] for name, found in answers.items()
    }
    for key, name in (("copied", "wrong posterior"), ("copied_anyway", "own")):
        record[key] = [int(is_right(*pair)) for pair in zip(answers[name].texts, wrong)]
    return record | divergence(read.prior, read.posterior)
