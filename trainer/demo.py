"""The embedded default: the base that ships with this package, more plain SFT and AMVL on top, one table for all of them."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .base import add_latents, load_base
from .data.color_steps import FIRST_STEPS, IMAGE_SIZE, build_color_steps
from .data.rows import texts_of
from .diagnostics.interventions import swap_cost
from .evaluation import accuracy_on, answer_questions, answer_text, format_table, guesses
from .tiny_training import train_amvl, train_sft


NUM_EXAMPLES = 3  # pictures that are saved with the checkpoint, for the Space in model_cards/space


@dataclass
class DemoArguments:
    """Settings of the embedded default; the recipe takes them on the command line."""

    output_dir: str = field(default="amvl-demo", metadata={"help": "Where checkpoint, curves and table go."})
    image_dir: str | None = field(
        default=None, metadata={"help": "Folder of photographs; those that scikit-image ships by default."}
    )
    seed: int = field(default=0, metadata={"help": "Of latents, questions and training."})
    num_train_rows: int = field(default=8000, metadata={"help": "Questions about training photographs."})
    num_test_rows: int = field(default=1000, metadata={"help": "Questions about held-out photographs."})
    num_steps: int = field(default=500, metadata={"help": "Steps of AMVL on top of the base, and of plain SFT."})
    batch_size: int = field(default=64, metadata={"help": "Rows per step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Of both."})
    num_latents: int = field(default=2, metadata={"help": "Latent slots."})
    latent_size: int = field(default=64, metadata={"help": "Size of a slot."})


def run_demo(arguments):
    """
    Trains control and AMVL model, prints one table on held-out photographs, and saves both, the control with `-sft` behind
    its folder's name.

    Args:
        arguments ([`DemoArguments`]): settings.

    Returns:
        `dict[str, dict[str, float]]`: accuracy in 0..1 by column of the table and kind of question.
    """
    torch.set_num_threads(1)  # the model is tiny: a second core does more for reading the rows than for its matrices
    output_dir = Path(arguments.output_dir).resolve()  # the lines printed at the end work from any folder
    output_dir.mkdir(parents=True, exist_ok=True)
    train_rows, test_rows = (
        build_color_steps(num_rows, split, arguments.seed, FIRST_STEPS, image_dir=arguments.image_dir)
        for num_rows, split in ((arguments.num_train_rows, "train"), (arguments.num_test_rows, "held_out"))
    )
    print(
        f"{len(train_rows)} questions about {len(set(train_rows['photo']))} photographs to train on, {len(test_rows)} about "
        f"{len(set(test_rows['photo']))} others to test on."
    )
    kinds = list(dict.fromkeys(test_rows["kind"]))
    columns = {name: _with_mean(scores) for name, scores in guesses(test_rows, train_rows).items()}

    def score(name, model, processor, source):
        answers = answer_questions(model, processor, test_rows, source, description=f"Asking: {name}")
        columns[name] = accuracy_on(test_rows, answers)
        return answers

    shared = {
        "num_steps": arguments.num_steps,
        "batch_size": arguments.batch_size,
        "learning_rate": arguments.learning_rate,
        "seed": arguments.seed,
    }
    print(f"\nThe control: the base, {arguments.num_steps} steps of plain SFT, vision encoder frozen.")
    backbone, stock_processor = load_base()
    score("base", backbone, stock_processor, "no_latents")
    backbone.get_encoder(modality="image").requires_grad_(False)
    control_dir = output_dir.with_name(f"{output_dir.name}-sft")
    train_sft(backbone, stock_processor, train_rows, control_dir, **shared)
    score("more SFT", backbone, stock_processor, "no_latents")
    backbone.save_pretrained(control_dir)
    stock_processor.save_pretrained(control_dir)

    print(
        f"\nAMVL: the base, {arguments.num_steps} steps with {arguments.num_latents} latents, vision encoder frozen."
    )
    model, processor = add_latents(arguments.num_latents, arguments.latent_size)
    eval_rows = test_rows.select(range(min(len(test_rows), 200)))
    trainer = train_amvl(
        model,
        processor,
        train_rows,
        output_dir,
        eval_rows=eval_rows,
        logging_steps=max(1, arguments.num_steps // 50),
        **shared,
    )
    answers = score("AMVL, prior Z", model, processor, "prior")
    swapped = swap_cost(model, processor, test_rows, seed=arguments.seed)
    columns["another's Z"] = _with_mean({kind: swapped["by_kind"][kind]["swapped"] for kind in kinds})
    score("latents off", model, processor, "no_latents")
    score("posterior Z", model, processor, "posterior")

    trainer.save_model(str(output_dir))
    trainer.create_model_card(model_name=output_dir.name)
    curves = output_dir / "training_summary.html"
    table = format_table(columns, [*kinds, "mean"])
    settings = (
        f"{len(test_rows)} questions about held-out photographs, greedy, exact answers, per cent; k = "
        f"{arguments.num_latents}, d = {arguments.latent_size}, temperature 0, seed {arguments.seed}, images 72 x 72."
    )
    (output_dir / "results.md").write_text(f"{settings}\n\n{table}\n", encoding="utf-8")
    (output_dir / "results.json").write_text(json.dumps(columns, indent=2), encoding="utf-8")
    test_rows[0]["images"][0].save(output_dir / "example.png")
    save_examples(output_dir, arguments)
    print(f"\n{settings}\n\n{table}\n")
    print(EXPLANATION)
    print(
        f"\nCheckpoint: {output_dir}, curves: {curves}. To ask it, anywhere, with torch, transformers and pillow alone:\n"
    )
    print(
        LOADING_LINES.format(folder=output_dir, image=output_dir / "example.png", question=question_text(test_rows[0]))
    )
    print(f"\nIt says {answers[0]!r}; right is {answer_text(test_rows[0])!r}. The control is in {control_dir}.")
    return columns


def save_examples(output_dir, arguments):
    """Saves held-out pictures for people to ask about, larger than those that the model was trained on, and their questions."""
    kind, examples = FIRST_STEPS[-1:], []
    rows = build_color_steps(
        NUM_EXAMPLES, "held_out", arguments.seed, kind, image_size=4 * IMAGE_SIZE, image_dir=arguments.image_dir
    )
    for number, row in enumerate(rows, start=1):
        name = f"example_{number}.png"
        row["images"][0].save(output_dir / name)
        examples.append({"image": name, "question": question_text(row), "answer": answer_text(row)})
    (output_dir / "examples.json").write_text(json.dumps(examples, indent=2), encoding="utf-8")


def question_text(row):
    """What a row asks."""
    return texts_of(row["prompt"])[0]


EXPLANATION = """\
base: as it ships, taught questions of one step. more SFT: as many steps of plain SFT as AMVL got, on the same rows. The
columns after it are one AMVL model. prior Z: as at inference. another's Z: each row answers with the Z of another one;
what that costs is what Z is worth. latents off: the same weights without them. posterior Z: has read the right answer,
an upper bound; far above prior Z it is leakage."""

LOADING_LINES = """\
from transformers import AutoModelForImageTextToText, AutoProcessor
model, processor = (auto.from_pretrained("{folder}", trust_remote_code=True) for auto in (AutoModelForImageTextToText, AutoProcessor))
chat = [{{"role": "user", "content": [{{"type": "image", "path": "{image}"}}, {{"type": "text", "text": "{question}"}}]}}]
inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
print(processor.batch_decode(model.generate(**inputs, max_new_tokens=16)[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])"""


def _with_mean(scores):
    return {**scores, "mean": sum(scores.values()) / len(scores)}
