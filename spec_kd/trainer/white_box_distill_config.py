"""Options of the training towards the target's probabilities."""

from dataclasses import dataclass, field

from spec_kd.checks import check_number
from spec_kd.losses import JensenShannon, TokenLoss, build_divergence, build_selection
from spec_kd.losses.registry import resolve_divergence_name
from spec_kd.losses.selection import ALL_TOKENS
from spec_kd.open_types import Arguments
from spec_kd.trainer.draft_config import DraftConfig


@dataclass
class WhiteBoxDistillConfig(DraftConfig):
    r"""
    Configuration of [`WhiteBoxDistillTrainer`]: everything of [`~trl.SFTConfig`] and of [`DraftConfig`], and:

    Args:
        divergence (`str`, *optional*):
            What to minimize at every token the target wrote: `"forward_kl"` (the default), `"reverse_kl"`, `"jsd"`,
            `"tvd"`, `"neg_log_acceptance"`, `"lk_hybrid"`, `"tvd_plus_plus"`, or a name of your own, registered with
            [`~spec_kd.losses.register_divergence`].
        divergence_kwargs (`dict` or `str`, *optional*):
            Options of the divergence, such as `{"eta": 3.0}` of `"lk_hybrid"`.
        beta (`float`, *optional*):
            Weight of the JSD, 0.5 unless given. Instead of `divergence`, TRL's convention is understood: 0 is forward
            KL, 1 reverse KL, between them JSD. Both together raise when they disagree.
        temperature (`float`, *optional*, defaults to `1.0`):
            Loss temperature: both models' logits are divided by it. No T^2 factor is applied to the loss. It has
            nothing to do with the temperature at which the target's text was sampled.
        ce_weight (`float`, *optional*, defaults to `0.0`):
            Weight c in [0, 1) of the cross-entropy on the token written: (1 - c) D + c CE, the latter at temperature 1.
        token_selection (`str`, *optional*, defaults to `"all"`):
            Which tokens the training loss is over: `"all"`; `"adaspec"`, the top share of each sequence by
            KL(p‖q) - KL(p‖q_ref) (needs a reference draft); `"target_entropy"`, the top share by the target's entropy;
            `"rejected"`, where the draft's most likely token is not the one written. The loss stays a mean over all
            tokens, those left out counting as 0; evaluation is over all. The share is logged as `token_share_kept`.
        token_selection_fraction (`float`, *optional*):
            Share of each sequence kept by `"adaspec"` and `"target_entropy"`, 0.4 unless given.
        ref_model_name_or_path (`str`, *optional*):
            Reference draft of `"adaspec"`, if `ref_model` is not passed to the trainer and the dataset has no
            `reference_forward_kl` column.
        ref_model_init_kwargs (`dict` or `str`, *optional*):
            Arguments of `from_pretrained` for a reference draft given by name.
        teacher_model_name_or_path (`str`, *optional*):
            Teacher, if `teacher_model` is not passed to the trainer.
        teacher_model_init_kwargs (`dict` or `str`, *optional*):
            Arguments of `from_pretrained` for a teacher given by name; `dtype` defaults to the checkpoint's own.
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012 (TRL's name)
        *DraftConfig._VALID_DICT_FIELDS,
        "divergence_kwargs",
        "ref_model_init_kwargs",
        "teacher_model_init_kwargs",
    ]

    divergence: str | None = field(
        default=None,
        metadata={
            "help": "'forward_kl' (default), 'reverse_kl', 'jsd', 'tvd', 'neg_log_acceptance', 'lk_hybrid', "
            "'tvd_plus_plus' or a registered name, at every token of the target."
        },
    )
    divergence_kwargs: Arguments | str | None = field(
        default=None, metadata={"help": "Options of the divergence, such as {\"eta\": 3.0} of 'lk_hybrid'."}
    )
    beta: float | None = field(
        default=None,
        metadata={"help": "Weight of the JSD. Without `divergence`: 0 = forward KL, 1 = reverse KL, between = JSD."},
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Loss temperature dividing both models' logits; no T^2 factor is applied."}
    )
    ce_weight: float = field(
        default=0.0, metadata={"help": "Weight in [0, 1) of the cross-entropy on the token written, at temperature 1."}
    )
    token_selection: str = field(
        default=ALL_TOKENS, metadata={"help": "'all', 'adaspec', 'target_entropy' or 'rejected'; in training only."}
    )
    token_selection_fraction: float | None = field(
        default=None, metadata={"help": "Share of each sequence that 'adaspec' and 'target_entropy' keep (0.4)."}
    )
    ref_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Reference draft of 'adaspec', if `ref_model` is not passed to the trainer."}
    )
    ref_model_init_kwargs: Arguments | str | None = field(
        default=None, metadata={"help": "Arguments of `from_pretrained` for a reference draft given by name."}
    )
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Teacher, if `teacher_model` is not passed to the trainer."}
    )
    teacher_model_init_kwargs: Arguments | str | None = field(
        default=None, metadata={"help": "Arguments of `from_pretrained` for a teacher given by name."}
    )

    def __post_init__(self) -> None:
        self.divergence = resolve_divergence_name(self.divergence, self.beta)
        if self.divergence == JensenShannon.name and self.beta is None:
            self.beta = 0.5
        check_number(
            "temperature",
            self.temperature,
            above=0,
            reason="It divides the logits of both models. To train on the target's most likely token alone, use "
            "BlackBoxSFTTrainer on greedy responses.",
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
        check_number(
            "ce_weight",
            self.ce_weight,
            0,
            below=1,
            reason="At 1 nothing of the divergence is left; for pure cross-entropy use BlackBoxSFTTrainer.",
        )
        super().__post_init__()  # turns JSON text into dicts
        self.build_loss()

    def build_loss(self) -> TokenLoss:
        """The loss that these options describe; raises `ValueError` for options that do not fit each other."""
        options = self.divergence_kwargs or {}
        if "beta" in options:
            raise ValueError(
                f"`divergence_kwargs` has `beta` ({options['beta']}), which has an option of its own. Set `beta`."
            )
        return TokenLoss(
            divergence=build_divergence(self.divergence, self.beta, **options),
            temperature=self.temperature,
            ce_weight=self.ce_weight,
            selection=build_selection(self.token_selection, self.token_selection_fraction),
        )
