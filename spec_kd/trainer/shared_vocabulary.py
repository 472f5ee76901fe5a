"""The vocabulary that draft, target and reference draft share, on which a white-box loss compares them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from accelerate.logging import get_logger
from transformers import PreTrainedModel

from spec_kd.loading import choose_processing_class, find_processing_class, load_config
from spec_kd.trainer.arguments import InitKwargs, get_load_options
from spec_kd.trainer.draft_config import DraftConfig
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
"""Names that `trl.clone_chat_template` gives to the tokens that fill up the draft's rows; no text contains them."""

Models = Mapping[str, tuple[str | PreTrainedModel | None, InitKwargs]]
"""By role: a model, its path or its Hub id, and the arguments of `from_pretrained`."""


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
