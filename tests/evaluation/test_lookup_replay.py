"""Lookup drafts: the finders against loops of the engines' sources, and their replay against served text."""

import random

import pytest
import torch
from tiny import build_llama
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from spec_kd.evaluation.assisted import RecordedRun
from spec_kd.evaluation.lookup_replay import replay_lookup
from spec_kd.evaluation.response_replay import score_responses
from spec_kd.serving.lookup import CompletionStore, propose_after_last, propose_after_longest, propose_before_eos


def make_text(seed, length=60, ids=4):
    generator = random.Random(seed)
    return [generator.randrange(256, 256 + ids) for _ in range(length)]  # ids whose bytes overlap


def search_like_vllm(ids, k, min_n, max_n):
    """Every n-gram at every place, in the order that vLLM prefers."""
    for n in range(max_n, min_n - 1, -1):
        for j in range(len(ids) - n):
            if ids[j : j + n] == ids[-n:]:
                return ids[j + n : j + n + k]
    return []


def search_like_llama_cpp(ids, n, m):
    """`common_ngram_simple_draft`, line by line."""
    tokens, pattern = ids[:-1], ids[-n:]
    if len(tokens) <= n + m + 1:
        return []
    for j in range(len(tokens) - n - 1, 0, -1):
        if tokens[j : j + n] == pattern:
            copied = tokens[j + n : j + n + min(m, len(tokens) - (j + n))]
            return copied if len(copied) >= n else []
    return []


@pytest.mark.parametrize("seed", range(40))
def test_finders_are_those_of_the_engines(seed):
    ids = make_text(seed, length=10 + seed)
    assert propose_after_longest(ids, 5, 2, 4) == search_like_vllm(ids, 5, 2, 4)
    assert propose_after_last(ids, 99, 2, 6) == search_like_llama_cpp(ids, 2, 6)
    generator = PromptLookupCandidateGenerator(
        eos_token_id=torch.tensor([257]), num_output_tokens=6, max_matching_ngram_size=2, max_length=10_000
    )
    candidates = generator.get_candidates(torch.tensor([ids]))[0][0, len(ids) :].tolist()
    assert propose_before_eos(ids, 6, 2, [257]) == candidates


def serve(text, first, limit, eos_at_end, propose, k):
    """vLLM's loop on a text that is known: drafted, accepted and rounds, without what lies after the end."""
    prompt, completion = text
    at, drafted, accepted, rounds = first, 0, 0, 0
    while at < len(completion):
        draft = propose(prompt + completion[:at], k)
        matched = 0
        while matched < len(draft) and at + matched < len(completion) and draft[matched] == completion[at + matched]:
            matched += 1
        drafted, accepted, rounds = drafted + len(draft), accepted + matched, rounds + bool(draft)
        at += matched + 1
    return drafted, accepted, rounds


def test_replay_counts_what_a_server_would():
    texts = [(make_text(seed, 40), make_text(seed + 100, 30)) for seed in range(8)]
    rows = [{"prompt_ids": prompt, "completion_ids": completion} for prompt, completion in texts]

    def propose(ids, k):
        return propose_after_longest(ids, k, 2, 4)

    metrics = replay_lookup(
        rows, "vllm", max_new_tokens=30, temperature=0.0, propose=propose, num_lookup_tokens=4, num_assistant_tokens=1
    )
    expected = [serve(text, 1, 30, False, propose, 4) for text in texts]
    assert list(zip(metrics.drafted, metrics.accepted, metrics.drafting_rounds, strict=True)) == expected
    assert 0 < metrics.accepted.sum() < metrics.drafted.sum()
    assert (metrics.tokens == 29).all()


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("limit", [14, 24])
def test_replay_counts_what_transformers_looks_up(limit, ends):
    """`generate(prompt_lookup_num_tokens=...)` itself; it drafts past its limit, but not for a last token alone."""
    target = build_llama(3, layers=4).eval()
    prompts = [make_text(seed, 12, ids=3) for seed in range(12)]
    options = {"do_sample": False, "max_new_tokens": limit, "prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 2}
    eos = [RecordedRun(target, prompts[0], 0, **options).completion[2]] if ends else []
    runs = [RecordedRun(target, prompt, 0, eos_token_id=eos or None, **options) for prompt in prompts]
    rows = [{"prompt_ids": prompt, "completion_ids": run.completion} for prompt, run in zip(prompts, runs, strict=True)]
    metrics = replay_lookup(
        rows,
        "transformers",
        max_new_tokens=limit,
        temperature=0.0,
        propose=lambda ids, k: propose_before_eos(ids, k, 2, eos),
        num_lookup_tokens=4,
    )
    assert metrics.drafted.tolist() == [sum(one.drafted for one in run.rounds) for run in runs]
    assert metrics.accepted.tolist() == [sum(one.accepted for one in run.rounds) for run in runs]
    assert metrics.target_calls.tolist() == [len(run.rounds) for run in runs]
    assert 0 < metrics.accepted.sum() < metrics.drafted.sum()


def test_tokens_found_after_the_end_count_where_the_engine_counts_them():
    rows = [{"prompt_ids": [7, 8, 9, 5, 6, 7], "completion_ids": [8, 9]}]
    common = {"max_new_tokens": 2, "temperature": 0.0, "num_lookup_tokens": 4}

    def propose(ids, k):
        return propose_after_longest(ids, k, 1, 2)

    for continuation, accepted in (([5, 6, 1], 3), ([5, 1, 1], 2), ([1, 1, 1], 1)):
        metrics = replay_lookup(rows, "vllm", propose=propose, continuations=[continuation], **common)
        assert (metrics.accepted.item(), metrics.drafted.item()) == (accepted, 4)
    assert replay_lookup(rows, "vllm", propose=propose, **common).accepted.item() == 1


def test_a_draft_takes_over_where_nothing_is_found(prompts, tools):
    target, draft = build_llama(3, layers=4), build_llama(4)
    rows = tools.write_texts(target, prompts, 12, 0.0)
    scores = score_responses(draft, target, rows, temperature=0.0, serving_engine="llama.cpp")
    common = {"max_new_tokens": 12, "temperature": 0.0, "scores": scores, "num_assistant_tokens": 3}
    never = replay_lookup(rows, "llama.cpp", propose=lambda ids, k: [], **common)
    alone = scores.replay(3, 12)
    assert (never.accepted == alone.accepted).all()
    assert (never.drafted == alone.drafted).all()
    known = {tuple(row["prompt_ids"]): row["completion_ids"] for row in rows}

    def cheat(ids, k):
        for prompt, completion in known.items():
            if tuple(ids[: len(prompt)]) == prompt:
                return completion[len(ids) - len(prompt) :][:k]
        raise AssertionError

    perfect = replay_lookup(rows, "llama.cpp", propose=cheat, num_lookup_tokens=4, **common)
    assert perfect.mean_acceptance_length.value > 4 > alone.mean_acceptance_length.value
    assert (perfect.target_calls <= alone.target_calls).all()


def test_a_store_knows_earlier_completions():
    store = CompletionStore([[1, 2, 3, 4, 5, 6], [9, 2, 3, 7, 7]], min_ngram=2, max_ngram=3)
    assert store.propose([0, 1, 2, 3], 2) == [4, 5]  # the longer n-gram
    assert store.propose([0, 8, 2, 3], 2) == [7, 7]  # the later completion
    assert store.propose([2, 3, 0, 2, 3], 2) == [0, 2]  # the text itself first
    assert store.propose([0, 8, 8], 2) == []


def test_an_engine_without_lookup_is_refused():
    with pytest.raises(ValueError, match="What SGLang looks up is not known"):
        replay_lookup([{"prompt_ids": [1], "completion_ids": [2]}], "sglang", max_new_tokens=4, temperature=0.0)
