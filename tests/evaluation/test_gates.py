import dataclasses

import pytest
from example_report import AFTER, BEFORE, NAN, build_report, build_small_report

from spec_kd.cli.evaluate import hold_against
from spec_kd.cli.main import FAILED_EXIT_STATUS
from spec_kd.evaluation import save_report
from spec_kd.evaluation.gates import Gate, check_gates, check_measured, parse_gate
from spec_kd.evaluation.metrics import Interval
from spec_kd.evaluation.text_kinds import EITHER


@pytest.fixture(scope="module")
def report():
    return build_report()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("block_efficiency=2.5", Gate(name="block_efficiency", threshold=2.5)),
        (" alpha_t0.7 = .6 ", Gate(name="alpha_t0.7", threshold=0.6)),
        ("predicted_speedup_t1_greedy_draft=1", Gate(name="predicted_speedup_t1_greedy_draft", threshold=1.0)),
        ("speedup=1e0", Gate(name="speedup", threshold=1.0)),
        ("alpha_without_looping_t1=0.5", Gate(name="alpha_without_looping_t1", threshold=0.5)),
        ("alpha_without_looping_or_untemplated_t1=1", Gate(name=f"alpha_without_{EITHER}_t1", threshold=1)),
    ],
)
def test_parsing(text, expected):
    assert parse_gate(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("block_efficiency", "not of the form NAME=THRESHOLD"),
        ("=2", "not of the form NAME=THRESHOLD"),
        ("perplexity=2", "'perplexity' does not begin with alpha or block_efficiency or"),
        ("alphabet=2", "names no metric"),
        ("alpha=0.5", "names no setting, which alpha needs"),
        ("alpha_without_looping=0.5", "needs: alpha_without_looping_greedy"),
        ("speedup_without_looping=1", "names the setting 'without_looping', but there are greedy, t1"),
        ("alpha_without_loops_t1=0.5", "names the setting 'without_loops_t1'"),
        ("alpha_t1=high", "threshold 'high', which is no finite number"),
        ("alpha_t1=nan", "no finite number"),
        ("alpha_t1=", "no finite number"),
        ("alpha_t1>=0.5", "no setting|no figure|names the setting 't1>'"),
        ("alpha_t2=0.5", "names the setting 't2', but there are greedy, t1"),
    ],
)
def test_what_cannot_be_read_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_gate(text, settings=["greedy", "t1"])


def test_figures_are_held_against_thresholds(report):
    setting = report.draft.setting("t1")
    best = setting.at_gamma(setting.best_gamma["1"])
    expected = {
        "alpha_t1": setting.alpha,
        "alpha_greedy": report.draft.setting("greedy").alpha,
        "block_efficiency": setting.at_gamma(5).block_efficiency,
        "block_efficiency_t1": setting.at_gamma(5).block_efficiency,
        "block_efficiency_greedy": report.draft.setting("greedy").at_gamma(5).block_efficiency,
        "acceptance_rate": setting.at_gamma(5).acceptance_rate,
        "predicted_speedup": best.predicted_speedup["1"],
        "speedup_t1": setting.assisted.speedup,
    }
    results = check_gates(report, [f"{name}={value.value - 1e-6}" for name, value in expected.items()])
    assert {result.name: result.value for result in results} == expected
    assert all(result.has_passed and not result.is_sure for result in results)
    results = check_gates(report, [f"{name}={value.value + 1e-6}" for name, value in expected.items()])
    assert not any(result.has_passed or result.is_sure for result in results)
    results = check_gates(report, [f"{name}={value.low - 1e-6}" for name, value in expected.items()])
    assert all(result.has_passed and result.is_sure for result in results)


def test_the_threshold_itself_passes(report):
    (result,) = check_gates(report, [f"alpha_t1={report.draft.setting('t1').alpha.value!r}"])
    assert result.has_passed


def test_another_draft(report):
    (result,) = check_gates(report, ["alpha_t1=0.5"], draft=BEFORE)
    assert result.value == report.drafts[0].setting("t1").alpha and not result.has_passed
    with pytest.raises(ValueError, match="no draft 'other'; it has org/draft-generic, outputs/draft_"):
        check_gates(report, ["alpha_t1=0.5"], draft="other")
    assert check_gates(report, ["alpha_t1=0.5"], draft=AFTER) == check_gates(report, ["alpha_t1=0.5"])


def test_figures_that_are_not_there_are_refused_with_what_is(report):
    with pytest.raises(
        ValueError, match=r"no alpha_t2 and no speedup_greedy .* it has alpha_t1, block_efficiency, .*alpha_greedy"
    ):
        check_gates(report, ["alpha_t2=0.5", "alpha_t1=0.5", "speedup_greedy=1"])
    with pytest.raises(ValueError, match="needs costs at batch size 1"):
        check_gates(build_small_report(), ["predicted_speedup=1"])


def change_settings(report, **changes):
    settings = [dataclasses.replace(one, **changes) for one in report.draft.settings]
    return dataclasses.replace(report, drafts=[dataclasses.replace(report.draft, settings=settings)])


def test_metrics_without_loops_are_held_against_thresholds(report):
    setting = report.draft.setting("t1")
    best = setting.at_gamma(setting.best_gamma["1"])
    alpha = next(one.without for one in setting.left_out[0].metrics if one.name == "alpha")
    efficiency = setting.at_gamma(5).without["looping"].block_efficiency
    assert efficiency.value < setting.at_gamma(5).block_efficiency.value
    expected = {
        "alpha_without_looping_t1": alpha,
        "block_efficiency_without_looping": efficiency,
        "block_efficiency_without_looping_t1": efficiency,
        "acceptance_rate_without_looping": setting.at_gamma(5).without["looping"].acceptance_rate,
        "predicted_speedup_without_looping": best.without["looping"].predicted_speedup["1"],
        # no prompt lacks the template, so that leaving these out too changes nothing
        "block_efficiency_without_looping_or_untemplated": efficiency,
        "block_efficiency_without_untemplated": setting.at_gamma(5).block_efficiency,
    }
    results = check_gates(report, [f"{name}={value.value - 1e-6}" for name, value in expected.items()])
    assert {one.name: one.value for one in results} == expected and all(one.has_passed for one in results)
    assert not check_gates(report, [f"block_efficiency_without_looping={efficiency.value + 1e-6}"])[0].has_passed


def test_without_loops_where_all_or_none_are(report):
    [loops], by_gamma = report.draft.settings[0].left_out, report.draft.settings[0].by_gamma
    none = change_settings(report, left_out=[dataclasses.replace(loops, responses=0, share=0.0)])
    (one,) = check_gates(none, ["block_efficiency_without_looping=1"])
    assert one.value == by_gamma[4].block_efficiency
    everything = change_settings(report, left_out=[dataclasses.replace(loops, share=1.0)])
    for name in ("alpha_without_looping_t1", "block_efficiency_without_looping"):
        (one,) = check_gates(everything, [f"{name}=0"])
        assert not one.has_passed and one.value.value != one.value.value
    # what a report does not say is not taken from all responses
    for earlier in (
        change_settings(report, left_out=[]),
        change_settings(
            report, by_gamma=[dataclasses.replace(one, without={}) for one in report.draft.settings[0].by_gamma]
        ),
    ):
        with pytest.raises(ValueError, match="has no block_efficiency_without_looping to compare"):
            check_gates(earlier, ["block_efficiency_without_looping=1"])


def test_undefined_figures_do_not_pass():
    report = build_small_report()
    (result,) = check_gates(report, ["block_efficiency=1.5"])
    assert result.has_passed and not result.is_sure
    setting = dataclasses.replace(report.draft.settings[0], alpha=Interval(NAN, NAN, NAN))
    report = dataclasses.replace(report, drafts=[dataclasses.replace(report.draft, settings=[setting])])
    (result,) = check_gates(report, ["alpha_t0.7_greedy_draft=0"])
    assert not result.has_passed and not result.is_sure


def test_the_exit_status_is_not_that_of_an_error():
    assert FAILED_EXIT_STATUS not in (0, 1, 2)


def test_a_gate_says_that_a_metric_is_nan(report, tmp_path, capsys):
    setting = report.draft.settings[0]
    broken = dataclasses.replace(setting, alpha=Interval(NAN, NAN, NAN))
    draft = dataclasses.replace(report.draft, settings=[broken, *report.draft.settings[1:]])
    save_report(dataclasses.replace(report, drafts=[draft]), tmp_path)
    result = hold_against([f"alpha_{setting.name}=0.1"], str(tmp_path))
    assert not result["has_passed"]
    assert f"alpha_{setting.name} is NaN, which reaches no threshold (0.1)" in capsys.readouterr().err


SETTINGS = {"greedy": "stochastic", "t1_greedy_draft": "greedy"}


@pytest.mark.parametrize(
    ("gate", "known", "message"),
    [
        ("predicted_speedup=1", {"has_assisted": True}, "needs costs at batch size 1"),
        ("predicted_speedup_greedy=1", {"has_assisted": True}, "needs costs at batch size 1"),
        ("speedup=1", {"has_costs": True}, "needs assisted generation"),
        ("speedup_t1_greedy_draft=1", {"has_costs": True, "has_assisted": True}, "needs assisted generation"),
        ("alpha_t2=1", {}, "names the setting 't2', but there are greedy, t1_greedy_draft"),
        ("speed=1", {}, "names no metric"),
    ],
)
def test_a_gate_on_what_will_not_be_measured_is_refused(gate, known, message):
    with pytest.raises(ValueError, match=message):
        check_measured([gate], SETTINGS, **{"has_costs": False, "has_assisted": False, **known})


def test_a_gate_on_what_will_be_measured_is_fine():
    check_measured(
        ["alpha_greedy=0.5", "block_efficiency_t1_greedy_draft=2"], SETTINGS, has_costs=False, has_assisted=False
    )
    check_measured(
        ["predicted_speedup=1", "speedup=1", "speedup_greedy=1"], SETTINGS, has_costs=True, has_assisted=True
    )
    check_measured(["speedup_t1=1"], None, has_costs=False, has_assisted=True)
