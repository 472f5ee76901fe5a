"""Text that the target did not write, as rows that it can score."""

from collections.abc import Mapping
from typing import cast

from datasets import Dataset, Features, List, Value

from spec_kd.data.training_rows import to_training_rows
from spec_kd.open_types import JsonValue
from spec_kd.options import check_dataset, check_int, check_text
from spec_kd.version import __version__
from spec_kd.vocabulary import ProcessingClass, get_tokenizer

MIN_LENGTH = 2
"""Tokens of the shortest piece: the first one is only read, since nothing comes before it."""


def tokenize_corpus(
    dataset: Dataset,
    processing_class: ProcessingClass,
    *,
    max_length: int | None = 1024,
    text_field: str = "text",
    num_proc: int | None = None,
) -> Dataset:
    """Turns text of any origin into rows for [`score_completions`] and [`WhiteBoxDistillTrainer`].

    Every token of the text counts, but for the first one of a row. So `prompt_ids` is the first token alone, and
    `completion_ids` is all that follows. Plain text gets the tokenizer's special tokens and its EOS, as in
    [`~trl.SFTTrainer`]. Conversations, and prompts with their completions, are rendered as the trainers render them.

    Args:
        dataset (`Dataset`): Has a column of text; or `messages` or `conversations`; or `prompt` and `completion`; or
            `input_ids`; or `prompt_ids` and `completion_ids`.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): The target's.
        max_length (`int`, *optional*, defaults to `1024`): Maximum number of tokens of a row. Longer text becomes
            several rows, and none of them sees another. `None` for no limit.
        text_field (`str`, *optional*, defaults to `"text"`): Name of the column of plain text.
        num_proc (`int`, *optional*): Number of processes.

    Returns:
        `Dataset`: `prompt_ids` and `completion_ids`, lists of int32. Rows of fewer than two tokens are left out.

    Raises:
        ValueError: If the dataset has none of these columns, or no row is left.
    """
    check_dataset("dataset", dataset)
    check_int("max_length", max_length, MIN_LENGTH, is_optional=True)
    check_text("text_field", text_field)
    if text_field in dataset.column_names:
        rows = _tokenize_text(dataset, processing_class, text_field, num_proc)
    else:
        rows = cast(
            Dataset,
            to_training_rows(dataset, processing_class, completion_only_loss=False, num_proc=num_proc, name="corpus"),
        )
    if "input_ids" not in rows.column_names:
        raise ValueError(
            f"The corpus has the columns {dataset.column_names}. Needed is one of text ({text_field!r}), `messages`, "
            "`prompt` with `completion`, or ids."
        )

    def split(batch: Mapping[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        pieces = [
            ids[start : start + (max_length or len(ids))]
            for ids in batch["input_ids"]
            for start in range(0, len(ids), max_length or len(ids))
        ]
        kept = [piece for piece in pieces if len(piece) >= MIN_LENGTH]
        return {"prompt_ids": [piece[:1] for piece in kept], "completion_ids": [piece[1:] for piece in kept]}

    ids = List(Value("int32"))
    pieces = rows.select_columns(["input_ids"]).map(
        split,
        batched=True,
        remove_columns=["input_ids"],
        features=Features({"prompt_ids": ids, "completion_ids": ids}),
        num_proc=num_proc,
        desc="Splitting corpus",
    )
    if not len(pieces):
        raise ValueError(f"No row of the corpus has {MIN_LENGTH} tokens: there is nothing to score.")
    return pieces


def _tokenize_text(
    dataset: Dataset, processing_class: ProcessingClass, text_field: str, num_proc: int | None
) -> Dataset:
    tokenizer = get_tokenizer(processing_class)
    eos = tokenizer.eos_token or ""

    def tokenize(batch: Mapping[str, list[JsonValue]], version: str) -> dict[str, list[list[int]]]:
        texts = [text if text.endswith(eos) else text + eos for text in batch[text_field]]
        return {"input_ids": tokenizer(texts)["input_ids"]}

    return dataset.select_columns([text_field]).map(
        tokenize,
        batched=True,
        fn_kwargs={"version": __version__},  # in the fingerprint, as in `render_rows`
        remove_columns=[text_field],
        num_proc=num_proc,
        desc="Tokenizing corpus",
    )
