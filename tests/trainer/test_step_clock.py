"""Shares of a step's time, with work that takes known time."""

import time

import pytest
import torch
from datasets import Dataset
from tiny import build_llama
from transformers import Trainer, TrainingArguments

from spec_kd.trainer.step_clock import StepClock, TimedSteps

SHARES = ("time/generation_share", "time/teacher_share", "time/loss_share", "time/optimizer_share")


class Timed(TimedSteps, Trainer):
    """Sleeps for a generation before a step's batches come, and for a teacher inside of the loss."""

    generation_seconds = teacher_seconds = optimizer_seconds = evaluation_seconds = 0.0

    def get_batch_samples(self, *args, **kwargs):
        self._clock.start_step()
        with self._clock.measure("generation"):
            time.sleep(self.generation_seconds)
        return super().get_batch_samples(*args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        with self._clock.measure("teacher"):
            time.sleep(self.teacher_seconds if model.training else self.evaluation_seconds)
        return super().compute_loss(model, inputs, *args, **kwargs)


def train(options, slow, **overrides):
    dataset = Dataset.from_list([{"input_ids": [7, 8, 9, i], "labels": [7, 8, 9, i]} for i in range(10, 26)])
    args = TrainingArguments(**{**options, "per_device_train_batch_size": 2, **overrides})
    trainer = Timed(build_llama(seed=0), args, train_dataset=dataset, eval_dataset=dataset.select(range(2)))
    for name, seconds in slow.items():
        setattr(trainer, name, seconds)
    trainer.create_optimizer().register_step_pre_hook(lambda *_: time.sleep(trainer.optimizer_seconds))
    trainer.train()
    return trainer, [log for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("slow", ["generation", "teacher", "optimizer"])
def test_the_slow_part_has_the_largest_share(options, slow):
    _, logs = train(options, {f"{slow}_seconds": 0.3}, gradient_accumulation_steps=2, max_steps=2)
    for log in logs:
        shares = {name: log[name] for name in SHARES}
        assert all(0 <= share <= 1 for share in shares.values()) and sum(shares.values()) <= 1 + 1e-9
        assert max(shares, key=shares.get) == f"time/{slow}_share"
        assert shares[f"time/{slow}_share"] > 0.5
        passes = 2 if slow == "teacher" else 1
        assert shares[f"time/{slow}_share"] * log["time/step_seconds"] > 0.299 * passes


def test_evaluation_is_no_part_of_a_step(options):
    trainer, logs = train(options, {"evaluation_seconds": 0.5}, eval_strategy="steps", eval_steps=1)
    assert any("eval_loss" in log for log in trainer.state.log_history)
    for log in logs:
        assert log["time/step_seconds"] < 0.4
        assert log["time/teacher_share"] < 0.5
    assert not any("time/step_seconds" in log for log in trainer.state.log_history if "loss" not in log)


def test_logging_averages_over_its_steps(options):
    start = time.perf_counter()
    _, logs = train(options, {"generation_seconds": 0.1}, logging_steps=3, max_steps=6)
    seconds = time.perf_counter() - start
    assert len(logs) == 2
    assert all(log["time/step_seconds"] >= 0.1 for log in logs)
    assert sum(3 * log["time/step_seconds"] for log in logs) < seconds


def test_a_step_that_ends_early_does_not_count(options):
    class Broken(Timed):
        is_broken = True

        def compute_loss(self, *args, **kwargs):
            if self.is_broken:
                raise RuntimeError("broken")
            return super().compute_loss(*args, **kwargs)

    dataset = Dataset.from_list([{"input_ids": [7, 8, 9], "labels": [7, 8, 9]}] * 4)
    trainer = Broken(build_llama(seed=0), TrainingArguments(**options), train_dataset=dataset)
    trainer.generation_seconds = 0.5
    with pytest.raises(RuntimeError, match="broken"):
        trainer.train()
    trainer.is_broken, trainer.generation_seconds = False, 0.0
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs and all(log["time/step_seconds"] < 0.4 for log in logs)


def test_regions_count_for_themselves(monkeypatch):
    now = iter([0, 1, 3, 6, 7, 10, 10, 11, 16, 20])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = StepClock(torch.device("cpu"))
    with clock.measure("teacher"):  # outside of a step: looks at no clock
        pass
    assert clock.read() == {}
    clock.start_step()  # 0
    with clock.measure("loss"):  # 1 to 7
        clock.start_step()
        with clock.measure("teacher"):  # 3 to 6
            pass
    clock.end_step()  # 10
    clock.start_step()  # 10
    with clock.measure("optimizer"):  # 11 to 16
        pass
    clock.end_step()  # 20
    shares = {"time/loss_share": 3 / 20, "time/teacher_share": 3 / 20, "time/optimizer_share": 5 / 20}
    assert clock.read() == pytest.approx({**shares, "time/step_seconds": 10})
    assert clock.read() == {}


def test_a_region_that_was_not_entered_again_has_a_share_of_nothing(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = StepClock(torch.device("cpu"))
    clock.start_step()
    with clock.measure("generation"):
        pass
    clock.end_step()
    assert clock.read() == {"time/generation_share": 1 / 3, "time/step_seconds": 3}
    clock.start_step()
    clock.end_step()
    assert clock.read() == {"time/generation_share": 0.0, "time/step_seconds": 1}


class FakeEvent:
    """A CUDA event on a device that runs two seconds behind the host, whose clock ticks once an event."""

    host = device = 0
    waits = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        FakeEvent.host += 1
        self.at = FakeEvent.host
        FakeEvent.device = max(FakeEvent.device, FakeEvent.host - 2)

    def query(self):
        return self.at <= FakeEvent.device

    def synchronize(self):
        FakeEvent.waits += 1
        FakeEvent.device = max(FakeEvent.device, self.at)

    def elapsed_time(self, end):
        assert self.query() and end.query(), "read before the device got there"
        return 1000.0 * (end.at - self.at)


def test_on_cuda_nothing_waits_before_the_shares_are_read(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    clock = StepClock(torch.device("cuda", 0))
    for _ in range(50):
        clock.start_step()
        with clock.measure("loss"), clock.measure("teacher"):
            pass
        clock.end_step()
        assert len(clock._ended) <= 1  # what the device has reached is added up
    assert FakeEvent.waits == 0
    assert clock.read() == pytest.approx(
        {"time/loss_share": 2 / 5, "time/teacher_share": 1 / 5, "time/step_seconds": 5.0}
    )
    assert FakeEvent.waits == 1
