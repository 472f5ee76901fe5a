"""A divergence is one class: its gradient, the fused loss on live and on sparse teachers, and its name in a config."""

import pytest
import torch

from spec_kd import Divergence, WhiteBoxDistillConfig, fused_linear_divergence, register_divergence
from spec_kd.losses import DIVERGENCES, SPARSE_METHODS, SparseTensors


class SquaredError(Divergence):
    """sum_v (p - q)^2, gradient 2 q ((q - p) - E_q (q - p))."""

    name = "squared_error"
    is_coarsenable = True

    def compute_value(self, d):
        return (d.p - d.q).square().sum(-1)

    def compute_gradient(self, d, value):
        difference = d.q - d.p
        mean = (difference * d.q).sum(-1, keepdim=True)
        return 2 * d.q * (difference - mean)


@pytest.fixture(autouse=True)
def registered():
    """Other tests do not see the toy."""
    before = dict(DIVERGENCES)
    register_divergence(SquaredError)
    yield
    DIVERGENCES.clear()
    DIVERGENCES.update(before)


@pytest.mark.parametrize("is_sparse", [False, True], ids=["live", "top_k_tail"])
def test_the_fused_loss_equals_autograd(is_sparse):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 6, generator=generator).requires_grad_()
    weight = torch.randn(11, 6, generator=generator).requires_grad_()
    teacher = torch.randn(5, 11, generator=generator)
    log_p, ids = teacher.log_softmax(-1).topk(4)
    output = fused_linear_divergence(
        hidden, weight,
        SparseTensors(SPARSE_METHODS["top_k_tail"], ids, log_p) if is_sparse else teacher.__getitem__,
        torch.zeros(5, dtype=torch.long), divergence=SquaredError(),
    )  # fmt: skip
    output.loss.backward()

    inputs = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    q, p = (inputs[0] @ inputs[1].T).softmax(-1), teacher.double().softmax(-1)
    if is_sparse:  # the others are one outcome
        q, p = (torch.cat([x.gather(-1, ids), 1 - x.gather(-1, ids).sum(-1, keepdim=True)], dim=-1) for x in (q, p))
    loss = (p - q).square().sum()
    torch.testing.assert_close(output.loss.double(), loss.detach(), rtol=1e-4, atol=1e-6)
    for ours, theirs in zip((hidden, weight), torch.autograd.grad(loss, inputs), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs, rtol=1e-3, atol=1e-5)


def test_a_config_knows_it_by_name_and_other_signals_refuse_it(tmp_path):
    config = WhiteBoxDistillConfig(output_dir=str(tmp_path), divergence="squared_error", use_cpu=True, report_to=[])
    assert isinstance(config.build_loss().divergence, SquaredError)
    with pytest.raises(
        ValueError, match=r"'sampled_logprobs' cannot serve .*'squared_error'.*'top_k_tail' \(coarsened"
    ):
        SPARSE_METHODS["sampled_logprobs"].check_serves(SquaredError())
