"""Stops a training at its first NaN or infinity, before anything is saved over the last good checkpoint."""

import math

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from spec_kd.finite import NonFiniteError, describe_bad_weight, find_nonfinite_parameter, measure_parameters
from spec_kd.open_types import Argument
from spec_kd.trainer.arguments import LossResult

logger = get_logger(__name__)

GradNorm = torch.Tensor | float | None

HUGE_WEIGHT = 1e6
"""No trained model has such a weight: the largest ones of Llama, Qwen and Gemma are below 1,000."""


class FiniteGuard(Trainer):
    """A base class of a trainer, before its others: raises [`NonFiniteError`] at the first NaN or infinity.

    It checks the loss of every batch, before its backward pass; the gradient norm of every step, before the optimizer;
    the weights before the first step, every evaluation and every save; and the losses of evaluations. All processes
    stop together. With a GradScaler (fp16), which handles gradients that overflow, the training stops only if they
    still do so at a scale of 1.

    `SFTTrainer.compute_loss` waits for the device after every forward pass anyway, so the check of the loss costs next
    to nothing; the check of the gradient norm makes the host wait for the backward pass.
    """

    model: torch.nn.Module
    _first_step: int | None = None

    def train(self, *args: Argument, **kwargs: Argument) -> TrainOutput:
        """As `Trainer.train`; raises [`NonFiniteError`] instead of training on with a NaN or an infinity."""
        self._first_step = None
        return super().train(*args, **kwargs)

    def compute_loss(self, *args: Argument, **kwargs: Argument) -> LossResult:
        """As `Trainer.compute_loss`; in training, raises [`NonFiniteError`] for a loss that is not finite."""
        if self.model.training and self._first_step is None:
            self.check_weights()
            self._first_step = self.state.global_step
        result = super().compute_loss(*args, **kwargs)
        if self.model.training:
            loss = (result[0] if isinstance(result, tuple) else result).detach()
            is_bad = (~torch.isfinite(loss).all()).float()
            if self.accelerator.reduce(is_bad, reduction="sum").item():
                own = loss.float().mean().item()
                where = f"is {own}" if not math.isfinite(own) else "of another process is not finite"
                self.stop(f"The training loss {where}")
        return result

    def check_weights(self, with_frozen: bool = False) -> None:
        """Raises [`NonFiniteError`] if a weight of the model in training is not finite.

        Args:
            with_frozen (`bool`, *optional*, defaults to `False`): Whether the weights of other models are checked too.
        """
        found = (with_frozen and self._describe_bad_frozen_weight()) or self._describe_bad_weight()
        is_sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        found = next(filter(None, gather_object([found]) if is_sharded else [found]), None)
        if found is not None:
            raise NonFiniteError(f"{found} Earlier checkpoints are unchanged.")

    def stop(self, what: str, cause: str | None = None) -> None:
        """Raises [`NonFiniteError`] on every process, which all have to call it.

        Args:
            what (`str`): What is not finite, as the start of a sentence.
            cause (`str`, *optional*): The likely cause, as sentences; searched for by default.
        """
        likely = next(filter(None, gather_object([cause or self._find_cause()])), None) or (
            f"Likely causes: a `learning_rate` ({self.args.learning_rate}) that is too high, or a row of the data that "
            "the models cannot read."
        )
        raise NonFiniteError(
            f"{what} at step {self.state.global_step + 1}, so the training stops and saves nothing more. {likely} "
            "Earlier checkpoints are unchanged."
        )

    def _describe_bad_frozen_weight(self) -> str | None:
        """Which weight of a frozen model is not finite, as a sentence; `None`, the default, if none is."""
        return None

    def _describe_bad_weight(self) -> str | None:
        name, step = find_nonfinite_parameter(self.model), self.state.global_step
        if name is None:
            return None
        if self._first_step is None or step == self._first_step:
            return f"Before the first step: {describe_bad_weight('draft', name)}"
        return (
            f"The draft's weight `{name}` has a NaN or an infinity after step {step}, which the last update caused. "
            f"Lower `learning_rate` ({self.args.learning_rate})."
        )

    def _describe_huge_weight(self) -> str | None:
        sizes = {name: max(-low, high) for name, (low, high) in measure_parameters(self.model).items()}
        name = max(sizes, key=sizes.__getitem__, default=None)
        if name is None or sizes[name] < HUGE_WEIGHT:
            return None
        return (
            f"The draft's weight `{name}` has grown to {sizes[name]:.3g}, and the newest checkpoint may have it too. "
            f"Lower `learning_rate` ({self.args.learning_rate}), and resume from an earlier checkpoint."
        )

    def _find_cause(self) -> str | None:
        """The likely cause of a NaN or an infinity, as sentences; `None` if it is not found."""
        return self._describe_bad_frozen_weight() or self._describe_bad_weight() or self._describe_huge_weight()

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: GradNorm = None) -> GradNorm:
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if grad_norm is not None and not math.isfinite(grad_norm) and not self._is_overflow_handled():
            self.stop(f"The gradient norm is {float(grad_norm)}")
        return grad_norm

    def _is_overflow_handled(self) -> bool:
        """Whether a gradient that is not finite only means that fp16's loss scale is too high."""
        if self.is_deepspeed_enabled:
            return self.args.fp16  # it has a scaler of its own, which raises at its lowest scale
        scaler = getattr(self.accelerator, "scaler", None)
        return scaler is not None and scaler.is_enabled() and scaler.get_scale() > 1.0

    def evaluate(self, *args: Argument, **kwargs: Argument) -> dict[str, float]:
        """As `Trainer.evaluate`; while training, raises [`NonFiniteError`] for a weight or loss that is not finite."""
        if self.is_in_train:
            self.check_weights()
        metrics = super().evaluate(*args, **kwargs)
        bad = {name: value for name, value in metrics.items() if name.endswith("loss") and not math.isfinite(value)}
        if bad and self.is_in_train:
            raise NonFiniteError(
                f"The evaluation after step {self.state.global_step} gave {bad}, with weights that are finite. A row "
                "of the evaluation dataset, or the teacher, is the cause. Earlier checkpoints are unchanged."
            )
        if bad:
            logger.warning(f"The evaluation gave {bad}, which is not finite.")
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`; raises [`NonFiniteError`] before a file is touched if a weight is not finite."""
        self.check_weights()
        super().save_model(output_dir, _internal_call)
