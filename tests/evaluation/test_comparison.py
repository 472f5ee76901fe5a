import numpy as np
import pytest

from spec_kd.evaluation.metrics import AcceptanceMetrics, compare_drafts, compare_metric


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
