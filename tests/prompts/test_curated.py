"""Curated sets of every form, mapped to prompts."""

import json
import logging
import re

import pytest
from datasets import Dataset, DatasetDict

from spec_kd.data.prompt_rendering import prepare_prompts, render_prompt_ids
from spec_kd.prompts.curated import load_curated_prompts

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
        ({"chat": [[USER, ANSWER, FOLLOW_UP]], "a": ["2."]}, {"prompt_column": "chat", "completion_column": "a"}),
        (
            {"conversations": [[{"from": "human" if m["role"] == "user" else "gpt", "value": m["content"]}
                                for m in (USER, ANSWER, FOLLOW_UP, LAST)]]},
            {},
        ),
    ],
)  # fmt: skip
def test_conversations_without_and_with_their_answers(columns, options):
    dataset = Dataset.from_dict(columns)
    without = {name: value for name, value in options.items() if name != "completion_column"}
    prompts = load_curated_prompts(dataset, **without)
    assert prompts[0]["prompt"] == [USER, ANSWER, FOLLOW_UP]
    assert "completion" not in prompts.column_names
    kept = load_curated_prompts(dataset, keep_completions=True, **options)
    assert (kept[0]["prompt"], kept[0]["completion"]) == ([USER, ANSWER, FOLLOW_UP], [LAST])


def test_turns():
    dataset = Dataset.from_dict({"messages": [[USER, ANSWER, FOLLOW_UP, LAST]]})
    every = load_curated_prompts(dataset, turns="all", keep_completions=True)
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


def load_texts(dataset, **options):
    return [prompt[-1]["content"] for prompt in load_curated_prompts(dataset, **options)["prompt"]]


def test_a_blank_cell_leaves_its_row_out(tmp_path, caplog):
    path = tmp_path / "tasks.csv"
    path.write_text("instruction,input\nSummarize this,long text\nTell a joke,\n")
    texts = load_texts(str(path), question_template="{instruction}\n{input}")
    assert texts == ["Summarize this\nlong text"]
    assert "1 of 2 rows" in caplog.text and "row 1: the column 'input' is empty" in caplog.text


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{options[2]}", "IndexError"),
        ("{meta[level]}", "KeyError"),
        ("{question.size}", "AttributeError"),
        ("{question:d}", "Unknown format code 'd'"),
        ("{question[x]}", "TypeError"),
        ("{options}", "neither text nor a number"),
        ("{meta}", "neither text nor a number"),
        ("{question:{width}}", "KeyError: 'width'"),
        ("{mixed[0]}", "a place is empty"),
        ("{flag}", "neither text nor a number"),
        ("{score}", "a place is empty"),
    ],
)
def test_every_error_of_filling_a_template_leaves_the_row_out(template, reason):
    rows = Dataset.from_list([{**QUIZ[0], "question": "Bad?", "mixed": [None], "flag": True, "score": float("nan")}])
    with pytest.raises(ValueError, match="1 of 1 rows.*row 0: the template cannot be filled.*" + re.escape(reason)):
        load_curated_prompts(rows, question_template=template)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": true}', "{}", "[]", "[1, 2]", '["a"]', '[{"a": 1}]', '[{"role": "admin"}]', '  {"a": 1.0}\n', "null",
        "007", "1e5", "True", "{'a': 1}", '{"messages": []}', '"quoted"', "  spaces stay  ", "tab\tand\r\nline",
    ],
)  # fmt: skip
def test_text_is_never_rewritten(tmp_path, text):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"q": text, "a": text}) + "\n")
    prompts = load_curated_prompts(str(path), prompt_column="q", keep_completions=True, completion_column="a")
    assert prompts[0]["prompt"] == [{"role": "user", "content": text}]
    assert prompts[0]["completion"] == [{"role": "assistant", "content": text}]
    assert load_texts(str(path), question_template="{q}") == [text]


def test_cells_of_tables_are_text_as_it_stands(tmp_path):
    cells = ["007", "1e5", "True", "None", "NA", "null", "nan", "2024-05-06", "5"]
    for suffix, separator in ((".csv", ","), (".tsv", "\t"), (".CSV", ",")):
        path = tmp_path / f"table{suffix}"
        path.write_text(f"q{separator}n\n" + "".join(f"{cell}{separator}\n" for cell in cells))
        assert load_texts(str(path), prompt_column="q") == cells


@pytest.mark.parametrize(
    ("value", "kind"),
    [({"a": True}, "{'a': True}"), (["a", "b"], "['a', 'b']"), (1.5, "1.5"), (True, "True"), (b"x", "b'x'")],
)
def test_a_question_that_is_no_text_is_refused(value, kind):
    rows = Dataset.from_dict({"q": [value]})
    with pytest.raises(ValueError, match="row 0: the question is no text, and no messages, but " + re.escape(kind)):
        load_curated_prompts(rows, prompt_column="q")
    answers = Dataset.from_dict({"q": ["Why?"], "a": [value]})
    with pytest.raises(ValueError, match="row 0: the completion is no text"):
        load_curated_prompts(answers, prompt_column="q", keep_completions=True, completion_column="a")


def test_whole_numbers_are_text():
    assert load_texts(Dataset.from_dict({"q": [7]}), prompt_column="q") == ["7"]


def test_tools_that_are_none_leave_the_row_out():
    rows = Dataset.from_dict({"q": ["One?", "Two?"], "t": ["get_weather: tells the weather", '[{"name": "f"}]']})
    prompts = load_curated_prompts(rows, prompt_column="q", tools_column="t")
    assert prompts["tools"][:] == ['[{"name": "f"}]']


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "Grüße?\nWarum?\n"),
        ("a.csv", "text\nGrüße?\nWarum?\n"),
        ("a.jsonl", '{"text": "Grüße?"}\n{"text": "Warum?"}\n'),
        ("a.json", '["Grüße?", "Warum?"]'),
        ("b.json", '[{"text": "Grüße?"}, {"text": "Warum?"}]'),
    ],
)
def test_byte_order_marks_are_read_and_are_no_text(tmp_path, name, text, encoding):
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    assert load_texts(str(path), prompt_column="text") == ["Grüße?", "Warum?"]


def test_a_mark_in_a_file_of_a_folder_is_no_text(tmp_path):
    (tmp_path / "train.txt").write_text("Grüße?\n", encoding="utf-8-sig")
    assert load_texts(str(tmp_path), prompt_column="text") == ["Grüße?"]


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.jsonl", b'{"q": ', "JSON"),
        ("a.csv", b"", "is empty"),
        ("a.csv", "q\nGrüße\n".encode("cp1252"), "Save it as UTF-8"),
        ("a.txt", "Grüße\n".encode("cp1252"), "Save it as UTF-8"),
        ("a.parquet", b"PAR1", "Arrow"),
        ("a.xlsx", b"PK", "must be one of"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, data, reason):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"(?s){re.escape(str(tmp_path / name))}.*{reason}"):
        load_curated_prompts(str(tmp_path / name), prompt_column="q")


def test_rows_of_two_splits_are_two_conversations():
    splits = DatasetDict({"train": QUIZ, "test": QUIZ})
    names = [load_curated_prompts(splits, split=split, prompt_column="question")["conversation_id"] for split in splits]
    assert not set(names[0]) & set(names[1])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"question_template": "{question"}, "cannot be read"),
        ({}, r"give `prompt_column` or `question_template`"),
        ({"prompt_column": "q"}, r"`prompt_column` names 'q'.*\['question', 'options', 'answer', 'meta'\]"),
        ({"question_template": "{question} {choices[0]} {x.y}"}, "`question_template` names 'choices', 'x'"),
        ({"question_template": "{} {question}"}, "without a column's name"),
        ({"question_template": "no column"}, "reads no column"),
        ({"prompt_column": "question", "question_template": "{question}"}, "give one of them"),
        ({"prompt_column": "question", "tools_column": "t"}, "`tools_column` names 't'"),
        ({"prompt_column": "question", "completion_column": "answer"}, "keep_completions=True"),
        ({"prompt_column": "question", "turns": "none"}, "turns"),
    ],
)
def test_errors_name_columns_and_options(options, reason):
    with pytest.raises(ValueError, match=reason):
        load_curated_prompts(QUIZ, **options)
