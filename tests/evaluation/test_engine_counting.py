"""Replay counts as each engine counts: against loops that decode as the engines' sources do."""

import random

import pytest
import torch
from engine_loops import pick, serve
from tiny import build_llama

from spec_kd.acceptance import expect_rounds
from spec_kd.counting import Counting
from spec_kd.evaluation.response_replay import replay, score_responses
from spec_kd.serving import find_serving_engine

LIMIT = 14


@pytest.fixture(scope="module")
def pair():
    target = build_llama(3, layers=4)
    draft = build_llama(3, layers=4)
    with torch.no_grad():
        for p in draft.parameters():
            p.add_(0.035 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return draft, target


@pytest.mark.parametrize("engine", ["llama.cpp", "vllm", "sglang", "mlx-lm", "openvino"])
@pytest.mark.parametrize("gamma", [1, 4])
@pytest.mark.parametrize("ends", [True, False])
def test_greedy_counts_are_those_of_the_engine(pair, prompts, engine, gamma, ends):
    draft, target = pair
    prompts = [list(ids) for ids in prompts[:6]]
    eos = serve(engine, draft, target, prompts[0], gamma, -1, LIMIT)[0][6] if ends else -1
    served = [serve(engine, draft, target, prompt, gamma, eos, LIMIT) for prompt in prompts]
    rows = [{"prompt_ids": p, "completion_ids": text} for p, (text, _) in zip(prompts, served, strict=True)]
    metrics = replay(
        draft, target, rows, temperature=0.0, max_new_tokens=LIMIT, num_assistant_tokens=gamma, serving_engine=engine
    )
    rounds = [rounds for _, rounds in served]
    assert metrics.accepted.tolist() == [sum(accepted for _, accepted in one) for one in rounds]
    counting = find_serving_engine(engine).counting
    drafted = torch.tensor([sum(count for count, _ in one) for one in rounds])
    if counting.counts_last_round:
        assert metrics.drafting_rounds.tolist() == [len(one) for one in rounds]
    if engine == "openvino" and ends:  # a draft that left the text may end at an EOS of its own
        assert (torch.as_tensor(metrics.drafted) >= drafted).all()
    elif counting.counts_drafted_past_end:
        assert metrics.drafted.tolist() == drafted.tolist()
    at_position = [[sum(accepted > k for _, accepted in one) for k in range(gamma)] for one in rounds]
    assert metrics.accepted_by_position.tolist() == at_position
    assert 0 < metrics.accepted.sum() < metrics.drafted.sum()  # both outcomes occur
    assert any(text[-1] == eos for text, _ in served) is ends


def test_past_the_end_needs_the_target(pair):
    draft, _ = pair
    rows = [{"prompt_ids": [1, 2], "completion_ids": [3]}]
    with pytest.raises(ValueError, match="vLLM counts tokens that are accepted after the end"):
        replay(draft, None, rows, temperature=0.0, max_new_tokens=4, serving_engine="vllm")


@pytest.mark.parametrize("sampling", ["greedy", "stochastic"])
def test_acceptance_past_the_end_is_that_of_the_drafts_own_tokens(pair, prompts, tools, sampling):
    draft, target = pair
    rows = tools.write_texts(target, prompts, 6, 1.0, eos_token_id=None)
    options = {"temperature": 0.8, "serving_engine": "vllm", "draft_sampling": sampling}
    scores = score_responses(draft, target, rows, num_past_end_tokens=4, **options)
    assert scores.past_end.shape == (len(rows), 4)
    for row, past_end in zip(rows, scores.past_end, strict=True):
        ids = row["prompt_ids"] + row["completion_ids"]
        if sampling == "greedy":
            for k in range(4):
                drafted = pick(draft, ids)
                p = (target(input_ids=torch.tensor([ids])).logits[0, -1, :261].double() / 0.8).softmax(-1)
                assert past_end[k].item() == pytest.approx(p[drafted].item(), abs=1e-5)
                ids = [*ids, drafted]
    if sampling == "stochastic":  # one sample each: on average alpha
        assert 0.05 < scores.past_end.mean() < 1


def test_a_sample_that_has_to_match_is_accepted_with_its_own_probability(pair, prompts, tools):
    draft, target = pair
    rows = tools.write_texts(target, prompts, 6, 1.0, eos_token_id=None)
    scores = score_responses(draft, target, rows, temperature=1.0, serving_engine="mlx-lm")
    ids = torch.tensor([rows[0]["prompt_ids"] + rows[0]["completion_ids"]])
    start = len(rows[0]["prompt_ids"]) - 1
    p, q = (m(input_ids=ids).logits[0, start:-1, :261].double().softmax(-1) for m in (target, draft))
    torch.testing.assert_close(scores.acceptance[0], q.gather(1, ids[0, start + 1 :, None])[:, 0], atol=1e-5, rtol=0)
    assert scores.alpha_sum[0].item() == pytest.approx((p * q).sum().item(), abs=1e-4)


def test_a_draft_is_cut_to_the_ids_that_llama_cpp_samples_from(pair, prompts, tools):
    draft, target = pair
    rows = tools.write_texts(target, prompts, 6, 1.0, eos_token_id=None)
    scores = score_responses(
        draft, target, rows, temperature=1.0, serving_engine="llama.cpp", draft_sampling="stochastic"
    )
    ids = torch.tensor([rows[0]["prompt_ids"] + rows[0]["completion_ids"]])
    start = len(rows[0]["prompt_ids"]) - 1
    p, logits = (m(input_ids=ids).logits[0, start:-1, :261].double() for m in (target, draft))
    q = logits.masked_fill(logits < logits.topk(10).values[:, -1:], -torch.inf).softmax(-1)
    expected = torch.minimum(p.softmax(-1), q).sum()
    assert scores.alpha_sum[0].item() == pytest.approx(expected.item(), abs=1e-4)


def test_expected_counts_are_the_mean_of_many_runs():
    """Random acceptance, all conventions: the expectation against a simulation."""
    generator = random.Random(0)
    a, past = ([0.9 * generator.random() for _ in range(count)] for count in (9, 3))
    for counting in (
        Counting(first_round=1, reserved_tokens=None, counts_drafted_past_end=True, end="passed"),
        Counting(first_round=1, counts_drafted_past_end=True, end="if_last"),
        Counting(reserved_tokens=0),
        Counting(first_round=1, counts_drafted_past_end=True, counts_last_round=False),
    ):
        rounds = expect_rounds(torch.tensor(a), 3, 12, counting=counting, past_end=torch.tensor([past]))
        totals = [0, 0, 0]
        runs = 20_000
        chain = a + past
        for _ in range(runs):
            i = counting.first_round
            while i < 9:
                g = 3 if counting.reserved_tokens is None else min(3, 12 - i - counting.reserved_tokens)
                k = 0
                while k < g and generator.random() < chain[i + k]:
                    if counting.end != "passed" and i + k == 8:
                        k += counting.end == "counted" or k + 1 == g
                        i = 9
                        break
                    k += 1
                i += k + 1
                is_counted = counting.counts_last_round or i < 9
                totals = [totals[0] + 1, totals[1] + k * is_counted, totals[2] + g * is_counted]
        assert rounds.target_calls.item() == pytest.approx(totals[0] / runs, rel=0.03)
        assert rounds.accepted.item() == pytest.approx(totals[1] / runs, rel=0.03)
        if counting.counts_drafted_past_end:
            assert rounds.drafted.item() == pytest.approx(totals[2] / runs, rel=0.03)
