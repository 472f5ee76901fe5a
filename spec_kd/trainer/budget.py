"""Trains for a number of tokens or minutes: steps, learning rate and resuming follow what is left of the budget."""

import copy
import sys
import time
from collections.abc import Iterator
from typing import cast

import pyarrow.compute as pc
import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import (
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    get_scheduler,
)
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput

from spec_kd.open_types import Argument, Arguments, JsonObject
from spec_kd.trainer.arguments import BatchSamples
from spec_kd.trainer.configs import DraftConfig
from spec_kd.trainer.resumption import ResumableTraining

logger = get_logger(__name__)

UNKNOWN_STEPS = 10**9
"""Steps of a run of which nothing is measured yet."""
TIMED_STEPS = 5
"""Steps of a training before a message says how long the others take. The first of them warms up, and is left out."""


class BudgetSpent(TrainerCallback, ExportableState):
    """What a run has used of its budgets, which every checkpoint keeps, and the pace of this training.

    Args:
        tokens (`int`, *optional*, defaults to `0`): Tokens that were trained on.
        seconds_before (`float`, *optional*, defaults to `0.0`): Seconds of the run before this training.
    """

    def __init__(self, tokens: int = 0, seconds_before: float = 0.0):
        self.tokens, self.seconds_before = tokens, seconds_before
        self.first_step = 0
        self._started: float | None = None
        self._warm: tuple[int, float] | None = None

    @property
    def seconds(self) -> float:
        """Seconds of the whole run: steps, evaluations and checkpoints."""
        return self.seconds_before + (0.0 if self._started is None else time.perf_counter() - self._started)

    def measure_step(self, step: int) -> float | None:
        """Mean seconds of the steps of this training, of the run before them; `None` if there was none.

        Args:
            step (`int`): Steps of the run that are done.
        """
        if self._warm is not None and step > self._warm[0]:  # the first step warms up
            return (self.seconds - self._warm[1]) / (step - self._warm[0])
        if self.has_started and step > self.first_step:
            return self.seconds - self.seconds_before
        return self.seconds / step if step else None

    @property
    def has_started(self) -> bool:
        """Whether this training has begun."""
        return self._started is not None

    def state(self) -> JsonObject:
        """As `ExportableState.state`."""
        return {"args": {}, "attributes": {"tokens": self.tokens, "seconds_before": self.seconds}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Argument
    ) -> None:
        """Begins to count time."""
        self._started, self.first_step = time.perf_counter(), state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Argument) -> None:
        """Begins to measure the pace after the first step."""
        self._warm = self._warm or (state.global_step, self.seconds)


class BudgetedTraining(ResumableTraining):
    """A base class of a trainer, before its others: ends when `max_train_tokens` or `max_train_minutes` are used up.

    After every step `state.max_steps` is set to what the budgets leave, and the schedule of the learning rate follows:
    its warm-up and decay are those of a run of so many steps. Steps are counted by the mean tokens of a step of the
    dataset, or else of the run, and by the mean seconds of a step. A run with a budget of tokens takes the same steps
    each time; one with a budget of time does not, since no machine keeps its pace.

    Logged with the loss: `budget/steps_left`, `budget/minutes_left` and, with a budget of tokens, `budget/tokens_left`.
    """

    args: DraftConfig
    _step_tokens: float | None = None
    """Mean tokens of a step by the dataset; `None` if only the training tells."""

    @property
    def _has_budget(self) -> bool:
        return self.args.max_train_tokens is not None or self.args.max_train_minutes is not None

    @property
    def _spent(self) -> BudgetSpent:
        # searched for, since `restore_callback_states_from_checkpoint=True` puts another one in its place
        return next(found for found in self.callback_handler.callbacks if isinstance(found, BudgetSpent))

    def train(self, *args: Argument, **kwargs: Argument) -> TrainOutput:
        """As `Trainer.train`, up to the end of the budgets."""
        if self._has_budget:
            self.remove_callback(BudgetSpent)  # of an earlier training
            self.add_callback(BudgetSpent())
        return super().train(*args, **kwargs)

    def set_initial_training_values(
        self, args: TrainingArguments, dataloader: DataLoader[JsonObject]
    ) -> tuple[int, int, int, int, int, int | None, int]:
        """As `Trainer.set_initial_training_values`, with the steps that the budgets give and as many epochs."""
        if not self._has_budget:
            return super().set_initial_training_values(args, dataloader)
        limited = copy.copy(args)
        limited.max_steps = args.max_steps if args.max_steps > 0 else UNKNOWN_STEPS
        _, steps_per_epoch, *_ = super().set_initial_training_values(limited, dataloader)
        num_tokens = self._count_dataset_tokens()
        self._step_tokens = None if num_tokens is None else num_tokens / steps_per_epoch
        limited.max_steps = self._count_steps(0)
        return (sys.maxsize, *super().set_initial_training_values(limited, dataloader)[1:])

    def _count_dataset_tokens(self) -> int | None:
        """Tokens of the training set; `None` if they are not known before the training."""
        dataset = self.train_dataset
        if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:
            return None
        rows = dataset.select_columns(["input_ids"]).with_format("arrow")
        return sum(
            cast(int, pc.sum(pc.list_value_length(batch["input_ids"])).as_py()) for batch in rows.iter(batch_size=1000)
        )

    def _count_steps(self, step: int) -> int:
        """Steps of the whole run, of which `step` are done."""
        args, spent = self.args, self._spent
        limits = [args.max_steps - step if args.max_steps > 0 else UNKNOWN_STEPS]
        step_tokens = self._step_tokens or (spent.tokens / step if step else None)
        if args.max_train_tokens is not None and step_tokens:
            limits.append(round((args.max_train_tokens - spent.tokens) / step_tokens))
        step_seconds = spent.measure_step(step)
        if args.max_train_minutes is not None and step_seconds:
            limits.append(round((60 * args.max_train_minutes - spent.seconds) / step_seconds))
        return step + max(0, min(limits))

    def _limit_steps(self, step: int) -> None:
        if not self._has_budget:
            return
        spent = self._spent
        total = broadcast_object_list([self._count_steps(step)])[0]
        if total != self.state.max_steps:
            self.state.max_steps = total
            self._follow(total)
        if not spent.has_started or step == spent.first_step + TIMED_STEPS:
            logger.warning(self._describe_budget(step))

    def _follow(self, num_steps: int) -> None:
        scheduler = self.lr_scheduler
        if self._created_lr_scheduler and isinstance(scheduler, LambdaLR):
            fresh = get_scheduler(
                self.args.lr_scheduler_type,
                torch.optim.SGD([torch.zeros(1)]),  # stands in: a scheduler sets the rates of its optimizer
                num_warmup_steps=self.args.get_warmup_steps(num_steps),
                num_training_steps=num_steps,
                scheduler_specific_kwargs=cast(Arguments, self.args.lr_scheduler_kwargs),
            )
            scheduler.lr_lambdas = cast(LambdaLR, fresh).lr_lambdas * len(scheduler.lr_lambdas)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.total = num_steps

    def get_batch_samples(
        self, epoch_iterator: Iterator[JsonObject], num_batches: int, device: torch.device
    ) -> BatchSamples:
        """As `Trainer.get_batch_samples`; counts the tokens."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._has_budget and batches:
            # rows that are joined have no padding, and no mask
            masks = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])) for batch in batches]
            tokens = sum(int(mask.sum()) for mask in masks)
            self._spent.tokens += int(self.accelerator.gather(torch.tensor([tokens], device=device)).sum())
        return batches, num_items

    def _finalize_training(self, trial: Argument, num_train_samples: int, start_time: float) -> TrainOutput:
        if self._has_budget:  # it was counted before the steps were known
            num_train_samples = self.state.max_steps * self.get_total_train_batch_size(self.args)
        return super()._finalize_training(trial, num_train_samples, start_time)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`, with what is left of the budgets where the loss is logged."""
        if self._has_budget and "loss" in logs:
            logs |= self._measure_left(self.state.global_step)
        super().log(logs, start_time)

    def _measure_left(self, step: int) -> dict[str, float]:
        spent, steps_left, left = self._spent, self.state.max_steps - step, {}
        if self.state.max_steps < UNKNOWN_STEPS:
            left["budget/steps_left"] = float(steps_left)
            if (seconds := spent.measure_step(step)) is not None:
                left["budget/minutes_left"] = steps_left * seconds / 60
        if self.args.max_train_tokens is not None:
            left["budget/tokens_left"] = max(0.0, self.args.max_train_tokens - spent.tokens)
        return left

    def _describe_budget(self, step: int) -> str:
        """Sentences with the budgets, what was used before, and an estimate of what is left."""
        args, spent, left = self.args, self._spent, self._measure_left(step)
        budgets = [
            f"{args.max_train_tokens:,} tokens ({spent.tokens:,} used)" if args.max_train_tokens is not None else "",
            f"{args.max_train_minutes:g} minutes ({spent.seconds / 60:.1f} used)" if args.max_train_minutes else "",
        ]
        text = f"Training budget: {' and '.join(filter(None, budgets))}."
        if "budget/steps_left" not in left:
            return f"{text} The number of steps follows from the time that the first {TIMED_STEPS} take."
        text += f" About {left['budget/steps_left']:,.0f} steps are left"
        step_tokens = self._step_tokens or (spent.tokens / step if step else None)
        text += "" if step_tokens is None else f", of {step_tokens:,.0f} tokens each"
        return text + (f": {left['budget/minutes_left']:.1f} minutes." if "budget/minutes_left" in left else ".")
