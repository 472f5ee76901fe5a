"""Budgets of tokens and minutes: how many steps they give, what the learning rate follows, and what resuming leaves."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, IterableDataset
from tiny import build_llama
from transformers import TrainerCallback

from spec_kd import BlackBoxSFTConfig, BlackBoxSFTTrainer, OnlineGKDConfig, OnlineGKDTrainer

EQUAL_ROWS = [{"prompt_ids": [5, 6, 7, 8], "completion_ids": [*range(20 + i, 25 + i), 1]} for i in range(16)]


@pytest.fixture
def make_trainer(tokenizer, options):
    def make(rows=EQUAL_ROWS, callbacks=(), seed=0, **overrides):
        args = {
            **options, "max_steps": -1, "lr_scheduler_type": "linear", "save_strategy": "steps", "save_steps": 2,
            **overrides,
        }  # fmt: skip
        return BlackBoxSFTTrainer(
            model=build_llama(seed=seed), args=BlackBoxSFTConfig(**args), processing_class=tokenizer,
            train_dataset=rows if isinstance(rows, IterableDataset) else Dataset.from_list(rows),
            callbacks=list(callbacks),
        )  # fmt: skip

    return make


@pytest.fixture
def clock(monkeypatch):
    """A clock that a step moves by `step` seconds."""

    class Clock(TrainerCallback):
        now, step = 100.0, 6.0

        def on_substep_end(self, args, state, control, **kwargs):
            raise AssertionError("no accumulation here")

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            self.now += self.step

    found = Clock()
    monkeypatch.setattr("spec_kd.trainer.budget.time", SimpleNamespace(perf_counter=lambda: found.now))
    return found


def read_logs(trainer, name):
    return [log[name] for log in trainer.state.log_history if name in log]


def assert_same_weights(one, other):
    for (name, value), expected in zip(one.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name


def test_tokens_give_the_steps_and_the_schedule_of_max_steps(make_trainer, caplog):
    """Rows of 10 tokens, 4 in a step, 16 in an epoch: 200 tokens are 5 steps, whatever `num_train_epochs` says."""
    trainer = make_trainer(max_train_tokens=200, num_train_epochs=1)
    output = trainer.train()
    assert "200 tokens (0 used). About 5 steps are left, of 40 tokens each." in caplog.text
    plain = make_trainer(max_steps=5, output_dir=f"{trainer.args.output_dir}-plain")
    plain.train()
    assert trainer.state.global_step == output.global_step == 5
    assert read_logs(trainer, "learning_rate") == read_logs(plain, "learning_rate")
    assert_same_weights(trainer, plain)
    assert read_logs(trainer, "budget/tokens_left") == [160, 120, 80, 40, 0]
    assert read_logs(trainer, "budget/steps_left") == [4, 3, 2, 1, 0]
    assert output.metrics["train_samples_per_second"] * output.metrics["train_runtime"] == pytest.approx(20, rel=0.05)
    assert (Path(trainer.args.output_dir) / "checkpoint-5").is_dir()  # the last step is saved as that of `max_steps`


@pytest.mark.parametrize("at", [2, 4, 5])
def test_a_resumed_run_goes_on_with_the_tokens_that_are_left(at, make_trainer):
    first = make_trainer(max_train_tokens=200)
    first.train()
    again = make_trainer(max_train_tokens=200, seed=5)
    again.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-{at}")
    assert again.state.global_step == 5
    assert_same_weights(again, first)
    saved = json.loads((Path(first.args.output_dir) / "checkpoint-5" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["BudgetSpent"]["attributes"]["tokens"] == 200


@pytest.mark.parametrize("restores", [True, False])
def test_what_is_left_counts_and_not_the_number_of_steps(restores, make_trainer):
    """80 of 200 tokens are used in two steps of four rows; three rows in a step make four more steps of the others."""
    first = make_trainer(max_train_tokens=80)
    first.train()
    again = make_trainer(
        max_train_tokens=200, per_device_train_batch_size=3, seed=5, ignore_data_skip=True,
        restore_callback_states_from_checkpoint=restores,
    )  # fmt: skip
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2 + 4
    # a second training in the same process begins with the whole budget
    again.train()
    assert read_logs(again, "budget/tokens_left")[0] == 200 - 30


def test_a_checkpoint_of_a_run_without_a_budget_is_resumed_with_one(make_trainer):
    make_trainer(max_steps=2).train()
    again = make_trainer(max_train_tokens=160)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2 + 4  # what was used before is not known


@pytest.mark.parametrize("overrides", [{}, {"packing": True, "max_length": 32}, {"gradient_accumulation_steps": 2}])
def test_rows_of_all_lengths_end_within_a_step_of_the_budget(overrides, make_trainer, rows):
    trainer = make_trainer(rows, max_train_tokens=400, **overrides)
    trainer.train()
    left = read_logs(trainer, "budget/tokens_left")
    tokens = read_logs(trainer, "num_tokens")
    assert [max(0, 400 - count) for count in tokens] == left  # TRL's own count
    largest = max(after - before for before, after in zip([0, *tokens], tokens, strict=False))
    assert abs(tokens[-1] - 400) <= largest


def test_minutes_end_at_the_pace_of_the_machine_and_the_rate_has_decayed(make_trainer, clock, caplog):
    trainer = make_trainer(max_train_minutes=1, callbacks=[clock])
    trainer.train()
    assert trainer.state.global_step == 10
    assert read_logs(trainer, "learning_rate")[1:] == pytest.approx([1e-2 * (1 - k / 10) for k in range(1, 10)])
    assert "1 minutes (0.0 used). The number of steps follows" in caplog.text
    assert "1 minutes (0.5 used). About 5 steps are left, of 40 tokens each: 0.5 minutes." in caplog.text
    assert read_logs(trainer, "budget/minutes_left")[4] == pytest.approx(0.5)
    assert (Path(trainer.args.output_dir) / "checkpoint-10").is_dir()


def test_a_slower_machine_takes_fewer_steps_in_the_same_time(make_trainer, clock):
    class Slower(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            clock.step = 6.0 if state.global_step < 4 else 18.0

    start = clock.now
    trainer = make_trainer(max_train_minutes=1, callbacks=[clock, Slower()])
    trainer.train()
    assert trainer.state.global_step == 6 and clock.now - start == 4 * 6 + 2 * 18
    assert read_logs(trainer, "budget/steps_left")[-1] == 0


def test_a_resumed_run_goes_on_with_the_minutes_that_are_left(make_trainer, clock, caplog):
    first = make_trainer(max_train_minutes=1, callbacks=[clock])
    first.train()
    clock.step = 12.0  # on another machine
    again = make_trainer(max_train_minutes=1, callbacks=[clock])
    start = clock.now
    again.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-4")  # after 24 seconds
    assert again.state.global_step == 4 + 3 and clock.now - start == 36
    assert "1 minutes (0.4 used). About 6 steps are left" in caplog.text
    spent = make_trainer(max_train_minutes=1, callbacks=[clock])
    spent.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-10")
    assert spent.state.global_step == 10 and "nothing is left to train" in caplog.text
    more = make_trainer(max_train_minutes=1.4, callbacks=[clock])
    more.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-10")
    assert more.state.global_step == 12


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({"max_train_tokens": 200, "max_train_minutes": 1}, 5),
        ({"max_train_tokens": 2000, "max_train_minutes": 1}, 10),
        ({"max_train_tokens": 2000, "max_train_minutes": 1, "max_steps": 3}, 3),
    ],
)
def test_the_limit_that_is_reached_first_ends_the_run(limits, steps, make_trainer, clock):
    trainer = make_trainer(callbacks=[clock], **limits)
    trainer.train()
    assert trainer.state.global_step == steps


def test_a_warm_up_is_a_share_of_the_steps_that_there_will_be(make_trainer, clock):
    trainer = make_trainer(max_train_minutes=1, callbacks=[clock], warmup_steps=0.5, lr_scheduler_type="cosine")
    trainer.train()
    rates = read_logs(trainer, "learning_rate")
    assert rates.index(max(rates)) == 5 and rates[2] == pytest.approx(1e-2 * 2 / 5)


def test_a_stream_counts_the_tokens_as_they_come(make_trainer):
    stream = IterableDataset.from_generator(lambda: iter(EQUAL_ROWS))
    trainer = make_trainer(stream, max_train_tokens=240, max_steps=50)
    trainer.train()
    assert trainer.state.global_step == 6


def test_completions_that_are_generated_count(tokenizer, options, dataset):
    args = OnlineGKDConfig(**{**options, "max_steps": -1}, max_train_tokens=200, lmbda=1.0, max_new_tokens=4)
    trainer = OnlineGKDTrainer(
        model=build_llama(), teacher_model=build_llama(seed=1), args=args, train_dataset=dataset,
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    tokens = read_logs(trainer, "num_tokens")
    assert abs(tokens[-1] - 200) <= 4 * 13 and trainer.state.max_steps == len(tokens)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_train_tokens": 0}, "`max_train_tokens` is 0, but must be at least 1"),
        ({"max_train_minutes": 0}, "`max_train_minutes` is 0, but must be above 0"),
        ({"max_train_minutes": 1, "save_steps": 0.1}, "`save_steps=0.1` is a share of the steps"),
    ],
)
def test_limits_that_make_no_sense_are_refused(limits, message, make_trainer):
    with pytest.raises(ValueError, match=message):
        make_trainer(**limits)
