"""Metrics without responses of one kind, beside those of all: the data and the cells of a table."""

from dataclasses import dataclass

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
