"""Sparse teachers: coarsened ones against a dense reference over K + 1 outcomes, sampled ones against the true mean."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spec_kd.losses import (
    DIVERGENCES,
    SPARSE_METHODS,
    Divergence,
    SparseTensors,
    build_divergence,
    dense_divergence,
    fused_linear_divergence,
)

TOP_K = SPARSE_METHODS["top_k_tail"]
COUNTS, LOGPROBS, TOKEN = (SPARSE_METHODS[name] for name in ("sampled_counts", "sampled_logprobs", "token_only"))


def compute_sparse(z, targets, divergence):
    return targets.method.compute(z, targets, divergence, needs_gradient=True)


def make_logits(seed, tokens=5, vocab=23, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(2, tokens, vocab, generator=generator)).unbind()


def make_top_k(teacher, k, unused=0):
    log_p, ids = teacher.log_softmax(-1).topk(k)
    if unused:  # places that repeat an id that is in use
        log_p = torch.nn.functional.pad(log_p, (0, unused), value=-torch.inf)
        ids = torch.cat([ids, ids[:, :1].expand(-1, unused)], dim=-1)
    return SparseTensors(TOP_K, ids, log_p)


def coarsen(logits, ids):
    """Logits over the ids and one bucket for all others, in float64, with autograd."""
    log_q = logits.log_softmax(-1)
    head = log_q.gather(-1, ids)
    rest = log_q.scatter(-1, ids, -torch.inf)
    return torch.cat([head, rest.logsumexp(-1, keepdim=True)], dim=-1)


def sample(teacher, draws, generator):
    """Counts of `draws` ids from p per token, as targets with one place per id of the vocabulary."""
    p = teacher.softmax(-1)
    drawn = torch.multinomial(p, draws, replacement=True, generator=generator)
    counts = torch.zeros_like(p).scatter_add_(-1, drawn, torch.ones(drawn.shape))
    ids = torch.arange(teacher.shape[-1]).expand_as(p).contiguous()
    return ids, counts / draws


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    name=st.sampled_from(sorted(DIVERGENCES)),
    k=st.integers(1, 22),
    unused=st.integers(0, 3),
)
def test_coarsened_value_and_gradient_equal_autograd_over_the_buckets(seed, name, k, unused):
    z, teacher = make_logits(seed)
    result = compute_sparse(z, make_top_k(teacher, k, unused), build_divergence(name))
    leaf = z.double().requires_grad_()
    ids = teacher.topk(k).indices
    coarse_q, coarse_p = coarsen(leaf, ids), coarsen(teacher.double(), ids)
    expected = dense_divergence(coarse_q, coarse_p, name)
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    torch.testing.assert_close(result.value.double(), expected.detach(), rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(result.gradient.double(), gradient, rtol=2e-3, atol=2e-5)
    alpha = torch.minimum(coarse_p.exp(), coarse_q.exp()).sum(-1).detach()
    torch.testing.assert_close(result.alpha.double(), alpha, rtol=1e-4, atol=1e-5)
    true_alpha = torch.minimum(teacher.softmax(-1), z.softmax(-1)).sum(-1)
    assert (result.alpha >= true_alpha - 1e-5).all()
    q = leaf.detach().softmax(-1)
    torch.testing.assert_close(result.entropy.double(), -(q * q.log()).sum(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "tvd", "neg_log_acceptance"])
def test_a_coarsened_divergence_is_a_lower_bound_and_exact_with_all_ids(name):
    z, teacher = make_logits(1)
    full = dense_divergence(z, teacher, name)
    previous = torch.zeros(5)
    for k in (1, 4, 16, 23):
        value = compute_sparse(z, make_top_k(teacher, k), build_divergence(name)).value
        assert (value >= previous - 1e-5).all() and (value <= full + 1e-5).all()
        previous = value
    torch.testing.assert_close(previous, full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "name"), [(COUNTS, "forward_kl"), (LOGPROBS, "forward_kl"), (LOGPROBS, "tvd")])
def test_sampled_gradients_are_unbiased(method, name):
    """Over many draws value and gradient come to the dense ones, within five standard errors."""
    z, teacher = make_logits(2, tokens=1, vocab=7)
    leaf = z.double().requires_grad_()
    expected = dense_divergence(leaf, teacher.double(), name).sum()
    (gradient,) = torch.autograd.grad(expected, leaf)
    if method is COUNTS:  # the value is the cross-entropy
        expected = expected - (teacher.softmax(-1) * teacher.log_softmax(-1)).sum()
    generator = torch.Generator().manual_seed(0)
    repeats, draws = 4000, 3
    ids, weights = sample(teacher.expand(repeats, -1), draws, generator)
    log_p = teacher.log_softmax(-1).expand(repeats, -1) if method.has_log_p else None
    result = compute_sparse(z.expand(repeats, -1).clone(), SparseTensors(method, ids, log_p, weights),
                            build_divergence(name))  # fmt: skip
    for actual, true in ((result.gradient, gradient[0]), (result.value[:, None], expected.detach()[None])):
        error = (actual.double().mean(0) - true).abs()
        assert (error <= 5 * actual.double().std(0) / repeats**0.5 + 1e-6).all()
    if method.has_log_p:
        alpha = torch.minimum(teacher.softmax(-1), z.softmax(-1)).sum()
        assert abs(result.alpha.mean() - alpha) <= 5 * result.alpha.std() / repeats**0.5


def test_the_written_token_alone_is_cross_entropy():
    z, teacher = make_logits(3)
    labels = teacher.argmax(-1)
    log_p = teacher.log_softmax(-1).gather(-1, labels[:, None])
    targets = SparseTensors(TOKEN, labels[:, None], log_p, torch.ones(5, 1))
    result = compute_sparse(z, targets, build_divergence("forward_kl"))
    leaf = z.clone().requires_grad_()
    torch.nn.functional.cross_entropy(leaf, labels, reduction="sum").backward()
    torch.testing.assert_close(result.gradient, leaf.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_through_the_fused_head_as_directly(name):
    """Chunks, bias, padding rows and cross-entropy: the sparse teacher takes the dense one's road."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(9, 6, generator=generator).requires_grad_()
    weight = torch.randn(25, 6, generator=generator).requires_grad_()
    bias = torch.randn(25, generator=generator).requires_grad_()
    teacher, labels = torch.randn(9, 23, generator=generator), torch.arange(9)
    targets = make_top_k(teacher, 5)
    output = fused_linear_divergence(
        hidden, weight, targets, labels, divergence=build_divergence(name), bias=bias, vocab_size=23, chunk_tokens=4,
        ce_weight=0.25,
    )  # fmt: skip
    output.loss.backward()
    inputs = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    logits = (inputs[0] @ inputs[1].T + inputs[2])[:, :23]
    ids = targets.ids
    value = dense_divergence(coarsen(logits, ids), coarsen(teacher.double(), ids), name)
    loss = 0.75 * value.sum() + 0.25 * torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(output.loss.double(), loss.detach(), rtol=1e-4, atol=1e-4)
    for ours, theirs in zip((hidden, weight, bias), torch.autograd.grad(loss, inputs), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_finite_for_one_hot_teachers_and_extreme_logits(name):
    z = torch.tensor([[1e4, -1e4, 0.0, 5.0]] * 3)
    log_p = torch.tensor([[0.0, -torch.inf], [0.0, -2e4], [-1e-7, -16.0]])
    targets = SparseTensors(TOP_K, torch.tensor([[1, 0], [1, 0], [0, 1]]), log_p)
    result = compute_sparse(z, targets, build_divergence(name))
    for tensor in (result.value, result.gradient, result.alpha, result.entropy):
        assert torch.isfinite(tensor).all()


def test_counts_say_nothing_of_alpha():
    z, teacher = make_logits(5)
    ids, weights = sample(teacher, 4, torch.Generator().manual_seed(0))
    output = fused_linear_divergence(
        z.clone().requires_grad_(), torch.eye(23), SparseTensors(COUNTS, ids, None, weights),
        torch.zeros(5, dtype=torch.long), divergence=build_divergence(),
    )  # fmt: skip
    assert output.alpha.isnan().all() and torch.isfinite(output.loss)


def test_what_each_method_serves_is_declared():
    services = {
        (method.name, name): method.describe_service(build_divergence(name))
        for method in SPARSE_METHODS.values()
        for name in DIVERGENCES
    }
    assert {key for key, service in services.items() if service == "unbiased"} == {
        ("token_only", "forward_kl"), ("token_only", "tvd"), ("sampled_counts", "forward_kl"),
        ("sampled_logprobs", "forward_kl"), ("sampled_logprobs", "tvd"),
    }  # fmt: skip
    assert {key for key, service in services.items() if service == "coarsened"} == {
        ("top_k_tail", name) for name in DIVERGENCES
    }


@pytest.mark.parametrize("name", sorted(set(DIVERGENCES) - {"forward_kl", "tvd"}))
def test_an_undeclared_use_is_refused_by_name_with_what_would_serve(name):
    with pytest.raises(ValueError, match=rf"'sampled_logprobs' cannot serve .*'{name}'.*'top_k_tail' \(coarsened\)"):
        LOGPROBS.check_serves(build_divergence(name))
    with pytest.raises(ValueError, match=r"one of the divergences it serves: 'forward_kl'"):
        COUNTS.check_serves(build_divergence("tvd"))
    TOP_K.check_serves(build_divergence(name))


def test_an_outside_divergence_is_served_only_where_it_says_so():
    class Outside(Divergence):
        name = "outside"

        def compute_value(self, d):
            return d.p.sum(-1)

        def compute_gradient(self, d, value):
            return torch.zeros_like(d.p)

    for method in SPARSE_METHODS.values():
        with pytest.raises(ValueError, match="'outside'"):
            method.check_serves(Outside())


def test_a_teacher_of_other_tokens_is_refused():
    z, teacher = make_logits(6)
    targets = make_top_k(teacher, 3)
    with pytest.raises(ValueError, match="speaks of 2 tokens, expected 5"):
        fused_linear_divergence(
            z, torch.eye(23), lambda _: targets[slice(0, 2)], torch.zeros(5, dtype=torch.long),
            divergence=build_divergence(),
        )  # fmt: skip
