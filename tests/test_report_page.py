"""The page and the picture of a report: every row accounted for, every picture there, nothing of the data taken as markup."""

import io
import json
import re
from base64 import b64decode
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image, ImageFont

from trainer.data import report_page
from trainer.data.report import NUM_SHOWN, DataReport, SourceReport, write_part
from trainer.data.report_page import (
    GAP,
    MAX_CHARACTERS,
    MAX_SOURCES,
    POLICY,
    draw_contact_sheet,
    render_page,
    save_report,
)
from trainer.data.rows import IMAGE, BadRow, message


pytestmark = pytest.mark.any_release


VOID = {"meta", "img"}
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "b", "a", "div", "table", "caption"),
    *("thead", "tbody", "tr", "th", "td", "section", "ul", "li", "i", "span", "bdi", "code", "article", "figure"),
    *("figcaption", "img"),
}
ATTRIBUTES = {"lang", "charset", "http-equiv", "content", "name", "class", "id", "href", "style", "src", "alt", "dir"}
HOSTILE = """</p></style><script>alert(1)</script>"><img src=x onerror='alert(2)'>&lt;{{ x }}"""
BROKEN = "half \ud83d a character, null \x00, bell \x07"


class Page(HTMLParser):
    """The texts of a page by tag, its pictures, and a complaint about any tag that does not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.images, self.attributes, self.tags = [], [], [], [], set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag == "img":
            prefix, data = dict(attributes)["src"].split(",")
            assert prefix == "data:image/jpeg;base64"
            self.images.append(Image.open(io.BytesIO(b64decode(data, validate=True))))
            self.images[-1].load()
        if tag not in VOID:
            self.texts.append([tag, dict(attributes).get("class"), ""])
            self.open.append(self.texts[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open:
            self.open[-1][2] += data

    def of(self, tag, kind=None):
        """The text of each element of a name and class, without that of elements in it."""
        return [text for name, found, text in self.texts if name == tag and found == kind]


def picture(size=(64, 48), colour="red"):
    image = Image.new("RGB", size, colour)
    image.info["size"] = size  # as `check_image` leaves it
    return image


def row(row_id, question="How many?", answer="4", num_images=1):
    return {
        "prompt": [message("system", "You help."), message("user", *[IMAGE] * num_images, question)],
        "completion": [message("assistant", answer)],
        "row_id": row_id,
    }


def source(num_kept=0, num_dropped=0, num_not_sampled=0, count_tokens=None, copies=0, **values):
    report = SourceReport()
    report.read, report.not_sampled = num_kept + num_dropped + num_not_sampled, num_not_sampled
    for number in range(num_kept):
        report.keep(row(f"row {number}", **values), [picture()] * values.get("num_images", 1), count_tokens, copies)
    for number in range(num_dropped):
        report.drop(BadRow("an image file that is missing", f"{number}.png"), f"bad {number}")
    return report


def report_of(folder, sources, **values):
    for number, (name, part) in enumerate(sources.items()):
        write_part(folder / "parts", str(number), {name: part})
    return DataReport(folder / "parts", **values)


def numbers(text):
    return [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", text)]


def sums(page):
    """What each sum line says: rows read, kept, dropped, not sampled."""
    return [numbers(line)[:4] for line in re.findall(r'<p class="sum">(.*?)</p>', page)]


def test_every_row_that_was_read_is_accounted_for(tmp_path):
    sources = {"a": source(3, 2, 5), "b": source(1200, 40, copies=1), "c": source(0, 7)}
    page = render_page(report_of(tmp_path, sources), "rows")
    assert sums(page) == [[1257, 1203, 49, 5], [10, 3, 2, 5], [1240, 1200, 40, 0], [7, 0, 7, 0]]
    assert all(read == kept + dropped + not_sampled for read, kept, dropped, not_sampled in sums(page))
    assert "With 1,200 copies of them, 2,403 rows go out." in page
    cells = Page(page).of("td")
    assert {"99.9%", "0.1%", "0.0%"} <= set(cells)  # 2400, 3 and 0 of 2403 rows


def test_a_small_share_is_not_rounded_to_none(tmp_path):
    page = render_page(report_of(tmp_path, {"a": source(1), "b": source(3000)}), "rows")
    assert "under 0.1%" in Page(page).of("td")


def test_ten_cards_at_most_with_all_pictures_in_order_and_their_stored_sizes(tmp_path):
    report = SourceReport()
    report.read = 30
    pictures = [picture((640, 480), "red"), picture((300, 900), "lime"), picture((8, 1600), "blue")]
    for number in range(30):
        report.keep(row(f"row {number}", f"question {number}\nsecond line", "B", 3), pictures)
    page = Page(render_page(report_of(tmp_path, {"a": report, "few": source(2)}), "rows"))
    assert page.of("figcaption") == ["640 × 480", "300 × 900", "8 × 1,600"] * NUM_SHOWN + ["64 × 48"] * 2
    assert len(page.of("article", "card")) == NUM_SHOWN + 2
    assert page.of("h3")[-1] == "2 rows, drawn at random"
    dominant = [int(np.asarray(image).mean((0, 1)).argmax()) for image in page.images[: 3 * NUM_SHOWN]]
    assert dominant == [0, 1, 2] * NUM_SHOWN
    said, ids = page.of("p", "said"), page.of("code")
    for number in range(NUM_SHOWN):  # what stands in a card belongs together
        assert said[2 * number] == f"question {ids[number].removeprefix('row ')}\nsecond line"
        assert said[2 * number + 1] == "B"


@pytest.mark.parametrize("text", [HOSTILE, BROKEN])
def test_nothing_of_the_data_is_taken_as_markup_or_breaks_writing(tmp_path, text):
    report = source(2, question=text, answer=text)
    report.read += 2
    report.keep(row(text), [picture()])
    report.drop(BadRow(text, text), text)
    report.repaired[text] += 1
    report = report_of(
        tmp_path, {text: report}, licences={text: text, f"{text} unread": ""}, settings={"answer": text}
    )
    json_path, page_path = save_report(report, tmp_path / "out", text)
    draw_contact_sheet(report, tmp_path / "sheet.png")
    text_of_page = page_path.read_text(encoding="utf-8")  # there is no half of a character in it
    page = Page(text_of_page)
    assert page.tags == TAGS
    assert {name for name, _ in page.attributes} == ATTRIBUTES
    assert len(page.images) == 3
    assert not re.search("[\x00-\x08\x0b-\x1f]", text_of_page)
    shown = text.replace("\ud83d", "\\ud83d").replace("\x00", "\\x00").replace("\x07", "\\x07")
    # Title, heading, question and answer, of a dropped row its id, what it had; of a row its id.
    for tag, kind in [("title", None), ("h1", None), ("h2", None), ("p", "said"), ("code", None), ("bdi", None)]:
        assert shown in page.of(tag, kind)
    assert f"Nothing has been read of: {shown} unread" in page.of("p", "alarm")
    assert json.loads(json_path.read_text(encoding="utf-8")) == report.to_dict()


def test_the_page_loads_nothing_and_forbids_it(tmp_path):
    page = render_page(report_of(tmp_path, {"a": source(2, 1)}), "rows")
    links = [value for name, value in Page(page).attributes if name in ("src", "href")]
    assert links and all(value.startswith(("data:image/jpeg;base64,", "#source-")) for value in links)
    assert "url(" not in page and "@import" not in page
    assert "default-src 'none'" in POLICY and ("content", POLICY) in Page(page).attributes


def test_reasons_have_counts_shares_and_three_examples(tmp_path):
    report = source(5, 4)
    report.read += 1
    report.drop(BadRow("no boxed answer"), 17)  # a row id need not be text
    report.repaired["an image in CMYK"] += 3
    page = Page(render_page(report_of(tmp_path, {"a": report}), "rows"))
    assert "Dropped: 5" in page.of("h3")
    assert page.of("code")[:4] == ["bad 0", "bad 1", "bad 2", "17"]
    assert page.of("bdi") == ["0.png", "1.png", "2.png", ""]
    assert page.of("b")[-2:] == ["4", "1"]
    assert "an image in CMYK: 3 times" in page.of("li")


def test_a_source_that_lost_every_row_stands_out(tmp_path):
    report = report_of(tmp_path, {"good": source(1), "lost": source(0, 12)})
    page = render_page(report, "rows")
    assert page.count('<section id="source-1" class="empty">') == page.count('class="empty"') == 1
    assert Page(page).of("p", "alarm") == ["Nothing of this source was kept."]
    assert Page(page).of("span", "alarm") == ["none"]
    draw_contact_sheet(report, tmp_path / "sheet.png")
    red = (np.asarray(Image.open(tmp_path / "sheet.png")) == [0xB3, 0x26, 0x1E]).all(-1)
    assert red.any()


def test_nothing_read_gives_a_page_and_a_picture_that_say_so(tmp_path):
    report = DataReport(tmp_path / "none", {"expected": "mit"})
    json_path, page_path = save_report(report, tmp_path / "out", "rows")
    page = page_path.read_text()
    assert sums(page) == [[0, 0, 0, 0]]
    assert Page(page).of("p", "alarm") == ["Nothing has been read of: expected", "Nothing has been read."]
    assert json.loads(json_path.read_text()) == report.to_dict()
    draw_contact_sheet(report, tmp_path / "sheet.jpg")
    assert Image.open(tmp_path / "sheet.jpg").format == "JPEG"


def test_lengths_say_over_how_many_rows_or_that_there_was_no_processor(tmp_path):
    lengths = iter([[100, 3], [1500, 5], [200, 4]])
    sources = {"a": source(3, count_tokens=lambda row: next(lengths)), "b": source(3)}
    cells = Page(render_page(report_of(tmp_path, sources), "rows")).of("td")
    line = cells.index("200 / 200 / 1,500")
    assert cells[line : line + 3] == ["200 / 200 / 1,500", "4 / 4 / 5", "3"]
    assert cells[-3:] == ["no processor given", "no processor given", "0"]


def test_forms_of_answers_are_bars_that_add_up(tmp_path):
    report = source(3, answer="B")
    report.keep(row("no image", answer="yes", num_images=0), [])
    page = render_page(report_of(tmp_path, {"a": report}), "rows")
    widths = [float(width) for width in re.findall(r'<i style="width: ([\d.]+)%">', page)]
    assert widths == [75.0, 25.0, 25.0, 75.0]  # letters and yes or no; no image and one
    assert [text for text in Page(page).of("span") if text][:2] == ["letter", "75.0%"]
    assert "0 to 1, most often 1" in Page(page).of("td")


def test_a_long_text_is_cut_and_says_so(tmp_path):
    text = "x" * (MAX_CHARACTERS + 1234)
    page = Page(render_page(report_of(tmp_path, {"a": source(1, question=text)}), "rows"))
    assert page.of("p", "said")[0] == "x" * MAX_CHARACTERS + "… and 1,234 more characters"


def test_json_is_the_dictionary_and_reads_as_it_was_written(tmp_path):
    report = report_of(tmp_path, {"é 中": source(2, 1, answer="…")}, settings={"processor": "user/x"})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text("of the last run")
    json_path, page_path = save_report(report, str(tmp_path / "out"), "rows")
    assert (json_path, page_path) == (tmp_path / "out" / "report.json", tmp_path / "out" / "report.html")
    assert json.loads(json_path.read_text(encoding="utf-8")) == report.to_dict()
    assert "é 中" in json_path.read_text(encoding="utf-8")
    assert page_path.read_text(encoding="utf-8") == render_page(report, "rows")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "report.json"]


# ---------------------------------------------------------------------------------------------------------------------
# One picture
# ---------------------------------------------------------------------------------------------------------------------


def sheet_of(tmp_path, sources):
    draw_contact_sheet(report_of(tmp_path, sources), tmp_path / "sheet.png")
    assert not list(tmp_path.glob(".*"))
    return np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)


def num_pictures(sheet):
    """How many pictures there are: all red, and apart from one another."""
    red = (sheet[..., 0] > 200) & (sheet[..., 1:] < 60).all(-1)
    corners = red & ~np.roll(red, 1, 0) & ~np.roll(red, 1, 1)
    return int(corners.sum())


@pytest.mark.parametrize(
    ("num_kept", "num_images", "expected"), [(1, 1, 1), (7, 1, 7), (30, 1, 10), (1, 4, 4), (1, 12, 9)]
)
def test_the_contact_sheet_has_the_pictures_of_ten_rows(tmp_path, num_kept, num_images, expected):
    assert num_pictures(sheet_of(tmp_path, {"a": source(num_kept, num_images=num_images)})) == expected


def test_no_text_runs_out_of_its_card(tmp_path):
    words = "a/path/without/any/space/" * 9 + " and words " * 90 + "\n\n\tend"
    sheet = sheet_of(tmp_path, {"a" * 500: source(10, question=words, answer=words, num_images=0)})
    is_empty = [len(np.unique(sheet[80:, left].reshape(-1, 3), axis=0)) <= 2 for left in range(sheet.shape[1])]
    pitch = (sheet.shape[1] - GAP) // 5
    for number in range(5):  # a gap, the margin of a card, its text, its other margin
        gap = number * pitch
        assert all(is_empty[gap : gap + 2 * GAP]) and not all(is_empty[gap + 2 * GAP : gap + pitch - GAP])
        assert all(is_empty[gap + pitch - GAP + 1 : gap + pitch + GAP])  # a letter may lean over by a pixel


def test_many_sources_stay_within_what_a_jpeg_can_hold(tmp_path, monkeypatch):
    text = "words " * 200
    report = SourceReport()
    for number in range(10):
        report.keep(row(str(number), text, text, 10), [picture((64, 64))] * 10)
    one, two = (len(sheet_of(tmp_path / str(n), {f"source {i}": report for i in range(n)})) for n in (1, 2))
    assert (MAX_SOURCES + 1) * (two - one) < 65500
    monkeypatch.setattr(report_page, "MAX_SOURCES", 1)
    many = [len(sheet_of(tmp_path / str(n), {f"source {i}": report for i in range(n)})) for n in (3, 7)]
    assert one < many[0] == many[1] < two  # by the line that says how many more there are


@pytest.mark.parametrize("is_installed", [True, False])
def test_a_character_that_the_font_lacks_is_explained(tmp_path, monkeypatch, is_installed):
    truetype = ImageFont.truetype

    def missing(font, *arguments, **options):
        if font == "DejaVuSans.ttf":
            raise OSError("cannot open resource")
        return truetype(font, *arguments, **options)

    if not is_installed:
        monkeypatch.setattr(ImageFont, "truetype", missing)
    heights = []
    for number, question in enumerate(("How many?", "中文")):
        heights.append(len(sheet_of(tmp_path / str(number), {"a": source(1, question=question)})))
    assert heights[1] > heights[0]  # by the line that explains
