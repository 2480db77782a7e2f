"""Runs a script as a rank of FSDP2 without accelerators: `fsdp_on_cpu.py recipes/sft_amvl.py ...`, started by `accelerate launch`.

accelerate runs FSDP on accelerators only; torch's FSDP2 itself runs on CPUs, too. So this tells accelerate that its ranks, joined by
gloo, are those of GPUs: all that comes after, accelerate's wrapping, transformers' loop, saving and loading, is the real thing.
"""

import runpy
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType


if __name__ == "__main__":
    PartialState(backend="gloo")
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    sys.argv = [*sys.argv[1:], "--accelerator_config", '{"use_configured_state": true}']
    runpy.run_path(sys.argv[0], run_name="__main__")
