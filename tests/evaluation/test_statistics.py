import math

import numpy as np
import pytest

from spec_kd.evaluation.metrics import bootstrap, bootstrap_ratio


def test_value_is_the_ratio_of_sums_and_the_interval_is_seeded():
    numerator, denominator = np.random.default_rng(0).random((2, 40))
    interval = bootstrap_ratio(numerator, denominator)
    assert interval.value == pytest.approx(numerator.sum() / denominator.sum())
    assert interval.low < interval.value < interval.high
    assert interval == bootstrap_ratio(numerator, denominator)
    assert interval != bootstrap_ratio(numerator, denominator, seed=1)
    wider = bootstrap_ratio(numerator, denominator, confidence=0.99)
    assert wider.low <= interval.low and wider.high >= interval.high


def test_prompts_are_drawn_whole():
    # equal ratios in every prompt leave nothing to vary, whatever the lengths
    interval = bootstrap_ratio(np.array([1.0, 10.0, 100.0]), np.array([2.0, 20.0, 200.0]))
    assert interval == pytest.approx((0.5, 0.5, 0.5))


def test_coverage_is_near_95_percent():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        lengths = rng.integers(5, 40, size=60)
        hits = rng.binomial(lengths, rng.beta(6, 4, size=60))  # prompts differ: E = 0.6
        interval = bootstrap_ratio(hits, lengths, num_resamples=400, seed=trial)
        covered += interval.low <= 0.6 <= interval.high
    assert 0.91 < covered / 300 < 0.98


def test_chunked_draws_equal_draws_at_once(monkeypatch):
    numerator, denominator = np.random.default_rng(0).random((2, 50))
    at_once = bootstrap_ratio(numerator, denominator)
    monkeypatch.setattr("spec_kd.evaluation.metrics.MAX_DRAWS_AT_ONCE", 130)
    assert bootstrap_ratio(numerator, denominator) == pytest.approx(at_once)


def test_bootstrap_of_several_sums_matches_the_ratio():
    n, d = np.array([1.0, 5.0, 4.0]), np.array([2.0, 6.0, 8.0])
    assert bootstrap(lambda a, b, c: a / b + 0 * c, n, d, d) == pytest.approx(bootstrap_ratio(n, d))


def test_one_prompt_has_no_interval_and_nothing_drafted_no_value():
    interval = bootstrap_ratio(np.array([1.0]), np.array([2.0]))
    assert interval.value == 0.5 and math.isnan(interval.low) and math.isnan(interval.high)
    assert math.isnan(bootstrap_ratio(np.zeros(3), np.zeros(3)).value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"numerator": [], "denominator": []}, "no prompts"),
        ({"numerator": [1, 2], "denominator": [1, 2], "confidence": 95}, "`confidence` is 95"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_ratio(**arguments)
