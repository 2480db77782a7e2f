"""What a card shows of a benchmark: all arms of one harness, and which of them this checkpoint is, by its weights."""

import json
import math

from huggingface_hub import EvalResult, hf_hub_url

from .markdown import cell, code, table
from .metadata import is_hub_id


HEAD = [
    "asked",
    "accuracy, per cent [95% interval]",
    "latents",
    "k",
    "tau",
    "unparsed",
    "likeliest letter, per cent",
    "tokens per answer",
    "image budget",
]
OF_AN_ARM = {
    "path": str,
    "model_type": str,
    "latents": str,
    "k": int | None,
    "tau": float | int | None,
    "image_budget": dict,
    "weights_sha256": str | None,
    "unparsed": int,
    "letter_accuracy": dict | None,
    "tokens_per_answer": float | int,
    "intervals": dict,
}
TOTAL = "total"
HUB_SPLITS = {  # of the benchmarks that have more than one config or split: `{task}` is a config each
    "blink": ("{task}", "val"),
    "blink_paper": ("{task}", "val"),
    "vstar": (None, "test"),
    "hrbench_4k": ("hrbench_version_split", "hrbench_4k"),
    "hrbench_8k": ("hrbench_version_split", "hrbench_8k"),
}


def check_results(results, path):
    """
    Refuses what is no `results.json` of recipes/evaluate_amvl.py, before any of it gets into a card.

    Args:
        results (`dict`): what the file holds.
        path (`str` or `Path`): how an error calls it.

    Raises:
        ValueError: something is missing, or of another kind.
    """
    wrong = [name for name, kind in TOP.items() if not isinstance(results.get(name), kind)]
    if not wrong:
        wrong = _wrong_inside(results)
    if wrong:
        raise ValueError(
            f"`{path}` is no `results.json` of recipes/evaluate_amvl.py, or one of an older release: it has no or other values of "
            f"{wrong[:5]}. Evaluate again; answers that are there are not asked for again."
        )


TOP = {
    "benchmark": str,
    "rule": str,
    "num_questions": dict,
    "settings": dict,
    "data": dict,
    "columns": dict,
    "arms": dict,
    "differences": list,
}


def _wrong_inside(results):
    columns, tasks, wrong = results["columns"], results["num_questions"], []
    if TOTAL not in tasks:
        return ["num_questions.total"]
    wrong += [f"num_questions.{task}" for task, rows in tasks.items() if not _is_number(rows, 1, math.inf)]
    wrong += [f"settings.{key}" for key in ("seed", "questions", "max_new_tokens") if key not in results["settings"]]
    wrong += [f"data.{key}" for key in ("missing_tasks",) if not isinstance(results["data"].get(key), list)]
    for name in ("chance", "constant", *results["arms"]):
        column = columns.get(name)
        column = column if isinstance(column, dict) else {}
        wrong += [f"columns.{name}.{task}" for task in tasks if not _is_number(column.get(task), 0, 1)]
    for name, arm in results["arms"].items():
        if not isinstance(arm, dict):
            return [*wrong, f"arms.{name}"]
        arm.setdefault("weights_sha256", None)  # of an older release
        wrong += [f"arms.{name}.{key}" for key, kind in OF_AN_ARM.items() if not isinstance(arm.get(key), kind)]
        intervals = arm.get("intervals") if isinstance(arm.get("intervals"), dict) else {}
        likeliest = arm.get("letter_accuracy")
        if isinstance(likeliest, dict) and not _is_number(likeliest.get(TOTAL), 0, 1):
            wrong.append(f"arms.{name}.letter_accuracy.{TOTAL}")
        wrong += [f"arms.{name}.intervals.{task}" for task in tasks if not _is_interval(intervals.get(task))]
    for number, entry in enumerate(results["differences"]):
        entry = entry if isinstance(entry, dict) else {}
        named = all(entry.get(key) in results["arms"] for key in ("first", "second")) and entry.get("task") in tasks
        if not named or not all(_is_number(entry.get(key), -1, 1) for key in ("difference", "low", "high")):
            wrong.append(f"differences[{number}]")
    return wrong


def _is_number(value, least, most):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most


def _is_interval(value):
    return isinstance(value, list) and len(value) == 2 and all(_is_number(end, 0, 1) for end in value)


def arms_of(results, fingerprint):
    """The names of the arms that had the weights of a checkpoint, asked with its latents or without."""
    return [name for name, arm in results["arms"].items() if arm["weights_sha256"] == fingerprint]


def refuse_results_of_others(results, path, folder, fingerprint):
    """
    Refuses results in which no arm has the weights of a checkpoint.

    Args:
        results (`dict`): see [`check_results`].
        path (`str` or `Path`): of its file.
        folder (`str` or `Path`): of the checkpoint.
        fingerprint (`str`): of its weights.

    Raises:
        ValueError: it names the arms that there are, and what they were.
    """
    if arms_of(results, fingerprint):
        return
    found = ", ".join(
        f"{name}={arm['path']} ({(arm['weights_sha256'] or 'not known')[:12]})"
        for name, arm in results["arms"].items()
    )
    raise ValueError(
        f"`results` has `{path}`, none of whose models has the weights of `{folder}`, {fingerprint:.12}: {found}. The weights were "
        "trained on since, or it is another model: evaluate it again."
    )


def render_results(results, fingerprint):
    """
    A benchmark as Markdown: every arm with chance and the constant answer, differences to this model, and the settings.

    Args:
        results (`dict`): see [`check_results`].
        fingerprint (`str`): of the checkpoint's weights.

    Returns:
        `str`.
    """
    columns, arms, settings, tasks = (results[key] for key in ("columns", "arms", "settings", "num_questions"))
    ours = arms_of(results, fingerprint)
    rows = [[name, f"{100 * columns[key][TOTAL]:.1f}", *[""] * 7] for key, name in GUESSES.items()]
    for name, arm in arms.items():
        low, high = arm["intervals"][TOTAL]
        asked = f"**{cell(name)}: this checkpoint**" if name in ours else f"{cell(name)}: {code(arm['path'])}"
        rows.append(
            [
                asked,
                f"{100 * columns[name][TOTAL]:.1f} [{100 * low:.1f}, {100 * high:.1f}]",
                cell(arm["latents"]),
                *("" if arm[key] is None else f"{arm[key]}" for key in ("k", "tau")),
                f"{arm['unparsed']:,}",
                "" if arm["letter_accuracy"] is None else f"{100 * arm['letter_accuracy'][TOTAL]:.1f}",
                f"{arm['tokens_per_answer']:.1f}",
                cell(_budget(arm["image_budget"])),
            ]
        )
    lines = [f"### {cell(results['benchmark'])}, {tasks[TOTAL]:,} questions, {cell(results['rule'])}", ""]
    lines += [f"**{sentence}**\n" for sentence in _not_the_benchmark(results)]
    lines += [f"**{sentence}**\n" for sentence in _warnings(results, ours)]
    lines += [table(HEAD, rows, right=(1, 3, 4, 5, 6, 7)), ""]
    for entry in results["differences"]:
        pair = entry["second"], entry["first"]
        if entry["task"] == TOTAL and any(name in ours for name in pair):
            lines.append(
                f"- {' minus '.join(map(cell, pair))}: {100 * entry['difference']:+.1f} points [{100 * entry['low']:+.1f}, "
                f"{100 * entry['high']:+.1f}], on the same questions"
            )
    named = [name for name in tasks if name != TOTAL]
    if len(named) > 1:
        shown = GUESSES | {name: cell(name) for name in arms}
        by_task = [
            [cell(task), f"{tasks[task]:,}", *(f"{100 * columns[key][task]:.1f}" for key in shown)] for task in named
        ]
        heads = ["task", "questions", *shown.values()]
        body = table(heads, by_task, right=range(1, len(heads)))
        lines += ["", f"<details><summary>By task, per cent</summary>\n\n{body}\n\n</details>"]
    told = {
        "data": _data_of(results)[2],
        "revision": settings.get("revision") or results["data"].get("commit"),
        "questions": settings["questions"],
        "seed": settings["seed"],
        "max_new_tokens": settings["max_new_tokens"],
        "dtype": settings.get("dtype"),
    }
    shown = ", ".join(f"{key} {cell(value)}" for key, value in told.items() if value is not None)
    note = (
        "One prompt and one reading of the replies for all, greedy replies; always one letter: the one that is right most often on these very rows; "
        "unparsed: no single option could be read, counted as wrong; likeliest letter: a second reading, by likelihood. "
        f"{shown[0].upper()}{shown[1:]}."
    )
    return "\n".join([*lines, "", note])


GUESSES = {"chance": "chance", "constant": "always one letter"}


def _budget(budget):
    return ", ".join(f"{key} {json.dumps(value)}" for key, value in sorted(budget.items())).replace('"', "") or "none"


def _warnings(results, ours):
    """What must not be read over in the table: a model that guesses, or does not answer."""
    sentences, columns, rows = [], results["columns"], results["num_questions"][TOTAL]
    best = max(columns[name][TOTAL] for name in GUESSES)
    for name in ours:
        arm = results["arms"][name]
        if arm["intervals"][TOTAL][0] <= best:
            sentences.append(f"{cell(name)} is not shown to be better than guessing, {100 * best:.1f} per cent.")
        if arm["unparsed"] > rows / 20:
            sentences.append(f"{arm['unparsed']:,} of {rows:,} replies of {cell(name)} could not be read.")
    return sentences


def _not_the_benchmark(results):
    """Why a score is not that of the benchmark, if it is not."""
    missing, most = results["data"]["missing_tasks"], results["settings"].get("max_rows")
    sentences = []
    if missing:
        sentences.append(f"Not the benchmark's score: {len(missing)} of its tasks were not asked.")
    if most is not None and results["settings"].get("data") is not None:
        sentences.append(f"Not the benchmark's score: at most {cell(most)} rows of each task were asked.")
    return sentences


def _data_of(results):
    """Hub id or a word for it, its name, and a sentence: where the questions came from."""
    benchmark, data = results["benchmark"], results["settings"].get("data")
    if data is None:
        return benchmark, f"{benchmark}, made by the evaluation", "made by the evaluation"
    if "data_files" in results["settings"] or not is_hub_id(data):
        return benchmark, f"{benchmark}, from a local copy", "a local copy"
    return data, benchmark, data


def eval_results(results, fingerprint, hub_model_id=None, file=None):
    """
    A benchmark for the metadata of a card: what this checkpoint scored with its own latents, in total and by task.

    Args:
        results (`dict`): see [`check_results`].
        fingerprint (`str`): of the checkpoint's weights.
        hub_model_id (`str`, *optional*), file (`str`, *optional*): where the results will be found, to name them as the source.

    Returns:
        `list[EvalResult]`: none of latents switched off, and none of a part of a benchmark.
    """
    if _not_the_benchmark(results):
        return []
    found, settings = [], results["settings"]
    type_, name, _ = _data_of(results)
    on_hub = type_ == settings.get("data")
    config, split = HUB_SPLITS.get(results["benchmark"], (None, None)) if on_hub else (None, None)
    revision = settings.get("revision") or results["data"].get("commit")
    source = {}
    if hub_model_id and file:
        source = {
            "source_name": "recipes/evaluate_amvl.py of AMVL for Hugging Face",
            "source_url": hf_hub_url(hub_model_id, file),
        }
    for arm_name in arms_of(results, fingerprint):
        arm = results["arms"][arm_name]
        if arm["model_type"] == "amvl" and arm["latents"] != "prior":
            continue
        per_task = config == "{task}"
        whole = {key: settings[key] for key in ("seed", "max_new_tokens")} | {"image_budget": arm["image_budget"]}
        for task, rows in results["num_questions"].items():
            is_total = task == TOTAL
            found.append(
                EvalResult(
                    task_type="image-text-to-text",
                    task_name="Multiple choice about images",
                    dataset_type=type_,
                    dataset_name=name,
                    dataset_config=None if per_task and is_total else (task if per_task else config),
                    dataset_split=split,
                    dataset_revision=revision if on_hub else None,
                    metric_type="accuracy",
                    metric_name=f"accuracy, {results['rule']}" if is_total else f"accuracy: {task}",
                    metric_value=round(100 * results["columns"][arm_name][task], 2),
                    metric_args={"k": arm["k"], "tau": arm["tau"], "rows": rows} | (whole if is_total else {}),
                    **source,
                )
            )
    return found
