"""The difference between two drafts on the same prompts, with its paired interval."""

from collections.abc import Mapping
from itertools import combinations
from typing import cast

from spec_kd.evaluation.metrics import AcceptanceMetrics
from spec_kd.evaluation.report.content import Comparison
from spec_kd.evaluation.statistics import Interval, bootstrap
from spec_kd.open_types import Array


def compare_alpha(metrics: AcceptanceMetrics, baseline: AcceptanceMetrics) -> Interval:
    """Alpha minus the baseline's, by drawing the prompts of both together."""
    return _compare((metrics.alpha_sum, metrics.alpha_tokens), (baseline.alpha_sum, baseline.alpha_tokens))


def compare_block_efficiency(metrics: AcceptanceMetrics, baseline: AcceptanceMetrics) -> Interval:
    """Tokens per target pass minus the baseline's, by drawing the prompts of both together."""
    return _compare((metrics.tokens, metrics.target_calls), (baseline.tokens, baseline.target_calls))


def _compare(ratio: tuple[Array | None, Array | None], baseline: tuple[Array | None, Array | None]) -> Interval:
    """The difference of two ratios of sums over the same prompts."""
    columns = [cast(Array, column) for column in (*ratio, *baseline)]
    return bootstrap(lambda a, n, b, m: a / n - b / m, *columns)


def compare_drafts(metrics_by_draft: Mapping[str, AcceptanceMetrics], setting: str) -> list[Comparison]:
    """Every pair of drafts, the later one minus the earlier one.

    Args:
        metrics_by_draft (`Mapping[str, AcceptanceMetrics]`): Metrics on the same prompts at the same gamma.
        setting (`str`): Name of the setting.
    """
    comparisons = []
    for baseline, draft in combinations(metrics_by_draft, 2):
        for metric, compare in (("alpha", compare_alpha), ("block_efficiency", compare_block_efficiency)):
            difference = compare(metrics_by_draft[draft], metrics_by_draft[baseline])
            comparisons.append(
                Comparison(setting=setting, metric=metric, draft=draft, baseline=baseline, difference=difference)
            )
    return comparisons
