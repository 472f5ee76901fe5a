import numpy as np
import pytest
import torch

from spec_kd.evaluation.response_replay import ResponseScores
from spec_kd.evaluation.setting_report import (
    break_down_by_class,
    break_down_by_column,
    break_down_by_entropy,
    break_down_by_position,
)


@pytest.fixture
def scores():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([20, 3, 7, 70])
    is_text = torch.arange(70) < lengths[:, None]
    values = {
        "acceptance": torch.rand(4, 70, generator=generator, dtype=torch.float64) * is_text,
        "alpha": torch.rand(4, 70, generator=generator, dtype=torch.float64) * is_text,
        "target_entropy": 3 * torch.rand(4, 70, generator=generator, dtype=torch.float64) * is_text,
    }
    return ResponseScores(values, lengths, 1.0, "stochastic", has_exact_alpha=True)


def means(breakdown):
    return {row.label: (row.tokens, row.prompts, row.alpha.value) for row in breakdown.rows}


def select(scores, is_in):
    """An independent reference: loops over every token."""
    found = [
        (i, scores.values["alpha"][i, t].item()) for i in range(4) for t in range(scores.lengths[i]) if is_in(i, t)
    ]
    return len(found), len({i for i, _ in found}), pytest.approx(np.mean([a for _, a in found]))


def test_positions(scores):
    found = means(break_down_by_position(scores))
    assert found["first"] == select(scores, lambda i, t: t == 0)
    assert found["2 to 4"] == select(scores, lambda i, t: 1 <= t <= 3)
    assert found["17 to 64"] == select(scores, lambda i, t: 16 <= t <= 63)
    assert found["65 to 256"] == select(scores, lambda i, t: t >= 64)
    assert list(found) == ["first", "2 to 4", "5 to 16", "17 to 64", "65 to 256"]
    assert sum(tokens for tokens, _, _ in found.values()) == 100


def test_entropy(scores):
    entropy = scores.values["target_entropy"]
    found = means(break_down_by_entropy(scores))
    assert found["0.5 to 1 nats"] == select(scores, lambda i, t: 0.5 <= entropy[i, t] < 1.0)
    assert found["over 2 nats"] == select(scores, lambda i, t: entropy[i, t] >= 2.0)
    assert sum(tokens for tokens, _, _ in found.values()) == 100
    del scores.values["target_entropy"]
    assert break_down_by_entropy(scores) is None


def test_classes_and_columns(scores):
    classes = [["word" if t % 3 else "digits" for t in range(n)] for n in scores.lengths]
    found = means(break_down_by_class(scores, classes))
    assert list(found) == ["word", "digits"]  # most frequent first
    assert found["digits"] == select(scores, lambda i, t: t % 3 == 0)

    figures = scores.replay(3, max_new_tokens=70)
    rows = break_down_by_column(scores, figures, ["b", "a", "b", "a"], "domain").rows
    assert [row.label for row in rows] == ["a", "b"]
    assert (rows[0].tokens, rows[0].prompts, rows[0].alpha.value) == select(scores, lambda i, t: i in (1, 3))
    expected = figures.tokens[[1, 3]].sum() / figures.target_calls[[1, 3]].sum()
    assert rows[0].block_efficiency.value == pytest.approx(expected)
