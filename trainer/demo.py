"""The embedded default: a tiny LLaVA from scratch, plain SFT as the base, AMVL on top, one table for all of them."""

import functools
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

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


IMAGE_SIZE = 48  # pixels: width and height of what the vision encoder sees
PATCH_SIZE = 16  # pixels: (48 / 16)^2 = 9 image tokens, one for each cell of a photo question
INITIALIZER_RANGE = 0.1  # about 1 / sqrt(96), which keeps the size of what a layer passes on
NUM_WORKERS = min(1, (os.cpu_count() or 1) - 1)  # processes that read rows beside the one that trains
PAD, BOS, END, IMAGE = "<pad>", "<s>", "<|end|>", "<image>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages -%}
    {{ '<|' + message['role'] + '|>' }}
    {%- if message['content'] is string -%}
        {{ message['content'] }}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' -%}<image>{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<|end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"""


def build_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """
    Builds a byte-level BPE tokenizer whose merges are the words of the photo questions.

    Each of those words is one token, at the start of a text and after a space; any other text falls into bytes and
    fragments, so that every text round-trips.

    Returns:
        `PreTrainedTokenizerFast`: about 430 tokens, with pad, bos and eos (`<|end|>`, which closes every message).
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens = [PAD, BOS, END, IMAGE, *ROLES]
    bpe = trainers.BpeTrainer(
        vocab_size=4096,  # never reached: merges run out when every word is one token
        min_frequency=1,
        show_progress=False,
        special_tokens=special_tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    words = question_words()
    tokenizer.train_from_iterator([text for word in words for text in (word, " " + word)], bpe)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=[IMAGE, *ROLES],
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def grid_positions(grid: int, size: int) -> torch.Tensor:
    """
    Sines and cosines of each patch's row and column, as MAE (arXiv 2111.06377) sets them.

    They start the vision encoder's learnt positions, in place of CLIP's own start, noise with a deviation of 0.02.

    Args:
        grid (`int`): Rows, and columns, of patches.
        size (`int`): Size of an embedding, a multiple of 4.

    Returns:
        `torch.Tensor` of shape `(grid * grid, size)`, in reading order, with values in -1..1.
    """
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    frequencies = 100.0 ** -torch.linspace(0, 1, size // 4)  # radians per patch; MAE's 10,000 suits larger grids
    angles = [steps.reshape(-1, 1) * frequencies for steps in (row, column)]  # 2 x (grid * grid, size / 4)
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)


def build_tiny_backbone(
    seed: int = 0, image_size: int = IMAGE_SIZE
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """
    Builds a stock LLaVA of 0.35 million random weights (CLIP vision encoder, two-layer projector, Llama) for CPU.

    Vision encoder and language model have one layer each. Questions that take two steps are beyond the language model
    alone; what it can do with a second pass, through the latents, is what the demo shows.

    Args:
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights. Torch's, numpy's and Python's global generators are seeded with it, too.
        image_size (`int`, *optional*, defaults to `48`):
            Width and height in pixels of the vision encoder's input, a multiple of 16. Pictures of any other size are
            stretched to it.

    Returns:
        `tuple`: the model (fp32, CPU, in evaluation mode) and its `LlavaProcessor`, both without any code of this
        project. The embedding table has spare rows after the tokenizer's last id. One picture is
        `(image_size / 16) ** 2` image tokens: 9 by default.

    Raises:
        ValueError: `image_size` is no positive multiple of 16.
    """
    if image_size < PATCH_SIZE or image_size % PATCH_SIZE:
        raise ValueError(f"`image_size` must be a positive multiple of {PATCH_SIZE}, but got {image_size}.")
    size = {"height": image_size, "width": image_size}
    tokenizer = build_tiny_tokenizer()
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which "default" drops
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=1,
            num_attention_heads=4,
            image_size=image_size,
            patch_size=PATCH_SIZE,
        ),
        text_config=LlamaConfig(
            vocab_size=64 * (len(tokenizer) // 64 + 1),  # at least one spare row
            hidden_size=96,
            intermediate_size=288,
            num_hidden_layers=1,  # one look at the question; latents give the model a second
            num_attention_heads=4,
            max_position_embeddings=1024,
            initializer_range=INITIALIZER_RANGE,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(image_size // PATCH_SIZE) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        initializer_range=INITIALIZER_RANGE,
        tie_word_embeddings=True,
    )
    set_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        positions = model.model.vision_tower.embeddings.position_embedding.weight  # (1 + patches, vision size)
        positions[1:] = grid_positions(image_size // PATCH_SIZE, positions.shape[1])
    return model, processor


def train_sft(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: Dataset,
    output_dir: str | Path,
    num_steps: int,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    seed: int = 0,
    **config: Any,
) -> list[float]:
    """
    Plain SFT on the answers, by TRL's stock `SFTTrainer` with its progress bar: fp32, cosine schedule, 5% warm-up.

    Args:
        model (`PreTrainedModel`):
            The stock VLM, trained in place. Parameters with `requires_grad=False` (a frozen vision encoder) stay.
        processor (`ProcessorMixin`):
            Its processor, with a chat template.
        rows (`Dataset`):
            Rows in TRL's prompt/completion format, with `images`; shuffled here.
        output_dir (`str` or `Path`):
            Folder that the trainer may write to. No checkpoint is saved.
        num_steps (`int`):
            Optimiser steps of `batch_size` rows each, as many passes over `rows` as that takes.
        batch_size (`int`, *optional*, defaults to `32`):
            Rows per step and device.
        learning_rate (`float`, *optional*, defaults to `1e-3`):
            Peak of the cosine schedule.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order of rows.
        config:
            Further fields of `SFTConfig`, which win over the ones above.

    Returns:
        `list[float]`: the training loss in nats per answer token, logged twenty times along the run. The model is left
        in evaluation mode.
    """
    arguments = {
        "output_dir": str(output_dir),
        "max_steps": num_steps,
        "per_device_train_batch_size": batch_size,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, num_steps // 20),
        "weight_decay": 0.01,
        "adam_beta2": 0.95,
        "seed": seed,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": None,  # a cut prompt would lose image tokens
        "logging_steps": max(1, num_steps // 20),
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "dataloader_num_workers": NUM_WORKERS,
    }
    trainer = SFTTrainer(
        model=model, args=SFTConfig(**(arguments | config)), train_dataset=rows, processing_class=processor
    )
    trainer.train()
    model.zero_grad(set_to_none=True)
    model.eval()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


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
