import pytest
import torch

from spec_kd import projection


@pytest.mark.parametrize("shape", [(7,), (3, 5), (0,), (1,)])
@pytest.mark.parametrize("bias", [False, True])
def test_blocks_give_the_product(shape, bias, monkeypatch):
    monkeypatch.setattr(projection, "BLOCK_ROWS", 4)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(*shape, 6, generator=generator), torch.randn(11, 6, generator=generator)
    added = torch.randn(11, generator=generator) if bias else None
    expected = torch.nn.functional.linear(hidden, weight, added)
    torch.testing.assert_close(projection.project(hidden, weight, added), expected)
    buffer = torch.empty(*shape, 11)
    assert projection.project(hidden, weight, added, out=buffer) is buffer
    torch.testing.assert_close(buffer, expected)


def test_gradients_flow_where_they_are_asked_for():
    hidden = torch.randn(3, 6, requires_grad=True)
    projection.project(hidden, torch.randn(11, 6)).sum().backward()
    assert hidden.grad is not None


def test_back_and_accumulated_products():
    generator = torch.Generator().manual_seed(0)
    gradient, weight = torch.randn(5, 11, generator=generator), torch.randn(11, 6, generator=generator)
    torch.testing.assert_close(projection.project_back(gradient, weight), gradient @ weight)
    hidden, total = torch.randn(5, 6, generator=generator), torch.ones(11, 6)
    projection.accumulate_product(total, gradient.T, hidden)
    torch.testing.assert_close(total, 1 + gradient.T @ hidden)
    half = torch.ones(11, 6)
    projection.accumulate_product(half, gradient.T.bfloat16(), hidden.bfloat16())
    exact = 1 + gradient.T.bfloat16().double() @ hidden.bfloat16().double()
    torch.testing.assert_close(half.double(), exact, rtol=1e-5, atol=1e-5)  # the product itself is not rounded
