import dataclasses

import pytest
from example_report import AFTER, BEFORE, NAN

from spec_kd.evaluation.report.rendering import build_headline
from spec_kd.reports import numbers
from spec_kd.reports.numbers import Interval


def test_numbers_and_intervals():
    assert numbers.format_interval(Interval(2.391, 2.31, 2.468)) == "2.39 [2.31, 2.47]"
    assert numbers.format_interval(Interval(0.5, -0.1, 1.0), 3, "+") == "+0.500 [-0.100, +1.000]"
    assert numbers.format_interval(Interval(0.5, NAN, NAN)) == "0.50 [–, –]"
    assert numbers.format_interval(Interval(NAN, NAN, NAN)) == numbers.format_interval(None) == "–"
    assert numbers.format_number(float("inf")) == "–"


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0.1, 0.2, True), (-0.2, -0.1, True), (-0.1, 0.1, False), (0, 1, False)]
)
def test_whether_an_interval_excludes_zero(low, high, expected):
    assert numbers.is_apart_from_zero(Interval(0.1, low, high)) is expected


def test_no_bounds_exclude_nothing():
    assert numbers.is_apart_from_zero(Interval(0.1, NAN, NAN)) is None


def test_headline(report):
    headline = build_headline(report)
    # alpha 0.62: (1 - 0.62^6) / 0.38 tokens a round
    assert headline.startswith(f"With “{AFTER}” a server drafting 5 tokens a round emits 2.48 tokens per target pass ")
    setting = report.draft.settings[0]
    best = max(setting.by_gamma, key=lambda g: g.predicted_speedup["1"].value)
    assert "at temperature 1 [2.36, 2.61]; best gamma" in headline
    assert f"best gamma {best.num_assistant_tokens}, predicted speed-up" in headline
    assert f"{best.predicted_speedup['1'].value:.2f}x (batch 1); measured in assisted generation: 1.37x." in headline
    assert f"against “{BEFORE}”: +1.18 [+1.08, +1.28], an interval that excludes 0." in headline


def test_headline_says_when_plain_decoding_is_faster(report):
    setting = report.draft.settings[0]
    slow = [dataclasses.replace(g, predicted_speedup={"8": Interval(0.9, 0.8, 1.0)}) for g in setting.by_gamma]
    setting = dataclasses.replace(setting, by_gamma=slow, best_gamma={"8": 1}, assisted=None)
    draft = dataclasses.replace(report.draft, settings=[setting])
    headline = build_headline(dataclasses.replace(report, drafts=[draft], comparisons=[]))
    assert headline.endswith("best gamma 1, predicted speed-up 0.90x (batch 8), slower than plain decoding.")


def test_headline_of_one_prompt(small_report):
    assert build_headline(small_report) == (
        "With “draft” a server drafting 1 token a round emits 1.50 tokens per target pass "
        "at temperature 0.7 with a greedy draft [–, –]."
    )
