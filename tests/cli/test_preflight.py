"""`--only_check` finds what needs no weights: one line, before the target answers or anything is trained."""

import json
import shutil

import pytest
import yaml

from spec_kd.cli.model_checks import check_model


@pytest.fixture
def recipe(models, tmp_path):
    (tmp_path / "log.jsonl").write_text('{"prompt": "a"}\n')
    return {
        "target": str(models / "target"),
        "draft": str(models / "draft"),
        "output_dir": str(tmp_path / "run"),
        "prompts": {"historical": {"paths": str(tmp_path / "log.jsonl"), "test_fraction": 0.3}},
        "respond": {"temperature": 1.0, "max_new_tokens": 6, "teacher_signal": "sampled_logprobs"},
        "train": {"method": "white_box", "max_steps": 1, "use_cpu": True, "report_to": "none"},
        "evaluate": {"costs": "none", "num_prompts": 4},
    }


@pytest.fixture
def check(call, recipe, tmp_path):
    """Checks the recipe with changes, given as `{"section.key": value}`."""

    def check_changed(changes, *flags):
        for path, value in changes.items():
            *sections, name = path.split(".")
            section = recipe
            for key in sections:
                section = section.setdefault(key, {})
            section[name] = value
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        return call("run", tmp_path / "recipe.yaml", "--only_check", *flags)

    return check_changed


def test_a_recipe_that_fits_is_valid(check, tmp_path):
    status, result, errors = check({"train.use_peft": True, "train.lora_target_modules": ["q_proj", "v_proj"]})
    assert status == 0 and result["is_valid"], errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.learning_rate": -1}, "train: `learning_rate` is -1, but must be at least 0"),
        ({"train.learning_rate": float("nan")}, "train: `learning_rate` is nan"),
        ({"train.per_device_train_batch_size": 0}, "train: `per_device_train_batch_size` is 0"),
        ({"train.max_length": 1}, "train: `max_length` is 1, but must be at least 2"),
        ({"train.num_held_out": -1}, "train: `num_held_out` is -1"),
        ({"train.warmup_steps": float("inf")}, "train: `warmup_steps` is inf"),
        ({"train.optim": "adamw_bnb_8bit"}, "train: You need to install `bitsandbytes`"),
        ({"train.optim": "adamv"}, "train: `optim` is 'adamv'."),
        ({"train.report_to": "comet_ml"}, "train: `report_to` names 'comet_ml', which is not installed"),
        ({"train.dtype": "float17"}, "train: `dtype` is 'float17'"),
        ({"train.model_init_kwargs": {"dtype": "float17"}}, "train: `dtype` is 'float17', which is no dtype"),
        ({"train.use_peft": True, "train.lora_target_modules": ["qproj"]}, "train: the LoRA options do not fit"),
        ({"train.use_peft": True, "train.lora_r": 0}, "train: the LoRA options do not fit"),
        ({"train.use_peft": True, "train.lora_modules_to_save": ["lmhead"]}, "`lora_modules_to_save` names ['lmhead']"),
        ({"train.use_peft": True, "train.align_vocabulary": True}, "needs `merge_adapter`"),
        ({"train.token_selection": "adaspec"}, "train: `token_selection: adaspec` compares with a reference draft"),
        ({"train.attn_implementation": "flash_attention_2"}, "train: "),
        ({"evaluate.group_by": ["topic"]}, "evaluate: `group_by` names ['topic']"),
        ({"evaluate.fail_under": {"predicted_speedup": 1.2}}, "evaluate: The gate 'predicted_speedup=1.2' needs costs"),
        ({"evaluate.fail_under": {"speedup": 1.2}}, "evaluate: The gate 'speedup=1.2' needs assisted generation"),
        ({"evaluate.fail_under": {"alpha_t0.7": 0.5}}, "evaluate: The gate 'alpha_t0.7=0.5' names the setting 't0.7'"),
        ({"evaluate.fail_under": {"block_efficiency": float("nan")}}, "which is no finite number"),
        ({"evaluate.fail_under": 1.0}, "evaluate: `fail_under` is 1.0, but must be NAME=VALUE pairs"),
        ({"evaluate.temperatures": [1.0, 1.0]}, "evaluate: `temperatures` is [1.0, 1.0], but must hold different"),
        ({"evaluate.temperatures": [float("nan")]}, "evaluate: `temperatures` is nan"),
        ({"evaluate.top_p": float("nan")}, "evaluate: `top_p` is nan"),
        ({"evaluate.num_prompts": 0}, "evaluate: `num_prompts` is 0"),
        ({"evaluate.batch_sizes": [0]}, "evaluate: `batch_sizes` is 0"),
        ({"prompts.historical.format": "csv"}, "prompts: historical: `format` must be one of"),
        ({"prompts.historical.redact": ["emial"]}, "prompts: historical: "),
        ({"prompts.historical.test_fraction": 1.5}, "prompts: historical: `test_fraction` is 1.5"),
        ({"prompts.historical.test_fraction": float("nan")}, "prompts: historical: `test_fraction` is nan"),
        ({"prompts.historical.near_duplicate_threshold": 0.1}, "`near_duplicate_threshold` is 0.1"),
        ({"prompts.historical.max_per_user": 0}, "prompts: historical: `max_per_user` is 0"),
        ({"prompts.historical.turns": "some"}, "prompts: historical: `turns` is 'some', but must be one of"),
        ({"prompts.5": {"paths": "a"}}, "prompts: 5: `scenario` is '5'"),
        ({"prompts.curated.dataset": "log.jsonl", "prompts.curated.prompt_column": "q"}, "names 'q', but the dataset"),
        ({"prompts.synthetic.num_queries": 0}, "prompts: synthetic: `num_queries` is 0"),
        ({"prompts.synthetic": {"num_queries": 1, "temperature": 0}}, "prompts: synthetic: `temperature` is 0"),
        ({"prompts.synthetic": {"num_queries": 1, "max_repetition": 2}}, "prompts: synthetic: `max_repetition` is 2"),
        ({"prompts.synthetic": {"num_queries": 1, "num_tools": [0]}}, "prompts: synthetic: `num_tools` is 0"),
        ({"prompts.mix.weights": {"historical": float("nan")}}, "prompts: mix: `weights['historical']` is nan"),
        ({"prompts.mix.weights": {"historical": -1}}, "prompts: mix: `weights['historical']` is -1"),
        ({"respond.temperature": float("inf")}, "respond: `temperature` is inf"),
        ({"respond.batch_size": 0}, "respond: `batch_size` is 0"),
        ({"respond.engine_kwargs": {"dtipe": "float32"}}, "respond: `engine_kwargs` has `dtipe`"),
        ({"respond.engine_kwargs": {"dtype": "float17"}}, "respond: `dtype` is 'float17'"),
        ({"respond.engine": "vllm"}, "respond: `engine=vllm` needs the package `vllm`, which is not installed"),
        (
            {"respond": {"engine": "server", "base_url": "http://localhost/v1", "engine_kwargs": {"concurency": 4}}},
            "respond: `engine_kwargs` does not fit",
        ),
        (
            {"respond": {"engine": "server", "base_url": "http://localhost/v1", "engine_kwargs": "max_concurrency=x"}},
            "respond: `max_concurrency` is 'x', but must be a whole number",
        ),
        ({"respond": {"engine": "server", "base_url": "http://localhost:99999/v1"}}, "not the address of a server"),
        ({"output_dir": ""}, "`output_dir` is '', which names no file or folder"),
        ({"target": ""}, "target: `name` is '', which names no file or folder"),
        ({"prompts.historical.paths": ""}, "prompts: historical: `paths` is '', which names no file or folder"),
        ({"target": "my-org/none"}, "the target `my-org/none` cannot be loaded"),
        ({"draft": "my-org/none"}, "the draft `my-org/none` cannot be loaded"),
    ],
)
def test_a_recipe_that_would_fail_later_is_refused_at_once(check, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    status, result, errors = check(changes)
    assert status == 2 and result is None, errors
    assert message in errors, errors
    assert errors.splitlines()[-1].startswith("spec-kd run: error: ") and "Traceback" not in errors
    assert not (tmp_path / "run").exists()


def test_a_home_means_one_folder_in_every_step(check, recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    from spec_kd.cli.recipe import load_recipe

    status, result, errors = check({"output_dir": "~/run", "prompts.historical.paths": "~/log.jsonl"})
    assert status == 0 and result["output_dir"] == f"{tmp_path}/run", errors
    loaded = load_recipe(tmp_path / "recipe.yaml")
    folders = [loaded.train.config.output_dir, loaded.respond[0].output_dir, loaded.mix[0].output_dir]
    folders += [loaded.parts["historical"].call[0].output_dir, loaded.evaluate[0].responses_dir]
    folders += [loaded.train.arguments.responses]
    assert all(folder.startswith(f"{tmp_path}/run/") for folder in folders), folders
    assert loaded.evaluate[0].drafts["after"] == f"{tmp_path}/run/draft"


def test_an_engine_option_that_is_right_is_accepted(check):
    status, _, errors = check({"respond.engine_kwargs": {"dtype": "float32", "attn_implementation": "eager"}})
    assert status == 0, errors


@pytest.fixture
def broken(models, tmp_path):
    """A copy of a model whose files the tests damage."""
    return shutil.copytree(models / "draft", tmp_path / "broken")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: _cut(folder / "model.safetensors", 0.5), "model.safetensors` of the draft are damaged"),
        (lambda folder: _cut(folder / "model.safetensors", 0), "model.safetensors` of the draft are damaged"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / "config.json").unlink(), "draft: Unrecognized model"),
        (lambda folder: _list_shards(folder, "model-2.safetensors"), "lacks model-2.safetensors"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
            "index.json` of the draft is damaged",
        ),
    ],
)
def test_damaged_models_are_named_before_anything_is_done(check, broken, damage, message):
    damage(broken)
    status, _, errors = check({"draft": str(broken)})
    assert status == 2 and message in errors and str(broken) in errors and errors.count("\n") == 1, errors


def test_an_adapter_stands_for_its_base(models, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models / "draft")
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    assert check_model("draft", str(tmp_path / "adapter")).hidden_size == model.config.hidden_size
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="does not name its base model"):
        check_model("draft", str(tmp_path / "adapter"))


def _cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def _list_shards(folder, *names):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {n: n for n in names}}))
