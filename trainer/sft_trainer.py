"""TRL's SFTTrainer with the AMVL objective: the latents in the step, the train-inference gap on the screen."""

import logging
import re
from collections import defaultdict
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedConfig, set_seed
from trl import SFTTrainer

from model_cards import render_card
from model_cards.own_words import kept_words
from modeling_amvl import AMVLForConditionalGeneration, AMVLProcessor
from modeling_amvl.adapters_amvl import save_beside_adapter

from .adapters import LATENT_MODULES, check_adapter, prepare_peft_config, settle_adapter
from .bars import bar
from .checkpoints import CheckpointMixin
from .collator import AMVLDataCollator
from .console import show_progress
from .data.stream_batches import undecoded
from .describing import training_facts
from .faults import FaultsMixin
from .finite import FiniteMixin
from .hub import HubMixin
from .loading import LoadingMixin, check_loading
from .noise import row_noise
from .objective import amvl_loss
from .progress import ProgressMixin
from .recording import RecordingMixin
from .schedules import kl_weights
from .selftest import self_test
from .sft_config import AMVLSFTConfig
from .sharded_saving import ShardedSavingMixin, without_copies
from .staged_backward import StagedBackwardMixin
from .summary import SummaryMixin, keeps_warnings


logger = logging.getLogger(__name__)


class AMVLSFTTrainer(
    SummaryMixin,
    RecordingMixin,
    FiniteMixin,
    FaultsMixin,
    ProgressMixin,
    CheckpointMixin,
    StagedBackwardMixin,
    ShardedSavingMixin,
    HubMixin,
    LoadingMixin,
    SFTTrainer,
):
    """
    Trains prior, posterior and decoder together: NTP + beta * KL(sg[q] || p) + gamma * KL(sg[p] || q).

    Args:
        model ([`AMVLForConditionalGeneration`], `PeftModel` over one, or `str`): a string is a checkpoint of this class, or a
            stock model to wrap with the default number and size of latents.
        args ([`AMVLSFTConfig`], *optional*): settings.
        data_collator (`Callable`, *optional*): by default [`AMVLDataCollator`].
        train_dataset (`Dataset` or `IterableDataset`): rows as [`AMVLDataCollator`] takes them.
        eval_dataset (`Dataset` or `IterableDataset`, *optional*): rows of the same form; a `dict` of them is evaluated one by one.
        processing_class (`ProcessorMixin`, *optional*): an [`AMVLProcessor`] or a stock processor to make one of.
        peft_config (`PeftConfig`, *optional*): adapts the language model; heads and projection are trained and saved whole.
        **kwargs: `callbacks`, `optimizers`, `compute_metrics` and others of [`~trl.SFTTrainer`].

    Logged at each step: `ntp` in nats per token, `forward_kl` and `reverse_kl` in nats per slot, `beta`, `gamma`,
    `prior_std`, `posterior_std`, `active_units` and `latent_norm_ratio` (norm of an injected latent over that of a token
    embedding at the start). Logged at evaluation, decoded with latents from `posterior`, from `prior` and with `no_latents`: `nll_*` in
    nats per token, `accuracy_*` (rows whose every token comes first) and `token_accuracy_*`.

    Raises:
        ValueError: a row, a model or a setting under which the latents could not be trained; before training starts.
    """

    _tag_names = ["trl", "sft", "amvl"]
    _name = "AMVL"
    # Both terms are divided by the tokens and rows of the whole step, accumulation and devices included.
    loss_is_scaled_for_ga = True

    @keeps_warnings
    def __init__(
        self,
        model,
        args=None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        peft_config=None,
        **kwargs,
    ):
        if args is None:
            args = AMVLSFTConfig("amvl-sft")
        elif not isinstance(args, AMVLSFTConfig):
            raise TypeError(
                f"`args` must be an `AMVLSFTConfig`, got `{type(args).__name__}`: it has the KL terms' weights."
            )
        for name in ("compute_loss_func", "formatting_func"):
            if kwargs.get(name) is not None:
                raise ValueError(f"`{name}` would bypass the latents: leave it out.")
        if kwargs.get("quantization_config") is not None:
            raise ValueError(
                "`quantization_config` is not passed on: put it into `model_init_kwargs` of the `AMVLSFTConfig`, or load "
                "the model with it."
            )
        check_loading(args, train_dataset)
        if isinstance(train_dataset, IterableDataset):
            train_dataset = undecoded(train_dataset)  # TRL looks at a row
        processing_class = self._amvl_processor(model, processing_class)
        if data_collator is None:
            data_collator = AMVLDataCollator(
                processing_class, args.max_length, args.max_completion_length, args.allow_text_only_rows
            )
        if args.check_dataset and isinstance(data_collator, AMVLDataCollator):
            named = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
            # Rows of a kind that is skipped later must not stop the run now.
            named = named if args.on_bad_row == "skip" else {"train_dataset": train_dataset, **named}
            for name, dataset in named.items():
                if isinstance(dataset, Dataset):
                    check_dataset(dataset, data_collator, name)
        # Rows are rendered in the collator: without it, TRL would tokenise a dataset without a column of images.
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        if isinstance(model, str):
            model = self._load(model, args, processing_class)
            args.model_init_kwargs = None
        self._check_model(model, peft_config)
        if peft_config is not None:
            peft_config = prepare_peft_config(peft_config, amvl_model(model))
        if args.freeze_vision:
            self._freeze_vision(model, peft_config)
        embedding_norm = amvl_model(model).typical_embedding_norm()
        rows = train_dataset
        if isinstance(
            rows, Dataset
        ):  # TRL looks at a row for its columns: the first may be one that cannot be decoded
            train_dataset = Dataset.from_list([dict.fromkeys(rows.column_names)])
        try:
            super().__init__(
                model=model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                peft_config=peft_config,
                **kwargs,
            )
        except StopIteration:
            raise ValueError(
                "`train_dataset` is a stream without rows: look at how it is filtered, and at its files."
            ) from None
        self.train_dataset = rows
        show_progress(self)
        if isinstance(self.model, PeftModel):
            self._settle_adapter()
        # SFTTrainer computes its loss in a forward of its own, patched in here: it knows nothing of latents.
        vars(amvl_model(self.model)).pop("forward", None)
        # TRL sets this for LoRA under ZeRO-3, for releases of DeepSpeed before 0.19.8; it would recompute layers without the
        # prompt's cache.
        if (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            args.gradient_checkpointing_kwargs["use_reentrant"] = False
        self._totals = {"train": defaultdict(lambda: [0.0, 0.0]), "eval": defaultdict(lambda: [0.0, 0.0])}
        self._num_rows_in_batch = None
        self._first_rows = []  # of each batch of this process to come, its place among the rows of the step
        self._embedding_norm = embedding_norm
        self._last_evaluation = {}
        self._self_tested = set()

    # -----------------------------------------------------------------------------------------------------------------
    # Before training
    # -----------------------------------------------------------------------------------------------------------------

    @staticmethod
    def _amvl_processor(model, processing_class):
        if processing_class is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            if not name:
                raise ValueError(
                    "`processing_class` is needed: the model was not loaded from a place that has a processor."
                )
            is_amvl = model_type_of(name) == "amvl"
            return AMVLProcessor.from_pretrained(name) if is_amvl else AMVLProcessor.from_backbone(name)
        if hasattr(processing_class, "latent_token_id"):  # an AMVLProcessor, of this package or of remote code
            return processing_class
        return AMVLProcessor.from_backbone(processing_class)

    @staticmethod
    def _load(name, args, processor):
        set_seed(args.seed)  # the heads' first weights, the same on every process
        settings = {"dtype": "auto", **(args.model_init_kwargs or {})}
        if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
            settings["device_map"] = None
        if model_type_of(name) == "amvl":
            return AMVLForConditionalGeneration.from_pretrained(name, **settings)
        return AMVLForConditionalGeneration.from_backbone(
            name,
            latent_token_id=processor.latent_token_id,
            initial_token_id=processor.answer_start_id,
            **settings,
        )

    @staticmethod
    def _check_model(model, peft_config):
        inner = amvl_model(model)
        if getattr(inner.config, "model_type", None) != "amvl":
            raise ValueError(
                f"`model` is a `{type(inner).__name__}` without latents: wrap it with "
                "`AMVLForConditionalGeneration.from_backbone`."
            )
        if isinstance(model, PeftModel):
            check_adapter(model)
        elif hasattr(model, "peft_config"):
            raise ValueError(
                "`model` was loaded with an adapter on it, which is frozen: to train that on, pass "
                "`PeftModel.from_pretrained(base, adapter, is_trainable=True)`; to train another, merge it first."
            )
        elif peft_config is None:
            for name in LATENT_MODULES:
                if not any(parameter.requires_grad for parameter in getattr(inner, name).parameters()):
                    raise ValueError(
                        f"`{name}` is frozen, so the latents would not be trained: unfreeze it, or pass a `peft_config`."
                    )
            language = inner.backbone.get_decoder()
            if language is not None and not any(parameter.requires_grad for parameter in language.parameters()):
                logger.warning(
                    "The language model is frozen, as an adapter leaves it that was merged: heads and projection are trained alone. "
                    "To train it, call `model.requires_grad_(True)` first, or pass a `peft_config`."
                )

    def _settle_adapter(self):
        plugin = self.args.deepspeed_plugin
        # Under ZeRO-3 all parameters are of one type.
        settle_adapter(self.model, upcast=plugin is None or plugin.zero_stage != 3)
        backbone = amvl_model(self.model).backbone
        if self.args.freeze_vision:
            encoder = backbone.get_encoder(modality="image")
            trained = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
            if trained:
                raise ValueError(
                    f"`freeze_vision=True`, but the adapter trains {trained[:3]} of the vision encoder: set `bias='none'`, take it "
                    "out of `modules_to_save`, or set `freeze_vision=False`."
                )

    @staticmethod
    def _freeze_vision(model, peft_config):
        backbone = amvl_model(model).backbone
        encoder = backbone.get_encoder(modality="image")
        if encoder is backbone or encoder is backbone.base_model:
            raise ValueError(
                f"`freeze_vision=True`, but `{type(backbone).__name__}` has no vision encoder of its own to freeze: set "
                "`freeze_vision=False`."
            )
        encoder.requires_grad_(False)
        if peft_config is not None and hasattr(peft_config, "exclude_modules"):
            name = next(name for name, module in backbone.named_modules() if module is encoder)
            excluded = rf".*\b{re.escape(name)}\..*"
            given = peft_config.exclude_modules
            if isinstance(given, str):
                excluded = rf"{given}|{excluded}"
            elif given:
                excluded = rf"(.*\.)?({'|'.join(map(re.escape, given))})|{excluded}"
            peft_config.exclude_modules = excluded

    # -----------------------------------------------------------------------------------------------------------------
    # A step
    # -----------------------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples, device):
        if not batch_samples:
            return None
        if any("completion_mask" not in batch for batch in batch_samples):
            raise ValueError(
                f"`data_collator` must return `completion_ids` and `completion_mask`, got {sorted(batch_samples[0])}: use "
                "`AMVLDataCollator`."
            )
        masks = [batch["completion_mask"] for batch in batch_samples]
        # Of each batch of this process, its tokens and rows; batches of a step are dealt out to the processes in turn.
        counts = torch.tensor([[[int(mask.sum()), len(mask)] for mask in masks]], device=device)
        if self.args.world_size > 1:
            everywhere = self.accelerator.gather(counts)  # processes, batches, 2
        else:
            everywhere = counts
        num_rows = everywhere[..., 1].T.flatten()
        self._num_rows_taken += int(num_rows.sum())
        first_rows = (num_rows.cumsum(0) - num_rows)[self.args.process_index :: self.args.world_size]
        self._first_rows = first_rows.tolist()
        if self.args.average_tokens_across_devices:
            counts = everywhere
        num_tokens, self._num_rows_in_batch = counts.sum((0, 1))
        self._num_rows_in_batch = self._num_rows_in_batch.item()
        return num_tokens

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        training = self.model.training
        args = self.args
        if args.self_test and training not in self._self_tested:
            self._self_tested.add(training)
            self._self_test(inputs)
        config = amvl_model(self.model).config
        if training:
            sampling = {"noise": self._noise(len(inputs["input_ids"]), config)}
        else:
            sampling = {"latent_temperature": config.latent_temperature}
        outputs = self._forward(
            model,
            **inputs,
            decode_prior=not training or args.prior_ntp_weight > 0,
            decode_no_latents=not training,
            num_items_in_batch=num_items_in_batch,
            **sampling,
        )
        prior = outputs["prior_mean"], outputs["prior_log_variance"]
        posterior = outputs["posterior_mean"], outputs["posterior_log_variance"]
        num_steps = max(self.state.max_steps, 1)
        beta, gamma = kl_weights(
            self.state.global_step,
            num_steps,
            args.beta,
            args.gamma,
            args.kl_order,
            args.kl_warmup_steps,
            args.kl_delay_steps,
        )
        loss, terms = amvl_loss(
            outputs["loss"],
            prior,
            posterior,
            beta,
            gamma,
            ntp_weight=args.ntp_weight,
            prior_ntp=outputs["prior_loss"] if args.prior_ntp_weight > 0 else None,
            prior_ntp_weight=args.prior_ntp_weight,
            reduction=args.kl_reduction,
            num_rows=None if num_items_in_batch is None else self._num_rows_in_batch,
        )
        if num_items_in_batch is not None and args.average_tokens_across_devices:
            # The counts are of all devices, and gradients get averaged.
            terms = {name: term * self.accelerator.num_processes for name, term in terms.items()}
            loss = sum(terms.values())
        self._record(outputs, inputs, num_items_in_batch, prior, posterior, beta, gamma)
        if outputs.get("cuts") is not None:
            loss = loss.detach() + self._run_stages(terms, outputs["cuts"])
        return (loss, outputs) if return_outputs else loss

    def _noise(self, num_rows, config):
        """Of the next batch of this process."""
        first_row = self._first_rows.pop(0) if self._first_rows else 0
        return row_noise(
            self.args.seed, self.state.global_step, first_row, num_rows, config.num_latents, config.latent_size
        )

    def _self_test(self, inputs):
        """Before the first step and the first evaluation: is the plan in use exact on this backbone and machine?"""
        model = amvl_model(self.model)
        name = f"`{type(model.backbone).__name__}`"
        asked, args = model.config.multipass, self.args
        unchecked = full_failed = failed = ""
        try:
            report = self_test(model, inputs, self.model, shows_progress=not args.disable_tqdm)
            full_failed, failed = "; ".join(report.full_failed), "; ".join(report.failed)
        except Exception as error:  # a batch that is not finite, or memory for the full plan that the run may not need
            unchecked = f"{type(error).__name__}: {error}"
        if self.args.world_size > 1:  # every process has to take the same plan
            found = [None] * self.args.world_size
            torch.distributed.all_gather_object(found, (unchecked, full_failed, failed))
            unchecked, full_failed, failed = ("; ".join(filter(None, messages)) for messages in zip(*found))
        if unchecked:
            logger.warning(
                "The self-test could not compare the plan in use with three full forwards, so that it goes on unchecked: %s If memory "
                "ran out, try a smaller `per_device_train_batch_size`, or set `self_test=False`.",
                f"{unchecked.removesuffix('.')}.",
            )
            return
        if full_failed:
            raise ValueError(
                f"{name} cannot be trained as it is set up here: {full_failed}. Set another `attn_implementation`, `sdpa` "
                "say; `self_test=False` trains all the same."
            )
        if not failed:
            self.accelerator.print(f"Self-test passed in {report.seconds:.1f} s: {report}.")
        elif asked == "shared":
            raise ValueError(
                f"The shared plan does not give what three full forwards give on {name}: {failed}. Set `multipass='full'` "
                "(or `'auto'`) in the model's config."
            )
        elif asked == "auto" and model.auto_plan == "shared":
            model.auto_plan = "full"
            logger.warning(
                "The shared plan does not give what three full forwards give on %s: %s. Training goes on with the full "
                "plan, at about three times the price of plain SFT. `generate` reads the prompt as the shared plan does: "
                "compare its answers with `log_prob`.",
                name,
                failed,
            )

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if self.is_in_train:
            self._go_on_together()  # a signal does not wait for the end of the evaluation
        inputs = dict(self._prepare_inputs(inputs))
        self._own_rows_of_stream = inputs.pop("num_own_rows", None)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        labels = inputs["completion_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        return loss.detach(), outputs["prior_logits"].detach(), labels

    # -----------------------------------------------------------------------------------------------------------------
    # What is left behind
    # -----------------------------------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self):
        self._signature_columns = ["messages", "prompt", "completion", "image", "images"]

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, without_copies(state_dict, self.model) if state_dict else state_dict)
        if self.args.should_save:
            folder = self.args.output_dir if output_dir is None else output_dir
            if isinstance(self.model, PeftModel):
                save_beside_adapter(amvl_model(self.model), folder)
            self._write_card(folder)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None, merged_dir=None):
        """
        Writes the model card into the output folder, on the main process; into `merged_dir` that of an adapter's model merged with
        its base.
        """
        if self.is_world_process_zero():
            self._write_card(merged_dir or self.args.output_dir, model_name, dataset_name, merged_dir is not None)

    def _write_card(self, folder, model_name=None, dataset_name=None, is_merged=False):
        """The card, and what it is made of as `amvl_training.json`, from which recipes/write_card.py makes it again."""
        facts = training_facts(
            self,
            amvl_model(self.model),
            model_name or Path(self.args.output_dir).absolute().name,
            self._last_evaluation,
            self._step_of_weights(),
            [dataset_name] if isinstance(dataset_name, str) else dataset_name or [],
            is_merged,
        )
        facts.save(folder)
        cards = (Path(place) / "README.md" for place in (folder, self.args.output_dir))
        words = next(filter(None, map(kept_words, cards)), "")
        render_card(facts, own_words=words).save(Path(folder) / "README.md")


def model_type_of(name, **kwargs):
    """The `model_type` in the config.json of a Hub id or a folder, read without running any of its code."""
    return PreTrainedConfig.get_config_dict(name, **kwargs)[0].get("model_type")


def amvl_model(model):
    """The [`AMVLForConditionalGeneration`] inside a `PeftModel`, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def check_dataset(dataset, collator, name):
    """
    Looks at every row of a dataset without decoding its images.

    Args:
        dataset (`datasets.Dataset`): rows as the collator takes them.
        collator ([`AMVLDataCollator`]): whose limits apply.
        name (`str`): how an error calls the dataset.

    Raises:
        ValueError: the first row that cannot be trained on.
    """
    # As Arrow stores them: images stay bytes or paths. Casting the column instead would write a copy of the dataset.
    rows = dataset
    if dataset.format["type"] != "custom":
        batches = dataset.with_format("arrow").iter(batch_size=16)
        rows = (row for batch in batches for row in batch.to_pylist())
    for index, row in enumerate(bar(rows, total=len(dataset), desc=f"Checking {name}", leave=False)):
        collator.render(row, f"Row {index} of `{name}`", open_images=False)
