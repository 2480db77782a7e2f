"""Reads ReFocus: charts and tables, of which x keeps the picture as it was before it was edited."""

from .reader import Draft, Reader
from .rows import BadRow, brief, message, with_images, with_rationale


class ReFocusReader(Reader):
    """
    ReFocus_Data, a table with `image`, `question`, `answer`, `thoughts` and `edited_image`, as far as is known.

    x is `image` and `question`; y is `answer`, or with `answer="rationale"` `thoughts` and the answer, a line each.
    """

    format = "refocus"
    hub_id = "ReFocus/ReFocus_Data"

    def convert(self, record, subset):
        question, answer = record.get("question"), record.get("answer")
        if not isinstance(question, str):
            raise BadRow("a question that is no text", brief(question))
        return Draft(
            images=[record.get("image")],
            prompt=[message("user", *with_images(question, "<image>", 1))],
            answer=with_rationale(record.get("thoughts"), answer) if self.answer == "rationale" else answer,
        )
