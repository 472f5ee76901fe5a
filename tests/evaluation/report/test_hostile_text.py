"""Names, labels, prompts and costs of an evaluation are text in every rendering, whatever they hold."""

import dataclasses
import json
from html.parser import HTMLParser

import pytest
from hostile import HOSTILE
from markdown_it import MarkdownIt

from spec_kd.escaping import CONTROLS, show_controls, to_one_line
from spec_kd.evaluation.metrics import Interval
from spec_kd.evaluation.report.content import Breakdown, BreakdownRow, Comparison, CostReport, ShownPrompt
from spec_kd.evaluation.report.plots import plot_report
from spec_kd.evaluation.report.rendering import load_report, render_html, render_markdown, save_report

SURE = Interval(0.5, 0.4, 0.6)


class Reader(HTMLParser):
    """Tags with the names of their attributes, and the title."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.tags, self.text = [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, *(name for name, _ in attrs if name not in ("class", "open"))))

    def handle_data(self, data):
        self.text.append(data)


def place(report, text):
    """The text everywhere where data can stand."""
    row = BreakdownRow(label=text, prompts=1, tokens=40, alpha=SURE)
    shown = ShownPrompt(row=0, prompt=text, tokens=[text, "x"], acceptance=[0.1, 0.9], block_efficiency=1.5)
    cost = CostReport(batch_size=1, cost_ratio=0.1, verify_cost={"1": 1.0}, round_overhead=0.0, source=text)
    setting = dataclasses.replace(
        report.draft.settings[0], breakdowns=[Breakdown(title=text, rows=[row])], worst=[shown], alpha_kind=text
    )
    drafts = [
        dataclasses.replace(report.draft, name=name, settings=[setting], costs=[cost]) for name in ("first", text)
    ]
    comparison = Comparison(setting=setting.name, metric="alpha", draft=text, baseline="first", difference=SURE)
    return dataclasses.replace(
        report, drafts=drafts, comparisons=[comparison], serving_engine=text, serving_rule=text,
        provenance={"target": {"name": text}, text: [text], "null": None},
    )  # fmt: skip


def read_tags(markdown):
    return Reader(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown)).tags


@pytest.fixture(scope="module")
def shapes(small_report):
    plain = place(small_report, "plain")
    return Reader(render_html(plain)).tags, read_tags(render_markdown(plain))


@pytest.mark.parametrize("text", HOSTILE)
def test_a_page_and_markdown_keep_their_shape(small_report, shapes, text):
    report = place(small_report, text)
    page, markdown = render_html(report), render_markdown(report)
    found = Reader(page)
    assert found.tags == shapes[0]
    assert read_tags(markdown) == shapes[1]
    assert not set(map(ord, page + markdown)) & set(CONTROLS)
    words = " ".join(" ".join(found.text).split())
    assert to_one_line(text) in words or to_one_line(show_controls(text)) in words


def test_all_of_it_is_saved_and_read_back(small_report, tmp_path):
    text = "half a pair: \ud800, \x1b[31m and a\x00b"
    paths = save_report(place(small_report, text), tmp_path)
    assert load_report(tmp_path).draft.name == text
    assert json.loads(paths["json"].read_text(encoding="utf-8"))["serving_engine"] == text


@pytest.mark.parametrize("text", ["$x^2$ \\$ $\\frac{", "_a\n\x1b[31m"])
def test_a_picture_is_drawn(small_report, text):
    plot_report(place(small_report, text)).canvas.draw()
