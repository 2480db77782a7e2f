"""Reads ReFocus: charts and tables, of which x keeps the picture as it was before it was edited."""

from .reader import Draft, Reader
from .rows import BadRow, brief, is_blank, message, with_images


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


def with_rationale(rationale, answer):
    """Rationale and answer, a line each; an answer that is no text stays as it is, for the reader to refuse."""
    if not isinstance(answer, str) or is_blank(answer):
        return answer
    if not isinstance(rationale, str) or is_blank(rationale):
        raise BadRow("no rationale")
    return f"{rationale.strip()}\n{answer}"
