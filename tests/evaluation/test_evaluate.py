import copy
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import Mamba2Config, Mamba2ForCausalLM, MistralConfig, MistralForCausalLM

from spec_kd import evaluate_draft, generate_responses, replay
from spec_kd.evaluation import (
    EvaluationReport,
    ServingCosts,
    assisted_costs,
    cost,
    draft_measurement,
    save_report,
)
from spec_kd.evaluation import evaluate as evaluate_module

FREE = [
    ServingCosts(cost_ratio=0.1, verify_cost={16: 1.0}),
    ServingCosts(cost_ratio=0.1, verify_cost={4: 1.4}, batch_size=8),
]


@pytest.fixture
def options(tokenizer):
    return {
        "processing_class": tokenizer, "max_new_tokens": 16, "num_assistant_tokens": 3, "gammas": (1, 3, 8),
        "costs": FREE, "show_progress": False,
    }  # fmt: skip


@pytest.fixture
def questions():
    texts = ["how far", "when", "天气", "why not?", "who", "where is it"]
    return Dataset.from_dict({"prompt": texts, "domain": ["a", "b", "a", "b", "a", "b"]})


def test_figures_are_those_of_replay(pair, tokenizer, questions, options):
    draft, target = pair
    report = evaluate_draft(draft, target, questions, **options)
    assert [setting.name for setting in report.draft.settings] == ["greedy", "t1"]
    for setting in report.draft.settings:
        texts = generate_responses(
            target, questions, processing_class=tokenizer, max_new_tokens=16, temperature=setting.temperature,
            show_progress=False,
        )  # fmt: skip
        for gamma in (1, 3, 8):
            expected = replay(
                draft, target, texts, temperature=setting.temperature, num_assistant_tokens=gamma, max_new_tokens=16,
                vocab_size=261,
            )  # fmt: skip
            assert setting.at_gamma(gamma).block_efficiency == pytest.approx(expected.block_efficiency)
            assert setting.at_gamma(gamma).acceptance_rate == pytest.approx(expected.acceptance_rate)
        assert setting.alpha == pytest.approx(expected.alpha) and setting.alpha_kind == "exact"
        assert setting.prompts == 6 and setting.tokens == sum(map(len, texts["completion_ids"]))
        assert len(setting.acceptance_rate_per_position) == 3
    with pytest.raises(KeyError):
        setting.at_gamma(2)


def test_speedup_follows_from_the_costs(pair, questions, options):
    report = evaluate_draft(*pair, questions, **options)
    setting = report.draft.setting("t1")
    for gamma in (1, 3, 8):
        figures = setting.at_gamma(gamma)
        assert figures.predicted_speedup["1"].value == pytest.approx(figures.block_efficiency.value / (0.1 * gamma + 1))
    assert set(setting.at_gamma(8).predicted_speedup) == {"1"}  # not known beyond 4 at batch size 8
    best = max((1, 3, 8), key=lambda g: setting.at_gamma(g).predicted_speedup["1"].value)
    assert setting.best_gamma["1"] == best
    assert 0 < setting.break_even_alpha["1"] <= 0.1001 < setting.break_even_alpha["8"]
    assert [cost.batch_size for cost in report.draft.costs] == [1, 8]
    beyond = evaluate_draft(*pair, questions, **{**options, "gammas": (8,), "num_assistant_tokens": 8})
    assert beyond.draft.setting("t1").best_gamma == {"1": 8}  # nothing is known for batch size 8


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_what_to_set_in_the_engine_follows_from_the_same_replay(pair, questions, options, engine):
    samplings = ["greedy", "stochastic"] if engine == "vllm" else None
    report = evaluate_draft(*pair, questions, serving_engine=engine, draft_samplings=samplings, **options)
    advice = report.draft.recommendations
    for setting in report.draft.settings:
        plans = {(p.batch_size, p.method): p for p in advice.plans if p.setting == setting.name}
        for size in (1, 8):
            fixed = plans[size, "fixed"]
            assert fixed.num_assistant_tokens == setting.best_gamma[str(size)]
            expected = setting.get_speedups(str(size))[fixed.num_assistant_tokens]
            assert fixed.predicted_speedup.value == pytest.approx(expected.value) == fixed.highest_speedup
        assert ((1, "threshold") in plans) is (engine == "transformers") and (8, "threshold") not in plans
        is_sampled = setting.temperature > 0 and setting.draft_sampling == "stochastic"
        assert ((1, "block") in plans) is (engine == "vllm" and is_sampled)
    if engine == "transformers":
        early = next(p for p in advice.plans if p.method == "threshold")
        assert early.predicted_speedup.value <= early.highest_speedup and early.drafted[0] <= early.drafted[1]
    chosen = [(p.temperature, p.batch_size) for p in advice.plans if p.is_recommended]
    assert sorted(chosen) == [(t, size) for t in (0.0, 1.0) for size in (1, 8)]
    assert all("TARGET" in one.command and "DRAFT" in one.command for one in advice.configurations)
    assert evaluate_draft(*pair, questions, **{**options, "costs": None}).draft.recommendations is None


def test_breakdowns_and_worst_prompts(pair, tokenizer, questions, options):
    report = evaluate_draft(*pair, questions, group_by="domain", num_shown_prompts=2, **options)
    setting = report.draft.setting("greedy")
    titles = [breakdown.title for breakdown in setting.breakdowns]
    assert titles == ["class of the token", "token of the completion", "entropy of the target", "domain"]
    for breakdown in setting.breakdowns:
        assert sum(row.tokens for row in breakdown.rows) == setting.tokens
    assert [row.prompts for row in setting.breakdowns[-1].rows] == [3, 3]
    efficiencies = [shown.block_efficiency for shown in setting.worst]
    assert efficiencies == sorted(efficiencies) and len(efficiencies) == 2
    assert efficiencies[0] <= setting.at_gamma(3).block_efficiency.value
    shown = setting.worst[0]
    assert shown.prompt == questions["prompt"][shown.row] and len(shown.tokens) == len(shown.acceptance)
    hidden = evaluate_draft(*pair, questions, num_shown_prompts=1, show_prompt_text=False, **options)
    assert hidden.draft.setting("greedy").worst[0].prompt == "(not shown)"


def test_several_drafts_are_compared_on_the_same_prompts(pair, questions, options, tmp_path):
    draft, target = pair
    draft.save_pretrained(tmp_path / "noisy")
    report = evaluate_draft(
        {"before": str(tmp_path / "noisy"), "after": copy.deepcopy(target)}, target, questions, **options
    )
    assert [d.name for d in report.drafts] == ["before", "after"] and report.draft.name == "after"
    assert report.draft.setting("t1").alpha.value == pytest.approx(1, abs=1e-5)
    by_key = {(c.setting, c.metric): c for c in report.comparisons}
    assert set(by_key) == {(s, m) for s in ("greedy", "t1") for m in ("alpha", "block_efficiency")}
    gained = by_key["t1", "alpha"]
    assert (gained.draft, gained.baseline) == ("after", "before")
    before = report.drafts[0].setting("t1").alpha.value
    assert gained.difference.value == pytest.approx(1 - before, abs=1e-5) and gained.difference.low > 0


def test_engines_decide_how_the_draft_is_sampled(pair, questions, options):
    draft, target = pair
    vllm = evaluate_draft(draft, target, questions, serving_engine="vllm", temperatures=(1.0,), **options)
    assert [setting.name for setting in vllm.draft.settings] == ["t1_greedy_draft"]
    assert vllm.draft.settings[0].draft_sampling == "greedy" and "vLLM" in vllm.serving_rule
    both = evaluate_draft(
        draft, target, questions, draft_samplings=("stochastic", "greedy"), temperatures=(0.0, 1.0), **options
    )
    assert [setting.name for setting in both.draft.settings] == ["greedy", "t1", "t1_greedy_draft"]
    assert both.draft.settings[2].alpha == vllm.draft.settings[0].alpha


def test_truncated_sampling_is_named_and_applied_to_both(pair, tokenizer, questions, options, tmp_path):
    draft, target = pair
    cut = {"temperatures": (0.0, 0.7), "top_k": 20, "top_p": 0.9}
    report = evaluate_draft(draft, target, questions, output_dir=str(tmp_path), **cut, **options)
    assert [setting.name for setting in report.draft.settings] == ["greedy", "t0.7_k20_p0.9"]
    texts = generate_responses(
        target, questions, processing_class=tokenizer, max_new_tokens=16, temperature=0.7, top_k=20, top_p=0.9,
        show_progress=False,
    )  # fmt: skip
    expected = replay(
        draft, target, texts, temperature=0.7, top_k=20, top_p=0.9, num_assistant_tokens=3, max_new_tokens=16,
        vocab_size=261,
    )  # fmt: skip
    assert report.draft.settings[1].alpha == pytest.approx(expected.alpha)
    again = evaluate_draft(copy.deepcopy(target), target, questions, output_dir=str(tmp_path), **cut, **options)
    assert again.draft.settings[1].alpha.value == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="need the target as a transformers model"):
        evaluate_draft(draft, None, texts, **cut, **options)
    with pytest.raises(ValueError, match="is of the whole distribution"):
        generate_responses(
            target, questions, processing_class=tokenizer, temperature=1.0, top_k=5, teacher_signal="token_only"
        )


def test_a_distilled_set_takes_the_place_of_the_target(pair, tokenizer, questions, options):
    draft, target = pair
    stored = {
        signal: generate_responses(
            target, questions, processing_class=tokenizer, max_new_tokens=16, temperature=1.0, teacher_signal=signal,
            show_progress=False,
        )
        for signal in ("token_only", "top_k_tail")
    }  # fmt: skip
    expected = evaluate_draft(draft, target, questions, temperatures=(1.0,), **options).draft.setting("t1")
    options.pop("max_new_tokens")  # the set says it
    for signal, rows in stored.items():
        found = evaluate_draft(draft, None, rows, **options).draft.setting("t1")
        for gamma in (1, 3, 8):
            assert found.at_gamma(gamma).block_efficiency == pytest.approx(
                expected.at_gamma(gamma).block_efficiency, abs=1e-4
            )
        assert found.alpha_kind == "estimate"
        assert (found.alpha_bounds is None) == (signal == "token_only")
    low, high = found.alpha_bounds
    assert low <= expected.alpha.value + 1e-3 and expected.alpha.value <= high + 1e-3 and low < high
    assert "entropy of the target" not in [breakdown.title for breakdown in found.breakdowns]


def test_assisted_generation_checks_replay(pair, questions, options):
    report = evaluate_draft(*pair, questions, num_assisted_prompts=3, temperatures=(0.0,), **options)
    check = report.draft.setting("greedy").assisted
    assert check.prompts == 3 and check.num_assistant_tokens == 3
    assert check.block_efficiency.value == pytest.approx(check.replayed_block_efficiency.value, abs=1e-9)
    assert check.speedup.value > 0
    # a machine that changes its pace can make the times of rounds contradict each other
    assert (check.predicted_speedup is None) == bool(report.draft.unmeasured)
    vllm = evaluate_draft(*pair, questions, serving_engine="vllm", num_assisted_prompts=1, **options).draft
    assert vllm.setting("greedy").assisted is not None and vllm.setting("t1_greedy_draft").assisted is None
    alone = evaluate_draft(*pair, questions.select(range(3)), num_assisted_prompts=3, temperatures=(0.0,), **options)
    assert alone.draft.setting("greedy").assisted.predicted_speedup is None  # no prompt left to time rounds on


def test_costs_are_measured_by_default(pair, questions, options):
    report = evaluate_draft(*pair, questions, **{**options, "costs": "measure", "batch_sizes": (1, 2)})
    assert [cost.batch_size for cost in report.draft.costs] == [1, 2]
    assert all(cost.target_step_seconds > 0 and set(cost.verify_cost) == {"1", "3", "8"} for cost in report.draft.costs)
    without = evaluate_draft(*pair, questions, **{**options, "costs": None})
    assert without.draft.costs == [] and without.draft.setting("t1").best_gamma == {}


def test_report_survives_json_and_is_saved(pair, questions, options, tmp_path):
    report = evaluate_draft(*pair, questions.select([0]), group_by=["domain"], num_assisted_prompts=1, **options)
    assert math.isnan(report.draft.setting("t1").alpha.low)  # one prompt says nothing of an interval
    again = EvaluationReport.from_json(report.to_json())
    assert again.to_json() == report.to_json()
    assert again.draft.setting("t1").best_gamma == report.draft.setting("t1").best_gamma
    assert {"target", "drafts", "responses", "machine", "versions", "command", "time"} <= set(report.provenance)
    files = save_report(report, tmp_path)
    assert all(path.stat().st_size > 0 for path in files.values())
    with pytest.raises(ValueError, match="no evaluation report"):
        EvaluationReport.from_json("{}")


def test_texts_are_kept_and_reused(pair, questions, options, tmp_path):
    first = evaluate_draft(*pair, questions, output_dir=str(tmp_path), **options)
    assert (tmp_path / "texts_t1" / "responses.parquet").exists()
    again = evaluate_draft(*pair, questions, output_dir=str(tmp_path), **options)
    # as text, since an interval over one prompt is nan, which equals nothing
    assert repr(again.draft.settings) == repr(first.draft.settings)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"serving_engine": "nonsense"}, "`serving_engine` is 'nonsense'"),
        ({"gammas": (0,)}, "`gammas` is 0, but must be at least 1"),
        ({"temperatures": ()}, "`temperatures`"),
        ({"temperatures": (1.0, 1.0)}, "`temperatures`"),
        ({"draft_samplings": ()}, "`draft_samplings` is empty"),
        ({"draft_samplings": ("best",)}, "`draft_sampling` is 'best'"),
        ({"group_by": "topic"}, "names \\['topic'\\]"),
        ({"costs": "guess"}, "`costs` is 'guess'"),
        (
            {"serving_engine": "vllm", "temperatures": (1.0,), "num_assisted_prompts": 1},
            "nothing to say on greedy drafts",
        ),
    ],
)
def test_bad_options_are_refused_before_any_model_runs(pair, questions, options, changed, message, monkeypatch):
    for module, name in (
        (evaluate_module, "generate_responses"),
        (draft_measurement, "score_responses"),
        (draft_measurement, "find_costs"),
    ):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("a model ran"))
    with pytest.raises(ValueError, match=message):
        evaluate_draft(*pair, questions, **{**options, **changed})


def test_what_needs_a_target_says_so(pair, questions, options):
    with pytest.raises(ValueError, match="must be its responses with a `teacher_signal`"):
        evaluate_draft(pair[0], None, questions, **options)
    with pytest.raises(ValueError, match="`drafts` is empty"):
        evaluate_draft({}, pair[1], questions, **options)


def build_recurrent():
    config = Mamba2Config(
        vocab_size=261, hidden_size=32, state_size=8, num_hidden_layers=2, num_heads=4, head_dim=16, expand=2,
        n_groups=1, chunk_size=8, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return Mamba2ForCausalLM(config).eval()


def test_windows_shorter_than_the_timed_context_have_costs(pair, questions, options):
    config = MistralConfig(**{**pair[1].config.to_dict(), "model_type": "mistral", "sliding_window": 6})
    torch.manual_seed(0)
    target = MistralForCausalLM(config).eval()
    report = evaluate_draft(pair[0], target, questions, **{**options, "gammas": (1, 2), "costs": "measure"})
    assert report.draft.costs and not report.draft.unmeasured


def test_a_recurrent_target_has_a_report_that_says_what_is_missing(pair, questions, options, tmp_path):
    options |= {"temperatures": (0.0,), "costs": "measure", "num_assisted_prompts": 1}
    report = evaluate_draft(pair[0], build_recurrent(), questions, **options)
    setting = report.draft.setting("greedy")
    assert setting.at_gamma(3).block_efficiency.value >= 1.0 and setting.assisted is None
    costs, assisted = report.draft.unmeasured
    assert costs.endswith("Mamba2ForCausalLM returns no cache, so that a single pass cannot be timed.")
    assert assisted.startswith("Assisted generation (greedy) could not be measured: assisted generation is not")
    save_report(report, tmp_path)
    for name in ("report.md", "report.html"):
        assert "could not be measured" in (tmp_path / name).read_text(encoding="utf-8")
    assert EvaluationReport.from_json(report.to_json()).draft.unmeasured == [costs, assisted]


def test_costs_that_cannot_be_measured_cost_no_report(pair, questions, options, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("no room for 12 sequences")

    monkeypatch.setattr(draft_measurement, "measure_costs", fail)
    report = evaluate_draft(*pair, questions, **{**options, "costs": "measure"})
    assert report.draft.costs == [] and report.draft.settings[0].best_gamma == {}
    assert report.draft.unmeasured == [
        "The costs of a round, and the speed-up that follows, could not be measured: no room for 12 sequences"
    ]


def test_times_of_a_busy_machine_leave_the_prediction_out(pair, questions, options, monkeypatch):
    measured = cost.measure_costs(*pair, gammas=(1, 2, 4))

    def contradict(run):  # a round that takes less time than its draft steps
        return np.ones(1), np.ones(1) * (0.1 if run.num_assistant_tokens < 4 else 9.0)

    monkeypatch.setattr(assisted_costs, "_measure_paces", contradict)
    monkeypatch.setattr(assisted_costs, "measure_costs", lambda *_, **__: measured)
    options |= {"temperatures": (0.0,), "costs": None, "num_assisted_prompts": 1, "num_assistant_tokens": 2}
    report = evaluate_draft(*pair, questions, **options)
    assisted = report.draft.settings[0].assisted
    assert assisted.block_efficiency.value >= 1.0 and assisted.predicted_speedup is None
    (sentence,) = report.draft.unmeasured
    assert "the measured rounds contradict each other" in sentence and "verify_cost" not in sentence
