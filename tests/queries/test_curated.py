"""Curated sets of every form, mapped to prompts."""

import json
import logging

import pytest
from datasets import Dataset, DatasetDict

from spec_kd.data.prompts import prepare_prompts, render_prompt_ids
from spec_kd.queries.curated import load_curated_prompts

QUIZ = Dataset.from_list(
    [
        {
            "question": "Which organ pumps blood?",
            "options": ["heart", "liver"],
            "answer": "heart",
            "meta": {"topic": "a"},
        },
        {
            "question": "Which organ filters blood?",
            "options": ["lung", "kidney"],
            "answer": "kidney",
            "meta": {"topic": "b"},
        },
    ]
)
USER, ANSWER = {"role": "user", "content": "One?"}, {"role": "assistant", "content": "1."}
FOLLOW_UP, LAST = {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2."}


def test_a_column():
    prompts = load_curated_prompts(QUIZ, prompt_column="question")
    assert prompts.column_names == ["prompt", "scenario", "source", "conversation_id"]
    assert prompts[0]["prompt"] == [{"role": "user", "content": "Which organ pumps blood?"}]
    assert set(prompts["scenario"]) == {"curated"}
    assert len(set(prompts["conversation_id"])) == 2


def test_templates(tokenizer):
    template = "{question}\nA. {options[0]}\nB. {options[1]}\n{{{meta[topic]}}}"
    prompts = load_curated_prompts(QUIZ, question_template=template, system_prompt="Answer {briefly}.")
    assert prompts[1]["prompt"] == [
        {"role": "system", "content": "Answer {briefly}."},
        {"role": "user", "content": "Which organ filters blood?\nA. lung\nB. kidney\n{b}"},
    ]
    _, rows = prepare_prompts(prompts)
    assert tokenizer.decode(next(iter(render_prompt_ids(rows, tokenizer)))).startswith("<|system|>Answer {briefly}.")


def test_one_of_several_templates_by_seed():
    rows = Dataset.from_dict({"q": [str(n) for n in range(200)]})
    texts = [
        [p[0]["content"] for p in load_curated_prompts(rows, question_template=["a{q}", "b{q}"], seed=seed)["prompt"]]
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert 60 < sum(text.startswith("a") for text in texts[0]) < 140
    assert [text[1:] for text in texts[0]] == rows["q"][:]


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        ({"messages": [[USER, ANSWER, FOLLOW_UP, LAST]]}, {}),
        ({"messages": [json.dumps([USER, ANSWER, FOLLOW_UP, LAST])]}, {}),
        ({"prompt": [[USER, ANSWER, FOLLOW_UP]], "completion": [[LAST]]}, {}),
        ({"chat": [[USER, ANSWER, FOLLOW_UP]], "a": ["2."]}, {"prompt_column": "chat", "answer_column": "a"}),
        (
            {"conversations": [[{"from": "human" if m["role"] == "user" else "gpt", "value": m["content"]}
                                for m in (USER, ANSWER, FOLLOW_UP, LAST)]]},
            {},
        ),
    ],
)  # fmt: skip
def test_conversations_without_and_with_their_answers(columns, options):
    dataset = Dataset.from_dict(columns)
    without = {name: value for name, value in options.items() if name != "answer_column"}
    prompts = load_curated_prompts(dataset, **without)
    assert prompts[0]["prompt"] == [USER, ANSWER, FOLLOW_UP]
    assert "completion" not in prompts.column_names
    kept = load_curated_prompts(dataset, keep_answers=True, **options)
    assert (kept[0]["prompt"], kept[0]["completion"]) == ([USER, ANSWER, FOLLOW_UP], [LAST])


def test_turns():
    dataset = Dataset.from_dict({"messages": [[USER, ANSWER, FOLLOW_UP, LAST]]})
    every = load_curated_prompts(dataset, turns="all", keep_answers=True)
    assert every["prompt"][:] == [[USER], [USER, ANSWER, FOLLOW_UP]]
    assert every["completion"][:] == [[ANSWER], [LAST]]
    assert len(set(every["conversation_id"])) == 1
    assert load_curated_prompts(dataset, turns="first")["prompt"][:] == [[USER]]


def test_tools_are_json_text():
    tools = [{"name": "f", "parameters": {"a": 1}}, {"name": "g"}]
    for value in (tools, json.dumps(tools)):
        dataset = Dataset.from_dict({"q": ["x"], "t": [value]})
        prompts = load_curated_prompts(dataset, prompt_column="q", tools_column="t")
        assert json.loads(prompts[0]["tools"]) == tools


def test_files_and_splits(tmp_path):
    path = tmp_path / "quiz.jsonl"
    QUIZ.to_json(str(path))
    prompts = load_curated_prompts(str(path), prompt_column="question")
    assert len(prompts) == 2 and prompts[0]["source"] == str(path)
    splits = DatasetDict({"train": QUIZ, "test": QUIZ.select([1])})
    assert len(load_curated_prompts(splits, split="test", prompt_column="question")) == 1
    with pytest.raises(ValueError, match="'train', 'test'"):
        load_curated_prompts(splits, split="dev", prompt_column="question")


def test_rows_without_a_question_are_counted(caplog):
    dataset = Dataset.from_dict({"q": ["one", None, " ", "two"]})
    with caplog.at_level(logging.WARNING):
        prompts = load_curated_prompts(dataset, prompt_column="q")
    assert prompts["conversation_id"][:] == ["dataset:0", "dataset:3"]
    assert "2 of 4 rows" in caplog.text and "row 1: the question is empty" in caplog.text
    with pytest.raises(ValueError, match="nothing is left"):
        load_curated_prompts(dataset.select([1, 2]), prompt_column="q")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, r"give `prompt_column` or `question_template`"),
        ({"prompt_column": "q"}, r"`prompt_column` names 'q'.*\['question', 'options', 'answer', 'meta'\]"),
        ({"question_template": "{question} {choices[0]} {x.y}"}, "`question_template` names 'choices', 'x'"),
        ({"question_template": "{} {question}"}, "without a column's name"),
        ({"question_template": "no column"}, "reads no column"),
        ({"prompt_column": "question", "question_template": "{question}"}, "give one of them"),
        ({"prompt_column": "question", "tools_column": "t"}, "`tools_column` names 't'"),
        ({"prompt_column": "question", "answer_column": "answer"}, "keep_answers=True"),
        ({"prompt_column": "question", "turns": "none"}, "turns"),
    ],
)
def test_errors_name_columns_and_options(options, reason):
    with pytest.raises(ValueError, match=reason):
        load_curated_prompts(QUIZ, **options)
