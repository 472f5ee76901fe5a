import re
from html.parser import HTMLParser

import pytest
from example_report import AFTER, BEFORE, LONG_PROMPT, PROMPT, TOKENS

from spec_kd.evaluation.report.rendering import build_headline, render_html
from spec_kd.evaluation.report.sections import choose_shade
from spec_kd.reports.rendering import show_whitespace

VOID = {"meta", "br"}
SECTIONS = ["Loops and templates", "Acceptance by position", "How many tokens to draft", "Costs", "Cross-check"]
SECTIONS += ["Where the draft fails", "Worst prompts", "Provenance", "Terms"]


class Page(HTMLParser):
    """Checks that tags balance, and keeps what the page says."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.open[-3:])

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts[tag][-1] += data


@pytest.fixture(scope="module")
def text(report):
    return render_html(report)


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_it_begins_as_a_page(text):
    assert text.startswith("<!DOCTYPE html>") and text.rstrip().endswith("</html>")
    assert '<meta charset="utf-8">' in text and "color-scheme: light dark" in text


def test_nothing_is_loaded(text, page):
    attributes = [(name, value or "") for _, attributes in page.tags for name, value in attributes.items()]
    assert not [name for name, _ in attributes if name in ("src", "href", "xlink:href", "srcset", "action")]
    assert not [value for name, value in attributes if name == "style" or name.startswith("on")]
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "img", "iframe", "object", "base", "a"})
    css = page.texts["style"][0]
    assert "url(" not in css and "@import" not in css
    assert "default-src 'none'" in text


def test_names_and_texts_are_escaped(text, page):
    assert "<script" not in text and "<img" not in text and "<b>" not in text
    assert AFTER in page.texts["h1"][0]  # and said in full
    assert any(PROMPT.strip() in said for said in page.texts["pre"])
    assert "alpha by tool <b>name</b>" in page.texts["caption"]


def test_every_number_of_the_headline_is_there(report, page):
    headline = build_headline(report)
    assert page.texts["p"][0] == headline
    numbers = re.findall(r"\d+\.\d+", headline)
    assert len(numbers) >= 8
    cells = " ".join(page.texts["td"])
    for number in numbers:
        assert number in cells


def test_sections_in_their_order(page):
    assert [said.strip() for said in page.texts["h2"]] == ["Before and after", *SECTIONS]


def test_a_small_report_has_no_empty_sections(small_report):
    page = Page(render_html(small_report))
    expected = ["Metrics", "Acceptance by position", "How many tokens to draft", "Provenance", "Terms"]
    assert [said.strip() for said in page.texts["h2"]] == expected
    assert "0.500 [–, –]" in " ".join(page.texts["td"])
    assert not re.search(r"\bnan\b", " ".join(page.texts["body"]), flags=re.IGNORECASE)
    assert not [t for t in page.texts["table"] if not re.search(r"\d", t)]


def test_tables_name_rows_and_columns(page):
    heads = [attributes for tag, attributes in page.tags if tag == "th"]
    assert heads and all(head.get("scope") in ("col", "row", "rowgroup") for head in heads)
    assert len(page.texts["caption"]) == len(page.texts["table"])


def test_charts_are_described(page):
    drawings = [attributes for tag, attributes in page.tags if tag == "svg"]
    charts = [d for d in drawings if d.get("role") == "img"]
    # per setting: acceptance by position, block efficiency, speed-up at two batch sizes
    assert len(charts) == 2 * 4
    assert all(BEFORE in chart["aria-label"] and AFTER in chart["aria-label"] for chart in charts)
    assert all(d.get("aria-hidden") == "true" for d in drawings if d not in charts)
    rings = [1 for tag, attributes in page.tags if (tag, attributes.get("class")) == ("circle", "ring")]
    assert len(rings) == 2 * 2 * 2  # settings, batch sizes, drafts


def test_breakdowns_have_a_bar_for_every_row(report, page):
    rows = sum(len(b.rows) for draft in report.drafts for s in draft.settings for b in s.breakdowns)
    assert len([1 for tag, attributes in page.tags if attributes.get("class") == "fill"]) == rows
    whiskers = len([1 for tag, attributes in page.tags if attributes.get("class") == "whisker"])
    assert whiskers == rows - 4  # one part of one breakdown has a single prompt, in each draft and setting


def test_tokens_are_coloured_and_underlined(report, page, text):
    shown = report.draft.setting("t1").worst[0]
    spans = [(tag, a) for tag, a in page.tags if tag in ("u", "span") and "title" in a]
    rejected = sum(a < 0.5 for a in shown.acceptance)
    first = spans[: len(shown.tokens)]
    assert sum(tag == "u" for tag, _ in first) == rejected
    assert [a["title"] for _, a in first] == [f"{acceptance:.2f}" for acceptance in shown.acceptance]
    assert [a["class"] for _, a in first] == [f"a{min(4, int(5 * acceptance))}" for acceptance in shown.acceptance]
    said = next(t for t in page.texts["div"] if t.startswith("If x"))
    assert said == "".join(map(show_whitespace, TOKENS))  # nothing between the tokens
    assert "\n\n" not in said and "⏎\n⏎\n```⏎\nf(x)⇥</div>⏎\n好的。··<|end|>" in said


def test_long_prompts_are_folded(page):
    folded = [a for tag, a in page.tags if tag == "details"]
    summaries = page.texts["summary"]
    by_summary = dict(zip(summaries, folded, strict=True))
    assert "open" not in by_summary[f"Prompt ({len(LONG_PROMPT):,} characters)"]
    assert "open" in by_summary[f"Prompt ({len(PROMPT):,} characters)"]


@pytest.mark.parametrize(
    ("token", "shown"),
    [("\n", "⏎\n"), (" the", " the"), ("  ", "··"), ("\t", "⇥"), ("\r\n", "␍⏎\n"), ("a\x00\x7f", "a␀␡"), ("", "")],
)
def test_whitespace_is_shown(token, shown):
    assert show_whitespace(token) == shown


@pytest.mark.parametrize(("acceptance", "shade"), [(0.0, 0), (0.19, 0), (0.2, 1), (0.5, 2), (0.99, 4), (1.0, 4)])
def test_shades(acceptance, shade):
    assert choose_shade(acceptance) == shade
