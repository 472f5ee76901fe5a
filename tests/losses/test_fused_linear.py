"""The fused loss against the dense float64 reference and autograd, and the contract of its autograd function."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spec_kd.losses import (
    DIVERGENCES,
    build_divergence,
    dense_divergence,
    fused_linear,
    fused_linear_divergence,
    tile,
)


def make_case(seed=0, tokens=23, hidden=12, rows=40, vocab=37, bias=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    return {
        "hidden": make(tokens, hidden).requires_grad_(),
        "weight": make(rows, hidden).requires_grad_(),
        "bias": make(rows).requires_grad_() if bias else None,
        "teacher": 3 * make(tokens, vocab).float(),
        "labels": torch.randint(0, vocab, (tokens,), generator=generator),
        "vocab_size": vocab,
    }


def run_fused(case, name="forward_kl", beta=None, eta=None, **options):
    return fused_linear_divergence(
        case["hidden"],
        case["weight"],
        lambda chunk: case["teacher"][chunk],
        case["labels"],
        divergence=build_divergence(name, beta, **({} if eta is None else {"eta": eta})),
        bias=case["bias"],
        vocab_size=case["vocab_size"],
        **options,
    )


def run_dense(
    case, name="forward_kl", beta=0.5, eta=3.0, temperature=1.0, logit_scale=1.0, softcap=None, ce_weight=0.0
):
    """Value and gradients in float64 by autograd from full logits; only padding ids may be missing in `case`."""
    inputs = {
        k: case[k].detach().double().requires_grad_() for k in ("hidden", "weight", "bias") if case[k] is not None
    }
    logits = inputs["hidden"] @ inputs["weight"].T + inputs.get("bias", 0.0)
    logits = logit_scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits[:, : case["vocab_size"]]
    per_token = dense_divergence(logits, case["teacher"].double(), name, temperature=temperature, beta=beta, eta=eta)
    cross_entropy = torch.nn.functional.cross_entropy(logits, case["labels"], reduction="sum")
    total = (1 - ce_weight) * per_token.sum() + ce_weight * cross_entropy
    gradients = torch.autograd.grad(total, list(inputs.values()))
    return per_token.detach(), dict(zip(inputs, gradients, strict=True)), logits.detach()


def relative_error(actual, expected):
    return ((actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    name=st.sampled_from(sorted(DIVERGENCES)),
    tokens=st.integers(1, 40),
    hidden=st.integers(1, 20),
    vocab=st.integers(2, 60),
    padding=st.integers(0, 9),
    chunk_tokens=st.integers(1, 50),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    logit_scale=st.sampled_from([1.0, 0.25]),
    softcap=st.sampled_from([None, 5.0]),
    ce_weight=st.sampled_from([0.0, 0.3]),
    beta=st.sampled_from([0.1, 0.5, 0.8]),
    eta=st.sampled_from([1.0, 3.0]),
    bias=st.booleans(),
    tile_elements=st.sampled_from([1, 97, 2**19]),
)
def test_equals_dense_reference(
    seed, name, tokens, hidden, vocab, padding, chunk_tokens, temperature, logit_scale, softcap, ce_weight, beta, eta,
    bias, tile_elements,
):  # fmt: skip
    case = make_case(seed, tokens, hidden, vocab + padding, vocab, bias)
    options = {"temperature": temperature, "logit_scale": logit_scale, "softcap": softcap, "ce_weight": ce_weight}
    if name == "jsd":
        options["beta"] = beta
    if name == "lk_hybrid":
        options["eta"] = eta
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile, "TILE_ELEMENTS", tile_elements)
        output = run_fused(case, name, chunk_tokens=chunk_tokens, **options)
    output.loss.backward()
    value, gradients, logits = run_dense(case, name, **options)
    torch.testing.assert_close(output.divergence.double(), value, rtol=1e-4, atol=2e-5)
    for key, expected in gradients.items():
        torch.testing.assert_close(
            case[key].grad.double(), expected, rtol=2e-3, atol=2e-5 * max(1.0, expected.abs().max().item())
        )
    q = torch.softmax(logits / temperature, -1)
    p = torch.softmax(case["teacher"].double() / temperature, -1)
    torch.testing.assert_close(output.alpha.double(), torch.minimum(p, q).sum(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.entropy.double(), -(q * q.log()).sum(-1), rtol=1e-4, atol=1e-4)


def test_padding_rows_take_no_part():
    case = make_case(rows=50, vocab=37)
    with torch.no_grad():
        case["weight"][37:] = 1e3  # would own the softmax
    output = run_fused(case)
    output.loss.backward()
    assert torch.equal(case["weight"].grad[37:], torch.zeros(13, 12))
    assert torch.equal(case["bias"].grad[37:], torch.zeros(13))
    value, *_ = run_dense(case)
    torch.testing.assert_close(output.divergence.double(), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [37, 38, 40, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_aligned_as_for_a_gpu_change_nothing(monkeypatch, rows, dtype):
    """With less, as much and more padding in the head than the alignment asks for. It would own the softmax."""
    outputs = []
    for alignment in (1, 8):
        monkeypatch.setattr(
            fused_linear, "choose_row_width", lambda vocab_size, _, a=alignment: -(-vocab_size // a) * a
        )
        case = make_case(rows=rows, vocab=37, dtype=dtype)
        with torch.no_grad():
            case["weight"][37:] = 1e3
        output = run_fused(case, chunk_tokens=10)
        output.loss.backward()
        outputs.append((output.divergence, *(case[name].grad for name in ("hidden", "weight", "bias"))))
    for plain, aligned in zip(*outputs, strict=True):
        torch.testing.assert_close(aligned, plain, rtol=1e-5, atol=1e-6)
    assert (case["weight"].grad[37:] == 0).all() and (case["bias"].grad[37:] == 0).all()


def test_rows_on_a_gpu_start_at_multiples_of_16_bytes():
    assert [fused_linear.choose_row_width(size, "cuda") for size in (151665, 151936)] == [151672, 151936]
    assert fused_linear.choose_row_width(151665, "cpu") == 151665


def test_teacher_is_asked_for_small_chunks_only(monkeypatch):
    monkeypatch.setattr(fused_linear, "CHUNK_ELEMENTS", 37 * 5)
    case, sizes = make_case(), []

    def teacher(chunk):
        sizes.append(chunk.stop - chunk.start)
        return case["teacher"][chunk]

    fused_linear_divergence(
        case["hidden"], case["weight"], teacher, case["labels"], divergence=build_divergence(), vocab_size=37
    )
    assert sizes == [5, 5, 5, 5, 3]  # 23 tokens in 5 even chunks


def test_incoming_gradient_scales_and_retain_graph_repeats():
    case = make_case()
    loss = run_fused(case).loss
    (once,) = torch.autograd.grad(loss, case["hidden"], retain_graph=True)
    (scaled,) = torch.autograd.grad(loss * 65536 / 7, case["hidden"], retain_graph=True)
    (again,) = torch.autograd.grad(loss, case["hidden"])
    assert torch.equal(once, again)
    torch.testing.assert_close(scaled, once * (65536 / 7))


def test_backward_without_retained_graph_makes_no_copy_of_the_head():
    """The stored gradient itself becomes `.grad`: a copy would be a second float32 head."""
    case = make_case(bias=False)
    loss = run_fused(case).loss
    stored = loss.grad_fn.saved_tensors[1].data_ptr()
    (loss / 7).backward()
    assert case["weight"].grad.data_ptr() == stored
    _, gradients, _ = run_dense(case)
    assert relative_error(case["weight"].grad * 7, gradients["weight"]) < 1e-4


def test_second_order_is_refused():
    case = make_case()
    (gradient,) = torch.autograd.grad(run_fused(case).loss, case["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad|trying to differentiate twice"):
        gradient.sum().backward()


def test_no_gradient_is_formed_that_nobody_needs(monkeypatch):
    calls = []
    original = fused_linear._accumulate_gradients
    monkeypatch.setattr(
        fused_linear,
        "_accumulate_gradients",
        lambda *a: calls.append([gradient is None for gradient in a[-1]]) or original(*a),
    )
    with torch.no_grad():
        assert not run_fused(make_case()).loss.requires_grad
    assert calls == []
    case = make_case(bias=False)
    case["weight"].requires_grad_(False)  # frozen head, as under LoRA
    run_fused(case).loss.backward()
    assert calls == [[False, True, True]] and case["weight"].grad is None
    _, gradients, _ = run_dense(case)
    assert relative_error(case["hidden"].grad, gradients["hidden"]) < 1e-4


def test_no_tokens_give_zero_loss_that_stays_in_the_graph():
    case = make_case(tokens=0)
    output = run_fused(case)
    output.loss.backward()
    assert output.loss.item() == 0.0
    assert torch.equal(case["weight"].grad, torch.zeros_like(case["weight"]))
    assert case["hidden"].grad.shape == (0, 12)


def test_tied_head_accumulates_once():
    """The same matrix as embedding and head: its gradient is the sum of both uses."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(37, 12, generator=generator).requires_grad_()
    ids = torch.randint(0, 37, (23,), generator=generator)
    case = make_case(rows=37, bias=False)
    case["hidden"], case["weight"] = weight[ids].tanh(), weight
    run_fused(case).loss.backward()
    reference = weight.detach().double().requires_grad_()
    dense_divergence(reference[ids].tanh() @ reference.T, case["teacher"].double(), "forward_kl").sum().backward()
    assert relative_error(weight.grad, reference.grad) < 1e-4


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.005)])
def test_half_precision_inputs(name, dtype, tolerance):
    """The reference sees the same rounded inputs: what is left is the rounding of the matrix products."""
    case = make_case(dtype=dtype)
    output = run_fused(case, name)
    output.loss.backward()
    value, gradients, _ = run_dense(case, name)
    assert output.loss.dtype == torch.float32
    assert relative_error(output.loss, value.sum()) < tolerance
    for key, expected in gradients.items():
        assert case[key].grad.dtype == dtype
        assert relative_error(case[key].grad, expected) < tolerance


def test_autocast_uses_its_dtype_and_keeps_float32_gradients():
    case = make_case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = run_fused(case)
    output.loss.backward()
    value, gradients, _ = run_dense(case)
    assert case["weight"].grad.dtype == torch.float32
    assert 0 < relative_error(output.loss, value.sum()) < 0.03
    assert relative_error(case["weight"].grad, gradients["weight"]) < 0.05


def test_float16_gradients_below_its_smallest_number_survive():
    """A draft close to its teacher: dL/dlogits of about 1e-9, which float16 cannot hold, lifted by a GradScaler."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randint(0, 2, (4, 8), generator=generator).half().requires_grad_()
    weight = torch.randint(-1, 2, (4096, 8), generator=generator).half().requires_grad_()  # exact in float16
    teacher = (hidden.float() @ weight.float().T).detach() + 0.1 * torch.randn(4, 4096, generator=generator)
    case = {"hidden": hidden, "weight": weight, "bias": None, "teacher": teacher, "vocab_size": 4096}
    case["labels"] = torch.zeros(4, dtype=torch.long)
    _, gradients, _ = run_dense(case, temperature=100.0)
    assert gradients["weight"].abs().max() < torch.finfo(torch.float16).smallest_normal / 100
    (gradient,) = torch.autograd.grad(run_fused(case, temperature=100.0).loss * 2.0**30, weight)
    assert relative_error(gradient.double() / 2.0**30, gradients["weight"]) < 0.01


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"ce_weight": 1.0}, ValueError, "BlackBoxSFTTrainer"),
        ({"ce_weight": -0.1}, ValueError, "ce_weight"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        run_fused(make_case(), **options)


def test_bad_tensors_are_refused():
    case = make_case()
    case["vocab_size"] = 41
    with pytest.raises(ValueError, match="41 does not fit a head of 40 rows"):
        run_fused(case)
    case = make_case(bias=False)
    case["weight"] = torch.zeros(40, 12, dtype=torch.int8)
    with pytest.raises(TypeError, match="quantized"):
        run_fused(case)
    case = make_case()
    case["teacher"] = torch.zeros(23, 36)
    with pytest.raises(ValueError, match="Teacher logits"):
        run_fused(case)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_extreme_logits_give_finite_values_and_gradients(name):
    """Logits of +-1e4, one-hot teachers on and off the draft's choice, identical distributions: float32 in and out."""
    hidden = torch.tensor([[1e2], [-1e2], [0.0], [1e2]]).requires_grad_()
    weight = torch.tensor([[1e2], [-1e2], [0.0], [1.0], [50.0]]).requires_grad_()
    teacher = torch.full((4, 5), -1e4)
    teacher[0, 0] = teacher[1, 0] = teacher[2, 3] = 1e4
    teacher[3] = (hidden[3] @ weight.T).detach()  # identical
    labels = torch.zeros(4, dtype=torch.long)
    output = fused_linear_divergence(
        hidden, weight, lambda chunk: teacher[chunk], labels, divergence=build_divergence(name), ce_weight=0.1
    )
    output.loss.backward()
    for tensor in (output.loss, output.divergence, output.alpha, output.entropy, hidden.grad, weight.grad):
        assert torch.isfinite(tensor).all()
    assert output.divergence[3].item() == pytest.approx(0.0, abs=1e-6)
    assert output.alpha[3].item() == pytest.approx(1.0, abs=1e-6)
    if name == "neg_log_acceptance":  # exact where alpha underflows, and the gradient still pulls
        reference = dense_divergence((hidden.double() @ weight.double().T).detach(), teacher.double(), name)
        torch.testing.assert_close(output.divergence.double(), reference, rtol=1e-4, atol=1e-5)


def test_neg_log_acceptance_pulls_where_the_tvd_is_flat():
    hidden = torch.tensor([[30.0]])
    weight = torch.tensor([[10.0], [-10.0], [0.0]])
    teacher = torch.tensor([[-300.0, 300.0, 100.0]])
    gradients = {}
    for name in ("tvd", "neg_log_acceptance"):
        leaf = weight.clone().requires_grad_()
        output = fused_linear_divergence(
            hidden, leaf, lambda chunk: teacher[chunk], torch.tensor([1]), divergence=build_divergence(name)
        )
        output.loss.backward()
        gradients[name] = leaf.grad.abs().max().item()
        assert output.alpha.item() == 0.0
    assert gradients["tvd"] == 0.0
    assert gradients["neg_log_acceptance"] == pytest.approx(30.0, rel=1e-3)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_a_step_along_the_gradient_raises_acceptance(name):
    """Every divergence is here to make drafts be accepted: 150 steps must do so."""
    torch.manual_seed(0)
    case = make_case(seed=3, tokens=32, hidden=16, rows=24, vocab=24, bias=False)
    case["teacher"] = case["teacher"].clone()
    optimizer = torch.optim.Adam([case["weight"], case["hidden"]], lr=0.05)
    alphas = []
    for _ in range(150):
        output = run_fused(case, name)
        alphas.append(output.alpha.mean().item())
        optimizer.zero_grad()
        (output.loss / 32).backward()
        optimizer.step()
    assert alphas[-1] > 0.5 > 0.25 > alphas[0]
