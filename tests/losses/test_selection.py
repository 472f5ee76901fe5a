import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spec_kd.losses import (
    SPARSE_METHODS,
    SparseTensors,
    TokenLoss,
    build_divergence,
    build_selection,
    dense_divergence,
    selected_linear_divergence,
)
from spec_kd.losses.selection import TokenScores, select_top_fraction


class DenseTargets:
    def __init__(self, logits):
        self.logits = logits

    def __call__(self, chunk):
        return self.logits[chunk]

    def __getitem__(self, mask):
        return DenseTargets(self.logits[mask])


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(20, 6, generator=generator).requires_grad_(),
        "weight": torch.randn(31, 6, generator=generator).requires_grad_(),
        "teacher": 3 * torch.randn(20, 31, generator=generator),
        "labels": torch.randint(0, 31, (20,), generator=generator),
        "sequence": torch.tensor([0] * 7 + [1] * 13),
        "reference": torch.rand(20, generator=generator),
    }


def run(case, loss, rows=slice(None)):
    targets = DenseTargets(case["teacher"][rows])
    return selected_linear_divergence(
        case["hidden"][rows], case["weight"], targets, case["labels"][rows], loss,
        sequence=case["sequence"][rows], reference=case["reference"][rows],
    )  # fmt: skip


def expected_scores(case, name):
    logits = (case["hidden"] @ case["weight"].T).detach()
    if name == "adaspec":
        return dense_divergence(logits, case["teacher"], "forward_kl") - case["reference"]
    return torch.distributions.Categorical(logits=case["teacher"]).entropy()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.floats(-5, 5, width=16)), min_size=1, max_size=40), st.floats(0.01, 1))
def test_top_fraction_equals_sorting_each_sequence(tokens, fraction):
    sequence = torch.tensor([s for s, _ in tokens])
    score = torch.tensor([value for _, value in tokens])
    mask = select_top_fraction(score, sequence, fraction)
    for s in sequence.unique():
        of_sequence = (sequence == s).nonzero().flatten().tolist()
        count = max(1, math.ceil(len(of_sequence) * fraction - 1e-9))
        best = sorted(of_sequence, key=lambda i: -score[i].item())[:count]  # stable: of equals, the earlier
        assert sorted(best) == [i for i in of_sequence if mask[i]]


def test_scores_that_are_not_finite_do_not_break_the_choice():
    """A NaN comes first: left out of the loss it would hide, and the training would go on."""
    score = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0])
    mask = select_top_fraction(score, torch.zeros(4, dtype=torch.long), 0.5)
    assert mask.tolist() == [True, True, False, False]
    assert select_top_fraction(score[:0], torch.zeros(0, dtype=torch.long), 0.5).shape == (0,)


@pytest.mark.parametrize("name", ["adaspec", "target_entropy"])
def test_fraction_selections_keep_the_tokens_that_dense_scores_name(case, name):
    output, kept = run(case, TokenLoss(build_divergence("tvd"), selection=build_selection(name, 0.3)))
    score = expected_scores(case, name)
    assert torch.equal(kept, select_top_fraction(score, case["sequence"], 0.3))
    assert kept[:7].sum() == 3 and kept[7:].sum() == 4  # ceil(2.1), ceil(3.9)
    per_token = dense_divergence(case["hidden"] @ case["weight"].T, case["teacher"], "tvd")
    torch.testing.assert_close(output.loss, per_token[kept].sum(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.divergence, (per_token * kept).detach(), rtol=1e-5, atol=1e-6)
    assert output.alpha.shape == output.entropy.shape == (20,) and (output.alpha > 0).all()  # of all tokens
    gradient = torch.autograd.grad(output.loss, case["weight"])[0]
    expected = torch.autograd.grad(per_token[kept].sum(), case["weight"])[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_rejected_only_keeps_what_a_greedy_draft_would_lose(case):
    _, kept = run(case, TokenLoss(build_divergence(), selection=build_selection("rejected")))
    choice = (case["hidden"] @ case["weight"].T).argmax(-1)
    assert torch.equal(kept, choice != case["labels"])


@pytest.mark.parametrize("name", ["adaspec", "target_entropy", "rejected"])
def test_splitting_a_batch_between_sequences_changes_nothing(case, name):
    loss = TokenLoss(build_divergence(), selection=build_selection(name))
    whole, kept = run(case, loss)
    parts = [run(case, loss, rows) for rows in (slice(0, 7), slice(7, 20))]
    assert torch.equal(kept, torch.cat([mask for _, mask in parts]))
    torch.testing.assert_close(whole.loss, sum(output.loss for output, _ in parts))


def test_everything_rejected_nothing_rejected_and_no_tokens(case):
    case["labels"] = (case["hidden"] @ case["weight"].T).argmax(-1)
    output, kept = run(case, TokenLoss(build_divergence(), selection=build_selection("rejected")))
    assert not kept.any() and output.loss.item() == 0.0
    output.loss.backward()
    assert not case["weight"].grad.any()
    output, kept = run(case, TokenLoss(build_divergence(), selection=build_selection("adaspec")), slice(0, 0))
    assert kept.shape == (0,) and output.loss.item() == 0.0


def test_without_a_selection_all_tokens_are_kept(case):
    output, kept = run(case, TokenLoss(build_divergence("reverse_kl"), temperature=2.0))
    logits = case["hidden"] @ case["weight"].T
    expected = dense_divergence(logits, case["teacher"], "reverse_kl", temperature=2.0).sum()
    assert kept.all()
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-6)


def test_a_coarsened_teacher_can_be_selected_from(case):
    log_p, ids = case["teacher"].log_softmax(-1).topk(8)
    targets = SparseTensors(SPARSE_METHODS["top_k_tail"], ids, log_p)
    loss = TokenLoss(build_divergence(), selection=build_selection("target_entropy", 0.5))
    output, kept = selected_linear_divergence(
        case["hidden"], case["weight"], targets, case["labels"], loss, sequence=case["sequence"]
    )
    assert kept.sum() == 4 + 7 and output.loss.item() > 0


def test_options_are_checked():
    assert build_selection() is None and build_selection("all") is None
    assert build_selection("adaspec").fraction == 0.4
    with pytest.raises(ValueError, match="adaspec, rejected, target_entropy"):
        build_selection("best")
    for fraction in (0.0, 1.5, -0.1):
        with pytest.raises(ValueError, match=r"\(0, 1\]"):
            build_selection("adaspec", fraction)
    for name in ("all", "rejected"):
        with pytest.raises(ValueError, match="has no meaning"):
            build_selection(name, 0.5)


def test_the_entropy_score_is_not_a_loss():
    with pytest.raises(NotImplementedError, match="a score"):
        build_selection("target_entropy").score.compute_gradient(None, None)
    scores = TokenScores(torch.tensor([1.0, 2.0]), torch.tensor([True, False]), torch.zeros(2, dtype=torch.long))
    assert build_selection("target_entropy", 0.5).select(scores).tolist() == [False, True]
