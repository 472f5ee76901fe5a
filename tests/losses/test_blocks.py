"""Losses over blocks against dense float64 references and plain loops."""

import pytest
import torch

from spec_kd.losses import (
    Blocks,
    BlockWeighting,
    DPace,
    ExpectedLength,
    ForwardKL,
    PositionWeights,
    RepeatedTargets,
    TargetConfidence,
    TokenLoss,
    TotalVariation,
    block_linear_divergence,
    dense_divergence,
    dense_rejected_length,
    fused_linear_divergence,
)

KEPT = [[0, 1, 2], [0, 1], [0], [0, 1, 2]]
"""Positions of four blocks that are scored; a fifth block has none."""


class DenseTargets:
    def __init__(self, logits):
        self.logits = logits
        self.num_computed = 0

    def __call__(self, chunk):
        return self.logits[chunk]

    def __getitem__(self, rows):
        self.num_computed += len(rows)
        return DenseTargets(self.logits[rows])


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    block, position = torch.tensor([(s, k) for s, kept in enumerate(KEPT) for k in kept]).T
    tokens = len(block)
    return {
        "hidden": torch.randn(tokens, 6, generator=generator).requires_grad_(),
        "weight": torch.randn(31, 6, generator=generator).requires_grad_(),
        "teacher": 2 * torch.randn(tokens, 31, generator=generator),
        "labels": torch.randint(0, 31, (tokens,), generator=generator),
        "blocks": Blocks(block, position, num_blocks=5, num_available=torch.tensor([4, 4, 3])),
    }


SCALE = torch.tensor([4 / 4, 4 / 3, 3 / 2], dtype=torch.float64)


def run(case, divergence, weighting, **kwargs):
    targets, loss = DenseTargets(case["teacher"]), TokenLoss(divergence, weighting=weighting)
    output = block_linear_divergence(
        case["hidden"], case["weight"], targets, case["labels"], loss, case["blocks"], **kwargs
    )
    return output, torch.autograd.grad(output.loss, (case["hidden"], case["weight"]))


def to_dense(case):
    """Hidden states and head in float64, and the logits of the scored tokens."""
    inputs = [case[name].detach().double().requires_grad_() for name in ("hidden", "weight")]
    return inputs, inputs[0] @ inputs[1].T


def assert_equal_gradients(gradients, value, inputs):
    for ours, theirs in zip(gradients, torch.autograd.grad(value, inputs), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)


def test_constant_token_weights_weigh_value_and_gradient(case):
    weights = torch.rand(len(case["labels"]))
    for divergence, ce_weight in (("forward_kl", 0.0), ("forward_kl", 0.3)):
        output = fused_linear_divergence(
            case["hidden"], case["weight"], DenseTargets(case["teacher"]), case["labels"], divergence=ForwardKL(),
            ce_weight=ce_weight, token_weights=weights, chunk_tokens=4,
        )  # fmt: skip
        inputs, logits = to_dense(case)
        per_token = (1 - ce_weight) * dense_divergence(logits, case["teacher"].double(), divergence)
        per_token = per_token + ce_weight * torch.nn.functional.cross_entropy(logits, case["labels"], reduction="none")
        value = (per_token * weights).sum()
        torch.testing.assert_close(output.loss.double(), value, rtol=1e-5, atol=1e-6)
        assert_equal_gradients(torch.autograd.grad(output.loss, (case["hidden"], case["weight"])), value, inputs)


def test_expected_length_has_the_gradient_of_the_dense_reference(case):
    output, gradients = run(case, TotalVariation(), ExpectedLength())
    inputs, logits = to_dense(case)
    draft, teacher = (torch.zeros(5, 3, 31, dtype=torch.float64) for _ in range(2))
    is_scored = torch.zeros(5, 3, dtype=torch.bool)
    index = (case["blocks"].block, case["blocks"].position)
    is_scored[index] = True
    draft, teacher = draft.index_put(index, logits), teacher.index_put(index, case["teacher"].double())
    value = dense_rejected_length(draft, teacher, is_scored, SCALE)
    torch.testing.assert_close(output.loss.double(), value, rtol=1e-5, atol=1e-6)
    assert_equal_gradients(gradients, value, inputs)


def test_dense_reference_passes_gradcheck_and_is_the_plain_sum():
    generator = torch.Generator().manual_seed(1)
    draft, teacher = (torch.randn(2, 3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    is_scored, scale = torch.tensor([[True, True, True], [True, False, False]]), torch.tensor([1.0, 2.0, 3.0]).double()
    draft.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: dense_rejected_length(z, teacher, is_scored, scale), draft)
    p, q = teacher.softmax(-1), draft.detach().softmax(-1)
    a = [[sum(min(p[s, k, v], q[s, k, v]) for v in range(5)) for k in range(3)] for s in range(2)]
    expected = (1 - a[0][0]) + 2 * (1 - a[0][0] * a[0][1]) + 3 * (1 - a[0][0] * a[0][1] * a[0][2]) + (1 - a[1][0])
    torch.testing.assert_close(dense_rejected_length(draft.detach(), teacher, is_scored, scale), expected)


@pytest.mark.parametrize("weighting", [PositionWeights([2, 1, 0.5], [1, 0.7, 0.49]), DPace(0.5), TargetConfidence()])
def test_weights_equal_plain_loops(case, weighting: BlockWeighting):
    inputs, logits = to_dense(case)
    blocks, teacher = case["blocks"], case["teacher"].double()
    acceptance = torch.minimum(logits.softmax(-1), teacher.softmax(-1)).sum(-1).detach()
    confidence = torch.rand(len(acceptance), dtype=torch.float64)
    place = {(int(s), int(k)): i for i, (s, k) in enumerate(zip(blocks.block, blocks.position, strict=True))}
    expected = torch.zeros(len(acceptance), dtype=torch.float64)
    for (s, j), i in place.items():
        if weighting.name == "position":
            expected[i] = [2, 1, 0.5][j] / (2 + 0.7 + 0.245)
        elif weighting.name == "d_pace":
            for k in KEPT[s][j:]:
                product = SCALE[k]
                for m in range(k + 1):
                    product = product * (0.5 + 0.5 * acceptance[place[s, m]])
                expected[i] += product
        else:
            expected[i] = 1
            for m in range(j):
                expected[i] *= confidence[place[s, m]]
    output, gradients = run(case, ForwardKL(), weighting, confidence=confidence.float())
    value = (dense_divergence(logits, teacher, "forward_kl") * expected).sum()
    torch.testing.assert_close(output.loss.double(), value, rtol=1e-4, atol=1e-6)
    assert_equal_gradients(gradients, value, inputs)


def test_positions_that_are_left_out_at_random_leave_the_mean_of_the_expected_length_as_it_is():
    """Each subset of two of three blocks has the last position once: the mean of the estimates is the whole sum."""
    acceptance = torch.tensor([[0.9, 0.5], [0.8, 0.25], [0.3, 0.7]])
    whole = (acceptance[:, 0] * (1 + acceptance[:, 1])).sum()
    estimates = []
    for left_out in range(3):
        pairs = [(s, k) for s in range(3) for k in range(2) if (s, k) != (left_out, 1)]
        block, position = torch.tensor(pairs).T
        blocks = Blocks(block, position, num_blocks=3, num_available=torch.tensor([3, 3]))
        estimates.append(blocks.compute_accepted(acceptance[block, position]).sum())
    torch.testing.assert_close(torch.stack(estimates).mean(), whole)


def test_repeated_targets_compute_each_token_once_per_chunk():
    targets = DenseTargets(torch.randn(4, 7))
    index = torch.tensor([0, 0, 1, 2, 2, 2, 3])
    repeated = RepeatedTargets(targets, index)
    assert torch.equal(repeated(slice(1, 6)), targets.logits[index[1:6]])
    assert targets.num_computed == 3
    mask = torch.tensor([True, False, True, False, True, False, True])
    assert torch.equal(repeated[mask](slice(0, 4)), targets.logits)
