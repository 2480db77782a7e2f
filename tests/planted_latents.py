"""Models whose use of their latents is known, since it was planted: the real decoder, with Z written by hand.

The language model's layer is made to add nothing, so that what stands in the last slot is what is said next. A latent has a
one at the place of one of three colours, and the projection makes that colour's token embedding of it.
"""

import datasets
import numpy as np
import torch
from PIL import Image
from tiny import build_tiny_backbone

from modeling_amvl import AMVLForConditionalGeneration, AMVLProcessor
from modeling_amvl.modeling_amvl import LatentDistribution


COLORS = {"red": (230, 20, 30), "green": (20, 170, 40), "blue": (30, 50, 240)}
LOG_VARIANCE = -4.0
QUESTIONS = ("What color is the shape?", "What color is it?")


class PlantedModel(AMVLForConditionalGeneration):
    """`sees`: the prior's Z is the colour of the image; `copies`: the posterior's is the answer that it reads."""

    sees, copies, color_ids = True, False, ()

    def prior(self, input_ids, attention_mask=None, pixel_values=None, **_):
        means = pixel_values.mean((2, 3))  # (B, 3)
        return self._latents(means.argmax(1) if self.sees else None, means.sum(1))

    def posterior(self, input_ids, completion_ids, attention_mask=None, completion_mask=None, pixel_values=None, **_):
        if not self.copies:
            return self.prior(input_ids, pixel_values=pixel_values)
        said = completion_ids[:, :1] == torch.tensor(self.color_ids)
        return self._latents(said.int().argmax(1), pixel_values.mean((2, 3)).sum(1))

    def _latents(self, color, brightness):
        mean = torch.zeros(len(brightness), self.config.num_latents, self.config.latent_size)
        mean[..., 3] = 0.1 * brightness[:, None]  # differs from row to row, and the projection drops it
        if color is not None:
            mean[torch.arange(len(color)), :, color] = 1.0
        return LatentDistribution(mean, torch.full_like(mean, LOG_VARIANCE))


def planted(sees=True, copies=False, reads=True):
    """
    A planted model and its processor.

    Args:
        sees (`bool`), copies (`bool`): see [`PlantedModel`].
        reads (`bool`): the decoder says what the last slot says; otherwise it says "red", whatever Z is.
    """
    backbone, stock_processor = build_tiny_backbone(seed=0)
    processor = AMVLProcessor.from_backbone(stock_processor)
    model = PlantedModel.from_backbone(
        backbone, num_latents=2, latent_size=4, latent_token_id=processor.latent_token_id
    ).eval()
    model.sees, model.copies = sees, copies
    model.color_ids = [processor.tokenizer(color, add_special_tokens=False)["input_ids"][0] for color in COLORS]
    colors = backbone.get_input_embeddings().weight[model.color_ids]  # (3, D)
    with torch.no_grad():
        for layer in backbone.model.language_model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.latent_projection.weight.zero_()
        model.latent_projection.bias.copy_(torch.zeros_like(colors[0]) if reads else colors[0])
        if reads:
            model.latent_projection.weight[:, :3] = colors.T
    return model, processor


def colored_rows(num_rows, seed=0):
    """Photographs of one colour and noise, and what colour they have; in two kinds and two wordings."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(num_rows):
        color = list(COLORS)[rng.integers(3)]
        pixels = np.asarray(COLORS[color]) + rng.integers(-20, 21, (12, 12, 1))
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).resize((48, 48))
        content = [{"type": "image", "text": None}, {"type": "text", "text": QUESTIONS[index // 2 % 2]}]
        rows.append(
            {
                "images": [image],
                "prompt": [{"role": "user", "content": content}],
                "completion": [{"role": "assistant", "content": [{"type": "text", "text": color}]}],
                "choices": list(COLORS),
                "kind": ("one step", "two steps")[index % 2],
            }
        )
    return datasets.Dataset.from_list(rows)
