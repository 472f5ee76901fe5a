"""Logged answers go into training and scoring as they are."""

import json

import pytest

from spec_kd import BlackBoxSFTConfig, BlackBoxSFTTrainer, score_completions
from spec_kd.queries.logged_completions import add_completion_ids
from spec_kd.queries.query_logs import load_query_logs


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
    assert len(rows) == 3 and "1 of 4 rows" in caplog.text
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
