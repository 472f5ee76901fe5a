"""Recipes that train on text of others first."""

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from transformers import Trainer

from spec_kd.cli.preflight import check_sources
from spec_kd.cli.recipe import load_recipe

TEXTS = [f"The {word} of cell {i}, and a few words more." for i in range(4) for word in ("wall", "core", "skin")]
QUESTIONS = [f"Is a {a} a {b}?" for a in ("gene", "cell", "leaf") for b in ("bone", "vein", "lung", "seed")]


@pytest.fixture
def recipe(models, training, tmp_path):
    rows = [{"messages": [{"role": "user", "content": text}]} for text in QUESTIONS]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    training["max_length"] = None
    pretraining = {**training, "max_length": 32, "max_train_tokens": 400}
    del pretraining["max_steps"]
    return {
        "target": str(models / "target"),
        "draft": str(models / "draft"),
        "output_dir": str(tmp_path / "run"),
        "seed": 3,
        "prompts": {"historical": {"paths": str(tmp_path / "log.jsonl"), "test_fraction": 0.3}},
        "respond": {"max_new_tokens": 6, "teacher_signal": "sampled_logprobs"},
        "pretrain": {"corpus": "texts.jsonl", "score": {"max_length": 32, "batch_size": 4}, **pretraining},
        "train": {"method": "white_box", **training},
        "evaluate": {"costs": "none", "max_new_tokens": 6, "num_prompts": 2, "num_shown_prompts": 0},
    }


@pytest.fixture
def write(tmp_path):
    def write_recipe(recipe):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        return path

    return write_recipe


def list_done(result):
    return [name for name, state in result["steps"].items() if state == "done"]


class Killed(BaseException):
    """What a process does that is killed: nothing catches it."""


def test_a_killed_recipe_goes_on_in_its_first_phase(call, recipe, write, monkeypatch, tmp_path):
    train_step = Trainer.training_step

    def die(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise Killed
        return train_step(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "training_step", die)
        with pytest.raises(Killed):
            call("run", write(recipe))
    status, result, errors = call("run", write(recipe))
    assert status == 0, errors
    assert list_done(result) == ["pretrained", "draft", "evaluation"]
    assert list(result["steps"]) == ["parts/historical", "prompts", "responses", "corpus", *list_done(result)]
    begun = load_file(Path(recipe["draft"], "model.safetensors"))
    first, last = (load_file(tmp_path / "run" / name / "model.safetensors") for name in ("pretrained", "draft"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert not begun[name].equal(first[name]) and not first[name].equal(last[name])
    notes = [json.loads((tmp_path / "run" / name / ".step.json").read_text()) for name in ("pretrained", "draft")]
    assert notes[0]["inputs"]["draft"] != notes[1]["inputs"]["draft"]
    assert list_done(call("run", write(recipe))[1]) == []

    recipe["pretrain"]["max_train_tokens"] = 600  # continues the phase, and repeats what comes after it
    status, result, errors = call("run", write(recipe))
    assert status == 0 and list_done(result) == ["pretrained", "draft", "evaluation"], errors
    assert not (tmp_path / "run" / "replaced" / "pretrained-1").exists()


def test_a_live_target_and_a_draft_that_the_recipe_makes(call, recipe, write, tmp_path):
    del recipe["draft"], recipe["pretrain"]["score"]
    recipe |= {"init": {"num_hidden_layers": 1, "num_samples": 4}}
    status, result, errors = call("run", write(recipe))
    assert status == 0, errors
    assert list_done(result)[3:] == ["initial_draft", "pretrained", "draft", "evaluation"]
    assert not (tmp_path / "run" / "corpus").exists()


def test_sections_become_the_arguments_of_commands(recipe, write, tmp_path):
    found = load_recipe(write(recipe))
    files, options, _, target = found.pretrain.score
    assert files.corpus == str(tmp_path / "texts.jsonl") and files.output_dir == f"{tmp_path}/run/corpus"
    assert options.seed == 3 and target.target == recipe["target"]
    call = found.pretrain.train
    assert call.config.packing and call.config.packing_strategy == "bfd_split" and call.config.max_train_tokens == 400
    assert call.config.completion_only_loss is None and call.arguments.responses.startswith(f"{tmp_path}/run/corpus/")
    assert found.train.draft.model_name_or_path == f"{tmp_path}/run/pretrained"
    assert found.evaluate[0].drafts["before"] == recipe["draft"] == call.draft.model_name_or_path
    recipe["pretrain"] |= {"score": False, "packing": False}
    call = load_recipe(write(recipe)).pretrain.train
    assert call.config.completion_only_loss is False and not call.config.packing
    assert call.arguments.responses == str(tmp_path / "texts.jsonl")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus": None}, "pretrain: `corpus` is missing"),
        ({"corpus": "other.jsonl"}, r"pretrain: corpus: .*other\.jsonl` does not exist"),
        ({"responses": "x"}, "pretrain: `responses` is set by the recipe"),
        ({"max_train_token": 5}, "pretrain: .*Did you mean max_train_tokens?"),
        ({"score": {"target": "x"}}, "pretrain: score: `target` is set by the recipe"),
        ({"score": {"teacher_signal": "sampled_counts"}, "divergence": "tvd"}, "pretrain: .*'sampled_counts' cannot"),
    ],
)
def test_mistakes_are_named_with_their_section(changes, message, recipe, write):
    recipe["pretrain"] |= changes
    with pytest.raises((ValueError, OSError), match=message):
        check_sources(load_recipe(write(recipe)))
