import re

import pytest
from example_report import NAN

from spec_kd.evaluation.report.sections import draw_block_efficiency, draw_positions, draw_speedup
from spec_kd.reports import charts
from spec_kd.reports.numbers import Interval


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (1, 2.6, [1, 1.5, 2, 2.5, 3]),
        (1, 9.3, [2, 4, 6, 8, 10]),
        (0, 1.43, [0, 0.5, 1, 1.5]),
        (0, 0, [0, 2e-7]),
    ],
)
def test_ticks_are_round_and_cover_the_figures(low, high, expected):
    assert charts.choose_ticks(low, high) == pytest.approx(expected)


def draw(points, **options):
    one = charts.Series(index=0, label="draft", points=points, marked_x=options.pop("marked_x", None))
    return charts.draw_lines("title", "x", "y", [one], **{"floor": 0, "ceiling": 1, **options})


def read(path):
    return [tuple(map(float, pair)) for pair in re.findall(r"([\d.]+),([\d.]+)", path)]


def test_points_are_where_they_should_be():
    chart = draw([(1, Interval(0.0, 0.0, 0.5)), (2, Interval(1.0, 0.5, 1.0))], marked_x=2, reference=0.5)
    (one,) = chart.series
    middle = (charts.TOP + charts.BOTTOM) / 2
    quarter = (charts.RIGHT - charts.LEFT) / 4
    left, right = charts.LEFT + quarter, charts.RIGHT - quarter
    assert read(one.lines[0]) == [(left, charts.BOTTOM), (right, charts.TOP)]
    assert read(one.bands[0]) == [(left, middle), (right, charts.TOP), (right, middle), (left, charts.BOTTOM)]
    assert one.ring == (right, charts.TOP) and chart.reference == middle
    assert chart.x_ticks == [(left, "1"), (right, "2")]
    assert one.dots[1][2] == "draft, 2: 1.00 [0.50, 1.00]"
    assert chart.summary == "title. draft: 0.00 at 1, 1.00 at 2."


def test_figures_that_are_not_there_leave_gaps():
    points = [(1, Interval(0.4, NAN, NAN)), (2, Interval(NAN, NAN, NAN)), (3, Interval(0.2, 0.1, 0.3))]
    (one,) = draw(points).series
    assert len(one.lines) == 2 and len(one.bands) == 1 and len(one.dots) == 2
    assert "nan" not in repr(one)


def test_no_figures_no_chart():
    assert draw([(1, Interval(NAN, NAN, NAN))]) is None and draw([]) is None


def test_bounds_beyond_the_axis_are_cut():
    (one,) = draw([(1, Interval(0.5, -3.0, 7.0))]).series
    assert [y for _, y in read(one.bands[0])] == [charts.TOP, charts.BOTTOM]


def test_at_most_sixteen_ticks():
    chart = draw([(x, Interval(0.5, 0.4, 0.6)) for x in range(1, 41)])
    assert [text for _, text in chart.x_ticks] == [str(x) for x in range(1, 41, 3)]


def test_block_efficiency_of_a_useless_draft_fills_no_chart():
    chart = draw([(1, Interval(1.001, 1.0, 1.002))], floor=1, ceiling=None)
    assert chart.y_ticks[-1][1] == "2"


def test_charts_of_a_report(report, small_report):
    chart = draw_speedup(report, "t1", "8")
    assert [one.index for one in chart.series] == [0, 1] and chart.reference is not None
    setting = report.draft.setting("t1")
    best = setting.best_gamma["8"]
    speedup = setting.at_gamma(best).predicted_speedup["8"].value
    assert chart.series[1].label.endswith(f"{speedup:.2f}x at its best gamma, {best}")
    assert len(draw_block_efficiency(report, "greedy").series[0].dots) == 16
    assert len(draw_positions(report, "greedy").series[0].dots) == 5
    assert draw_speedup(small_report, "t0.7_greedy_draft", "1") is None
