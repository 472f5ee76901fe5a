import contextlib
import json
import math

import numpy as np
import pytest
import torch

from spec_kd.acceptance import expect_block_efficiency, predict_speedup
from spec_kd.evaluation import ServingCosts, assisted_costs, measure_assisted_costs, measure_costs, read_costs
from spec_kd.evaluation import cost as cost_module
from spec_kd.evaluation.assisted import AssistedMetrics, GenerationTiming
from spec_kd.evaluation.assisted_costs import AssistedCosts, PrefillCost
from spec_kd.evaluation.cost import MeasurementError


def test_speedup_is_tokens_over_the_cost_of_a_round():
    assert predict_speedup(3.0, 4, cost_ratio=0.1, verify_cost=1.2, round_overhead=0.4) == pytest.approx(3 / 2)
    costs = ServingCosts(cost_ratio=0.1, verify_cost={1: 1.1, 5: 1.5}, round_overhead=0.2)
    assert costs.verify(3) == pytest.approx(1.3)
    assert costs.predict_speedup(2.6, 3) == pytest.approx(2.6 / (0.3 + 1.3 + 0.2))


@pytest.mark.parametrize("alpha", [0.0, 0.37, 0.9, 1.0])
def test_independent_acceptance_gives_the_geometric_sum(alpha):
    """Leviathan et al., eq. 1, in its closed form and by simulation of its limit."""
    for gamma in (1, 5):
        closed = gamma + 1 if alpha == 1 else (1 - alpha ** (gamma + 1)) / (1 - alpha)
        assert expect_block_efficiency(alpha, gamma) == pytest.approx(closed)


def test_break_even_is_where_the_best_gamma_gains_nothing():
    costs = ServingCosts(cost_ratio=0.2, verify_cost={8: 1.0})
    alpha = costs.find_break_even_alpha()
    # with free verification gamma = 1 breaks even first, at 1 + alpha = 1 + c
    assert alpha == pytest.approx(0.2, abs=1e-3)
    assert costs.predict_speedup(expect_block_efficiency(alpha + 1e-3, 1), 1) > 1
    assert math.isnan(ServingCosts(cost_ratio=2.0, verify_cost={8: 1.0}).find_break_even_alpha())


@pytest.mark.parametrize(
    "costs",
    [
        ServingCosts(cost_ratio=0.05, verify_cost={1: 1.1, 2: 1.3, 4: 1.5}, round_overhead=0.1),
        ServingCosts(round_cost={1: 1.3, 2: 1.4, 3: 1.65}),
        ServingCosts(round_cost={4: 3.0}),
    ],
)
@pytest.mark.parametrize("speedup", [1.0, 1.5, 2.2])
def test_the_acceptance_that_a_speedup_needs(costs, speedup):
    """Against the closed form of eq. 1 of arXiv 2211.17192 on a fine grid, and against the root for one gamma."""
    grid = np.linspace(0, 1, 20_001)[:-1]
    gammas = np.arange(1, costs.max_gamma + 1)
    tokens = (1 - grid[:, None] ** (gammas + 1)) / (1 - grid[:, None])  # (alpha, gamma)
    speedups = tokens / np.array([costs.find_round_cost(int(gamma)) for gamma in gammas])
    reached = np.flatnonzero(speedups.max(axis=1) > speedup)
    found = costs.find_needed_alpha(speedup)
    assert math.isnan(found) if not len(reached) else found == pytest.approx(grid[reached[0]], abs=2e-4)
    for alpha, row in list(zip(grid, speedups, strict=True))[::4999]:
        best, gamma = costs.predict_best_speedup(float(alpha))
        assert best == pytest.approx(row.max()) and gamma == gammas[row.argmax()]
    one = 1 + costs.find_needed_alpha(speedup, max_gamma=1)
    assert math.isnan(one) or one == pytest.approx(max(1, speedup * costs.find_round_cost(1)), abs=2e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"round_cost": {2: 1.5}, "verify_cost": {2: 1.1}}, "Leave `verify_cost` and `round_overhead` out"),
        ({"round_cost": {2: 1.5}, "round_overhead": 0.1}, "Leave `verify_cost` and `round_overhead` out"),
        ({"verify_cost": {}}, "positive cost"),
        ({"verify_cost": {0: 1.0}}, "is 0, but must be at least 1"),
        ({"verify_cost": {1: -1.0}}, "is -1.0, but must be above 0"),
        ({"verify_cost": {1: math.nan}}, "is nan, but must be a finite number"),
        ({"verify_cost": {1: 1.0}, "cost_ratio": -0.1}, "`cost_ratio` is -0.1"),
        ({"verify_cost": {1: 1.0}, "batch_size": 0}, "`batch_size` is 0"),
    ],
)
def test_costs_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ServingCosts(**{"cost_ratio": 0.1, **options})


def test_a_gamma_beyond_the_table_is_refused():
    with pytest.raises(ValueError, match="only up to 4"):
        ServingCosts(cost_ratio=0.1, verify_cost={4: 1.0}).verify(5)


def test_passes_are_timed_behind_the_same_context(pair, monkeypatch):
    """A clock that counts what a model reads: costs must be those of the pass alone, and the cache as it was."""
    draft, target = pair
    clock = [0.0]
    monkeypatch.setattr(cost_module.time, "perf_counter", lambda: clock[0])
    lengths = []
    for name, model, price in (("draft", draft, 1.0), ("target", target, 4.0)):

        def tick(_module, _args, kwargs, output, price=price, name=name):
            tokens = output.logits.shape[1]
            clock[0] += price * (1 + 0.1 * (tokens - 1)) * output.logits.shape[0]
            if kwargs.get("past_key_values") is not None:
                lengths.append((name, kwargs["past_key_values"].get_seq_length()))

        model.register_forward_hook(tick, with_kwargs=True)
    one, three = measure_costs(draft, target, batch_sizes=(1, 3), gammas=(1, 4), context_length=16, repeats=2)
    assert one.cost_ratio == pytest.approx(0.25) and one.target_step_seconds == pytest.approx(4.0)
    assert one.verify_cost == {1: pytest.approx(1.1), 4: pytest.approx(1.4)}
    assert three.batch_size == 3 and three.target_step_seconds == pytest.approx(12.0)
    assert {length for _, length in lengths} == {17, 18, 21}  # behind 16 tokens each time


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gammas": ()}, "`gammas`"),
        ({"batch_sizes": (0,)}, "`batch_sizes`"),
        ({"context_length": 510}, "do not fit the draft's 512"),
    ],
)
def test_bad_options_are_refused(pair, options, message):
    with pytest.raises(ValueError, match=message):
        measure_costs(*pair, **options)


PROMPT_LENGTHS = np.array([8, 30, 70])


def make_timed_run(gamma, step, draft_step, overhead, verify, prefill, drift=1.0):
    """Metrics of a run in an engine whose every cost is known, on a machine that changes its pace between prompts."""
    prompts = len(PROMPT_LENGTHS)
    tokens, calls = np.full(prompts, 41), np.full(prompts, 11)
    round_seconds = step * (gamma * draft_step + verify + overhead)
    return AssistedMetrics(
        tokens=tokens, target_calls=calls, accepted=calls * gamma, drafted=calls * gamma, drafting_rounds=calls,
        accepted_by_position=np.ones((prompts, gamma)), temperature=0.0, num_assistant_tokens=gamma,
        draft_sampling="stochastic", method="assisted", completion_ids=[[1] * 41] * prompts, rounds=[[]] * prompts,
        timing=GenerationTiming(
            assisted_seconds=drift * (1.5 * prefill + calls * round_seconds),
            assisted_first_seconds=drift * (1.5 * prefill + round_seconds),
            plain_seconds=drift * (prefill + tokens * step), plain_first_seconds=drift * (prefill + step),
            plain_tokens=tokens,
        ),
    )  # fmt: skip


def measure_made_costs(pair, monkeypatch, gammas, bare, make_run):
    """`measure_assisted_costs` on an engine whose runs are made by `make_run(gamma)`."""
    monkeypatch.setattr(
        assisted_costs, "generate_assisted", lambda *_, num_assistant_tokens, **__: make_run(num_assistant_tokens)
    )
    monkeypatch.setattr(assisted_costs, "measure_costs", lambda *_, **__: [bare])
    prompts = [[5] * length for length in PROMPT_LENGTHS]
    return measure_assisted_costs(*pair, prompts, gammas=gammas, max_new_tokens=41)


FREE = ServingCosts(cost_ratio=0.1, verify_cost={1: 1.0, 4: 1.0, 8: 1.0}, target_step_seconds=0.02)


def test_costs_of_an_engine_are_found_again(pair, monkeypatch):
    step, draft_step, overhead = 0.02, 0.3, 0.5

    def prefill(lengths):
        return 0.01 + 0.002 * lengths

    found = measure_made_costs(
        pair, monkeypatch, (1, 4, 8), FREE,
        lambda gamma: make_timed_run(gamma, step, draft_step, overhead, 1.0, prefill(PROMPT_LENGTHS)),
    )  # fmt: skip
    assert found.costs.cost_ratio == pytest.approx(draft_step)
    assert found.costs.round_overhead == pytest.approx(overhead)
    assert found.costs.target_step_seconds == pytest.approx(step)
    assert (found.plain_prefill.fixed, found.plain_prefill.per_token) == pytest.approx((0.01, 0.002))
    assert (found.assisted_prefill.fixed, found.assisted_prefill.per_token) == pytest.approx((0.015, 0.003))
    # whole requests, prompts of other lengths included
    lengths = np.array([5, 100])
    plain, assisted = prefill(lengths).sum(), 1.5 * prefill(lengths).sum()
    expected = (plain + 60 * step) / (assisted + 20 * step * (4 * draft_step + 1.0 + overhead))
    predicted = found.predict_speedup(lengths, np.array([41, 19]), np.array([11, 9]), 4)
    assert predicted == pytest.approx(expected)


def test_a_machine_that_changes_its_pace_is_seen_through(pair, monkeypatch):
    """Rounds are compared with the steps of the same prompt, and what happens to one prompt does not count."""
    paces = iter([[1.0, 1.2, 1.0], [1.0, 0.8, 1.0], [1.0, 1.3, 1.0]])
    found = measure_made_costs(
        pair, monkeypatch, (1, 4, 8), FREE,
        lambda gamma: make_timed_run(gamma, 0.02, 0.3, 0.5, 1.0, 0.0 * PROMPT_LENGTHS, np.array(next(paces))),
    )  # fmt: skip
    for gamma in (1, 4, 8):
        assert found.costs.predict_speedup(1.0, gamma) == pytest.approx(1 / (1.5 + 0.3 * gamma))
    assert found.costs.target_step_seconds == pytest.approx(0.02)


def test_answers_over_at_once_are_left_out(pair, monkeypatch):
    def make_run(gamma):
        run = make_timed_run(gamma, 0.02, 0.3, 0.5, 1.0, 0.001 * PROMPT_LENGTHS)
        for counts, seconds, first in (
            (run.tokens, run.timing.plain_seconds, run.timing.plain_first_seconds),
            (run.target_calls, run.timing.assisted_seconds, run.timing.assisted_first_seconds),
        ):
            counts[0], seconds[0] = 1, first[0] + 0.001
        return run

    found = measure_made_costs(pair, monkeypatch, (1, 4), FREE, make_run)
    assert found.costs.predict_speedup(1.0, 4) == pytest.approx(1 / 2.7)
    assert found.plain_prefill.per_token == pytest.approx(0.001)


def test_prefill():
    """Of one length nothing tells the fixed part; below zero seconds there is nothing."""
    same = PrefillCost.fit(np.array([400, 400]), np.array([0.09, 0.11]))
    assert same.predict(np.array([400, 200])) == pytest.approx([0.1, 0.05], rel=1e-3)
    convex = PrefillCost.fit(np.array([100, 400]), np.array([0.01, 0.10]))
    assert convex.predict(np.array([10, 100])) == pytest.approx([0.0, 0.01])


def test_costs_add_up_to_the_rounds_measured(pair, monkeypatch):
    """Rounds whose time is no line over gamma are predicted as they were, not as the line through them."""
    prices = {1: 2.5, 4: 4.2, 8: 6.1}
    bare = ServingCosts(cost_ratio=0.1, verify_cost={1: 1.1, 4: 1.3, 8: 1.2}, target_step_seconds=0.01)
    costs = measure_made_costs(
        pair, monkeypatch, (1, 4, 8), bare,
        lambda gamma: make_timed_run(gamma, 0.02, 0.0, 0.0, prices[gamma], 0.001 * PROMPT_LENGTHS),
    ).costs  # fmt: skip
    for gamma, price in prices.items():
        assert costs.predict_speedup(1.0, gamma) == pytest.approx(1 / price)


def test_an_engine_is_really_timed(pair, prompts):
    draft, target = pair
    for _ in range(5):  # on a busy machine the times can contradict each other, which is said
        with contextlib.suppress(MeasurementError):
            found = measure_assisted_costs(draft, target, prompts[:2], gammas=(1, 3), max_new_tokens=12, eos_token_id=1)
            break
    else:
        pytest.fail("no measurement of five was free of contradictions")
    assert isinstance(found, AssistedCosts) and found.costs.target_step_seconds > 0
    assert found.costs.cost_ratio >= 0 and found.costs.round_overhead >= 0
    assert [run.num_assistant_tokens for run in found.runs] == [1, 3]
    assert all((run.timing.plain_first_seconds < run.timing.plain_seconds).all() for run in found.runs)


def test_one_gamma_cannot_tell_a_step_from_the_overhead(pair, prompts):
    with pytest.raises(ValueError, match="two or more"):
        measure_assisted_costs(*pair, prompts, gammas=(3,), max_new_tokens=8)


def test_texts_of_one_round_cannot_be_timed(target, prompts):
    import copy

    with pytest.raises(ValueError, match="within one round"):
        measure_assisted_costs(copy.deepcopy(target), target, prompts[:1], gammas=(2, 3), max_new_tokens=2)
    assert torch.is_grad_enabled()


def write(tmp_path, text):
    path = tmp_path / "costs.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


def test_one_table_or_one_for_each_batch_size(tmp_path):
    table = {"cost_ratio": 0.1, "verify_cost": {"1": 1, "4": 1.3}, "round_overhead": 0.05}
    expected = ServingCosts(cost_ratio=0.1, verify_cost={1: 1.0, 4: 1.3}, round_overhead=0.05)
    assert read_costs(write(tmp_path, table)) == [expected]
    first, second = read_costs(write(tmp_path, [table, {**table, "batch_size": 8}]))
    assert first == expected and second.batch_size == 8
    assert first.verify(2) == pytest.approx(1.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ([], "has no costs"),
        ([3], r"lack \['cost_ratio', 'verify_cost'\]"),
        ({"cost_ratio": 0.1, "verify_cost": {"1": 1}, "gamma": 5}, r"unknown \['gamma'\]"),
        ({"cost_ratio": 0.1, "verify_cost": {"five": 1}}, "cannot be"),
        ({"cost_ratio": 0.1, "verify_cost": 1.1}, "cannot be"),
        ({"cost_ratio": -0.1, "verify_cost": {"1": 1}}, "`cost_ratio` is -0.1, but must be at least 0"),
        ({"cost_ratio": "much", "verify_cost": {"1": 1}}, "cannot be"),
    ],
)
def test_a_file_without_costs_is_refused_with_an_example(tmp_path, text, message):
    with pytest.raises(ValueError, match=f"(?s){message}.*like .*cost_ratio"):
        read_costs(write(tmp_path, text))
