"""Reads rows in BLINK's columns: the benchmark itself, and the puzzles made here in its form."""

from .reader import Draft, Reader
from .refocus import with_rationale
from .rows import IMAGE, BadRow, brief, is_given, message


class BlinkReader(Reader):
    """
    A table with `image_1..image_4`, `prompt`, `answer` and `explanation`; `config` names some of its tasks.

    x is the images in order, then `prompt`. y is `answer`, `(A)`, or with `answer="rationale"` the explanation and the answer.
    BLINK's own split `test` hides its answers, and no row of it is kept.
    """

    format = "blink"
    hub_id = "BLINK-Benchmark/BLINK"

    def convert(self, record, subset):
        prompt, answer = record.get("prompt"), record.get("answer")
        if not isinstance(prompt, str):
            raise BadRow("a question that is no text", brief(prompt))
        if answer == "hidden":
            raise BadRow("a hidden answer")
        cells = [record.get(f"image_{number}") for number in range(1, 5)]
        images = [cell for cell in cells if is_given(cell)]
        return Draft(
            images=images,
            prompt=[message("user", *[IMAGE] * len(images), prompt)],
            answer=with_rationale(record.get("explanation"), answer) if self.answer == "rationale" else answer,
        )
