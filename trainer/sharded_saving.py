"""Saving what DeepSpeed and FSDP have shared out: one whole model at the end, and from a checkpoint that holds shards alone."""

import shutil
import tempfile
from pathlib import Path

import torch
from accelerate.utils import merge_fsdp_weights
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from model_cards.facts import note_weights
from modeling_amvl import AMVLConfig, AMVLForConditionalGeneration


FSDP_SHARDS = "pytorch_model_fsdp_0"  # accelerate's name
COPIED = (".json", ".jinja", ".md", ".model", ".py", ".txt")
OF_THE_RUN = ("trainer_state.json", SAFE_WEIGHTS_INDEX_NAME, "zero_to_fp32.py", "zero_to_torch.py")
ZERO_TAG = "latest"  # the file that names DeepSpeed's last states


class ShardedSavingMixin:
    """Of a trainer: the end of a run is a whole model under every engine; a checkpoint is one where the engine is set so."""

    def save_model(self, output_dir, _internal_call):
        """Into a checkpoint, while one is written; [`CheckpointMixin`] sends all else to `save_whole_model`."""
        if self.is_fsdp_enabled and isinstance(self.model, PeftModel):
            self._save(output_dir, self._trained_weights())
        elif self.is_fsdp_enabled and "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            # transformers saves nothing here, not even the config that the shards are to be read with.
            self._save(output_dir, {})
            if self.args.should_save:
                (Path(output_dir) / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)
        else:
            super().save_model(output_dir, _internal_call=True)

    def save_whole_model(self, output_dir):
        """
        Saves model, processor, code and card as `from_pretrained` takes them, whatever engine has the weights.

        Args:
            output_dir (`str`): every process has to call this.
        """
        if self.is_fsdp_enabled:
            is_adapter = isinstance(self.model, PeftModel)
            self._save(
                output_dir, self._trained_weights() if is_adapter else self.accelerator.get_state_dict(self.model)
            )
        elif self.is_deepspeed_enabled:
            settings = self.deepspeed._config.zero_config
            given = settings.gather_16bit_weights_on_model_save
            settings.gather_16bit_weights_on_model_save = True
            try:
                super().save_model(output_dir, _internal_call=True)
            finally:
                settings.gather_16bit_weights_on_model_save = given
        else:
            super().save_model(output_dir, _internal_call=True)

    def _trained_weights(self):
        """What is trained, whole: an adapter, without the backbone that it stands on."""
        # What is outside of layers FSDP2 leaves together after a forward without a backward pass, an evaluation's: a checkpoint would be
        # written from memory that it takes back.
        for module in self.model_wrapped.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        trained = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        return {name: value.full_tensor().detach().cpu() for name, value in trained.items()}


def without_copies(state_dict, model):
    """A state dict with each parameter once: an engine that gathers shards makes copies of tied ones, which would all be written."""
    first, copies = {}, set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in state_dict and first.setdefault(id(parameter), name) != name:
            copies.add(name)
    return {name: value for name, value in state_dict.items() if name not in copies}


def consolidate(checkpoint, output_dir, dtype="auto"):
    """
    Makes one model of a checkpoint's shards, which `from_pretrained` loads.

    Args:
        checkpoint (`str` or `Path`): a `checkpoint-N` folder that a run under DeepSpeed ZeRO or FSDP left.
        output_dir (`str` or `Path`): a folder that is not there yet.
        dtype (`str`, defaults to `"auto"`): of the weights; by default what the config says, `"float32"` keeps ZeRO's full precision.

    Returns:
        `Path`: `output_dir`.

    Raises:
        ValueError: no checkpoint, one of an adapter, one without shards, or a folder that is there.
    """
    checkpoint, output_dir = Path(checkpoint), Path(output_dir)
    if output_dir.exists():
        raise ValueError(f"`output_dir` `{output_dir}` is there already: name a new folder.")
    if (checkpoint / "adapter_config.json").is_file():
        raise ValueError(
            f"`{checkpoint}` holds an adapter, which is whole: load it as its README.md says, or make one model of it and its base "
            "with `trainer.adapters.merge_adapter`."
        )
    if not (checkpoint / "config.json").is_file():
        raise ValueError(f"`{checkpoint}` is no checkpoint of an AMVL model: give a `checkpoint-N` folder.")
    config = AMVLConfig.from_pretrained(checkpoint)
    if dtype == "auto":
        dtype = config.dtype or torch.float32
    elif dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"`dtype` must be 'auto', 'float32', 'bfloat16' or 'float16', got {dtype!r}.")
    else:
        dtype = getattr(torch, dtype)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    state_dict = read_shards(checkpoint)
    with torch.device("meta"):
        model = AMVLForConditionalGeneration(config).to(dtype)
    state_dict = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in without_copies(state_dict, model).items()
    }
    missing = sorted({name for name, _ in model.named_parameters()} - state_dict.keys())
    if missing:
        raise ValueError(
            f"`{checkpoint}` lacks {len(missing)} weights, {missing[:3]} say: it was not written to its end."
        )
    part = Path(tempfile.mkdtemp(prefix=f"{output_dir.name}.", dir=output_dir.parent))
    try:
        model.save_pretrained(part, state_dict=state_dict)
        for file in checkpoint.iterdir():  # of the processor, generation settings, card
            if file.suffix in COPIED and file.name not in OF_THE_RUN and not (part / file.name).exists():
                shutil.copy(file, part)
        note_weights(part)  # the card's facts were written beside shards
        part.chmod(0o755)
        part.rename(output_dir)
    except BaseException:
        shutil.rmtree(part)
        raise
    return output_dir


def read_shards(checkpoint):
    """The whole weights of a checkpoint of DeepSpeed, of full precision, or of FSDP."""
    if (checkpoint / ZERO_TAG).is_file():
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
    if (checkpoint / FSDP_SHARDS).is_dir():
        with tempfile.TemporaryDirectory(dir=checkpoint.parent) as folder:
            merge_fsdp_weights(str(checkpoint / FSDP_SHARDS), folder)
            return load_file(Path(folder) / SAFE_WEIGHTS_NAME)
    raise ValueError(
        f"`{checkpoint}` has neither DeepSpeed's states (a file `{ZERO_TAG}`) nor FSDP's (a folder `{FSDP_SHARDS}`): what "
        "`from_pretrained` loads needs no consolidation."
    )
