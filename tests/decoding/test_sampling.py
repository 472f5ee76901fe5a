"""Sampled text must be distributed exactly as the target's, whatever the draft; and cost what replay expects."""

from collections import Counter

import numpy as np
import pytest
import torch
from tiny import build_llama

from spec_kd.decoding import acceptance_sampling, generate_speculatively
from spec_kd.evaluation import replay
from spec_kd.parallel import ParallelDrafting, write_parallel_drafting

EOS, PROMPT, NUM_TEXTS = 1, [2, 3], 20_000
OPTIONS = {"temperature": 0.8, "num_assistant_tokens": 2, "max_new_tokens": 3, "eos_token_id": EOS}


@pytest.fixture(params=["autoregressive", "parallel"])
def small_pair(request):
    """(target, draft) over five ids; two models that disagree."""
    target, draft = (build_llama(seed, vocab_size=5, hidden_size=16, initializer_range=0.3) for seed in (6, 7))
    if request.param == "parallel":
        write_parallel_drafting(draft.config, ParallelDrafting(mask_token_id=4, num_tokens=2))
    return target, draft


def cut(p, top_k, top_p):
    """The most likely of a few probabilities, by number and then by mass, as a distribution."""
    order = p.argsort(descending=True)[:top_k]
    kept = p[order] / p[order].sum()
    order = order[: int((kept.cumsum(0) - kept < top_p).sum())]
    return torch.zeros_like(p).scatter(0, order, p[order] / p[order].sum())


def enumerate_texts(target, top_k=5, top_p=1.0):
    """Probability of every text, from the target's own softmax along every path."""
    probabilities = {}

    def extend(ids, probability):
        if len(ids) == OPTIONS["max_new_tokens"] or (ids and ids[-1] == EOS):
            probabilities[tuple(ids)] = probability
            return
        with torch.no_grad():
            logits = target(input_ids=torch.tensor([[*PROMPT, *ids]])).logits[0, -1].double()
        for token, p in enumerate(cut((logits / OPTIONS["temperature"]).softmax(-1), top_k, top_p).tolist()):
            if p:
                extend([*ids, token], probability * p)

    extend([], 1.0)
    return probabilities


def compare(texts, probabilities):
    """Standardized chi-square: about N(0, 1) if the texts follow the probabilities. Rare texts share a cell."""
    counts = Counter(map(tuple, texts))
    assert counts.keys() <= probabilities.keys()
    cells = [(counts[text], len(texts) * p) for text, p in probabilities.items()]
    common = [cell for cell in cells if cell[1] >= 10]
    rare = [cell for cell in cells if cell[1] < 10]
    if sum(expected for _, expected in rare) >= 10:
        common.append(tuple(map(sum, zip(*rare, strict=True))))
    observed, expected = np.array(common, dtype=float).T
    freedom = len(common) - 1
    assert freedom > 20
    return (((observed - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


def write(small_pair, draft_sampling, **truncation):
    return generate_speculatively(
        *small_pair, [PROMPT] * NUM_TEXTS, draft_sampling=draft_sampling, batch_size=5000, **OPTIONS, **truncation
    )


@pytest.mark.parametrize("draft_sampling", ["stochastic", "greedy"])
def test_truncated_texts_are_distributed_as_the_targets(small_pair, draft_sampling):
    truncation = {"top_k": 4, "top_p": 0.95}
    probabilities = enumerate_texts(small_pair[0], **truncation)
    assert sum(probabilities.values()) == pytest.approx(1) and len(probabilities) < len(enumerate_texts(small_pair[0]))
    assert abs(compare(write(small_pair, draft_sampling, **truncation).completion_ids, probabilities)) < 3.5


@pytest.mark.parametrize("draft_sampling", ["stochastic", "greedy"])
def test_texts_are_distributed_as_the_targets(small_pair, draft_sampling, monkeypatch):
    probabilities = enumerate_texts(small_pair[0])
    assert sum(probabilities.values()) == pytest.approx(1)
    text = write(small_pair, draft_sampling)
    assert abs(compare(text.completion_ids, probabilities)) < 3.5
    rounds = Counter(record for rounds in text.rounds for record in rounds)
    assert len(rounds) > 5 and sum(map(len, text.rejected_positions)) > NUM_TEXTS / 10

    # the comparison can tell: no residual, then no rejection
    take_p = lambda p, q, drafted, limits, accepted: p[torch.arange(len(p)), accepted]  # noqa: E731
    take_all = lambda p, q, drafted, limits, uniforms: limits.clone()  # noqa: E731
    for name, broken in (("weigh_next_tokens", take_p), ("count_accepted", take_all)):
        with monkeypatch.context() as patch:
            patch.setattr(acceptance_sampling, name, broken)
            assert compare(write(small_pair, draft_sampling).completion_ids, probabilities) > 20


def as_rows(prompts, text):
    return [{"prompt_ids": p, "completion_ids": c} for p, c in zip(prompts, text.completion_ids, strict=True)]


def count(text, value):
    return np.array([sum(map(value, rounds)) for rounds in text.rounds])


@pytest.fixture
def many_prompts():
    return torch.randint(2, 97, (200, 4), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.mark.parametrize(("temperature", "wrong_temperature"), [(0.7, 0.49), (1.0, 0.7)])
def test_rounds_agree_with_replay(target, many_prompts, tools, temperature, wrong_temperature):
    draft = tools.add_noise(target, 0.04)
    options = {"temperature": temperature, "num_assistant_tokens": 4, "max_new_tokens": 16}
    # no EOS: a draft that stops at one drafts less than replay counts
    text = generate_speculatively(target, draft, many_prompts, seed=3, eos_token_id=[], **options)
    rows = as_rows(many_prompts, text)
    replayed = replay(draft, target, rows, **options)

    def compare_with(figures):
        """z of the paired differences in calls and in accepted tokens: same text, only the draft's luck differs."""
        differences = np.stack(
            [
                count(text, lambda record: 1) - figures.target_calls,
                count(text, lambda record: record.accepted) - figures.accepted,
            ]
        )
        return differences.mean(axis=1) / (differences.std(axis=1, ddof=1) / np.sqrt(len(rows)))

    assert (np.abs(compare_with(replayed)) < 3).all()
    block_efficiency = count(text, lambda record: record.emitted).sum() / count(text, lambda record: 1).sum()
    assert block_efficiency == pytest.approx(replayed.block_efficiency.value, rel=0.03)
    wrong = replay(draft, target, rows, **{**options, "temperature": wrong_temperature})
    assert (np.abs(compare_with(wrong)) > 4).all()


def test_rounds_of_a_greedy_draft_are_those_of_replay(many_prompts, tools):
    """Given the text nothing is left to chance: a token was accepted exactly where the draft's choice is the text."""
    target = build_llama(1, vocab_size=97, initializer_range=0.3, tie=False)
    draft = tools.add_noise(target, 0.02)
    options = {"temperature": 0.3, "num_assistant_tokens": 4, "max_new_tokens": 16, "draft_sampling": "greedy"}
    text = generate_speculatively(target, draft, many_prompts, **options)
    replayed = replay(draft, target, as_rows(many_prompts, text), **options)
    np.testing.assert_array_equal(count(text, lambda record: 1), replayed.target_calls)
    np.testing.assert_array_equal(count(text, lambda record: record.accepted), replayed.accepted)
    for i, positions in enumerate(text.rejected_positions):
        ids = many_prompts[i] + text.completion_ids[i]
        choice = tools.compute_logits(draft, ids).argmax(-1)
        assert all(choice[4 + position - 1] != ids[4 + position] for position in positions)
    assert 1.2 < replayed.block_efficiency.value < 4
