"""Training towards the target's probabilities of each token."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from peft import PeftConfig, PeftModel, PromptLearningConfig
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
)
from typing_extensions import override

from spec_kd._private import get_config_model_id
from spec_kd.data.token_columns import REFERENCE_COLUMN, find_token_columns
from spec_kd.finite import describe_bad_weight, find_nonfinite_parameter
from spec_kd.heads import check_logits_are_known, check_plain_head, unwrap_peft
from spec_kd.loading import choose_processing_class, find_processing_class, load_config
from spec_kd.open_types import Arguments, JsonObject
from spec_kd.probes import gives_auxiliary_loss
from spec_kd.trainer.arguments import as_config, get_load_options
from spec_kd.trainer.distill_head import add_distillation_head
from spec_kd.trainer.draft_trainer import DraftTrainer
from spec_kd.trainer.finite_guard import describe_bad_signal
from spec_kd.trainer.shared_vocabulary import check_pair, check_rows, count_loss_ids
from spec_kd.trainer.step_clock import TimedSteps
from spec_kd.trainer.teachers.live import DistillSignal, LiveTeacher, load_teacher
from spec_kd.trainer.teachers.stored import (
    StoredTargets,
    StoredTeacher,
    check_evaluation_signal,
    check_stored_teacher,
    read_teacher_info,
)
from spec_kd.trainer.training_data import AnyDataset, EvalDataset
from spec_kd.trainer.white_box_distill_config import WhiteBoxDistillConfig
from spec_kd.vocabulary import ProcessingClass, count_real_ids, get_tokenizer

logger = get_logger(__name__)


class WhiteBoxDistillTrainer(TimedSteps, DraftTrainer):
    """
    Offline white-box distillation: at every token the target wrote, the draft's distribution is drawn to the target's
    (Hong et al., arXiv 2503.07807; DistillSpec, arXiv 2310.08461).

    It is [`~trl.SFTTrainer`] with another loss: the signature, the data formats, packing, PEFT, checkpointing and
    logging are TRL's. Logged besides TRL's metrics: `alpha_on_data`, the mean of sum_v min(p, q) over the tokens of the
    loss at the loss temperature, and with a token selection `token_share_kept`; and where the time of the steps went:
    `time/teacher_share` (its hidden states; its head is part of the loss), and as [`TimedSteps`].

    Args:
        model (`str` or `PreTrainedModel`): The draft.
        args ([`WhiteBoxDistillConfig`], *optional*): Configuration; an `SFTConfig` is taken over.
        train_dataset (`Dataset` or `IterableDataset`): As for [`BlackBoxSFTTrainer`].
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            Defaults to the *target's* tokenizer where it can be found: that is what the draft reads when it serves.
        teacher_model (`str` or `PreTrainedModel`, *optional*):
            The target. It is frozen and put in eval mode. Not needed for a dataset with the target's signal
            (`generate_responses(..., teacher_signal=...)` or `score_completions`): the loss then reads its columns.
        ref_model (`str` or `PreTrainedModel`, *optional*):
            Reference draft of `token_selection="adaspec"`: one distilled before. Not needed where the dataset has its
            scores in a `reference_forward_kl` column.
        teacher_processing_class (`PreTrainedTokenizerBase`, *optional*):
            The target's tokenizer, where `teacher_model` is a model that does not know where it was loaded from.

    All other arguments are those of [`~trl.SFTTrainer`], in its order.

    Raises:
        VocabularyMismatchError: If draft and target do not share a tokenizer. Differently padded heads are fine.
        ValueError: For adapters that cannot be trained or served this way, and as [`BlackBoxSFTTrainer`].

    Example:

    ```python
    from spec_kd import SpeculativeEvalCallback, WhiteBoxDistillTrainer

    trainer = WhiteBoxDistillTrainer(
        model="my-org/draft",
        teacher_model="my-org/target",
        train_dataset=dataset,
        callbacks=[SpeculativeEvalCallback(prompts)],
    )
    trainer.train()
    ```
    """

    _name = "WhiteBoxDistill"
    _config_class = WhiteBoxDistillConfig
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
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], Arguments] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[[dict], str] | None = None,
        *,
        teacher_model: str | PreTrainedModel | None = None,
        ref_model: str | PreTrainedModel | None = None,
        teacher_processing_class: ProcessingClass | None = None,
    ):
        args = as_config(args, self._config_class, model)
        teacher_model = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
        cached_info = read_teacher_info(train_dataset) if teacher_model is None else None
        if teacher_model is None and cached_info is None:
            raise ValueError(
                "`teacher_model` is required: the target as a model, a path or a Hub id; or a dataset with its signal "
                "(`generate_responses(..., teacher_signal=...)`). Without access to the target's probabilities, use "
                "BlackBoxSFTTrainer."
            )
        if teacher_model is model and not isinstance(model, str):
            raise ValueError("`teacher_model` and `model` are the same object: the teacher would be trained.")
        self.token_loss = args.build_loss()
        ref_model = ref_model if ref_model is not None else args.ref_model_name_or_path
        self._check_reference(ref_model, train_dataset)
        if compute_loss_func is not None:
            raise ValueError(
                f"`compute_loss_func` would replace the loss; choose a `divergence` ({args.divergence!r})."
            )
        if any(isinstance(config, PromptLearningConfig) for config in (peft_config, _active_peft_config(model))):
            raise ValueError(
                "Prompt-learning adapters cannot be merged into a draft, so no server could use it. Use LoRA."
            )
        target_class = teacher_processing_class
        if target_class is None and teacher_model is not None:
            target_class = find_processing_class(teacher_model, get_load_options(args, args.teacher_model_init_kwargs))
        draft_class = find_processing_class(model, get_load_options(args, args.model_init_kwargs))
        processing_class = processing_class or choose_processing_class(draft_class, target_class)
        check_pair(processing_class, target_class, draft_class)
        named = {
            "draft": (model, args.model_init_kwargs),
            "teacher": (teacher_model, args.teacher_model_init_kwargs),
            "reference draft": (ref_model, args.ref_model_init_kwargs),
        }
        check_rows(
            processing_class,
            {
                role: load_config(name, get_load_options(args, init_kwargs))
                for role, (name, init_kwargs) in named.items()
                if name is not None
            },
        )
        self._teacher: LiveTeacher | StoredTeacher | None = None
        self._batch_signal: DistillSignal | None = None
        self._teacher_vocab_size = None
        if cached_info is not None:
            check_stored_teacher(cached_info, self.token_loss, processing_class)
            check_evaluation_signal(eval_dataset, cached_info)
            if args.completion_only_loss is False:
                raise ValueError(
                    "`completion_only_loss=False` trains on the prompts as well, of which the dataset's teacher "
                    "signal says nothing. Drop it, or pass a `teacher_model`."
                )
            self._teacher, self._teacher_name = StoredTeacher(cached_info), cached_info.target_name
        else:
            config = load_config(teacher_model, get_load_options(args, args.teacher_model_init_kwargs))
            self._teacher_vocab_size = config.get_text_config().vocab_size
        vocab_size = count_real_ids(processing_class)
        target_tokens = None if target_class is None else set(get_tokenizer(target_class).get_vocab())

        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            quantization_config=quantization_config,
            peft_config=peft_config,
            formatting_func=formatting_func,
        )
        vocab_size = count_loss_ids(
            self.processing_class, vocab_size, target_tokens, self._get_target_vocab_size(), args.chat_template_path
        )
        check_logits_are_known(self.model, "draft")
        if self.aux_loss_enabled and not gives_auxiliary_loss(self.model):
            self.aux_loss_enabled = False
            logger.warning(
                f"{type(unwrap_peft(self.model)).__name__} does not return the load-balancing loss of its experts: it "
                f"is trained without, not with `router_aux_loss_coef={self.router_aux_loss_coef}`."
            )
        self.teacher_model = None
        if self._teacher is None:
            self._teacher = self._load_frozen(teacher_model, args.teacher_model_init_kwargs, vocab_size, "teacher")
            is_named = isinstance(teacher_model, str)
            self._teacher_name = teacher_model if is_named else get_config_model_id(self._teacher.model.config)
            self.teacher_model = self._teacher.model
        self._reference = None
        if ref_model is not None:
            self._reference = self._load_frozen(ref_model, args.ref_model_init_kwargs, vocab_size, "reference")
            check_plain_head(self._reference.model, "reference")
        add_distillation_head(unwrap_peft(self.model), self.token_loss, vocab_size)

    def _check_reading(self, model: PreTrainedModel, role: str) -> None:
        if role == "draft":
            check_plain_head(model, role)
        super()._check_reading(model, role)

    def _load_frozen(
        self, model: str | PreTrainedModel, init_kwargs: dict | None, vocab_size: int, role: str
    ) -> LiveTeacher:
        model = load_teacher(
            model,
            init_kwargs,
            is_distributed=self.args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"),
            trust_remote_code=self.args.trust_remote_code,
            dtype="auto",
        )
        check_logits_are_known(model, role)
        self._check_reading(model, role)
        return LiveTeacher(model, self.accelerator, vocab_size)

    def _check_reference(self, ref_model: str | PreTrainedModel | None, train_dataset: Any) -> None:
        selection = self.token_loss.selection
        needs_reference = selection is not None and selection.needs_reference
        if ref_model is not None and not needs_reference:
            raise ValueError(
                "A `ref_model` is only read by `token_selection='adaspec'`. Set that, or drop the reference."
            )
        self._reads_reference_column = needs_reference and ref_model is None
        is_missing = train_dataset is not None and REFERENCE_COLUMN not in find_token_columns(train_dataset)
        if self._reads_reference_column and is_missing:
            raise ValueError(
                f"`token_selection={selection.name!r}` compares the draft with a reference draft. Pass `ref_model`, or "
                f"a dataset with a `{REFERENCE_COLUMN}` column (`spec_kd.data.add_reference_scores`)."
            )

    @property
    def _used_token_columns(self) -> tuple[str, ...]:
        cached = self._teacher.columns if isinstance(self._teacher, StoredTeacher) else ()
        return (*cached, REFERENCE_COLUMN) if self._reads_reference_column else cached

    def _get_target_vocab_size(self) -> int | None:
        return self._teacher_vocab_size or self.args.target_vocab_size

    def _describe_training(self) -> JsonObject:
        return {
            "target_name": self._teacher_name or self.target_name,
            "divergence": self._describe_loss(),
            "temperature": self.args.temperature,
        }

    def _describe_loss(self) -> str:
        args, options = self.args, dict(self.args.divergence_kwargs or {})
        if args.beta is not None:
            options["beta"] = args.beta
        described = args.divergence
        if options:
            described += f" ({', '.join(f'{name}={value}' for name, value in options.items())})"
        if args.ce_weight:
            described += f", cross-entropy weight {args.ce_weight}"
        if self.token_loss.selection is not None:
            described += f", tokens: {args.token_selection}"
        if isinstance(self._teacher, StoredTeacher):
            info = self._teacher.info
            described += f", {info.sparse_method.describe_service(self.token_loss.divergence)} from {info.method}"
        return described

    @override
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        reference = inputs.pop(REFERENCE_COLUMN, None)
        with self._clock.measure("teacher"):
            teacher_signal = self._teacher.compute_signal(inputs)  # first: it takes its columns out of the inputs
            if self._reference is not None and self.model.training:
                reference = self._reference.compute_signal(inputs)
        signal = self._batch_signal = DistillSignal(teacher_signal, reference)
        measured = []

        def forward(**kwargs):
            if not kwargs.get("fused_lm_head"):
                return model(**kwargs)
            measured.append(model(**kwargs, distill_signal=signal))
            return measured[0]

        loss = super().compute_loss(forward, inputs, return_outputs, num_items_in_batch)
        self._batch_signal = None
        self._log_alpha(measured[0].alpha, teacher_signal)
        if isinstance(teacher_signal, StoredTargets):
            tail_mass = teacher_signal.compute_tail_mass(inputs["labels"])
            if tail_mass is not None:
                self._log_token_mean("teacher_tail_mass", tail_mass)
        if self.token_loss.selection is not None and self.model.training:
            self._log_token_mean("token_share_kept", measured[0].is_kept.float())
        return loss

    def _find_cause(self) -> str | None:
        cause = super()._find_cause()
        if cause is None and self._batch_signal is not None:
            cause = describe_bad_signal(self._batch_signal.teacher, self.token_loss)
        return cause

    def _describe_bad_frozen_weight(self) -> str | None:
        for role, live in (("teacher", self._teacher), ("reference draft", self._reference)):
            model = getattr(live, "model", None)
            name = None if model is None else find_nonfinite_parameter(model)
            if name is not None:
                return describe_bad_weight(role, name)
        return None

    def _log_alpha(self, alpha: torch.Tensor, signal: Any) -> None:
        """Under a name that says what it is: a coarsened teacher gives an upper bound, counts alone give nothing."""
        kind = signal.info.sparse_method.alpha if isinstance(signal, StoredTargets) else "exact"
        if kind is not None:
            self._log_token_mean("alpha_upper_bound_on_data" if kind == "upper bound" else "alpha_on_data", alpha)

    def _log_token_mean(self, name: str, values: torch.Tensor) -> None:
        """Mean over the tokens of all processes; a step without any is left out."""
        total, count = (
            self.accelerator.gather_for_metrics(value).sum()
            for value in (values.sum(), values.new_tensor(values.numel()))
        )
        if count > 0:
            self._metrics["train" if self.model.training else "eval"][name].append((total / count).item())


def _active_peft_config(model: Any) -> Any:
    is_peft = not isinstance(model, str) and is_peft_model(model)
    return model.peft_config[model.active_adapter] if is_peft else None
