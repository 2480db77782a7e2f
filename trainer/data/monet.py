"""Reads Monet-SFT-125K, the paper's mixture as others cleaned it, into `images`, `prompt` and `completion`."""

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, Features, Image, List, Value
from huggingface_hub import snapshot_download


SUBSETS = ("Visual_CoT", "CogCoM", "ReFocus", "Zebra_CoT_count", "Zebra_CoT_visual_search", "Zebra_CoT_geometry")
SYSTEM_PROMPT = "You are a helpful assistant."
# Two subsets ask for a boxed answer in a way that belongs to the task; elsewhere the sentence goes.
BOXED_SUFFIX = "\nPut your final answer within \\boxed{}."
KEEPS_SUFFIX = ("Zebra_CoT_count", "Zebra_CoT_visual_search")
MARKERS = re.compile(r"<abs_vis_token>.*?</abs_vis_token>|</?observation>", re.DOTALL)

_CONTENT = List({"type": Value("string"), "text": Value("string")})
FEATURES = Features(
    {
        "images": List(Image()),
        "prompt": List({"role": Value("string"), "content": _CONTENT}),
        "completion": List({"role": Value("string"), "content": _CONTENT}),
        "source": Value("string"),
        "row_id": Value("string"),
    }
)


@dataclass
class ReadingReport:
    """What a reader read, kept and dropped, with up to three examples per reason."""

    kept: Counter = field(default_factory=Counter)
    dropped: dict[str, list[str]] = field(default_factory=dict)
    num_dropped: Counter = field(default_factory=Counter)

    def drop(self, reason, row_id):
        self.num_dropped[reason] += 1
        self.dropped.setdefault(reason, [])[3:] = []
        if len(self.dropped[reason]) < 3:
            self.dropped[reason].append(row_id)

    def __str__(self):
        lines = [f"kept {sum(self.kept.values())} rows: " + ", ".join(f"{k} {v}" for k, v in self.kept.items())]
        for reason, number in self.num_dropped.items():
            lines.append(f"dropped {number}: {reason}, for example {', '.join(self.dropped[reason])}")
        return "\n".join(lines)


def read_monet(name, subsets=SUBSETS, answer="answer", max_rows=None):
    """
    Monet-SFT-125K as training rows. Auxiliary images never enter x, nor does any text of the answer.

    Args:
        name (`str`): Hub id, or a local copy: the folder of the subsets, or its parent.
        subsets (`tuple[str]`): which of the six folders to read.
        answer (`"answer"` or `"rationale"`, defaults to `"answer"`): y is the boxed answer alone, or the assistant's text
            without auxiliary images, markers and tags. Which of them the paper trains on is not stated.
        max_rows (`int`, *optional*): most rows of each subset.

    Returns:
        `tuple[Dataset, ReadingReport]`: columns `images`, `prompt`, `completion`, `source`, `row_id`.

    Raises:
        ValueError: an unknown subset or form of answer, a folder that holds no subset, a file that holds no records, or
            records of which none can be trained on.
    """
    if answer not in ("answer", "rationale"):
        raise ValueError(f"`answer` must be 'answer' or 'rationale', got {answer!r}.")
    unknown = sorted(set(subsets) - set(SUBSETS))
    if unknown:
        raise ValueError(f"`subsets` holds {unknown}, unknown to Monet-SFT-125K: choose among {SUBSETS}.")
    root = Path(name)
    if not root.exists():
        wanted = [pattern for subset in subsets for pattern in (f"{subset}/*", f"*/{subset}/*")]
        root = Path(snapshot_download(name, repo_type="dataset", allow_patterns=wanted))
    # In the Hub's cache files are links to blobs/, beside snapshots/.
    blobs = [root.resolve().parents[1] / "blobs"] if root.resolve().parent.name == "snapshots" else []
    if not any((root / subset).is_dir() for subset in SUBSETS):
        parents = [path for path in root.iterdir() if path.is_dir() and any((path / s).is_dir() for s in SUBSETS)]
        if len(parents) != 1:
            raise ValueError(f"`{name}` holds none of the folders {SUBSETS}: give the folder of Monet-SFT-125K.")
        root = parents[0]
    folders, report, rows = [root.resolve(), *blobs], ReadingReport(), []
    for subset in subsets:
        records = _records(root / subset)
        for number, record in enumerate(records[:max_rows]):
            row_id = f"{subset}/{_sample_id(record, number)}"
            row, reason = _read_record(record, root, folders, subset, answer)
            if row is None:
                report.drop(reason, row_id)
            else:
                report.kept[subset] += 1
                rows.append({**row, "source": subset, "row_id": row_id})
    if not rows:
        raise ValueError(f"`{name}` has no row that can be trained on: {report}")
    return Dataset.from_list(rows, features=FEATURES), report


def _records(folder):
    for path in (folder / "train.json", folder / "train.jsonl"):
        if path.exists():
            text = path.read_text(encoding="utf-8")
            try:
                if path.suffix == ".jsonl":
                    return [json.loads(line) for line in text.split("\n") if line.strip()]
                records = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"`{path}` is no JSON ({error}): download it again.") from error
            if not isinstance(records, list):
                raise ValueError(f"`{path}` holds a {type(records).__name__}: it must be a list of records.")
            return records
    raise ValueError(
        f"`{folder.name}` has no `train.json` or `train.jsonl` in it: download the subset, or leave it out."
    )


def _sample_id(record, number):
    match record:
        case {"metadata": {"sample_id": sample_id}}:
            return sample_id
    return f"record {number}"


def _turns(record):
    """The parts of each role's turn, or `None` where a record has another shape than Monet's."""
    match record:
        case {"data": [*data]}:
            turns = {}
        case _:
            return None
    for turn in data:
        match turn:
            case {"role": str(role), "content": [*parts]} if role not in turns and all(map(_is_part, parts)):
                turns[role] = parts
            case _:
                return None
    return turns


def _is_part(part):
    match part:
        case {"type": "text", "text": str()} | {"type": "image", "image": str()}:
            return True
    return False


def _read_record(record, root, folders, subset, answer):
    turns = _turns(record)
    if turns is None:
        return None, "not one turn each of system, user and assistant, made of texts and images"
    if not {"user", "assistant"} <= set(turns):
        return None, "no user or no assistant turn"
    images, content = [], []
    for part in turns["user"]:
        if part["type"] == "image":
            path = root / part["image"]
            if "\0" in part["image"] or not any(path.resolve().is_relative_to(folder) for folder in folders):
                return None, "an image outside the data folder"
            if not path.is_file():
                return None, "an image file that is missing"
            images.append(str(path))
            content.append({"type": "image", "text": None})
        else:
            text = part["text"] if subset in KEEPS_SUFFIX else part["text"].replace(BOXED_SUFFIX, "")
            content.append({"type": "text", "text": text})
    if not images:
        return None, "no image in the question"
    reply = "".join(part["text"] for part in turns["assistant"] if part["type"] == "text")
    boxed = boxed_text(reply)
    text = boxed if answer == "answer" else re.sub(r"[ \t]{2,}", " ", MARKERS.sub("", reply)).strip()
    if not text:
        return None, "no boxed answer" if answer == "answer" else "no text in the reply"
    system = {"role": "system", "content": [{"type": "text", "text": SYSTEM_PROMPT}]}
    completion = [{"role": "assistant", "content": [{"type": "text", "text": text}]}]
    return {"images": images, "prompt": [system, {"role": "user", "content": content}], "completion": completion}, None


def boxed_text(text):
    """The content of the last `\\boxed{...}`, braces inside it balanced, or `None`."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end].strip() or None
    return None
