"""Makes one model of the shards that DeepSpeed ZeRO or FSDP left in a checkpoint.

    python recipes/consolidate_amvl.py amvl-qwen/checkpoint-500 amvl-qwen-500

A run writes such a model by itself at its end. Of ZeRO's checkpoints this reads the full-precision copy, whatever was computed in;
`--dtype float32` keeps it so. It needs as much of the host's memory as the weights take, and no GPU.
"""

import argparse

from trainer.sharded_saving import consolidate


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="A `checkpoint-N` folder.")
    parser.add_argument("output_dir", help="A folder that is not there yet.")
    parser.add_argument("--dtype", default="auto", help="`auto`, the config's; `float32`, `bfloat16` or `float16`.")
    arguments = parser.parse_args()
    folder = consolidate(arguments.checkpoint, arguments.output_dir, arguments.dtype)
    print(f"`AutoModelForImageTextToText.from_pretrained({str(folder)!r}, trust_remote_code=True)` loads it.")


if __name__ == "__main__":
    main()
