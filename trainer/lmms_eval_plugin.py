"""The model `amvl` of lmms-eval: its tasks, asked with latents.

The package's entry point tells lmms-eval of it, once the extra `lmms-eval` is installed:

    lmms-eval --model amvl --model_args pretrained=amvl-demo --tasks blink_jigsaw --batch_size 8 --output_path out --log_samples
"""

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import Collator
from transformers import AutoModelForImageTextToText, GenerationConfig
from transformers.utils import logging

from modeling_amvl import AMVLForConditionalGeneration, AMVLProcessor

from .bars import bar
from .collator import read_image
from .sft_trainer import model_type_of


logger = logging.get_logger(__name__)

MANIFEST = ModelManifest("amvl", chat_class_path=f"{__name__}.AMVL")
MAX_NEW_TOKENS = 1024  # where a task states none; as lmms-eval's BLINK and LLaVA


class AMVL(lmms):
    """
    An AMVL checkpoint, or a stock model as its baseline, behind the interface of lmms-eval 0.7.

    Every argument is one of `--model_args`; the number of latents is reported as a request's reasoning tokens, beside
    and not among its output tokens.

    Args:
        pretrained (`str`): Hub id or folder of an AMVL checkpoint; of a stock model with `source=no_latents`.
        source (`"prior"` or `"no_latents"`, defaults to `"prior"`): where the latents come from; `"no_latents"` asks the
            backbone of the checkpoint without them.
        latent_temperature (`float`, *optional*): of the latents; by default the checkpoint's. Above 0 `--seed` seeds
            the noise.
        min_pixels (`int`, *optional*), max_pixels (`int`, *optional*): another image budget than the checkpoint's.
        dtype (`str`, defaults to `"auto"`), attn_implementation (`str`, *optional*): as for `from_pretrained`.
        device (`str`, *optional*): `--device`; by default the accelerator of this process.
        batch_size (`int`, defaults to 1): `--batch_size`, requests generated at once.

    Raises:
        ValueError: a setting under which the latents would do nothing, before anything is loaded.
    """

    is_simple = False

    def __init__(
        self,
        pretrained,
        source="prior",
        latent_temperature=None,
        min_pixels=None,
        max_pixels=None,
        dtype="auto",
        attn_implementation=None,
        device=None,
        batch_size=1,
    ):
        super().__init__()
        if source not in ("prior", "no_latents"):
            raise ValueError(
                f"`source` must be 'prior' or 'no_latents', got {source!r}: lmms-eval gives a model no answers to read."
            )
        if latent_temperature is not None:
            if source == "no_latents":
                raise ValueError(
                    f"`latent_temperature={latent_temperature}` does nothing with `source=no_latents`: leave out one."
                )
            if not isinstance(latent_temperature, (int, float)) or latent_temperature < 0:
                raise ValueError(f"`latent_temperature` must be a number from 0 on, got {latent_temperature!r}.")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"`batch_size` must be a positive number, got {batch_size!r}: 'auto' is not offered.")
        has_latents = model_type_of(pretrained) == "amvl"
        if source == "prior" and not has_latents:
            raise ValueError(
                f"`pretrained={pretrained}` is no AMVL checkpoint, so there would be no latents: train one, or pass "
                "`source=no_latents` to ask it as a baseline."
            )
        self.batch_size = int(batch_size)
        self.latent_temperature = latent_temperature
        self.accelerator = Accelerator()
        self.device = torch.device(device or self.accelerator.device)
        load = AMVLProcessor.from_pretrained if has_latents else AMVLProcessor.from_backbone
        self.processor = load(pretrained, min_pixels=min_pixels, max_pixels=max_pixels)
        auto_class = AMVLForConditionalGeneration if has_latents else AutoModelForImageTextToText
        model = auto_class.from_pretrained(pretrained, dtype=dtype, attn_implementation=attn_implementation)
        self.num_latents = model.config.num_latents if source == "prior" else 0
        self.model = model.backbone if has_latents and source == "no_latents" else model
        self.model.to(self.device).eval()

    def generate_until(self, requests):
        """
        Answers requests of the form (context, doc_to_messages, settings, doc_id, task, split).

        Returns:
            `list[GenerationResult]`: text and token counts, in the order of `requests`.
        """
        collator = Collator(
            [request.args for request in requests],
            sort_fn=lambda args: -len(args[0]),  # alike lengths together
            group_fn=lambda args: args[2],
            grouping=True,
        )
        results = []
        with bar(total=len(requests), desc="Answering", disable=self.rank != 0) as progress:
            for batch in collator.get_batched(n=self.batch_size):
                results += self._answer(batch)
                progress.update(len(batch))
        return collator.get_original(results)

    @torch.no_grad()
    def _answer(self, batch):
        settings, until = generation_settings(batch[0][2])
        texts, images = zip(*(self._read(*args) for args in batch))
        inputs = self.processor(
            images=list(images) if any(images) else None,
            text=list(texts),
            padding=True,
            padding_side="left",
            return_tensors="pt",
            add_special_tokens=False,  # the template wrote them
        ).to(self.device, self.model.dtype)
        if self.num_latents:
            settings["latent_temperature"] = self.latent_temperature
        if until:
            settings |= {"stop_strings": until, "tokenizer": self.processor.tokenizer}
        sequences = self.model.generate(**inputs, **settings)
        answers = cut_at_end(sequences[:, inputs["input_ids"].shape[1] :], self.model.generation_config)
        texts = self.processor.batch_decode(answers, skip_special_tokens=True)
        num_prompt_tokens = inputs["attention_mask"].sum(1).tolist()
        return [
            GenerationResult(cut_at(text, until), TokenCounts(num_tokens, len(answer), self.num_latents))
            for text, num_tokens, answer in zip(texts, num_prompt_tokens, answers, strict=True)
        ]

    def _read(self, context, doc_to_messages, settings, doc_id, task, split):
        """The rendered prompt of a document and its images."""
        messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
        images, videos, audios = messages.extract_media()
        name = f"Document {doc_id} of the task `{task}`"
        if videos or audios:
            raise ValueError(
                f"{name} holds {'a video' if videos else 'a sound'}: an AMVL model reads images and text."
            )
        text = self.processor.apply_chat_template(
            messages.to_hf_messages(), add_generation_prompt=True, tokenize=False
        )
        return text, [read_image(image, f"{name}, image {number}") for number, image in enumerate(images)]

    def loglikelihood(self, requests):
        """Refused: lmms-eval asks a model of chat messages to generate only."""
        raise NotImplementedError("`loglikelihood` is not offered: take the task's `generate_until` form.")

    def generate_until_multi_round(self, requests):
        """Refused: the latents belong to one prompt and one answer."""
        raise NotImplementedError("`generate_until_multi_round` is not offered: AMVL has one prompt and one answer.")


def generation_settings(settings):
    """
    What `generate` takes of a task's `generation_kwargs`.

    Args:
        settings (`dict`): as in the task; what `generate` does not know is for other models and warned of once.

    Returns:
        `tuple[dict, list[str]]`: arguments of `generate`, greedy unless the task samples, and the strings to stop at.
        "\\n\\n" is none of them: lmms-eval fills it in where a task says nothing, and it would cut a rationale off.
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    until = settings.pop("until", [])
    until = [string for string in ([until] if isinstance(until, str) else until) if string and string != "\n\n"]
    known = vars(GenerationConfig())
    for name in settings.keys() - known.keys():
        logger.warning_once(f"`{name}={settings[name]}` of a task is no setting of `generate` and is left out.")
    settings = {"max_new_tokens": MAX_NEW_TOKENS} | {name: settings[name] for name in settings.keys() & known.keys()}
    if settings.get("temperature") == 0:
        del settings["temperature"]
        settings["do_sample"] = False
    settings.setdefault("do_sample", "temperature" in settings)
    return settings, until


def cut_at_end(answers, generation_config):
    """Ids of each answer `(B, A)` before the token that ends it: `list[torch.LongTensor]`."""
    eos = generation_config.eos_token_id
    ends = {generation_config.pad_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    ended = torch.isin(answers, answers.new_tensor(sorted(ends)))
    return [answer[:length] for answer, length in zip(answers, (~ended).cumprod(1).sum(1).tolist(), strict=True)]


def cut_at(text, until):
    """The text before the first of the strings to stop at."""
    for string in until:
        text = text.split(string)[0]
    return text
