"""Replay of parallel drafts: against decoding prompt by prompt, and against text and masks read from the start."""

import numpy as np
import pytest
import torch
from tiny import build_llama

from spec_kd.acceptance import compute_alpha, expect_rounds
from spec_kd.counting import Counting
from spec_kd.data.teacher_signal import TeacherInfo
from spec_kd.decoding import generate_speculatively
from spec_kd.evaluation import parallel_blocks, replay, score_responses
from spec_kd.parallel import ParallelDrafting, write_parallel_drafting

MASK, NUM_IDS = 8, 9  # few ids, so that untrained masks are accepted by chance
LIMIT = 14


@pytest.fixture(scope="module")
def parallel_pair():
    """(draft, target)"""
    target, draft = (build_llama(3, vocab_size=NUM_IDS) for _ in range(2))
    with torch.no_grad():
        for p in draft.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    write_parallel_drafting(draft.config, ParallelDrafting(MASK, 4))
    return draft, target


@pytest.fixture(scope="module")
def few_ids():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (12,), generator=generator).tolist()
    return [torch.randint(2, NUM_IDS, (length,), generator=generator).tolist() for length in lengths]


def read_round(draft, ids, gamma):
    """Logits of the gamma tokens that a round after `ids` drafts, float64 `(gamma, V)`."""
    with torch.no_grad():
        return draft(input_ids=torch.tensor([[*ids, *[MASK] * (gamma - 1)]])).logits[0, len(ids) - 1 :].double()


def as_rows(prompts, completions):
    return [{"prompt_ids": p, "completion_ids": c} for p, c in zip(prompts, completions, strict=True)]


@pytest.mark.parametrize("gamma", [1, 2, 4, 6])
@pytest.mark.parametrize("eos", [[], [4]])
def test_greedy_rounds_are_those_of_decoding(parallel_pair, few_ids, gamma, eos):
    draft, target = parallel_pair
    options = {"num_assistant_tokens": gamma, "max_new_tokens": LIMIT}
    text = generate_speculatively(target, draft, few_ids, eos_token_id=eos, **options)
    metrics = replay(draft, None, as_rows(few_ids, text.completion_ids), temperature=0.0, **options)
    assert metrics.target_calls.tolist() == list(map(len, text.rounds))
    assert metrics.accepted.tolist() == [sum(r.accepted for r in one) for one in text.rounds]
    drafted = [sum(r.drafted for r in one) for one in text.rounds]
    # of a draft that ends at an EOS of its own, replay does not know it
    assert (metrics.drafted >= drafted).all() if eos else metrics.drafted.tolist() == drafted
    by_position = [[sum(r.accepted > k for r in one) for k in range(gamma)] for one in text.rounds]
    assert metrics.accepted_by_position.tolist() == by_position
    assert gamma == 1 or metrics.accepted_by_position[:, 1:].sum() > 0
    assert any(ids[-1:] == eos for ids in text.completion_ids) is bool(eos)


def serve_by_vllm(draft, target, prompt, gamma, eos):
    """vLLM: the prompt's pass writes a token; every draft is whole; tokens after the end are counted if accepted."""

    def choose(ids):
        with torch.no_grad():
            return int(target(input_ids=torch.tensor([ids])).logits[0, -1].argmax())

    ids, rounds = [*prompt, choose(prompt)], []
    while len(ids) - len(prompt) < LIMIT and ids[-1] != eos:
        drafted, before = read_round(draft, ids, gamma).argmax(-1).tolist(), len(ids)
        for token in drafted:
            ids.append(choose(ids))
            if ids[-1] != token:
                break
        else:
            ids.append(choose(ids))
        rounds.append(len(ids) - before - 1)
        written = ids[len(prompt) :][:LIMIT]
        ids = prompt + (written[: written.index(eos) + 1] if eos in written else written)
    return ids[len(prompt) :], rounds


@pytest.mark.parametrize("gamma", [1, 2, 4, 6])
@pytest.mark.parametrize("eos", [-1, 4])
def test_greedy_counts_are_those_of_vllm(parallel_pair, few_ids, gamma, eos):
    draft, target = parallel_pair
    served = [serve_by_vllm(draft, target, prompt, gamma, eos) for prompt in few_ids]
    metrics = replay(
        draft, target, as_rows(few_ids, [ids for ids, _ in served]), temperature=0.0, max_new_tokens=LIMIT,
        num_assistant_tokens=gamma, serving_engine="vllm",
    )  # fmt: skip
    assert metrics.accepted.tolist() == [sum(rounds) for _, rounds in served]
    assert metrics.drafted.tolist() == [gamma * len(rounds) for _, rounds in served]
    assert metrics.drafting_rounds.tolist() == [len(rounds) for _, rounds in served]
    assert 0 < metrics.accepted.sum() < metrics.drafted.sum()


@pytest.mark.parametrize("draft_sampling", ["stochastic", "greedy", "matching"])
@pytest.mark.parametrize("max_masks", [2048, 4])
def test_scores_are_those_of_each_round_alone(parallel_pair, few_ids, tools, draft_sampling, max_masks, monkeypatch):
    monkeypatch.setattr(parallel_blocks, "MAX_MASKS", max_masks)  # several passes
    draft, target = parallel_pair
    rows = tools.write_texts(target, few_ids, LIMIT, 0.8)
    options = {"temperature": 0.8, "draft_sampling": draft_sampling, "max_new_tokens": LIMIT, "batch_size": 5}
    scores = score_responses(draft, target, rows, num_past_end_tokens=3, measure_entropy=True, **options)
    expected = {name: torch.zeros(len(rows), LIMIT, 3, dtype=torch.float64) for name in ("acceptance", "alpha")}
    for i, row in enumerate(rows):
        prompt, ids = row["prompt_ids"], row["completion_ids"]
        with torch.no_grad():
            p = target(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double()
        p = (p / 0.8).softmax(-1)
        for start in range(len(ids)):
            q = (read_round(draft, prompt + ids[:start], 3) / 0.8).softmax(-1)
            for k in range(min(3, len(ids) - start)):
                token, own, choice = ids[start + k], p[start + k], q[k].argmax()
                a, alpha = {
                    "stochastic": (min(1, q[k][token] / own[token]), compute_alpha(own, q[k])),
                    "greedy": (float(choice == token), own[choice]),
                    "matching": (q[k][token], own @ q[k]),
                }[draft_sampling]
                expected["acceptance"][i, start, k], expected["alpha"][i, start, k] = a, alpha
    for name, values in expected.items():
        torch.testing.assert_close(scores.by_start[name], values, atol=1e-5, rtol=0)
        torch.testing.assert_close(scores.values[name], values[..., 0], atol=1e-5, rtol=0)
    metrics = scores.replay(3, LIMIT)
    lengths = [len(row["completion_ids"]) for row in rows]
    for k, alpha in enumerate(metrics.alpha_per_position):
        mean = expected["alpha"][..., k].sum() / sum(max(0, length - k) for length in lengths)
        assert alpha.value == pytest.approx(mean.item(), abs=1e-5)
        assert metrics.to_metrics()[f"eval_alpha_pos_{k + 1}_t0.8"] == alpha.value


def test_sampled_rounds_are_those_of_decoding(parallel_pair):
    """z of the paired differences in calls and in accepted tokens: same text, only the draft's luck differs."""
    draft, target = parallel_pair
    prompts = torch.randint(2, NUM_IDS, (400, 4), generator=torch.Generator().manual_seed(5)).tolist()
    options = {"temperature": 0.9, "num_assistant_tokens": 4, "max_new_tokens": 16}
    text = generate_speculatively(target, draft, prompts, seed=3, eos_token_id=[], batch_size=100, **options)
    metrics = replay(draft, target, as_rows(prompts, text.completion_ids), **options)
    for observed, expected in (
        (list(map(len, text.rounds)), metrics.target_calls),
        ([sum(r.accepted for r in rounds) for rounds in text.rounds], metrics.accepted),
    ):
        differences = np.array(observed) - expected
        assert abs(differences.mean() / (differences.std(ddof=1) / np.sqrt(len(prompts)))) < 3
    assert metrics.accepted_by_position[:, 1:].sum() > 400


def test_stored_log_probs_replay_as_the_target_does(parallel_pair, few_ids, tools):
    draft, target = parallel_pair
    rows = tools.write_texts(target, few_ids, LIMIT, 1.0)
    info = TeacherInfo(None, "", "", NUM_IDS, "here", "token_only", None, None, 1.0, LIMIT, "processed", 1.0)
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        with torch.no_grad():
            log_p = target(input_ids=ids).logits[0, len(row["prompt_ids"]) - 1 : -1].log_softmax(-1)
        row["teacher_token_logprobs"] = log_p.gather(1, ids[0, len(row["prompt_ids"]) :, None])[:, 0].tolist()
        row["teacher_info"] = info.to_json()
    options = {"temperature": 1.0, "num_assistant_tokens": 3, "max_new_tokens": LIMIT}
    stored, read = replay(draft, None, rows, **options), replay(draft, target, rows, **options)
    np.testing.assert_allclose(stored.accepted, read.accepted, atol=1e-5)
    np.testing.assert_allclose(stored.target_calls, read.target_calls, atol=1e-5)


@pytest.mark.parametrize("draft_sampling", ["greedy", "stochastic"])
def test_acceptance_past_the_end_is_that_of_the_rounds_own_tokens(parallel_pair, few_ids, tools, draft_sampling):
    draft, target = parallel_pair
    rows = tools.write_texts(target, few_ids, 6, 1.0, eos_token_id=None)
    rows[1]["completion_ids"] = rows[1]["completion_ids"][:2]  # shorter than a round
    options = {"temperature": 0.8, "serving_engine": "vllm", "draft_sampling": draft_sampling}
    scores = score_responses(draft, target, rows, num_past_end_tokens=4, **options)
    assert scores.past_end.shape == (len(rows), 6, 4)
    for row, past_end in zip(rows, scores.past_end, strict=True):
        text, length = row["prompt_ids"] + row["completion_ids"], len(row["completion_ids"])
        inside = torch.arange(6)[:, None] + torch.arange(4) < length
        assert (past_end[inside] == 0).all() and (past_end[length:] == 0).all()
        if draft_sampling == "stochastic":  # one sample each: on average alpha
            continue
        for start in range(max(0, length - 3), length):
            drafted = read_round(draft, row["prompt_ids"] + row["completion_ids"][:start], 4).argmax(-1).tolist()
            ids = list(text)
            for k in range(length - start, 4):
                p = (target(input_ids=torch.tensor([ids])).logits[0, -1].double() / 0.8).softmax(-1)
                assert past_end[start, k].item() == pytest.approx(p[drafted[k]].item(), abs=1e-5)
                ids.append(drafted[k])
    if draft_sampling == "stochastic":
        assert 0.05 < scores.past_end[scores.past_end > 0].mean() < 1
        assert scores.past_end.max() <= 1


COUNTINGS = (
    Counting(),
    Counting(first_round=1, reserved_tokens=None, counts_drafted_past_end=True, end="passed"),
    Counting(first_round=1, counts_drafted_past_end=True, end="if_last"),
    Counting(first_round=1, counts_drafted_past_end=True, counts_last_round=False),
)


@pytest.mark.parametrize("counting", COUNTINGS)
@pytest.mark.parametrize("is_block", [False, True])
def test_rounds_by_start_are_those_by_token_if_starts_do_not_matter(counting, is_block):
    generator = torch.Generator().manual_seed(0)
    a, past_end, log_ratio = (torch.rand(5, n, generator=generator, dtype=torch.float64) for n in (9, 4, 9))
    lengths = torch.tensor([9, 3, 1, 7, 2])
    place = torch.arange(9)[:, None] + torch.arange(4)
    whole = torch.cat([a, torch.zeros(5, 4)], dim=1)
    by_start = whole[:, place]
    after = torch.stack([past_end[i][(place - n).clamp(0, 3)] for i, n in enumerate(lengths)])
    ratio = log_ratio.mul(4).sub(2)
    options = [{"past_end": past_end}, {"past_end": after}]
    if is_block:
        options[0]["block_log_ratio"] = ratio
        options[1]["block_log_ratio"] = torch.cat([ratio, torch.zeros(5, 4)], dim=1)[:, place]
    by_token, by_round = (
        vars(expect_rounds(values, 4, 12, lengths, counting, **own))
        for values, own in zip((a, by_start), options, strict=True)
    )
    for name, values in by_token.items():
        torch.testing.assert_close(by_round[name], values, msg=lambda text, name=name: f"{name}: {text}")


def test_rounds_by_start_are_those_of_a_loop():
    """Random acceptance by start and by token: the expectation against a sum over all ways to write the text."""
    a = torch.rand(8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def walk(i):
        """Expected rounds and accepted tokens from token i on."""
        if i >= 8:
            return 0.0, 0.0
        rounds, accepted, reach = 1.0, 0.0, 1.0
        g = min(3, 8 - i - 1)
        for k in range(g + 1):
            stop = reach * ((1 - a[i, k].item()) if k < g else 1)
            later = walk(i + k + 1)
            rounds += stop * later[0]
            accepted += stop * (k + later[1])
            reach -= stop
        return rounds, accepted

    found = expect_rounds(a[None], 3, 8)
    assert (found.target_calls.item(), found.accepted.item()) == pytest.approx(walk(0))


def test_more_drafted_tokens_than_were_scored_are_refused(parallel_pair):
    draft, _ = parallel_pair
    scores = score_responses(draft, None, [{"prompt_ids": [5], "completion_ids": [6, 7]}], temperature=0.0)
    assert scores.by_start["acceptance"].shape == (1, 2, 4)
    with pytest.raises(ValueError, match="scored for rounds of 4 drafted tokens, fewer than 5"):
        scores.replay(5, 4)
