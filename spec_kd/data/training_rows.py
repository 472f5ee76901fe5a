"""Rows as the trainers take them, checked before anything expensive starts."""

import logging
from collections.abc import Iterable, Sequence
from typing import cast

import accelerate
from datasets import Dataset, IterableDataset
from trl import pack_dataset
from trl.chat_template_utils import has_generation_markers

from spec_kd.data.chat_rendering import ChatRenderer
from spec_kd.data.conversation_rows import IGNORED_LABEL, render_rows
from spec_kd.data.signal_checks import check_same_teacher
from spec_kd.data.teacher_signal import TeacherInfo
from spec_kd.data.token_columns import TOKEN_COLUMNS, read_token_column
from spec_kd.open_types import JsonObject, JsonValue
from spec_kd.vocabulary import ProcessingClass

ACCEPTED_COLUMNS = (
    ("prompt_ids", "completion_ids"),
    ("input_ids", "labels"),
    ("input_ids", "completion_mask"),
    ("input_ids", "assistant_masks"),
    ("prompt", "completion"),
    ("messages",),
    ("conversations",),
)

logger = logging.getLogger(__name__)


def check_training_columns(
    dataset: Dataset | IterableDataset, name: str, assume_target_completions: bool = False
) -> None:
    """Raises unless every row says which tokens the target wrote.

    Args:
        dataset (`Dataset` or `IterableDataset`): Training or evaluation data.
        name (`str`): Name of the dataset in the error.
        assume_target_completions (`bool`, *optional*, defaults to `False`): Whether the target wrote all text of other
            rows.

    Raises:
        ValueError: If the dataset is empty, or none of `ACCEPTED_COLUMNS` is complete.
    """
    if (first := next(iter(dataset), None)) is None:
        raise ValueError(f"The {name} dataset is empty: there is no row to learn from. Check the path and the split.")
    if assume_target_completions or any(set(columns) <= first.keys() for columns in ACCEPTED_COLUMNS):
        return
    accepted = ", ".join(" + ".join(f"`{column}`" for column in columns) for columns in ACCEPTED_COLUMNS)
    raise ValueError(
        f"The {name} dataset has the columns {sorted(first)}, which do not say what the target wrote. Needed is one "
        f"of: {accepted}. If the target wrote all of the text, set `assume_target_completions=True`. To train "
        "on text of others, use WhiteBoxDistillTrainer with `completion_only_loss=False`. If the rows are prompts, "
        "complete them with `spec_kd.generate_responses(target, prompts)`."
    )


def to_training_rows(
    dataset: Dataset | IterableDataset,
    processing_class: ProcessingClass | None = None,
    *,
    token_columns: Sequence[str] = (),
    completion_only_loss: bool | None = None,
    join_turns: bool = True,
    eos_token_id: int | Iterable[int] | None = None,
    num_proc: int | None = None,
    name: str = "training",
) -> Dataset | IterableDataset:
    """Turns rows that say what the target wrote into `input_ids` and `labels`, with labels on those tokens only.

    If a row has both text and ids, the ids count: they are what the target read and wrote, and the text may be
    tokenized in another way. Conversations and text are rendered as in [`render_rows`]. A dataset with labels or
    images, or one that does not say what the target wrote, is returned as it is.

    Args:
        dataset (`Dataset` or `IterableDataset`): Any of `ACCEPTED_COLUMNS`, or others.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*): The target's; not needed for
            rows of ids.
        token_columns (`Sequence[str]`, *optional*): Names of `TOKEN_COLUMNS` to keep, with empty entries for the
            prompt.
        completion_only_loss (`bool`, *optional*): As in [`~trl.SFTConfig`]: `False` puts labels on prompts as well.
            `None` and `True` are the same here.
        join_turns (`bool`, *optional*, defaults to `True`): Whether turns share a row if possible.
        eos_token_id (`int` or `Iterable[int]`, *optional*): Ids at which the target's server stops; by default those of
            the tokenizer, its chat template and the generation config saved with it.
        num_proc (`int`, *optional*): Number of processes that render a `Dataset`.
        name (`str`, *optional*, defaults to `"training"`): Name of the dataset in messages.

    Raises:
        ValueError: If no row is left, or the chat template refuses one; while mapping, if a token column does not have
            one entry per completion token.
    """
    columns = set(dataset.column_names or next(iter(dataset)))
    if "labels" in columns or columns & {"image", "images"}:
        return dataset
    if "input_ids" in columns:
        masks = [mask for mask in ("completion_mask", "assistant_masks") if mask in columns]
        return _apply_masks(dataset, masks, completion_only_loss is not False) if masks else dataset
    if {"prompt_ids", "completion_ids"} <= columns:
        return _join_ids(dataset, token_columns, completion_only_loss is not False)
    if not ({"prompt", "completion"} <= columns or columns & {"messages", "conversations"}):
        return dataset
    says_who = {"prompt", "completion"} <= columns or completion_only_loss is False  # or it does not matter
    if not says_who and accelerate.PartialState().is_main_process:
        logger.warning(
            "%s dataset: every assistant turn of its conversations counts as written by the target.", name.capitalize()
        )
    processing_class = cast(ProcessingClass, processing_class)  # only rows of ids need none
    has_markers = processing_class.chat_template is not None and has_generation_markers(processing_class.chat_template)
    return render_rows(
        dataset,
        ChatRenderer(processing_class, eos_token_id, needs_end=False, has_markers=has_markers),
        completion_only_loss=completion_only_loss,
        join_turns=join_turns,
        num_proc=num_proc,
        name=name,
    )


def _apply_masks(
    dataset: Dataset | IterableDataset, masks: Sequence[str], completion_only: bool
) -> Dataset | IterableDataset:
    read = [mask for mask in masks if completion_only or mask != "completion_mask"]

    def label(row: JsonObject) -> dict[str, list[int]]:
        bits = (all(row[mask][i] for mask in read) for i in range(len(row["input_ids"])))
        return {"labels": [id if bit else IGNORED_LABEL for id, bit in zip(row["input_ids"], bits, strict=True)]}

    return dataset.map(label, remove_columns=list(masks))


def _join_ids(
    dataset: Dataset | IterableDataset, token_columns: Sequence[str], completion_only: bool
) -> Dataset | IterableDataset:
    first: list[str] = []  # of a stream, which cannot be asked for all of them

    def join(row: JsonObject, index: int) -> dict[str, list[JsonValue]]:
        if token_columns and row.get("teacher_info") not in (None, *first):
            first.append(row["teacher_info"])
            check_same_teacher([TeacherInfo.from_json(text) for text in (first[0], first[-1])])
        prompt, completion = list(row["prompt_ids"]), list(row["completion_ids"])
        start = [IGNORED_LABEL] * len(prompt) if completion_only else prompt
        joined = {"input_ids": prompt + completion, "labels": start + completion}
        for name in token_columns:
            joined[name] = [TOKEN_COLUMNS[name]] * len(prompt) + read_token_column(row, name, f"Row {index}")
        return joined

    options = {"desc": "Joining prompt and completion ids"} if isinstance(dataset, Dataset) else {}
    return dataset.map(
        join, with_indices=True, remove_columns=list(dataset.column_names or next(iter(dataset))), **options
    )


def cut_and_pack(
    dataset: Dataset | IterableDataset,
    columns: list[str],
    *,
    max_length: int | None,
    truncation_mode: str,
    packing_strategy: str | None,
    shuffle_seed: int | None,
    name: str,
) -> Dataset | IterableDataset:
    """Cuts and packs rows as `SFTTrainer` does, and token columns with them, which `SFTTrainer` would drop.

    Args:
        dataset (`Dataset` or `IterableDataset`): Has `input_ids`, `labels` and `columns`, of equal length in a row.
        columns (`list[str]`): Token columns to keep; other columns are dropped.
        max_length (`int`, *optional*): Maximum number of tokens of a row; `None` for no limit. Rows without a label
            left are dropped, as in TRL.
        truncation_mode (`str`): `"keep_start"` or `"keep_end"`.
        packing_strategy (`str`, *optional*): Strategy of `trl.pack_dataset`; `None` packs nothing.
        shuffle_seed (`int`, *optional*): Seed for shuffling the rows before packing, as in TRL; `None` keeps their
            order.
        name (`str`): Name of the dataset in progress bars.

    Raises:
        ValueError: If rows are packed without a `max_length`.
    """
    dataset = dataset.select_columns(["input_ids", "labels", *columns])
    describe = (lambda what: {"desc": f"{what} {name} dataset"}) if isinstance(dataset, Dataset) else lambda what: {}
    if packing_strategy is not None:
        if max_length is None:
            raise ValueError("`packing=True` fills rows up to `max_length`, which is None. Set it.")
        if shuffle_seed is not None:
            dataset = dataset.shuffle(seed=shuffle_seed)
        return pack_dataset(dataset, max_length, packing_strategy, describe("Packing"))
    if max_length is not None:
        kept = slice(None, max_length) if truncation_mode == "keep_start" else slice(-max_length, None)
        dataset = dataset.map(lambda row: {key: row[key][kept] for key in row}, **describe("Truncating"))
        dataset = dataset.filter(
            lambda row: any(label != IGNORED_LABEL for label in row["labels"]), **describe("Dropping empty rows of")
        )
    return dataset if shuffle_seed is None else dataset.shuffle(seed=shuffle_seed)


def report_unlabeled_rows(dataset: Dataset, name: str) -> None:
    """Warns about rows without labels, for data without a `max_length` that would drop and count them.

    Args:
        dataset (`Dataset`): The rows; without a column `labels` nothing happens.
        name (`str`): Name of the dataset in messages.

    Raises:
        ValueError: If no row has a label.
    """
    if "labels" not in dataset.column_names:
        return
    _, lost = count_cut_rows(dataset, None)
    if lost == len(dataset):
        raise ValueError(f"All {lost} completions of the {name} dataset are empty: nothing is left to learn from.")
    if lost and accelerate.PartialState().is_main_process:
        logger.warning(
            "%s dataset: %s of %s rows have no completion token and teach nothing. Remove them.",
            name, lost, len(dataset),
        )  # fmt: skip


def count_cut_rows(
    dataset: Dataset,
    max_length: int | None,
    *,
    truncation_mode: str = "keep_start",
    packing_strategy: str | None = None,
) -> tuple[int, int]:
    """Counts the rows that `max_length` cuts, and those that have no label left then.

    Args:
        dataset (`Dataset`): Has `labels`.
        max_length (`int`, *optional*): Maximum number of tokens of prompt and completion together; `None` for no limit.
        truncation_mode (`str`, *optional*, defaults to `"keep_start"`): Part of a row that is kept without packing:
            `"keep_start"` or `"keep_end"`.
        packing_strategy (`str`, *optional*): Strategy of `trl.pack_dataset`: `"bfd"` keeps the start of a row,
            `"bfd_split"` and `"wrapped"` keep all of it. `None` packs nothing.
    """
    if max_length is None or packing_strategy in ("bfd_split", "wrapped"):
        kept = slice(None)
    elif packing_strategy is None and truncation_mode == "keep_end":
        kept = slice(-max_length, None)
    else:
        kept = slice(None, max_length)
    cut = lost = 0
    for batch in dataset.select_columns(["labels"]).iter(batch_size=1000):
        for labels in batch["labels"]:
            cut += len(labels[kept]) < len(labels)
            lost += all(label == IGNORED_LABEL for label in labels[kept])
    return cut, lost
