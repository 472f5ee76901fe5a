import json

import pytest


@pytest.fixture
def options(models, prompts, tmp_path):
    return [
        "evaluate", "--drafts", f"before={models / 'draft'}", f"after={models / 'target'}",
        "--target", models / "target", "--prompts", prompts, "--output_dir", tmp_path / "report",
        "--max_new_tokens", 6, "--costs", "none", "--num_prompts", 4,
    ]  # fmt: skip


def test_a_report_and_its_gates(call, options, tmp_path):
    status, result, errors = call(*options, "--fail_under", "block_efficiency=1.5", "alpha_t1=0.9")
    assert status == 0, errors
    assert result["draft"] == "after" and result["has_passed"]
    assert result["metrics"]["alpha_greedy"][0] == 1.0  # the target drafts for itself
    for kind in ("json", "md", "html", "png"):
        assert (tmp_path / "report" / f"report.{kind}").stat().st_size > 0
    # a threshold is no input: the report stands, and is held against the new one
    status, result, errors = call(*options, "--fail-under", "block_efficiency=100")
    assert status == 3 and result["is_reused"] and not result["has_passed"]
    assert result["gates"][0]["threshold"] == 100 and "lies below 100" in errors


def test_prompts_without_the_template_are_told(call, options, prompts, tmp_path):
    status, result, errors = call(*options)
    assert status == 0 and result["left_out"]["greedy"] == {"looping": 0.0, "untemplated": 0.0}
    assert "the metrics without them" not in errors
    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(json.dumps({"prompt": f"{i} plus {i}"}) + "\n" for i in range(4)))
    options[options.index(prompts)] = plain
    options[options.index("--output_dir") + 1] = tmp_path / "second"
    for _ in range(2):  # also where the report is reused
        status, result, errors = call(*options)
        assert status == 0 and result["left_out"]["t1"]["untemplated"] == 1.0
        assert "evaluate: t1: 100.0% prompts without the chat template" in errors


def test_costs_of_another_machine(call, options, tmp_path):
    table = {"cost_ratio": 0.1, "verify_cost": {"1": 1.0, "8": 1.2}, "source": "vLLM on a card"}
    costs = tmp_path / "costs.json"
    costs.write_text(json.dumps([table, {**table, "batch_size": 8, "cost_ratio": 0.5}]))
    options[options.index("none")] = costs
    assert call(*options)[0] == 0
    for _ in range(2):  # also where the report is reused
        status, result, errors = call(*options)
        assert status == 0 and "recommended for greedy decoding, batch size 1" in errors
        assert result["configurations"][0]["command"] in errors and "/target" in errors
        assert result["configurations"][0]["serving_engine"] == "transformers"
    shown = json.loads((tmp_path / "report" / "report.json").read_text())["drafts"][1]["costs"]
    assert [(own["batch_size"], own["cost_ratio"], own["source"]) for own in shown] == [
        (1, 0.1, "vLLM on a card"),
        (8, 0.5, "vLLM on a card"),
    ]
    costs.write_text(json.dumps({**table, "cost_ratio": 0.3}))  # other costs under the same name are another input
    status, _, errors = call(*options)
    assert status == 2 and "was made from other inputs" in errors
    costs.write_text(json.dumps({"cost_ratio": 0.3}))
    status, _, errors = call(*options)
    assert status == 2 and "lack ['verify_cost']" in errors and "Traceback" not in errors


def test_responses_with_a_signal_need_no_target(call, models, responses, tmp_path):
    status, result, errors = call(
        "evaluate", "--draft", models / "draft", "--prompts", responses, "--output_dir", tmp_path / "report"
    )
    assert status == 0, errors
    assert "alpha_t1" in result["metrics"] and "alpha_greedy" not in result["metrics"]


def test_the_targets_responses_outlive_another_draft(call, options, tmp_path):
    options += ["--responses_dir", tmp_path / "responses"]
    call(*options)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "responses").rglob("*.parquet")}
    assert len(written) == 2  # greedy, and at temperature 1
    options[options.index("--output_dir") + 1] = tmp_path / "second"
    assert call(*options, "--num_assistant_tokens", 3)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "responses").rglob("*.parquet")} == written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fail_under", "speed=2"], "names no metric"),
        (["--serving_engine", "triton"], "must be one of transformers, vllm"),
        (["--costs", "guess"], "`costs` is 'guess', but must be 'measure', 'none', a JSON file"),
        (["--temperatures", "-1"], "temperature"),
        (["--drafts", "./a", "./b/c"], "`./a` does not exist"),
        (["--split", "test", "--prompts", "."], ""),
    ],
)
def test_wrong_arguments(call, options, arguments, message):
    status, result, errors = call(*options, *arguments)
    assert status == 2 and result is None and message in errors and "Traceback" not in errors


def test_two_drafts_of_one_name_are_refused(call, options, models):
    status, _, errors = call(*options, "--drafts", models / "draft", models / "draft")
    assert status == 2 and "`drafts` has 'draft' twice" in errors


def test_the_last_line_is_strict_json(call, models, responses, tmp_path, capsys):
    """One prompt has no interval: its bounds are null, not NaN."""
    _, result, _ = call(
        "evaluate", "--draft", models / "draft", "--prompts", responses, "--output_dir", tmp_path / "report",
        "--num_prompts", 1,
    )  # fmt: skip
    assert result["metrics"]["block_efficiency"][1:] == [None, None]
    json.dumps(result, allow_nan=False)
