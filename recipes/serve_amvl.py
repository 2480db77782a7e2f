"""Serves an AMVL checkpoint to OpenAI clients, with its latents on.

    python recipes/serve_amvl.py amvl-demo --port 8000
    python recipes/serve_amvl.py you/amvl-smolvlm --revision 5c0ffee --dtype bfloat16 --latent_temperature 0.5

It says at its start that the latents are on, and `/health/latents` proves it at any time. The client is OpenAI's own:

    import base64
    from openai import OpenAI

    image = base64.b64encode(open("photo.png", "rb").read()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
        {"type": "text", "text": "2 steps from red?"},
    ]
    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    for chunk in client.chat.completions.create(
        model="amvl-demo", messages=[{"role": "user", "content": content}], stream=True
    ):
        print(chunk.choices[0].delta.content or "", end="", flush=True)

`temperature` (above 0: sampling), `top_p`, `seed`, `stop`, `max_tokens` and `frequency_penalty` are heard, and
`extra_body={"latent_temperature": 0.5}`; an answer keeps the `stop` text that ended it. Anything else is refused, and so are addresses
and files of images. One request is answered at a time, the others wait. Needs `pip install -e '.[serve]'`.
"""

import argparse
import sys


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="An AMVL checkpoint: folder or Hub id.")
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen at; 0.0.0.0 for all of the machine's.")
    parser.add_argument("--port", type=int, default=8000, help="Port to listen at; 0 takes a free one.")
    parser.add_argument("--device", default="auto", help="`auto`, `cuda:0`, `cpu`.")
    parser.add_argument("--dtype", default="auto", help="`auto`, the checkpoint's; `bfloat16`, `float16`, `float32`.")
    parser.add_argument("--revision", help="Commit, tag or branch of a Hub id.")
    parser.add_argument("--attn_implementation", help="`sdpa`, `eager`, `flash_attention_2`.")
    parser.add_argument(
        "--latent_temperature", type=float, help="Where a request says none; the checkpoint's by default."
    )
    parser.add_argument(
        "--max_request_mib", type=float, default=32, help="Most MiB of a request, its images in base64."
    )
    arguments = parser.parse_args()
    try:
        from trainer.serving import serve  # here, so that `--help` does not wait for torch

        serve(**vars(arguments))
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
