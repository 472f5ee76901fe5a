"""Against a scalar reference written from the paper; and exactly: drafting and correcting together give p."""

import pytest
import torch

from spec_kd.decoding.acceptance_sampling import (
    count_accepted,
    verify_greedily,
    verify_sampled,
    weigh_next_tokens,
)
from spec_kd.sampling.generation import draw_ids

B, G, V = 64, 4, 7


def draw_case(seed, is_greedy_draft, num_drafted=G):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        weights = torch.rand(*shape, V, generator=generator) ** 4
        weights[torch.rand(weights.shape, generator=generator) < 0.2] = 0  # top-k leaves zeros behind
        weights[..., 0] += 1e-3
        return weights / weights.sum(-1, keepdim=True)

    p, q = draw(B, num_drafted + 1), draw(B, num_drafted)
    p[:, :-1] = 0.3 * p[:, :-1] + 0.7 * q  # so that whole blocks are accepted now and then
    drafted = q.argmax(-1) if is_greedy_draft else torch.multinomial(q.flatten(0, 1), 1, generator=generator)
    limits = torch.randint(0, num_drafted + 1, (B,), generator=generator)
    uniforms = torch.rand(B, num_drafted, generator=generator)
    return p, None if is_greedy_draft else q, drafted.reshape(B, num_drafted), limits, uniforms


def verify_one(p, q, drafted, limit, uniforms):
    """Number accepted and normalized distribution of the next token, for one row of plain floats."""
    accepted = 0
    while accepted < limit:
        token = drafted[accepted]
        ratio = p[accepted][token] / (1.0 if q is None else q[accepted][token])
        if uniforms[accepted] >= min(1.0, ratio):
            break
        accepted += 1
    weights = list(p[accepted])
    if accepted < limit:
        for v in range(V):
            drafted_with = float(v == drafted[accepted]) if q is None else q[accepted][v]
            weights[v] = max(0.0, p[accepted][v] - drafted_with)
    total = sum(weights)
    return accepted, [weight / total for weight in weights]


@pytest.mark.parametrize("is_greedy_draft", [False, True])
def test_sampled_rule_equals_a_scalar_reference(is_greedy_draft):
    seen = set()
    for seed in range(20):
        p, q, drafted, limits, uniforms = draw_case(seed, is_greedy_draft)
        accepted = count_accepted(p, q, drafted, limits, uniforms)
        weights = weigh_next_tokens(p, q, drafted, limits, accepted)
        weights = weights / weights.sum(-1, keepdim=True)
        for i in range(B):
            expected, distribution = verify_one(
                p[i].tolist(),
                None if q is None else q[i].tolist(),
                drafted[i].tolist(),
                limits[i].item(),
                uniforms[i].tolist(),
            )
            assert accepted[i] == expected
            torch.testing.assert_close(weights[i], torch.tensor(distribution), atol=1e-5, rtol=0)
            seen.add((limits[i].item(), expected))
    assert seen == {(limit, count) for limit in range(G + 1) for count in range(limit + 1)}


@pytest.mark.parametrize("is_greedy_draft", [False, True])
def test_drafting_accepting_and_correcting_together_give_p(is_greedy_draft):
    p, q, drafted, _, _ = draw_case(0, is_greedy_draft, num_drafted=1)
    grid = ((torch.arange(20_000) + 0.5) / 20_000)[:, None]  # uniforms, without chance
    one = torch.ones(1, dtype=torch.long)
    for i in range(20):
        written = torch.zeros(V)
        proposals = {drafted[i, 0].item(): 1.0} if is_greedy_draft else dict(enumerate(q[i, 0].tolist()))
        for token, probability in proposals.items():
            ids = torch.full((len(grid), 1), token)
            q_rows = None if q is None else q[i].expand(len(grid), -1, -1)
            accepted = count_accepted(p[i].expand(len(grid), -1, -1), q_rows, ids, one.expand(len(grid)), grid)
            share = accepted.float().mean().item()
            written[token] += probability * share
            weights = weigh_next_tokens(p[i, None], None if q is None else q[i, None], ids[:1], one, one - 1)[0]
            written += probability * (1 - share) * weights / weights.sum()
        torch.testing.assert_close(written, p[i, 0], atol=2e-4, rtol=0)


@pytest.mark.parametrize("is_greedy_draft", [False, True])
def test_verify_draws_from_those_weights(is_greedy_draft):
    p, q, drafted, _, _ = draw_case(3, is_greedy_draft, num_drafted=2)
    rows = 4000
    p, q, drafted = p[:1].expand(rows, -1, -1), q if q is None else q[:1].expand(rows, -1, -1), drafted[:1]
    drafted, limits = drafted.expand(rows, -1), torch.full((rows,), 2)
    accepted, next_tokens = verify_sampled(p, q, drafted, limits, torch.Generator().manual_seed(0))
    again = verify_sampled(p, q, drafted, limits, torch.Generator().manual_seed(0))
    assert torch.equal(accepted, again[0]) and torch.equal(next_tokens, again[1])
    num_seen = 0
    for count in range(3):
        tokens = next_tokens[accepted == count]
        if len(tokens) > 100:
            num_seen += 1
            expected = weigh_next_tokens(
                p[:1], None if q is None else q[:1], drafted[:1], limits[:1], torch.tensor([count])
            )[0]
            share = torch.bincount(tokens, minlength=V) / len(tokens)
            assert (share - expected / expected.sum()).abs().max() < 4 * 0.5 / len(tokens) ** 0.5
    assert num_seen >= 2


def test_nothing_drafted_draws_from_p():
    p = torch.eye(3)[:, None]  # (3, 1, 3)
    nothing = torch.zeros(3, 0, dtype=torch.long)
    accepted, next_tokens = verify_sampled(p, None, nothing, torch.zeros(3, dtype=torch.long), torch.Generator())
    assert accepted.tolist() == [0, 0, 0] and next_tokens.tolist() == [0, 1, 2]


def test_a_rejection_by_rounding_leaves_something_to_draw_from():
    p = torch.tensor([[[0.25, 0.75], [0.5, 0.5]]])
    one = torch.ones(1, dtype=torch.long)
    weights = weigh_next_tokens(p, p[:, :1], torch.tensor([[1]]), one, one - 1)
    assert weights.tolist() == [[0.25, 0.75]]
    # with p = q, no draw from [0, 1) rejects
    uniforms = torch.tensor([[1 - 2**-24]])
    assert count_accepted(p, p[:, :1], torch.tensor([[1]]), one, uniforms).tolist() == [1]


def test_greedy_rule():
    logits = torch.full((5, 3, 6), -1.0)
    logits[:, 0, 2] = logits[:, 1, 3] = logits[:, 2, 4] = 1.0
    drafted = torch.tensor([[2, 3], [2, 5], [5, 3], [2, 3], [2, 3]])
    limits = torch.tensor([2, 2, 2, 1, 0])
    accepted, next_tokens = verify_greedily(logits, drafted, limits)
    assert accepted.tolist() == [2, 1, 0, 1, 0]
    assert next_tokens.tolist() == [4, 3, 2, 3, 2]


def test_sample():
    weights = torch.tensor([[0.0, 3.0, 0.0, 1.0, 0.0]])  # neither normalized nor positive everywhere
    ids = draw_ids(weights.expand(40_000, -1), torch.Generator().manual_seed(0))
    assert ids.dtype == torch.long and set(ids.tolist()) == {1, 3}
    assert (ids == 1).double().mean().item() == pytest.approx(0.75, abs=0.01)
