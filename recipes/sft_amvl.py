"""Trains an AMVL model.

The embedded default, offline, on one CPU or GPU, in minutes:

    accelerate launch recipes/sft_amvl.py

The real thing, every field overridable on the command line:

    accelerate launch recipes/sft_amvl.py --config recipes/configs/smolvlm_2b_single_gpu.yaml --learning_rate 5e-5
"""

import sys
from dataclasses import dataclass, field, fields

from datasets import load_dataset, load_from_disk
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from modeling_amvl import AMVLForConditionalGeneration, AMVLProcessor
from trainer import AMVLSFTConfig, AMVLSFTTrainer
from trainer.data.monet import SUBSETS, read_monet
from trainer.sft_trainer import model_type_of


@dataclass
class AMVLScriptArguments(ScriptArguments):
    """What is trained on what: the data, the latents, the image budget."""

    dataset_format: str = field(
        default="trl",
        metadata={
            "help": "`trl`: a dataset with `images`, `prompt`, `completion`; `monet`: Monet-SFT-125K. Hub id or local path."
        },
    )
    dataset_answer: str = field(
        default="answer",
        metadata={"help": "With `monet`: train on the `answer` alone or on `rationale` and answer."},
    )
    dataset_subsets: list[str] | None = field(
        default=None, metadata={"help": "With `monet`: the subsets to read, all by default."}
    )
    # By default a new AMVL model gets the defaults of AMVLConfig, and a trained one keeps what it has.
    num_latents: int | None = field(default=None, metadata={"help": "Number of latent slots: 8, or as trained."})
    latent_size: int | None = field(default=None, metadata={"help": "Size of a latent slot: 512, or as trained."})
    latent_temperature: float | None = field(default=None, metadata={"help": "Default temperature of `generate`."})
    multipass: str | None = field(default=None, metadata={"help": "`auto`, `shared` or `full`, see AMVLConfig."})
    min_pixels: int | None = field(
        default=None, metadata={"help": "Fewest pixels of an image, where the processor has it."}
    )
    max_pixels: int | None = field(
        default=None, metadata={"help": "Most pixels of an image, where the processor has it."}
    )
    merge_lora: bool = field(
        default=True,
        metadata={
            "help": "With LoRA: also save the merged model, which loads without peft, into `output_dir`/merged."
        },
    )


def load_rows(arguments):
    """Training rows, and evaluation rows or `None`."""
    if arguments.dataset_format == "monet":
        dataset, report = read_monet(
            arguments.dataset_name, tuple(arguments.dataset_subsets or SUBSETS), arguments.dataset_answer
        )
        print(f"{arguments.dataset_name}: {report}")
        return dataset, None
    if arguments.dataset_format != "trl":
        raise ValueError(f"`dataset_format` must be 'trl' or 'monet', got {arguments.dataset_format!r}.")
    try:
        splits = load_from_disk(arguments.dataset_name)
    except FileNotFoundError:
        splits = load_dataset(arguments.dataset_name, arguments.dataset_config, streaming=arguments.dataset_streaming)
    if not isinstance(splits, dict):  # one dataset, saved without splits
        splits = {arguments.dataset_train_split: splits}
    if arguments.dataset_train_split not in splits:
        raise ValueError(
            f"`dataset_train_split` is {arguments.dataset_train_split!r}, but `{arguments.dataset_name}` has {list(splits)}."
        )
    evaluation = splits.get(arguments.dataset_test_split)
    return splits[arguments.dataset_train_split], evaluation


def load_model(arguments, model_config):
    """The AMVL model and its processor: a trained one, or a stock one wrapped."""
    name, revision = model_config.model_name_or_path, model_config.model_revision
    pixels = {
        key: getattr(arguments, key) for key in ("min_pixels", "max_pixels") if getattr(arguments, key) is not None
    }
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
        processor = AMVLProcessor.from_pretrained(name, revision=revision, **pixels)
        model = AMVLForConditionalGeneration.from_pretrained(name, **settings)
        for key, value in latents.items():
            if key in ("num_latents", "latent_size") and value != getattr(model.config, key):
                raise ValueError(
                    f"`{key}` is {value}, but `{name}` was trained with {getattr(model.config, key)}: leave it out."
                )
            setattr(model.config, key, value)
        return model, processor
    processor = AMVLProcessor.from_backbone(name, revision=revision, **pixels)
    model = AMVLForConditionalGeneration.from_backbone(
        name, latent_token_id=processor.latent_token_id, **latents, **settings
    )
    return model, processor


def main(arguments, training_args, model_config):
    if model_config.model_name_or_path is None or arguments.dataset_name is None:
        raise ValueError(
            "`model_name_or_path` and `dataset_name` are needed, in the YAML file or on the command line; without any "
            "argument the embedded default runs."
        )
    train_dataset, eval_dataset = load_rows(arguments)
    model, processor = load_model(arguments, model_config)
    trainer = AMVLSFTTrainer(
        model,
        training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset if training_args.eval_strategy != "no" else None,
        processing_class=processor,
        peft_config=get_peft_config(model_config),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    if model_config.use_peft and arguments.merge_lora and trainer.is_world_process_zero():
        merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
        merged.save_pretrained(f"{training_args.output_dir}/merged")
        processor.save_pretrained(f"{training_args.output_dir}/merged")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=arguments.dataset_name)


if __name__ == "__main__":
    from trainer.demo import DemoArguments, run_demo

    given = {word.split("=")[0] for word in sys.argv[1:] if word.startswith("--")}
    if given <= {f"--{setting.name}" for setting in fields(DemoArguments)}:
        run_demo(*TrlParser((DemoArguments,)).parse_args_and_config())
    else:
        main(*TrlParser((AMVLScriptArguments, AMVLSFTConfig, ModelConfig)).parse_args_and_config())
