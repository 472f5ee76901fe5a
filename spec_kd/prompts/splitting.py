"""Train and test, with each conversation on one side."""

import hashlib
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from spec_kd.checks import check_number
from spec_kd.open_types import Array, JsonValue
from spec_kd.prompts.deduplication import normalize_text

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("hash", "time")
TEXT_COLUMNS = ("prompt", "messages", "prompt_ids", "input_ids", "text")  # the first one there tells rows apart

logger = logging.getLogger(__name__)


def group_rows(*keys: Array, links: Array | None = None) -> Array:
    """The rows that belong on one side of a split because they share a key, directly or through other rows.

    Args:
        keys (`np.ndarray`): One array of integers, (N,), for each kind of key, such as the conversation and the text.
        links (`np.ndarray`, *optional*): Pairs of rows that belong together as well, (M, 2).

    Returns:
        `np.ndarray` of int64, (N,): For each row the first row of its group.
    """
    num_rows = len(keys[0])
    firsts = []
    for key in keys:
        _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
        firsts.append(first[inverse])
    parents = firsts[0].tolist()

    def find(row: int) -> int:
        while parents[row] != row:
            parents[row] = row = parents[parents[row]]
        return row

    def join(row: int, other: int) -> None:
        early, late = sorted((find(row), find(other)))
        parents[late] = early

    for first in firsts[1:]:
        for row in np.flatnonzero(first != np.arange(num_rows)).tolist():
            join(row, int(first[row]))
    if links is not None:
        for row, other in links[firsts[0][links[:, 0]] != firsts[0][links[:, 1]]].tolist():
            join(row, other)
    return np.fromiter(map(find, range(num_rows)), np.int64, num_rows)


def hash_text(text: str) -> int:
    """64 bits of BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def hash_prompts(prompts: Iterable[JsonValue]) -> Array:
    """Numbers, the same for prompts in which the user and the tools say the same, as of [`normalize_text`].

    Args:
        prompts (`Iterable` of `str` or `list` of messages): As in the column `prompt`.

    Returns:
        `np.ndarray` of uint64, (N,).
    """
    return np.array([hash_text(normalize_text(prompt)) for prompt in prompts], dtype=np.uint64)


def split_prompts(dataset: "Dataset", test_fraction: float, seed: int = 0) -> "tuple[Dataset, Dataset]":
    """Training and test rows of a prompt set that has no split of its own.

    Rows of one `conversation_id`, rows that begin with the same turn of the user where a row has no such id, and rows
    with the same text are on one side. That side depends on the text and `seed` alone, whatever else is in the set.

    Args:
        dataset (`Dataset`): With `prompt`.
        test_fraction (`float`): Share of test rows, met on average; from 0 to below 1.
        seed (`int`, *optional*, defaults to `0`): Seed of the choice.

    Returns:
        `tuple[Dataset, Dataset]`: Training rows and test rows. A warning says where one of them is empty.

    Raises:
        `ValueError`: A fraction outside [0, 1).
    """
    check_test_fraction(test_fraction)
    conversations, texts = _hash_keys(dataset)
    groups = group_rows(conversations, texts)
    is_test = choose_test_rows(texts[groups], np.zeros(len(dataset)), test_fraction, "hash", seed)
    warn_of_empty_side(is_test, groups, test_fraction)
    return dataset.select(np.flatnonzero(~is_test)), dataset.select(np.flatnonzero(is_test))


def hold_out_rows(dataset: "Dataset", num_rows: int) -> "tuple[Dataset, Dataset]":
    """Rows to evaluate on while training, from the start of a set, and the rest, with each conversation on one side.

    Args:
        dataset (`Dataset`): With `prompt`, `messages`, `prompt_ids` or other columns; grouped as by [`split_prompts`].
        num_rows (`int`): How many to hold out; more by what a conversation has besides.

    Returns:
        `tuple[Dataset, Dataset]`: Rows held out, and rows to train on.

    Raises:
        `ValueError`: All rows belong to one conversation.
    """
    groups = group_rows(*_hash_keys(dataset))
    firsts, sizes = np.unique(groups, return_counts=True)
    if len(firsts) < 2:
        raise ValueError(
            f"The {len(dataset)} rows belong to one conversation, so none can be held out for evaluation. Give more "
            "rows, an evaluation set, or none."
        )
    num_groups = min(int(np.searchsorted(np.cumsum(sizes), num_rows)) + 1, len(firsts) - 1)
    is_held_out = groups <= firsts[num_groups - 1]
    return dataset.select(np.flatnonzero(is_held_out)), dataset.select(np.flatnonzero(~is_held_out))


def find_leaks(train: "Dataset", test: "Dataset") -> Array:
    """Which training rows have the text, or are of the conversation, of a test row.

    Args:
        train (`Dataset`), test (`Dataset`): With `prompt`; `conversation_id` counts together with `source`.

    Returns:
        `np.ndarray` of bool, one for each row of `train`.
    """
    leaks = np.isin(hash_prompts(train["prompt"]), hash_prompts(test["prompt"]))
    names = ("source", "conversation_id")
    if all(name in dataset.column_names for dataset in (train, test) for name in names):
        known = {pair for pair in zip(*(test[name] for name in names), strict=True) if pair[1] is not None}
        leaks |= np.array([pair in known for pair in zip(*(train[name] for name in names), strict=True)], dtype=bool)
    return leaks


def check_test_fraction(test_fraction: float) -> None:
    """Raises `ValueError` for a share that is none, or leaves nothing to train on."""
    check_number("test_fraction", test_fraction, 0, below=1)


def warn_of_empty_side(is_test: Array, groups: Array, test_fraction: float) -> None:
    """Warns where a side that was asked for has no rows, and says why.

    Args:
        is_test (`np.ndarray`): Of bool, (N,).
        groups (`np.ndarray`): (N,); rows with the same number are on one side.
        test_fraction (`float`): Share that was asked for.
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
        "cannot be parted" if num_groups == 1 else "happen to be all on the other side",
        "Check what names the conversations, or that there are enough different texts."
        if num_groups == 1
        else "Take another `seed`, a larger or smaller `test_fraction`, or more prompts.",
    )


def _hash_keys(dataset: "Dataset") -> tuple[Array, Array]:
    """Hashes of the conversations and of the texts of the rows, (N,) each."""
    names = dataset["conversation_id"] if "conversation_id" in dataset.column_names else [None] * len(dataset)
    column = next((name for name in TEXT_COLUMNS if name in dataset.column_names), None)
    if column in ("prompt", "messages"):
        texts, openings = hash_prompts(dataset[column]), map(_find_opening, dataset[column])
    else:  # ids, which are compared as they are
        values = map(str, dataset[column]) if column is not None else map(str, range(len(dataset)))
        texts = np.array([hash_text(value) for value in values], dtype=np.uint64)
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
    """Which rows are for testing. All rows of a conversation are on one side.

    Args:
        conversations (`np.ndarray`): 64-bit numbers of the conversations, (N,).
        timestamps (`np.ndarray`): Of the rows, (N,); read with `"time"` only.
        test_fraction (`float`): Share of the rows that is wanted.
        split_by (`str`):
            `"hash"`: each conversation by its number and `seed`, whatever else there is in the log, so that a log that
            has grown keeps its split; the share is met on average. `"time"`: the conversations that began last, as many
            as it takes to reach the share.
        seed (`int`): Of the hash.

    Returns:
        `np.ndarray` of bool, (N,).
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
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
