"""Training towards the target's distribution at every token."""

from collections.abc import Callable

import torch
from accelerate.logging import get_logger
from peft import PeftConfig, PeftModel
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import ModelOutput

from spec_kd.data.token_columns import REFERENCE_COLUMN
from spec_kd.finite import describe_bad_weight, find_nonfinite_parameter
from spec_kd.heads import unwrap_peft
from spec_kd.loading import get_name
from spec_kd.open_types import Argument, Arguments, Call, JsonObject
from spec_kd.probes import check_logits_are_known, check_plain_head, gives_auxiliary_loss
from spec_kd.trainer.arguments import AnyDataset, EvalDataset, LossResult, as_config
from spec_kd.trainer.configs import InitKwargs, WhiteBoxDistillConfig, to_dict
from spec_kd.trainer.distill_head import DistillTargets, add_distillation_head
from spec_kd.trainer.draft_trainer import DraftTrainer
from spec_kd.trainer.step_clock import TimedSteps
from spec_kd.trainer.teachers.live import LiveTeacher, Teacher, load_teacher
from spec_kd.trainer.teachers.stored import StoredTeacher, read_teacher_info
from spec_kd.trainer.white_box_checks import check_models, check_reference, check_stored_run, find_shared_vocabulary
from spec_kd.vocabulary import ProcessingClass

logger = get_logger(__name__)

MIN_TEMPERATURE = 1e-3
"""Loss temperatures below this make logits overflow."""


class WhiteBoxDistillTrainer(TimedSteps, DraftTrainer):
    """Offline white-box distillation: the draft learns the target's distribution at every token the target wrote.

    See Hong et al., arXiv 2503.07807, and DistillSpec, arXiv 2310.08461. It is [`~trl.SFTTrainer`] with another loss:
    the signature, the data formats, packing, PEFT, checkpointing and logging are TRL's.

    Logged besides TRL's metrics: `alpha_on_data`, the mean of sum_v min(p, q) over the tokens of the loss at the loss
    temperature; `token_share_kept` with a token selection; `time/teacher_share`, the share of a step's time that the
    teacher's hidden states take (its head is part of the loss); and the times of [`TimedSteps`].

    Args:
        model (`str` or `PreTrainedModel`): The draft.
        args ([`WhiteBoxDistillConfig`], *optional*): Configuration; an `SFTConfig` is converted.
        train_dataset (`Dataset` or `IterableDataset`): As for [`BlackBoxSFTTrainer`].
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            Tokenizer of the run; by default the *target's*, if it is found, since a server gives its ids to the draft.
        teacher_model (`str` or `PreTrainedModel`, *optional*):
            The target, which is frozen and put in eval mode. A dataset with the target's signal
            (`generate_responses(..., teacher_signal=...)` or `score_completions`) needs none: the loss then reads its
            columns.
        ref_model (`str` or `PreTrainedModel`, *optional*):
            Reference draft of `token_selection="adaspec"`, which was distilled before. A dataset with its scores in a
            `reference_forward_kl` column needs none.
        teacher_processing_class (`PreTrainedTokenizerBase`, *optional*):
            The target's tokenizer, for a `teacher_model` that does not know where it was loaded from.

    All other arguments are those of [`~trl.SFTTrainer`], in its order.

    Raises:
        VocabularyMismatchError: If draft and target do not share a tokenizer. Their heads may be padded differently.
        ValueError: For adapters that cannot be trained or served this way, and as [`BlackBoxSFTTrainer`].

    Example:

    ```python
    from spec_kd import WhiteBoxDistillTrainer, generate_responses

    responses = generate_responses("my-org/target", prompts, teacher_signal="sampled_logprobs")
    trainer = WhiteBoxDistillTrainer(model="my-org/draft", train_dataset=responses)
    trainer.train()
    ```
    """

    args: WhiteBoxDistillConfig
    _name = "WhiteBoxDistill"
    _config_class: type[WhiteBoxDistillConfig] = WhiteBoxDistillConfig
    _method = "white-box distillation"
    _tag_names = (*DraftTrainer._tag_names, "white-box-distillation")

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: EvalDataset | None = None,
        processing_class: ProcessingClass | None = None,
        compute_loss_func: Call[torch.Tensor] | None = None,
        compute_metrics: Callable[[EvalPrediction], JsonObject] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], Arguments] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[[JsonObject], str] | None = None,
        *,
        teacher_model: str | PreTrainedModel | None = None,
        ref_model: str | PreTrainedModel | None = None,
        teacher_processing_class: ProcessingClass | None = None,
    ):
        args = as_config(args, self._config_class, model)
        teacher_model = args.teacher_model_name_or_path if teacher_model is None else teacher_model
        ref_model = args.ref_model_name_or_path if ref_model is None else ref_model
        self.token_loss = args.build_loss()
        info = read_teacher_info(train_dataset) if teacher_model is None else None
        check_models(model, teacher_model, info, compute_loss_func, peft_config)
        self._teacher_name = None if teacher_model is None else get_name(teacher_model)
        self._reads_reference_column = check_reference(self.token_loss, ref_model, train_dataset)
        models: dict[str, tuple[Argument, InitKwargs]] = {
            "draft": (model, args.model_init_kwargs),
            "teacher": (teacher_model, args.teacher_model_init_kwargs),
            "reference draft": (ref_model, args.ref_model_init_kwargs),
        }
        vocabulary = find_shared_vocabulary(args, models, processing_class, teacher_processing_class)
        self._teacher_vocab_size = vocabulary.target_rows
        self._stored_teacher = None
        if info is not None:
            check_stored_run(args, info, self.token_loss, vocabulary.processing_class, eval_dataset)
            weighting = self.token_loss.weighting
            self._stored_teacher = StoredTeacher(info, weighting is not None and weighting.score == "confidence")
        train_dataset, eval_dataset = self._complete_datasets(
            args, train_dataset, eval_dataset, vocabulary.processing_class
        )
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=vocabulary.processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            quantization_config=quantization_config,
            peft_config=peft_config,
            formatting_func=formatting_func,
        )
        vocab_size = vocabulary.count_loss_ids(
            self.processing_class, self._get_target_vocab_size(), args.chat_template_path
        )
        check_logits_are_known(self.model, "draft")
        if self.aux_loss_enabled and not gives_auxiliary_loss(self.model):
            self.aux_loss_enabled = False
            logger.warning(
                f"{type(unwrap_peft(self.model)).__name__} does not return the load-balancing loss of its experts. It "
                f"is trained without this loss, although `router_aux_loss_coef={self.router_aux_loss_coef}`."
            )
        self._teacher: Teacher = self._stored_teacher or self._load_frozen("teacher", *models["teacher"], vocab_size)
        self.teacher_model = self._teacher.model
        self._reference = None
        if ref_model is not None:
            self._reference = self._load_frozen("reference", *models["reference draft"], vocab_size)
        self._batch_targets: DistillTargets | None = None
        add_distillation_head(unwrap_peft(self.model), self.token_loss, vocab_size)

    def _complete_datasets(
        self,
        args: WhiteBoxDistillConfig,
        train_dataset: AnyDataset | None,
        eval_dataset: EvalDataset | None,
        processing_class: ProcessingClass,
    ) -> tuple[AnyDataset | None, EvalDataset | None]:
        """The datasets in a form that `SFTTrainer` can prepare; as they are by default."""
        return train_dataset, eval_dataset

    def _check_reading(self, model: PreTrainedModel, role: str) -> None:
        if role != "teacher":
            check_plain_head(model, role)
        super()._check_reading(model, role)

    def _load_frozen(
        self, role: str, model: str | PreTrainedModel, init_kwargs: InitKwargs, vocab_size: int
    ) -> LiveTeacher:
        name = model if isinstance(model, str) else None
        model = load_teacher(
            model,
            init_kwargs,
            is_distributed=self.args.world_size > 1,
            trust_remote_code=self.args.trust_remote_code,
            dtype="auto",
        )
        check_logits_are_known(model, role)
        self._check_reading(model, role)
        return LiveTeacher(model, self.accelerator, vocab_size, name)

    @property
    def _used_token_columns(self) -> tuple[str, ...]:
        stored = () if self._stored_teacher is None else self._stored_teacher.columns
        return (*stored, REFERENCE_COLUMN) if self._reads_reference_column else stored

    def _get_target_vocab_size(self) -> int | None:
        return self._teacher_vocab_size or self.args.target_vocab_size

    def _find_target_name(self) -> str | None:
        return self._teacher_name or self.target_name

    def _describe_training(self) -> JsonObject:
        return {
            "target_name": self._teacher.name or self.target_name,
            "divergence": self._describe_loss(),
            "temperature": self.args.temperature,
        }

    def _describe_loss(self) -> str:
        args = self.args
        options = to_dict(args.divergence_kwargs) | ({} if args.beta is None else {"beta": args.beta})
        listed = ", ".join(f"{name}={value}" for name, value in options.items())
        parts = [
            f"{args.divergence} ({listed})" if options else str(args.divergence),
            f"cross-entropy weight {args.ce_weight}" if args.ce_weight else "",
            f"tokens: {args.token_selection}" if self.token_loss.selection else "",
            f"{args.num_parallel_tokens} tokens a pass, weighted by {args.parallel_weighting}" if self.parallel else "",
            self._teacher.describe_service(self.token_loss.divergence),
        ]
        return ", ".join(filter(None, parts))

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: JsonObject,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> LossResult:
        """As `SFTTrainer.compute_loss`, with the divergence from the teacher as the loss."""
        inputs = dict(inputs)
        reference = inputs.pop(REFERENCE_COLUMN, None)
        with self._clock.measure("teacher"):
            teacher = self._teacher.compute_targets(inputs)  # first: it takes its columns out of the inputs
            if self._reference is not None and self.model.training:
                reference = self._reference.compute_targets(inputs)
        layout = self._build_layout(inputs)
        targets = self._batch_targets = DistillTargets(teacher, reference, layout)
        measured = []

        def forward(**kwargs: Argument) -> ModelOutput:
            if not kwargs.get("fused_lm_head"):
                return model(**kwargs)
            measured.append(model(**self._append_masks(kwargs, layout), distill_targets=targets))
            return measured[0]

        loss = super().compute_loss(forward, inputs, return_outputs, num_items_in_batch)
        self._batch_targets = None
        if teacher.alpha_metric is not None:
            alpha = measured[0].alpha
            if layout is None:
                self._log_token_mean(teacher.alpha_metric, alpha)
            else:
                self._log_positions(teacher.alpha_metric, alpha, layout)
                self._log_token_mean("accepted_tokens_on_data", layout.blocks.compute_accepted(alpha))
        if (tail_mass := teacher.compute_tail_mass(inputs["labels"])) is not None:
            self._log_token_mean("teacher_tail_mass", tail_mass)
        if self.token_loss.selection is not None and self.model.training:
            self._log_token_mean("token_share_kept", measured[0].is_kept.float())
        return loss

    def _find_cause(self) -> str | None:
        cause = super()._find_cause()
        if cause is not None or self._batch_targets is None:
            return cause
        if self.token_loss.temperature < MIN_TEMPERATURE:
            return (
                f"`temperature={self.token_loss.temperature}` divides the logits of both models until they overflow. "
                "Raise it."
            )
        return self._batch_targets.teacher.explain_non_finite(self.token_loss)

    def _describe_bad_frozen_weight(self) -> str | None:
        reference = None if self._reference is None else self._reference.model
        for role, model in (("teacher", self._teacher.model), ("reference draft", reference)):
            if model is not None and (name := find_nonfinite_parameter(model)) is not None:
                return describe_bad_weight(role, name)
        return None
