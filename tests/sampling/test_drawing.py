"""Sampling with one random number a token against the softmax it stands for."""

import torch

from spec_kd.sampling.generation import DrawnToken


def test_draws_follow_the_softmax_and_leave_the_global_state():
    torch.manual_seed(0)
    scores = torch.tensor([[1.0, -torch.inf, 0.0, 2.0], [0.0, 0.0, -torch.inf, -torch.inf]])
    process = DrawnToken(torch.Generator().manual_seed(1))
    state = torch.get_rng_state()
    draws = torch.stack([process(None, scores) for _ in range(20_000)])  # (n, B, V)
    assert torch.equal(torch.get_rng_state(), state)
    assert ((draws == 0).sum(-1) == 1).all()
    shares = (draws == 0).double().mean(0)
    torch.testing.assert_close(shares, scores.double().softmax(-1), atol=0.012, rtol=0)
    assert shares[0, 1] == 0 and shares[1, 2:].sum() == 0


def test_a_seed_gives_the_same_ids():
    scores = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    once, again = (DrawnToken(torch.Generator().manual_seed(7))(None, scores) for _ in range(2))
    assert torch.equal(once, again)
