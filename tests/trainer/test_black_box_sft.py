import copy

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig

from spec_kd.trainer import BlackBoxSFTConfig, BlackBoxSFTTrainer


def make_trainer(draft, tokenizer, dataset, options, **overrides):
    return BlackBoxSFTTrainer(
        model=draft, args=BlackBoxSFTConfig(**{**options, **overrides}), train_dataset=dataset,
        processing_class=tokenizer,
    )  # fmt: skip


def compute_nll(model, rows):
    """Mean negative log-likelihood of the completions alone, in float64."""
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        with torch.no_grad():
            log_q = torch.log_softmax(model(input_ids=ids).logits.double(), -1)[0, :-1]
        picked = log_q.gather(-1, ids[0, 1:, None])[len(row["prompt_ids"]) - 1 :]
        total, count = total + picked.sum().item(), count + len(picked)
    return -total / count


def test_loss_is_the_likelihood_of_the_completion_alone(draft, tokenizer, rows, options):
    expected = compute_nll(draft, rows[:4])
    trainer = make_trainer(draft, tokenizer, Dataset.from_list(rows[:4]), options)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[0] == pytest.approx(expected, rel=1e-4)
    assert compute_nll(draft, rows[:4]) < expected


def test_text_rows_give_the_same_training_rows_as_ids(draft, tokenizer, options):
    messages = [{"role": "user", "content": "Hi"}]
    text = {"prompt": messages, "completion": [{"role": "assistant", "content": "Yes."}]}
    ids = {
        "prompt_ids": tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False),
        "completion_ids": [*tokenizer("Yes.")["input_ids"], tokenizer.eos_token_id],
    }
    prepared = [
        make_trainer(draft, tokenizer, Dataset.from_list([row] * 2), options).train_dataset[0] for row in (text, ids)
    ]
    for column in ("input_ids", "labels"):
        assert prepared[0][column] == prepared[1][column]


def test_plain_text_and_template_arguments(tokenizer, draft, options):
    plain = Dataset.from_list([{"prompt": "Hi", "completion": " there"}] * 2)
    row = make_trainer(draft, tokenizer, plain, options).train_dataset[0]
    assert tokenizer.decode(row["input_ids"]) == "Hi there<|end|>"
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == " there<|end|>"

    templated = copy.deepcopy(tokenizer)
    templated.chat_template = "{{ style }}:" + tokenizer.chat_template
    messages = {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Yo"}]}
    rows = Dataset.from_list([{**messages, "chat_template_kwargs": {"style": "brief"}}] * 2)
    row = make_trainer(draft, templated, rows, options).train_dataset[0]
    assert tokenizer.decode(row["input_ids"]) == "brief:<|user|>Hi<|end|><|assistant|>Yo<|end|>"


def test_ids_win_over_text(draft, tokenizer, options):
    """What the target wrote need not be what its text is tokenized to."""
    row = {"prompt": "a", "completion": "b", "prompt_ids": [7, 8], "completion_ids": [9, 1]}
    trainer = make_trainer(draft, tokenizer, Dataset.from_list([row] * 2), options)
    assert trainer.train_dataset[0]["input_ids"] == [7, 8, 9, 1]
    assert trainer.train_dataset[0]["labels"] == [-100, -100, 9, 1]


def test_every_sft_option_is_taken_over(draft, tokenizer, rows, options):
    args = SFTConfig(**options, bf16=False, warmup_steps=3, eos_token="<|end|>", hub_token="secret", max_length=77)
    trainer = BlackBoxSFTTrainer(
        model=draft, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    assert isinstance(trainer.args, BlackBoxSFTConfig)
    for name in ("warmup_steps", "eos_token", "hub_token", "max_length", "bf16", "learning_rate", "output_dir"):
        assert getattr(trainer.args, name) == getattr(args, name), name


def test_text_alone_does_not_say_what_the_target_wrote(draft, tokenizer, options):
    with pytest.raises(ValueError, match=r"columns \['text'\].*assume_target_completions=True"):
        make_trainer(draft, tokenizer, Dataset.from_list([{"text": "a"}]), options)


@pytest.mark.parametrize(
    "overrides", [{"packing": True, "packing_strategy": "wrapped"}, {"packing": True, "packing_strategy": "bfd_split"},
                  {"truncation_mode": "keep_end"}],
)  # fmt: skip
def test_completions_beyond_max_length_are_learned_where_trl_keeps_them(draft, tokenizer, options, overrides, caplog):
    rows = [{"prompt_ids": [7] * 20, "completion_ids": [*[9] * 13, 1]}] * 4
    trainer = make_trainer(
        draft, tokenizer, Dataset.from_list(rows), options, max_length=16, padding_free=False, **overrides
    )
    assert sum(label != -100 for row in trainer.train_dataset["labels"] for label in row) == 56
    assert "teach nothing" not in caplog.text or "0 rows have no completion token" in caplog.text
