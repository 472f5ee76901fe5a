from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from peft import PromptLearningConfig
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from spec_kd._private import get_config_model_id
from spec_kd.heads import unwrap_peft
from spec_kd.losses import build_divergence
from spec_kd.trainer.distill_head import add_distillation_head, check_trainable_head
from spec_kd.trainer.draft_trainer import DraftTrainer, as_config, find_tokenizer, get_hub_options
from spec_kd.trainer.teacher import LiveTeacher, load_teacher
from spec_kd.trainer.white_box_distill_config import WhiteBoxDistillConfig
from spec_kd.vocabulary import (
    VocabularyMismatchError,
    check_same_tokenizer,
    count_real_ids,
    describe_served_differences,
)

logger = get_logger(__name__)


class WhiteBoxDistillTrainer(DraftTrainer):
    """
    Offline white-box distillation: at every token the target wrote, the draft's distribution is drawn to the target's
    (Hong et al., arXiv 2503.07807; DistillSpec, arXiv 2310.08461).

    It is [`~trl.SFTTrainer`] with another loss: the signature, the data formats, packing, PEFT, checkpointing and
    logging are TRL's. Logged besides TRL's metrics: `alpha_on_data`, the mean of sum_v min(p, q) over the tokens of the
    loss at the loss temperature.

    Args:
        model (`str` or `PreTrainedModel`): The draft.
        args ([`WhiteBoxDistillConfig`], *optional*): Configuration; an `SFTConfig` is taken over.
        train_dataset (`Dataset` or `IterableDataset`): As for [`BlackBoxSFTTrainer`].
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            Defaults to the *target's* tokenizer where it can be found: that is what the draft reads when it serves.
        teacher_model (`str` or `PreTrainedModel`): The target. It is frozen and put in eval mode.
        teacher_processing_class (`PreTrainedTokenizerBase`, *optional*):
            The target's tokenizer, where `teacher_model` is a model that does not know where it was loaded from.
        sft_arguments: Every other argument of [`~trl.SFTTrainer`].

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
        model: str | PreTrainedModel,
        args: TrainingArguments | None = None,
        *,
        processing_class: PreTrainedTokenizerBase | None = None,
        teacher_model: str | PreTrainedModel | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        compute_loss_func: Any = None,
        peft_config: Any = None,
        **sft_arguments: Any,
    ):
        args = as_config(args, self._config_class, model)
        teacher_model = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
        if teacher_model is None:
            raise ValueError(
                "`teacher_model` is required: the target as a model, a path or a Hub id. Without access to the "
                "target's probabilities, use BlackBoxSFTTrainer."
            )
        if teacher_model is model and not isinstance(model, str):
            raise ValueError("`teacher_model` and `model` are the same object: the teacher would be trained.")
        if compute_loss_func is not None:
            raise ValueError(
                f"`compute_loss_func` would replace the loss; choose a `divergence` ({args.divergence!r})."
            )
        if any(isinstance(config, PromptLearningConfig) for config in (peft_config, _active_peft_config(model))):
            raise ValueError(
                "Prompt-learning adapters cannot be merged into a draft, so no server could use it. Use LoRA."
            )
        teacher_tokenizer = teacher_processing_class or find_tokenizer(teacher_model, args.teacher_model_init_kwargs)
        draft_tokenizer = find_tokenizer(model, args.model_init_kwargs)
        processing_class = processing_class or teacher_tokenizer or draft_tokenizer
        self._teacher_vocab_size = (
            _find_config(teacher_model, args.teacher_model_init_kwargs).get_text_config().vocab_size
        )
        self._check_vocabulary(model, teacher_model, args, processing_class, teacher_tokenizer, draft_tokenizer)

        super().__init__(model, args, processing_class=processing_class, peft_config=peft_config, **sft_arguments)
        check_trainable_head(unwrap_peft(self.model))
        vocab_size = count_real_ids(self.processing_class)
        teacher = load_teacher(
            teacher_model,
            args.teacher_model_init_kwargs,
            is_distributed=args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"),
            trust_remote_code=args.trust_remote_code,
            dtype="auto",
        )
        self._teacher_name = get_config_model_id(teacher.config)
        self._teacher = LiveTeacher(teacher, self.accelerator, vocab_size)
        self.teacher_model = self._teacher.model
        self.divergence = build_divergence(args.divergence, args.beta if args.divergence == "jsd" else None)
        add_distillation_head(unwrap_peft(self.model), self.divergence, args.temperature, vocab_size)

    @staticmethod
    def _check_vocabulary(model, teacher_model, args, processing_class, teacher_tokenizer, draft_tokenizer) -> None:
        if processing_class is None:
            raise ValueError(
                "Neither the draft nor the teacher comes with a tokenizer. Pass the target's as `processing_class`."
            )
        for tokenizer in (teacher_tokenizer, draft_tokenizer):
            if tokenizer is not None and tokenizer is not processing_class:
                check_same_tokenizer(processing_class, tokenizer)
        if draft_tokenizer is not None and teacher_tokenizer is not None:
            for difference in describe_served_differences(draft_tokenizer, teacher_tokenizer):
                logger.warning(f"Draft and target differ, and a server goes by the target: {difference}")
        real_ids = count_real_ids(processing_class)
        for role, named, init_kwargs in (
            ("draft", model, args.model_init_kwargs),
            ("teacher", teacher_model, args.teacher_model_init_kwargs),
        ):
            rows = _find_config(named, init_kwargs).get_text_config().vocab_size
            if rows < real_ids:
                raise VocabularyMismatchError(
                    f"The {role}'s head has {rows} rows but the tokenizer has {real_ids} ids, so the {role} cannot "
                    "speak this vocabulary. Pass the tokenizer that belongs to both models, or use BlackBoxSFTTrainer, "
                    "which needs no shared vocabulary."
                )

    def _get_target_vocab_size(self) -> int | None:
        return self._teacher_vocab_size

    def _describe_training(self) -> dict[str, Any]:
        return {
            "target_name": self._teacher_name,
            "divergence": self.args.divergence,
            "temperature": self.args.temperature,
        }

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        signal = self._teacher.compute_signal(inputs)
        alpha = []

        def forward(**kwargs):
            if not kwargs.get("fused_lm_head"):
                return model(**kwargs)
            outputs = model(**kwargs, teacher_signal=signal)
            alpha.append(outputs.alpha)
            return outputs

        loss = super().compute_loss(forward, inputs, return_outputs, num_items_in_batch)
        alpha_sum, count = (
            self.accelerator.gather_for_metrics(value).sum()
            for value in (alpha[0].sum(), alpha[0].new_tensor(alpha[0].numel()))
        )
        if count > 0:
            self._metrics["train" if self.model.training else "eval"]["alpha_on_data"].append(
                (alpha_sum / count).item()
            )
        return loss


def _active_peft_config(model: Any) -> Any:
    is_peft = not isinstance(model, str) and is_peft_model(model)
    return model.peft_config[model.active_adapter] if is_peft else None


def _find_config(model: str | PreTrainedModel, init_kwargs: dict[str, Any] | None) -> PretrainedConfig:
    return AutoConfig.from_pretrained(model, **get_hub_options(init_kwargs)) if isinstance(model, str) else model.config
