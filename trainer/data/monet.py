"""Reads Monet-SFT-125K: the paper's sources (Visual-CoT, ReFocus, CogCoM, Zebra-CoT) as others cleaned them."""

import re

from .files import SourceFiles, is_hub_id
from .reader import JSON_SUFFIXES, Draft, Reader
from .rows import IMAGE, SYSTEM_PROMPT, BadRow, boxed_text, message, text_part


SUBSETS = ("Visual_CoT", "CogCoM", "ReFocus", "Zebra_CoT_count", "Zebra_CoT_visual_search", "Zebra_CoT_geometry")
# Two subsets ask for a boxed answer in a way that belongs to the task; elsewhere the sentence goes.
BOXED_SUFFIX = "\nPut your final answer within \\boxed{}."
KEEPS_SUFFIX = ("Zebra_CoT_count", "Zebra_CoT_visual_search")
ROLES = {"system", "user", "assistant"}
MARKERS = re.compile(r"</?observation>")
VISUAL = "<abs_vis_token>", "</abs_vis_token>"  # what stands between them is no text


class MonetReader(Reader):
    """
    Monet-SFT-125K. `config` names some of its six folders; `name` is the folder of those, or its parent.

    y is the content of the last `\\boxed{}`, or with `answer="rationale"` the assistant's text without auxiliary images,
    markers and tags. The system text is replaced, as the dataset's own code does.
    """

    format = "monet"
    hub_id = "NOVAglow646/Monet-SFT-125K"
    default_licence = "not stated"

    def open_files(self):
        self.configs = list(SUBSETS) if self.configs is None else self.configs
        unknown = sorted(set(self.configs) - set(SUBSETS))
        if unknown:
            raise ValueError(f"`config` holds {unknown}, unknown to Monet-SFT-125K: choose among {SUBSETS}.")
        wanted = ["README.md", *(pattern for s in self.configs for pattern in (f"{s}/*", f"*/{s}/*"))]
        files = SourceFiles(
            self.name, self.image_root, self.revision, wanted, lazy=self.streaming and is_hub_id(self.name)
        )
        if files.folder is not None and not any((files.folder / subset).is_dir() for subset in SUBSETS):
            parents = [path for path in files.folder.iterdir() if any((path / s).is_dir() for s in SUBSETS)]
            if len(parents) != 1:
                raise ValueError(
                    f"`{self.name}` holds none of the folders {SUBSETS}: give the folder of Monet-SFT-125K."
                )
            files = SourceFiles(parents[0], self.image_root or parents[0])
        return files

    def json_files(self):
        found = {}
        for subset in self.configs:
            files = [path for suffix in JSON_SUFFIXES for path in self.files.glob(f"{subset}/{self.split}{suffix}")]
            if not files:
                present = [name for name in SUBSETS if self.files.glob(f"{name}/{self.split}.json*")]
                raise ValueError(
                    f"`{subset}` has no `{self.split}.json` or `{self.split}.jsonl` in it: download the subset, or leave it out "
                    f"with `config={present}`."
                )
            found[subset] = files[:1]
        return found

    def licences(self):
        licences = super().licences()
        for name in licences:
            if name.startswith("Zebra_CoT") and "nc" not in licences[name].lower():
                licences[name] += "; made from Zebra-CoT, CC-BY-NC-4.0"
        return licences

    def id_of(self, record, number):
        match record:
            case {"metadata": {"sample_id": str() | int() as sample_id}}:
                return str(sample_id)
        return super().id_of(record, number)

    def convert(self, record, subset):
        turns = _turns(record)
        if not {"user", "assistant"} <= set(turns):
            raise BadRow("no user or no assistant turn")
        return Draft(
            images=[part["image"] for part in turns["user"] if part["type"] == "image"],
            prompt=[
                message("system", SYSTEM_PROMPT),
                message("user", *(_question_part(part, subset) for part in turns["user"])),
            ],
            answer=self._answer("".join(part["text"] for part in turns["assistant"] if part["type"] == "text")),
        )

    def _answer(self, reply):
        if self.answer == "answer":
            if (answer := boxed_text(reply)) is None:
                raise BadRow("no boxed answer")
            return answer
        text = re.sub(r"[ \t]{2,}", " ", MARKERS.sub("", _without_visual(reply))).strip()
        if not text:
            raise BadRow("no text in the reply")
        return text


def _without_visual(text):
    opening, closing = VISUAL
    first, *others = text.split(opening)
    return first + "".join(piece.partition(closing)[2] if closing in piece else piece for piece in others)


def read_monet(name, subsets=SUBSETS, answer="answer", max_rows=None, **settings):
    """
    Monet-SFT-125K as training rows: [`MonetReader`] in one call.

    Args:
        name (`str`): Hub id, or a local copy: the folder of the subsets, or its parent.
        subsets (`tuple[str]`): which of the six folders to read.
        answer (`"answer"` or `"rationale"`, defaults to `"answer"`): what y is.
        max_rows (`int`, *optional*): most rows of each subset.
        **settings: of [`Reader`].

    Returns:
        `tuple[Dataset, DataReport]`: columns `images`, `prompt`, `completion`, `source`, `row_id`.
    """
    return MonetReader(name, config=list(subsets), answer=answer, max_rows=max_rows, **settings).read()


def _question_part(part, subset):
    if part["type"] == "image":
        return IMAGE
    return text_part(part["text"] if subset in KEEPS_SUFFIX else part["text"].replace(BOXED_SUFFIX, ""))


def _turns(record):
    """The parts of each role's turn."""
    turns = {}
    match record:
        case {"data": [*data]}:
            pass
        case _:
            data = [None]
    for turn in data:
        match turn:
            case {"role": str(role), "content": [*parts]} if role in ROLES - set(turns) and all(map(_is_part, parts)):
                turns[role] = parts
            case _:
                raise BadRow("not one turn each of system, user and assistant, made of texts and images")
    return turns


def _is_part(part):
    match part:
        case {"type": "text", "text": str()} | {"type": "image", "image": str()}:
            return True
    return False
