"""Writes the card of a saved checkpoint anew: from the training's facts beside it, and from what was measured on its weights.

    python recipes/write_card.py amvl-demo --results results/puzzles/results.json --license apache-2.0
    python recipes/write_card.py my/checkpoint --results results/blink/results.json results/vstar/results.json --push_to_hub you/x

Results come from recipes/evaluate_amvl.py and a diagnosis from recipes/diagnose_amvl.py; either is shown only if it was measured on the
very weights of the folder. What you write into the card between the two lines `own words` stays.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from model_cards import write_card
from trainer.hub import make_repository, push_folder


@dataclass
class CardArguments:
    """Whose card, and what it shows."""

    checkpoint: str = field(metadata={"help": "Folder of a saved checkpoint. May stand first, unnamed."})
    results: list[str] = field(
        default_factory=list,
        metadata={"help": "Each a `results.json` of recipes/evaluate_amvl.py in which a model is this checkpoint."},
    )
    diagnosis: str | None = field(
        default=None,
        metadata={
            "help": "A `diagnosis.json` of recipes/diagnose_amvl.py; by default that of the folder, if there is one."
        },
    )
    license: str | None = field(
        default=None,
        metadata={
            "help": "Licence of the weights as the Hub calls it, `apache-2.0` say; as before, or none, by default."
        },
    )
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Where it is or will be found, `you/x`, for the lines that load it."}
    )
    push_to_hub: str | None = field(default=None, metadata={"help": "Push the folder to this repository, `you/x`."})

    def __post_init__(self):
        if self.push_to_hub is not None and self.hub_model_id not in (None, self.push_to_hub):
            raise ValueError(
                f"`push_to_hub` is {self.push_to_hub!r} and `hub_model_id` {self.hub_model_id!r}: give one of them."
            )


def main(arguments):
    repository = arguments.push_to_hub and make_repository(arguments.push_to_hub)  # before anything is written
    card = write_card(
        arguments.checkpoint,
        arguments.results,
        arguments.diagnosis,
        arguments.license,
        repository or arguments.hub_model_id,
    )
    print(f"Written: {card}")
    if repository:
        print(
            f"Pushed: {push_folder(Path(arguments.checkpoint), repository, commit_message='Write the card').commit_url}"
        )
    return card


def with_name(words):
    """The command line with the name before the first word, which may stand without."""
    return ["--checkpoint", *words] if words and not words[0].startswith("-") else words


if __name__ == "__main__":
    main(*HfArgumentParser(CardArguments).parse_args_into_dataclasses(with_name(sys.argv[1:])))
