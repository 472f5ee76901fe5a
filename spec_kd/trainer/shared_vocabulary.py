"""Whether draft, target and reference draft speak the vocabulary that a white-box loss compares them on."""

import re
from collections.abc import Mapping

from accelerate.logging import get_logger
from transformers import PretrainedConfig

from spec_kd.vocabulary import (
    ProcessingClass,
    VocabularyMismatchError,
    check_same_tokenizer,
    count_real_ids,
    describe_served_differences,
    get_tokenizer,
)

logger = get_logger(__name__)

DUMMY_TOKEN = r"<extra_id_\d+>"
"""What `trl.clone_chat_template` names the tokens that fill up the draft's rows, which no text holds."""


def check_pair(
    processing_class: ProcessingClass | None, target_class: ProcessingClass | None, draft_class: ProcessingClass | None
) -> None:
    """Warns of what draft and target do differently with the same text.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*): What the draft is trained with.
        target_class, draft_class (*optional*): What comes with the two models, where known.

    Raises:
        ValueError: Without a tokenizer.
        VocabularyMismatchError: If they give text other ids.
    """
    if processing_class is None:
        raise ValueError(
            "Neither the draft nor the teacher comes with a tokenizer. Pass the target's as `processing_class`."
        )
    if draft_class is not None and target_class is not None:
        check_same_tokenizer(draft_class, target_class)
    for role, own_class in (("target", target_class), ("draft", draft_class)):
        if own_class is not None and own_class is not processing_class:
            check_same_tokenizer(processing_class, own_class, names=("`processing_class`", role))
    if draft_class is not None and target_class is not None:
        for difference in describe_served_differences(draft_class, target_class):
            logger.warning(f"Draft and target differ, and a server goes by the target: {difference}")


def check_rows(processing_class: ProcessingClass, configs: Mapping[str, PretrainedConfig]) -> None:
    """Raises `VocabularyMismatchError` unless each model, by its role, has a row for every id of the tokenizer."""
    real_ids = count_real_ids(processing_class)
    for role, config in configs.items():
        rows = config.get_text_config().vocab_size
        if rows < real_ids:
            raise VocabularyMismatchError(
                f"The {role}'s head has {rows} rows but the tokenizer has {real_ids} ids, so the {role} cannot "
                "speak this vocabulary. Pass the tokenizer that belongs to both models, or use BlackBoxSFTTrainer, "
                "which needs no shared vocabulary."
            )


def count_loss_ids(
    processing_class: ProcessingClass,
    num_ids_before: int,
    target_tokens: set[str] | None,
    target_rows: int | None,
    chat_template_path: str | None,
) -> int:
    """Number of ids that the loss is over, after `SFTTrainer` may have added some for `chat_template_path`.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): As `SFTTrainer` left it.
        num_ids_before (`int`): How many real ids it had.
        target_tokens (`set[str]`, *optional*): The target's own tokens, where its tokenizer is known.
        target_rows (`int`, *optional*): Rows of the target's head, where known.
        chat_template_path (`str`, *optional*): For the error.

    Raises:
        VocabularyMismatchError: If the target cannot read what was added.
    """
    vocabulary = get_tokenizer(processing_class).get_vocab()
    added = [token for token, i in vocabulary.items() if i >= num_ids_before and not re.fullmatch(DUMMY_TOKEN, token)]
    if not added:
        return num_ids_before
    num_ids = max(vocabulary[token] for token in added) + 1
    is_foreign = target_tokens is not None and not target_tokens.issuperset(added)
    if is_foreign or target_rows is None or target_rows < num_ids:
        raise VocabularyMismatchError(
            f"`chat_template_path={chat_template_path!r}` adds {len(added)} tokens to the tokenizer, such as "
            f"{added[0]!r}, which the target cannot read. Train with the target's own chat template, or give the path "
            "of a `.jinja` file, which adds none."
        )
    return num_ids
