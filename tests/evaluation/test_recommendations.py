import dataclasses
import json
import shlex

import numpy as np
import pytest
import torch

from spec_kd.evaluation.cost import ServingCosts
from spec_kd.evaluation.metrics import Interval
from spec_kd.evaluation.recommendations import (
    Candidate,
    Way,
    choose,
    collect_settings,
    find_candidates,
    list_thresholds,
    list_ways,
    recommend,
)
from spec_kd.evaluation.report.recommended import ALONE, BLOCK, FIXED, PARALLEL, THRESHOLD, DraftingPlan
from spec_kd.evaluation.response_replay import ResponseScores
from spec_kd.serving import find_serving_engine

COSTS = ServingCosts(cost_ratio=0.1, verify_cost={1: 1.2, 2: 1.3, 4: 1.5})


def make_scores(acceptance, sampling="greedy", temperature=0.0, **values):
    values = {"acceptance": acceptance, "alpha": acceptance, **values}
    lengths = torch.full((len(acceptance),), acceptance.shape[1])
    return ResponseScores(values, lengths, temperature, sampling, has_exact_alpha=True)


def make_way(method=FIXED, gamma=2, known=(0, 0, 10), at_least=(0, 0), **facts):
    known, at_least = (np.array([values], dtype=float) for values in (known, at_least))
    return Way(method, gamma, np.array([10.0]), known, at_least, **facts)


def make_candidate(method=FIXED, speedup=1.5, sampling="greedy", temperature=0.0, batch_size=1, spread=0.0, **facts):
    """Twenty prompts of ten tokens each."""
    plan = DraftingPlan(
        setting="x", temperature=temperature, batch_size=batch_size, draft_sampling=sampling, method=method,
        num_assistant_tokens=3, threshold=0.0, block_efficiency=Interval(2, 1.9, 2.1), drafted=(3.0, 3.0),
        predicted_speedup=Interval(speedup, speedup, speedup), highest_speedup=speedup,
    )  # fmt: skip
    cost = 10 / speedup * (1 + spread * np.array([1, -1] * 10))
    return Candidate(dataclasses.replace(plan, **facts), np.full(20, 10.0), cost)


def test_a_fixed_number_of_tokens_costs_what_the_model_says():
    least, most = make_way().price(COSTS)
    assert least == most == pytest.approx([10 * (2 * 0.1 + 1.3)])
    assert make_way().count_drafted() == (2, 2)


def test_a_draft_that_ends_early_costs_a_step_more_where_its_last_token_is_dropped():
    known = (4, 3, 3)  # rounds with no, one, two drafted tokens
    dropping = make_way(THRESHOLD, known=known, keeps_token=False).price(COSTS)[0]
    assert dropping == pytest.approx([4 * (0.1 + 1) + 3 * (0.2 + 1.2) + 3 * (0.2 + 1.3)])
    keeping = make_way(THRESHOLD, known=known).price(COSTS)[0]
    assert keeping == pytest.approx([4 * 1 + 3 * (0.1 + 1.2) + 3 * (0.2 + 1.3)])


def test_unknown_lengths_are_bounded():
    way = make_way(THRESHOLD, known=(0, 0, 4), at_least=(6, 0))
    least, most = way.price(COSTS)
    assert least == pytest.approx([4 * 1.5 + 6 * 1.3]) and most == pytest.approx([10 * 1.5])
    assert way.count_drafted() == (1.4, 2)
    # verifying two may be cheaper than verifying one
    odd = ServingCosts(cost_ratio=0.0, verify_cost={1: 1.4, 2: 1.1})
    least, most = way.price(odd)
    assert least == pytest.approx([11]) and most == pytest.approx([4 * 1.1 + 6 * 1.4])


def test_whole_rounds_bound_the_step_for_a_token_that_is_dropped():
    whole = ServingCosts(round_cost={1: 1.4, 2: 1.6})
    least, most = make_way(THRESHOLD, known=(4, 3, 3), keeps_token=False).price(whole)
    assert least == pytest.approx([4 * 1 + 3 * 1.4 + 3 * 1.6]) and most == pytest.approx([4 * 1.4 + 3 * 1.6 + 3 * 1.6])
    assert make_way().price(whole) == (pytest.approx([16]), pytest.approx([16]))
    # with c they are known like parts, and so is what drafting while the target verifies would cost
    known = ServingCosts(cost_ratio=0.1, round_cost={1: 0.1 + 1.2, 2: 0.2 + 1.3})
    way = make_way(THRESHOLD, known=(4, 3, 3), keeps_token=False)
    for priced in (*way.price(known), *way.price(COSTS)):
        assert priced == pytest.approx([4 * 1.1 + 3 * (0.2 + 1.2) + 3 * 1.5])
    assert make_way(PARALLEL, first_steps=np.array([4.0])).price(known)[0] == pytest.approx([4 * 1 + 6 * 1.2])
    with pytest.raises(ValueError, match="not known what drafting costs"):
        make_way(PARALLEL, first_steps=np.array([4.0])).price(whole)


def test_while_the_target_verifies_a_round_takes_the_longer_of_the_two():
    way = make_way(PARALLEL, first_steps=np.array([4.0]))
    assert way.price(COSTS)[0] == pytest.approx([4 * 1 + 6 * 1.2])  # the target
    slow = ServingCosts(cost_ratio=0.7, verify_cost={2: 1.3}, round_overhead=0.5)
    assert way.price(slow)[1] == pytest.approx([10 * (1.4 + 0.5)])  # the draft


def test_the_ways_by_hand():
    """One text of 6 tokens, the third and the sixth refused; the draft is sure of all but the third."""
    acceptance = torch.tensor([[1.0, 1, 0, 1, 1, 0]], dtype=torch.float64)
    scores = make_scores(acceptance, confidence=torch.tensor([[0.95, 0.9, 0.1, 0.9, 0.9, 0.9]], dtype=torch.float64))
    by_gamma = {4: scores.replay(4, 100)}
    ways = {
        (way.method, way.threshold): way for way in list_ways(scores, by_gamma, find_serving_engine("llama.cpp"), 100)
    }
    assert set(ways) == {(FIXED, 0.0), (PARALLEL, 0.0), *((THRESHOLD, t / 10) for t in range(2, 10))}
    fixed = ways[FIXED, 0.0]
    assert fixed.calls == [2] and fixed.known.tolist() == [[0, 0, 0, 0, 2]]
    early = ways[THRESHOLD, 0.5]  # the first round ends before the third token, the second at the refused sixth
    assert (
        early.calls == [2] and early.known.tolist() == [[0, 0, 1, 0, 0]] and early.at_least.tolist() == [[0, 0, 1, 0]]
    )
    assert early.price(COSTS)[0] == pytest.approx([(0.3 + 1.3) + (0.4 + 1.4)])  # 3 tokens: 4 steps
    kept = list_thresholds(scores, 4, find_serving_engine("transformers").early_end, 100, [0.5])[0]
    assert kept.calls == [2] and kept.known.tolist() == [[0, 0, 0, 1, 0]] and kept.at_least.tolist() == [[0, 0, 1, 0]]
    never = list_thresholds(scores, 4, find_serving_engine("llama.cpp").early_end, 100, [0.99])[0]
    assert never.calls == [6] and never.known.tolist() == [[6, 0, 0, 0, 0]]
    parallel = ways[PARALLEL, 0.0]  # first, second; the third refused; again
    assert parallel.calls == [4] and parallel.first_steps == [2]


def test_blocks_are_for_sampled_drafts_of_engines_that_have_them():
    generator = torch.Generator().manual_seed(0)
    log_ratio = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    scores = make_scores(log_ratio.clamp(max=0).exp(), "stochastic", 1.0, log_ratio=log_ratio)
    by_gamma = {gamma: scores.replay(gamma, 8) for gamma in (1, 4)}
    ways = list_ways(scores, by_gamma, find_serving_engine("vllm"), 8)
    blocks = [way for way in ways if way.method == BLOCK]
    assert [way.gamma for way in blocks] == [1, 4]
    np.testing.assert_allclose(blocks[0].calls, by_gamma[1].target_calls)  # a block of one token is a token
    assert (blocks[1].calls < by_gamma[4].target_calls).all()
    for engine, one in (("llama.cpp", scores), ("vllm", dataclasses.replace(scores, draft_sampling="greedy"))):
        assert not [way for way in list_ways(one, by_gamma, find_serving_engine(engine), 8) if way.method == BLOCK]


def test_each_way_is_taken_at_its_fastest():
    acceptance = torch.tensor([[1.0, 1, 1, 0] * 5] * 4, dtype=torch.float64)
    scores = make_scores(acceptance, confidence=acceptance)
    by_gamma = {gamma: scores.replay(gamma, 100) for gamma in (1, 2, 3, 4, 8)}
    ways = list_ways(scores, by_gamma, find_serving_engine("llama.cpp"), 100)
    large = ServingCosts(round_cost={1: 2.9, 4: 5.6}, batch_size=32)
    plans = [one.plan for one in find_candidates("greedy", scores, ways, by_gamma[1].tokens, [COSTS, large])]
    found = {(plan.batch_size, plan.method): plan for plan in plans}
    assert set(found) == {(1, FIXED), (1, THRESHOLD), (1, PARALLEL), (32, FIXED)}  # the parts of a round are not known
    fixed = found[1, FIXED]
    speedups = {g: COSTS.predict_speedup(by_gamma[g].block_efficiency.value, g) for g in (1, 2, 3, 4)}
    assert fixed.num_assistant_tokens == max(speedups, key=speedups.get) == 3
    assert fixed.predicted_speedup.value == pytest.approx(speedups[3]) == pytest.approx(fixed.highest_speedup)
    assert fixed.drafted == (3, 3)
    early = found[1, THRESHOLD]  # knows the refused ones: no round is cut short, and one more step is taken for it
    assert early.num_assistant_tokens == 3 and early.predicted_speedup.value == pytest.approx(speedups[3])


def test_the_default_stays_unless_another_plan_is_clearly_faster():
    engine = find_serving_engine("llama.cpp")
    default, early = make_candidate(), make_candidate(THRESHOLD, 1.6, threshold=0.4)
    assert choose([early, default], engine) is early
    assert choose([make_candidate(THRESHOLD, 1.501, spread=0.3), default], engine) is default  # by chance
    assert choose([make_candidate(THRESHOLD, 1.4), default], engine) is default
    what_if = make_candidate(PARALLEL, 5.0)
    assert choose([what_if, default], engine) is default
    sampled = make_candidate(speedup=1.7, sampling="stochastic", temperature=1.0)
    greedy = make_candidate(speedup=1.5, temperature=1.0)
    assert choose([greedy, sampled], engine) is sampled
    assert choose([make_candidate(speedup=1.7, sampling="matching", temperature=1.0), greedy], engine) is greedy
    assert choose([make_candidate(sampling="matching", temperature=1.0)], engine) is None


def test_greedy_or_probabilistic_is_a_flag_of_the_engine():
    candidates = [
        make_candidate(speedup=1.5, temperature=1.0),
        make_candidate(speedup=1.7, sampling="stochastic", temperature=1.0),
        make_candidate(BLOCK, 1.9, sampling="stochastic", temperature=1.0),
    ]
    advice = recommend(candidates[:2], find_serving_engine("llama.cpp"), "me/draft", "org/target")
    (one,) = advice.configurations
    assert one.title == "temperature 1, batch size 1" and one.flags == ["--spec-draft-sampling probabilistic"]
    words = shlex.split(one.command.splitlines()[-1])
    assert words[-4:] == ["--spec-draft-n-max", "3", "--spec-draft-sampling", "probabilistic"]
    (one,) = recommend(candidates, find_serving_engine("vllm"), "me/draft", "org/target").configurations
    assert json.loads(shlex.split(one.command)[-1]) == {
        "method": "draft_model", "model": "me/draft", "num_speculative_tokens": 3,
        "draft_sample_method": "probabilistic", "rejection_sample_method": "block",
    }  # fmt: skip
    (one,) = recommend(candidates[:2], find_serving_engine("tensorrt-llm"), "d", "t").configurations
    assert "use_rejection_sampling=True)" in one.command and one.language == "python"


def test_a_threshold_is_a_flag_of_the_engine():
    early = make_candidate(THRESHOLD, 2.0, threshold=0.4, num_assistant_tokens=8)
    advice = recommend([make_candidate(), early], find_serving_engine("llama.cpp"), "d", "t")
    assert [plan.is_recommended for plan in advice.plans] == [False, True]
    assert advice.configurations[0].command.endswith("--spec-draft-n-max 8 --spec-draft-p-min 0.4")
    assert any("lies between the predicted one" in note for note in advice.notes)
    advice = recommend([make_candidate(), early], find_serving_engine("transformers"), "d", "t")
    lines = advice.configurations[0].command.splitlines()
    assert "draft.generation_config.assistant_confidence_threshold = 0.4" in lines
    assert sum("assistant_confidence_threshold" in line for line in lines) == 1
    assert any("scikit-learn" in note for note in advice.notes)


def test_numbers_by_batch_size_are_one_configuration_where_the_engine_takes_them():
    candidates = [
        make_candidate(batch_size=1, num_assistant_tokens=5),
        make_candidate(batch_size=8, num_assistant_tokens=2),
        make_candidate(batch_size=32, speedup=0.9),
    ]
    (one,) = recommend(candidates, find_serving_engine("vllm"), "d", "t").configurations
    config = json.loads(shlex.split(one.command)[-1])
    assert config["num_speculative_tokens"] == 5 and one.title == "greedy decoding, batch sizes 1, 8, 32"
    assert config["num_speculative_tokens_per_batch_size"] == [[1, 7, 5], [8, 31, 2], [32, 32, 0]]
    several = recommend(candidates, find_serving_engine("sglang"), "d", "t")
    assert [(c.title, c.num_assistant_tokens) for c in several.configurations] == [
        ("greedy decoding, batch size 1", 5),
        ("greedy decoding, batch size 8", 2),
    ]
    assert any("slower than none" in note for note in several.notes)


def test_equal_settings_are_one_configuration():
    plans = [make_candidate(temperature=t, batch_size=b).plan for t in (0.0, 1.0) for b in (1, 8)]
    found = collect_settings(plans, find_serving_engine("vllm"))
    (titles,) = found.values()
    assert titles == [f"{where}, batch size {b}" for where in ("greedy decoding", "temperature 1") for b in (1, 8)]


def test_no_draft_is_recommended_where_all_are_slower():
    advice = recommend(
        [make_candidate(speedup=0.8), make_candidate(THRESHOLD, 0.7)], find_serving_engine("llama.cpp"), "d", "t"
    )
    assert [(plan.method, plan.is_recommended) for plan in advice.plans] == [
        (FIXED, False), (THRESHOLD, False), (ALONE, True),
    ]  # fmt: skip
    assert advice.plans[-1].num_assistant_tokens == 0 and advice.configurations == []


def test_a_rule_that_was_not_measured_is_named():
    notes = recommend([make_candidate(temperature=1.0)], find_serving_engine("vllm"), "d", "t").notes
    assert any("Add `stochastic` to `draft_samplings`" in note for note in notes)
    greedy = recommend([make_candidate()], find_serving_engine("vllm"), "d", "t")
    assert not any("draft_samplings" in note for note in greedy.notes)  # greedy decoding has one rule
    assert recommend([], find_serving_engine("vllm"), "d", "t") is None
