"""What puzzles tell without being looked at: a text-only control, a probe on pixel means, and the bounds of chance."""

import re
from collections.abc import Sequence

import datasets
import numpy as np

from .build import LETTERS, MAX_IMAGES


RIDGE = 1.0  # weight of the penalty, for features of unit spread


def chance_bounds(num_rows: int, chance: float, level: float = 0.95) -> tuple[float, float]:
    """
    Between which accuracies guessing lies, by the binomial distribution.

    Args:
        num_rows (`int`): Number of rows that are guessed.
        chance (`float`): Probability that one guess is right.
        level (`float`, *optional*, defaults to `0.95`): Probability that the accuracy lies within the bounds, at least.

    Returns:
        `tuple[float, float]`: Both in 0..1 and included.
    """
    logarithms = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, num_rows + 1)))])  # of the factorials
    hits = np.arange(num_rows + 1)
    density = np.exp(
        logarithms[num_rows]
        - logarithms
        - logarithms[::-1]
        + hits * np.log(chance)
        + (num_rows - hits) * np.log1p(-chance)
    )
    below = np.cumsum(density)
    tail = (1 - level) / 2
    low = int(np.argmax(below > tail))
    high = int(np.argmax(below >= 1 - tail))
    return low / num_rows, high / num_rows


def _standardized(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean, spread = train.mean(0), train.std(0)
    spread = np.where(spread > 1e-9, spread, 1.0)
    return (train - mean) / spread, (test - mean) / spread


def _ridge(inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Weights of a ridge regression, from the smaller of the two systems of equations."""
    rows, columns = inputs.shape
    if columns <= rows:
        return np.linalg.solve(inputs.T @ inputs + RIDGE * np.eye(columns), inputs.T @ targets)
    return inputs.T @ np.linalg.solve(inputs @ inputs.T + RIDGE * np.eye(rows), targets)


def _answers(rows: datasets.Dataset) -> np.ndarray:
    return np.array([LETTERS.index(answer[1]) for answer in rows["answer"]])


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _option_features(question: str, choices: Sequence[str]) -> list[dict[str, float]]:
    """What can be said of each option without an image: words, place, length, and a number's place among the others."""
    asked = _words(question)
    numbers = [float(choice) if re.fullmatch(r"-?\d+(\.\d+)?", choice.strip()) else None for choice in choices]
    known = [number for number in numbers if number is not None]
    features = []
    for i, choice in enumerate(choices):
        words = _words(choice)
        found = {f"place {i}": 1.0, "length": float(len(choice))}
        for word in words:
            found[f"option {word}"] = 1.0
            found[f"option {word} at {i}"] = 1.0
            for other in asked:
                found[f"option {word} asked {other}"] = 1.0
        for other in asked:
            found[f"asked {other} at {i}"] = 1.0
        for other in choices[:i]:
            found[f"option {choice} after {other}"] = 1.0
        for other in choices[i + 1 :]:
            found[f"option {choice} before {other}"] = 1.0
        if numbers[i] is not None:
            found["number"] = numbers[i]
            found[f"rank {sum(number < numbers[i] for number in known)}"] = 1.0
        features.append(found)
    return features


def text_only_accuracy(train: datasets.Dataset, test: datasets.Dataset) -> float:
    """
    Accuracy on `test` of a classifier that was trained on `train` and sees the question and the options alone.

    A ridge regression scores each option by its words, their pairs with the question's words, its place, and where it
    is a number its size and its rank; the option with the highest score is the answer.

    Args:
        train (`datasets.Dataset`): Rows in BLINK's columns; the more, the finer a shortcut it finds.
        test (`datasets.Dataset`): Other rows, of the same kind.

    Returns:
        `float`: Accuracy in 0..1, to be held against [`chance_bounds`].
    """
    sides, columns = [], {}
    for rows in (train, test):
        options = []
        for question, choices in zip(rows["question"], rows["choices"], strict=True):
            options.append(_option_features(question, choices))
        sides.append(options)
    for options in sides[0]:
        for found in options:
            for name in found:
                columns.setdefault(name, len(columns))
    matrices = []
    for side in sides:
        matrix = np.zeros((sum(map(len, side)), len(columns)))
        for row, found in enumerate(found for options in side for found in options):
            for name, value in found.items():
                if name in columns:
                    matrix[row, columns[name]] = value
        matrices.append(matrix)
    inputs, test_inputs = _standardized(*matrices)
    targets = np.concatenate(
        [np.arange(len(options)) == answer for options, answer in zip(sides[0], _answers(train), strict=True)]
    )
    scores = test_inputs @ _ridge(inputs, targets - targets.mean())
    hits, start = [], 0
    for options, answer in zip(sides[1], _answers(test), strict=True):
        hits.append(int(scores[start : start + len(options)].argmax()) == answer)
        start += len(options)
    return float(np.mean(hits))


def _pixel_features(rows: datasets.Dataset) -> np.ndarray:
    """Mean and standard deviation of each channel of each image, and for each pair of images how they differ."""
    features = []
    for row in rows:
        images = [np.asarray(row[f"image_{i + 1}"]) for i in range(MAX_IMAGES) if row[f"image_{i + 1}"] is not None]
        moments = [
            np.concatenate([image.mean((0, 1)), image.std((0, 1)), [image.mean(), image.std()]]) for image in images
        ]
        pairs = [(i, j) for j in range(len(moments)) for i in range(j)]
        differences = [moments[j] - moments[i] for i, j in pairs]
        distances = [abs(difference) for difference in differences]
        closer = [distances[b] - distances[a] for b in range(len(pairs)) for a in range(b)]
        features.append(np.concatenate([*moments, *differences, *distances, *closer]))
    return np.stack(features)


def pixel_mean_accuracy(train: datasets.Dataset, test: datasets.Dataset) -> float:
    """
    Accuracy on `test` of a linear probe that was trained on `train` and sees means and spreads of the images alone.

    A ridge regression scores each letter by mean and standard deviation of each channel of each image, by their
    differences between images, and by the sizes of those.

    Args:
        train (`datasets.Dataset`): Rows in BLINK's columns.
        test (`datasets.Dataset`): Other rows, of the same kind.

    Returns:
        `float`: Accuracy in 0..1, to be held against [`chance_bounds`].
    """
    inputs, test_inputs = _standardized(_pixel_features(train), _pixel_features(test))
    targets = np.eye(len(LETTERS))[_answers(train)]
    scores = test_inputs @ _ridge(inputs, targets - targets.mean(0))
    num_choices = max(map(len, train["choices"]))
    return float(np.mean(scores[:, :num_choices].argmax(1) == _answers(test)))
