import dataclasses
import re

import pytest
from example_report import AFTER, LONG_PROMPT

from spec_kd.escaping import escape_markdown as escape
from spec_kd.evaluation.report.rendering import build_headline, render_markdown
from spec_kd.evaluation.report.sections import SHOWN_CHARACTERS


@pytest.fixture(scope="module")
def text(report):
    return render_markdown(report)


def split_tables(text):
    """Cells of every table, by row; a `|` that is escaped does not end a cell."""
    for block in re.findall(r"(?:^\|.*\|$\n?)+", text, flags=re.MULTILINE):
        yield [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.strip().splitlines()]


def test_tables_are_whole(text):
    found = list(split_tables(text))
    # metrics, differences, loops, 2 x (gammas, positions), costs, speed-ups, cross-check, 2 x 3 breakdowns, provenance
    assert len(found) == 17
    for table in found:
        assert len({len(row) for row in table}) == 1 and set(table[1]) == {"---"} and len(table) > 2


def test_every_number_of_the_headline_is_there(report, text):
    numbers = re.findall(r"\d+\.\d+", build_headline(report))
    cells = " ".join(cell for table in split_tables(text) for row in table for cell in row)
    assert len(numbers) >= 8 and all(number in cells for number in numbers)
    assert text.splitlines()[2] == escape(build_headline(report))


def test_names_are_escaped(text):
    outside = re.sub(r"^(`{3,})text\n.*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert "<script" not in outside and "<img" not in outside and "<b>" not in outside
    assert escape(AFTER) in outside
    tags = set(re.findall(r"</?(\w+)", outside))
    assert tags == {"details", "summary"}
    assert outside.count("<details>") == outside.count("</details>") == 2 + 2 + 4


def test_prompts_stand_in_code_blocks_that_their_backticks_do_not_end(text):
    fences = re.findall(r"^(`{3,})text$", text, flags=re.MULTILINE)
    assert len(fences) == 2 * 2 * 2 * 2  # settings, drafts, prompts, and the completion of each
    assert set(fences) == {"```", "````"}  # the completions have three backticks in them
    left_out = len(LONG_PROMPT) - SHOWN_CHARACTERS
    assert f"**Prompt 4**: 1.21 tokens per target pass (its first {left_out:,} characters are left out here)" in text


def test_rejected_tokens_are_bracketed(report):
    shown = dataclasses.replace(
        report.draft.settings[0].worst[0], tokens=["a", " b", " c", "d"], acceptance=[0.9, 0.1, 0.49, 0.5]
    )
    setting = dataclasses.replace(report.draft.settings[0], worst=[shown])
    changed = dataclasses.replace(report, drafts=[dataclasses.replace(report.draft, settings=[setting])])
    assert "\na⟦ b c⟧d\n" in render_markdown(changed)


def test_a_small_report_has_no_empty_sections(small_report):
    text = render_markdown(small_report)
    headings = re.findall("^## (.*)$", text, flags=re.MULTILINE)
    assert headings == ["Metrics", "How many tokens to draft", "Provenance", "Terms"]
    assert "1.50 [–, –]" in text and not re.search(r"\bnan\b", text, flags=re.IGNORECASE)


@pytest.mark.parametrize(
    ("plain", "escaped"),
    [
        ("2.39 [2.31, 2.47]", "2.39 [2.31, 2.47]"),
        ("a|b", r"a\|b"),
        ("`a_b*`", r"\`a\_b\*\`"),
        ("[x](javascript:y)", r"[x\](javascript:y)"),
        ("<i> & ~$", r"&lt;i&gt; &amp; \~\$"),
        ("a\\|\n b", r"a\\\| b"),
    ],
)
def test_escaping(plain, escaped):
    assert escape(plain) == escaped
