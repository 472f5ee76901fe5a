import pytest
import torch

from spec_kd.acceptance import bound_alpha, compute_alpha
from spec_kd.evaluation.token_scores import SCORES, score_from_stored, score_from_target
from spec_kd.losses import SPARSE_METHODS, SparseTensors

N, V = 40, 30


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    draft, target = (2 * torch.randn(N, V, generator=generator, dtype=torch.float64) for _ in range(2))
    tokens = torch.multinomial(target.softmax(-1), 1, generator=generator).squeeze(-1)
    return draft, target, tokens


def name_rows(scores):
    return dict(zip(SCORES, scores, strict=True))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_entropy_is_that_of_the_target(logits, temperature):
    draft, target, tokens = logits
    p = (target / (temperature or 1.0)).softmax(-1)
    scores = name_rows(score_from_target(draft, target, tokens, temperature, "stochastic"))
    torch.testing.assert_close(scores["target_entropy"], torch.distributions.Categorical(p).entropy())
    assert scores["alpha_low"].isnan().all() and scores["alpha_high"].isnan().all()


def test_entropy_survives_ids_that_cannot_occur(logits):
    draft, target, tokens = logits
    masked = target.clone()
    masked[:, 20:] = -torch.inf
    entropy = name_rows(score_from_target(draft, masked, tokens % 20, 1.0, "stochastic"))["target_entropy"]
    expected = torch.distributions.Categorical(logits=target[:, :20]).entropy()
    torch.testing.assert_close(entropy, expected)


def test_draws_estimate_alpha_without_bias(logits):
    draft, target, _ = logits
    log_p, q = target.log_softmax(-1), draft.softmax(-1)
    draws = torch.multinomial(log_p.exp(), 4000, replacement=True, generator=torch.Generator().manual_seed(1))
    sparse = SparseTensors(
        SPARSE_METHODS["sampled_logprobs"], draws, log_p.gather(-1, draws), torch.full(draws.shape, 1 / 4000).double()
    )
    tokens = draws[:, 0]
    scores = name_rows(
        score_from_stored(draft, log_p.gather(-1, tokens[:, None]).squeeze(-1), tokens, 1.0, "stochastic", sparse)
    )
    exact = compute_alpha(log_p.exp(), q)
    assert (scores["alpha"] - exact).abs().max() < 5 * 0.5 / 4000**0.5
    exact_a = (q / log_p.exp()).gather(-1, tokens[:, None]).squeeze(-1).clamp(max=1)
    torch.testing.assert_close(scores["acceptance"], exact_a)


@pytest.mark.parametrize("k", [1, 5, V])
def test_a_top_k_bounds_alpha(logits, k):
    draft, target, tokens = logits
    log_p, log_q = target.log_softmax(-1), draft.log_softmax(-1)
    values, ids = log_p.topk(k)
    sparse = SparseTensors(SPARSE_METHODS["top_k_tail"], ids, values)
    token_log_p = log_p.gather(-1, tokens[:, None]).squeeze(-1)
    scores = name_rows(score_from_stored(draft, token_log_p, tokens, 1.0, "stochastic", sparse))
    exact = compute_alpha(log_p.exp(), log_q.exp())
    low, high = scores["alpha_low"], scores["alpha_high"]
    assert (low <= exact + 1e-12).all() and (exact <= high + 1e-12).all()
    if k == V:
        torch.testing.assert_close(low, exact)
        torch.testing.assert_close(high, exact)
    else:
        assert (high > low).all()


def test_bounds_are_reached():
    """p on ids 0 and 1, of which id 0 is known: what is left may be shared wholly or not at all."""
    log_p = torch.tensor([0.6]).log()
    low, high = bound_alpha(log_p, torch.tensor([0.3]).log())
    assert low.item() == pytest.approx(0.3) and high.item() == pytest.approx(0.3 + 0.4)
    # unused places say nothing
    padded = bound_alpha(torch.tensor([0.6, 0.0]).log(), torch.tensor([0.3, 0.5]).log())
    assert padded[0].item() == pytest.approx(0.3) and padded[1].item() == pytest.approx(0.7)
