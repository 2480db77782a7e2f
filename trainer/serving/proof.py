"""Whether the latents reach a model's decoder, tried on one prompt: other latents, or none, must change what it says next."""

import torch
from PIL import Image
from transformers import GenerationConfig


QUESTION = "What is this?"
CLEARLY = 2  # times the difference between two runs with the same latents


def prove_latents(model, processor):
    """
    Asks for one token four times: as a client is answered, with the same latents given, with noise of their norm, and without.

    Args:
        model ([`AMVLForConditionalGeneration`]): in evaluation mode.
        processor ([`AMVLProcessor`]): its processor.

    Returns:
        `dict`: `num_decoded` (`int`), the latents that reached the decoder; `log_prob_change` (`dict[str, float]`), by how many
        nats the log-probability of a next token changes at most from that of the answer as served, with `same_latents` (but
        for rounding, by 0), `other_latents` and `no_latents`; `are_on` (`bool`), whether all of them were decoded, and both
        changes are clear of rounding.

    Raises:
        RuntimeError: no latent reached the decoder at all.
    """
    image = Image.linear_gradient("L").convert("RGB")
    content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    one_token = GenerationConfig(max_new_tokens=1, return_dict_in_generate=True, output_logits=True)

    def ask(asked, **latents):
        outputs = asked.generate(**inputs, generation_config=one_token, **latents)
        return outputs.logits[0].float().log_softmax(-1), outputs  # (1, V)

    served, outputs = ask(model, latent_temperature=0.0)
    latents = outputs["latents"]  # (1, K, Z)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(latents)
    other = noise * latents.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    again = {
        "same_latents": ask(model, latents=latents),
        "other_latents": ask(model, latents=other),
        "no_latents": ask(model.backbone),
    }
    changes = {name: float((found - served).nan_to_num().abs().max()) for name, (found, _) in again.items()}
    num_decoded = latents.shape[1]
    least = min(changes["other_latents"], changes["no_latents"])
    return {
        "num_decoded": num_decoded,
        "log_prob_change": changes,
        "are_on": num_decoded == model.config.num_latents and least > CLEARLY * changes["same_latents"],
    }
