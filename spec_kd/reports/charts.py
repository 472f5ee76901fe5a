"""Line charts: coordinates that `parts.html` draws as SVG."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from spec_kd.reports.numbers import Interval, format_interval, format_number

WIDTH, HEIGHT = 400, 240
LEFT, RIGHT, TOP, BOTTOM = 40, 390, 26, 200  # of the plotted area
MOST_X_TICKS = 16


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line.

    Args:
        index (`int`): Number of the line, which decides its color.
        label (`str`): What the legend says.
        points (`list[tuple[int, Interval]]`): x and y.
        marked_x (`int`, *optional*): x of the point to ring.
    """

    index: int
    label: str
    points: list[tuple[int, Interval]]
    marked_x: int | None = None


@dataclass(frozen=True, kw_only=True)
class DrawnSeries:
    """A [`Series`] in the units of the drawing: SVG paths, dots with what they say, and the ringed point."""

    index: int
    label: str
    bands: list[str]
    lines: list[str]
    dots: list[tuple[float, float, str]]
    ring: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class LineChart:
    """Everything that is drawn: ticks as place and text, the reference line as its height and what it means."""

    title: str
    x_label: str
    y_label: str
    summary: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    series: list[DrawnSeries]
    reference: float | None
    reference_label: str


def draw_lines(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    *,
    floor: float,
    ceiling: float | None = None,
    reference: float | None = None,
    reference_label: str = "",
) -> LineChart | None:
    """Lines with interval bands over whole numbers; a value that is not finite leaves a gap.

    Args:
        title (`str`), x_label (`str`), y_label (`str`): What is shown.
        series (`Sequence[Series]`): The lines.
        floor (`float`): Lowest y.
        ceiling (`float`, *optional*): Highest y; the highest value or bound by default, and no less than floor + 1.
        reference (`float`, *optional*): y of a horizontal line to compare with.
        reference_label (`str`, *optional*, defaults to `""`): What that line means, for the legend.

    Returns:
        `LineChart`, or `None` where no point is finite.
    """
    series = [one for one in series if one.points]
    numbers = [n for s in series for _, interval in s.points for n in interval if math.isfinite(n)]
    if not any(math.isfinite(interval.value) for s in series for _, interval in s.points):
        return None
    highest = max(*numbers, floor + 1, reference or floor) if ceiling is None else ceiling
    y_values = choose_ticks(floor, highest)
    x_values = sorted({x for s in series for x, _ in s.points})
    left, right, top = x_values[0] - 0.5, x_values[-1] + 0.5, max(y_values[-1], floor)

    def place_x(x: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * (x - left) / (right - left), 1)

    def place_y(y: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (min(max(y, floor), top) - floor) / (top - floor), 1)

    def join(points: Iterable[tuple[float, float]]) -> str:
        return "M" + " L".join(f"{place_x(x)},{place_y(y)}" for x, y in points)

    def draw(one: Series) -> DrawnSeries:
        lines = [
            join([(x, i.value) for x, i in run]) for run in _find_runs(one.points, lambda i: math.isfinite(i.value))
        ]
        bands = [
            join([(x, i.high) for x, i in run] + [(x, i.low) for x, i in reversed(run)]) + " Z"
            for run in _find_runs(one.points, lambda i: all(map(math.isfinite, i)))
        ]
        drawn = [(x, i) for x, i in one.points if math.isfinite(i.value)]
        dots = [(place_x(x), place_y(i.value), f"{one.label}, {x}: {format_interval(i)}") for x, i in drawn]
        ring = next(
            ((x, y) for (x, y, _), (number, _) in zip(dots, drawn, strict=True) if number == one.marked_x), None
        )
        return DrawnSeries(index=one.index, label=one.label, bands=bands, lines=lines, dots=dots, ring=ring)

    return LineChart(
        title=title,
        x_label=x_label,
        y_label=y_label,
        summary=f"{title}. " + " ".join(_summarize(one) for one in series),
        x_ticks=[(place_x(x), str(x)) for x in x_values[:: math.ceil(len(x_values) / MOST_X_TICKS)]],
        y_ticks=[(place_y(y), f"{y:g}") for y in y_values],
        series=[draw(one) for one in series],
        reference=None if reference is None else place_y(reference),
        reference_label=reference_label,
    )


def choose_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers (steps of 1, 2 or 5 times a power of ten) from `low` up to the first one not below `high`."""
    raw = max(high - low, 1e-6) / (most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


def _find_runs(
    points: list[tuple[int, Interval]], is_there: Callable[[Interval], bool]
) -> list[list[tuple[int, Interval]]]:
    """Stretches of neighboring points that can be drawn."""
    return [list(run) for is_drawn, run in groupby(points, key=lambda point: is_there(point[1])) if is_drawn]


def _summarize(one: Series) -> str:
    (first_x, first), (last_x, last) = one.points[0], one.points[-1]
    return f"{one.label}: {format_number(first.value)} at {first_x}, {format_number(last.value)} at {last_x}."
