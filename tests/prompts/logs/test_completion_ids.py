"""Logged answers go into training and scoring as they are."""

import json

import pytest
from chat_templates import FORMS
from datasets import Dataset, Features, Json, List
from transformers import AutoTokenizer, GenerationConfig

from spec_kd import BlackBoxSFTConfig, BlackBoxSFTTrainer, score_completions
from spec_kd.prompts.logs.completion_ids import add_completion_ids
from spec_kd.prompts.logs.query_logs import load_query_logs


@pytest.fixture
def prompts(tmp_path):
    records = [
        {
            "messages": [{"role": "system", "content": "Short."}, {"role": "user", "content": text}],
            "choices": [{"message": {"role": "assistant", "content": text[::-1]}, "finish_reason": reason}],
        }
        for text, reason in (
            ("apple pie", "stop"),
            ("violin case", "stop"),
            ("volcano", "length"),
            ("tax return", "stop"),
        )
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return load_query_logs(tmp_path / "log.jsonl", tmp_path / "out", test_fraction=0, show_progress=False).train


def test_ids_are_those_of_the_answer_and_its_eos(prompts, tokenizer, caplog):
    rows = add_completion_ids(prompts, tokenizer)
    assert len(rows) == 3 and "1 of 4 rows are left out: there is no completion (1)" in caplog.text
    for row in rows:
        text = row["prompt"][-1]["content"]
        assert tokenizer.decode(row["prompt_ids"]) == f"<|system|>Short.<|end|><|user|>{text}<|end|><|assistant|>"
        assert row["completion_ids"] == [*tokenizer(text[::-1])["input_ids"], tokenizer.eos_token_id]


def test_scoring_and_training(prompts, tokenizer, target, draft, tmp_path):
    rows = add_completion_ids(prompts, tokenizer)
    scored = score_completions(target, rows, processing_class=tokenizer, show_progress=False)
    assert [len(r["teacher_token_logprobs"]) for r in scored] == [len(r["completion_ids"]) for r in scored]
    answered = prompts.filter(lambda completion: completion is not None, input_columns=["completion"])
    arguments = BlackBoxSFTConfig(
        str(tmp_path / "run"), max_steps=1, use_cpu=True, gradient_checkpointing=False, report_to=[], save_strategy="no"
    )
    trainer = BlackBoxSFTTrainer(model=draft, args=arguments, train_dataset=answered, processing_class=tokenizer)
    assert trainer.train().training_loss > 0


def test_needs_answers(prompts, tokenizer):
    with pytest.raises(ValueError, match="no `completion`"):
        add_completion_ids(prompts.remove_columns("completion"), tokenizer)
    with pytest.raises(ValueError, match="nothing is left"):
        add_completion_ids(prompts.select([2]), tokenizer)


USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Fine."}
LISTS = List(Json())


def make_dataset(*answers, **columns):
    columns = {"prompt": [[USER]] * len(answers), "completion": answers, **columns}
    return Dataset.from_dict(columns, features=Features({"prompt": LISTS, "completion": LISTS}))


def decode(rows, tokenizer):
    return [tokenizer.decode(ids) for ids in rows["completion_ids"]]


@pytest.mark.parametrize("name", FORMS)
def test_answers_end_where_the_target_ends_them(name):
    form, tokenizer = FORMS[name], FORMS[name].build()
    answer = {**REPLY, "reasoning_content": "Hm."} if form.think else REPLY
    rows = add_completion_ids(make_dataset([answer]), tokenizer)
    assert decode(rows, tokenizer) == [(form.think or form.opening) + "Fine." + form.end]
    assert rows.features["completion_ids"] == rows.features["prompt_ids"]


def test_empty_reasoning_of_the_template_is_said(caplog):
    """A log that lacks the reasoning looks like one of a target that did not reason."""
    tokenizer = FORMS["qwen3"].build()
    answers = [[REPLY], [{**REPLY, "reasoning_content": "Hm."}], [REPLY]]
    add_completion_ids(make_dataset(*answers), tokenizer)
    assert "2 completions have no reasoning, and the chat template writes an empty one" in caplog.text
    caplog.clear()
    add_completion_ids(make_dataset(answers[1]), tokenizer)
    add_completion_ids(make_dataset([REPLY]), FORMS["gemma4"].build())
    assert "have no reasoning" not in caplog.text


def test_ends_of_turn_of_the_generation_config(tmp_path):
    """Given, or saved with the tokenizer: GLM's template leaves the end of a turn to the turn behind it."""
    tokenizer = FORMS["phi3"].build()
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    user_id = tokenizer.convert_tokens_to_ids("<|user|>")
    with pytest.raises(ValueError, match="writes no end of turn"):
        add_completion_ids(make_dataset([REPLY]), tokenizer)
    rows = add_completion_ids(make_dataset([REPLY]), tokenizer, eos_token_id=user_id)
    assert decode(rows, tokenizer) == ["Fine.<|user|>"]
    tokenizer.save_pretrained(tmp_path)
    GenerationConfig(eos_token_id=[tokenizer.eos_token_id, user_id]).save_pretrained(tmp_path)
    rows = add_completion_ids(make_dataset([REPLY]), AutoTokenizer.from_pretrained(tmp_path))
    assert decode(rows, tokenizer) == ["Fine.<|user|>"]


def test_template_arguments_and_tools():
    tokenizer = FORMS["qwen3"].build()
    dataset = make_dataset([REPLY]).add_column("chat_template_kwargs", [{"enable_thinking": False}])
    rows = add_completion_ids(dataset, tokenizer)
    assert decode(rows, tokenizer) == ["Fine.<|im_end|>"]
    assert tokenizer.decode(rows[0]["prompt_ids"]).endswith("<think>\n\n</think>\n\n")


def test_what_the_template_does_not_print_is_left_out_and_counted(tokenizer, caplog):
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": None}}}
    dataset = make_dataset(
        [REPLY],
        [{"role": "assistant", "content": "", "tool_calls": [call]}],
        [{"role": "assistant", "content": "I call.", "tool_calls": [call]}],
        [{"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}],
        [{"role": "assistant", "content": ""}],
        [REPLY, REPLY],
        [],
        None,
        [{"role": "tool", "content": "Fine."}],
        [REPLY],
        prompt=[[USER]] * 9 + [[USER, REPLY]],
    )
    rows = add_completion_ids(dataset, tokenizer)
    assert decode(rows, tokenizer) == ["Fine.<|end|>"]
    assert "9 of 10 rows are left out" in caplog.text
    for reason in (
        "does not print the completion (2)", "does not print the reasoning (1)", "the completion is empty (1)",
        "the completion has several messages (1)", "there is no completion (2)",
        "the completion has the role 'tool' (1)", "the prompt ends with an assistant turn (1)",
    ):  # fmt: skip
        assert reason in caplog.text


def test_calls_as_a_template_prints_them(tokenizer):
    """With the keys that the call has, `null` among them."""
    other = FORMS["chatml"].build()
    other.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m.tool_calls %}{% for c in m.tool_calls %}"
        "<call>{{ c.function | tojson }}</call>{% endfor %}{% endif %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    other.eos_token = "<|end|>"
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": None}}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    rows = add_completion_ids(make_dataset([answer]), other)
    assert decode(rows, other) == ['<call>{"name": "f", "arguments": {"x": null}}</call><|end|>']


@pytest.mark.parametrize("column", ["prompt", "completion"])
def test_text_instead_of_messages_is_named(tokenizer, column):
    columns = {"prompt": [[USER]], "completion": [[REPLY]], column: ["Hi"]}
    with pytest.raises(ValueError, match=f"`{column}` of row 0 is text"):
        add_completion_ids(Dataset.from_dict(columns), tokenizer)


def test_a_prompt_that_cannot_be_rendered_names_its_row():
    tokenizer = FORMS["gemma"].build()
    dataset = make_dataset([REPLY], [REPLY], prompt=[[USER], [{"role": "system", "content": "x"}, USER]])
    with pytest.raises(ValueError, match=r"row 1 \(Conversation roles must alternate\)"):
        add_completion_ids(dataset, tokenizer)
