"""What white-box distillation refuses before any work: a missing teacher, and what would replace or bypass its loss."""

from peft import PeftConfig, PeftModel, PromptLearningConfig
from transformers import PreTrainedModel

from spec_kd.data.teacher_signal import TeacherInfo
from spec_kd.data.token_columns import REFERENCE_COLUMN, find_token_columns
from spec_kd.losses import TokenLoss
from spec_kd.open_types import Call
from spec_kd.trainer.teachers.stored import check_evaluation_signal, check_stored_teacher
from spec_kd.trainer.training_data import AnyDataset, EvalDataset
from spec_kd.trainer.white_box_distill_config import WhiteBoxDistillConfig
from spec_kd.vocabulary import ProcessingClass

Model = str | PreTrainedModel | PeftModel


def check_teacher(model: Model, teacher_model: Model | None, info: TeacherInfo | None) -> None:
    """Raises `ValueError` unless there is a teacher: a model other than the draft, or the signal of the training set.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`): The draft.
        teacher_model (`str`, `PreTrainedModel` or `PeftModel`, *optional*): The target.
        info (`TeacherInfo`, *optional*): Describes the training set's signal, if there is one.
    """
    if teacher_model is None and info is None:
        raise ValueError(
            "`teacher_model` is required: the target as a model, a path or a Hub id; or a dataset with its signal "
            "(`generate_responses(..., teacher_signal=...)`). Without access to the target's probabilities, use "
            "BlackBoxSFTTrainer."
        )
    if teacher_model is model and not isinstance(model, str):
        raise ValueError("`teacher_model` and `model` are the same object: the teacher would be trained.")


def check_loss_is_ours(
    args: WhiteBoxDistillConfig, model: Model, compute_loss_func: Call[object] | None, peft_config: PeftConfig | None
) -> None:
    """Raises `ValueError` for a loss function in place of the divergence, and for adapters that no server can use."""
    if compute_loss_func is not None:
        raise ValueError(f"`compute_loss_func` would replace the loss; choose a `divergence` ({args.divergence!r}).")
    configs = (peft_config, getattr(model, "active_peft_config", None))
    if any(isinstance(config, PromptLearningConfig) for config in configs):
        raise ValueError("Prompt-learning adapters cannot be merged into a draft, so no server could use it. Use LoRA.")


def check_reference(loss: TokenLoss, ref_model: Model | None, train_dataset: AnyDataset | None) -> bool:
    """Returns whether the loss reads the reference draft's scores from the dataset.

    Args:
        loss (`TokenLoss`): The loss of the run.
        ref_model (`str`, `PreTrainedModel` or `PeftModel`, *optional*): The reference draft.
        train_dataset (`Dataset` or `IterableDataset`, *optional*): The training set.

    Raises:
        ValueError: For a reference draft that is not used, or if one is needed and there are no scores either.
    """
    selection = loss.selection
    if selection is None or not selection.needs_reference:
        if ref_model is not None:
            raise ValueError(
                "A `ref_model` is only read by `token_selection='adaspec'`. Set that, or drop the reference."
            )
        return False
    has_scores = train_dataset is None or REFERENCE_COLUMN in find_token_columns(train_dataset)
    if ref_model is None and not has_scores:
        raise ValueError(
            f"`token_selection={selection.name!r}` compares the draft with a reference draft. Pass `ref_model`, or "
            f"a dataset with a `{REFERENCE_COLUMN}` column (`spec_kd.data.add_reference_scores`)."
        )
    return ref_model is None


def check_stored_run(
    args: WhiteBoxDistillConfig,
    info: TeacherInfo,
    loss: TokenLoss,
    processing_class: ProcessingClass,
    eval_dataset: EvalDataset | None,
) -> None:
    """Raises unless the stored signal serves this run: its loss, its tokens and its evaluation sets.

    Raises:
        VocabularyMismatchError: As [`check_stored_teacher`].
        ValueError: As [`check_stored_teacher`], for evaluation sets without the signal, or if prompts are trained on.
    """
    check_stored_teacher(info, loss, processing_class)
    check_evaluation_signal(eval_dataset, info)
    if args.completion_only_loss is False:
        raise ValueError(
            "`completion_only_loss=False` trains on the prompts as well, of which the dataset's teacher signal says "
            "nothing. Drop it, or pass a `teacher_model`."
        )
