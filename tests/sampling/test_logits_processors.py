import pytest
import torch

from spec_kd.sampling.generation import build_warpers


def truncate(logits, temperature, top_k, top_p):
    """An independent reference: the allowed ids by sorting, row by row."""
    probabilities = (logits.double() / temperature).softmax(-1)
    for row in probabilities:
        order = row.argsort(descending=True)
        kept = order[: top_k or len(order)]
        mass = (row[kept] / row[kept].sum()).cumsum(0)
        kept = kept[: int((mass < top_p).sum()) + 1]  # the id that reaches the mass belongs to it
        row[[i for i in range(len(row)) if i not in kept.tolist()]] = 0
    return probabilities / probabilities.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.8), (0.5, 6, 0.9)]
)
def test_what_is_sampled_from(temperature, top_k, top_p):
    logits = 2 * torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    warped = build_warpers(temperature, top_k, top_p)(None, logits.clone()).softmax(-1)
    torch.testing.assert_close(warped.double(), truncate(logits, temperature, top_k, top_p), atol=1e-5, rtol=0)


def test_greedy_text_is_not_warped():
    assert len(build_warpers(0.0, top_k=3, top_p=0.5)) == 0 == len(build_warpers(1.0))
