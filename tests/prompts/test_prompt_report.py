"""The report of a prompt set: counts against counts by hand, files on disk."""

import dataclasses
import json
import re
import sys

import numpy as np
import pytest
from datasets import Dataset
from hostile import HOSTILE
from markdown_it import MarkdownIt

from spec_kd.escaping import CONTROLS
from spec_kd.prompts.description import describe_prompts, summarize_lengths
from spec_kd.prompts.report import plot_prompt_report

SENTENCE = "Please tell me how the weather will be in {} tomorrow morning, and whether I should take an umbrella."


def ask(*texts, system=None):
    """A conversation of user turns with answers in between."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for i, text in enumerate(texts):
        messages += [{"role": "assistant", "content": "Yes."}] * (i > 0) + [{"role": "user", "content": text}]
    return messages


@pytest.fixture
def dataset():
    rows = [
        {"prompt": ask(SENTENCE.format("Lisbon")), "tools": '[{"name": "f"}]', "source": "a"},
        {"prompt": ask(SENTENCE.format("Lisbon").upper() + "  "), "tools": None, "source": "a"},  # the same
        {"prompt": ask(SENTENCE.format("Lisbon now")), "tools": "[]", "source": "b"},  # nearly the same
        {"prompt": ask("Hello, who are you?", "And who made you, where and when?"), "tools": None, "source": None},
        {"prompt": ask("请问明天上海的天气怎么样,需要带伞吗?", system="Be kind."), "tools": None, "source": "b"},
    ]
    return Dataset.from_list([{**row, "scenario": "curated"} for row in rows])


@pytest.fixture
def report(dataset, tokenizer):
    other = [ask(SENTENCE.format("LISBON")), ask("Something else altogether.")]
    return describe_prompts(dataset, tokenizer, other=other, show_progress=False)


def test_counts(report):
    assert (report.num_prompts, report.num_with_tools, report.num_with_system_prompt) == (5, 1, 1)
    assert report.num_with_completion == 0
    assert (report.num_exact_duplicates, report.num_near_duplicates) == (1, 2)
    assert report.turns == {"1": 4, "2": 1}
    assert report.languages == {"en": 4, "zh": 1}
    assert report.scenarios == {"curated": 5}
    assert report.sources == {"a": 2, "b": 2, "none": 1}


def test_overlap(report):
    assert (report.overlap.num_other, report.overlap.exact, report.overlap.near) == (2, 2, 3)


def test_lengths_are_those_of_the_rendered_prompts(report, dataset, tokenizer):
    lengths = [
        len(
            tokenizer.apply_chat_template(
                row["prompt"],
                tools=json.loads(row["tools"] or "[]") or None,
                add_generation_prompt=True,
                return_dict=False,
            )
        )
        for row in dataset
    ]
    assert report.tokens.percentiles["0"] == min(lengths) and report.tokens.percentiles["100"] == max(lengths)
    assert report.tokens.percentiles["50"] == sorted(lengths)[2]
    assert report.tokens.mean == pytest.approx(np.mean(lengths), abs=0.01)
    assert report.characters.percentiles["0"] == len("Be kind.") + len("请问明天上海的天气怎么样,需要带伞吗?")


@pytest.mark.parametrize("lengths", [[5], [0, 0], [1, 2], [0, 3, 9], list(range(1, 3000, 7))])
def test_histogram_holds_every_prompt(lengths):
    found = summarize_lengths(np.array(lengths))
    assert sum(found.counts) == len(lengths)
    assert found.edges[0] == min(lengths) and list(found.edges) == sorted(set(found.edges))
    assert len(found.edges) == len(found.counts) + 1 <= 31


def test_texts_without_a_tokenizer():
    report = describe_prompts(["What is this?", "What is that over there, behind the tree?"], show_progress=False)
    assert report.tokens is None and report.overlap is None
    assert report.turns == {"1": 2} and not report.scenarios
    assert report.characters.percentiles["0"] == len("What is this?")


def test_contents_in_parts_and_answers_are_counted():
    parts = [{"type": "text", "text": "What is in this picture of the sea?"}]
    rows = [
        {"prompt": [{"role": "user", "content": parts}], "completion": [{"role": "assistant", "content": "A boat."}]}
    ]
    report = describe_prompts(Dataset.from_list(rows), show_progress=False)
    assert report.num_with_completion == 1
    assert report.characters.percentiles["100"] == len(parts[0]["text"])


def test_saved_files(report, tmp_path):
    paths = report.save(tmp_path / "report")
    assert sorted(path.name for path in paths.values()) == ["prompts.json", "prompts.md", "prompts.png"]
    assert json.loads(paths["json"].read_text("utf-8")) == json.loads(json.dumps(report.to_dict()))
    markdown = paths["md"].read_text("utf-8")
    for line in ("| nearly the same (similarity 0.8) | 2 | 40.0% |", "| zh | 1 | 20.0% |", "| 2 | 1 | 20.0% |"):
        assert line in markdown
    assert paths["png"].stat().st_size > 10_000


def test_long_tables_are_summed_up_and_complete_in_json(dataset):
    rows = [{"prompt": f"Prompt of file {i}, which is a good one.", "source": f"file-{i % 15}|x"} for i in range(30)]
    report = describe_prompts(Dataset.from_list(rows), show_progress=False)
    assert len(report.sources) == 15
    assert "| 5 others | 10 | 33.3% |" in report.to_markdown() and r"file-0\|x" in report.to_markdown()


def test_picture_shows_the_figures(report):
    axes = plot_prompt_report(report).axes
    assert [axis.get_title() for axis in axes] == [
        "length in tokens", "language of the user", "user turns", "repeated prompts",
    ]  # fmt: skip
    assert [bar.get_width() for bar in axes[3].patches] == [0.2, 0.4, 0.4, 0.6]


def test_without_matplotlib_the_rest_is_saved(report, tmp_path, monkeypatch, caplog):
    (tmp_path / "prompts.png").write_bytes(b"old")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert sorted(report.save(tmp_path)) == ["json", "md"]
    assert not (tmp_path / "prompts.png").exists() and "spec_kd[report]" in caplog.text


def test_what_cannot_be_described_is_refused(tokenizer):
    with pytest.raises(ValueError, match="empty"):
        describe_prompts([])
    with pytest.raises(ValueError, match="no `prompt`"):
        describe_prompts(Dataset.from_dict({"prompt_ids": [[1, 2]]}))
    with pytest.raises(ValueError, match=r"`other` has the columns \['prompt_ids'\]"):
        describe_prompts(["a"], other=Dataset.from_dict({"prompt_ids": [[1, 2]]}))
    answered = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]
    with pytest.raises(ValueError, match="ends with an assistant turn"):
        describe_prompts(answered, tokenizer, show_progress=False)


def test_text_from_data_stays_text(report, tmp_path):
    read = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render
    plain = dataclasses.replace(report, scenarios={"a": 3}, sources={"b": 2, "c": 1}, languages={"en": 5})
    wanted = re.findall(r"<\w+>", read(plain.to_markdown()))
    for text in HOSTILE:
        hostile = dataclasses.replace(report, scenarios={text: 3}, sources={text: 2, "c": 1}, languages={text: 5})
        markdown = hostile.to_markdown()
        assert re.findall(r"<\w+[ >]", read(markdown)) == wanted, text
        assert not set(map(ord, markdown)) & set(CONTROLS)
    labels = {text: 1 for text in ("$x^2$ $\\frac{", "_a\n\x1b[31m", "\\$x$")}
    plot_prompt_report(dataclasses.replace(report, languages=labels)).canvas.draw()
