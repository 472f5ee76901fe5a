"""Confidence intervals by bootstrap over prompts (Efron and Tibshirani 1993, percentile interval)."""

import numpy as np

from spec_kd.open_types import Array, Call
from spec_kd.reports.numbers import Interval

MAX_DRAWS_AT_ONCE = 2**22


def bootstrap(
    statistic: Call[Array],
    *columns: Array,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of a function of sums over prompts, by drawing the prompts again with replacement.

    Args:
        statistic (`Callable`): Takes one sum for each column (scalars, or arrays over resamples) and returns the value.
        columns (`np.ndarray`): Per-prompt values `(P,)`.
        num_resamples (`int`, *optional*, defaults to `2000`): Number of resampled sets of prompts.
        confidence (`float`, *optional*, defaults to `0.95`): Mass of the interval.
        seed (`int`, *optional*, defaults to `0`): Seed of the resampling.

    Raises:
        `ValueError`: No prompts, columns of different length, or `confidence` outside (0, 1).
    """
    values = np.stack([np.asarray(column, dtype=np.float64) for column in columns])  # (C, P)
    num_prompts = values.shape[-1]
    if num_prompts == 0:
        raise ValueError("There are no prompts to compute a value from. Pass at least one.")
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` is {confidence}, but must lie between 0 and 1, e.g. 0.95.")
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(*values.sum(axis=-1)))
        if num_prompts == 1:
            return Interval(value, float("nan"), float("nan"))
        rng = np.random.default_rng(seed)
        rows = max(1, MAX_DRAWS_AT_ONCE // num_prompts)
        resampled = []
        for start in range(0, num_resamples, rows):
            draws = rng.integers(0, num_prompts, size=(min(rows, num_resamples - start), num_prompts))
            resampled.append(statistic(*(column[draws].sum(axis=-1) for column in values)))
    tail = 50 * (1 - confidence)
    low, high = np.percentile(np.concatenate(resampled), [tail, 100 - tail])
    return Interval(value, float(low), float(high))


def bootstrap_ratio(
    numerator: Array,
    denominator: Array,
    *,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """sum(numerator) / sum(denominator) over prompts with its bootstrap interval; see [`bootstrap`].

    Long prompts weigh more than short ones, as they do in a server: this is a ratio of sums, not a mean of ratios.
    """
    return bootstrap(
        lambda n, d: n / d, numerator, denominator, num_resamples=num_resamples, confidence=confidence, seed=seed
    )
