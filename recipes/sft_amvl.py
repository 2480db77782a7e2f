"""Trains an AMVL model.

The embedded default, offline, on one CPU or GPU, in minutes:

    accelerate launch recipes/sft_amvl.py

The real thing, every field overridable on the command line:

    accelerate launch recipes/sft_amvl.py --config recipes/configs/smolvlm_2b_single_gpu.yaml --learning_rate 5e-5

Cut off, it goes on from its last checkpoint with the same command and `--resume_from_checkpoint true`.
"""

import logging
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

from datasets import load_dataset
from transformers import set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from modeling_amvl import AMVLForConditionalGeneration, AMVLProcessor
from trainer import AMVLSFTConfig, AMVLSFTTrainer
from trainer.adapters import merge_adapter
from trainer.bars import quiet_libraries
from trainer.data.files import hub_address, is_hub_id
from trainer.data.mixture import Mixture
from trainer.data.prepare import ON_THE_HUB, report_of
from trainer.data.reader import licence_text
from trainer.data.report_page import save_report
from trainer.data.sources import READERS, open_source
from trainer.hub import push_folder
from trainer.loading import check_loading, check_max_steps
from trainer.resuming import resolve_checkpoint
from trainer.sft_trainer import model_type_of


logger = logging.getLogger(__name__)


@dataclass
class AMVLScriptArguments(ScriptArguments):
    """What is trained on what: the data, the latents, the image budget."""

    dataset_format: str = field(
        default="trl",
        metadata={
            "help": "`trl`, `monet`, `visual_cot`, `refocus`, `zebra_cot`, `llava` or `blink`: a Hub id or local path in that form; "
            "`prepared`: what recipes/prepare_data.py wrote; `mixture`: the YAML file that it takes."
        },
    )
    dataset_answer: str | None = field(
        default=None,
        metadata={
            "help": "Train on the `answer` alone, the default, or on `rationale` and answer, where a source has both."
        },
    )
    dataset_subsets: list[str] | None = field(
        default=None, metadata={"help": "Subsets or configs to read, all by default; of JSON sources, the file."}
    )
    dataset_image_root: str | None = field(
        default=None, metadata={"help": "Folder that the image paths of the rows start from, if not `dataset_name`."}
    )
    bad_rows: str | None = field(
        default=None,
        metadata={"help": "`drop`, the default, `repair` or `raise` for rows that cannot be trained on."},
    )
    # By default a new AMVL model gets the defaults of AMVLConfig, and a trained one keeps what it has.
    num_latents: int | None = field(default=None, metadata={"help": "Number of latent slots: 8, or as trained."})
    latent_size: int | None = field(default=None, metadata={"help": "Size of a latent slot: 512, or as trained."})
    latent_temperature: float | None = field(default=None, metadata={"help": "Default temperature of `generate`."})
    multipass: str | None = field(default=None, metadata={"help": "`auto`, `shared` or `full`, see AMVLConfig."})
    min_pixels: int | None = field(
        default=None, metadata={"help": "Fewest pixels of an image, else as before; an error if nothing bounds them."}
    )
    max_pixels: int | None = field(
        default=None, metadata={"help": "Most pixels of an image, else as before; an error if nothing bounds them."}
    )
    merge_lora: bool = field(
        default=True,
        metadata={
            "help": "With LoRA: also save the merged model, which loads without peft, into `output_dir`/merged, and push that one. "
            "`false` pushes the adapter alone, which loads on its base."
        },
    )


FORMATS = (*READERS, "prepared", "mixture")
OF_THE_MIXTURE = ("dataset_answer", "dataset_subsets", "dataset_config", "dataset_image_root", "bad_rows")
SHUFFLE_BUFFER = 256  # rows of a stream that are held to draw from


def load_rows(arguments, processor, with_evaluation=True, seed=0):
    """
    The rows of a run.

    Args:
        arguments ([`AMVLScriptArguments`]): which.
        processor ([`AMVLProcessor`]): rows that it cannot take are dropped.
        with_evaluation (`bool`, defaults to `True`): read the evaluation split, too.
        seed (`int`, defaults to 0): of the order of a stream.

    Returns:
        `tuple[Dataset, Dataset | None, dict[str, DataReport]]`: training rows, evaluation rows, and the report of each split that
        was read here.

    Raises:
        ValueError: a setting that cannot be used, a split that there is not, no row to train on.
    """
    name, streaming, form = arguments.dataset_name, arguments.dataset_streaming, arguments.dataset_format
    splits = {"train": arguments.dataset_train_split, "test": arguments.dataset_test_split}
    if form in ("prepared", "mixture"):
        given = [key for key in OF_THE_MIXTURE if getattr(arguments, key) is not None]
        if given:
            raise ValueError(f"{given} are settled by the mixture `{name}` and would change nothing: leave them out.")
    if form == "mixture":
        if streaming:
            raise ValueError("`dataset_streaming=True` is not for a mixture: prepare it, and stream what that wrote.")
        if splits != {"train": "train", "test": "test"}:
            raise ValueError(f"`dataset_train_split` and `dataset_test_split` are {splits}: a mixture has its own.")
        mixture = Mixture.from_yaml(name)
        check_splits(splits, ["train", "test"] if mixture.evaluation else ["train"], name, with_evaluation)
        train, test, reports = mixture.read(processor)
    elif form == "prepared":
        rows, reports = load_dataset(name, streaming=streaming), {}
        check_splits(splits, list(rows), name, with_evaluation)
        train, test = rows[splits["train"]], rows.get(splits["test"])
        report = report_of(name)
        train.info.license = licence_text({source: values["licence"] for source, values in report["sources"].items()})
        # Beside what `datasets` notes of the prepared rows themselves.
        train.info.homepage = (
            f"{hub_address(name) if is_hub_id(name) else ''} {report['settings'].get(ON_THE_HUB) or ''}"
        )
    else:
        settings = {
            "config": arguments.dataset_subsets or arguments.dataset_config,
            "answer": arguments.dataset_answer or "answer",
            "bad_rows": arguments.bad_rows or "drop",
            "image_root": arguments.dataset_image_root,
            "streaming": streaming,
            "processor": processor,
        }
        reader, test, test_reader = open_source(form, name, split=splits["train"], **settings), None, None
        check_splits(splits, [*reader.splits(), splits["train"]], name, with_evaluation)
        if with_evaluation:
            test_reader = open_source(form, name, split=splits["test"], **settings)
        train, report = reader.read()
        reports = {"train": report}
        if test_reader is not None:
            test, reports["test"] = test_reader.read()
    train = train.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER) if streaming else train
    return train, test if with_evaluation else None, reports


def check_splits(splits, found, name, with_evaluation):
    """Refuses splits that a dataset does not have, before anything is read."""
    for key, split in list(splits.items())[: 1 + with_evaluation]:
        if split not in found:
            why = (
                " `eval_strategy` asks for an eval_dataset: set it to 'no', or name another." if key == "test" else ""
            )
            raise ValueError(
                f"`dataset_{key}_split` is {split!r}, but `{name}` has {list(dict.fromkeys(found))}.{why}"
            )


def load_processor(arguments, model_config):
    """The processor of a trained AMVL model, or a stock one wrapped, with the image budget asked for."""
    if arguments.dataset_format not in FORMATS:
        raise ValueError(f"`dataset_format` must be one of {FORMATS}, got {arguments.dataset_format!r}.")
    name, revision = model_config.model_name_or_path, model_config.model_revision
    is_amvl = model_type_of(name, revision=revision) == "amvl"
    load = AMVLProcessor.from_pretrained if is_amvl else AMVLProcessor.from_backbone
    budget = {"min_pixels": arguments.min_pixels, "max_pixels": arguments.max_pixels}
    meant = {}
    if arguments.dataset_format == "prepared":
        meant = report_of(arguments.dataset_name)["settings"]
    elif arguments.dataset_format == "mixture":
        meant = vars(Mixture.from_yaml(arguments.dataset_name))
    for key, value in budget.items():
        if value is None:
            budget[key] = meant.get(key)
        elif meant.get(key) not in (None, value):
            logger.warning(
                "`%s` is %d, but `%s` is meant for %d: leave it out.", key, value, arguments.dataset_name, meant[key]
            )
    if arguments.min_pixels is arguments.max_pixels is None and any(budget.values()):
        processor = load(name, revision=revision)
        if "max_pixels" not in processor.image_budget:
            logger.warning(
                "`%s` is meant for an image budget of %s, which `%s` cannot be given: it uses %s.",
                arguments.dataset_name,
                budget,
                name,
                processor.image_budget,
            )
            return processor
    return load(name, revision=revision, **budget)


def load_model(arguments, model_config, processor):
    """The AMVL model: a trained one, or a stock one wrapped."""
    name, revision = model_config.model_name_or_path, model_config.model_revision
    settings = {
        "revision": revision,
        "dtype": model_config.dtype or "auto",
        "attn_implementation": model_config.attn_implementation,
    }
    if (quantization_config := get_quantization_config(model_config)) is not None:
        settings["quantization_config"] = quantization_config
    latents = {
        key: getattr(arguments, key)
        for key in ("num_latents", "latent_size", "latent_temperature", "multipass")
        if getattr(arguments, key) is not None
    }
    if model_type_of(name, revision=revision) == "amvl":
        model = AMVLForConditionalGeneration.from_pretrained(name, **settings)
        for key, value in latents.items():
            if key in ("num_latents", "latent_size") and value != getattr(model.config, key):
                raise ValueError(
                    f"`{key}` is {value}, but `{name}` was trained with {getattr(model.config, key)}: leave it out."
                )
            setattr(model.config, key, value)
        return model
    return AMVLForConditionalGeneration.from_backbone(
        name,
        latent_token_id=processor.latent_token_id,
        initial_token_id=processor.answer_start_id,
        **latents,
        **settings,
    )


def save_reports(reports, report_dir, training_args):
    """Writes and prints what has been read, on the main process."""
    for split, report in reports.items() if training_args.process_index == 0 else ():
        _, page = save_report(report, report_dir / split, f"{Path(training_args.output_dir).name}: {split}")
        print(f"{split}: {report}\nLook at {page} before you train.")


def main(arguments, training_args, model_config):
    if model_config.model_name_or_path is None or arguments.dataset_name is None:
        raise ValueError(
            "`model_name_or_path` and `dataset_name` are needed, in the YAML file or on the command line; without any "
            "argument the embedded default runs."
        )
    checkpoint = resolve_checkpoint(training_args.resume_from_checkpoint, training_args.output_dir)
    if arguments.dataset_streaming:
        check_max_steps(training_args)
    evaluates = training_args.eval_strategy != "no"
    report_dir = Path(training_args.output_dir) / "data_report"
    processor = load_processor(arguments, model_config)
    train_dataset, eval_dataset, reports = load_rows(arguments, processor, evaluates, training_args.seed)
    if not arguments.dataset_streaming:
        save_reports(reports, report_dir, training_args)
    check_loading(training_args, train_dataset)
    set_seed(training_args.seed)  # the heads' first weights, the same on every process
    model = load_model(arguments, model_config, processor)
    trainer = AMVLSFTTrainer(
        model,
        training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset if evaluates else None,
        processing_class=processor,
        peft_config=get_peft_config(model_config),
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    if arguments.dataset_streaming:  # read by now
        save_reports(reports, report_dir, training_args)
    trainer.save_whole_model(training_args.output_dir)  # pushed below, when all is saved
    merges = model_config.use_peft and arguments.merge_lora
    if training_args.push_to_hub and not merges:
        trainer.push_to_hub()
    if merges and trainer.is_world_process_zero():
        folder = Path(training_args.output_dir) / "merged"
        unset_hf_deepspeed_config()  # this process alone loads the base again, as a whole
        merge_adapter(training_args.output_dir, folder, quantization_config=get_quantization_config(model_config))
        trainer.create_model_card(merged_dir=folder)
        if training_args.push_to_hub:
            push_folder(folder, trainer.hub_model_id, training_args.hub_token, training_args.hub_revision)


if __name__ == "__main__":
    quiet_libraries()
    from trainer.demo import DemoArguments, run_demo

    given = {word.split("=")[0] for word in sys.argv[1:] if word.startswith("--")}
    if given <= {f"--{setting.name}" for setting in fields(DemoArguments)}:
        run_demo(*TrlParser((DemoArguments,)).parse_args_and_config())
    else:
        main(*TrlParser((AMVLScriptArguments, AMVLSFTConfig, ModelConfig)).parse_args_and_config())
