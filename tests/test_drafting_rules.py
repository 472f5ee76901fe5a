"""Drafts that end early, block verification and PEARL: against decoding of every text, followed outcome by outcome."""

import itertools
from functools import cache

import numpy as np
import pytest
import torch

from spec_kd.acceptance import EarlyEnds, LookedUp, expect_rounds
from spec_kd.pearl import expect_parallel_steps

V, LENGTH, GAMMA = 3, 5, 3


@cache
def distributions(context):
    """p and q after a context: anything, but the same each time."""
    generator = np.random.default_rng([7, *context])
    p, q = generator.dirichlet(np.ones(V)), generator.dirichlet(np.ones(V))
    return p, 0.6 * p + 0.4 * q


def is_sure(context, token, rule):
    q = distributions(context)[1]
    confidence = q[token] if rule["of_token"] else q.max()
    return confidence >= rule["threshold"]


def list_drafts(context, room, rule):
    """(tokens, probability) of every draft."""
    found, going = [], [((), 1.0)]
    while going:
        tokens, chance = going.pop()
        if len(tokens) == room or (
            rule and tokens and rule["keeps"] and not is_sure((*context, *tokens[:-1]), tokens[-1], rule)
        ):
            found.append((tokens, chance))
            continue
        if rule and not rule["keeps"] and not is_sure((*context, *tokens), 0, rule):
            found.append((tokens, chance))
            continue
        q = distributions((*context, *tokens))[1]
        if rule and rule["greedy"]:
            q = np.eye(V)[q.argmax()]
        going += [((*tokens, token), chance * q[token]) for token in range(V) if q[token] > 0]
    return found


def list_verified(context, draft, verification, greedy):
    """(accepted, next token, probability) of every outcome, by the definitions of the papers."""
    pairs = [distributions((*context, *draft[:k])) for k in range(len(draft) + 1)]
    pairs = [(p, np.eye(V)[q.argmax()] if greedy else q) for p, q in pairs]
    ratios = [pairs[k][0][token] / pairs[k][1][token] for k, token in enumerate(draft)]
    if verification == "token":
        accepts = [min(1.0, ratio) for ratio in ratios]
        exactly = [np.prod(accepts[:k]) * (1 - accepts[k]) for k in range(len(draft))] + [np.prod(accepts)]
        scale = [1.0] * len(draft)
    else:
        scale = [1.0]
        for ratio in ratios:
            scale.append(min(1.0, scale[-1] * ratio))
        left = [np.maximum(b * p - q, 0).sum() for b, (p, q) in zip(scale, pairs, strict=True)]
        h = [1.0] + [
            left[k] / (left[k] + 1 - scale[k]) if left[k] + 1 > scale[k] else 1.0 for k in range(1, len(draft))
        ]
        h += [scale[-1]] if draft else []
        exactly = [h[k] * np.prod([1 - one for one in h[k + 1 :]]) for k in range(len(draft) + 1)]
    outcomes = []
    for k, chance in enumerate(exactly):
        p, q = pairs[k]
        after = p if k == len(draft) else np.maximum(scale[k] * p - q, 0)
        if chance > 0:
            outcomes += [(k, token, chance * share) for token, share in enumerate(after / after.sum())]
    return outcomes


def follow(verification="token", rule=None):
    """For every text: its probability, and that times the expected calls, accepted and drafted tokens."""
    greedy = bool(rule and rule["greedy"])

    @cache
    def go_on(context):
        if len(context) == LENGTH:
            return {context: np.array([1.0, 0, 0, 0])}
        texts = {}
        for draft, chance in list_drafts(context, min(GAMMA, LENGTH - len(context) - 1), rule):
            for accepted, token, share in list_verified(context, draft, verification, greedy):
                for text, (mass, *sums) in go_on((*context, *draft[:accepted], token)).items():
                    round_ = np.array([1, accepted, len(draft)]) * mass
                    add = chance * share * np.array([mass, *(np.array(sums) + round_)])
                    texts[text] = texts.get(text, 0) + add
        return texts

    return go_on(())


def read(texts):
    """Log-ratio, and the draft's probabilities, at every token of every text."""
    pairs = [[distributions(text[:k]) for k in range(LENGTH)] for text in texts]
    p, q = (torch.tensor(np.array([[pair[side] for pair in row] for row in pairs])) for side in (0, 1))
    tokens = torch.tensor(texts)
    at = [side.gather(-1, tokens[..., None])[..., 0] for side in (p, q)]
    return tokens, q, (at[1] / at[0]).log(), at[1]


@pytest.mark.parametrize("verification", ["token", "block"])
def test_both_verifications_write_the_targets_texts_in_the_expected_rounds(verification):
    followed = follow(verification)
    texts = list(itertools.product(range(V), repeat=LENGTH))
    mass, calls, accepted, drafted = np.array([followed[text] for text in texts]).T
    expected = [np.prod([distributions(text[:k])[0][token] for k, token in enumerate(text)]) for text in texts]
    np.testing.assert_allclose(mass, expected)  # lossless
    _, _, log_ratio, _ = read(texts)
    block = log_ratio if verification == "block" else None
    rounds = expect_rounds(log_ratio.clamp(max=0).exp(), GAMMA, LENGTH, block_log_ratio=block)
    np.testing.assert_allclose(rounds.target_calls, calls / mass)  # for each of the 243 texts by itself
    np.testing.assert_allclose(rounds.accepted, accepted / mass)
    np.testing.assert_allclose(rounds.drafted, drafted / mass)
    np.testing.assert_allclose(rounds.known_drafts.sum(-1), calls / mass)
    assert not rounds.open_drafts.any()


def test_a_block_is_accepted_for_longer():
    calls = {one: sum(values[1] for values in follow(one).values()) for one in ("token", "block")}
    assert calls["block"] < calls["token"] - 0.03


RULES = {
    "llama.cpp, greedy": {"greedy": True, "keeps": False, "of_token": False},
    "llama.cpp, sampled": {"greedy": False, "keeps": False, "of_token": False},
    "transformers, greedy": {"greedy": True, "keeps": True, "of_token": False},
    "transformers, sampled": {"greedy": False, "keeps": True, "of_token": True},
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("threshold", [0.45, 0.6])
def test_drafts_that_end_early(name, threshold):
    rule = {**RULES[name], "threshold": threshold}
    followed = follow(rule=rule)
    texts = [text for text in itertools.product(range(V), repeat=LENGTH) if text in followed]
    mass, calls, accepted, drafted = np.array([followed[text] for text in texts]).T
    tokens, q, log_ratio, q_of_text = read(texts)
    acceptance = (q.argmax(-1) == tokens).double() if rule["greedy"] else log_ratio.clamp(max=0).exp()
    confidence = q_of_text if rule["of_token"] else q.amax(-1)
    early_ends = EarlyEnds(confidence >= threshold, rule["keeps"], knows_refused=rule["greedy"])
    rounds = expect_rounds(acceptance, GAMMA, LENGTH, early_ends=early_ends)
    np.testing.assert_allclose(rounds.target_calls, calls / mass)
    np.testing.assert_allclose(rounds.accepted, accepted / mass)
    number = torch.arange(GAMMA + 1)
    most = (rounds.known_drafts * number).sum(-1) + GAMMA * rounds.open_drafts.sum(-1)
    assert (rounds.drafted.numpy() <= drafted / mass + 1e-9).all() and (drafted / mass <= most.numpy() + 1e-9).all()
    np.testing.assert_allclose(rounds.known_drafts.sum(-1) + rounds.open_drafts.sum(-1), calls / mass)
    assert rounds.drafted.sum() < most.sum() or name == "transformers, greedy"  # there is something unknown
    assert rounds.target_calls.sum() > expect_rounds(acceptance, GAMMA, LENGTH).target_calls.sum()


def test_a_kept_token_that_is_refused_may_end_its_draft():
    """Two tokens, both refused: the draft is sure of the first, so that only the second round's length is known."""
    ends = EarlyEnds(torch.tensor([[True, False]]), keeps_token=True, knows_refused=True)
    rounds = expect_rounds(torch.zeros(1, 2), 4, 10, early_ends=ends)
    assert rounds.open_drafts.tolist() == [[1, 0, 0, 0]] and rounds.known_drafts.tolist() == [[0, 1, 0, 0, 0]]
    unseen = expect_rounds(torch.zeros(1, 2), 4, 10, early_ends=EarlyEnds(ends.is_sure, True, knows_refused=False))
    assert unseen.open_drafts.tolist() == [[2, 0, 0, 0]]


def test_a_draft_that_is_never_unsure_is_as_long_as_any():
    acceptance = torch.rand(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = EarlyEnds(torch.ones(4, 9, dtype=torch.bool), keeps_token=False, knows_refused=True)
    plain, early = expect_rounds(acceptance, 3, 12), expect_rounds(acceptance, 3, 12, early_ends=ends)
    torch.testing.assert_close(early.target_calls, plain.target_calls)
    torch.testing.assert_close(early.accepted, plain.accepted)


def test_lengths_do_not_depend_on_what_stands_after_a_text():
    generator = torch.Generator().manual_seed(1)
    acceptance, confidence = (torch.rand(1, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    log_ratio = torch.randn(1, 6, generator=generator, dtype=torch.float64)
    alone, padded = (
        expect_rounds(
            torch.nn.functional.pad(acceptance, (0, pad)),
            3,
            20,
            torch.tensor([6]),
            early_ends=EarlyEnds(torch.nn.functional.pad(confidence, (0, pad)) >= 0.3, False, True),
            block_log_ratio=torch.nn.functional.pad(log_ratio, (0, pad)),
        )
        for pad in (0, 5)
    )
    for name in ("target_calls", "accepted", "drafted", "known_drafts", "open_drafts"):
        torch.testing.assert_close(getattr(alone, name), getattr(padded, name))


def test_looked_up_drafts_do_not_end_early():
    found = LookedUp(torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.long))
    ends = EarlyEnds(torch.ones(1, 2, dtype=torch.bool), True, True)
    with pytest.raises(ValueError, match="Pass `looked_up` or `early_ends`, not both"):
        expect_rounds(torch.ones(1, 2), 2, 4, looked_up=found, early_ends=ends)


@pytest.mark.parametrize("gamma", [1, 2, 4])
def test_parallel_steps_are_those_of_a_simulation(gamma):
    """The loop of the paper's code: what is verified in a step, and what is thrown away."""
    generator = np.random.default_rng(0)
    a, runs = generator.uniform(0.2, 0.95, size=9), 20_000
    counts = np.zeros(2)
    for _ in range(runs):
        done, is_pre = 0, True  # tokens that are verified
        while done < len(a):
            counts[0 if is_pre else 1] += 1
            for _ in range(1 if is_pre else gamma):
                if done >= len(a):
                    break
                is_accepted = generator.random() < a[done]
                done += 1
                is_pre = not is_accepted
                if not is_accepted:
                    break
    steps = expect_parallel_steps(torch.tensor(a)[None], gamma, torch.tensor([9]))
    assert [one.item() for one in steps] == pytest.approx((counts / runs).tolist(), rel=0.02)


def test_parallel_steps_by_hand():
    """All accepted: one token by the first step, then gamma by each. All refused: one by each."""
    lengths = torch.tensor([9, 5])
    first, second = expect_parallel_steps(torch.tensor([[1.0] * 9, [0.0] * 5 + [1.0] * 4]), 4, lengths)
    assert first.tolist() == [1, 5] and second.tolist() == [2, 0]
