"""Configurations of the trainers: the options of TRL and transformers with their bounds, and those of a draft."""

from dataclasses import dataclass

import torch
from trl import SFTConfig

from spec_kd.losses import (
    ExpectedLength,
    JensenShannon,
    TargetConfidence,
    TokenLoss,
    TotalVariation,
    build_divergence,
    build_selection,
)
from spec_kd.losses.registry import resolve_divergence_name
from spec_kd.losses.selection import ALL_TOKENS
from spec_kd.open_types import Arguments, Call, JsonObject
from spec_kd.options import (
    check_finite_options,
    check_int,
    check_number,
    document_own_options,
    option,
    read_path,
    refuse,
)
from spec_kd.parallel.options import ParallelOptions
from spec_kd.secrets import strip_secrets
from spec_kd.serving import find_serving_engine

InitKwargs = Arguments | str | None
"""Arguments of `from_pretrained` in a configuration, which turns JSON text into a dictionary."""
# The bounds of options, as the check of whole numbers or of other numbers takes them.
BOUNDS: dict[Call[None], dict[str, JsonObject]] = {
    check_int: {
        "per_device_train_batch_size": {},
        "per_device_eval_batch_size": {},
        "gradient_accumulation_steps": {},
        "eval_accumulation_steps": {"is_optional": True},
        "max_steps": {"minimum": -1},
        "max_length": {"minimum": 2, "is_optional": True},  # a single token has none before it to be predicted from
        "seed": {"minimum": 0, "maximum": 2**32 - 1},
        "data_seed": {"minimum": 0, "maximum": 2**32 - 1, "is_optional": True},
        "save_total_limit": {"minimum": 0, "is_optional": True},
        "dataset_num_proc": {"is_optional": True},
        "dataloader_num_workers": {"minimum": 0},
        "target_vocab_size": {"is_optional": True},
        "max_train_tokens": {"is_optional": True},
        "vllm_server_port": {"maximum": 65535},
        "vllm_group_port": {"maximum": 65535},
        "vllm_tensor_parallel_size": {},
        "vllm_max_model_length": {"is_optional": True},
    },
    check_number: {
        "learning_rate": {"minimum": 0},
        "num_train_epochs": {"above": 0},
        "max_train_minutes": {"above": 0, "is_optional": True},
        "weight_decay": {"minimum": 0},
        "adam_beta1": {"minimum": 0, "below": 1},
        "adam_beta2": {"minimum": 0, "below": 1},
        "adam_epsilon": {"minimum": 0},
        "max_grad_norm": {"minimum": 0, "is_optional": True},
        "warmup_steps": {"minimum": 0, "is_optional": True},
        "warmup_ratio": {"minimum": 0, "maximum": 1, "is_optional": True},
        "logging_steps": {"minimum": 0},
        "eval_steps": {"minimum": 0, "is_optional": True},
        "save_steps": {"minimum": 0},
        "label_smoothing_factor": {"minimum": 0, "maximum": 1},
        "vllm_server_timeout": {"above": 0},
        "vllm_gpu_memory_utilization": {"above": 0, "maximum": 1},
        "neftune_noise_alpha": {"minimum": 0, "is_optional": True},
    },
}


@document_own_options
@dataclass
class DraftConfig(ParallelOptions, SFTConfig):  # type: ignore[explicit-any]  # fields of TRL
    """Options shared by the draft trainers, on top of [`~trl.SFTConfig`] and [`ParallelOptions`].

    `bf16` defaults to `False` where there is no accelerator (TRL: `True`): most CPUs only emulate it.
    `logging_nan_inf_filter` is always off: it would log other batches' losses in place of a NaN.
    """

    assume_target_completions: bool = option(
        "Whether rows that do not say what the target wrote are trained on from the first token to the last: `text` "
        "and `input_ids` alone, what a `formatting_func` returns, and `messages` with images.",
        default=False,
    )
    merge_adapter: bool = option(
        "Whether `save_model` and `push_to_hub` write LoRA weights merged into the draft, as servers need them. "
        "Checkpoints stay adapters, so that training can resume.",
        default=False,
    )
    align_vocabulary: bool = option(
        "Whether `save_model` and `push_to_hub` pad or cut the draft's vocabulary rows to the target's number, as "
        "vLLM, SGLang and `generate` demand. The distribution over real ids and checkpoints do not change.",
        default=False,
    )
    target_vocab_size: int | None = option(
        "Number of rows of the target's head, which `align_vocabulary` needs; read from the teacher by default.",
        default=None,
    )

    max_train_tokens: int | None = option(
        "Tokens to train on, prompts included and padding left out, in place of `num_train_epochs`. The run ends with "
        "the step that is nearest, and warm-up and decay of the learning rate follow. A resumed run goes on with what "
        "is left. No budget by default.",
        default=None,
    )
    max_train_minutes: float | None = option(
        "Minutes to train for, evaluations and checkpoints included and loading left out, in place of "
        "`num_train_epochs`. The number of steps, which warm-up and decay of the learning rate follow, is estimated "
        "after each step from the pace so far. A resumed run goes on with what is left. No budget by default.",
        default=None,
    )
    serving_engines: list[str] | None = option(
        "Engines that the draft will be served by. `check_serving` runs for each before training, what it finds is "
        "logged, and the model card shows it. None by default.",
        default=None,
    )
    serving_target: str | None = option(
        "Folder or Hub id of the target that `serving_engines` are checked with; by default the teacher, or the target "
        "that the dataset names.",
        default=None,
    )

    @property
    def accepts_any_text(self) -> bool:
        """Whether rows may leave open what the target wrote, since all of their tokens are trained on."""
        return self.assume_target_completions

    def to_dict(self) -> JsonObject:
        """As `TrainingArguments.to_dict`, which trackers log, without secrets such as a token for the draft."""
        return strip_secrets(super().to_dict())

    def __post_init__(self) -> None:
        check_finite_options(self)
        for check, bounds in BOUNDS.items():
            for name in (name for name in bounds if hasattr(self, name)):
                check(name, getattr(self, name), **bounds[name])
        if self.max_train_minutes is not None:
            for name in ("logging_steps", "eval_steps", "save_steps"):
                if 0 < (getattr(self, name) or 0) < 1:
                    raise ValueError(
                        f"`{name}={getattr(self, name)}` is a share of the steps, whose number `max_train_minutes` "
                        "leaves open. Give a number of steps."
                    )
        self.check_parallel()
        for engine in self.serving_engines or ():
            find_serving_engine(engine)
        self.output_dir = read_path("output_dir", self.output_dir, is_optional=True)
        self.logging_nan_inf_filter = False
        if self.bf16 is None and (self.use_cpu or not torch.accelerator.is_available()):
            self.bf16 = False
        super().__post_init__()

    @classmethod
    def translate(cls, values: JsonObject, source: type) -> JsonObject:
        """Options of another configuration class, by this one's names.

        Args:
            values (`dict[str, Any]`): The options' values by their names there.
            source (`type`): That class.
        """
        return values


@dataclass
class BlackBoxSFTConfig(DraftConfig):  # type: ignore[explicit-any]  # fields of TRL
    """Configuration of [`BlackBoxSFTTrainer`], which has the options of [`~trl.SFTConfig`] and [`DraftConfig`]."""

    def __post_init__(self) -> None:
        if self.parallel_weighting in (ExpectedLength.name, TargetConfidence.name):
            raise ValueError(
                f"`parallel_weighting={self.parallel_weighting!r}` reads the target's distribution, which black-box "
                "training does not have. Use 'position' or 'd_pace', or WhiteBoxDistillTrainer."
            )
        super().__post_init__()


@document_own_options
@dataclass
class WhiteBoxDistillConfig(DraftConfig):  # type: ignore[explicit-any]  # fields of TRL
    """Configuration of [`WhiteBoxDistillTrainer`].

    It has the options of [`~trl.SFTConfig`] and [`DraftConfig`], and those below.

    `completion_only_loss=False` trains on every token of any text, whoever wrote it: prompts, all turns of
    conversations, and rows that have nothing but `text`.
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
        is_block_loss = self.parallel_weighting == ExpectedLength.name
        if is_block_loss and self.divergence is None and self.beta is None:
            self.divergence = TotalVariation.name
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
        refuse(
            (
                self.loss_type != "nll",
                f"`loss_type={self.loss_type!r}` belongs to SFT; the loss here is `divergence={self.divergence!r}`. "
                "Drop `loss_type`, or use BlackBoxSFTTrainer.",
            ),
            (
                is_block_loss and (self.divergence != TotalVariation.name or self.ce_weight),
                f"`parallel_weighting={ExpectedLength.name!r}` is a loss with `divergence='tvd'` alone. Leave "
                f"`divergence={self.divergence!r}` and `ce_weight` out, or use 'd_pace', which weighs any divergence.",
            ),
            (
                self.num_parallel_tokens is not None and self.token_selection != ALL_TOKENS,
                f"`token_selection={self.token_selection!r}` ranks the tokens of a text, and `num_parallel_tokens` "
                "scores each of them several times. Leave one of them out.",
            ),
            (
                self.label_smoothing_factor,
                f"`label_smoothing_factor={self.label_smoothing_factor}` smooths a one-hot label; white-box "
                "distillation has the teacher's whole distribution. Set it to 0.",
            ),
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

    @property
    def accepts_any_text(self) -> bool:
        """As [`DraftConfig.accepts_any_text`]: the target's distribution is known at every token, whoever wrote it."""
        return super().accepts_any_text or self.completion_only_loss is False

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
            weighting=self.build_weighting(),
        )


def to_dict(init_kwargs: InitKwargs) -> Arguments:
    """A copy of arguments that a configuration may have left out."""
    return dict(init_kwargs) if isinstance(init_kwargs, dict) else {}
