"""What a run says of the time of its steps before they begin, and the small budgets of `--quick`."""

import copy
import json

import pytest
import yaml

from spec_kd.cli.recipe import load_recipe
from spec_kd.cli.recipe_times import Pace, list_times, tell_times


@pytest.fixture
def recipe(models, training, tmp_path):
    rows = [{"prompt": f"Is a {left} a {right}?"} for left in ("gene", "cell", "leaf", "root") for right in "abcdef"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    costs = [{"cost_ratio": 0.05, "verify_cost": {"1": 1.1, "4": 1.3}, "target_step_seconds": 0.5}] * 2
    (tmp_path / "shapes.json").write_text(json.dumps(costs))
    training = {name: value for name, value in training.items() if name not in ("max_length", "max_steps")}
    return {
        "target": str(models / "target"),
        "output_dir": str(tmp_path / "run"),
        "prompts": {
            "curated": {"dataset": "prompts.jsonl", "test_fraction": 0.4},
            "mix": {"num_prompts": 10},
        },
        "respond": {"max_new_tokens": 8},
        "plan": {"shapes": ["16x1", "16x2"], "costs": "shapes.json"},
        "train": {"method": "white_box", "max_train_minutes": 90, **training},
        "evaluate": {"costs": "none", "max_new_tokens": 16, "num_prompts": 4, "temperatures": [1.0]},
        "quick": {
            "prompts": {"mix": {"num_prompts": 6}},
            "respond": {"max_new_tokens": 4},
            "train": {"max_train_minutes": None, "max_steps": 2},
            "evaluate": {"max_new_tokens": 4},
        },
    }


@pytest.fixture
def load(recipe, tmp_path):
    def load_changed(is_quick=False, **changes):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**copy.deepcopy(recipe), **changes}))
        return load_recipe(tmp_path / "recipe.yaml", is_quick)

    return load_changed


def test_budgets_and_paces_become_minutes(load, recipe, capsys):
    plan = {**recipe["plan"], "run_minutes": 7.5}
    addresses = {"url": "http://localhost:1", "plain_url": "http://localhost:2", "serving_engine": "vllm"}
    found = load(plan=plan, observe=addresses)
    times = {one.step: one for one in list_times(found)}
    assert {name: one.minutes for name, one in times.items() if one.minutes} == {"plan": 15, "draft": 90}
    assert "up to 8 tokens to 10 prompts" in times["responses"].why
    assert "asked twice" in times["observation"].why and times["prompts"].shown == "short"
    tell_times("the steps", list(times.values()))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "run: the steps" and lines[-1].split()[:3] == ["together", "105", "min"]
    columns = {line.index(one.why) for line, one in zip(lines[1:], times.values(), strict=False)}
    assert columns == {lines[1].index("no model")}
    # 4 responses of twice the tokens at 3 seconds
    measured = {one.step: one for one in list_times(found, Pace(response_seconds=3.0))}
    assert measured["evaluation"].minutes == 4 * 2 * 3.0 / 60


def test_training_without_minutes_says_so_itself(load, recipe):
    train = {name: value for name, value in recipe["train"].items() if name != "max_train_minutes"}
    for changes, why in (
        ({"max_train_tokens": 5000}, "5,000 tokens; after 5 steps it says what is left"),
        ({"max_steps": 30}, "30 steps"),
        ({"num_train_epochs": 2}, "2 epochs"),
    ):
        [time] = [one for one in list_times(load(train={**train, **changes})) if one.step == "draft"]
        assert time.minutes is None and why in time.why


def test_a_quick_run_says_before_and_after_what_it_takes(call, load, recipe, tmp_path):
    load()
    status, result, said = call("run", tmp_path / "recipe.yaml", "--quick")
    assert status == 0, said
    assert result["output_dir"] == f"{tmp_path}/run-quick" and not (tmp_path / "run").exists()
    signs = ("run: the steps and their times", "prompts curated:", "It pays", "run: what is left", "train white_box:")
    places = list(map(said.index, signs))
    assert places == sorted(places) and "up to 4 tokens to 6 prompts" in said[places[0] : places[1]]
    left = said[places[-2] : places[-1]]
    assert "responses" not in left.split("at the pace of")[0] and "at the pace of `responses`" in left
    assert set(result["minutes"]) == set(result["steps"]) and all(value >= 0 for value in result["minutes"].values())
    assert f"run: draft took {result['minutes']['draft']:.1f} minutes" in said
    again = call("run", tmp_path / "recipe.yaml", "--quick")
    assert again[1]["minutes"] == {} and "run: what to expect: 16x" in again[2]


def test_a_section_quick_that_is_wrong(load, recipe):
    with pytest.raises(ValueError, match=r"quick: there is no `trian`\. Did you mean train"):
        load(quick={"trian": {}})
    with pytest.raises(ValueError, match="quick: there is no section `quick` with small budgets"):
        load(is_quick=True, quick=None)
    assert load(is_quick=True, quick={"output_dir": "elsewhere"}).output_dir == "elsewhere"
    assert load(is_quick=True).train.config.max_train_minutes is None and load().train.config.max_train_minutes == 90
