import subprocess
import sys

import pytest
from trl import TrlParser

from spec_kd.evaluation import EvaluationOptions, ServingCosts


def test_a_command_line_gives_all_options():
    line = (
        "--serving_engine vllm --draft_samplings stochastic greedy --temperatures 0 0.7 --top_k 20 --gammas 1 4 "
        "--group_by domain scenario --costs none --batch_sizes 1 8 --no_show_prompt_text"
    )
    (options,) = TrlParser(EvaluationOptions).parse_args_and_config(line.split())
    assert options == EvaluationOptions(
        serving_engine="vllm", draft_samplings=["stochastic", "greedy"], temperatures=[0.0, 0.7], top_k=20,
        gammas=[1, 4], group_by=["domain", "scenario"], costs="none", batch_sizes=[1, 8], show_prompt_text=False,
    )  # fmt: skip
    (defaults,) = TrlParser(EvaluationOptions).parse_args_and_config([])
    assert defaults == EvaluationOptions()


def test_settings_are_named_by_temperature_truncation_and_drafting():
    options = EvaluationOptions(temperatures=[0.0, 0.7], draft_samplings=["stochastic", "greedy"], top_k=20, top_p=0.9)
    assert [(one.name, one.temperature, one.draft_sampling) for one in options.list_settings()] == [
        ("greedy", 0.0, "stochastic"),
        ("t0.7_k20_p0.9", 0.7, "stochastic"),
        ("t0.7_k20_p0.9_greedy_draft", 0.7, "greedy"),
    ]
    assert [one.name for one in EvaluationOptions(serving_engine="vllm").list_settings()] == [
        "greedy",
        "t1_greedy_draft",
    ]


def test_costs_are_given_measured_or_left_out(tmp_path):
    path = tmp_path / "costs.json"
    path.write_text('{"cost_ratio": 0.1, "verify_cost": {"5": 1.1}}')
    given = [ServingCosts(cost_ratio=0.1, verify_cost={5: 1.1})]
    assert EvaluationOptions(costs=str(path)).read_costs() == EvaluationOptions(costs=given).read_costs() == given
    assert EvaluationOptions(costs="none").read_costs() == EvaluationOptions(costs=None).read_costs() == []
    assert EvaluationOptions().read_costs() is None


@pytest.mark.parametrize("changed", [{"top_k": 5}, {"top_p": 0.9}, {"num_assisted_prompts": 1}])
def test_what_needs_the_target_here_is_refused_without_it(changed):
    options = EvaluationOptions(**changed)
    options.check_target(is_here=True)
    with pytest.raises(ValueError, match="the target as a transformers model"):
        options.check_target(is_here=False)
    EvaluationOptions().check_target(is_here=False)


def test_the_options_are_known_without_the_heavy_libraries():
    code = "import sys; import spec_kd.evaluation.options; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
