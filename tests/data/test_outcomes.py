"""Rows without a completion: prompts that a target cannot take, and tokens that are not exactly one id."""

import logging

import pytest
from datasets import Dataset
from tiny import build_llama, build_tokenizer

from spec_kd.data.outcomes import complete_batch, describe_unidentified, report_outcomes
from spec_kd.data.responses import generate_responses
from spec_kd.engines import UnusablePromptError
from spec_kd.engines.base import Completion
from spec_kd.engines.server.logprobs import UnidentifiedTokensError
from spec_kd.engines.transformers import TransformersEngine

WHOLE = Completion([5, 6], "length")
TEXTS = ["a", "x" * 600, "hello there", "y" * 700, "b"]


@pytest.fixture
def call():
    target, tokenizer = build_llama(seed=1), build_tokenizer()

    def generate(**options):
        options = {
            "max_new_tokens": 4, "temperature": 0.0, "batch_size": 2, "shard_size": 2, "show_progress": False,
            **options,
        }  # fmt: skip
        return generate_responses(target, TEXTS, processing_class=tokenizer, **options)

    return generate


def test_prompts_that_are_known_to_be_too_long(call, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.WARNING)
    with pytest.raises(UnusablePromptError, match=r'Prompt 3 has.*2 of 5 prompts.*`on_unusable_prompt="skip"`'):
        call(output_dir=tmp_path)
    rows = call(output_dir=tmp_path, on_unusable_prompt="skip")
    assert rows["prompt"][:] == ["a", "hello there", "b"]
    assert "2 of 5 prompts cannot be used" in caplog.text and "row 1" in caplog.text and "row 3" in caplog.text
    assert rows.to_list() == call(on_unusable_prompt="skip").to_list()
    monkeypatch.setattr(TransformersEngine, "generate", lambda *_: pytest.fail("it asked again"))
    assert call(output_dir=tmp_path, on_unusable_prompt="skip").to_list() == rows.to_list()


def test_nothing_left_and_other_choices(call):
    with pytest.raises(ValueError, match="`on_unusable_prompt` is 'drop'"):
        call(on_unusable_prompt="drop")
    with pytest.raises(UnusablePromptError, match=r"5 of 5 prompts.*Nothing is left"):
        call(on_unusable_prompt="skip", max_new_tokens=600)


def test_columns_stay_with_their_rows():
    dataset = Dataset.from_dict({"prompt": TEXTS, "number": range(5)})
    rows = generate_responses(
        build_llama(seed=1), dataset, processing_class=build_tokenizer(), max_new_tokens=4, temperature=0.0,
        on_unusable_prompt="skip", show_progress=False,
    )  # fmt: skip
    assert rows["number"][:] == [0, 2, 4]


def test_ids_of_padded_rows_stop_the_job_or_are_named():
    answers = [WHOLE, Completion([5, 300, 301], "length"), WHOLE]
    with pytest.raises(
        ValueError, match=r'row 8 contains id 300, but the tokenizer has 261.*on_unidentified_token="drop"'
    ):
        complete_batch(lambda: answers, [4, 8, 2], 261, "raise")
    dropped = complete_batch(lambda: answers, [4, 8, 2], 261, "drop")
    assert dropped == [WHOLE, ["(id 300, beyond the tokenizer)", "(id 301, beyond the tokenizer)"], WHOLE]


def test_names_take_the_place_of_completions():
    def run():
        raise UnidentifiedTokensError([["x", "x"], []], [None, WHOLE])

    assert complete_batch(run, [0, 1], 261, "drop") == [["x", "x"], WHOLE]
    with pytest.raises(UnidentifiedTokensError, match="2 tokens, in 1 of 2 completions") as raised:
        complete_batch(run, [0, 1], 261, "raise")
    assert raised.value.examples == ["x"]


def test_the_report_counts_what_it_does_not_list(caplog):
    unidentified = {row: [f"token {row}", "common"] for row in range(3, 33)}
    text = describe_unidentified(unidentified)
    assert text.startswith("30 responses have no exact ids, as 60 of their tokens are not exactly one id")
    assert "such as 'token 3', 'common', 'token 4', 'token 5', 'token 6': rows 3, 4," in text
    assert text.endswith(", 22 and 10 more")
    report_outcomes({}, {}, 40)
    assert not caplog.records
    report_outcomes({}, unidentified, 40)
    assert "10 rows for 40 prompts" in caplog.text
    with pytest.raises(ValueError, match="Nothing is left"):
        report_outcomes({}, unidentified, 30)
