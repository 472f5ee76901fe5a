import torch

from spec_kd.losses.sparse import TokenSoftmax


def draw(p, count, seed=0):
    return TokenSoftmax(p.log()).draw(count, torch.Generator().manual_seed(seed))


def test_draws_have_the_probabilities_of_the_distribution():
    p = torch.tensor([[0.5, 0.0, 0.3, 0.2], [0.0, 0.1, 0.0, 0.9]])
    drawn = draw(p, 40_000)
    shares = torch.stack([row.bincount(minlength=4) / 40_000 for row in drawn])
    assert (shares - p).abs().max() <= 1.001 / 40_000
    assert (shares[p == 0] == 0).all()  # what cannot occur is never drawn, at either end of the row
    assert (drawn.diff(dim=-1) >= 0).all()


def test_counts_are_rounded_expectations_and_unbiased():
    """Over 20,000 rows: num_draws * p rounded down or up, and in the mean num_draws * p itself."""
    p = torch.tensor([0.004, 0.31, 0.02, 0.5, 0.16, 0.006], dtype=torch.float64)
    rows, draws = 20_000, 7
    drawn = draw(p.expand(rows, -1), draws)
    counts = torch.stack([(drawn == i).sum(-1) for i in range(len(p))], dim=-1).double()  # (rows, V)
    expected = draws * p
    assert ((counts == expected.floor()) | (counts == expected.ceil())).all()
    rest = expected - expected.floor()
    assert ((counts.mean(0) - expected).abs() < 5 * (rest * (1 - rest) / rows).sqrt()).all()


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
    torch.testing.assert_close(TokenSoftmax(logits).log_p(ids), logits.log_softmax(-1))
