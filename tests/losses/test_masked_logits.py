"""Logits of -inf in the teacher or the draft: values and gradients against the dense float64 reference and autograd."""

import math

import pytest
import torch

from spec_kd.losses import (
    DIVERGENCES,
    SPARSE_METHODS,
    SparseTensors,
    TokenLoss,
    build_divergence,
    build_selection,
    dense_divergence,
    fused_linear_divergence,
    selected_linear_divergence,
    tile,
)
from spec_kd.losses.divergences import TokenDistributions
from spec_kd.losses.tile import TileSettings, compute_tile

VOCAB, TOKENS, HIDDEN = 19, 11, 6
MASKS = {  # ids that the teacher rules out, and those that the draft does
    "teacher": ([0, 3, 18], []),
    "both the same": ([2, 3], [2, 3]),
    "draft": ([], [4, 5]),
    "draft more": ([4], [4, 5]),
    "teacher more": ([4, 5], [4]),
    "one id each": (list(range(1, VOCAB)), [0]),
}
INFINITE = {  # where one of the two rules out what the other does not
    "forward_kl": {"draft", "draft more", "one id each"},
    "lk_hybrid": {"draft", "draft more", "one id each"},
    "reverse_kl": {"teacher", "teacher more", "one id each"},
    "neg_log_acceptance": {"one id each"},
}


def make_case(masks, seed=0):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    teacher, bias = 3 * make(TOKENS, VOCAB), make(VOCAB)
    for_teacher, for_draft = MASKS[masks]
    teacher[:, for_teacher], bias[for_draft] = -math.inf, -math.inf
    labels = torch.randint(6, 9, (TOKENS,), generator=generator)
    return make(TOKENS, HIDDEN).requires_grad_(), make(VOCAB, HIDDEN).requires_grad_(), bias, teacher, labels


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_fused_and_chunked_equal_the_reference(name, masks, temperature, monkeypatch):
    monkeypatch.setattr(tile, "TILE_ELEMENTS", 3 * VOCAB)
    hidden, weight, bias, teacher, labels = make_case(masks)
    output = fused_linear_divergence(
        hidden, weight, lambda chunk: teacher[chunk], labels,
        divergence=build_divergence(name), bias=bias, temperature=temperature, chunk_tokens=4,
    )  # fmt: skip
    dense = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    logits = dense[0] @ dense[1].T + bias.double()
    value = dense_divergence(logits, teacher.double(), name, temperature=temperature)
    assert value.isinf().all() == (masks in INFINITE.get(name, set())) and not value.isnan().any()
    torch.testing.assert_close(output.divergence.double(), value.detach(), rtol=1e-4, atol=1e-5)
    log_q = torch.log_softmax(logits.detach() / temperature, -1)
    p = torch.softmax(teacher.double() / temperature, -1)
    entropy = -torch.special.xlogy(log_q.exp(), log_q.exp()).sum(-1)
    torch.testing.assert_close(output.entropy.double(), entropy, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.alpha.double(), torch.minimum(p, log_q.exp()).sum(-1), rtol=1e-4, atol=1e-5)
    if value.isinf().any():
        return  # the loss is what stops the training
    gradients = torch.autograd.grad(output.loss, (hidden, weight))
    for actual, expected in zip(gradients, torch.autograd.grad(value.sum(), dense), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("masks", ["teacher", "both the same", "draft more"])
@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_the_traced_tile_equals_the_plain_one(name, masks):
    hidden, weight, bias, teacher, labels = make_case(masks)
    settings = TileSettings(build_divergence(name), 1.0, 1.0, None, 0.0, needs_gradient=True)
    raw = (hidden @ weight.T).detach()
    torch.compiler.reset()
    compiled = torch.compile(compute_tile, backend="aot_eager", fullgraph=True)(raw, bias, teacher, labels, settings)
    plain = compute_tile(raw, bias, teacher, labels, settings)
    for field in ("loss", "value", "entropy", "alpha", "gradient"):
        torch.testing.assert_close(getattr(compiled, field), getattr(plain, field), equal_nan=True)
    assert not plain.value.isnan().any() and not plain.entropy.isnan().any()


def test_a_nan_is_not_taken_for_a_mask():
    for name in sorted(DIVERGENCES):
        hidden, weight, bias, teacher, labels = make_case("teacher")
        teacher[2, 7] = math.nan
        output = fused_linear_divergence(
            hidden, weight, lambda chunk, t=teacher: t[chunk], labels, divergence=build_divergence(name), bias=bias
        )
        assert output.divergence[2].isnan() and output.loss.isnan(), name


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
@pytest.mark.parametrize("masked", [[0], [0, 1, 2], [7, 8]])
def test_a_draft_that_rules_ids_out_and_a_sparse_teacher(name, masked):
    """Unused places have id 0; a coarsened teacher's bucket may be all that the draft has left."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(4, VOCAB, generator=generator)
    z[:, masked] = -math.inf
    ids = torch.tensor([[3, 4, 0], [5, 0, 0], [6, 7, 8], [9, 10, 11]])
    log_p = torch.tensor([[0.5, 0.3, 0.0], [0.9, 0.0, 0.0], [0.3, 0.3, 0.3], [0.5, 0.3, 0.2]]).log()
    bias, settings = None, TileSettings(build_divergence(name), 1.0, 1.0, None, 0.0, needs_gradient=True)
    labels = torch.full((4,), 3)
    entropy = torch.distributions.Categorical(logits=z).probs
    entropy = -torch.special.xlogy(entropy, entropy).sum(-1)
    for method in SPARSE_METHODS.values():
        if method.describe_service(settings.divergence) is None:
            continue
        weights = None if not method.is_sampled else log_p.exp() / log_p.exp().sum(-1, keepdim=True)
        known = log_p.masked_fill(log_p == -math.inf, 0.0) if method.is_sampled else log_p
        targets = SparseTensors(method, ids, known if method.has_log_p else None, weights)
        result = compute_tile(z, bias, targets, labels, settings)
        assert not result.loss.isnan().any() and not result.gradient.isnan().any(), method.name
        torch.testing.assert_close(result.entropy, entropy, rtol=1e-4, atol=1e-5)
        is_hit = torch.tensor([[i in masked for i in row] for row in ids.tolist()]) & (log_p > -math.inf)
        if method.is_sampled and name == "forward_kl":
            assert torch.equal(result.loss.isinf(), is_hit.any(-1))
        if not is_hit.any() and not method.is_sampled and name == "forward_kl":
            q = torch.softmax(z.double(), -1).gather(-1, ids).masked_fill(log_p == -math.inf, 0.0)
            p = log_p.double().exp()
            p, q = (torch.cat([part, 1 - part.sum(-1, keepdim=True)], -1) for part in (p, q))
            expected = (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum(-1)
            torch.testing.assert_close(result.loss.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["target_entropy", "adaspec"])
def test_selections_rank_tokens_of_a_masked_teacher_by_their_true_scores(name):
    hidden, weight, bias, teacher, labels = make_case("both the same")
    sequence, reference = torch.zeros(TOKENS, dtype=torch.long), torch.linspace(0, 2, TOKENS)
    loss = TokenLoss(build_divergence("tvd"), selection=build_selection(name, 0.4))
    targets = SimpleTargets(teacher)
    _, kept = selected_linear_divergence(
        hidden, weight, targets, labels, loss, sequence=sequence, reference=reference, bias=bias
    )
    log_p = torch.log_softmax(teacher.double(), -1)
    score = -torch.special.xlogy(log_p.exp(), log_p.exp()).sum(-1)
    if name == "adaspec":
        logits = (hidden @ weight.T + bias).detach().double()
        score = dense_divergence(logits, teacher.double(), "forward_kl") - reference
    assert set(kept.nonzero().flatten().tolist()) == set(score.topk(5).indices.tolist())


class SimpleTargets:
    def __init__(self, logits):
        self.logits = logits

    def __call__(self, chunk):
        return self.logits[chunk]

    def __getitem__(self, mask):
        return SimpleTargets(self.logits[mask])


def test_a_token_whose_score_is_nan_is_kept_so_that_the_loss_shows_it():
    hidden, weight, bias, teacher, labels = make_case("teacher")
    teacher[4] = math.nan
    loss = TokenLoss(build_divergence("tvd"), selection=build_selection("target_entropy", 0.2))
    output, kept = selected_linear_divergence(
        hidden, weight, SimpleTargets(teacher), labels, loss, sequence=torch.zeros(TOKENS, dtype=torch.long), bias=bias
    )
    assert kept[4] and output.loss.isnan()


def test_an_underflow_is_a_probability_of_zero():
    """exp underflows in float32 below -104: the same value as for -inf, and as float64 gives it."""
    log_p = torch.log_softmax(torch.tensor([[0.0, -200.0, 1.0]]), -1)
    log_q = torch.log_softmax(torch.tensor([[0.5, 0.0, -150.0]]), -1)
    d = TokenDistributions(p=log_p.exp(), log_p=log_p, q=log_q.exp(), log_q=log_q)
    for name in ("forward_kl", "jsd", "reverse_kl"):
        expected = dense_divergence(log_q.double(), log_p.double(), name)
        torch.testing.assert_close(build_divergence(name).compute_value(d).double(), expected, rtol=1e-5, atol=1e-6)
