import math

import numpy as np
import pytest

from spec_kd.evaluation.metrics import (
    AcceptanceMetrics,
    bootstrap,
    bootstrap_ratio,
    compare_drafts,
    compare_metric,
)


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


def make_figures(alpha_per_prompt, seed=0):
    tokens = np.random.default_rng(seed).integers(10, 50, len(alpha_per_prompt))
    return AcceptanceMetrics(
        tokens=tokens, target_calls=tokens / (1 + alpha_per_prompt), accepted=tokens, drafted=2 * tokens,
        drafting_rounds=tokens, accepted_by_position=tokens[:, None], temperature=1.0, num_assistant_tokens=1,
        draft_sampling="stochastic", method="replay", alpha_sum=alpha_per_prompt * tokens, alpha_tokens=tokens,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["alpha", "block_efficiency"])
def test_pairing_sees_a_difference_that_single_intervals_hide(name):
    alpha = np.random.default_rng(1).uniform(0.2, 0.8, 60)
    before, after = make_figures(alpha), make_figures(alpha + 0.02)
    difference = compare_metric(name, after, before)
    assert difference.low > 0
    assert getattr(before, name).high > getattr(after, name).low  # the single intervals overlap
    assert difference.value == pytest.approx(getattr(after, name).value - getattr(before, name).value)


def test_interval_covers_what_it_says():
    """Differences of two noisy drafts with equal truth: 95 % intervals hold 0 about 95 times in 100."""
    covered = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        alpha = rng.uniform(0.2, 0.8, 40)
        noisy = [make_figures(alpha + 0.05 * rng.standard_normal(40), seed=3) for _ in range(2)]
        low, high = compare_metric("alpha", *noisy)[1:]
        covered += low <= 0 <= high
    assert 178 <= covered <= 199  # 190 expected; 4 standard deviations, and percentile intervals are a little narrow


def test_every_pair_is_compared_later_minus_earlier():
    alpha = np.linspace(0.2, 0.6, 10)
    drafts = {"a": make_figures(alpha), "b": make_figures(alpha + 0.1), "c": make_figures(alpha + 0.2)}
    comparisons = compare_drafts(drafts, "t1")
    assert [(c.draft, c.baseline) for c in comparisons if c.metric == "alpha"] == [("b", "a"), ("c", "a"), ("c", "b")]
    assert all(c.difference.value > 0 and c.setting == "t1" for c in comparisons)
