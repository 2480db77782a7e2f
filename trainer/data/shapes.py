"""What is drawn onto photographs: coloured shapes in the cells of a grid, and the words for where they lie."""

from PIL import Image, ImageOps


COLORS = {  # sRGB, 8 bits: far apart from each other, pure enough to be rare in photographs
    "red": (230, 20, 30),
    "green": (20, 170, 40),
    "blue": (30, 50, 240),
    "yellow": (250, 225, 20),
    "pink": (245, 60, 225),
    "cyan": (40, 225, 235),
}
ALL_COLORS = {**COLORS, "orange": (255, 130, 0), "white": (250, 250, 250)}  # puzzles use the first six alone
SHAPES = ("circle", "square", "triangle", "cross")
GRID = 3  # shapes lie in the cells of a GRID x GRID grid
PLACES = {  # (row, column) of each cell
    f"{row} {column}".replace("middle center", "center"): (i, j)
    for i, row in enumerate(("top", "middle", "bottom"))
    for j, column in enumerate(("left", "center", "right"))
}
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}  # (row, column) steps
PREPOSITIONS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}


def random_crop(rng, photo, size):
    """A random square, `size` pixels wide, of 0.4 to 1.0 of a photograph's shorter side, mirrored half of the time."""
    side = rng.uniform(0.4, 1.0) * min(photo.size)
    left, top = rng.uniform(0, photo.width - side), rng.uniform(0, photo.height - side)
    crop = photo.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    return ImageOps.mirror(crop) if rng.random() < 0.5 else crop


def random_box(rng, cell_size, row, column):
    """A square somewhere within a cell, its side 0.8 to 0.95 of it: left, top, right and bottom, in pixels."""
    size = int(rng.integers(round(0.8 * cell_size), round(0.95 * cell_size) + 1))
    x = column * cell_size + int(rng.integers(0, cell_size - size + 1))
    y = row * cell_size + int(rng.integers(0, cell_size - size + 1))
    return x, y, x + size - 1, y + size - 1


def draw_shape(draw, shape, box, color):
    """Draws a shape that fills a square, black-edged and without smoothing: its colour stays exact."""
    x, y, right, bottom = box
    style = {"fill": color, "outline": (0, 0, 0)}
    if shape == "circle":
        draw.ellipse(box, **style)
    elif shape == "square":
        draw.rectangle(box, **style)
    elif shape == "triangle":
        draw.polygon([((x + right) // 2, y), (right, bottom), (x, bottom)], **style)
    else:
        third = (right - x + 1) // 3
        xs, ys = (x, x + third, right - third, right), (y, y + third, bottom - third, bottom)
        corners = [(1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1)]
        draw.polygon([(xs[i], ys[j]) for i, j in corners], **style)
