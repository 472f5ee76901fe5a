"""Recipes that make their draft and bring it into an engine: init, export, check, costs, observe."""

import copy
import json
import os
import sys
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import fake_llama_server
import pytest
import yaml
from fake_llama_cpp import read_calls, write_tools
from hub.test_gguf import build_byte_tokenizer
from speculating_server import SpeculatingServer
from tiny import CHAT_TEMPLATE, build_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from spec_kd.cli import own_servers
from spec_kd.cli.recipe import load_recipe
from spec_kd.cli.recipe_choices import follow_evaluation
from spec_kd.evaluation import load_observed, load_report, read_costs
from spec_kd.hub import ServingFile

QUESTIONS = [
    f"Is a {left} a {right}?" for left in ("gene", "cell", "leaf", "root") for right in ("bone", "vein", "lung")
]
STEPS = ["initial_draft", "draft", "evaluation", "export", "check", "costs", "observation"]


class Killed(BaseException):
    """What a process does that is killed: nothing catches it."""


@pytest.fixture
def llama_cpp(tmp_path):
    """A folder of llama.cpp with programs that stand in for the converter, the quantizer and the server."""
    folder = write_tools(tmp_path / "llama.cpp")
    program = folder / "build/bin/llama-server"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{fake_llama_server.__file__}" "$@"\n')
    program.chmod(0o755)
    return folder


@pytest.fixture
def recipe(models, training, llama_cpp, tmp_path):
    rows = [{"messages": [{"role": "user", "content": text}]} for text in QUESTIONS]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    training["max_length"] = None
    return {
        "target": str(models / "target"),
        "output_dir": str(tmp_path / "run"),
        "seed": 3,
        "prompts": {"historical": {"paths": str(tmp_path / "log.jsonl"), "test_fraction": 0.4}},
        "respond": {"temperature": 0.0, "max_new_tokens": 6},
        "init": {"num_hidden_layers": 1, "num_samples": 4},
        "train": {"method": "white_box", **training},
        "evaluate": {
            "serving_engine": "llama.cpp", "costs": "none", "max_new_tokens": 6, "num_prompts": 4, "gammas": [3],
            "num_assistant_tokens": 3, "num_shown_prompts": 0,
        },
        "export": {"llama_cpp_dir": str(llama_cpp)},
        "check": None,
        "costs": {"num_rounds": 3, "repeats": 1},
        "observe": {"num_prompts": 4},
    }  # fmt: skip


@pytest.fixture
def run(call, tmp_path):
    def run_recipe(recipe, *flags):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        return call("run", tmp_path / "recipe.yaml", *flags)

    return run_recipe


@pytest.fixture
def load(recipe, tmp_path):
    """Loads the recipe with changes, given as `{"section.key": value}`; a value of `...` removes the key."""

    def load_changed(changes):
        changed = copy.deepcopy(recipe)
        for path, value in changes.items():
            *sections, name = path.split(".")
            section = changed
            for key in sections:
                section = section[key]
            section[name] = value
            if value is ...:
                del section[name]
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(changed, sort_keys=False))
        return load_recipe(tmp_path / "recipe.yaml")

    return load_changed


@pytest.fixture
def started(models, monkeypatch, tmp_path):
    """The servers that `observe` starts, with the models of the run: `(draft, drafted tokens, flags)` of each."""
    starts = []

    @contextmanager
    def serve(program, target, log, *, draft=None, num_draft_tokens=0, parallel, context_length, flags):
        assert program == str(tmp_path / "llama.cpp/build/bin/llama-server") and log.parent.name == "servers"
        for file in (target, draft or target):
            assert file.read_bytes().startswith(b"GGUF") and file.parent == tmp_path / "run/exported/gguf"
        starts.append((draft and draft.name, num_draft_tokens, (parallel, context_length, *flags)))
        model = AutoModelForCausalLM.from_pretrained(models / "target")
        drafting = None if draft is None else AutoModelForCausalLM.from_pretrained(tmp_path / "run/exported")
        tokenizer = AutoTokenizer.from_pretrained(models / "target")
        with SpeculatingServer("llama.cpp", model, drafting, tokenizer, gamma=num_draft_tokens) as server:
            yield SimpleNamespace(url=server.base_url)

    monkeypatch.setattr(own_servers, "run_llama_server", serve)
    return starts


def list_done(result):
    return [name for name, state in result["steps"].items() if state == "done"]


def test_from_a_target_to_a_server(run, recipe, started, monkeypatch, llama_cpp, tmp_path):
    """Killed in each of the last steps; then repeated, and repeated with other options."""
    folder = tmp_path / "run"

    def die(*_, **__):
        raise Killed

    for name in ("init_draft.spec_kd.init_draft", "recipe_serving.export.run", "observe.spec_kd.compare_observed"):
        with monkeypatch.context() as patched:
            patched.setattr(f"spec_kd.cli.{name}", die)
            with pytest.raises(Killed):
                run(recipe)
    assert (folder / "costs/costs.json").exists() and not (folder / "observation/observed.json").exists()
    num_started = len(started)
    status, result, said = run(recipe)
    assert status == 0, said
    assert list(result["steps"])[-7:] == STEPS and list_done(result) == ["observation"]
    assert len(started) == num_started + 2 and read_calls(llama_cpp) == ["f16", "f16"]
    assert started[-2:] == [(None, 0, (1, 2048, "--metrics")), ("draft-f16.gguf", 3, (1, 2048, "--metrics"))]

    serving = ServingFile.read(folder / "exported")
    assert serving.num_assistant_tokens == 3 and result["export"]["commands"] == {
        "llama.cpp": serving.engines["llama.cpp"].command
    }
    report = load_report(folder / "evaluation")
    expected = serving.engines["llama.cpp"].expected["greedy"]["block_efficiency"]["value"]
    assert expected == report.draft.setting("greedy").at_gamma(3).block_efficiency.value
    assert AutoModelForCausalLM.from_pretrained(folder / "initial_draft").config.num_hidden_layers == 1

    observed = load_observed(folder / "observation")
    assert observed.num_equal == observed.num_compared == 4
    round_cost = fake_llama_server.ROUND[3] + 3 * fake_llama_server.ACCEPTED / 2
    assert json.loads((folder / "costs/costs.json").read_text())[0]["round_cost"]["3"] == pytest.approx(round_cost)
    assert result["observation"]["predicted_speedup"][0] == pytest.approx(observed.predicted_speedup.value)
    assert f"run: predicted {observed.predicted_speedup.value:.2f}x, observed {observed.speedup.value:.2f}x" in said
    assert f"in {folder}/exported:\n{serving.engines['llama.cpp'].command}" in said
    assert "Predicted and observed" in (folder / "observation/report.md").read_text()

    assert list_done(run(recipe)[1]) == [] and len(started) == num_started + 2
    recipe["observe"]["server_flags"] = "--threads 2"
    status, result, said = run(recipe)
    assert status == 0 and list_done(result) == ["costs", "observation"], said
    assert started[-1][2] == (1, 2048, "--metrics", "--threads", "2")
    recipe["export"]["quantization"] = "Q8_0"
    status, result, said = run(recipe)
    assert status == 0 and list_done(result) == ["export", "costs", "observation"], said


def test_a_gate_that_is_not_reached_ends_the_run(run, recipe, tmp_path):
    recipe["evaluate"]["fail_under"] = {"block_efficiency": 100}
    status, result, _ = run(recipe)
    assert status == 3 and not result["has_passed"] and list(result["steps"])[-1] == "evaluation"
    assert not (tmp_path / "run/exported").exists()


def test_an_engine_that_cannot_use_the_draft_ends_the_run(run, recipe, models, started, tmp_path):
    """A draft of 261 rows for a target of 288, which vLLM refuses."""
    del recipe["init"], recipe["costs"]
    recipe |= {"draft": str(models / "draft"), "check": {"serving_engine": ["vllm"]}}
    status, result, said = run(recipe)
    assert status == 3 and list(result["steps"])[-1] == "check" and not result["has_passed"]
    assert "check-serving: error: vllm refuses" in said and not started


def test_a_plan_chooses_the_shape_or_ends_the_run(run, recipe, tmp_path):
    costs = [{"cost_ratio": c, "verify_cost": {"1": 1.1, "4": 1.3}} for c in (0.9, 0.05)]
    (tmp_path / "shapes.json").write_text(json.dumps(costs))
    recipe = {name: recipe[name] for name in ("target", "output_dir", "prompts", "respond", "train", "evaluate")}
    recipe["plan"] = {"costs": "shapes.json", "shapes": ["16x1", "16x2"]}
    status, result, said = run(recipe)
    assert status == 0 and result["has_passed"], said
    assert list(result["steps"])[-4:] == ["plan", *STEPS[:3]] and result["plan"]["recommended"]["name"] == "16x2"
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "run/initial_draft").config
    assert (config.num_hidden_layers, config.hidden_size) == (2, 16)
    assert list_done(run(recipe)[1]) == []

    (tmp_path / "shapes.json").write_text(json.dumps(costs[::-1]))
    status, result, said = run({**recipe, "init": {"seed": 5}})
    assert status == 0 and list_done(result) == ["plan", *STEPS[:3]], said
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run/initial_draft").config.num_hidden_layers == 1

    (tmp_path / "shapes.json").write_text(json.dumps([{**one, "cost_ratio": 3.0} for one in costs]))
    status, result, said = run(recipe)
    assert status == 3 and not result["has_passed"] and list(result["steps"])[-1] == "plan"
    assert "No shape can pay" in said and result["plan"]["recommended"] is None


def test_drafted_tokens_are_those_of_the_plan_and_then_of_the_evaluation(
    run, recipe, load, started, monkeypatch, tmp_path
):
    folder, costs = tmp_path / "run", {"cost_ratio": 0.05, "verify_cost": {"1": 1.1, "4": 1.3}, "source": "mine"}
    (tmp_path / "shapes.json").write_text(json.dumps([costs, {**costs, "cost_ratio": 0.9}]))
    del recipe["init"]
    recipe["plan"] = {"costs": "shapes.json", "shapes": ["16x1", "16x2"]}
    recipe["evaluate"] |= {"gammas": [1, 2, 3]}
    for name in ("num_assistant_tokens", "costs"):
        del recipe["evaluate"][name]
    status, result, said = run(recipe)
    assert status == 0, said
    report = load_report(folder / "evaluation")
    best = report.draft.setting("greedy").best_gamma["1"]
    assert report.num_assistant_tokens == result["plan"]["num_assistant_tokens"] != best
    [known] = read_costs(folder / "plan/costs.json")
    assert (known.cost_ratio, report.draft.costs[0].source) == (0.05, "mine")
    assert json.loads((folder / "initial_draft/.step.json").read_text())["result"]["cost_ratio"] == 0.05

    serving = ServingFile.read(folder / "exported")
    assert serving.num_assistant_tokens == best and f"--spec-draft-n-max {best}" in serving.engines["llama.cpp"].command
    speedup = report.draft.setting("greedy").at_gamma(best).predicted_speedup["1"]
    assert serving.engines["llama.cpp"].expected["greedy"]["predicted_speedup"]["1"]["value"] == speedup.value
    assert f"{best} drafted token a round, predicted to give {speedup.value:.2f} [" in said
    assert started[-1][:2] == ("draft-f16.gguf", best)
    assert load_observed(folder / "observation").num_assistant_tokens == best
    assert list(read_costs(folder / "costs/costs.json")[0].round_cost) == [best]
    assert list_done(run(recipe)[1]) == []

    # what the recipe says is kept
    changes = {"init": ..., "plan": recipe["plan"], "evaluate": recipe["evaluate"]}
    assert follow_evaluation(load(changes)).export[1].num_assistant_tokens == best
    given = follow_evaluation(load({**changes, "export.num_assistant_tokens": 2}))
    assert given.export[1].num_assistant_tokens == given.servers.num_assistant_tokens == 2
    given = follow_evaluation(load({**changes, "observe.num_assistant_tokens": 2}))
    assert (given.export[1].num_assistant_tokens, given.servers.num_assistant_tokens) == (best, 2)
    given = follow_evaluation(load({**changes, "evaluate": {**recipe["evaluate"], "num_assistant_tokens": 3}}))
    assert given.export[1].num_assistant_tokens == given.servers.num_assistant_tokens == 3

    # where it is better to end drafts early, servers are told below which probability
    early = replace(
        report.draft.recommendations.plans[0],
        setting="greedy", batch_size=1, method="threshold", num_assistant_tokens=3, threshold=0.4, is_recommended=True,
    )  # fmt: skip
    advice = replace(report.draft.recommendations, plans=[early])
    report = replace(report, drafts=[replace(report.draft, recommendations=advice)])
    monkeypatch.setattr("spec_kd.cli.recipe_choices.load_report", lambda _: report)
    status, result, said = run(recipe)
    assert status == 0 and list_done(result) == ["export", "check", "costs", "observation"], said
    assert "3 drafted tokens a round, ended below a probability of 0.4, predicted to give" in said
    serving = ServingFile.read(folder / "exported")
    assert "--spec-draft-n-max 3 --spec-draft-p-min 0.4" in serving.engines["llama.cpp"].command
    assert (serving.num_assistant_tokens, serving.assistant_confidence_threshold) == (3, 0.4)
    assert [one[2] for one in started[-2:]] == [
        (1, 2048, "--metrics"),
        (1, 2048, "--metrics", "--spec-draft-p-min", "0.4"),
    ]
    assert list(read_costs(folder / "costs/costs.json")[0].round_cost) == [1, 2, 3]
    given = follow_evaluation(load({**changes, "export.num_assistant_tokens": 2}))
    assert given.export[1].assistant_confidence_threshold == given.observe[1].assistant_confidence_threshold == 0
    given = follow_evaluation(load({**changes, "observe.num_assistant_tokens": 2}))
    assert (given.export[1].assistant_confidence_threshold, given.servers.threshold) == (0.4, 0)


def test_a_plan_is_timed_in_the_llama_cpp_of_the_export(load, llama_cpp, tmp_path):
    files, options, timing = load({"init": ..., "plan": {}, "observe.server_flags": "-t 1"}).plan
    assert (options.llama_cpp_dir, options.quantization) == (str(llama_cpp), "f16")
    assert (timing.server, timing.server_flags) == (f"{llama_cpp}/build/bin/llama-server", "-t 1")
    assert (files.responses, options.temperature) == (f"{tmp_path}/run/responses/responses.parquet", 0.0)
    assert load({"init": ..., "plan": {}, "observe": ..., "costs": ...}).plan[2].server == timing.server
    assert load({"init": ..., "plan": {"costs": "shapes.json"}}).plan[1].llama_cpp_dir is None


REAL = os.environ.get("SPEC_KD_LLAMA_CPP")


@pytest.mark.skipif(REAL is None, reason="SPEC_KD_LLAMA_CPP names no folder of llama.cpp")
def test_from_a_target_to_the_real_llama_cpp(run, recipe, tmp_path):
    """Shapes are timed in llama-server, and the draft of one is served there with the number of tokens that is best."""
    model = build_llama(seed=0, hidden_size=384, layers=8, vocab_size=259)
    model.config.eos_token_id = model.generation_config.eos_token_id = 2
    model.save_pretrained(tmp_path / "target")
    tokenizer = build_byte_tokenizer()
    tokenizer.chat_template, tokenizer.pad_token = CHAT_TEMPLATE, "<unk>"
    tokenizer.save_pretrained(tmp_path / "target")
    few = {"num_rounds": 8, "repeats": 1}
    del recipe["init"], recipe["evaluate"]["num_assistant_tokens"], recipe["evaluate"]["costs"]
    recipe["plan"] = {"shapes": ["64x1", "128x2"], "gammas": [1, 3], "reachable_alpha": 1.0, **few}
    recipe |= {"target": str(tmp_path / "target"), "export": {"llama_cpp_dir": REAL}, "costs": few}
    recipe["observe"]["server_flags"] = "--threads 1 -fa off"
    status, result, said = run(recipe)
    assert status == 0, said
    folder, name = tmp_path / "run", result["plan"]["recommended"]["name"]
    assert [one["name"] for one in result["plan"]["shapes"]] == ["64x1", "128x2"] and name in ("64x1", "128x2")
    report = load_report(folder / "evaluation")
    assert "rounds of llama-server" in report.draft.costs[0].source
    best = report.draft.setting("greedy").best_gamma["1"]
    observed = load_observed(folder / "observation")
    assert ServingFile.read(folder / "exported").num_assistant_tokens == observed.num_assistant_tokens == best
    assert observed.num_compared == 4 and observed.speedup.value > 0 and observed.predicted_speedup.value > 0
    assert said.index("timing takes about") < said.index("run: what is left") < said.index("run: predicted ")


def test_sections_become_the_arguments_of_commands(load, tmp_path, models, llama_cpp):
    recipe = load({})
    folder, target = str(tmp_path / "run"), str(models / "target")
    (files, shape), serving = recipe.init, recipe.serving
    assert (files.responses, files.temperature, shape.seed) == (f"{folder}/responses/responses.parquet", 0.0, 3)
    assert recipe.train.draft.model_name_or_path == files.output_dir == f"{folder}/initial_draft"
    assert recipe.evaluate[0].drafts["before"] == files.output_dir
    files, options = serving.export
    assert (files.draft, files.target, files.report) == (f"{folder}/draft", target, f"{folder}/evaluation/report.json")
    assert (options.serving_engines, options.num_assistant_tokens) == (["llama.cpp"], 3)
    assert (serving.check.draft, serving.check.serving_engine) == (f"{folder}/exported", ["llama.cpp"])
    files, options = serving.observe
    assert (files.draft, files.prompts, files.num_prompts) == (f"{folder}/exported", f"{folder}/prompts/test.arrow", 4)
    assert (files.costs, files.report) == (f"{folder}/costs/costs.json", f"{folder}/evaluation/report.json")
    assert (options.serving_engine, options.max_new_tokens, options.num_assistant_tokens) == ("llama.cpp", 6, 3)
    files, timing = serving.costs
    assert (files.gammas, timing.batch_sizes, timing.repeats) == ([3], [1], 1)
    assert serving.servers.draft == files.draft == f"{folder}/exported/gguf/draft-f16.gguf"
    assert serving.servers.options.server == timing.server == f"{llama_cpp}/build/bin/llama-server"


def test_servers_that_run_already(load, tmp_path):
    addresses = {"observe.url": "http://localhost:1", "observe.plain_url": "http://localhost:2", "costs": ...}
    serving = load({**addresses, "export": {"quantization": "f16"}}).serving
    assert serving.servers is serving.costs is None and serving.observe[0].plain_url == "http://localhost:2"
    assert load({"costs": False}).serving.costs is None and load({"costs": False}).serving.observe[0].costs is None
    (tmp_path / "costs.json").write_text("[]")
    assert load({**addresses, "observe.costs": "costs.json"}).serving.observe[0].costs == str(tmp_path / "costs.json")
    assert load({"observe.temperature": 0.3}).serving.observe[0].report is None  # of another setting
    alone = load({**addresses, "export": ..., "check": {}}).serving
    assert alone.export is None and alone.check.draft == alone.observe[0].draft == str(tmp_path / "run/draft")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft": "my-org/draft"}, "`draft` names a draft, and `init` or `plan` makes one"),
        ({"init": ...}, "`draft` missing. Give one, or let a section `init` or `plan` make one."),
        ({"plan": {}}, "init: `num_hidden_layers` is chosen by `plan`"),
        ({"plan": {"shape": "8x1"}}, "plan: there is no option `shape`. Did you mean shapes?"),
        ({"init.num_layers": 1}, "init: there is no option `num_layers`. Did you mean layers?"),
        ({"init.output_dir": "a"}, "init: `output_dir` is set by the recipe"),
        ({"export.report": "a"}, "export: `report` is set by the recipe"),
        ({"export.serving_engines": ["vllm"]}, "export: `llama_cpp_dir` writes GGUF files for llama.cpp"),
        ({"check": {"engine": "vllm"}}, "check: there is no option `engine`"),
        ({"observe.prompts": "a"}, "observe: `prompts` is set by the recipe"),
        ({"observe.serving_engine": "openvino"}, "observe: `serving_engine` is 'openvino'"),
        ({"observe.serving_engine": "vllm"}, "observe: there is no server to ask. Give its address as `url`"),
        ({"export": {}}, "observe: there is no server to ask"),
        ({"export": ...}, "observe: there is no server to ask"),
        ({"observe.server_flags": "'"}, "observe: `server_flags` is"),
        ({"observe.context_length": 0}, "observe: `context_length` is 0"),
        ({"observe": ...}, "costs: rounds are timed for the prediction of `observe`"),
        ({"observe.url": "http://localhost:1"}, "costs: only servers that `observe` starts are timed"),
        ({"costs.gamma": 1}, "costs: there is no option `gamma`. Did you mean gammas?"),
    ],
)
def test_mistakes_are_named_with_their_section(load, changes, message):
    with pytest.raises(ValueError) as caught:
        load(changes)
    assert message in str(caught.value) and "recipe.yaml" in str(caught.value)


def test_what_is_not_there_is_found_before_the_first_step(run, recipe, llama_cpp, tmp_path):
    assert run(recipe, "--only_check")[0] == 0
    for section, name, value, message in (
        ("init", "donor", "./none", "init: donor: `./none` does not exist"),
        ("init", "responses", "./none.jsonl", "init: responses: `./none.jsonl` does not exist"),
        ("plan", "costs", "./none.json", "plan: costs: `./none.json` does not exist"),
        ("export", "llama_cpp_dir", "./none", "export: `llama_cpp_dir="),
        ("observe", "server", "./none", "observe: `./none` is no program"),
        ("observe", "costs", "./none.json", "observe: costs: `./none.json` does not exist"),
    ):
        changed = copy.deepcopy(recipe)
        if section == "plan":
            changed |= {"init": {}, "plan": {}}
        changed[section][name] = value
        if section == "observe" and name == "costs":
            del changed["costs"]
        status, _, said = run(changed, "--only_check")
        assert status == 2 and message in said.replace(f"{tmp_path}/", ""), said
    assert not (tmp_path / "run").exists()
