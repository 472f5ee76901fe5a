import math

import pytest
import torch

from spec_kd.losses import DIVERGENCES, Divergence, build_divergence, dense_divergence, register_divergence
from spec_kd.losses.divergences import TokenDistributions
from spec_kd.losses.registry import resolve_divergence_name


def make_distributions(log_p: torch.Tensor, log_q: torch.Tensor) -> TokenDistributions:
    return TokenDistributions(p=log_p.exp(), log_p=log_p, q=log_q.exp(), log_q=log_q)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_value_and_gradient_equal_reference_and_autograd(name):
    generator = torch.Generator().manual_seed(0)
    z = (4 * torch.randn(13, 29, generator=generator, dtype=torch.float64)).requires_grad_()
    teacher = 4 * torch.randn(13, 29, generator=generator, dtype=torch.float64)
    d = make_distributions(torch.log_softmax(teacher, -1), torch.log_softmax(z.detach(), -1))
    divergence = build_divergence(name)
    value = divergence.compute_value(d)
    reference = dense_divergence(z, teacher, name)
    (autograd_gradient,) = torch.autograd.grad(reference.sum(), z)
    torch.testing.assert_close(value, reference.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(divergence.compute_gradient(d, value), autograd_gradient, rtol=1e-10, atol=1e-12)


def test_known_values_by_hand():
    log_p, log_q = torch.tensor([[0.75, 0.25]]).log().double(), torch.tensor([[0.5, 0.5]]).log().double()
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    m = (0.625, 0.375)
    jsd = 0.5 * (0.75 * math.log(0.75 / m[0]) + 0.25 * math.log(0.25 / m[1]))
    jsd += 0.5 * (0.5 * math.log(0.5 / m[0]) + 0.5 * math.log(0.5 / m[1]))
    for name, expected in (("forward_kl", forward), ("reverse_kl", reverse), ("jsd", jsd)):
        value = build_divergence(name).compute_value(make_distributions(log_p, log_q))
        assert value.item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_beta_equals_reference(beta):
    z, teacher = torch.randn(2, 5, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    d = make_distributions(torch.log_softmax(teacher, -1), torch.log_softmax(z, -1))
    value = build_divergence("jsd", beta).compute_value(d)
    torch.testing.assert_close(value, dense_divergence(z, teacher, "jsd", beta=beta), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_finite_where_probabilities_underflow(name):
    """One-hot teachers, opposite one-hot drafts and identical pairs: float32, logits of +-1e4."""
    one_hot = torch.full((1, 7), -1e4)
    one_hot[0, 2] = 1e4
    for teacher, z in ((one_hot, -one_hot), (one_hot, one_hot), (one_hot, torch.zeros(1, 7))):
        d = make_distributions(torch.log_softmax(teacher, -1), torch.log_softmax(z, -1))
        divergence = build_divergence(name)
        value = divergence.compute_value(d)
        gradient = divergence.compute_gradient(d, value)
        assert torch.isfinite(value).all() and torch.isfinite(gradient).all()
        assert value.item() >= -1e-6
        if teacher is z:
            assert value.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("divergence", "beta", "expected"),
    [
        (None, None, "forward_kl"),
        (None, 0, "forward_kl"),
        (None, 1.0, "reverse_kl"),
        (None, 0.3, "jsd"),
        ("jsd", None, "jsd"),
        ("jsd", 0.3, "jsd"),
        ("forward_kl", 0.0, "forward_kl"),
    ],
)
def test_trl_beta_is_understood(divergence, beta, expected):
    assert resolve_divergence_name(divergence, beta) == expected


@pytest.mark.parametrize(
    ("divergence", "beta", "message"),
    [
        ("kl", None, "forward_kl, jsd, lk_hybrid"),
        ("forward_kl", 0.5, "disagree"),
        ("jsd", 0.0, "disagree"),
        (None, 1.5, r"\[0, 1\]"),
        (None, float("nan"), r"\[0, 1\]"),
    ],
)
def test_wrong_choices_are_refused(divergence, beta, message):
    with pytest.raises(ValueError, match=message):
        resolve_divergence_name(divergence, beta)


def test_options_reach_the_divergence_or_are_refused():
    assert build_divergence("lk_hybrid", eta=1.5).eta == 1.5
    assert build_divergence(beta=0.2).beta == 0.2
    with pytest.raises(ValueError, match=r"'tvd' has no option 'eta'; it has none"):
        build_divergence("tvd", eta=1.0)
    with pytest.raises(ValueError, match=r"no option 'alpha'; it has: eta"):
        build_divergence("lk_hybrid", alpha=1.0)
    for eta in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="eta"):
            build_divergence("lk_hybrid", eta=eta)


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr("spec_kd.losses.registry.DIVERGENCES", dict(DIVERGENCES))


def test_an_outside_divergence_is_known_by_name_and_refused_when_it_clashes(registry):
    @register_divergence
    class SquaredError(Divergence):
        name = "squared_error"

        def __init__(self, weight: float = 1.0):
            self.weight = weight

        def compute_value(self, d):
            return self.weight * (d.p - d.q).square().sum(-1)

        def compute_gradient(self, d, value):
            slope = 2 * self.weight * (d.q - d.p)
            return d.q * (slope - (d.q * slope).sum(-1, keepdim=True))

    divergence = build_divergence("squared_error", weight=2.0)
    assert isinstance(divergence, SquaredError) and divergence.weight == 2.0
    register_divergence(SquaredError)  # twice, as when a cell is run again
    with pytest.raises(ValueError, match=r"'tvd' belongs to .*TotalVariation already"):
        register_divergence(type("Other", (SquaredError,), {"name": "tvd"}))
    with pytest.raises(TypeError, match="no `name`"):
        register_divergence(type("Nameless", (SquaredError,), {"name": None}))
    with pytest.raises(TypeError, match="not a divergence"):
        register_divergence(dict)
    with pytest.raises(TypeError, match="not a divergence"):
        register_divergence(Divergence)


def test_tvd_plus_plus_reweighs_the_tvd_by_its_deviation():
    """Equal to dTVD/sigma where sigma is above its floor; at q = p, where the rewards vanish, exactly zero."""
    log_p, log_q = (torch.tensor([[a, 1 - a]]).double().log() for a in (0.9, 0.2))
    d = make_distributions(log_p, log_q)
    tvd, plus = (build_divergence(name) for name in ("tvd", "tvd_plus_plus"))
    sigma = math.sqrt(0.2 * 0.8)
    value = tvd.compute_value(d)
    assert value.item() == pytest.approx(0.7)
    torch.testing.assert_close(plus.compute_gradient(d, value), tvd.compute_gradient(d, value) / sigma)
    d = make_distributions(log_p, log_p)
    assert not plus.compute_gradient(d, value).any()
