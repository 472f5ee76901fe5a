"""Numbers and intervals as text."""

import math
from typing import NamedTuple

DASH = "–"
RATE_DIGITS = 3
TIMES_DIGITS = 2


class Interval(NamedTuple):
    """A value with its confidence interval. `low` and `high` are NaN for a single prompt, which has no interval."""

    value: float
    low: float
    high: float


def format_number(value: float | None, digits: int = TIMES_DIGITS, sign: str = "") -> str:
    """The number, or a dash where it is `None`, NaN or infinite; `sign="+"` as in a format specification."""
    return DASH if value is None or not math.isfinite(value) else f"{value:{sign}.{digits}f}"


def format_bounds(interval: Interval, digits: int = TIMES_DIGITS, sign: str = "") -> str:
    """`"[2.31, 2.47]"`, with dashes for NaN."""
    return f"[{format_number(interval.low, digits, sign)}, {format_number(interval.high, digits, sign)}]"


def format_interval(interval: Interval | None, digits: int = TIMES_DIGITS, sign: str = "") -> str:
    """`"2.39 [2.31, 2.47]"`, or a dash where there is no value."""
    if interval is None or not math.isfinite(interval.value):
        return DASH
    return f"{format_number(interval.value, digits, sign)} {format_bounds(interval, digits, sign)}"


def is_apart_from_zero(interval: Interval) -> bool | None:
    """Whether the interval excludes 0; `None` where it has no bounds."""
    has_bounds = not math.isnan(interval.low) and not math.isnan(interval.high)
    return interval.low > 0 or interval.high < 0 if has_bounds else None
