"""Puzzles about views of photographs: Jigsaw, Visual_Similarity, Multi-view_Reasoning and Visual_Correspondence.

Each makes a set of candidates in which all are alike, and a coin that nothing else depends on decides which is right.
"""

import math

import numpy as np

from .camera import (
    MIN_TEXTURE,
    Box,
    Photos,
    add_noise,
    crop,
    enlarge,
    invert,
    means,
    project,
    relight,
    rotation,
    set_light,
    spreads,
    warp,
)
from .canvas import (
    BLACK,
    SUB,
    Puzzle,
    Random,
    between,
    draw_ring,
    draw_text,
    text_scale,
    text_size,
)


ORDINALS = ("second", "third")
LETTERS = "ABCD"


def _difference(a: list[int], b: list[int]) -> int:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True))


def _lack(*textures: int) -> int:
    """How far the least texture is from enough."""
    return max(0, MIN_TEXTURE - min(textures))


# ------------------------------------------------------------------------------
# Jigsaw
# ------------------------------------------------------------------------------

JIGSAW_DISTANCE = (2.0, 0.4)  # from the right piece to the wrong one, in sides of a piece, at difficulty 0 and 1
PIECE_LIGHT = 8  # grey levels of brightness, and 128ths of contrast, by which a channel changes at most
PIECE_NOISE = 2  # grey levels


def jigsaw(rng: Random, photos: Photos, size: int, difficulty: float, answer: int, case: int) -> Puzzle:
    """
    Which of two pieces of one photograph fills its black corner.

    Two windows of the photograph are drawn; the coin decides whose surroundings are shown. Both pieces are brought to
    the light halfway between theirs, so both are as far from the frame's, and then frame and pieces each get a light
    and a noise of their own: neither means nor single grey levels tell which piece fits.
    """
    distance = between(*JIGSAW_DISTANCE, difficulty)

    def draw(photo):
        side = photo.shorter * rng.uniform(0.46, 0.5)
        along, across = distance * side / 2 * rng.sign(), distance * side / 2 * rng.uniform(-1, 1)
        dx, dy = (along, across) if rng.coin() else (across, along)
        left = rng.uniform(max(0, -dx), photo.width - side - max(0, dx))
        top = rng.uniform(max(0, -dy), photo.height - side - max(0, dy))
        windows = Box(left, top, side), Box(left + dx, top + dy, side)
        pieces = [Box(window.left + side / 2, window.top + side / 2, side / 2) for window in windows]
        lack = _lack(*(photo.texture(piece) for piece in pieces))
        return (lack, _difference(*(photo.color(piece) for piece in pieces))), windows

    photo, windows = photos.search(rng, draw)
    half = size // 2
    views = [crop(photo, window, size) for window in windows]
    pieces = [view[half:, half:] for view in views]
    target_means, target_spreads = (
        [(a + b) // 2 for a, b in zip(*map(moment, pieces), strict=True)] for moment in (means, spreads)
    )
    if rng.coin():
        views.reverse()
        pieces.reverse()
    lit = []
    for piece in pieces:
        piece_means = [mean + rng.integer(-PIECE_LIGHT, PIECE_LIGHT) for mean in target_means]
        piece_spreads = [
            spread * (256 + 2 * rng.integer(-PIECE_LIGHT, PIECE_LIGHT)) // 256 for spread in target_spreads
        ]
        lit.append(add_noise(rng, set_light(piece, piece_means, piece_spreads), PIECE_NOISE))
    pieces = lit
    gains = [256 + 2 * rng.integer(-PIECE_LIGHT, PIECE_LIGHT) for _ in range(3)]
    frame = relight(views[0], gains, [rng.integer(-PIECE_LIGHT, PIECE_LIGHT) for _ in range(3)])
    frame = add_noise(rng, frame, PIECE_NOISE)
    frame[half:, half:] = BLACK
    pieces.insert(answer, pieces.pop(0))
    return Puzzle(
        [frame, *pieces],
        "The lower right corner of the first image is missing and shown in black. Which of the other two images is "
        "the missing piece?",
        ["the second image", "the third image"],
        f"The {ORDINALS[answer]} image is the missing corner: lines and areas run on across the cut. The other piece "
        f"comes from a place of the same photograph {distance:.2f} times a piece's side away.",
        [photo.name],
    )


# ------------------------------------------------------------------------------
# Visual similarity
# ------------------------------------------------------------------------------

SIMILARITY_SHIFT = (0.1, 0.75)  # between two views of one photograph, in sides of a view
SIMILARITY_BLUR = (0.7, 0.5)  # least resolution of a view, against the picture's
SIMILARITY_PLACES = 20  # are drawn, of which the two with the most similar texture are taken


def _roughness(pixels: np.ndarray) -> list[float]:
    """Mean change from a pixel to the one below and to its right over the spread: no change of light alters it."""
    grey = pixels.sum(-1, dtype=np.int64)
    return [int(abs(np.diff(grey, axis=axis)).sum()) / grey.size / max(sum(spreads(pixels)), 1) for axis in (0, 1)]


def visual_similarity(rng: Random, photos: Photos, size: int, difficulty: float, answer: int, case: int) -> Puzzle:
    """
    Which of two images shows the same place as the first, seen otherwise.

    Of each of two photographs two views are made, at places where texture is about as fine; the coin decides from which
    photograph the first image comes. All three images are brought to the same light, and then each to its own, and to a
    sharpness of its own, so neither means nor fineness of texture tell much of which are alike.
    """
    shift = between(*SIMILARITY_SHIFT, difficulty)
    zoom = between(1.0, 0.75, difficulty)
    light = round(between(6, 20, difficulty))

    def draw(photo):
        side = photo.shorter * 0.55
        along, across = shift * side * rng.sign(), shift * side * rng.uniform(-0.5, 0.5)
        dx, dy = (along, across) if rng.coin() else (across, along)
        left = rng.uniform(max(0, -dx), photo.width - side - max(0, dx))
        top = rng.uniform(max(0, -dy), photo.height - side - max(0, dy))
        small = side * zoom
        middle = (side - small) / 2
        boxes = [Box(left, top, side), Box(left + dx + middle, top + dy + middle, small)]
        return (_lack(*(photo.texture(box) for box in boxes)), 0), rng.shuffled(boxes)

    places = []
    for i in range(SIMILARITY_PLACES):  # the last one of another photograph, should all be of the same
        alone = i == SIMILARITY_PLACES - 1 and len({photo.name for photo, _, _ in places}) == 1
        photo, boxes = photos.search(rng, draw, exclude=places[0][0] if alone else None)
        places.append((photo, boxes, _roughness(crop(photo, boxes[0], size // 2))))
    best = None
    for j, (other, _, found) in enumerate(places):
        for i, (photo, _, roughness) in enumerate(places[:j]):
            off = max(abs(a - b) / (a + b + 1e-9) for a, b in zip(roughness, found, strict=True))
            if photo is not other and (best is None or off < best[0]):
                best = off, places[i][:2], places[j][:2]
    (first, boxes), (second, other_boxes) = best[1:]
    pairs = []
    for photo, views in ((first, boxes), (second, other_boxes)):
        pairs.append([])
        for box in views:
            small = round(size * rng.uniform(between(*SIMILARITY_BLUR, difficulty), 1))
            pairs[-1].append(enlarge(crop(photo, box, small), size))
    names = [first.name, second.name]
    # One light for all three, and then each its own: so neither means nor spreads tell which two are alike.
    target_means = [min(max((a + b) // 2, 90), 165) for a, b in zip(means(pairs[0][0]), means(pairs[1][0]))]
    target_spreads = [min(max((a + b) // 2, 28), 56) for a, b in zip(spreads(pairs[0][0]), spreads(pairs[1][0]))]
    if rng.coin():
        pairs.reverse()
        names.reverse()
    images = [pairs[0][1][:, ::-1] if rng.coin() else pairs[0][1], pairs[0][0], pairs[1][0]]
    for i, image in enumerate(images):
        image_means = [mean + rng.integer(-light, light) for mean in target_means]
        image_spreads = [spread * (256 + 3 * rng.integer(-light, light)) // 256 for spread in target_spreads]
        images[i] = set_light(image, image_means, image_spreads)
    reference, right, wrong = images
    candidates = [wrong]
    candidates.insert(answer, right)
    return Puzzle(
        [reference, *candidates],
        "The first image was taken at the same place as one of the other two, from another position and in other "
        "light; it may also be mirrored. Which image is it?",
        ["the second image", "the third image"],
        f"The {ORDINALS[answer]} image and the first are parts of {names[0]}, {shift:.2f} times an image's side apart; "
        f"the other image is a part of {names[1]}.",
        names,
    )


# ------------------------------------------------------------------------------
# Two cameras
# ------------------------------------------------------------------------------

CAMERA_MOTION = (0.26, 0.08)  # how far the picture's middle moves between the two shots, in widths of the picture
FOCAL_LENGTH = 1.2  # in widths of the picture


def _camera(size: int, side: float, middle: tuple[float, float], half_tangent: float) -> tuple[float, ...]:
    """
    The homography of a camera in front of a photograph that hangs on a wall.

    Args:
        size (`int`): Width of the picture in pixels.
        side (`float`): Width of what the camera sees, in pixels of the photograph, when it looks straight at the wall.
        middle (`tuple[float, float]`): The point of the wall in the middle of the picture.
        half_tangent (`float`): Tangent of half the angle by which the camera is turned to the right.
    """
    cosine, sine = rotation(half_tangent)
    focal = FOCAL_LENGTH * size
    scale = side / size
    # In front of the wall at distance `focal`: the ray (x, y, focal), turned, meets the wall at focal * (x', y') / z'.
    # The turn alone would move the middle of the picture by focal * sine / cosine: the camera stands that much aside.
    stand = focal * sine / cosine
    a, b, c = cosine + stand * sine / focal, 0.0, focal * sine - stand * cosine
    g, i = -sine / focal, cosine
    half = size / 2
    # From a pixel to its distance from the picture's middle, and from the wall to the photograph.
    c, i = c - a * half, i - g * half
    x, y = middle
    return (scale * a + x * g, b, scale * c + x * i, y * g, scale, y * i - scale * half, g, 0.0, i)


def multi_view_reasoning(rng: Random, photos: Photos, size: int, difficulty: float, answer: int, case: int) -> Puzzle:
    """
    Whether the camera moved left or right between two shots: `case` 0 is left, 1 is right.

    The photograph hangs on a wall, and the camera moves along it and turns a little, either way. The order of the two
    shots is the answer, and a coin mirrors the photograph, which swaps left and right in it. What a shot shows of the
    photograph is small, as is the motion, against the room for both: so one shot alone, wherever in the photograph it
    was taken, is nearly as often the left one as the right one. The least that can be had is half of motion over room
    above one half, which a uniform place reaches: the left shot lies on the left by the meaning of the word.
    """
    motion = between(*CAMERA_MOTION, difficulty)

    def draw(photo):
        side = photo.shorter * rng.uniform(0.28, 0.34)
        rise = [motion * side * rng.uniform(-0.1, 0.1) for _ in range(2)]
        cameras = []
        for sign, height in zip((-1, 1), rise, strict=True):
            cameras.append((sign * motion * side / 2, height, motion * rng.uniform(-0.12, 0.12)))
        corners = [
            project(_camera(size, side, (x, y), half_tangent), across, down)
            for x, y, half_tangent in cameras
            for across in (0, size)
            for down in (0, size)
        ]
        low = [-min(corner[axis] for corner in corners) for axis in (0, 1)]
        high = [
            extent - max(corner[axis] for corner in corners) for axis, extent in enumerate((photo.width, photo.height))
        ]
        if low[0] > high[0] or low[1] > high[1]:
            return None
        x, y = rng.uniform(low[0], high[0]), rng.uniform(low[1], high[1])
        views = [_camera(size, side, (x + dx, y + dy), half_tangent) for dx, dy, half_tangent in cameras]
        texture = [photo.texture(Box(x + dx - side / 2, y + dy - side / 2, side)) for dx, dy, _ in cameras]
        return (_lack(*texture), 0), views

    photo, cameras = photos.search(rng, draw)
    views = [warp(photo, camera, size) for camera in cameras]  # the left one first
    mirrored = rng.coin()
    if mirrored:
        views = [view[:, ::-1] for view in reversed(views)]
    if case == 0:
        views.reverse()
    directions = ["left", "right"]
    moved = directions[case]
    choices = [directions[1 - case]]
    choices.insert(answer, moved)
    return Puzzle(
        views,
        "The two images show the same still scene; the first was taken before the second. In which direction did the "
        "camera move between them?",
        choices,
        f"From the first image to the second everything in view moves {directions[1 - case]} by about "
        f"{motion * 100:.0f}% of the image's width, so the camera moved {moved}.",
        [photo.name],
    )


# ------------------------------------------------------------------------------
# Correspondence
# ------------------------------------------------------------------------------

POINT_DISTANCE = (0.22, 0.11)  # least distance between two marked points, in sides of the first image
POINT_MARGIN = 0.09  # from a marked point to the border of an image, in its sides


def _points(rng: Random, distance: float) -> list[tuple[float, float]]:
    """Four points whose distances are at least `distance`, all in a square of side 1.6 `distance` around the origin."""
    while True:
        points = []
        for _ in range(40):
            x, y = (rng.uniform(-0.8, 0.8) * distance for _ in range(2))
            if all((x - a) ** 2 + (y - b) ** 2 >= distance * distance for a, b in points):
                points.append((x, y))
                if len(points) == 4:
                    return points


def _mark(canvas: np.ndarray, points: list[tuple[float, float]], labels: list[str]) -> None:
    """Rings points, which stay visible, and puts each one's label beside it, clear of the other rings and labels."""
    size = canvas.shape[0]
    radius, line = max(3, size // 40), max(1, size // 128)
    taken = []
    for x, y in points:
        center = int(x * SUB), int(y * SUB)
        draw_ring(canvas, *center, (radius - 1) * SUB, (radius + line + 1) * SUB, BLACK)
        draw_ring(canvas, *center, radius * SUB, (radius + line) * SUB, (255, 230, 0))
        reach = radius + line + 1
        taken.append((int(x) - reach, int(y) - reach, int(x) + reach + 1, int(y) + reach + 1))
    scale = text_scale(size)
    gap = radius + line + 2
    for (x, y), label in zip(points, labels, strict=True):
        width, height = text_size(label, scale)
        best = None
        for dx, dy in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, 1), (1, 1), (-1, -1)):
            left = int(x) + (gap if dx > 0 else -gap - width if dx < 0 else -width // 2)
            top = int(y) + (gap if dy > 0 else -gap - height if dy < 0 else -height // 2)
            left, top = min(max(left, 0), size - width), min(max(top, 0), size - height)
            covered = 0
            for a, b, c, d in taken:
                covered += max(0, min(left + width, c) - max(left, a)) * max(0, min(top + height, d) - max(top, b))
            if best is None or covered < best[0]:
                best = covered, left, top
        _, left, top = best
        draw_text(canvas, label, left, top, scale, ink=BLACK, paper=(255, 230, 0))
        taken.append((left, top, left + width, top + height))


def visual_correspondence(rng: Random, photos: Photos, size: int, difficulty: float, answer: int, case: int) -> Puzzle:
    """
    Which of four points of the second image is the one marked in the first.

    The coin decides which of the four is marked. The first image is cut so that the mark may lie anywhere, whichever
    of the four it is, so that the place of the mark says nothing.
    """
    distance = between(*POINT_DISTANCE, difficulty)
    tries = 0

    def draw(photo):
        nonlocal tries
        tries += 1
        strength = difficulty / (1 + tries // 8)  # weaker views where the photograph leaves no room
        side = photo.shorter * rng.uniform(0.52, 0.58)
        around = _points(rng, distance * side)
        room = 0.8 * distance * side
        x = rng.uniform(room, photo.width - room)
        y = rng.uniform(room, photo.height - room)
        points = [(x + dx, y + dy) for dx, dy in around]
        margin = POINT_MARGIN * side
        place, origin = [], []
        for axis, extent in enumerate((photo.width, photo.height)):
            values = [point[axis] for point in points]
            least, most = min(values), max(values)
            spread = most - least
            low = max(most - (extent - side), margin + spread)
            high = min(least, side - margin - spread)
            far_low, far_high = max(0, most + margin - side), min(extent - side, least - margin)
            if low > high or far_low > far_high:
                return None
            place.append(rng.uniform(low, high))
            origin.append(rng.uniform(far_low, far_high))
        turn = rng.uniform(-1, 1) * between(0.03, 0.17, strength)
        scale = side / size * (1 + rng.uniform(-1, 1) * between(0.03, 0.15, strength))
        tilt = [rng.uniform(-1, 1) * between(0.05, 0.3, strength) / size for _ in range(2)]
        cosine, sine = rotation(turn)
        half = size / 2
        # About the picture's middle: turned, scaled and tilted; then moved to its place in the photograph.
        a, b, d, e = scale * cosine, -scale * sine, scale * sine, scale * cosine
        g, h = tilt
        i = 1 - (g + h) * half
        x, y = origin[0] + side / 2, origin[1] + side / 2
        homography = (
            a + x * g,
            b + x * h,
            x * i - (a + b) * half,
            d + y * g,
            e + y * h,
            y * i - (d + e) * half,
            g,
            h,
            i,
        )
        corners = [project(homography, across, down) for across in (0, size) for down in (0, size)]
        if not all(0 <= x <= photo.width and 0 <= y <= photo.height for x, y in corners):
            return None
        seen = [project(invert(homography), *point) for point in points]
        border = POINT_MARGIN * size * 0.9
        if not all(border <= value <= size - border for point in seen for value in point):
            return None
        reach = max(side * 0.05, 8)
        lack = _lack(*(photo.texture(Box(x - reach, y - reach, 2 * reach)) for x, y in points))
        return (lack, 0), (side, points, place, homography, seen)

    photo, (side, points, place, homography, seen) = photos.search(rng, draw, tries=24)
    chosen = rng.integer(0, 3)
    mark = points[chosen]
    first = crop(photo, Box(mark[0] - place[0], mark[1] - place[1], side), size)
    gain = round(between(10, 60, difficulty))
    gains = [256 + rng.integer(-gain, gain)] * 3
    second = relight(warp(photo, homography, size), gains, [rng.integer(-gain // 3, gain // 3)] * 3)
    _mark(first, [(place[0] * size / side, place[1] * size / side)], ["REF"])
    right = seen.pop(chosen)
    seen = rng.shuffled(seen)
    nearest = min((x - right[0]) ** 2 + (y - right[1]) ** 2 for x, y in seen)
    seen.insert(answer, right)
    _mark(second, seen, list(LETTERS))
    return Puzzle(
        [first, second],
        "A point of the first image is ringed and marked REF. The second image shows the same scene from another "
        "position and in other light. Which of its four ringed points is the same point of the scene?",
        [f"point {letter}" for letter in LETTERS],
        f"Point {LETTERS[answer]} has the same surroundings as REF; the nearest of the other points is "
        f"{math.sqrt(nearest) / size:.2f} of the image's width away from it.",
        [photo.name],
    )
