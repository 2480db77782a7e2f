"""Shows the results of a benchmark: for programs, as Markdown, and as a page with a chart and some answers."""

import html
import json
import random
from base64 import b64encode
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageOps

from ..data.report import THUMBNAIL, write_atomically
from ..data.report_page import INVISIBLE, html_page
from .reply import read_reply
from .results import TOTAL


MAX_SHOWN = 12  # questions on the page: as many as there are on which the arms differ, up to half
MAX_CHARACTERS = 600
OWN_STYLE = """
th:nth-child(2), td:nth-child(2) { text-align: right; min-width: 0; }
h2 { margin-top: 1.6rem; }
.arms td:nth-child(2) { text-align: left; }
.arms td:last-child { text-align: left; white-space: normal; min-width: 14rem; }
tr.total td { font-weight: 600; border-top: 2px solid var(--line); }
.card table { width: 100%; margin-top: .5rem; font-size: .85rem; }
.card td { white-space: pre-wrap; overflow-wrap: anywhere; text-align: left; }
.right { color: #1b7f3b; } .wrong { color: var(--alarm); }
img.chart { background: #fff; border-radius: .4rem; }
"""
NOTES = """\
chance: one over the number of options. constant: always one letter, the one that is right most often on these very rows
{constant}. Intervals, 95%: Wilson's for a mean over rows of its own; a bootstrap for {drawn}, too narrow where nearly all
rows are right or wrong; a paired bootstrap for differences{groups}. unparsed: replies in which no single option can be
read; they count as wrong. likeliest letter: a second reading, the option whose letter the model finds likeliest as the
start of its answer."""


def save_results(results, question_set, answers, folder):
    """
    Writes `results.json`, `results.md` and `results.html`.

    Args:
        results (`dict`): what [`summarize`] gave.
        question_set ([`QuestionSet`]), answers (`dict`): some of them are shown.
        folder (`str` or `Path`): where to write.

    Returns:
        `str`: the Markdown.
    """
    folder = Path(folder)
    text = render_markdown(results)
    write_atomically(folder / "results.json", json.dumps(results, indent=1) + "\n")
    write_atomically(folder / "results.md", text + "\n")
    write_atomically(folder / "results.html", render_page(results, question_set, answers))
    return text


def tables_of(results):
    """
    The tables of a page.

    Returns:
        `list[tuple[str, list[str], list[list[str]]]]`: caption, heads and cells of scores, differences, and what each arm is.
    """
    columns, letters = results["columns"], results["constant_letters"]
    tasks = [*(task for task in results["num_questions"] if task != TOTAL), TOTAL]
    scores = []
    for task in tasks:
        cells = [f"{results['rule']}" if task == TOTAL else task, f"{results['num_questions'][task]:,}"]
        for name, column in columns.items():
            cell = f"{100 * column[task]:.1f}"
            if name == "constant" and len(letters[task]) == 1:
                cell += f" ({letters[task]})"
            if name in results["arms"]:
                low, high = results["arms"][name]["intervals"][task]
                cell += f" [{100 * low:.1f}, {100 * high:.1f}]"
            cells.append(cell)
        scores.append(cells)
    differences = [
        [f"{entry['second']} - {entry['first']}", *_signed(entry)]
        for entry in results["differences"]
        if entry["task"] == TOTAL
    ]
    arms = []
    for name, arm in results["arms"].items():
        likeliest = "-" if arm["letter_accuracy"] is None else f"{100 * arm['letter_accuracy'][TOTAL]:.1f}"
        arms.append(
            [
                name,
                f"{arm['path']} ({arm['model_type']})",
                arm["latents"],
                *("-" if arm[key] is None else f"{arm[key]}" for key in ("k", "tau")),
                f"{results['settings']['seed']}",
                f"{arm['unparsed']:,}",
                likeliest,
                f"{arm['tokens_per_answer']:.1f}",
                f"{arm['seconds_per_answer']:.3f}",
                _budget(arm["image_budget"]),
            ]
        )
    return [
        ("Accuracy, per cent, with its 95% interval", ["task", "rows", *columns], scores),
        (
            f"Differences on the same rows, {results['rule']}, points; results.json has those of each task",
            ["difference", "points", "95% interval"],
            differences,
        ),
        (
            "What was asked, and what an answer cost",
            [
                "arm",
                "model",
                "latents",
                "k",
                "tau",
                "seed",
                "unparsed",
                "likeliest letter",
                "tokens",
                "seconds",
                "image budget",
            ],
            arms,
        ),
    ]


def _signed(entry):
    interval = f"[{100 * entry['low']:+.1f}, {100 * entry['high']:+.1f}]"
    return [f"{100 * entry['difference']:+.1f}", interval]


def _budget(budget):
    return ", ".join(f"{key} {json.dumps(value)}" for key, value in sorted(budget.items())).replace('"', "") or "none"


def _sentences(results):
    """What has to be known beside the tables."""
    data, settings, lines = results["data"], results["settings"], []
    dropped = sum(entry["rows"] for entry in data["dropped"].values())
    asked = results["num_questions"][TOTAL]
    lines.append(f"{data['read']:,} rows read, {asked:,} asked, {dropped:,} left out.")
    lines += [
        f"Left out: {entry['rows']:,} with {reason}, as {entry['examples'][0]}."
        for reason, entry in data["dropped"].items()
    ]
    if data["missing_tasks"]:
        lines.append(
            f"NOT the benchmark's score: {len(data['missing_tasks'])} of its tasks have no row, {', '.join(data['missing_tasks'])}."
        )
    if settings.get("max_rows") and settings.get("data"):
        lines.append(f"NOT the benchmark's score: at most {settings['max_rows']} rows of each part were read.")
    if len({json.dumps(arm["image_budget"], sort_keys=True) for arm in results["arms"].values()}) > 1:
        lines.append("The image budgets differ, which alone may change the scores.")
    shown = "; ".join(f"{key} {value!r}" for key, value in settings.items() if value is not None)
    constant = "of each task" if results["rule"] == "mean over tasks" else "of each line"
    drawn = "rotations of a question" if results["benchmark"].startswith("hrbench") else "a mean over tasks"
    groups = ", rotations of a question drawn together" if results["benchmark"].startswith("hrbench") else ""
    return [
        *lines,
        f"Settings: {shown}.",
        NOTES.format(constant=constant, groups=groups, drawn=drawn).replace("\n", " "),
    ]


def render_markdown(results):
    """The results as Markdown."""
    parts = [f"# {results['benchmark']}"]
    for caption, heads, rows in tables_of(results):
        if not rows:
            continue
        widths = [max(len(cells[place]) for cells in [heads, *rows]) for place in range(len(heads))]
        lines = [" | ".join(cell.ljust(width) for cell, width in zip(cells, widths)) for cells in [heads, *rows]]
        lines.insert(1, " | ".join("-" * width for width in widths))
        parts.append(f"{caption}:\n\n" + "\n".join(f"| {line} |" for line in lines))
    return "\n\n".join([*parts, *_sentences(results)])


def render_page(results, question_set, answers):
    """The results as one HTML page without scripts, that loads nothing; everything from the data escaped."""
    tables = "".join(_table(*table, results["rule"]) for table in tables_of(results) if table[2])
    sentences = "".join(
        f'<p class="{"alarm" if text.startswith("NOT") else "quiet"}">{_text(text, 4000)}</p>'
        for text in _sentences(results)
    )
    chart = _chart(results)
    drawn = (
        f'<p><img class="chart" src="data:image/png;base64,{chart}" alt="accuracy per task"></p>'
        if chart
        else '<p class="quiet">The chart needs matplotlib.</p>'
    )
    cards = "".join(_card(question_set.questions[number], number, answers) for number in _shown(question_set, answers))
    title = f"{results['benchmark']}: {', '.join(results['arms'])}"
    body = f"""{drawn}
{tables}
{sentences}
<h2>Some answers</h2>
<p class="quiet">Drawn at random; up to half of them are questions on which the arms differ.</p>
<div class="cards">{cards}</div>"""
    return html_page(title, body, OWN_STYLE)


def _table(caption, heads, rows, rule):
    kind = "arms" if heads[0] == "arm" else "scores"
    head = "".join(f"<th>{_text(name)}</th>" for name in heads)
    lines = "".join(_line(cells, rule) for cells in rows)
    return (
        f'<h2>{_text(caption)}</h2><div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _line(cells, rule):
    kind = ' class="total"' if cells[0] == rule else ""
    return f"<tr{kind}>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>"


def _text(value, most=MAX_CHARACTERS):
    text = str(value)
    text = text if len(text) <= most else text[:most] + "…"
    return html.escape(INVISIBLE.sub(lambda match: ascii(match[0])[1:-1], text))


def _shown(question_set, answers):
    """Numbers of the questions to show."""
    rng, numbers = random.Random(0), list(range(len(question_set.questions)))
    differing = [
        number
        for number in numbers
        if len({_read(question_set.questions[number], given[number]) for given in answers.values()}) > 1
    ]
    shown = rng.sample(differing, min(MAX_SHOWN // 2, len(differing)))
    others = [number for number in numbers if number not in set(shown)]
    return sorted(shown + rng.sample(others, min(MAX_SHOWN - len(shown), len(others))))


def _read(question, answer):
    return read_reply(answer["text"], question.options, question.num_options)


def _card(question, number, answers):
    figures = "".join(
        f'<figure><img src="data:image/jpeg;base64,{_thumbnail(path)}" alt="image {place}"></figure>'
        for place, path in enumerate(question.images, start=1)
    )
    lines = []
    for name, given in answers.items():
        letter = _read(question, given[number])
        kind = "right" if letter == question.gold else "wrong"
        lines.append(
            f'<tr><td>{_text(name)}</td><td class="{kind}">{letter or "unparsed"}</td><td>{_text(given[number]["text"], 200)}</td></tr>'
        )
    return f"""
<article class="card">
<div class="pictures">{figures}</div>
<p class="label">{_text(question.task)}, {_text(question.row_id)}</p><p class="said" dir="auto">{_text(question.prompt)}</p>
<p class="label">Right: {question.gold}</p>
<table>{"".join(lines)}</table>
</article>"""


def _thumbnail(path):
    with Image.open(path) as opened:
        opened.draft("RGB", (THUMBNAIL, THUMBNAIL))
        buffer = BytesIO()
        ImageOps.contain(opened.convert("RGB"), (THUMBNAIL, THUMBNAIL)).save(buffer, "JPEG", quality=80)
    return b64encode(buffer.getvalue()).decode()


def _chart(results):
    """Accuracy per task with its interval, chance and the constant answer as lines; a PNG in base64."""
    try:
        from matplotlib.figure import Figure
    except ImportError:  # a broken one: questions were paid for
        return None
    tasks = [*(task for task in results["num_questions"] if task != TOTAL), TOTAL]
    arms, columns = results["arms"], results["columns"]
    figure = Figure(figsize=(11, 1.2 + 0.22 * len(tasks) * (len(arms) + 1)), layout="constrained")
    axis = figure.subplots()
    height = 0.8 / len(arms)
    for place, (name, arm) in enumerate(arms.items()):
        centers = [line - 0.4 + height * (place + 0.5) for line in range(len(tasks))]
        values = [100 * columns[name][task] for task in tasks]
        ends = [[100 * end for end in arm["intervals"][task]] for task in tasks]
        spans = [
            [max(value - low, 0) for value, (low, _) in zip(values, ends)],
            [max(high - value, 0) for value, (_, high) in zip(values, ends)],
        ]
        axis.barh(
            centers, values, height=0.9 * height, xerr=spans, label=name, error_kw={"elinewidth": 1, "capsize": 2}
        )
    for name, style in (("chance", "-"), ("constant", ":")):
        for line, task in enumerate(tasks):
            label = name if line == 0 else None
            axis.plot(
                [100 * columns[name][task]] * 2, [line - 0.45, line + 0.45], "k" + style, linewidth=1.4, label=label
            )
    axis.set_yticks(range(len(tasks)), [results["rule"] if task == TOTAL else task for task in tasks])
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.set_xlabel("accuracy, per cent; bars: 95% interval")
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=min(len(arms) + 2, 6), fontsize=9)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return b64encode(buffer.getvalue()).decode()
