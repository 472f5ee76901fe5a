"""What an evaluation says of a parallel draft, and what its rounds cost."""

import copy

import pytest
from datasets import Dataset

from spec_kd.evaluation import ServingCosts, evaluate_draft, measure_costs, read_costs, replay, write_costs
from spec_kd.evaluation import cost as cost_module
from spec_kd.parallel import ParallelDrafting, write_parallel_drafting


@pytest.fixture
def parallel_draft(pair):
    draft = copy.deepcopy(pair[0])
    write_parallel_drafting(draft.config, ParallelDrafting(260, 3))
    return draft


def test_a_round_has_one_draft_pass():
    costs = ServingCosts(draft_cost={1: 0.1, 5: 0.3}, verify_cost={1: 1.1, 5: 1.5}, round_overhead=0.2)
    assert costs.predict_speedup(2.6, 3) == pytest.approx(2.6 / (0.2 + 1.3 + 0.2))
    assert costs.price_round(3, 1) == costs.price_round(3, 3) == pytest.approx(0.2 + 1.3 + 0.2)
    assert costs.find_round_cost(5) == pytest.approx(0.3 + 1.5 + 0.2)
    stepwise = ServingCosts(cost_ratio=0.1, verify_cost={1: 1.1, 5: 1.5}, source="a server")
    parallel = stepwise.for_parallel_draft()
    assert parallel.predict_speedup(2.6, 3) == pytest.approx(2.6 / (0.1 + 1.3))
    assert parallel.source == "a server; the pass of a parallel draft is taken for one step"
    whole = ServingCosts(cost_ratio=0.1, round_cost={1: 1.2, 5: 2.0})
    assert whole.for_parallel_draft().predict_speedup(1.0, 5) == pytest.approx(1 / (0.1 + 1.5))
    assert costs.for_parallel_draft() is costs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cost_ratio": 0.1, "draft_cost": {1: 0.1}, "verify_cost": {1: 1.0}}, "one pass of a parallel draft. Leave"),
        ({"draft_cost": {1: 0.1}, "round_cost": {1: 1.0}}, "one pass of a parallel draft. Leave"),
        ({"draft_cost": {1: -0.1}, "verify_cost": {1: 1.0}}, r"`draft_cost\[1\]` is -0.1"),
    ],
)
def test_wrong_costs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ServingCosts(**options)


def test_costs_are_stored(tmp_path):
    costs = [ServingCosts(draft_cost={1: 0.1, 4: 0.2}, verify_cost={4: 1.4}, batch_size=8)]
    write_costs(costs, tmp_path / "costs.json")
    assert read_costs(tmp_path / "costs.json") == costs


def test_the_pass_of_a_parallel_draft_is_timed(parallel_draft, target, monkeypatch):
    """A clock that counts what a model reads: all that a round may have added, and the masks."""
    clock = [0.0]
    monkeypatch.setattr(cost_module.time, "perf_counter", lambda: clock[0])
    for model, price in ((parallel_draft, 1.0), (target, 4.0)):

        def tick(_module, _args, kwargs, _output, price=price):
            clock[0] += price * (1 + 0.1 * (kwargs["input_ids"].shape[1] - 1))

        model.register_forward_hook(tick, with_kwargs=True)
    (costs,) = measure_costs(parallel_draft, target, gammas=(1, 4), context_length=16, repeats=2)
    assert costs.cost_ratio is None
    assert costs.draft_cost == {1: pytest.approx(0.25 * 1.1), 4: pytest.approx(0.25 * 1.7)}
    assert costs.verify_cost == {1: pytest.approx(1.1), 4: pytest.approx(1.4)}


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_a_report_knows_a_parallel_draft(pair, parallel_draft, tokenizer, engine):
    target = pair[1]
    questions = Dataset.from_dict({"prompt": ["how far", "when", "why not?"]})
    costs = [
        ServingCosts(cost_ratio=0.01, verify_cost={4: 0.3}),  # verification for less than a step: drafting always pays
        ServingCosts(round_cost={4: 1.2}, batch_size=2),
    ]
    report = evaluate_draft(
        parallel_draft, target, questions, processing_class=tokenizer, max_new_tokens=8, num_assistant_tokens=2,
        gammas=(2, 4), temperatures=[0.0], costs=costs, show_progress=False, serving_engine=engine,
        num_assisted_prompts=1 if engine == "transformers" else 0,
    ).draft  # fmt: skip
    (setting,) = report.settings
    (breakdown,) = (one for one in setting.breakdowns if one.title == "token of the round")
    assert [row.label for row in breakdown.rows] == ["1", "2", "3", "4"]
    assert breakdown.rows[0].alpha == setting.alpha
    assert (
        breakdown.rows[0].tokens - 3 == breakdown.rows[1].tokens
    )  # no round begins at the last token and has a second
    efficiency = setting.at_gamma(4).block_efficiency.value
    assert setting.at_gamma(4).predicted_speedup["1"].value == pytest.approx(efficiency / (0.01 + 0.3))
    (known,) = report.costs
    assert known.cost_ratio is None and known.round_cost["4"] == pytest.approx(0.31)
    assert any("costs are those of autoregressive drafts" in said for said in report.unmeasured)
    if engine == "vllm":
        assert {plan.method for plan in report.recommendations.plans} == {"fixed"}
        (configuration,) = report.recommendations.configurations
        assert '"parallel_drafting": true' in configuration.command
    else:
        assert report.recommendations is None and setting.assisted is None
        assert any("transformers takes no parallel drafts" in said for said in report.unmeasured)
        assert any("Assisted generation was not run" in said for said in report.unmeasured)


def test_what_is_not_replayed_is_refused(parallel_draft, target):
    row = {"prompt_ids": [5], "completion_ids": [6, 7]}
    options = {"temperature": 0.0, "max_new_tokens": 4}
    with pytest.raises(ValueError, match="A parallel draft has drafted all tokens at once"):
        replay(parallel_draft, target, [row], assistant_confidence_threshold=0.4, **options)
