"""`spec-kd init` writes a recipe that `spec-kd run --only_check` accepts."""

import pytest
import yaml

from spec_kd.cli.recipe import load_recipe


@pytest.fixture
def sources(models, tmp_path, monkeypatch):
    """A working directory with logs and a dataset, and links to the models."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "questions.jsonl").write_text('{"prompt": "a"}\n')
    for name in ("target", "draft", "stranger"):
        (tmp_path / name).symlink_to(models / name)
    return tmp_path


@pytest.mark.parametrize("output", ["recipe.yaml", "recipes/mine.yaml"])
@pytest.mark.parametrize(
    ("argv", "scenario"),
    [
        (["--prompts", "logs/*.jsonl"], "historical"),
        (["--prompts", "questions.jsonl", "--scenario", "curated"], "curated"),
        ([], "synthetic"),
    ],
)
def test_the_recipe_passes_the_check(call, sources, argv, scenario, output):
    status, result, errors = call("init", "--target", "target", "--draft", "./draft", *argv, "--output", output)
    assert status == 0 and (result["scenario"], result["method"]) == (scenario, "white_box"), errors
    assert list(load_recipe(output).parts) == [scenario]
    status, result, errors = call("run", output, "--only_check")
    assert status == 0 and result["is_valid"], errors
    assert result["output_dir"] == f"runs/{output.split('/')[-1].removesuffix('.yaml')}"
    train = yaml.safe_load((sources / output).read_text())["train"]
    assert train["align_vocabulary"] is True  # the heads have 288 and 261 rows


def test_a_target_alone_gets_a_plan(call, sources):
    status, result, errors = call("init", "--target", "target", "--serving_engine", "llama.cpp")
    assert status == 0 and (result["scenario"], result["method"]) == ("synthetic", "white_box"), errors
    recipe = load_recipe("recipe.yaml")
    assert recipe.plan[1].run_minutes == 10 and recipe.init[0].output_dir == "runs/recipe/initial_draft"
    assert recipe.serving.check.serving_engine == recipe.serving.export[1].serving_engines == ["llama.cpp"]
    assert "draft" not in yaml.safe_load((sources / "recipe.yaml").read_text())
    status, _, errors = call("run", "recipe.yaml", "--only_check")
    assert status == 0, errors


def test_models_of_two_tokenizers_learn_from_text_alone(call, sources):
    status, result, _ = call("init", "--target", "target", "--draft", "stranger")
    recipe = yaml.safe_load((sources / "recipe.yaml").read_text())
    assert status == 0 and result["method"] == recipe["train"]["method"] == "black_box"
    assert "teacher_signal" not in recipe["respond"] and call("run", "recipe.yaml", "--only_check")[0] == 0


def test_models_that_cannot_be_read_are_not_compared(call, sources):
    status, result, errors = call("init", "--target", "my-org/target", "--draft", "my-org/draft")
    assert status == 0 and result["method"] == "white_box" and "are not compared" in errors
    assert load_recipe("recipe.yaml").train.draft.model_name_or_path == "my-org/draft"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--scenario", "curatd"], "Did you mean curated?"),
        (["--scenario", "historical"], "Give `--prompts`"),
        (["--scenario", "synthetic", "--prompts", "logs"], "Leave `--prompts` out"),
        (["--output", "questions.jsonl"], "`questions.jsonl` exists already"),
    ],
)
def test_wrong_arguments(call, sources, argv, message):
    status, _, errors = call("init", "--target", "target", "--draft", "draft", *argv)
    assert status == 2 and message in errors
    assert (sources / "questions.jsonl").read_text() == '{"prompt": "a"}\n'
