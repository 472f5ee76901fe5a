"""What white-box distillation checks before any work: teacher, loss, and the vocabulary that all models share."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from accelerate.logging import get_logger
from peft import PeftConfig, PeftModel, PromptLearningConfig
from transformers import PreTrainedModel

from spec_kd.data.teacher_signal import TeacherInfo
from spec_kd.data.token_columns import REFERENCE_COLUMN, find_token_columns
from spec_kd.loading import choose_processing_class, find_processing_class, load_config
from spec_kd.losses import TokenLoss
from spec_kd.open_types import Call
from spec_kd.options import refuse
from spec_kd.trainer.arguments import AnyDataset, EvalDataset, get_load_options
from spec_kd.trainer.configs import DraftConfig, InitKwargs, WhiteBoxDistillConfig
from spec_kd.trainer.teachers.stored import check_stored_teacher, read_teacher_info
from spec_kd.vocabulary import (
    ProcessingClass,
    VocabularyMismatchError,
    check_same_tokenizer,
    count_real_ids,
    describe_served_differences,
    get_tokenizer,
)

logger = get_logger(__name__)

Model = str | PreTrainedModel | PeftModel
DUMMY_TOKEN = r"<extra_id_\d+>"
"""Names that `trl.clone_chat_template` gives to the tokens that fill up the draft's rows; no text contains them."""

Models = Mapping[str, tuple[str | PreTrainedModel | None, InitKwargs]]
"""By role: a model, its path or its Hub id, and the arguments of `from_pretrained`."""


def check_models(
    model: Model,
    teacher_model: Model | None,
    info: TeacherInfo | None,
    compute_loss_func: Call[object] | None,
    peft_config: PeftConfig | None,
) -> None:
    """Raises `ValueError` without a teacher, for another loss function, and for adapters that no server can use.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`): The draft.
        teacher_model (`str`, `PreTrainedModel` or `PeftModel`, *optional*): The target.
        info (`TeacherInfo`, *optional*): Describes the training set's signal, if there is one.
        compute_loss_func (`Callable`, *optional*): What would replace the divergence.
        peft_config (`PeftConfig`, *optional*): The draft's new adapter.
    """
    adapters = (peft_config, getattr(model, "active_peft_config", None))
    refuse(
        (
            teacher_model is None and info is None,
            "`teacher_model` is required: the target as a model, a path or a Hub id; or a dataset with its signal "
            "(`generate_responses(..., teacher_signal=...)`). Without access to the target's probabilities, use "
            "BlackBoxSFTTrainer.",
        ),
        (
            teacher_model is model and not isinstance(model, str),
            "`teacher_model` and `model` are the same object: the teacher would be trained. Load it twice.",
        ),
        (compute_loss_func is not None, "`compute_loss_func` would replace the loss. Choose a `divergence` instead."),
        (
            any(isinstance(adapter, PromptLearningConfig) for adapter in adapters),
            "Prompt-learning adapters cannot be merged into a draft, so no server could use it. Use LoRA.",
        ),
    )


def check_reference(loss: TokenLoss, ref_model: Model | None, train_dataset: AnyDataset | None) -> bool:
    """Returns whether the loss reads the reference draft's scores from the dataset.

    Args:
        loss (`TokenLoss`): The loss of the run.
        ref_model (`str`, `PreTrainedModel` or `PeftModel`, *optional*): The reference draft.
        train_dataset (`Dataset` or `IterableDataset`, *optional*): The training set.

    Raises:
        ValueError: For a reference draft that is not used, or if one is needed and there are no scores either.
    """
    name = loss.selection.name if loss.selection and loss.selection.needs_reference else None
    reads_scores = name is not None and ref_model is None
    refuse(
        (
            name is None and ref_model is not None,
            "A `ref_model` is only read by `token_selection='adaspec'`. Set that, or drop the reference.",
        ),
        (
            reads_scores and train_dataset is not None and REFERENCE_COLUMN not in find_token_columns(train_dataset),
            f"`token_selection={name!r}` compares the draft with a reference draft. Pass `ref_model`, or "
            f"a dataset with a `{REFERENCE_COLUMN}` column (`spec_kd.add_reference_scores`).",
        ),
    )
    return reads_scores


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
    datasets = eval_dataset if isinstance(eval_dataset, dict) else {"evaluation": eval_dataset}
    for name, dataset in datasets.items():
        found = read_teacher_info(dataset)
        if dataset is not None and (found is None or found.sparse_method != info.sparse_method):
            what = "no teacher signal" if found is None else f"a teacher signal of {found.method!r}"
            raise ValueError(
                f"The {name} dataset has {what}, the training set one of {info.method!r}. Make both the same way, or "
                "leave `eval_dataset` out and measure acceptance with `SpeculativeEvalCallback`."
            )
    if args.completion_only_loss is False:
        raise ValueError(
            "`completion_only_loss=False` trains on the prompts as well, of which the dataset's teacher signal says "
            "nothing. Drop it, or pass a `teacher_model`."
        )


@dataclass(frozen=True)
class SharedVocabulary:
    """The vocabulary of a white-box run.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): What the draft is trained with.
        num_ids (`int`): Number of its real ids.
        target_tokens (`set[str]`, *optional*): The target's own tokens, where its tokenizer is known.
        target_rows (`int`, *optional*): Rows of the target's head, where the target is known.
    """

    processing_class: ProcessingClass
    num_ids: int
    target_tokens: set[str] | None
    target_rows: int | None

    def count_loss_ids(
        self, processing_class: ProcessingClass, target_rows: int | None, chat_template_path: str | None
    ) -> int:
        """Number of ids that the loss is over, after `SFTTrainer` may have added some for `chat_template_path`.

        Args:
            processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): As `SFTTrainer` left it.
            target_rows (`int`, *optional*): Rows of the target's head, where known.
            chat_template_path (`str`, *optional*): Named in the error.

        Raises:
            VocabularyMismatchError: If the target cannot read what was added.
        """
        vocabulary = get_tokenizer(processing_class).get_vocab()
        added = [token for token, i in vocabulary.items() if i >= self.num_ids and not re.fullmatch(DUMMY_TOKEN, token)]
        if not added:
            return self.num_ids
        num_ids = max(vocabulary[token] for token in added) + 1
        is_foreign = self.target_tokens is not None and not self.target_tokens.issuperset(added)
        if is_foreign or target_rows is None or target_rows < num_ids:
            raise VocabularyMismatchError(
                f"`chat_template_path={chat_template_path!r}` adds {len(added)} tokens to the tokenizer, such as "
                f"{added[0]!r}, which the target cannot read. Train with the target's own chat template, or give the "
                "path of a `.jinja` file, which adds none."
            )
        return num_ids


def find_shared_vocabulary(
    args: DraftConfig, models: Models, processing_class: ProcessingClass | None, target_class: ProcessingClass | None
) -> SharedVocabulary:
    """Finds the vocabulary that all models share; warns where draft and target treat the same text differently.

    Args:
        args (`DraftConfig`): Options of the run, of which `trust_remote_code` is read.
        models (`Mapping`): See `Models`; with the roles `"draft"`, `"teacher"` and further ones.
        processing_class (*optional*): The tokenizer that the user gave; by default the target's, else the draft's.
        target_class (*optional*): The target's tokenizer, if the user gave it; by default the one saved with it.

    Raises:
        ValueError: If no tokenizer is found.
        VocabularyMismatchError: If tokenizers give text different ids, or a model has no row for some of them.
    """
    found = {
        role: (model, get_load_options(args, init_kwargs))
        for role, (model, init_kwargs) in models.items()
        if model is not None
    }
    if target_class is None and "teacher" in found:
        target_class = find_processing_class(*found["teacher"])
    draft_class = find_processing_class(*found["draft"])
    processing_class = processing_class or choose_processing_class(draft_class, target_class)
    if processing_class is None:
        raise ValueError(
            "Neither the draft nor the teacher comes with a tokenizer. Pass the target's as `processing_class`."
        )
    _check_pair(processing_class, target_class, draft_class)
    num_ids = count_real_ids(processing_class)
    rows = {role: load_config(*named).get_text_config().vocab_size for role, named in found.items()}
    for role, count in rows.items():
        if count < num_ids:
            raise VocabularyMismatchError(
                f"The {role}'s head has {count} rows but the tokenizer has {num_ids} ids, so the {role} cannot "
                "speak this vocabulary. Pass the tokenizer that belongs to both models, or use BlackBoxSFTTrainer, "
                "which needs no shared vocabulary."
            )
    target_tokens = None if target_class is None else set(get_tokenizer(target_class).get_vocab())
    return SharedVocabulary(processing_class, num_ids, target_tokens, rows.get("teacher"))


def _check_pair(
    processing_class: ProcessingClass, target_class: ProcessingClass | None, draft_class: ProcessingClass | None
) -> None:
    if draft_class is not None and target_class is not None:
        check_same_tokenizer(draft_class, target_class)
        for difference in describe_served_differences(draft_class, target_class):
            logger.warning(f"Draft and target differ, and a server uses the target's: {difference}")
    for role, own_class in (("target", target_class), ("draft", draft_class)):
        if own_class is not None and own_class is not processing_class:
            check_same_tokenizer(processing_class, own_class, names=("`processing_class`", role))
