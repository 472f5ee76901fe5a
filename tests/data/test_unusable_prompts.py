"""Prompts that a target cannot take: named by their row, the others kept, and a way to go on."""

import logging

import pytest
from datasets import Dataset
from tiny import build_llama, build_tokenizer

from spec_kd.data.responses import generate_responses
from spec_kd.engines import UnusablePromptError
from spec_kd.engines.transformers import TransformersEngine

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
