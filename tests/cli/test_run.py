"""Whole recipes on tiny models: the three scenarios, killed at each step, with changed inputs."""

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from transformers import Trainer

from spec_kd.cli import steps
from spec_kd.data.shards import ShardStore

QUESTIONS = [
    "how do I bake bread", "what is the capital of France", "explain photosynthesis to a child",
    "write a poem about the sea", "fix this python loop for me", "translate good morning to Dutch",
    "why is the sky blue at noon", "plan a week of dinners", "name three prime numbers",
    "who painted the night watch", "convert 10 miles to km", "what does HTTP 404 mean",
]  # fmt: skip


class Killed(BaseException):
    """What a process does that is killed: nothing catches it."""


def write_log(path, questions=QUESTIONS):
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": f"a{i}"}]}
        for i, text in enumerate(questions)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def recipe(models, training, tmp_path):
    """A recipe on historical queries, offline; the tests change it."""
    write_log(tmp_path / "log.jsonl")
    training["max_length"] = None
    return {
        "target": str(models / "target"),
        "draft": str(models / "draft"),
        "output_dir": str(tmp_path / "run"),
        "seed": 3,
        "prompts": {"historical": {"paths": str(tmp_path / "log.jsonl"), "test_fraction": 0.3}},
        "respond": {
            "temperature": 1.0, "max_new_tokens": 6, "teacher_signal": "sampled_logprobs", "batch_size": 2,
            "shard_size": 2,
        },
        "train": {"method": "white_box", **training},
        "evaluate": {"costs": "none", "max_new_tokens": 6, "num_prompts": 4, "num_shown_prompts": 1},
    }  # fmt: skip


@pytest.fixture
def run(call, tmp_path):
    """Writes a recipe down and runs it."""

    def run_recipe(recipe, *flags):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        return call("run", tmp_path / "recipe.yaml", *flags)

    return run_recipe


def list_done(result):
    return [name for name, state in result["steps"].items() if state == "done"]


def load_weights(recipe):
    return load_file(Path(recipe["output_dir"], "draft", "model.safetensors"))


def test_historical_queries_killed_at_each_step(run, recipe, monkeypatch, tmp_path):
    whole = {**recipe, "output_dir": str(tmp_path / "whole")}
    status, expected, errors = run(whole)
    assert status == 0, errors
    assert list_done(expected) == ["parts/historical", "prompts", "responses", "draft", "evaluation"]
    assert "alpha_greedy" in expected["metrics"]

    train_step, write_shard, write_note = Trainer.training_step, ShardStore.write, steps._write_note

    def die_in_shard(self, number, table):
        if number == 1:
            raise Killed
        write_shard(self, number, table)

    def die_in_training(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise Killed
        return train_step(self, *args, **kwargs)

    def die_in_evaluation(*args, **kwargs):
        raise Killed

    def die_before_note_of(name):
        def die(folder, inputs, result=None, files=None):
            if result is not None and Path(folder).name == name:
                raise Killed
            write_note(folder, inputs, result, files)

        return die

    deaths = [
        ("spec_kd.cli.steps._write_note", die_before_note_of("historical")),
        ("spec_kd.cli.steps._write_note", die_before_note_of("prompts")),
        ("spec_kd.data.shards.ShardStore.write", die_in_shard),
        ("spec_kd.cli.steps._write_note", die_before_note_of("responses")),
        ("transformers.Trainer.training_step", die_in_training),
        ("spec_kd.cli.steps._write_note", die_before_note_of("draft")),
        ("spec_kd.evaluation.draft_measurement.score_responses", die_in_evaluation),
        ("spec_kd.cli.steps._write_note", die_before_note_of("evaluation")),
    ]
    for name, death in deaths:
        with monkeypatch.context() as patched:
            patched.setattr(name, death)
            with pytest.raises(Killed):
                run(recipe)
    status, result, errors = run(recipe)
    assert status == 0, errors
    assert list_done(result) == ["evaluation"]
    assert result["metrics"] == expected["metrics"]
    weights, others = load_weights(recipe), load_weights(whole)
    assert all((weights[name] == others[name]).all() for name in others)


def test_a_changed_input_redoes_what_depends_on_it(run, recipe, tmp_path):
    log, written = tmp_path / "log.jsonl", tmp_path / "run" / "test_responses"
    recipe["output_dir"] = str(tmp_path / "first")
    _, first, _ = run(recipe)
    (tmp_path / "first").rename(tmp_path / "run")
    recipe["output_dir"] = str(tmp_path / "run")
    log.touch()
    assert list_done(run(recipe)[1]) == []

    responses = tmp_path / "run" / "responses" / "responses.parquet"
    responses.write_bytes(responses.read_bytes()[:100])
    status, result, errors = run(recipe)
    assert status == 0, errors
    assert list_done(result) == ["responses"] and result["metrics"] == first["metrics"]

    log.write_text(log.read_text() + log.read_text().splitlines()[0] + "\n")  # a duplicate: the same prompts
    assert list_done(run(recipe)[1]) == ["parts/historical"]

    times = {path: path.stat().st_mtime_ns for path in written.rglob("*.parquet")}
    recipe["train"]["learning_rate"] = 2e-2
    status, result, _ = run(recipe)
    assert list_done(result) == ["draft", "evaluation"]
    assert {
        path: path.stat().st_mtime_ns for path in written.rglob("*.parquet")
    } == times  # the target's, not the draft's

    recipe["evaluate"]["fail_under"] = {"block_efficiency": 100}
    status, result, _ = run(recipe)
    assert status == 3 and list_done(result) == [] and not result["has_passed"]

    recipe["evaluate"] |= {"num_assistant_tokens": 3, "fail_under": ["block_efficiency=1"]}
    status, result, _ = run(recipe)
    assert status == 0 and list_done(result) == ["evaluation"]

    write_log(log, [*QUESTIONS, "which way is north", "is tea older than coffee", "how long is a light year"])
    assert len(list_done(run(recipe)[1])) == 5
    note = json.loads((tmp_path / "run" / "responses" / ".step.json").read_text())
    assert note["inputs"]["options"]["max_new_tokens"] == 6 and note["hash"]


def test_curated_prompts_with_a_live_target(run, recipe, tmp_path):
    rows = [{"question": text, "answer": "unused"} for text in QUESTIONS]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe["prompts"] = {
        "curated": {"dataset": str(tmp_path / "set.jsonl"), "prompt_column": "question", "test_fraction": 0.3}
    }
    del recipe["respond"]["teacher_signal"]
    recipe["train"] |= {"divergence": "tvd", "align_vocabulary": True, "eval_strategy": "steps", "eval_steps": 2}
    status, _, errors = run(recipe)
    assert status == 0, errors
    assert json.loads((tmp_path / "run" / "draft" / "config.json").read_text())["vocab_size"] == 288


def test_synthetic_queries_online_and_a_mix(run, recipe, tmp_path):
    recipe["prompts"] |= {
        "synthetic": {
            "num_queries": 6, "max_new_tokens": 32, "near_duplicate_threshold": None, "test_fraction": 0.0,
        },
        "mix": {"weights": {"historical": 1, "synthetic": 1}},
    }  # fmt: skip
    recipe |= {"respond": False, "train": {**recipe["train"], "method": "online_gkd", "lmbda": 1, "max_new_tokens": 4}}
    status, result, errors = run(recipe)
    assert status == 0, errors
    assert "responses" not in result["steps"] and not (tmp_path / "run" / "responses").exists()
    shares = json.loads((tmp_path / "run" / "prompts" / "mix.json").read_text())["train"]["parts"]
    assert [part["name"] for part in shares] == ["historical", "synthetic"] and shares[0]["rows"] == shares[1][
        "rows"
    ] > 0
    # keeping more of what was asked continues the synthesis
    recipe["prompts"]["synthetic"]["num_queries"] = 7
    status, result, errors = run(recipe)
    assert status == 0 and "parts/synthetic" in list_done(result), errors


def test_synthetic_queries_alone(run, recipe):
    recipe["prompts"] = {
        "synthetic": {
            "num_queries": 12, "max_new_tokens": 32, "near_duplicate_threshold": None, "test_fraction": 0.3,
        }
    }  # fmt: skip
    status, result, errors = run(recipe)
    assert status == 0, errors
    assert list_done(result)[0] == "parts/synthetic" and "alpha_t1" in result["metrics"]


def test_black_box_on_the_answers_of_the_logs(run, recipe, tmp_path):
    recipe |= {"respond": False, "train": {**recipe["train"], "method": "black_box"}}
    recipe["prompts"]["historical"]["test_fraction"] = 0
    (tmp_path / "own.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    recipe["evaluate"]["prompts"] = str(tmp_path / "own.jsonl")
    status, result, errors = run(recipe)
    assert status == 0, errors
    assert "responses" not in result["steps"]


def test_no_test_prompts_are_an_error_before_the_target_answers(run, recipe, tmp_path):
    recipe["prompts"]["historical"]["test_fraction"] = 0
    status, _, errors = run(recipe)
    assert status == 2 and "No part has test prompts" in errors
    assert not (tmp_path / "run" / "responses").exists()


def test_checking_alone_does_nothing(run, recipe, tmp_path):
    status, result, _ = run(recipe, "--only_check")
    assert status == 0 and result["is_valid"] and not (tmp_path / "run").exists()
    recipe["trian"] = recipe.pop("train")
    status, _, errors = run(recipe, "--only_check")
    assert status == 2 and "there is no `trian`. Did you mean train?" in errors
