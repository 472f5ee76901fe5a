"""Mixing: shares that are asked are got, rows are not repeated unless asked, nothing of a row is lost."""

import json

import pytest
from datasets import Dataset
from tiny import build_tokenizer

from spec_kd.data.arrow_padding import iterate_rows
from spec_kd.data.prompt_rendering import prepare_prompts, render_prompt_ids
from spec_kd.prompts.mixing import mix_prompts


def make_part(scenario, size, **columns):
    rows = [
        {"prompt": [{"role": "user", "content": f"{scenario} {i}"}], "scenario": scenario, **columns}
        for i in range(size)
    ]
    return Dataset.from_list(rows)


@pytest.fixture
def parts():
    return {
        "logs": make_part("historical", 40),
        "curated": make_part("curated", 10),
        "made": make_part("synthetic", 30),
    }


def read_texts(dataset):
    return [prompt[-1]["content"] for prompt in dataset["prompt"]]


def test_everything_is_taken_once_without_weights(parts):
    mixed = mix_prompts(parts)
    assert sorted(read_texts(mixed.dataset)) == sorted(text for part in parts.values() for text in read_texts(part))
    assert [(part.rows, part.repeated) for part in mixed.report.parts] == [(40, 0), (10, 0), (30, 0)]


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ({"logs": 1, "curated": 1, "made": 1}, [10, 10, 10]),
        ({"logs": 0.7, "curated": 0.1, "made": 0.2}, [40, 6, 11]),  # 40 / 0.7 = 57.1: 39.9, 5.7, 11.4
        ({"logs": 0.1, "curated": 0, "made": 0.9}, [3, 0, 30]),
        ({"logs": 0, "curated": 0.1, "made": 0.2}, [0, 10, 20]),
    ],
)
def test_default_is_the_most_without_repeating(parts, weights, counts):
    mixed = mix_prompts(parts, weights=weights)
    assert [part.rows for part in mixed.report.parts] == counts
    texts = read_texts(mixed.dataset)
    assert len(set(texts)) == len(texts) == sum(counts) == mixed.report.num_prompts


def test_more_prompts_than_rows_repeat_evenly(parts):
    mixed = mix_prompts(parts, weights={"logs": 1, "curated": 2, "made": 1}, num_prompts=50)
    curated = [text for text in read_texts(mixed.dataset) if text.startswith("curated")]
    assert len(curated) == 25 and {curated.count(text) for text in curated} == {2, 3}
    by_name = {part.name: part for part in mixed.report.parts}
    assert by_name["curated"].repeated == 15 and by_name["logs"].repeated == 0
    assert by_name["curated"].share_asked == by_name["curated"].share == 0.5


def test_seed_decides(parts):
    first, again, other = (mix_prompts(parts, num_prompts=20, seed=seed) for seed in (3, 3, 4))
    assert read_texts(first.dataset) == read_texts(again.dataset) != read_texts(other.dataset)
    assert first.report == again.report


def test_choice_from_a_part_is_independent_of_the_others(parts):
    both = mix_prompts(parts, weights={"logs": 1, "curated": 1, "made": 0}, num_prompts=10)
    alone = mix_prompts({"logs": parts["logs"]}, num_prompts=5)
    assert set(read_texts(alone.dataset)) == {
        text for text in read_texts(both.dataset) if text.startswith("historical")
    }


def test_orders(parts):
    shuffled = mix_prompts(parts).dataset["scenario"]
    curriculum = mix_prompts(parts, order="curriculum").dataset["scenario"]
    assert list(curriculum) == ["historical"] * 40 + ["curated"] * 10 + ["synthetic"] * 30 != list(shuffled)
    by_column = mix_prompts(parts, order="scenario").dataset["scenario"]
    assert list(by_column) == sorted(curriculum)
    by_length = mix_prompts(parts, order=lambda row: len(row["prompt"][0]["content"]))
    lengths = [len(text) for text in read_texts(by_length.dataset)]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]


def test_ties_of_a_sorted_order_are_shuffled(parts):
    texts = read_texts(mix_prompts({"made": parts["made"]}, order="scenario").dataset)
    assert texts != sorted(texts, key=lambda text: int(text.split()[1]))


def test_rows_of_unsorted_columns_come_last(parts):
    parts["curated"] = parts["curated"].add_column("difficulty", list(range(10))[::-1])
    values = list(mix_prompts(parts, order="difficulty").dataset["difficulty"])
    assert values == [*range(10), *[None] * 70]


CALL = [{"function": {"name": "f", "arguments": {"x": 1}}}]
OTHER_CALL = [{"function": {"name": "g", "arguments": {"x": "one", "y": "5"}}}]
SCHEMA = [{"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}]


def make_messages(**keys):
    return [{"role": "user", "content": "7"}, {"role": "tool", "content": "1", **keys}]


@pytest.mark.parametrize("calls", [(None, CALL), (CALL, OTHER_CALL), (CALL, CALL + OTHER_CALL), (CALL, [])])
def test_differently_shaped_messages_keep_what_they_hold(calls):
    rows = [
        [{"prompt": make_messages(**({} if call is None else {"tool_calls": call})), "number": number}] * 3
        for call, number in zip(calls, (1, 2.5), strict=True)
    ]
    datasets = {str(i): Dataset.from_list(part, on_mixed_types="use_json") for i, part in enumerate(rows)}
    mixed = mix_prompts(datasets, order="curriculum").dataset
    assert list(iterate_rows(mixed)) == rows[0] + rows[1]


def test_tools_become_json_text_and_missing_columns_none():
    datasets = {
        "none": make_part("historical", 2, tools=None),
        "text": make_part("curated", 2, tools=json.dumps(SCHEMA), completion=[{"role": "assistant", "content": "ok"}]),
        "list": make_part("synthetic", 2, tools=SCHEMA),
    }
    mixed = mix_prompts(datasets, order="curriculum").dataset
    assert [text and json.loads(text) for text in mixed["tools"]] == [None, None, *[SCHEMA] * 4]
    assert [completion is None for completion in mixed["completion"]] == [True, True, False, False, True, True]
    tokenizer = build_tokenizer()
    whole = list(render_prompt_ids(prepare_prompts(mixed)[1], tokenizer))
    alone = [list(render_prompt_ids(prepare_prompts(part)[1], tokenizer)) for part in datasets.values()]
    assert [sorted(whole[i : i + 2]) for i in (0, 2, 4)] == [sorted(ids) for ids in alone]


def test_report_is_json_and_a_table(parts):
    report = mix_prompts(parts, weights={"logs": 3, "curated": 1, "made": 0}, order="curriculum").report
    assert json.loads(json.dumps(report.to_dict()))["parts"][1] == {
        "name": "curated", "available": 10, "rows": 10, "repeated": 0, "share_asked": 0.25, "share": 0.25,
    }  # fmt: skip
    assert "| logs | 30 | 40 | 0 | 75.0% | 75.0% |" in report.to_markdown()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": {"logs": 1, "curated": 1}}, "the parts are"),
        ({"weights": {"logs": 1, "curated": -1, "made": 1}}, "-1"),
        ({"weights": {"logs": float("nan"), "curated": 1, "made": 1}}, "nan"),
        ({"weights": {"logs": 0, "curated": 0, "made": 0}}, "All `weights` are 0"),
        ({"weights": {"logs": 0.0001, "curated": 1000, "made": 1000}, "num_prompts": 0}, "`num_prompts` is 0"),
        ({"order": "difficulty"}, "'difficulty'"),
    ],
)
def test_wrong_arguments_are_refused(parts, arguments, message):
    with pytest.raises(ValueError, match=message):
        mix_prompts(parts, **arguments)


def test_parts_that_cannot_be_mixed_are_refused(parts):
    with pytest.raises(ValueError, match="nothing to mix"):
        mix_prompts({"logs": parts["logs"].select([])})
    with pytest.raises(ValueError, match="no rows"):
        mix_prompts({**parts, "logs": parts["logs"].select([])}, weights={"logs": 1, "curated": 1, "made": 1})
    with pytest.raises(ValueError, match="no `prompt`"):
        mix_prompts({**parts, "logs": parts["logs"].rename_column("prompt", "text")})
    with pytest.raises(ValueError, match=r"column `prompt`.*in `plain`"):
        mix_prompts({**parts, "plain": Dataset.from_list([{"prompt": "a text"}])})
