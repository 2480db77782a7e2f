"""Asks AMVL checkpoints and stock vision-language models the same benchmark, under one prompt, image budget and extractor.

    python recipes/evaluate_amvl.py --benchmark blink --output_dir results/blink --max_pixels 1003520 \\
        --models base=Qwen/Qwen2.5-VL-7B-Instruct sft=my/sft amvl=my/amvl --latents prior none

`results.md`, `results.json` and `results.html` hold chance, the constant answer, every model, and the differences of each
later model to each earlier one with intervals. Cut off, it goes on where it was with the same command, also under

    accelerate launch --num_processes 2 recipes/evaluate_amvl.py ...

where each process takes every other question (on CPUs `torchrun --standalone --nproc_per_node 2`). Without a Hub, `--data` names a local folder of the same shape; `--benchmark
puzzles` without it makes questions from photographs, which needs `pip install -e '.[eval]'`.
"""

from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from trl import TrlParser

from trainer.bars import quiet_libraries
from trainer.evaluation.benchmarks import BENCHMARKS
from trainer.evaluation.models import load_model, parse_models, plan_arms
from trainer.evaluation.questions import prepare_questions
from trainer.evaluation.results import summarize
from trainer.evaluation.results_page import save_results
from trainer.evaluation.runs import Run, check_prompts


@dataclass
class EvaluationArguments:
    """Which models are asked what, and how."""

    models: list[str] = field(
        metadata={
            "help": "Each `name=path`, a Hub id or folder of a stock or an AMVL model: `base=... sft=... amvl=...`. Differences "
            "are those of a later to an earlier one."
        }
    )
    benchmark: str = field(metadata={"help": f"One of {', '.join(BENCHMARKS)}."})
    output_dir: str = field(
        metadata={"help": "Where questions, answers and results go; a run goes on from what is there."}
    )
    data: str | None = field(
        default=None,
        metadata={"help": "Hub id or local folder of the benchmark's shape; where it was published by default."},
    )
    data_revision: str | None = field(
        default=None, metadata={"help": "Revision of the benchmark's repository; not for local data."}
    )
    answer_line: str | None = field(
        default=None,
        metadata={
            "help": "Last line of every prompt, in place of a benchmark's own, '' for none; by default the one that asks for "
            "a letter, for `puzzles` none."
        },
    )
    max_rows: int | None = field(default=None, metadata={"help": "Most rows of each task, to try things out."})
    latents: list[str] | None = field(
        default=None,
        metadata={
            "help": "Of AMVL models: `prior`, the default, and `none`, the same weights without latents; one or both."
        },
    )
    latent_temperature: float | None = field(
        default=None, metadata={"help": "tau of AMVL models, their own by default; 0 is deterministic."}
    )
    num_latents: int | None = field(
        default=None, metadata={"help": "k that AMVL models must have; an error if they differ."}
    )
    seed: int = field(
        default=0, metadata={"help": "Of the latents' noise, the bootstrap, and puzzles that are made here."}
    )
    min_pixels: int | None = field(default=None, metadata={"help": "Fewest pixels of an image, for all models alike."})
    max_pixels: int | None = field(default=None, metadata={"help": "Most pixels of an image, for all models alike."})
    max_new_tokens: int = field(default=512, metadata={"help": "Most tokens of an answer."})
    letter_scores: bool = field(default=True, metadata={"help": "Also read off how likely each letter is."})
    batch_size: int = field(default=8, metadata={"help": "Questions at once, on each process."})
    dtype: str = field(default="auto", metadata={"help": "`auto`, as saved, or `bfloat16`, `float32`, ..."})
    attn_implementation: str | None = field(default=None, metadata={"help": "`sdpa`, `flash_attention_2`, ..."})
    use_cpu: bool = field(default=False, metadata={"help": "Do not use an accelerator."})

    def __post_init__(self):
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"`seed` must be from 0 to 2**31 - 1, got {self.seed}.")
        if self.dtype != "auto" and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"`dtype` must be 'auto' or a type of torch such as 'bfloat16', got {self.dtype!r}.")


def main(arguments):
    # Others wait while the first process reads the benchmark, which takes long where it has to be downloaded.
    state = PartialState(cpu=arguments.use_cpu or not torch.cuda.is_available(), timeout=timedelta(hours=12))
    arms = plan_arms(
        parse_models(arguments.models),
        arguments.latents,
        arguments.latent_temperature,
        arguments.num_latents,
        arguments.min_pixels,
        arguments.max_pixels,
    )
    folder = Path(arguments.output_dir)
    with state.main_process_first():
        question_set = prepare_questions(
            arguments.benchmark,
            folder / "questions",
            arguments.data,
            arguments.data_revision,
            arguments.answer_line,
            arguments.max_rows,
            arguments.seed,
        )
    settings = {
        name: getattr(arguments, name) for name in ("benchmark", "seed", "max_new_tokens", "letter_scores", "dtype")
    }
    settings["questions"] = question_set.digest
    runs = {}
    for arm in arms:
        asked = {key: getattr(arm, key) for key in ("source", "num_latents", "temperature", "image_budget", "version")}
        runs[arm.name] = Run(folder / "answers" / arm.name, {**settings, "model": arm.path, **asked})
    with state.main_process_first():
        for run in runs.values():
            if state.is_main_process:
                run.open()
    for arm in arms:
        check_prompts(arm, question_set.questions)
    for arm in arms:
        run = runs[arm.name]
        left = len(question_set.questions) - len(run.answers())
        state.wait_for_everyone()
        if left:
            model = load_model(arm, state.device, arguments.dtype, arguments.attn_implementation)
            run.answer(
                model,
                arm.processor,
                question_set.questions,
                state,
                arguments.batch_size,
                arm,
                arguments.seed,
                arguments.max_new_tokens,
                arguments.letter_scores,
            )
            del model
    if state.is_main_process:
        answers = {name: run.answers() for name, run in runs.items()}
        results = summarize(question_set, arms, answers, {**question_set.settings, **settings})
        print(save_results(results, question_set, answers, folder))
        print(f"\nWritten to {folder / 'results.md'}, results.json and results.html.")


if __name__ == "__main__":
    quiet_libraries()
    main(*TrlParser((EvaluationArguments,)).parse_args_and_config())
