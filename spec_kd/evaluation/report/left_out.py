"""Metrics without responses of one kind, beside those of all: the data and the cells of a table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from spec_kd.open_types import Array
from spec_kd.reports.numbers import RATE_DIGITS, TIMES_DIGITS, Interval, format_interval

TITLE = "Without loops, and without prompts that lack the chat template"
RATES = ("alpha", "acceptance_rate")  # the other metrics are multiples of one
WORDS = {
    "looping": "looping completions",
    "untemplated": "prompts without the chat template",
    "looping_or_untemplated": "one or the other",
}


@dataclass(frozen=True, kw_only=True)
class LeftOutMetric:
    """One metric of all responses, and of those that are left.

    Args:
        name (`str`): Name of the metric.
        of_all (`Interval`): Its value for all responses.
        without (`Interval`, *optional*): Its value for the others; `None` if none are left.
    """

    name: str
    of_all: Interval
    without: Interval | None = None


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Responses of one kind, and the metrics without them.

    Args:
        kind (`str`): `"looping"`, `"untemplated"` or `"looping_or_untemplated"`.
        responses (`int`): Number of responses of the kind.
        share (`float`): Their share of all responses.
        metrics (`list[LeftOutMetric]`): Metrics with them and without them.
    """

    kind: str
    responses: int
    share: float
    metrics: list[LeftOutMetric]


def describe_kinds(
    kinds: Mapping[str, Array], measure: Callable[[Array], Mapping[str, Interval | None]]
) -> list[LeftOut]:
    """The metrics of all responses and those without each kind.

    Args:
        kinds (`Mapping[str, np.ndarray]`): Which responses are of a kind, see `find_kinds`.
        measure (`Callable`): Gives the metrics by name of the responses that a mask `(P,)` chooses, at least one.
    """
    described = []
    for kind, mask in kinds.items():
        of_all = measure(np.ones_like(mask))
        without: Mapping[str, Interval | None] = {} if mask.all() else measure(~mask)
        metrics = [
            LeftOutMetric(name=name, of_all=value, without=without.get(name))
            for name, value in of_all.items()
            if value is not None
        ]
        described.append(LeftOut(kind=kind, responses=int(mask.sum()), share=float(mask.mean()), metrics=metrics))
    return described


def list_header(left_out: list[LeftOut]) -> list[str]:
    """Columns of [`list_cells`]."""
    names = [metric.name for metric in left_out[0].metrics] if left_out else []
    shown = [name.replace("_", " ") for name in names]
    return ["left out", "responses", "share", *(part for name in shown for part in (name, f"{name} without them"))]


def list_cells(left_out: LeftOut) -> list[str]:
    """One row of a table."""
    return [
        WORDS.get(left_out.kind, left_out.kind),
        f"{left_out.responses:,}",
        f"{left_out.share:.1%}",
        *(
            format_interval(value, RATE_DIGITS if metric.name in RATES else TIMES_DIGITS)
            for metric in left_out.metrics
            for value in (metric.of_all, metric.without)
        ),
    ]
