"""Resumes a training so that it ends as the uninterrupted one: from a whole checkpoint, and not beyond the end."""

from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, has_length

from spec_kd.files import explain_full_disk
from spec_kd.open_types import Argument, JsonObject
from spec_kd.trainer.arguments import BatchSamples
from spec_kd.trainer.checkpoint_sums import (
    find_damage,
    find_whole_checkpoint,
    has_sums,
    is_checkpoint_name,
    remove_marks,
    write_sums,
)

logger = get_logger(__name__)


class ResumableTraining(Trainer):
    """A base class of a trainer, before its others: resumes from whole checkpoints only, and ends where the run ended.

    - `train(resume_from_checkpoint=True)` resumes from the newest whole checkpoint, and says which newer ones are
      damaged and why. A damaged checkpoint that is given by name is refused.
    - Every checkpoint gets checksums of its files, and its mark, `trainer_state.json`, after all processes have
      written.
    - A run that has reached its end, by `max_steps`, `num_train_epochs` or early stopping, trains no further step.
      Early stopping keeps its count.
    """

    _has_ended = False
    """Whether the run had ended at the checkpoint that this training resumes from."""

    def __init__(self, *args: Argument, **kwargs: Argument):
        super().__init__(*args, **kwargs)
        self.add_callback(_ResumptionCallback(self))

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Argument, **kwargs: Argument
    ) -> TrainOutput:
        """As `Trainer.train`, from a checkpoint that is whole.

        Raises:
            ValueError: For a damaged checkpoint that is given by name, or with `True` if no checkpoint is whole.
        """
        checkpoint = self._choose_checkpoint(resume_from_checkpoint) if resume_from_checkpoint else None
        self._has_ended = False
        self._load_run_state(None if checkpoint is None else Path(checkpoint))
        return super().train(checkpoint, *args, **kwargs)

    def _choose_checkpoint(self, asked: str | bool) -> str:
        is_main = self.accelerator.is_main_process
        found = _find_checkpoint(asked, str(self.args.output_dir)) if is_main else [None, None]
        checkpoint, problem = broadcast_object_list(found)
        if checkpoint is None:
            raise ValueError(problem)
        if problem is not None:
            logger.warning(problem)
        # A process that was killed after the mark leaves a checkpoint without checksums
        folder = Path(checkpoint)
        if self.args.should_save and folder.parent == Path(str(self.args.output_dir)) and not has_sums(folder):
            write_sums(folder)
        return checkpoint

    def _load_run_state(self, checkpoint: Path | None) -> None:
        """Reads what `_save_run_state` wrote; without a checkpoint, forgets what an earlier training left."""

    def _save_run_state(self, checkpoint: Path) -> None:
        """Writes what this process needs to resume, before the checkpoint is marked as complete."""

    def _save_rng_state(self, output_dir: str) -> None:  # the last file of each process; the mark comes right after it
        super()._save_rng_state(output_dir)
        self._save_run_state(Path(output_dir))
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self, model: torch.nn.Module, trial: Argument) -> None:
        with explain_full_disk(str(self.args.output_dir), "the last whole checkpoint is kept"):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save and folder.is_dir():
            write_sums(folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`; a checkpoint that is overwritten counts as incomplete until all of it is written."""
        if output_dir is not None and is_checkpoint_name(output_dir) and self.args.should_save:
            remove_marks(Path(output_dir))
        super().save_model(output_dir, _internal_call)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        damage = find_damage(Path(best)) if best is not None and Path(best).is_dir() else None
        if damage is not None:
            raise ValueError(
                f"`load_best_model_at_end=True` would load {best}, but {damage}. Set it to False to keep the weights "
                "of the last step, which the newest checkpoint has."
            )
        super()._load_best_model()

    def get_batch_samples(
        self, epoch_iterator: Iterator[JsonObject], num_batches: int, device: torch.device
    ) -> BatchSamples:
        """As `Trainer.get_batch_samples`; no batches where the training has reached its end."""
        if self._is_at_end():
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        checkpoint: str | None,
        trial: Argument,
    ) -> tuple[int, int]:
        epoch, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial
        )
        if checkpoint is None or has_length(self.train_dataset):
            return epoch, batches
        # `Trainer` takes a stream for endless; `state.epoch` says how often it was read from its start
        epochs, part = divmod(self.state.epoch or 0.0, 1)
        batches = round(part * max_steps * self.args.gradient_accumulation_steps)
        return int(epochs), 0 if self.args.ignore_data_skip else batches

    def _limit_steps(self, step: int) -> None:
        """Sets `state.max_steps`, before the first step and after each; it stays as it is by default.

        Args:
            step (`int`): Steps of the run that are done.
        """

    def _is_at_end(self) -> bool:
        return self._has_ended or self.state.global_step >= self.state.max_steps

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`; a training that had nothing left to do logs no `train_loss`, which would be 0.0."""
        if self._has_ended:
            logs = {name: value for name, value in logs.items() if name != "train_loss"}
        super().log(logs, start_time)


class _ResumptionCallback(TrainerCallback):
    """Decides after reading a checkpoint's state, before the first step, whether the run has ended."""

    def __init__(self, trainer: ResumableTraining):
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Argument
    ) -> None:
        callbacks = self._trainer.callback_handler.callbacks
        saved: JsonObject = state.stateful_callbacks  # type: ignore[assignment]  # a dictionary when it is read
        for callback in callbacks:  # `Trainer` saves the states of those alone that the checkpoint has
            if isinstance(callback, ExportableState):
                saved.setdefault(type(callback).__name__, callback.state())
        if state.global_step > 0 and not args.restore_callback_states_from_checkpoint:
            for callback in callbacks:  # their counts, while their options stay those of this run
                known = saved.get(type(callback).__name__)
                if isinstance(callback, ExportableState) and isinstance(known, dict):
                    for name, value in known.get("attributes", {}).items():
                        setattr(callback, name, value)
        self._trainer._limit_steps(state.global_step)
        is_out_of_patience = state.global_step > 0 and any(
            callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in callbacks
            if isinstance(callback, EarlyStoppingCallback)
        )
        self._trainer._has_ended = state.global_step >= state.max_steps or is_out_of_patience
        if self._trainer._has_ended:
            why = "early stopping ended the run there" if is_out_of_patience else f"the run has {state.max_steps} steps"
            logger.warning(f"The checkpoint is of step {state.global_step}, and {why}: nothing is left to train.")

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Argument
    ) -> None:
        self._trainer._limit_steps(state.global_step + 1)  # the end of the step decides whether it was the last one

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Argument
    ) -> None:
        if self._trainer._has_ended:  # already evaluated and saved when it ended
            control.should_log = control.should_evaluate = control.should_save = False


def _find_checkpoint(asked: str | bool, output_dir: str) -> list[str | None]:
    """The checkpoint to resume from, or `None`; and a warning or an error about it."""
    if not isinstance(asked, bool):
        damage = find_damage(Path(asked)) if Path(asked).is_dir() else None  # otherwise `Trainer` says what is missing
        if damage is None:
            return [str(asked), None]
        whole, _ = find_whole_checkpoint(Path(asked).parent)
        other = "No other checkpoint there is whole." if whole is None else f"The newest whole one is {whole}."
        return [None, f"Training cannot resume from the checkpoint {asked}: {damage}. {other}"]
    whole, damages = find_whole_checkpoint(output_dir)
    listed = "; ".join(f"in {folder.name}, {damage}" for folder, damage in damages.items())
    if whole is None:
        known = f" ({listed})" if damages else ""
        return [None, f"No whole checkpoint was found in `output_dir={output_dir!r}`{known}. Train from the start."]
    return [
        str(whole),
        f"Training resumes from {whole}, since later checkpoints are damaged: {listed}." if damages else None,
    ]
