"""The compiled tile against the plain one, which has its own tests against the dense reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spec_kd.losses import DIVERGENCES, SPARSE_METHODS, Divergence, build_divergence
from spec_kd.losses.tile import TileSettings, choose_compute_tile, choose_tile_tokens, compute_tile, get_compiled_tile


class SquaredError(Divergence):
    """One from outside of the package."""

    name = "squared_error"

    def compute_value(self, d):
        return (d.p - d.q).square().sum(-1)

    def compute_gradient(self, d, value):
        slope = 2 * (d.q - d.p)
        return d.q * (slope - (d.q * slope).sum(-1, keepdim=True))


def make_inputs(seed=0, tokens=6, vocab=50):
    generator = torch.Generator().manual_seed(seed)
    raw = 3 * torch.randn(tokens, vocab, generator=generator)
    bias = torch.randn(vocab, generator=generator)
    teacher = 3 * torch.randn(tokens, vocab, generator=generator)
    return raw, bias, teacher, torch.randint(0, vocab, (tokens,), generator=generator)


def assert_same(actual, expected):
    for name in ("loss", "value", "entropy", "alpha", "gradient"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
    assert torch.equal(actual.is_top1, expected.is_top1)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_the_traced_tile_equals_the_plain_one(name):
    """What `torch.compile` captures, without the code generator: no graph break, no wrong aliasing of in-place ops."""
    settings_ = TileSettings(build_divergence(name), 2.0, 0.5, 10.0, 0.2, needs_gradient=True)
    raw, bias, teacher, labels = make_inputs()
    torch.compiler.reset()
    compiled = torch.compile(compute_tile, backend="aot_eager", fullgraph=True)
    inputs = [tensor.clone() for tensor in (raw, bias, teacher)]
    assert_same(compiled(*inputs, labels, settings_), compute_tile(raw, bias, teacher, labels, settings_))
    for given_, kept in zip(inputs, (raw, bias, teacher), strict=True):
        assert torch.equal(given_, kept)  # inputs are left as they were


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forward_kl", "tvd_plus_plus"])
def test_generated_code_equals_the_plain_tile(name):
    """Inductor's code for the CPU: the same capture and lowering that writes Triton kernels on a GPU."""
    settings_ = TileSettings(build_divergence(name), 1.0, 1.0, None, 0.0, needs_gradient=True)
    torch.compiler.reset()
    for tokens in (6, 5):  # a last chunk of another size
        raw, _, teacher, labels = make_inputs(tokens=tokens)
        expected = compute_tile(raw, None, teacher, labels, settings_)
        assert_same(get_compiled_tile()(raw, None, teacher, labels, settings_), expected)


def test_an_outside_divergence_is_compiled_as_well():
    settings_ = TileSettings(SquaredError(), 1.0, 1.0, None, 0.0, needs_gradient=True)
    raw, _, teacher, labels = make_inputs()
    torch.compiler.reset()
    compiled = torch.compile(compute_tile, backend="aot_eager", fullgraph=True)
    assert_same(compiled(raw, None, teacher, labels, settings_), compute_tile(raw, None, teacher, labels, settings_))


@pytest.mark.parametrize(("name", "divergence"), [("top_k_tail", "jsd"), ("sampled_logprobs", "forward_kl")])
def test_sparse_targets_are_compiled_as_well(name, divergence):
    raw, _, teacher, labels = make_inputs()
    log_p, ids = teacher.log_softmax(-1).topk(5)
    targets = SPARSE_METHODS[name].build_tensors(ids, log_p, torch.full_like(log_p, 0.2))
    settings_ = TileSettings(build_divergence(divergence), 1.0, 1.0, None, 0.0, needs_gradient=True)
    torch.compiler.reset()
    compiled = torch.compile(compute_tile, backend="aot_eager", fullgraph=True)
    assert_same(compiled(raw, None, targets, labels, settings_), compute_tile(raw, None, targets, labels, settings_))


def test_a_cpu_runs_the_plain_tile_and_tiles_are_whole_threads():
    assert choose_compute_tile(torch.device("cpu")) is compute_tile
    assert choose_tile_tokens(700, 100, torch.device("cuda")) == 700


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 2000), vocab=st.integers(1, 300_000))
def test_tiles_fit_the_cache_or_hold_one_token_a_thread(tokens, vocab):
    threads = torch.get_num_threads()
    size = choose_tile_tokens(tokens, vocab, torch.device("cpu"))
    assert size % threads == 0 and size >= threads
    assert size == threads or size * vocab <= 2**19
