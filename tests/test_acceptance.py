"""Checked against the recursion of the definition, a simulation of the rounds, and cases done by hand."""

import itertools
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spec_kd.acceptance import (
    LookedUp,
    check_sampling,
    compute_alpha,
    compute_greedy_draft_alpha,
    compute_token_acceptance,
    expect_rounds,
    match_tokens,
)
from spec_kd.counting import Counting


def count_calls_by_recursion(a, gamma, max_new_tokens):
    """C(0), as the definition writes it."""
    n = len(a)

    @lru_cache
    def calls(i):
        if i >= n:
            return 0.0
        g = min(gamma, max_new_tokens - i - 1)
        total = 1.0
        for k in range(g + 1):
            if i + k < n:
                stops = 1 - a[i + k] if k < g else 1.0
                total += np.prod(a[i : i + k]) * stops * calls(i + k + 1)
        return total

    return calls(0)


def simulate_rounds(a, gamma, max_new_tokens, rng):
    """Calls, accepted and drafted by position, drafting rounds: one run of speculative decoding over a text."""
    n, i, calls, drafting = len(a), 0, 0, 0
    accepted, drafted = np.zeros(gamma), np.zeros(gamma)
    while i < n:
        g = min(gamma, max_new_tokens - i - 1, n - i)
        calls, drafting = calls + 1, drafting + (g > 0)
        drafted[:g] += 1
        k = 0
        while k < g and rng.random() < a[i + k]:
            accepted[k] += 1
            k += 1
        i += k + 1
    return calls, accepted, drafted, drafting


@settings(max_examples=60, deadline=None)
@given(
    a=st.lists(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0])), min_size=1, max_size=14),
    gamma=st.integers(1, 6),
    room=st.integers(0, 4),
)
def test_target_calls_equal_the_recursion(a, gamma, room):
    rounds = expect_rounds(torch.tensor(a, dtype=torch.float64), gamma, len(a) + room)
    assert rounds.target_calls.item() == pytest.approx(count_calls_by_recursion(tuple(a), gamma, len(a) + room))
    assert rounds.accepted.item() == pytest.approx(rounds.accepted_by_position.sum().item())
    assert (rounds.accepted_by_position <= rounds.drafted_by_position + 1e-12).all()
    assert rounds.drafting_rounds.item() == pytest.approx(rounds.drafted_by_position[0, 0].item())


@pytest.mark.parametrize("room", [0, 1, 20])
def test_all_sums_equal_a_simulation(room):
    rng = np.random.default_rng(0)
    a = rng.uniform(0.2, 1, size=17)
    rounds = expect_rounds(torch.from_numpy(a), 4, 17 + room)
    runs = [simulate_rounds(a, 4, 17 + room, rng) for _ in range(4000)]
    for position, (expected, column) in enumerate(
        zip(
            (rounds.target_calls, rounds.accepted_by_position, rounds.drafted_by_position, rounds.drafting_rounds),
            zip(*runs, strict=True),
            strict=True,
        )
    ):
        samples = np.stack(column).reshape(4000, -1)
        error = samples.std(axis=0) / np.sqrt(4000) + 1e-9
        assert (np.abs(samples.mean(axis=0) - expected.numpy().ravel()) < 4 * error).all(), position


def count_accepted(bits, gamma, limit, counting):
    """Accepted tokens of one run, in which drafted token i of the text (and past its end) is accepted if `bits[i]`."""
    n, i, total = len(bits) - (gamma if counting.end == "passed" else 0), counting.first_round, 0
    while i < n:
        g = gamma if counting.reserved_tokens is None else max(0, min(gamma, limit - i - counting.reserved_tokens))
        k = 0
        while k < g and i + k < len(bits) and bits[i + k]:
            k += 1
        is_counted = counting.counts_last_round or i + k + 1 < n
        total += is_counted * (k - (counting.end == "if_last" and i + k == n and k < g))
        i += k + 1
    return total


@pytest.mark.parametrize(
    "counting",
    [
        Counting(),
        Counting(first_round=1, counts_drafted_past_end=True, end="if_last"),
        Counting(first_round=1, reserved_tokens=None, counts_drafted_past_end=True, end="passed"),
        Counting(first_round=1, counts_last_round=False),
    ],
)
@pytest.mark.parametrize(("length", "gamma", "room"), [(1, 2, 3), (6, 3, 0), (8, 2, 3), (7, 4, 9)])
def test_the_variance_of_the_accepted_tokens_is_that_of_all_outcomes(counting, length, gamma, room):
    rng = np.random.default_rng(length)
    past = gamma * (counting.end == "passed")
    a = rng.uniform(0.2, 1, size=length + past)
    a[length // 2] = 1.0  # certain tokens too
    mean = square = 0.0
    for bits in itertools.product((0, 1), repeat=length + past):
        chance = np.where(bits, a, 1 - a).prod()
        count = count_accepted(bits, gamma, length + room, counting)
        mean, square = mean + chance * count, square + chance * count**2
    past_end = torch.from_numpy(a[None, length:]) if past else None
    rounds = expect_rounds(torch.from_numpy(a[:length]), gamma, length + room, counting=counting, past_end=past_end)
    assert rounds.accepted.item() == pytest.approx(mean)
    assert rounds.accepted_variance.item() == pytest.approx(square - mean**2, abs=1e-9)
    assert (square - mean**2 > 0.1) == (length > 1)
    accepted = rounds.accepted_by_position
    assert accepted.sum().item() == pytest.approx(mean) and (accepted >= 0).all()


def test_what_was_looked_up_leaves_nothing_to_chance():
    found = LookedUp(torch.tensor([[0, 3, 0, 0, 2]]), torch.tensor([[0, 2, 0, 0, 1]]))
    rounds = expect_rounds(torch.full((5,), 0.5), 2, 9, looked_up=found, has_draft=False)
    assert (rounds.accepted.item(), rounds.accepted_variance.item()) == (3, 0)


def test_a_padded_batch_equals_its_texts_one_by_one():
    texts = [torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (1, 7, 12)]
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=1.0)
    batch = expect_rounds(padded, 3, 12, torch.tensor([1, 7, 12]))
    for i, text in enumerate(texts):
        single = expect_rounds(text, 3, 12)
        for name in vars(single):
            torch.testing.assert_close(getattr(batch, name)[i : i + 1], getattr(single, name), atol=1e-12, rtol=0)


def test_hand_cases():
    # 5 tokens, limit 8: [2 accepted + bonus], [2 accepted, the second is the EOS: no bonus]
    rounds = expect_rounds(torch.ones(5), 2, 8)
    assert (rounds.target_calls.item(), rounds.accepted.item(), rounds.drafted.item()) == (2, 4, 4)
    # limit 4: [2 + bonus], then one token is left and nothing is drafted
    rounds = expect_rounds(torch.ones(4), 2, 4)
    assert (rounds.target_calls.item(), rounds.drafted.item(), rounds.drafting_rounds.item()) == (2, 2, 1)
    # nothing is ever accepted; drafted tokens behind the last token do not count: 2 + 2 + 1
    rounds = expect_rounds(torch.zeros(3), 2, 8)
    assert (rounds.target_calls.item(), rounds.accepted.item(), rounds.drafted.item()) == (3, 0, 5)
    # the second token is rejected: [1 + correction], [1 accepted EOS]
    rounds = expect_rounds(torch.tensor([1.0, 0.0, 1.0]), 2, 8)
    assert rounds.accepted_by_position.tolist() == [[2, 0]]
    assert rounds.drafted_by_position.tolist() == [[2, 1]]
    # one token only
    rounds = expect_rounds(torch.ones(1), 3, 1)
    assert (rounds.target_calls.item(), rounds.drafted.item(), rounds.drafting_rounds.item()) == (1, 0, 0)


def test_float32_acceptance_is_replayed_in_float64():
    assert expect_rounds(torch.rand(5), 2, 5).target_calls.dtype == torch.float64


def test_alpha_equals_one_minus_total_variation():
    generator = torch.Generator().manual_seed(0)
    log_p, log_q = (torch.randn(3, 4, 9, dtype=torch.float64, generator=generator).log_softmax(-1) for _ in range(2))
    variation = 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)
    torch.testing.assert_close(compute_alpha(log_p.exp(), log_q.exp()), 1 - variation)
    torch.testing.assert_close(compute_alpha(log_p.exp(), log_p.exp()), torch.ones(3, 4, dtype=torch.float64))
    # disjoint supports
    assert compute_alpha(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])) == 0


def test_alpha_is_the_mean_token_acceptance_under_the_target():
    generator = torch.Generator().manual_seed(1)
    log_p, log_q = (torch.randn(9, dtype=torch.float64, generator=generator).log_softmax(-1) for _ in range(2))
    mean = (log_p.exp() * compute_token_acceptance(log_p, log_q)).sum()
    torch.testing.assert_close(compute_alpha(log_p.exp(), log_q.exp()), mean)


def test_greedy_drafting():
    generator = torch.Generator().manual_seed(2)
    log_p, log_q = (torch.randn(5, 9, dtype=torch.float64, generator=generator).log_softmax(-1) for _ in range(2))
    choice = log_q.argmax(-1)
    expected = sum(log_p.exp()[:, v] * match_tokens(choice, torch.full((5,), v)) for v in range(9))
    torch.testing.assert_close(compute_greedy_draft_alpha(log_p, choice), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: expect_rounds(torch.ones(3), 0, 5), "num_assistant_tokens.* is 0"),
        (lambda: expect_rounds(torch.ones(3), 2, 2), "3 tokens, more than `max_new_tokens=2`"),
        (lambda: expect_rounds(torch.ones(1, 3), 2, 5, torch.tensor([0])), "no tokens"),
        (lambda: expect_rounds(torch.tensor([0.5, 1.5]), 2, 5), r"outside \[0, 1\]"),
        (lambda: expect_rounds(torch.tensor([0.5, torch.nan]), 2, 5), r"outside \[0, 1\]"),
        (lambda: check_sampling(-0.1), "`temperature` is -0.1"),
        (lambda: check_sampling(float("nan")), "`temperature` is nan"),
        (lambda: check_sampling(1.0, "beam"), "'beam', but must be one of stochastic, greedy"),
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
