"""Settings of AMVL training."""

import json
import logging
import os
from dataclasses import dataclass, field

import torch
from accelerate import PartialState
from transformers.integrations import get_reporting_integration_callbacks
from trl import SFTConfig

from model_cards.metadata import check_license

from .doctor import lock_faults


logger = logging.getLogger(__name__)

# The fields that make up the objective.
OBJECTIVE = (
    "beta",
    "gamma",
    "ntp_weight",
    "prior_ntp_weight",
    "kl_reduction",
    "kl_order",
    "kl_warmup_steps",
    "kl_delay_steps",
)


@dataclass
class AMVLSFTConfig(SFTConfig):
    r"""
    Configuration of the [`AMVLSFTTrainer`]; the number and size of the latents are in the model's config.

    The defaults depart from the paper (arXiv 2607.00461), which decodes from the posterior alone and starts with the forward
    term: what each departure is worth is in recipes/RESULTS.md. Every row of the paper's ablation is a few fields away:

    | objective | fields, with `ntp_weight=1, prior_ntp_weight=0, gamma=0.001` |
    |---|---|
    | NTP only | `beta=0, gamma=0` |
    | forward only | `ntp_weight=0, gamma=0` |
    | reverse only | `ntp_weight=0, beta=0` |
    | NTP + forward | `gamma=0` |
    | NTP + reverse | `beta=0` |
    | NTP + both, reverse first | `kl_order="reverse_first"` |
    | NTP + both, forward first | `kl_order="forward_first"` |

    These parameters have other defaults than in [`~trl.SFTConfig`]: `learning_rate` 1e-5 (what rivals use on the paper's
    data; its own is not stated), `max_length` `None` (1024 can cut image tokens), `router_aux_loss_coef` 0.0.
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "Initial learning rate of AdamW."})
    max_length: int | None = field(
        default=None,
        metadata={"help": "Most tokens of prompt and answer together. Longer rows raise; nothing is ever cut."},
    )
    router_aux_loss_coef: float | None = field(
        default=0.0, metadata={"help": "Must be 0: AMVL adds no load-balancing loss for mixtures of experts."}
    )
    beta: float = field(
        default=0.01,
        metadata={
            "help": "Weight of the forward prior alignment KL(sg[q] || p). Its value is not stated in the paper."
        },
    )
    gamma: float = field(
        default=0.01,
        metadata={
            "help": "Weight of the reverse posterior regularisation KL(sg[p] || q). The paper has it weaker than `beta` and "
            "does not state its value."
        },
    )
    ntp_weight: float = field(
        default=0.1,
        metadata={"help": "Weight of the next-token loss decoded from posterior samples; 1 in the paper."},
    )
    prior_ntp_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of a next-token loss decoded from PRIOR samples, the hybrid objective of Sohn et al. 2015. Not "
            "in the paper; one more short branch."
        },
    )
    kl_reduction: str = field(
        default="mean",
        metadata={
            "help": "`mean` or `sum` of the KL over slots and dimensions. Not stated in the paper. Logs are in nats per slot "
            "either way."
        },
    )
    kl_order: str = field(
        default="together",
        metadata={"help": "`together`, `forward_first` (the paper's) or `reverse_first` (its ablation)."},
    )
    kl_warmup_steps: float = field(
        default=0.1,
        metadata={
            "help": "Steps over which a KL term warms up; a share of the run if below 1. Not stated in the paper."
        },
    )
    kl_delay_steps: float = field(
        default=0.3,
        metadata={"help": "Steps after which the second term begins; a share of the run if below 1. Not stated."},
    )
    freeze_vision: bool = field(default=True, metadata={"help": "Freeze the vision encoder, as in the paper."})
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Most tokens of an answer. Longer rows raise."}
    )
    license: str | None = field(
        default=None,
        metadata={
            "help": "Licence of the weights, for their card, as the Hub calls it: `apache-2.0`, say. The card claims none by default."
        },
    )
    allow_text_only_rows: bool = field(default=False, metadata={"help": "Accept rows without an image."})
    check_dataset: bool = field(
        default=True,
        metadata={
            "help": "Look at every row before training: images readable (headers only), as many placeholders as images, "
            "answers not empty and not too long. Streamed datasets are checked as they come."
        },
    )

    on_bad_row: str = field(
        default="raise",
        metadata={
            "help": "`raise` stops at a training row that cannot be read or collated, and names it; `skip` takes the next "
            "good one, counts and logs; of a stream, each process then tries every row."
        },
    )
    on_nan_loss: str = field(
        default="stop",
        metadata={
            "help": "`stop` saves the last good step and stops where the loss or the gradient is not finite; `skip` drops "
            "that optimiser step."
        },
    )
    on_failed_save: str = field(
        default="stop",
        metadata={
            "help": "`stop` saves the weights alone, if they fit, and stops where a checkpoint cannot be written, on a full "
            "disk say; `continue` tries again at the next save."
        },
    )
    max_skips_in_a_row: int = field(
        default=10, metadata={"help": "Most rows or steps that are skipped one after the other before the run stops."}
    )
    shard_stream: bool = field(
        default=False,
        metadata={
            "help": "Of a streamed dataset, each process reads its own shards: faster, but the order of rows depends on the "
            "number of processes, and a pass ends with the shortest part. By default each reads the whole stream, undecoded."
        },
    )
    self_test: bool = field(
        default=True,
        metadata={
            "help": "On the first batch, compare the shared plan with three full forwards, and fall back to those if they "
            "disagree (`multipass='auto'`) or stop (`'shared'`)."
        },
    )

    training_summary: bool = field(
        default=True,
        metadata={
            "help": "However the run ends, write `training_summary.html` and its curves as `training_summary.png` into `output_dir`."
        },
    )

    def __getstate__(self):
        return {**vars(self), "hub_token": None}  # training_args.bin is a pickle of this, and goes to the Hub

    def __repr__(self):
        return str(self)  # which hides `hub_token`; a dataclass makes one that shows it

    def _uses_fsdp(self):
        return bool(self.fsdp) or os.environ.get("ACCELERATE_USE_FSDP") == "true"

    def _join_cpu_ranks(self):
        """Without an accelerator, accelerate would take each of the processes that it launched for a run of its own."""
        if self._uses_fsdp():
            raise ValueError(
                "FSDP needs accelerators, and this machine has none, so that each process would train a model of its own: take "
                "`recipes/accelerate/ddp.yaml` or `zero3.yaml` here."
            )
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            PartialState(backend="gloo")
            given = self.accelerator_config or {}
            if isinstance(given, str) and given.startswith("{"):
                given = json.loads(given)
            if not isinstance(given, dict):
                raise ValueError(
                    f"`accelerator_config` is {given!r}: without an accelerator, DeepSpeed takes a `dict` of settings here."
                )
            self.accelerator_config = {**given, "use_configured_state": True}
        else:
            self.use_cpu = True

    def __post_init__(self):
        if self.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            for fault in lock_faults():
                logger.warning("%s.", fault)
        if "RANK" in os.environ and not torch.accelerator.is_available() and PartialState._shared_state == {}:
            self._join_cpu_ranks()
        super().__post_init__()
        # transformers makes them when the model and the data are there; one that is unknown or not installed is told now.
        for callback in get_reporting_integration_callbacks(self.report_to):
            callback()
        if self._uses_fsdp():
            version = self.fsdp_plugin_args["fsdp_version"] if self.fsdp else os.environ.get("FSDP_VERSION", "1")
            if int(version) == 1:
                raise ValueError("`fsdp_version` is 1, which AMVL does not save and run in stages under: set it to 2.")
            os.environ["ACCELERATE_USE_FSDP"] = "true"  # as accelerate does, later
            # Otherwise each GPU would add up the gradients of a step's batches whole.
            given = self.accelerator_config.gradient_accumulation_kwargs or {}
            self.accelerator_config.gradient_accumulation_kwargs = {"sync_each_batch": True, **given}
        for name in ("beta", "gamma", "ntp_weight", "prior_ntp_weight", "kl_warmup_steps", "kl_delay_steps"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"`{name}` must be 0 or more, got {value}.")
        if self.ntp_weight == self.prior_ntp_weight == self.beta == self.gamma == 0:
            raise ValueError(
                "`ntp_weight`, `prior_ntp_weight`, `beta` and `gamma` are all 0: nothing would be trained."
            )
        for name, choices in (
            ("kl_reduction", ("mean", "sum")),
            ("kl_order", ("forward_first", "reverse_first", "together")),
            ("on_bad_row", ("raise", "skip")),
            ("on_nan_loss", ("stop", "skip")),
            ("on_failed_save", ("stop", "continue")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {choices}, got {getattr(self, name)!r}.")
        for name in ("max_length", "max_completion_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}; `None` sets no limit.")
        # Settings of SFTTrainer that work on one sequence of prompt and answer, which would leave the latents out.
        for name, harmless in (
            ("packing", (False,)),
            ("padding_free", (False,)),
            ("assistant_only_loss", (False,)),
            ("completion_only_loss", (None, True)),
            ("loss_type", ("nll",)),
            ("label_smoothing_factor", (0.0,)),
            ("router_aux_loss_coef", (0.0, None)),
            ("use_liger_kernel", (False,)),
        ):
            if getattr(self, name) not in harmless:
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` would bypass the latents or their loss: leave it at {harmless[0]!r}."
                )
        check_license(self.license)
        if self.max_skips_in_a_row < 1:
            raise ValueError(f"`max_skips_in_a_row` must be at least 1, got {self.max_skips_in_a_row}.")
        if self.on_nan_loss == "skip" and self.deepspeed_plugin is not None:
            raise ValueError(
                "`on_nan_loss='skip'` cannot be had under DeepSpeed, whose engine steps inside of the backward pass: use "
                "`'stop'`, or another engine."
            )
        # Its callback would save in the middle of a step, at another one on each process; ours is always there.
        self.enable_jit_checkpoint = False
        if self.torch_compile:
            raise ValueError(
                "`torch_compile=True` compiles the whole model, where latents enter by hooks, which compiled code skips: "
                "compile its layers instead, `for layer in model.backbone.get_decoder().layers: layer.compile()`."
            )
        if self.router_aux_loss_coef is None:
            self.router_aux_loss_coef = 0.0
        if self.gradient_checkpointing and (self.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "`gradient_checkpointing_kwargs={'use_reentrant': True}` recomputes layers without the prompt's cache: set "
                "`use_reentrant` to `False`."
            )
