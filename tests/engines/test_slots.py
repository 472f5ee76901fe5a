import torch

from spec_kd.engines.slots import _Distribution


def draw(p, count, seed=0):
    return _Distribution(p.log()).draw(count, torch.Generator().manual_seed(seed))


def test_draws_have_the_probabilities_of_the_distribution():
    p = torch.tensor([[0.5, 0.0, 0.3, 0.2], [0.0, 0.1, 0.0, 0.9]])
    drawn = draw(p, 40_000)
    shares = torch.stack([row.bincount(minlength=4) / 40_000 for row in drawn])
    assert (shares - p).abs().max() < 4 * 0.5 / 40_000**0.5
    assert (shares[p == 0] == 0).all()  # what cannot occur is never drawn, at either end of the row
    assert (drawn.diff(dim=-1) >= 0).all()


def test_a_long_tail_of_tiny_probabilities_is_drawn():
    """Each of 200,000 ids has 1e-8, together 0.002: a float32 running sum near 1 would not move for any of them."""
    tail, size = 0.002, 200_000
    p = torch.full((1, size + 1), tail / size)
    p[0, 0] = 1 - tail
    share = (draw(p, 200_000) > size // 2).double().mean().item()
    assert abs(share - tail / 2) < 5 * (tail / 2 / 200_000) ** 0.5


def test_log_p_is_that_of_the_whole_distribution():
    logits = 30 * torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    logits[:, 40:] = -torch.inf
    ids = torch.arange(50).expand(3, 50)
    torch.testing.assert_close(_Distribution(logits).log_p(ids), logits.log_softmax(-1))
