"""Where does the draft fail? alpha by position in the completion, by the target's entropy, by class, by column."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from spec_kd.evaluation.metrics import AcceptanceMetrics, bootstrap_ratio
from spec_kd.evaluation.report.content import Breakdown, BreakdownRow
from spec_kd.evaluation.response_replay import ResponseScores
from spec_kd.open_types import Array

POSITION_EDGES = (0, 1, 4, 16, 64, 256, 1024)
ENTROPY_EDGES = (0.0, 0.01, 0.1, 0.5, 1.0, 2.0)


def break_down_by_position(scores: ResponseScores) -> Breakdown:
    """Alpha by how far into the completion a token stands."""
    positions = np.broadcast_to(np.arange(scores.acceptance.shape[1]), scores.acceptance.shape)
    groups = np.digitize(positions, POSITION_EDGES) - 1
    ends = [*POSITION_EDGES[1:], None]
    labels = [_name_range(start, end) for start, end in zip(POSITION_EDGES, ends, strict=True)]
    return Breakdown(title="token of the completion", rows=_make_rows(scores, groups, labels))


def _name_range(start: int, end: int | None) -> str:
    """Of positions from 0 in words that count from 1."""
    if end is None:
        return f"{start + 1} and later"
    return "first" if end == 1 else f"{start + 1} to {end}"


def break_down_by_entropy(scores: ResponseScores) -> Breakdown | None:
    """Alpha by the entropy of the target's distribution, in nats; `None` where it was not measured."""
    if "target_entropy" not in scores.values:
        return None
    groups = np.digitize(scores.values["target_entropy"].numpy(), ENTROPY_EDGES[1:])
    labels = [f"{low:g} to {high:g} nats" for low, high in pairwise(ENTROPY_EDGES)]
    rows = _make_rows(scores, groups, [*labels, f"over {ENTROPY_EDGES[-1]:g} nats"])
    return Breakdown(title="entropy of the target", rows=rows)


def break_down_by_class(scores: ResponseScores, classes: Sequence[Sequence[str]]) -> Breakdown:
    """Alpha by the class of the token (`token_classes.classify_tokens`), most frequent first."""
    counts: dict[str, int] = {}
    for row in classes:
        for name in row:
            counts[name] = counts.get(name, 0) + 1
    labels = sorted(counts, key=lambda name: (-counts[name], name))
    groups = np.full(scores.acceptance.shape, -1)
    for target, row in zip(groups, classes, strict=True):
        target[: len(row)] = [labels.index(name) for name in row]
    return Breakdown(title="class of the token", rows=_make_rows(scores, groups, labels))


def break_down_by_column(
    scores: ResponseScores, metrics: AcceptanceMetrics, values: Sequence[object], name: str
) -> Breakdown:
    """Alpha and block efficiency by a value of the prompts, such as their domain."""
    labels = sorted({str(value) for value in values})
    of_prompt = np.array([labels.index(str(value)) for value in values])
    groups = np.broadcast_to(of_prompt[:, None], scores.acceptance.shape)
    rows = _make_rows(scores, groups, labels, metrics, of_prompt)
    return Breakdown(title=name, rows=rows)


def _make_rows(
    scores: ResponseScores,
    groups: Array,
    labels: Sequence[str],
    metrics: AcceptanceMetrics | None = None,
    of_prompt: Array | None = None,
) -> list[BreakdownRow]:
    """A row for each group that has tokens; `groups` is `(P, N)` and counts where a text has a token."""
    is_text = np.arange(groups.shape[1]) < scores.lengths.numpy()[:, None]  # (P, N)
    alpha = scores.values["alpha"].numpy()
    rows = []
    for index, label in enumerate(labels):
        is_in = is_text & (groups == index)
        tokens = is_in.sum(-1)  # (P,)
        has_any = tokens > 0
        if not has_any.any():
            continue
        efficiency = None
        if metrics is not None:
            chosen = of_prompt == index
            efficiency = bootstrap_ratio(metrics.tokens[chosen], metrics.target_calls[chosen])
        rows.append(
            BreakdownRow(
                label=label,
                prompts=int(has_any.sum()),
                tokens=int(tokens.sum()),
                alpha=bootstrap_ratio((alpha * is_in).sum(-1)[has_any], tokens[has_any]),
                block_efficiency=efficiency,
            )
        )
    return rows
