"""Text from data stays text, wherever it is shown: rendered by a parser of Markdown and read back."""

import ast
import re
from html.parser import HTMLParser

import pytest
from hostile import HOSTILE
from markdown_it import MarkdownIt

from spec_kd.escaping import (
    CONTROLS,
    escape_label,
    escape_markdown,
    make_code_block,
    make_code_span,
    make_table,
    quote_python,
    show_controls,
    to_one_line,
)

MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])


class Reader(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.tags, self.text = [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


def read(markdown):
    page = Reader(MARKDOWN.render(markdown))
    return page.tags, page.text


def squeeze(text):
    return " ".join(text.split())


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown(text):
    shown = to_one_line(text)
    assert not set(map(ord, shown)) & set(CONTROLS) and "\n" not in shown
    escaped = escape_markdown(text)
    for before, tags in (("of ", ["p"]), ("# of ", ["h1"]), ("- of ", ["ul", "li"])):
        found = read(f"{before}{escaped} and **so**")
        assert found[0] == [*tags, "strong"] and squeeze(found[1]) == squeeze(f"of {shown} and so")
    assert not re.search("[a-z]://", escaped) and "<" not in escaped  # no address becomes a link either


@pytest.mark.parametrize("text", HOSTILE)
def test_cells_of_a_table(text):
    shown = to_one_line(text)
    lines = make_table(["a", "b"], [[escape_markdown(text), make_code_span(text, in_table=True)], ["c", "d"]])
    tags, found = read("\n".join(lines))
    assert tags == ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td", "code", "tr", "td", "td"]
    assert squeeze(found) == squeeze(f"a b {shown} {shown} c d")


@pytest.mark.parametrize("text", HOSTILE)
def test_code(text):
    tags, found = read(f"of {make_code_span(text)} and")
    assert tags == ["p", "code"] and squeeze(found) == squeeze(f"of {to_one_line(text)} and")
    tags, found = read(f"of\n\n{make_code_block(text)}\n\nand")
    assert tags == ["p", "pre", "code", "p"]
    assert found.split("\n", 1)[1].rsplit("\nand", 1)[0].rstrip("\n") == show_controls(text).rstrip("\n")


@pytest.mark.parametrize("text", HOSTILE)
def test_python(text):
    assert ast.literal_eval(quote_python(text)) == text


def test_labels_are_no_formulas():
    from matplotlib.cbook import is_math_text
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    for text in HOSTILE:
        label = escape_label(text)
        assert not label.startswith("_") and "\n" not in label
        if is_math_text(label):
            raise AssertionError(label)
        axis.text(0, 0, label[:80])
    axis.figure.canvas.draw()


def test_halves_of_surrogate_pairs_can_be_written():
    show_controls("a\ud800b").encode()
