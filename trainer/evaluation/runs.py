"""Answers to a benchmark's questions as they come in, one line each, so that a run goes on where it was cut off."""

import json
import os
from pathlib import Path

from ..bars import bar
from ..collator import AMVLDataCollator
from ..data.report import write_atomically
from .answering import answer_batch
from .questions import refuse_other_settings


class Run:
    """
    The answers of one arm: `settings.json`, and a file of lines for each process, which only ever grow.

    Args:
        folder (`str` or `Path`): of the arm.
        settings (`dict`): what decides the answers; the batch size and the number of processes do not.
    """

    def __init__(self, folder, settings):
        self.folder, self.settings = Path(folder), settings

    def open(self):
        """
        Makes the folder, or checks that it holds answers under these settings and mends lines that were cut off.

        Raises:
            ValueError: other settings, naming those that differ.
        """
        path = self.folder / "settings.json"
        if path.exists():
            refuse_other_settings(self.folder, json.loads(path.read_text(encoding="utf-8")), self.settings)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(self.settings, indent=1))
        for file in self._files():
            data = file.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                with open(file, "r+b") as stream:
                    stream.truncate(whole)

    def answers(self):
        """
        What has been answered.

        Returns:
            `dict[int, dict]`: by the number of the question, in order.

        Raises:
            ValueError: a line that is no answer.
        """
        found = {}
        for file in self._files():
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
                try:
                    answer = json.loads(line)
                    found.setdefault(answer["row"], answer)
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"`{file}`, line {number}, is no answer ({error}): remove the file.") from error
        return dict(sorted(found.items()))

    def _files(self):
        return sorted(self.folder.glob("answers-*.jsonl"))

    def answer(self, model, processor, questions, state, batch_size, arm, seed, max_new_tokens, letter_scores):
        """
        Answers what is left; each process takes every n-th of it, and writes a batch before it begins the next.

        Args:
            model, processor: see [`answer_batch`], as are `seed`, `max_new_tokens` and `letter_scores`.
            questions (`list[Question]`): all of the benchmark.
            state (`accelerate.PartialState`): which process this is, and of how many.
            batch_size (`int`): questions at once.
            arm ([`Arm`]): how the model is asked.
        """
        done = self.answers()
        state.wait_for_everyone()  # all have seen the same answers before one adds to them
        left = [number for number in range(len(questions)) if number not in done]
        mine = left[state.process_index :: state.num_processes]
        progress = bar(
            total=len(mine), desc=f"Asking {arm.name}", unit="question", disable=not state.is_local_main_process
        )
        with open(self.folder / f"answers-{state.process_index}.jsonl", "a", encoding="utf-8") as file, progress:
            for start in range(0, len(mine), batch_size):
                numbers = mine[start : start + batch_size]
                answers = answer_batch(
                    model,
                    processor,
                    [questions[number] for number in numbers],
                    numbers,
                    arm.source,
                    arm.temperature or 0.0,
                    seed,
                    max_new_tokens,
                    letter_scores,
                )
                for number, answer in zip(numbers, answers, strict=True):
                    file.write(json.dumps({"row": number, "id": questions[number].row_id, **answer}) + "\n")
                file.flush()
                os.fsync(file.fileno())
                progress.update(len(numbers))
        state.wait_for_everyone()


def check_prompts(arm, questions):
    """Renders every prompt without its images, before a question is asked: a [`ValueError`] names one that cannot be."""
    collator = AMVLDataCollator(arm.processor, allow_text_only=True)
    for question in questions:
        collator.render(
            question.row(), f"Question {question.row_id} of {question.task}, for {arm.name}", open_images=False
        )
