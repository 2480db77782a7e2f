"""Reads Visual-CoT: questions with the box to look at, of which x keeps the whole image and the question alone."""

import re
from pathlib import Path

from .files import SourceFiles
from .llava import turns_of
from .reader import Draft, Reader
from .rows import IMAGE, BadRow, brief, is_blank, message, with_images


FILE = "viscot_363k.json"
# "Please provide the bounding box coordinate of the region that can help you answer the question better."
BOX_REQUEST = re.compile(
    r"(?:\b(?:first|then|also|next)\s*,?\s+)?(?:\bplease\s+|\b(?:can|could|would) you (?:please )?|(?:^|(?<=[.?!])\s|\n))"
    r"(?:provide|give|output|return|predict|specify|locate|find|draw|mark|identify|report)\s+"
    r"(?:me\s+|us\s+)?(?:with\s+)?(?:the\s+|a\s+)?bounding box(?:es)?\b(?:[^.?!\n]|\.(?=\d))*[.?!]?",
    re.IGNORECASE,
)


class VisualCoTReader(Reader):
    """
    Visual-CoT, `name` being its Hub id, folder or JSON file; `config` another file than `viscot_363k.json`.

    A record has two images, the second of them the first one's region named after `###`, and four turns: question, box, region,
    answer. x is the first image and the question without the sentence that asks for a box. y is the last turn, or with
    `answer="rationale"` the box and the answer, a line each.

    The Hub has the images as one archive in parts, `cot_images_tar_split`: unpack it and give its folder as `image_root`.
    """

    format = "visual_cot"
    json_first = True
    hub_id = "deepcs233/Visual-CoT"
    default_licence = "apache-2.0"
    missing_images_hint = (
        "Visual-CoT's images are an archive in parts: `cat cot_images_tar_split/* | tar -x -C FOLDER`, and give "
        "`image_root=FOLDER`."
    )

    def open_files(self):
        # One by one also where all are wanted: the whole repository has its archive in it, too.
        files = SourceFiles(self.name, self.image_root, self.revision, lazy=True)
        if self.configs is None and not Path(self.name).is_file() and FILE in files.glob("*.json"):
            self.configs = [FILE]
        return files

    def convert(self, record, subset):
        match record:
            case {"image": [str(path), *_]} | {"image": str(path)}:
                pass
            case _:
                raise BadRow("an image that is no path", brief(record.get("image")))
        turns = turns_of(record)
        if len(turns) != 4:
            raise BadRow("not four turns", f"{len(turns)} turns")
        (_, question), (_, box), _, (_, answer) = turns
        parts = [
            IMAGE if part["type"] == "image" else BOX_REQUEST.sub("", part["text"]).strip()
            for part in with_images(question, "<image>", 1)
        ]
        if self.answer == "rationale" and isinstance(answer, str) and not is_blank(answer):
            if not isinstance(box, str) or is_blank(box):
                raise BadRow("no rationale")
            answer = f"{box.strip()}\n{answer}"
        return Draft([path.split("###")[0]], [message("user", *filter(None, parts))], answer)
