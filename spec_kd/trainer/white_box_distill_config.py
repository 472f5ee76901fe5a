"""Options of training towards the target's distribution."""

from dataclasses import dataclass

from spec_kd.checks import check_number
from spec_kd.losses import JensenShannon, TokenLoss, build_divergence, build_selection
from spec_kd.losses.registry import resolve_divergence_name
from spec_kd.losses.selection import ALL_TOKENS
from spec_kd.open_types import Arguments
from spec_kd.options import document_own_options, option
from spec_kd.trainer.arguments import to_dict
from spec_kd.trainer.draft_config import DraftConfig


@document_own_options
@dataclass
class WhiteBoxDistillConfig(DraftConfig):  # type: ignore[explicit-any]  # fields of TRL
    """Configuration of [`WhiteBoxDistillTrainer`].

    It has the options of [`~trl.SFTConfig`] and [`DraftConfig`], and those below.
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012 (TRL's name)
        *DraftConfig._VALID_DICT_FIELDS,
        "divergence_kwargs",
        "ref_model_init_kwargs",
        "teacher_model_init_kwargs",
    ]

    divergence: str | None = option(
        "Divergence to minimize at every token that the target wrote: 'forward_kl', 'reverse_kl', 'jsd', 'tvd', "
        "'neg_log_acceptance', 'lk_hybrid', 'tvd_plus_plus', or a name registered with `register_divergence`. "
        "'forward_kl' by default, or what `beta` says.",
        default=None,
    )
    divergence_kwargs: Arguments | str | None = option(
        "Options of the divergence, such as {\"eta\": 3.0} of 'lk_hybrid'; its own defaults by default.", default=None
    )
    beta: float | None = option(
        "Weight of the JSD, 0.5 by default. Without `divergence` it has TRL's meaning: 0 is forward KL, 1 is reverse "
        "KL, and what lies between is the JSD. It is refused if it contradicts `divergence`.",
        default=None,
    )
    temperature: float = option(
        "Loss temperature, which divides the logits of both models; no T^2 factor is applied. It does not depend on "
        "the temperature at which the completions were sampled.",
        default=1.0,
    )
    ce_weight: float = option(
        "Weight c in [0, 1) of the cross-entropy on the token written: the loss is (1 - c) D + c CE, with CE at "
        "temperature 1.",
        default=0.0,
    )
    token_selection: str = option(
        "Tokens that the training loss is over: 'all'; 'adaspec', the top share of each sequence by KL(p‖q) - "
        "KL(p‖q_ref), which needs a reference draft (arXiv 2510.19779); 'target_entropy', the top share by the "
        "target's entropy; 'rejected', where the draft's most likely token is not the one written. The loss stays a "
        "mean over all tokens, of which those left out count as 0. Evaluation is over all tokens. The share that is "
        "kept is logged as `token_share_kept`.",
        default=ALL_TOKENS,
    )
    token_selection_fraction: float | None = option(
        "Share of each sequence that 'adaspec' and 'target_entropy' keep; 0.4 by default.", default=None
    )
    ref_model_name_or_path: str | None = option(
        "Reference draft of 'adaspec'; by default the trainer's `ref_model`, or the dataset's `reference_forward_kl` "
        "column.",
        default=None,
    )
    ref_model_init_kwargs: Arguments | str | None = option(
        "Arguments of `from_pretrained` for a reference draft given by name; none by default.", default=None
    )
    teacher_model_name_or_path: str | None = option(
        "Teacher; by default the trainer's `teacher_model`, or the dataset's teacher signal.", default=None
    )
    teacher_model_init_kwargs: Arguments | str | None = option(
        "Arguments of `from_pretrained` for a teacher given by name; `dtype` is the checkpoint's own by default.",
        default=None,
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
        options = to_dict(self.divergence_kwargs)
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
