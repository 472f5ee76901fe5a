"""Where the time of a training step goes: generation, teacher, loss, optimizer."""

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spec_kd.open_types import Argument
from spec_kd.trainer.arguments import BatchSamples

STEP = "step"
Mark: TypeAlias = Argument  # an event on CUDA, else seconds
Span: TypeAlias = tuple[str, str | None, Mark, Mark]
"""A region of a step: its name, the region that it interrupts, and the marks of its start and its end."""


class StepClock(TrainerCallback):
    """Measures named regions of training steps; the time of a region inside another one counts for the inner one only.

    As a callback it marks the optimizer and the ends of steps, for which a trainer has no methods.

    On CUDA the marks are events in the current stream. They are read when the shares are asked for, so the host does
    not wait in between, and a region's time is that of the device. Elsewhere they are readings of the host's clock.
    Of several devices in one process (a teacher spread by `device_map`), what `device` waits for is measured.

    Args:
        device (`torch.device`): The training's device in this process.
    """

    def __init__(self, device: torch.device):
        self._device, self._has_events = device, device.type == "cuda"
        self._open: list[tuple[str, Mark]] = []
        self._spans: list[Span] = []
        self._ended: deque[list[Span]] = deque()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._num_steps = 0

    def start_step(self) -> None:
        """Begins a step, unless one has begun."""
        if not self._open:
            self._spans = []
            self.start(STEP)

    def end_step(self) -> None:
        """Ends the step that has begun."""
        self.stop()
        self._ended.append(self._spans)
        self._num_steps += 1
        while self._ended and (not self._has_events or self._ended[0][-1][-1].query()):
            self._add_up(self._ended.popleft())  # now, so that a run without logging keeps nothing

    def start(self, region: str) -> None:
        """Enters a region of a step; `stop` leaves it."""
        self._open.append((region, self._mark()))

    def stop(self) -> None:
        """Leaves the region entered last."""
        region, start = self._open.pop()
        self._spans.append((region, self._open[-1][0] if self._open else None, start, self._mark()))

    @contextmanager
    def measure(self, region: str) -> Iterator[None]:
        """A region of a step; outside of steps, as in an evaluation, nothing is measured."""
        if not self._open:
            yield
            return
        self.start(region)
        try:
            yield
        finally:
            self.stop()

    def read(self) -> dict[str, float]:
        """Metrics since the last reading: `time/REGION_share` of the steps' time, and `time/step_seconds`.

        A region that was only entered before has a share of 0. Without a step there are no metrics.
        """
        if self._ended and self._has_events:
            self._ended[-1][-1][-1].synchronize()
        while self._ended:
            self._add_up(self._ended.popleft())
        if not self._num_steps:
            return {}
        total = sum(self._seconds.values())
        metrics = {f"time/{name}_share": spent / total for name, spent in self._seconds.items() if name != STEP}
        metrics["time/step_seconds"] = total / self._num_steps
        self._seconds.update(dict.fromkeys(self._seconds, 0.0))
        self._num_steps = 0
        return metrics

    def _mark(self) -> Mark:
        if not self._has_events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _add_up(self, spans: list[Span]) -> None:
        for region, outer, start, end in spans:
            seconds = start.elapsed_time(end) / 1000 if self._has_events else end - start
            self._seconds[region] += seconds
            if outer is not None:
                self._seconds[outer] -= seconds

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Argument
    ) -> None:
        """Forgets a step that has begun and not ended (no more data, an exception)."""
        self._open.clear()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Argument
    ) -> None:
        """Enters the region of the optimizer."""
        self.start("optimizer")

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Argument
    ) -> None:
        """Leaves it."""
        self.stop()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Argument) -> None:
        """Ends the step."""
        self.end_step()


class TimedSteps(Trainer):
    """A base class of a trainer, before its others: logs where the time of its steps goes.

    A step begins when its batches are fetched (or at an earlier `start_step`) and ends after its optimizer step;
    logging, evaluation and checkpoints are no part of it. Logged with the loss, over the steps since the last logging
    on process 0: `time/step_seconds`, and as shares of it `time/loss_share` (forward and backward of the draft, and
    waiting for other processes), `time/optimizer_share`, and a share of each region that a subclass measures with
    `self._clock.measure`; a region inside the loss counts for itself only. The rest is data, clipping and bookkeeping.
    DeepSpeed takes its optimizer step inside the backward pass, where it counts for the loss.
    """

    def __init__(self, *args: Argument, **kwargs: Argument):
        super().__init__(*args, **kwargs)
        self._clock = StepClock(self.args.device)
        self.add_callback(self._clock)

    def get_batch_samples(self, *args: Argument, **kwargs: Argument) -> BatchSamples:
        """As `Trainer.get_batch_samples`; begins a step."""
        self._clock.start_step()
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, *args: Argument, **kwargs: Argument) -> torch.Tensor:
        """As `Trainer.training_step`; its time counts for the loss."""
        with self._clock.measure("loss"):
            return super().training_step(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`, with the times of the steps where the loss is logged."""
        super().log({**logs, **self._clock.read()} if "loss" in logs else logs, start_time)
