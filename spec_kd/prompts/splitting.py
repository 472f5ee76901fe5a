"""Splits prompts into training and test rows, with each conversation on one side."""

import hashlib
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from spec_kd.open_types import Array, JsonValue
from spec_kd.options import check_number
from spec_kd.prompts.deduplication import normalize_text

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("hash", "time")
TEXT_COLUMNS = ("prompt", "messages", "prompt_ids", "input_ids", "text")  # the first that exists tells rows apart

logger = logging.getLogger(__name__)


def group_rows(*keys: Array, links: Array | None = None) -> Array:
    """Groups rows that share a key, directly or through other rows, and so belong on one side of a split.

    Args:
        keys (`np.ndarray`): An array of integers, `(N,)`, for each kind of key, such as the conversation and the text.
        links (`np.ndarray`, *optional*): Further pairs of rows that belong together, `(M, 2)`; none by default.

    Returns:
        `np.ndarray` of int64, `(N,)`: For each row the first row of its group.
    """
    uniques = (np.unique(key, return_index=True, return_inverse=True) for key in keys)
    firsts, *others = (first[inverse] for _, first, inverse in uniques)  # the first row with the same key, (N,) each
    parents = firsts.tolist()

    def find(row: int) -> int:
        while parents[row] != row:
            parents[row] = row = parents[parents[row]]
        return row

    pairs = [np.stack([np.arange(len(parents)), other], axis=1) for other in others]  # (N, 2) each
    for linked in pairs if links is None else [*pairs, links]:
        for row, other in linked[firsts[linked[:, 0]] != firsts[linked[:, 1]]].tolist():
            early, late = sorted((find(row), find(other)))
            parents[late] = early
    return np.fromiter(map(find, range(len(parents))), np.int64, len(parents))


def hash_text(text: str) -> int:
    """A 64-bit hash of a text, by BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def hash_prompts(prompts: Iterable[JsonValue]) -> Array:
    """Hashes of prompts, equal for prompts with the same turns of the user and of tools after [`normalize_text`].

    Args:
        prompts (`Iterable` of `str` or `list[dict]`): Values of the column `prompt`.

    Returns:
        `np.ndarray` of uint64, `(N,)`.
    """
    return np.array([hash_text(normalize_text(prompt)) for prompt in prompts], dtype=np.uint64)


def split_prompts(dataset: "Dataset", test_fraction: float, seed: int = 0) -> "tuple[Dataset, Dataset]":
    """Splits a prompt set that has no split of its own into training and test rows.

    Rows with the same `conversation_id` are on one side, and so are rows with the same first turn of the user if they
    have no such id, and rows with the same text. The side depends only on the text and `seed`, not on the other rows.

    Args:
        dataset (`Dataset`): Rows with `prompt`.
        test_fraction (`float`): Share of test rows, met on average; at least 0 and below 1.
        seed (`int`, *optional*, defaults to `0`): Seed of the choice.

    Returns:
        `tuple[Dataset, Dataset]`: Training rows and test rows. A warning says which of them is empty.

    Raises:
        ValueError: The share is out of its range.
    """
    check_number("test_fraction", test_fraction, 0, below=1)
    conversations, texts = _hash_keys(dataset)
    groups = group_rows(conversations, texts)
    is_test = choose_test_rows(texts[groups], np.zeros(len(dataset)), test_fraction, "hash", seed)
    warn_of_empty_side(is_test, groups, test_fraction)
    return dataset.select(np.flatnonzero(~is_test)), dataset.select(np.flatnonzero(is_test))


def hold_out_rows(dataset: "Dataset", num_rows: int) -> "tuple[Dataset, Dataset]":
    """Holds out the first rows of a set for evaluation during training, with each conversation on one side.

    Args:
        dataset (`Dataset`): Rows with `prompt`, `messages`, `prompt_ids` or other columns; grouped as by
            [`split_prompts`].
        num_rows (`int`): Number of rows to hold out. It can be more, because conversations are held out as a whole.

    Returns:
        `tuple[Dataset, Dataset]`: Rows held out, and rows to train on.

    Raises:
        ValueError: All rows belong to one conversation.
    """
    groups = group_rows(*_hash_keys(dataset))
    firsts, sizes = np.unique(groups, return_counts=True)
    if len(firsts) < 2:
        raise ValueError(
            f"The {len(dataset)} rows belong to one conversation, so none can be held out for evaluation. Give more "
            "rows or an evaluation set, or switch evaluation off."
        )
    num_groups = min(int(np.searchsorted(np.cumsum(sizes), num_rows)) + 1, len(firsts) - 1)
    is_held_out = groups <= firsts[num_groups - 1]
    return dataset.select(np.flatnonzero(is_held_out)), dataset.select(np.flatnonzero(~is_held_out))


def find_leaks(train: "Dataset", test: "Dataset") -> Array:
    """Finds training rows that have the text of a test row, or belong to its conversation.

    Args:
        train (`Dataset`), test (`Dataset`): Rows with `prompt`. A conversation is named by `source` and
            `conversation_id` together.

    Returns:
        `np.ndarray` of bool, `(N,)`: whether each row of `train` is such a row.
    """
    leaks = np.isin(hash_prompts(train["prompt"]), hash_prompts(test["prompt"]))
    names = ("source", "conversation_id")
    if all(name in dataset.column_names for dataset in (train, test) for name in names):
        known = {pair for pair in zip(*(test[name] for name in names), strict=True) if pair[1] is not None}
        leaks |= np.array([pair in known for pair in zip(*(train[name] for name in names), strict=True)], dtype=bool)
    return leaks


def warn_of_empty_side(is_test: Array, groups: Array, test_fraction: float) -> None:
    """Warns if one side of a split has no rows, and says why.

    Args:
        is_test (`np.ndarray`): bool, `(N,)`, whether each row is for testing.
        groups (`np.ndarray`): int64, `(N,)`; rows with the same number are on one side.
        test_fraction (`float`): Share of test rows that was asked for; with 0 there is no warning.
    """
    if not test_fraction or not len(is_test) or 0 < is_test.sum() < len(is_test):
        return
    num_groups = len(np.unique(groups))
    what = "one conversation" if num_groups == 1 else f"{num_groups} conversations"
    logger.warning(
        "The %s set is empty, although `test_fraction` is %g: the %d prompts belong to %s, which %s. %s",
        "training" if is_test.all() else "test",
        test_fraction,
        len(is_test),
        what,
        "cannot be split" if num_groups == 1 else "happen to be all on the other side",
        "Check the names of the conversations, or give more different texts."
        if num_groups == 1
        else "Give another `seed`, a larger or smaller `test_fraction`, or more prompts.",
    )


def _hash_keys(dataset: "Dataset") -> tuple[Array, Array]:
    """Hashes of the conversations and of the texts of the rows, `(N,)` each."""
    names = dataset["conversation_id"] if "conversation_id" in dataset.column_names else [None] * len(dataset)
    column = next((name for name in TEXT_COLUMNS if name in dataset.column_names), None)
    if column in ("prompt", "messages"):
        texts, openings = hash_prompts(dataset[column]), map(_find_opening, dataset[column])
    else:  # ids are compared as they are
        values = range(len(dataset)) if column is None else dataset[column]
        texts = np.array([hash_text(str(value)) for value in values], dtype=np.uint64)
        openings = map(str, texts)
    conversations = [
        hash_text(f"opening\0{opening}" if name is None else f"name\0{name}")
        for name, opening in zip(names, openings, strict=True)
    ]
    return np.array(conversations, dtype=np.uint64), texts


def _find_opening(prompt: JsonValue) -> str:
    """The first turn of the user, or the whole text."""
    if isinstance(prompt, str):
        return normalize_text(prompt)
    return next((text for message in prompt if (text := normalize_text([message]))), "")


def choose_test_rows(conversations: Array, timestamps: Array, test_fraction: float, split_by: str, seed: int) -> Array:
    """Chooses the rows for testing, with all rows of a conversation on one side.

    Args:
        conversations (`np.ndarray`): Numbers of the conversations, uint64, `(N,)`.
        timestamps (`np.ndarray`): Times of the rows, `(N,)`; only used with `"time"`.
        test_fraction (`float`): Share of test rows that is wanted.
        split_by (`str`):
            `"hash"` chooses each conversation by its number and `seed` and not by the others, so that a log that has
            grown keeps its split; the share is met on average. `"time"` chooses the conversations that began last,
            until the share is reached.
        seed (`int`): Seed of the hash.

    Returns:
        `np.ndarray` of bool, `(N,)`: whether each row is for testing.
    """
    if test_fraction == 0 or len(conversations) == 0:
        return np.zeros(len(conversations), dtype=bool)
    if split_by == "hash":
        return _mix(conversations ^ _mix(np.array([seed], dtype=np.uint64))) < np.uint64(test_fraction * 2**64)
    _, numbers, sizes = np.unique(conversations, return_inverse=True, return_counts=True)
    starts = np.full(len(sizes), np.inf)
    np.minimum.at(starts, numbers, timestamps)
    latest = np.argsort(-starts, kind="stable")
    rows = np.cumsum(sizes[latest])
    is_test = np.zeros(len(sizes), dtype=bool)
    is_test[latest[: np.searchsorted(rows, test_fraction * len(conversations)) + 1]] = True
    return is_test[numbers]


def _mix(values: Array) -> Array:
    """The finalizer of SplitMix64 (Steele et al., 2014): uniform bits from any numbers."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    # In place, because there are as many values as prompts of a log.
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values ^= values >> np.uint64(shift)
        values *= np.uint64(factor)
    values ^= values >> np.uint64(31)
    return values
