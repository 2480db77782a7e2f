"""Shows a report of what has been read, with ten rows of each source: as a page, and as one picture for a dataset card."""

import html
import json
import math
import os
import re
from base64 import b64decode
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from .report import THUMBNAIL, write_atomically


MAX_CHARACTERS = 2000  # of a question or an answer on the page
MAX_DETAIL = 300  # characters of what a dropped row had
INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")  # but for tabs and line breaks

# A browser that follows this policy loads nothing and runs nothing, whatever the rows hold.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --text: #1b1c1e; --quiet: #5c6066; --paper: #fff; --card: #f4f5f7; --line: #d5d8dc;
  --bar: #3d6fa5; --alarm: #b3261e; }
@media screen and (prefers-color-scheme: dark) { :root { --text: #e6e7e9; --quiet: #a2a7ae; --paper: #16181b;
  --card: #202327; --line: #3a3e44; --bar: #7fa9d8; --alarm: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; color: var(--text); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1, h2, h3, p, ul { margin: 0 0 .6rem; }
h1 { font-size: 1.5rem; line-height: 1.25; }
h2 { font-size: 1.3rem; line-height: 1.25; }
h3 { font-size: 1rem; margin-top: 1.2rem; }
a { color: inherit; }
ul { padding-left: 1.2rem; }
.sum { font-size: 1.15rem; }
.quiet, figcaption, .label, caption { color: var(--quiet); font-size: .85rem; }
.alarm { color: var(--alarm); font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; overflow-wrap: normal; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; padding-top: .4rem; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: right; vertical-align: top; }
td { white-space: nowrap; }
th:first-child, td:first-child, td:nth-child(2), th:nth-child(2) { text-align: left; min-width: 8rem;
  white-space: normal; }
section { margin-top: 2rem; border-top: 2px solid var(--line); padding-top: 1rem; }
section.empty { border: 2px solid var(--alarm); padding: 1rem; }
.bars { list-style: none; padding: 0; max-width: 36rem; }
.bars li { display: grid; grid-template-columns: 8rem 1fr 5.5rem; gap: .6rem; align-items: center; }
.bars i { display: block; height: .7rem; min-width: 1px; background: var(--bar); print-color-adjust: exact;
  -webkit-print-color-adjust: exact; }
.bars li > :last-child { text-align: right; font-variant-numeric: tabular-nums; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); gap: .8rem;
  align-items: start; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .4rem; padding: .7rem;
  break-inside: avoid; }
.pictures { display: flex; flex-wrap: wrap; gap: .5rem; }
figure { margin: 0; }
figure:not(:only-child) { max-width: calc(50% - .25rem); }
img { display: block; max-width: 100%; height: auto; }
.label { margin: .5rem 0 0; }
.said { margin: 0; white-space: pre-wrap; }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } h2, h3 { break-after: avoid; }
  .wide { overflow: visible; } table { font-size: 7.5pt; } th, td { min-width: 0 !important; white-space: normal; } }
"""


def save_report(report, folder, title):
    """
    Writes a report for programs and for people.

    Args:
        report ([`~trainer.data.report.DataReport`]): what has been read.
        folder (`str` or `Path`): made if it is missing.
        title (`str`): of the page.

    Returns:
        `tuple[Path, Path]`: `report.json`, which is `report.to_dict()`, and `report.html`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values = report.to_dict()
    text = json.dumps(values, indent=1, ensure_ascii=False)
    # Half a character has no UTF-8; what Python escapes it to, \ud83d, is how JSON writes it, too.
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    write_atomically(folder / "report.json", text + "\n")
    write_atomically(folder / "report.html", _page(report, values, title))
    return folder / "report.json", folder / "report.html"


def render_page(report, title):
    """
    A report as one HTML page without scripts, that loads nothing.

    Args:
        report ([`~trainer.data.report.DataReport`]): what has been read.
        title (`str`): of the page.

    Returns:
        `str`: its text, everything from the data escaped.
    """
    return _page(report, report.to_dict(), title)


def html_page(title, body, style=""):
    """
    A page without scripts, that loads nothing.

    Args:
        title (`str`): not escaped yet.
        body (`str`): what follows the title, with everything from the data escaped.
        style (`str`, *optional*): CSS behind the one that all pages share.

    Returns:
        `str`: HTML.
    """
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{html.escape(POLICY)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<style>{STYLE}{style}</style>
</head>
<body>
<h1>{_text(title)}</h1>
{body}
</body>
</html>
"""


def _page(report, values, title):
    settings = "; ".join(f"{name} {_text(value)}" for name, value in values["settings"].items() if value is not None)
    unread = ", ".join(_text(name) for name in report.licences if name not in values["sources"])
    sources = report.sources
    sections = [
        _section(number, name, source, sources[name].shown)
        for number, (name, source) in enumerate(values["sources"].items())
    ]
    body = f"""{_sum(values["total"])}
{f'<p class="quiet">Settings: {settings}</p>' if settings else ""}
{f'<p class="alarm">Nothing has been read of: {unread}</p>' if unread else ""}
{_table(values) if sections else '<p class="alarm">Nothing has been read.</p>'}
{"".join(sections)}"""
    return html_page(title, body)


def _sum(counts):
    copies = counts["rows"] - counts["kept"]
    more = f" With {copies:,} copies of them, {counts['rows']:,} rows go out." if copies else ""
    return (
        f'<p class="sum"><b>{counts["read"]:,}</b> rows read = <b>{counts["kept"]:,}</b> kept + '
        f"<b>{counts['dropped']:,}</b> dropped + <b>{counts['not_sampled']:,}</b> not sampled.{more}</p>"
    )


def _table(values):
    processor = values["settings"].get("processor")
    lines = []
    for number, (name, source) in enumerate(values["sources"].items()):
        tokens = source["tokens"]
        if tokens["rows"]:
            lengths = [
                *(" / ".join(f"{tokens[part][key]:,}" for key in ("median", "p95", "most")) for part in ("x", "y")),
                f"{tokens['rows']:,}",
            ]
        else:
            lengths = ["–" if processor or not source["kept"] else "no processor given"] * 2 + ["0"]
        cells = [
            f'<a href="#source-{number}">{_text(name)}</a>',
            _text(source["licence"]),
            f"{source['read']:,}",
            f"{source['kept']:,}" if source["kept"] else '<span class="alarm">none</span>',
            f"{source['rows']:,}",
            _percent(source["rows"], values["total"]["rows"]),
            _images_per_row(source["images_per_row"]),
            _size(source["image_size"]["median"]),
            *lengths,
        ]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    heads = (
        "source, licence, read, kept, rows, share, images per row, median image, x tokens, y tokens, counted over rows"
    )
    return f"""<div class="wide"><table>
<caption>Rows are those kept and their copies. Tokens: median / 95th percentile / most of x, the prompt with its images, and of y,
the completion, under {f"the processor {_text(processor)}" if processor else "the processor that was given"}.</caption>
<thead><tr>{"".join(f"<th>{head}</th>" for head in heads.split(", "))}</tr></thead>
<tbody>{"".join(lines)}</tbody>
</table></div>"""


def _section(number, name, source, shown):
    num_dropped = sum(reason["rows"] for reason in source["dropped"].values())
    reasons = "".join(_reason(text, reason, source["read"]) for text, reason in source["dropped"].items())
    repaired = "".join(f"<li>{_text(text)}: {times:,} times</li>" for text, times in source["repaired"].items())
    parts = [f"<h2>{_text(name)}</h2>", f'<p class="quiet">Licence: {_text(source["licence"])}</p>']
    if not source["kept"]:
        parts.append('<p class="alarm">Nothing of this source was kept.</p>')
    parts.append(_sum({**source, "dropped": num_dropped}))
    if reasons:
        parts.append(f"<h3>Dropped: {num_dropped:,}</h3><ul>{reasons}</ul>")
    if repaired:
        parts.append(f"<h3>Repaired</h3><ul>{repaired}</ul>")
    if source["kept"]:
        sizes = ", ".join(f"{end} {_size(source['image_size'][end])}" for end in ("smallest", "median", "largest"))
        rows = sum(source["images_per_row"].values())
        images = {_plural(int(images), "image"): n / rows for images, n in source["images_per_row"].items()}
        cards = "".join(map(_card, shown))
        parts += [
            f"<h3>Forms of answers</h3>{_bars(source['answers'])}",
            f"<h3>Images of a row</h3>{_bars(images)}<p>Image sizes: {sizes}.</p>",
            f'<h3>{_plural(len(shown.values), "row")}, drawn at random</h3><div class="cards">{cards}</div>',
        ]
    kind = "" if source["kept"] else ' class="empty"'
    return f'<section id="source-{number}"{kind}>\n' + "\n".join(parts) + "\n</section>\n"


def _reason(text, reason, num_read):
    examples = "".join(
        f'<li class="quiet"><code dir="auto">{_text(row["row_id"], MAX_DETAIL)}</code> '
        f"<bdi>{_text(row['detail'], MAX_DETAIL)}</bdi></li>"
        for row in reason["examples"]
    )
    share = _percent(reason["rows"], num_read)
    return f"<li><b>{reason['rows']:,}</b> ({share}) {_text(text)}<ul>{examples}</ul></li>"


def _bars(shares):
    lines = (
        f'<li><span>{_text(name)}</span><i style="width: {100 * share:.1f}%"></i><span>{_percent(share, 1)}</span></li>'
        for name, share in shares.items()
    )
    return f'<ul class="bars">{"".join(lines)}</ul>'


def _card(row):
    figures = "".join(
        f'<figure><img src="data:image/jpeg;base64,{html.escape(image)}" alt="image {number} of {len(row["images"])}">'
        f"<figcaption>{_size(size)}</figcaption></figure>"
        for number, (image, size) in enumerate(zip(row["images"], row["sizes"]), start=1)
    )
    return f"""
<article class="card">
<div class="pictures">{figures}</div>
<p class="label">Question</p><p class="said" dir="auto">{_text(row["question"], MAX_CHARACTERS)}</p>
<p class="label">Answer</p><p class="said" dir="auto">{_text(row["answer"], MAX_CHARACTERS)}</p>
<p class="label"><code dir="auto">{_text(row["row_id"], MAX_DETAIL)}</code></p>
</article>"""


def _text(value, most=MAX_CHARACTERS):
    """A value of the data as it stands in the page: cut, with its invisible characters to be seen, escaped."""
    return html.escape(_visible(value, most))


def _visible(value, most):
    text = str(value)
    cut = f"… and {len(text) - most:,} more characters" if len(text) > most else ""
    return INVISIBLE.sub(lambda match: ascii(match[0])[1:-1], text[:most]) + cut


def _size(size):
    return "–" if size is None else f"{size[0]:,} × {size[1]:,}"


def _percent(part, whole):
    share = 100 * part / max(whole, 1)
    return "under 0.1%" if 0 < share < 0.1 else f"{share:.1f}%"


def _plural(number, noun):
    return f"{number:,} {noun}" + "s" * (number != 1)


def _images_per_row(rows):
    """`1`, or the fewest and the most with what most rows have: `0 to 4, most often 1`."""
    numbers = list(rows)  # in order
    if len(numbers) < 2:
        return "".join(numbers) or "–"
    return f"{numbers[0]} to {numbers[-1]}, most often {max(rows, key=rows.get)}"


# ---------------------------------------------------------------------------------------------------------------------
# One picture
# ---------------------------------------------------------------------------------------------------------------------

NUM_COLUMNS = 5
GAP = 12  # pixels
SHEET_WIDTH = NUM_COLUMNS * (THUMBNAIL + 3 * GAP) + GAP
MAX_SOURCES = 24  # on the picture: a JPEG has 65,500 pixels at most from top to bottom
MAX_PICTURES = 9  # of a row
MAX_LINES = {"question": 6, "answer": 4, "row_id": 1}
COLOURS = {"question": "#1b1c1e", "answer": "#0b4f94", "row_id": "#5c6066"}
PAPER, CARD, HEADING, ALARM = "#ffffff", "#f1f2f4", "#1b1c1e", "#b3261e"


def draw_contact_sheet(report, path):
    """
    Draws ten rows of each source as one picture, for a dataset card, which shows no HTML.

    Args:
        report ([`~trainer.data.report.DataReport`]): what has been read.
        path (`str` or `Path`): of the picture; its suffix says the format.
    """
    path, sources, font = Path(path), report.sources, _font(15)
    strips, drawn = [], set()
    for name, source in list(sources.items())[:MAX_SOURCES]:
        counts = f"{source.kept:,} of {source.read:,} rows kept" if source.kept else "no row was kept"
        heading = f"{_visible(name, 60)}: {counts}"
        strips.append(_heading(heading, HEADING if source.kept else ALARM))
        drawn.update(heading)
        cards = []
        for row in source.shown:
            texts = {key: _wrapped(row[key], font, THUMBNAIL, most) for key, most in MAX_LINES.items()}
            drawn.update("".join(line for lines in texts.values() for line in lines))
            cards.append(_draw_card(row["images"], texts, font))
        strips += [_side_by_side(cards[start : start + NUM_COLUMNS]) for start in range(0, len(cards), NUM_COLUMNS)]
    if len(sources) > MAX_SOURCES:
        strips.append(_heading(f"{len(sources) - MAX_SOURCES} more sources are in report.html", HEADING))
    if not sources:
        strips.append(_heading("Nothing has been read.", ALARM))
    if any(_glyph(font, character) == _glyph(font, "\uffff") for character in drawn):
        note = "A box stands for a character that the font of this picture lacks; report.html has it."
        strips.append(_heading(note, COLOURS["row_id"], size=15))
    sheet = Image.new("RGB", (SHEET_WIDTH, sum(strip.height for strip in strips) + GAP), PAPER)
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    scratch = path.with_name(f".{os.getpid()}.{path.name}")
    sheet.save(scratch, quality=85)
    os.replace(scratch, path)


def _font(size):
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:  # not installed; Pillow's own font has little beside ASCII
        return ImageFont.load_default(size)


def _glyph(font, character):
    mask = font.getmask(character)
    return mask.size, bytes(mask)


def _heading(text, colour, size=22):
    strip = Image.new("RGB", (SHEET_WIDTH, 2 * size + GAP), PAPER)
    (line,) = _wrapped(text, _font(size), SHEET_WIDTH - 2 * GAP, 1)
    ImageDraw.Draw(strip).text((GAP, GAP + size // 2), line, font=_font(size), fill=colour)
    return strip


def _draw_card(images, texts, font):
    """The pictures of a row, its texts below; `texts` are lines by the keys of `MAX_LINES`."""
    tiles, left_out = images[:MAX_PICTURES], len(images[MAX_PICTURES:])
    num_columns = max(math.ceil(math.sqrt(len(tiles))), 1)
    side = (THUMBNAIL - (num_columns - 1) * GAP // 2) // num_columns
    pictures = [ImageOps.contain(Image.open(BytesIO(b64decode(tile))), (side, side)) for tile in tiles]
    top, placed = GAP, []
    for start in range(0, len(pictures), num_columns):
        line = pictures[start : start + num_columns]
        placed += [(picture, (GAP + column * (side + GAP // 2), top)) for column, picture in enumerate(line)]
        top += max(picture.height for picture in line) + GAP // 2
    more = [f"and {_plural(left_out, 'more image')}"] if left_out else []
    lines = [(line, "row_id") for line in more] + [(line, key) for key in MAX_LINES for line in texts[key]]
    line_height = sum(font.getmetrics()) + 1
    card = Image.new("RGB", (THUMBNAIL + 2 * GAP, top + line_height * len(lines) + GAP), CARD)
    for picture, place in placed:
        card.paste(picture, place)
    draw = ImageDraw.Draw(card)
    for number, (line, key) in enumerate(lines):
        draw.text((GAP, top + number * line_height), line, font=font, fill=COLOURS[key])
    return card


def _side_by_side(cards):
    height = max(card.height for card in cards)
    strip = Image.new("RGB", (SHEET_WIDTH, height + GAP), PAPER)
    for number, card in enumerate(cards):
        left = GAP + number * (card.width + GAP)
        strip.paste(CARD, (left, 0, left + card.width, height))
        strip.paste(card, (left, 0))
    return strip


def _wrapped(text, font, width, most):
    """The lines of a text that are at most `width` pixels wide; of more than `most`, the first, with an ellipsis."""
    lines = []
    for paragraph in _visible(text, MAX_DETAIL).splitlines():
        line = ""
        for word in paragraph.split():
            while word:
                longer = f"{line} {word}".lstrip()
                if font.getlength(longer) <= width:
                    line, word = longer, ""
                elif line:
                    lines, line = [*lines, line], ""
                else:  # a word that is wider than a line
                    fits = (end for end in range(len(word), 1, -1) if font.getlength(word[:end]) <= width)
                    end = next(fits, 1)
                    lines, word = [*lines, word[:end]], word[end:]
        lines += [line] if line else []
    if len(lines) > most:
        last = lines[most - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: most - 1], last + "…"]
    return lines
