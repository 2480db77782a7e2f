"""One verdict from the numbers of a diagnosis, by fixed rules."""

from model_cards.markdown import percent


USED, BUT, UNUSED, UNDECIDED = "used", "used, but", "unused", "undecided"
LEAK = "posterior copies the answer (leak)"
SFT, NOT_COMPARED = "sft", "Not compared with same-data SFT."

# None of these is in the paper. They are chosen so that noise does not make a verdict.
NEGLIGIBLE = 0.02  # a loss of accuracy that "unused" must exclude: two points
# For both `MIN_ROWS_*` the rows of one image count once.
MIN_ROWS_UNUSED = 150  # 3 / NEGLIGIBLE: where no row of fewer got worse, two points may still hide (rule of three)
MIN_ROWS_USED = 30  # fewer rows that all got worse give an interval without width
MIN_LOG_PROB = 0.01  # nats; a smaller change of log p(gold) is no use of the latents, however certain
LEAK_MARGIN = (
    0.10  # a wrong answer must be copied this much more often than it is said anyway, at the interval's lower end
)


def decide(numbers):
    """
    Whether the latents are used, from intervals alone.

        used                     another row's Z makes accuracy fall: its whole interval lies below 0
        used, but ...            that, and something takes from it
        posterior copies ...     it is not shown to fall, and the decoder says the wrong answer that the posterior has read
        unused                   a loss of two points lies outside of the interval, log p(gold) is not shown to fall, and there was
                                 accuracy to lose, above the constant answer; or not even log p(gold) moves; or all Z are one
        undecided                everything else: too few rows, no accuracy to lose, log p(gold) falls and no answer gets worse, or
                                 only the form of the reply changes

    Args:
        numbers (`dict`): `num_rows`; `baselines`, with `constant`, the accuracy of a constant answer; `changes`, by intervention
            what [`Change`] holds, or `None`; `copying`, see [`~trainer.diagnostics.leakage.copying`]; `controls`, by name
            `accuracy`, and `difference`, `low` and `high` of its accuracy minus that of the latents.

    Returns:
        `dict`: `word`, one of the five, and `paragraph`, in plain words with the numbers.
    """
    word, sentences = _decide(numbers)
    if SFT not in numbers["controls"]:
        sentences.append(NOT_COMPARED)
    return {"word": word, "paragraph": " ".join(sentences)}


def _decide(numbers):
    """Word and sentences."""
    changes, copied = numbers["changes"], numbers["copying"]
    swap, own = changes["swapped"], changes["own"]
    leak = copied["low"] > LEAK_MARGIN and copied["num_groups"] >= MIN_ROWS_USED
    if swap is None:
        word, sentence = _all_alike(numbers, own)
        return LEAK if leak else word, [sentence, *_leak(numbers, leak)]
    sentences = [_swap(own, swap)]
    enough = swap["num_groups"] >= MIN_ROWS_USED
    only_form = enough and swap["flip_rate"] < NEGLIGIBLE <= swap["text_flip_rate"]
    if swap["high"] < 0 and enough and not only_form:
        objections = _objections(numbers, leak)
        return BUT if objections else USED, [*sentences, *objections, *_few(changes), *_helped(changes, objections)]
    word, reason = _not_shown(numbers, own, swap)
    if only_form:
        sentences.append("Only the form of the reply moves, not what it says.")
    if only_form and swap["high"] < 0:
        word, reason = UNDECIDED, "Accuracy falls since it asks for the exact form."
    sentences.append(reason)
    if changes["zero"]["high"] < 0:
        sentences.append(
            f"Something must stand in their place, though: zeros change accuracy by {_interval(changes['zero'])}."
        )
    return LEAK if leak else word, [*sentences, *_leak(numbers, leak)]


def _not_shown(numbers, own, swap):
    """Unused or undecided, and why, where no fall of accuracy is shown."""
    lost, constant = f"A loss of {100 * NEGLIGIBLE:.0f} points", numbers["baselines"]["constant"]
    if swap["num_groups"] < MIN_ROWS_USED:
        return UNDECIDED, f"That is too few rows: ask questions of {MIN_ROWS_UNUSED} images or more."
    if _nothing_moves(swap):
        return UNUSED, "Nothing moves."
    if swap["low"] <= -NEGLIGIBLE or swap["num_groups"] < MIN_ROWS_UNUSED:
        return UNDECIDED, (
            f"{lost} is neither shown nor excluded: ask questions of more images than {swap['num_groups']}."
        )
    if own["accuracy"] <= constant + NEGLIGIBLE:
        return UNDECIDED, f"{lost} is excluded, but there is none to lose: a constant answer has {percent(constant)}."
    if swap["log_prob_high"] < -MIN_LOG_PROB:
        return UNDECIDED, f"{lost} is excluded, but the latents move what the model finds likely."
    return UNUSED, f"{lost} is excluded."


def _nothing_moves(found):
    """Not one answer, and log p(gold) by next to nothing."""
    still = found["log_prob_low"] > -MIN_LOG_PROB and found["log_prob_high"] < MIN_LOG_PROB
    return found["text_flip_rate"] == 0 and still


def _few(changes):
    """A sentence where too few rows share a question to tell whether images are told apart."""
    same = changes["swapped, same question"]
    num_groups = 0 if same is None else same["num_groups"]
    if num_groups >= MIN_ROWS_USED:
        return []
    return [
        f"Whether they tell images apart under one question is left open: {num_groups} images could be swapped so, and it takes "
        f"{MIN_ROWS_USED}."
    ]


def _objections(numbers, leak):
    """What takes from the use of the latents, in sentences."""
    changes, found = numbers["changes"], []
    for name, what in (
        ("shared mean", "one tensor shared by all rows serves as well as their own"),
        ("latents off", "the same weights answer as well with the latents switched off"),
    ):
        if changes[name]["high"] >= 0:
            found.append(f"But {what}, as far as can be told: a change of {_interval(changes[name])}.")
    same = changes["swapped, same question"]
    if same is not None and same["num_groups"] >= MIN_ROWS_USED and same["high"] >= 0:
        found.append(
            "But it is not shown that they tell images apart: with the Z of another image under the same question accuracy "
            f"changes by {_interval(same)} on {same['num_rows']} rows."
        )
    for name, control in numbers["controls"].items():
        if control["high"] >= 0:
            how = "better than" if control["low"] > 0 else "not shown to be worse than"
            found.append(
                f"But the control `{name}` is {how} the latents: {percent(control['accuracy'])}, a difference of {_interval(control)}."
            )
    return found + [f"But the posterior leaks. {sentence}" for sentence in _leak(numbers, leak)]


def _leak(numbers, leak):
    copied = numbers["copying"]
    if not leak:
        return []
    return [
        f"Fed a wrong answer, the posterior makes the decoder say it in {percent(copied['rate'])} of the rows, against "
        f"{percent(copied['base_rate'])} with the prior's Z ({_interval(copied)}): accuracy under the posterior says nothing of "
        "what the model knows."
    ]


def _all_alike(numbers, own):
    """Where no row had another Z to swap with: unused, unless the rows' mean in its place says otherwise."""
    mean, accuracy = numbers["changes"]["shared mean"], f"accuracy is {percent(own['accuracy'])}."
    if _nothing_moves(mean):
        alike = f"All {numbers['num_rows']} rows have one and the same Z, which can tell nothing of any; {accuracy}"
        return UNUSED, alike
    return UNDECIDED, (
        f"No row had another Z to swap with, yet the mean of all in its place changes accuracy by {_interval(mean)} and log p(gold) "
        f"by {mean['log_prob']:+.3f} nats; {accuracy}"
    )


def _swap(own, swap):
    return (
        f"With another row's Z accuracy goes from {percent(swap['accuracy'] - swap['difference'])} to {percent(swap['accuracy'])}, a change of "
        f"{_interval(swap)} on {swap['num_rows']} rows; {percent(swap['flip_rate'])} of the answers say something else, "
        f"{percent(swap['text_flip_rate'])} are another text, and "
        f"log p(gold) changes by {swap['log_prob']:+.3f} nats ({swap['log_prob_low']:+.3f} to {swap['log_prob_high']:+.3f})."
    )


def _helped(changes, objections):
    if objections:
        return []
    return [
        f"One tensor shared by all rows changes accuracy by {_interval(changes['shared mean'])}, switching the latents off by "
        f"{_interval(changes['latents off'])}."
    ]


def _interval(found):
    return f"{100 * found['difference']:+.1f} points ({100 * found['low']:+.1f} to {100 * found['high']:+.1f})"
