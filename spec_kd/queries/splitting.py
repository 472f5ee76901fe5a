"""Train and test, with each conversation on one side."""

import numpy as np

SPLITS = ("hash", "time")


def choose_test_rows(
    conversations: np.ndarray, timestamps: np.ndarray, test_fraction: float, split_by: str, seed: int
) -> np.ndarray:
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


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al., 2014): uniform bits from any numbers."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
