"""The embedded default: a tiny LLaVA from scratch, plain SFT as the base, AMVL on top, one table for all of them."""

import functools
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch

from modeling_amvl import AMVLForConditionalGeneration, AMVLProcessor

from .data.photo_questions import (
    KINDS,
    answer_text,
    build_photo_questions,
    chance,
    constant_answer,
    constant_answer_accuracy,
    question_words,
)
from .evaluation import accuracy_by_kind, answer_questions, format_table
from .pictures import plot_training_curves
from .sft_config import AMVLSFTConfig
from .sft_trainer import AMVLSFTTrainer
from .tiny_llava import NUM_WORKERS, build_llava, train_sft


IMAGE_SIZE = 48  # pixels: width and height of what the vision encoder sees
PATCH_SIZE = 16  # pixels: (48 / 16)^2 = 9 image tokens, one for each cell of a photo question


def build_tiny_backbone(seed=0, image_size=IMAGE_SIZE):
    """
    Builds a stock LLaVA of 0.35 million random weights for CPU, see [`build_llava`].

    Vision encoder and language model have one layer each. Questions that take two steps are beyond the language model
    alone; what it can do with a second pass, through the latents, is what the demo shows.

    Args:
        seed (`int`, defaults to 0): of the weights.
        image_size (`int`, defaults to 48): pixels, a multiple of 16; one picture is `(image_size / 16) ** 2` image tokens.

    Returns:
        `tuple`: the model and its processor.
    """
    return build_llava(question_words(), image_size, PATCH_SIZE, seed=seed)


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class DemoArguments:
    """Settings of the embedded default; the recipe takes them on the command line."""

    output_dir: str = field(default="amvl-demo", metadata={"help": "Where checkpoint, curves and table go."})
    image_dir: str | None = field(
        default=None, metadata={"help": "Folder of photographs; those that scikit-image ships by default."}
    )
    seed: int = field(default=0, metadata={"help": "Of weights, questions and training."})
    num_train_rows: int = field(default=20000, metadata={"help": "Questions about training photographs."})
    num_test_rows: int = field(default=2000, metadata={"help": "Questions about held-out photographs."})
    base_steps: int = field(default=800, metadata={"help": "Plain-SFT steps from scratch, which make the base."})
    amvl_steps: int = field(default=1800, metadata={"help": "AMVL steps on top of the base, and of the SFT control."})
    batch_size: int = field(default=64, metadata={"help": "Rows per step."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Of every stage."})
    num_latents: int = field(default=4, metadata={"help": "Latent slots."})
    latent_size: int = field(default=64, metadata={"help": "Size of a slot."})
    beta: float = field(default=0.01, metadata={"help": "Weight of the forward KL term."})
    gamma: float = field(default=0.001, metadata={"help": "Weight of the reverse KL term."})
    prior_ntp_weight: float = field(
        default=1.0, metadata={"help": "Weight of the loss decoded from prior samples; 0 is the paper's objective."}
    )


def run_demo(arguments):
    """
    Trains base, control and AMVL model, prints one table on held-out photographs, and saves the AMVL checkpoint.

    Args:
        arguments ([`DemoArguments`]): settings.

    Returns:
        `dict[str, dict[str, float]]`: accuracy in 0..1 by column of the table and kind of question.
    """
    torch.set_num_threads(1)  # the model is tiny: a second core does more for reading the rows than for its matrices
    output_dir = Path(arguments.output_dir).resolve()  # the lines printed at the end work from any folder
    output_dir.mkdir(parents=True, exist_ok=True)
    train_rows = build_photo_questions(
        arguments.num_train_rows, "train", arguments.seed, image_dir=arguments.image_dir
    )
    test_rows = build_photo_questions(
        arguments.num_test_rows, "held_out", arguments.seed, image_dir=arguments.image_dir
    )
    print(
        f"{len(train_rows)} questions about {len(set(train_rows['photo']))} photographs to train on, {len(test_rows)} about "
        f"{len(set(test_rows['photo']))} others to test on."
    )
    gold, kinds = [answer_text(row) for row in test_rows.remove_columns("images")], list(test_rows["kind"])
    columns = {
        "chance": _with_mean(chance(test_rows)),
        "constant": _with_mean(constant_answer_accuracy(test_rows, constant_answer(train_rows))),
    }

    def score(name, model, source):
        answers = answer_questions(model, processor, test_rows, source, description=f"Asking: {name}")
        columns[name] = accuracy_by_kind(answers, gold, kinds)
        return answers

    print(f"\nThe base: plain SFT from scratch, {arguments.base_steps} steps.")
    backbone, stock_processor = build_tiny_backbone(arguments.seed)
    processor = AMVLProcessor.from_backbone(stock_processor)
    sft = functools.partial(
        train_sft,
        backbone,
        stock_processor,
        train_rows,
        output_dir / "sft",
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
    )
    sft(num_steps=arguments.base_steps)
    score("base", backbone, "no_latents")
    base_weights = {name: weight.clone() for name, weight in backbone.state_dict().items()}

    print(f"\nThe control: the base, {arguments.amvl_steps} more steps of plain SFT, vision encoder frozen.")
    backbone.get_encoder(modality="image").requires_grad_(False)
    sft(num_steps=arguments.amvl_steps)
    score("more SFT", backbone, "no_latents")

    print(
        f"\nAMVL: the base, {arguments.amvl_steps} steps with {arguments.num_latents} latents, vision encoder frozen."
    )
    backbone.load_state_dict(base_weights)
    model = AMVLForConditionalGeneration.from_backbone(
        backbone,
        num_latents=arguments.num_latents,
        latent_size=arguments.latent_size,
        latent_token_id=processor.latent_token_id,
    )
    training_args = AMVLSFTConfig(
        str(output_dir),
        max_steps=arguments.amvl_steps,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.01,
        adam_beta2=0.95,
        beta=arguments.beta,
        gamma=arguments.gamma,
        prior_ntp_weight=arguments.prior_ntp_weight,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        dataloader_num_workers=NUM_WORKERS,
        check_dataset=False,  # built a moment ago
        logging_steps=max(1, arguments.amvl_steps // 50),
        eval_strategy="steps",
        eval_steps=max(1, arguments.amvl_steps // 8),
        save_strategy="no",
        report_to="none",
        seed=arguments.seed,
    )
    trainer = AMVLSFTTrainer(
        model,
        training_args,
        train_dataset=train_rows,
        eval_dataset=test_rows.select(range(min(len(test_rows), 40 * len(KINDS)))),
        processing_class=processor,
    )
    trainer.train()
    model.eval()
    answers = score("AMVL, prior Z", model, "prior")
    score("AMVL, posterior Z", model, "posterior")
    score("AMVL, latents off", model, "no_latents")

    shutil.rmtree(output_dir / "sft", ignore_errors=True)  # TRL makes the folder, nothing is in it
    trainer.save_model(str(output_dir))
    trainer.create_model_card(model_name=output_dir.name)
    curves = plot_training_curves(trainer.state.log_history, output_dir / "curves.png", "AMVL on photo questions")
    table = format_table(columns, [*KINDS, "mean"])
    settings = (
        f"{len(test_rows)} questions about held-out photographs, greedy, exact answers, per cent; k = "
        f"{arguments.num_latents}, d = {arguments.latent_size}, temperature 0, seed {arguments.seed}, images 48 x 48."
    )
    (output_dir / "results.md").write_text(f"{settings}\n\n{table}\n", encoding="utf-8")
    (output_dir / "results.json").write_text(json.dumps(columns, indent=2), encoding="utf-8")
    test_rows[0]["images"][0].save(output_dir / "example.png")
    print(f"\n{settings}\n\n{table}\n")
    print(
        "base: plain SFT. more SFT: as many further steps as AMVL got. prior Z: as at inference. posterior Z: has read the\n"
        "right answer, an upper bound; far above prior Z it is leakage. latents off: the same weights without them."
    )
    question = next(part["text"] for part in test_rows[0]["prompt"][0]["content"] if part["type"] == "text")
    print(f"\nCheckpoint: {output_dir}, curves: {curves}. To ask it, anywhere, with torch and transformers alone:\n")
    print(LOADING_LINES.format(folder=output_dir, image=output_dir / "example.png", question=question))
    print(f"\nIt says {answers[0]!r}; right is {gold[0]!r}.")
    return columns


LOADING_LINES = """\
from transformers import AutoModelForImageTextToText, AutoProcessor
model, processor = (auto.from_pretrained("{folder}", trust_remote_code=True) for auto in (AutoModelForImageTextToText, AutoProcessor))
chat = [{{"role": "user", "content": [{{"type": "image", "path": "{image}"}}, {{"type": "text", "text": "{question}"}}]}}]
inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
print(processor.batch_decode(model.generate(**inputs, max_new_tokens=16)[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])"""


def _with_mean(scores):
    return {**scores, "mean": sum(scores.values()) / len(scores)}
