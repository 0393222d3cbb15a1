"""The picture is a picture, and the page needs nothing but itself."""

import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from tests.vla2cli.bench.test_compare import row
from vla2cli.bench.plot import check_plot, draw, write_plot
from vla2cli.bench.report import HEADER, table_lines
from vla2cli.errors import UsageError

ROWS = [
    row("read", None, None, 12.5),
    row("tower", "float32", "eager", 72_881.0),
    row("tower", "bfloat16", "<torch>", 14_617.0),
]


class Page(HTMLParser):
    """Collects tags, and every attribute that could load something."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.cells = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        loads = ("src", "href", "xlink:href", "data", "action")
        self.links += [value for name, value in attrs if name in loads]

    def handle_data(self, data):
        if self.tags and self.tags[-1] in ("td", "th"):
            self.cells.append(data)


def test_png_is_an_image_that_grows_with_its_rows(tmp_path):
    for name, rows in (("few.png", ROWS), ("many.PNG", 4 * ROWS)):
        write_plot(rows, tmp_path / name, "title")
    with Image.open(tmp_path / "few.png") as few, Image.open(tmp_path / "many.PNG") as many:
        assert few.format == many.format == "PNG"
    assert few.width == many.width
    assert many.height > few.height > 200


def test_html_holds_the_picture_and_the_table_and_loads_nothing(tmp_path):
    write_plot(ROWS, tmp_path / "a.html", "a <title>")
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.count("svg") == 1
    assert page.tags.count("table") == 1
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links)
    # what is left of addresses names kinds of XML and is not fetched
    assert set(re.findall(r'([\w:]+)="https?://', text)) <= {"xmlns", "xmlns:xlink"}
    assert not re.findall(r"url\((?!#)", text)
    assert page.cells[: len(HEADER)] == list(HEADER)
    assert "<torch>" in page.cells
    assert "<title>a &lt;title&gt;</title>" in text


def test_same_rows_give_the_same_page(tmp_path):
    for name in ("a.html", "b.html"):
        write_plot(ROWS, tmp_path / name, "title")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_bars_are_as_long_as_the_times():
    times, shares = draw(ROWS, "title").axes
    assert [bar.get_width() for bar in times.patches] == [12.5, 72_881.0, 14_617.0]
    assert [bar.get_width() for bar in shares.patches] == [0.5, 0.5, 0.5]
    assert [label.get_text() for label in times.get_yticklabels()][1] == "tower eager float32"


@pytest.mark.parametrize("name", ["a.svg", "a", "a.html.gz", "png"])
def test_other_endings_are_refused(tmp_path, name):
    with pytest.raises(UsageError, match=r"ends in \.png or \.html"):
        check_plot(tmp_path / name)


def test_table_is_aligned_and_marks_what_there_is_not():
    header, read, tower, _ = table_lines(ROWS)
    assert len({len(line) for line in (header, read, tower)}) == 1
    assert header.split("  ")[0] == "stage"
    assert read.split()[:4] == ["read", "-", "-", "12.5"]
    assert "72,881" in tower
