"""`spec-kd plan-draft`: a plan on disk, made once, and refused with one line where it cannot be made."""

import json

import pytest
from transformers import AutoModelForCausalLM

COSTS = [{"cost_ratio": c, "verify_cost": {"1": 1.1, "4": 1.3}, "source": "mine"} for c in (0.05, 0.06, 0.9)]


@pytest.fixture
def command(models, tmp_path):
    (tmp_path / "costs.json").write_text(json.dumps(COSTS))
    return [
        "plan-draft", "--target", models / "target", "--costs", tmp_path / "costs.json", "--output_dir",
        tmp_path / "plan", "--shapes", "16x1", "16x2", "48x2-cut",
    ]  # fmt: skip


def test_a_plan_is_made_once_and_its_shape_becomes_a_draft(call, command, models, responses, tmp_path):
    status, result, said = call(*command)
    assert status == 0, said
    assert result["recommended"] == {
        "name": "16x2", "num_hidden_layers": 2, "hidden_size": 16, "fresh_layers": True,
    }  # fmt: skip
    assert result["headline"] in said and "16x2 is recommended" in result["headline"]
    assert [one["name"] for one in result["shapes"]] == ["16x1", "16x2", "48x2-cut"]
    assert "(mine)" in (tmp_path / "plan/plan.md").read_text() and result["path"].endswith("plan.md")
    assert call(*command)[1]["is_reused"]
    # a wish is not measured, so that the plan continues
    status, again, said = call(*command, "--wished_speedup", 2.0)
    assert status == 0 and not again["is_reused"] and "2 times plain decoding" in again["headline"], said
    (tmp_path / "costs.json").write_text(json.dumps(COSTS[::-1]))
    status, _, said = call(*command)
    assert status == 2 and "made from other inputs" in said
    shape = [text for name, value in list(result["recommended"].items())[1:] for text in (f"--{name}", value)]
    (tmp_path / "one.json").write_text(json.dumps(COSTS[1]))
    made = ("init-draft", "--target", models / "target", "--responses", responses, "--output_dir", tmp_path / "new")
    status, draft, said = call(*made, *shape, "--costs", tmp_path / "one.json", "--temperature", 1.0)
    assert status == 0 and draft["cost_ratio"] == 0.06 and "a step costs 0.060" in said
    assert draft["num_parameters"] == result["shapes"][1]["num_parameters"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "new").config.num_hidden_layers == 2


def test_short_runs_on_responses_with_a_signal(call, command, responses):
    run = ("--responses", responses, "--temperature", 1.0, "--run_minutes", 0.01, "--num_held_out", 2)
    status, result, said = call(*command, *run)
    assert status == 0, said
    assert "After 0.01 minutes of training its acceptance is" in result["headline"]


def test_no_shape_pays(call, command, tmp_path):
    (tmp_path / "costs.json").write_text(json.dumps([COSTS[2] | {"cost_ratio": 3.0}] * 3))
    status, result, _ = call(*command)
    assert status == 0 and result["recommended"] is None and "No shape can pay" in result["headline"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shapes", "192"], "which is no shape such as 192x4"),
        (["--shapes", "16x1"], "Give one for each"),
        (["--run_minutes", "5"], "Pass `responses`"),
        (["--costs", "nowhere.json"], "nowhere.json"),
        (["--responses", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--batch_sizes", "1", "2"], "one number of requests at a time"),
    ],
)
def test_wrong_input_is_refused(call, command, tmp_path, options, message):
    status, _, said = call(*command, *options)
    assert status == 2 and message in said
    assert not (tmp_path / "plan/plan.md").exists()
