"""Which part of a picture the latents depend on: a cell is greyed out, and Z moves or does not.

Occlusion asks the model itself and works on the photograph, so it is the same for every backbone, whatever its processor makes
of an image. Shapes: K latent slots, Z latent size, G cells along a side.
"""

import torch
from PIL import ImageStat

from .asking import batches, evaluating


NUM_CELLS = 6  # along each side of a picture
CONSTANT = 1e-3  # of the distance that the slot which differs most has: below it, a slot is the same for all rows


def occlude(image, num_cells=NUM_CELLS):
    """
    Copies of an image, in each of which one cell of a grid has the image's mean colour.

    Args:
        image (`PIL.Image.Image`): RGB.
        num_cells (`int`, defaults to 6): G.

    Returns:
        `list[PIL.Image.Image]`: G * G, in reading order.
    """
    color = tuple(round(value) for value in ImageStat.Stat(image).mean)
    copies = []
    for row in range(num_cells):
        for column in range(num_cells):
            box = [
                round(place * side / num_cells)
                for place, side in (
                    (column, image.width),
                    (row, image.height),
                    (column + 1, image.width),
                    (row + 1, image.height),
                )
            ]
            copy = image.copy()
            copy.paste(color, tuple(box))
            copies.append(copy)
    return copies


def movement(latents, occluded, typical):
    """
    How far each slot moves when a cell is greyed out.

    Args:
        latents (`torch.Tensor`): `(K, Z)`, of the whole picture.
        occluded (`torch.Tensor`): `(G * G, K, Z)`.
        typical (`torch.Tensor`): `(K,)`, mean distance of the slot between rows.

    Returns:
        `torch.Tensor`: `(K, G, G)`, 1 where it moves as far as another row's Z is; 0 in a slot that is the same for all rows.
    """
    moved = (occluded - latents).norm(dim=-1) / typical.clamp(min=1e-12)  # (G * G, K)
    moved[:, typical <= CONSTANT * typical.max()] = 0
    size = round(len(occluded) ** 0.5)
    return moved.T.reshape(-1, size, size)


def relevance_maps(model, processor, rows, questions, chosen, latents, partners, batch_size=64):
    """
    Relevance maps of the prior's mean over the first image of some rows.

    Args:
        model ([`AMVLForConditionalGeneration`]), processor ([`AMVLProcessor`]): of a checkpoint.
        rows (`datasets.Dataset`), questions (`list[Question]`): the dataset.
        chosen (`list[int]`): rows to draw.
        latents (`torch.Tensor`): `(N, K, Z)`, the prior's means of all rows.
        partners (`torch.LongTensor`): `(N,)`, see [`~trainer.diagnostics.interventions.derange`]: the distance between rows.

    Returns:
        `list[tuple[PIL.Image.Image, torch.Tensor]]`: image and map `(K, G, G)` of each.
    """
    paired = partners >= 0
    typical = (latents[paired] - latents[partners[paired]]).norm(dim=-1).mean(0)  # (K,)
    maps = []
    for index in chosen:
        first, *others = rows[index]["images"]
        first = first.convert("RGB")
        variants = [{"images": [image, *others]} for image in [first, *occlude(first)]]
        with evaluating(model):
            read = [
                model.prior(**batch).mean.float().cpu()
                for _, _, batch, _ in batches(
                    model, processor, variants, [questions[index]] * len(variants), batch_size, "Occluding"
                )
            ]
        read = torch.cat(read)
        maps.append((first, movement(read[0], read[1:], typical)))
    return maps
