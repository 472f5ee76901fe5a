"""Labels are on what the target wrote, whatever form the rows have."""

import json
import logging

import pytest
from chat_templates import FORMS
from datasets import Dataset, Features, IterableDataset, Json, List
from trl import pack_dataset

from spec_kd.data.chat_rendering import ChatRenderer
from spec_kd.data.prompt_rendering import prepare_prompts, render_prompt_ids
from spec_kd.data.training_rows import check_training_columns, count_cut_rows, to_training_rows

TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "Fine."},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer", "default": None}}},
        },
    }
]
CALLS = [{"type": "function", "function": {"name": "add", "arguments": {"a": None}}}]


def find_spans(row):
    """Runs of ids that have labels."""
    spans, previous = [], False
    for id, label in zip(row["input_ids"], row["labels"], strict=True):
        if label != -100:
            assert label == id
            if not previous:
                spans.append([])
            spans[-1].append(id)
        previous = label != -100
    return spans


def prepare(rows, tokenizer, **options):
    return list(to_training_rows(Dataset.from_list(rows, on_mixed_types="use_json"), tokenizer, **options))


@pytest.mark.parametrize("name", FORMS)
def test_every_assistant_turn_is_a_target(name):
    """In one row where each turn's history begins with the row so far, otherwise in a row of its own."""
    form, tokenizer = FORMS[name], FORMS[name].build()
    turns = [dict(turn) for turn in TURNS]
    if form.think:
        for turn in turns[1::2]:
            turn["content" if name == "deepseek-r1" else "reasoning_content"] = "Hm."
        if name == "deepseek-r1":
            turns = [dict(t, content=form.think + TURNS[i]["content"]) if i % 2 else t for i, t in enumerate(turns)]
    rows = prepare([{"messages": turns}], tokenizer)
    assert len(rows) == (2 if form.drops_reasoning else 1)
    opening = form.think or form.opening
    written = [tokenizer.decode(span) for row in rows for span in find_spans(row)]
    assert written == [opening + "Hello." + form.end, opening + "Fine." + form.end]
    renderer = ChatRenderer(tokenizer)
    for i, row in zip((3, 1), rows[::-1], strict=False):
        prompt = next(render_prompt_ids([{"prompt": turns[:i]}], tokenizer))
        assert row["input_ids"] == prompt + find_spans(row)[-1] and row["input_ids"][-1] in renderer.end_ids


def test_turns_in_rows_of_their_own_where_it_is_asked_for():
    tokenizer = FORMS["chatml"].build()
    (whole,) = prepare([{"messages": TURNS}], tokenizer)
    rows = prepare([{"messages": TURNS}], tokenizer, join_turns=False)
    assert [len(find_spans(row)) for row in rows] == [1, 1]
    assert rows[1]["input_ids"] == whole["input_ids"]
    assert [find_spans(row)[0] for row in rows] == find_spans(whole)


def test_generation_markers_say_what_the_assistant_wrote():
    tokenizer = FORMS["marked"].build()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% generation %}{{ m.content }}", "{{ m.content[:2] }}{% generation %}{{ m.content[2:] }}"
    )
    (row,) = prepare([{"messages": TURNS}], tokenizer)
    assert [tokenizer.decode(span) for span in find_spans(row)] == ["llo.<|im_end|>", "ne.<|im_end|>"]


def test_results_of_tools_are_not_the_targets():
    tokenizer = FORMS["qwen2.5"].build()
    messages = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "", "tool_calls": CALLS},
        {"role": "tool", "content": "two"},
        {"role": "assistant", "content": "2."},
    ]
    call = '<tool_call>\n{"name": "add", "arguments": {"a": null}}\n</tool_call><|im_end|>'
    for row in ({"messages": messages}, {"prompt": messages[:1], "completion": messages[1:]}):
        features = Features({name: List(Json()) for name in row})
        (made,) = to_training_rows(Dataset.from_list([row], features=features), tokenizer)
        assert [tokenizer.decode(span) for span in find_spans(made)] == [call, "2.<|im_end|>"]
        assert "two" in tokenizer.decode(made["input_ids"])


def test_conversations_of_from_and_value():
    tokenizer = FORMS["chatml"].build()
    expected = prepare([{"messages": TURNS}], tokenizer)
    shares = [{"from": {"user": "human", "assistant": "gpt"}[t["role"]], "value": t["content"]} for t in TURNS]
    assert prepare([{"conversations": shares}], tokenizer) == expected
    assert prepare([{"conversations": TURNS}], tokenizer) == expected


def test_prompts_are_the_same_for_generation_and_for_training(monkeypatch):
    """With `null` where the data have it, and no key that other rows have."""
    tokenizer = FORMS["qwen2.5"].build()
    chats = [
        [TURNS[0], {"role": "assistant", "content": "", "tool_calls": CALLS}, {"role": "tool", "content": "2"}],
        [{"role": "system", "content": "Be brief."}, TURNS[0]],
    ]
    completion = [{"role": "assistant", "content": "2."}]
    from_list, rows = prepare_prompts(chats)
    assert list(from_list["prompt"]) == chats
    expected = list(render_prompt_ids(rows, tokenizer))
    assert '{"a": null}' in tokenizer.decode(expected[0]) and "null" not in tokenizer.decode(expected[1])
    made = to_training_rows(from_list.add_column("completion", [completion] * 2), tokenizer)
    assert [row["input_ids"][: len(ids)] for row, ids in zip(made, expected, strict=True)] == expected
    for tools in (TOOLS, json.dumps(TOOLS)):
        dataset = Dataset.from_list([{"prompt": chat, "tools": tools, "completion": completion} for chat in chats])
        with_tools = list(render_prompt_ids(prepare_prompts(dataset)[1], tokenizer))
        assert all('{"type": "integer", "default": null}' in tokenizer.decode(ids) for ids in with_tools)
        assert '"arguments": {"a": null}' in tokenizer.decode(with_tools[0])
        made = to_training_rows(dataset, tokenizer)
        assert [row["input_ids"][: len(ids)] for row, ids in zip(made, with_tools, strict=True)] == with_tools


@pytest.mark.parametrize("is_streamed", [False, True])
def test_what_cannot_be_told_is_left_out_and_counted(is_streamed, caplog):
    tokenizer = FORMS["deepseek-r1"].build()
    rows = [
        {"messages": TURNS},
        {"messages": TURNS[:1]},
        {"messages": [TURNS[0], {**TURNS[3], "content": "Hm.</think>Yes"}]},
    ]
    dataset = Dataset.from_list(rows)
    made = list(to_training_rows(dataset.to_iterable_dataset() if is_streamed else dataset, tokenizer))
    assert [tokenizer.decode(find_spans(row)[0]) for row in made] == ["Hm.</think>Yes<|eos|>"]
    if not is_streamed:
        assert "3 turns of the training dataset are left out" in caplog.text
        assert "opens a reasoning (<think>) that the completion does not have (2)" in caplog.text
        with pytest.raises(ValueError, match="No turn of the training dataset is left"):
            prepare(rows[:2], tokenizer)


def test_that_turns_are_taken_as_the_targets_is_said(caplog):
    caplog.set_level(logging.WARNING)
    prepare([{"messages": TURNS}], FORMS["chatml"].build(), name="eval")
    assert caplog.text.count("every assistant turn of its conversations counts as written by the target") == 1
    assert "Eval dataset" in caplog.text


def test_rows_that_a_template_refuses_are_named():
    with pytest.raises(ValueError, match=r"row 1 of the training dataset \(Conversation roles must alternate\)"):
        prepare(
            [{"messages": TURNS}, {"messages": [{"role": "system", "content": "x"}, *TURNS]}], FORMS["gemma"].build()
        )


def test_text(tokenizer):
    (row,) = prepare([{"prompt": "Hi", "completion": " there"}], tokenizer)
    assert tokenizer.decode(row["input_ids"]) == "Hi there<|end|>"
    assert [tokenizer.decode(span) for span in find_spans(row)] == [" there<|end|>"]


@pytest.mark.parametrize("completion_only_loss", [None, True, False])
def test_masks_and_ids(completion_only_loss):
    ids, mask = [5, 6, 7, 8], [0, 0, 1, 1]
    options = {"completion_only_loss": completion_only_loss}
    completion = [-100, -100, 7, 8] if completion_only_loss is not False else ids
    for row in ({"input_ids": ids, "completion_mask": mask}, {"prompt_ids": ids[:2], "completion_ids": ids[2:]}):
        assert prepare([row], None, **options) == [{"input_ids": ids, "labels": completion}]
    row = {"input_ids": ids, "assistant_masks": [0, 1, 0, 1]}
    assert prepare([row], None, **options) == [{"input_ids": ids, "labels": [-100, 6, -100, 8]}]
    both = prepare([{**row, "completion_mask": mask}], None, **options)
    assert both[0]["labels"] == ([-100, -100, -100, 8] if completion_only_loss is not False else [-100, 6, -100, 8])


def test_prompts_are_learned_where_it_is_asked_for():
    tokenizer = FORMS["chatml"].build()
    (row,) = prepare([{"prompt": TURNS[:3], "completion": TURNS[3:]}], tokenizer, completion_only_loss=False)
    assert row["labels"] == row["input_ids"] and tokenizer.decode(row["labels"]).startswith("<|im_start|>user")


def test_streams_of_conversations():
    """A row comes when it is there, not when the next ones are."""
    tokenizer, read = FORMS["qwen3"].build(), []

    def stream():
        for i in range(2):
            read.append(i)
            yield {"messages": TURNS}

    rows = to_training_rows(IterableDataset.from_generator(stream), tokenizer)
    read.clear()
    first = next(iter(rows))
    assert len(read) <= 1
    assert [first, *list(rows)[1:]] == prepare([{"messages": TURNS}] * 2, tokenizer)


def test_empty_reasoning_of_the_template_is_said(caplog):
    prepare([{"messages": TURNS}], FORMS["qwen3"].build())
    assert "2 turns of the training dataset have no reasoning" in caplog.text


def test_prompt_and_completion_win_over_messages():
    tokenizer = FORMS["chatml"].build()
    row = {"prompt": TURNS[:1], "completion": TURNS[1:2]}
    assert prepare([{**row, "messages": TURNS}], tokenizer) == prepare([row], tokenizer)


def test_answers_that_are_missing_or_of_another_kind_are_counted(caplog):
    tokenizer = FORMS["chatml"].build()
    rows = [
        {"prompt": TURNS[:1], "completion": TURNS[1:2]},
        {"prompt": TURNS[:1], "completion": None},
        {"prompt": TURNS[:1], "completion": "Hello."},
    ]
    dataset = IterableDataset.from_generator(lambda: iter(rows))
    assert len(list(to_training_rows(dataset, tokenizer))) == 1
    assert len(prepare(rows[:2], tokenizer)) == 1 and "there is no completion (1)" in caplog.text


def test_columns():
    for row in ({"messages": TURNS}, {"input_ids": [1], "assistant_masks": [1]}, {"conversations": TURNS}):
        check_training_columns(Dataset.from_list([row]), "training")
    text = Dataset.from_list([{"text": "Hi"}])
    with pytest.raises(ValueError, match=r"columns \['text'\].*assume_target_completions=True"):
        check_training_columns(text, "training")
    check_training_columns(text, "training", assume_target_completions=True)


@pytest.mark.parametrize(
    ("mode", "strategy", "expected"),
    [
        ("keep_start", None, (2, 1)),
        ("keep_end", None, (2, 0)),
        ("keep_start", "bfd", (2, 1)),
        ("keep_start", "bfd_split", (0, 0)),
        ("keep_start", "wrapped", (0, 0)),
    ],
)
def test_cut_rows_are_those_that_trl_cuts(mode, strategy, expected):
    rows = [(6, 4), (1, 2), (3, 3)]  # tokens of prompt and completion
    dataset = Dataset.from_list([{"input_ids": [7] * (p + c), "labels": [-100] * p + [7] * c} for p, c in rows])
    assert count_cut_rows(dataset, 5, truncation_mode=mode, packing_strategy=strategy) == expected
    if strategy is not None:
        kept = sum(label != -100 for row in pack_dataset(dataset, 5, strategy)["labels"] for label in row)
        assert kept == (9 if expected == (0, 0) else 4)
