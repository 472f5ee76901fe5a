from dataclasses import dataclass, field
from typing import Any

from spec_kd.losses.divergences import JensenShannon
from spec_kd.losses.registry import resolve_divergence_name
from spec_kd.trainer.draft_config import DraftConfig


@dataclass
class WhiteBoxDistillConfig(DraftConfig):
    r"""
    Configuration of [`WhiteBoxDistillTrainer`]: everything of [`~trl.SFTConfig`] and of [`DraftConfig`], and:

    Args:
        divergence (`str`, *optional*):
            What to minimise at every token the target wrote: `"forward_kl"` (the default), `"reverse_kl"` or `"jsd"`.
        beta (`float`, *optional*):
            Weight of the JSD, 0.5 unless given. Instead of `divergence`, TRL's convention is understood: 0 is forward
            KL, 1 reverse KL, between them JSD. Both together raise when they disagree.
        temperature (`float`, *optional*, defaults to `1.0`):
            Loss temperature: both models' logits are divided by it. No T^2 factor is applied to the loss. It has
            nothing to do with the temperature at which the target's text was sampled.
        teacher_model_name_or_path (`str`, *optional*):
            Teacher, if `teacher_model` is not passed to the trainer.
        teacher_model_init_kwargs (`dict` or `str`, *optional*):
            Arguments of `from_pretrained` for a teacher given by name; `dtype` defaults to the checkpoint's own.
    """

    _VALID_DICT_FIELDS = [*DraftConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]  # noqa: RUF012 (TRL's name)

    divergence: str | None = field(
        default=None, metadata={"help": "'forward_kl' (default), 'reverse_kl' or 'jsd', at every token of the target."}
    )
    beta: float | None = field(
        default=None,
        metadata={"help": "Weight of the JSD. Without `divergence`: 0 = forward KL, 1 = reverse KL, between = JSD."},
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Loss temperature dividing both models' logits; no T^2 factor is applied."}
    )
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Teacher, if `teacher_model` is not passed to the trainer."}
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of `from_pretrained` for a teacher given by name."}
    )

    def __post_init__(self):
        self.divergence = resolve_divergence_name(self.divergence, self.beta)
        if self.divergence == JensenShannon.name and self.beta is None:
            self.beta = 0.5
        if self.temperature <= 0:
            raise ValueError(
                f"`temperature` must be positive, got {self.temperature}: it divides the logits of both models. For "
                "training on the target's most likely token alone, use BlackBoxSFTTrainer on greedy responses."
            )
        if self.loss_type != "nll":
            raise ValueError(
                f"`loss_type={self.loss_type!r}` belongs to SFT; the loss here is `divergence={self.divergence!r}`. "
                "Drop `loss_type`, or use BlackBoxSFTTrainer."
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"`label_smoothing_factor={self.label_smoothing_factor}` smooths a one-hot label; white-box "
                "distillation has the teacher's whole distribution. Set it to 0."
            )
        super().__post_init__()
