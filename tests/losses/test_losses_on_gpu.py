"""The compiled tiles on a GPU: against the dense float64 reference and against the plain tiles of a CPU."""

import pytest
import torch
from test_fused_linear import make_case, relative_error, run_dense, run_fused
from test_tile import SquaredError

from spec_kd.losses import (
    DIVERGENCES,
    SPARSE_METHODS,
    SparseTensors,
    build_divergence,
    fused_linear_divergence,
)

pytestmark = pytest.mark.gpu

# Three chunks, the last one of another size; more ids than a Triton block of 1,024
SIZES = {"tokens": 700, "hidden": 64, "rows": 5008, "vocab": 5003}
CHUNK = 300
EVERY_OPTION = {"temperature": 2.0, "logit_scale": 0.5, "softcap": 10.0, "ce_weight": 0.2}
SMOOTH = ("forward_kl", "reverse_kl", "jsd")
GRADIENTS = ("hidden", "weight", "bias")


@pytest.fixture(autouse=True)
def compiled():
    """Each test compiles anew; one that asks for more variants than are kept would run uncompiled, so it fails."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


def move(case, device="cuda", dtype=None):
    """The case on a device, its leaves again leaves."""
    moved = {k: v.detach().to(device) if isinstance(v, torch.Tensor) else v for k, v in case.items()}
    for name in GRADIENTS:
        moved[name] = moved[name].to(dtype or moved[name].dtype).requires_grad_()
    return moved


def make_targets(method, ids, log_p):
    """With what the method knows only."""
    weights = torch.full_like(log_p, 1 / ids.shape[-1]) if method.is_sampled else None
    return SparseTensors(method, ids, log_p if method.has_log_p else None, weights)


def make_flat_case():
    """A draft whose logits are a model's: of a few nats, which a rounding moves by hundredths."""
    case = make_case(**SIZES)
    with torch.no_grad():
        case["weight"] *= 0.3
    return case


def check(case, output, value, gradients, tolerance):
    output.loss.backward()
    assert relative_error(output.divergence.cpu(), value) < tolerance
    for name in GRADIENTS:
        difference = (case[name].grad.cpu().double() - gradients[name]).norm()
        assert difference < tolerance * gradients[name].norm(), name


@pytest.mark.parametrize("options", [{}, EVERY_OPTION], ids=["plain", "every option"])
@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_float32_equals_the_dense_float64_reference(name, options):
    case = make_case(**SIZES)
    value, gradients, _ = run_dense(case, name, **options)
    gpu = move(case)
    check(gpu, run_fused(gpu, name, chunk_tokens=CHUNK, **options), value, gradients, 1e-4)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_bfloat16_is_off_by_its_rounding_only(name):
    """The reference sees the rounded inputs; what is left is the rounding of logits and of their gradients.

    The gradient of the total variation jumps where p = q, so what it takes of the rounding is more.
    """
    case = move(make_flat_case(), "cpu", torch.bfloat16)
    value, gradients, _ = run_dense(case, name)
    gpu = move(case)
    output = run_fused(gpu, name, chunk_tokens=CHUNK)
    assert output.loss.dtype == output.divergence.dtype == torch.float32
    check(gpu, output, value, gradients, 0.02 if name in SMOOTH else 0.15)
    assert gpu["weight"].grad.dtype == torch.bfloat16


def test_a_head_of_odd_size_without_padding_rows():
    case = move(make_case(**{**SIZES, "rows": 5003}), "cpu", torch.bfloat16)
    value, gradients, _ = run_dense(case)
    gpu = move(case)
    check(gpu, run_fused(gpu, chunk_tokens=CHUNK), value, gradients, 0.03)


def test_autocast_computes_in_bfloat16_and_keeps_float32_gradients():
    case = make_flat_case()
    value, gradients, _ = run_dense(case)
    gpu = move(case)
    with torch.autocast("cuda", torch.bfloat16):
        output = run_fused(gpu, chunk_tokens=CHUNK)
    check(gpu, output, value, gradients, 0.02)
    assert gpu["weight"].grad.dtype == torch.float32


def test_float16_with_a_scaled_loss_stays_finite():
    case = move(make_flat_case(), "cpu", torch.float16)
    _, gradients, _ = run_dense(case)
    gpu = move(case)
    (run_fused(gpu, chunk_tokens=CHUNK).loss * 128).backward()
    for name in GRADIENTS:
        difference = (gpu[name].grad.cpu().double() / 128 - gradients[name]).norm()
        assert difference < 0.01 * gradients[name].norm(), name


@pytest.mark.parametrize("name", ["forward_kl", "neg_log_acceptance"])
def test_extreme_logits_stay_finite(name):
    case = make_case(**SIZES)
    with torch.no_grad():
        case["weight"] *= 1e3
    case["teacher"] *= 1e3
    gpu = move(case)
    run_fused(gpu, name, chunk_tokens=CHUNK).loss.backward()
    assert all(gpu[key].grad.isfinite().all() for key in GRADIENTS)


@pytest.mark.parametrize(
    ("method", "name"),
    [(method, name) for method in sorted(SPARSE_METHODS) for name in sorted(DIVERGENCES)
     if SPARSE_METHODS[method].describe_service(build_divergence(name))],
)  # fmt: skip
def test_sparse_teachers_equal_those_of_a_cpu(method, name):
    case = make_case(**SIZES)
    log_p, ids = case["teacher"].log_softmax(-1).topk(1 if method == "token_only" else 8)
    results = []
    for device in ("cpu", "cuda"):
        on_device = move(case, device)
        targets = make_targets(SPARSE_METHODS[method], ids, log_p).to(device)
        output = fused_linear_divergence(
            on_device["hidden"], on_device["weight"], targets, on_device["labels"], bias=on_device["bias"],
            divergence=build_divergence(name), vocab_size=case["vocab_size"], chunk_tokens=CHUNK,
        )  # fmt: skip
        output.loss.backward()
        results.append((on_device, output))
    (cpu, expected), (gpu, output) = results
    torch.testing.assert_close(output.divergence.cpu(), expected.divergence, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.alpha.cpu(), expected.alpha, rtol=1e-4, atol=1e-5, equal_nan=True)
    for key in GRADIENTS:
        assert (gpu[key].grad.cpu() - cpu[key].grad).norm() < 1e-4 * cpu[key].grad.norm(), key


def test_an_outside_divergence_is_fused_as_well():
    case = make_case(**SIZES)
    losses = []
    for device in ("cpu", "cuda"):
        on_device = move(case, device)
        output = fused_linear_divergence(
            on_device["hidden"], on_device["weight"], lambda chunk, t=on_device["teacher"]: t[chunk],
            on_device["labels"], divergence=SquaredError(), vocab_size=case["vocab_size"], chunk_tokens=CHUNK,
        )  # fmt: skip
        output.loss.backward()
        losses.append((output.loss.item(), on_device["weight"].grad.cpu()))
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-4)
    assert (losses[1][1] - losses[0][1]).norm() < 1e-4 * losses[0][1].norm()


def test_memory_stays_far_below_the_logits():
    """8,192 tokens by 65,536 ids take 2 GiB for each model's float32 logits."""
    torch.manual_seed(0)
    hidden = torch.randn(8192, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(65536, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(65536, 64, device="cuda", dtype=torch.bfloat16)
    labels = torch.zeros(8192, dtype=torch.long, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = fused_linear_divergence(
        hidden, weight, lambda chunk: hidden[chunk].detach() @ teacher.T, labels, divergence=build_divergence()
    )
    output.loss.backward()
    assert torch.cuda.max_memory_allocated() - before < 2 * 2**30
