"""Writes a mixture of datasets as parquet shards with their images inline, a report to look at first, and a dataset card.

    python recipes/prepare_data.py --mixture recipes/mixtures/paper.yaml --output_dir data/paper --num_proc 8

Started again after it was cut short, it goes on where it stopped. `--push_to_hub user/name` pushes the result, and a recipe
trains on it:

    accelerate launch recipes/sft_amvl.py --config recipes/configs/smolvlm_2b_single_gpu.yaml --dataset_format prepared --dataset_name data/paper
"""

from dataclasses import dataclass, field

from transformers import HfArgumentParser

from trainer.bars import quiet_libraries
from trainer.data.mixture import Mixture
from trainer.data.prepare import make_repository, prepare, push


@dataclass
class PrepareArguments:
    """What is written where."""

    mixture: str = field(
        metadata={"help": "YAML file: sources, weights, filters, evaluation; see `trainer.data.mixture.Mixture`."}
    )
    output_dir: str = field(metadata={"help": "A new folder, or that of the same mixture, cut short."})
    num_proc: int = field(default=1, metadata={"help": "Processes that read."})
    push_to_hub: str | None = field(default=None, metadata={"help": "Dataset repository to push to, `user/name`."})
    private: bool = field(default=False, metadata={"help": "Make a new repository private."})


def main(arguments):
    mixture = Mixture.from_yaml(arguments.mixture)
    if arguments.push_to_hub:
        make_repository(arguments.push_to_hub, arguments.private)
    reports = prepare(mixture, arguments.output_dir, arguments.num_proc, arguments.push_to_hub)
    for split, report in reports.items():
        print(f"{split}: {report}")
    print(f"Look at {arguments.output_dir}/report.html before you train.")
    if arguments.push_to_hub:
        print(f"Pushed to {push(arguments.output_dir, arguments.push_to_hub, arguments.private)}")


if __name__ == "__main__":
    quiet_libraries()
    main(*HfArgumentParser(PrepareArguments).parse_args_into_dataclasses())
