"""What an earlier version wrote is refused in one sentence, which names the command that converts it.

`old_formats` has a recipe and the notes of its run, as the version before the format number wrote them.
"""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from spec_kd.cli.fingerprints import hash_json
from spec_kd.cli.recipe import load_recipe
from spec_kd.cli.steps import FORMAT, check_formats

SAMPLES = Path(__file__).parent / "old_formats"


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A working directory with the old recipe and the old folder of its run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SAMPLES, tmp_path, dirs_exist_ok=True)
    return tmp_path


def read_note(folder):
    return json.loads(Path(folder, ".step.json").read_text())


def test_an_old_recipe_is_refused_and_converted(call, old):
    status, _, errors = call("run", "recipe.yaml")
    assert status == 2 and errors.count("\n") == 1
    assert "has `queries`, `keep_answers`," in errors and "`method: white-box`" in errors
    assert "Convert it: `spec-kd convert recipe.yaml`." in errors
    status, result, _ = call("convert", "recipe.yaml")
    assert status == 0 and result["path"] == "recipe.new.yaml"
    text = (old / "recipe.new.yaml").read_text()
    assert "# A recipe as it was written" in text and "# two parts" in text and "# not used here" in text
    recipe = load_recipe("recipe.new.yaml")
    assert list(recipe.parts) == ["historical", "curated"] and recipe.train.method == "white_box"
    options = recipe.parts["curated"].call[1]
    assert options.keep_completions and options.completion_column == "answer"
    assert recipe.train.config.assume_target_completions and not recipe.evaluate[1].show_prompt_text
    assert recipe.respond[1].temperature == 0  # which was the default
    status, _, errors = call("convert", "recipe.yaml")
    assert status == 2 and "`recipe.new.yaml` exists already" in errors
    status, _, errors = call("convert", "recipe.new.yaml")
    assert status == 2 and "nothing to convert" in errors


def test_paths_become_relative_to_the_recipe(call, old):
    (old / "log.jsonl").write_text('{"prompt": "a"}\n')
    (old / "recipes").mkdir()
    shutil.move("recipe.yaml", "recipes/recipe.yaml")
    assert call("convert", "recipes/recipe.yaml")[0] == 0
    values = yaml.safe_load((old / "recipes/recipe.new.yaml").read_text())
    assert values["prompts"]["historical"]["paths"] == "../log.jsonl" and values["output_dir"] == "run"


def test_comments_are_lost_only_where_a_section_is_written_in_braces(call, old):
    text = (old / "recipe.yaml").read_text()
    section = text[text.index("respond:") : text.index("train:")]
    (old / "recipe.yaml").write_text(text.replace(section, "respond: {max_new_tokens: 6}\n"))
    status, _, errors = call("convert", "recipe.yaml")
    assert status == 0 and "the comments of recipe.yaml are not kept" in errors
    assert load_recipe("recipe.new.yaml").respond[1].temperature == 0


def test_an_old_file_of_options_is_refused_and_converted(call, old):
    (old / "options.yaml").write_text("keep_answers: true  # mine\ndataset: d\noutput_dir: o\n")
    status, _, errors = call("prompts", "curated", "--config", "options.yaml")
    assert status == 2 and "it has `keep_answers`. Convert it: `spec-kd convert options.yaml`" in errors
    assert call("convert", "options.yaml")[0] == 0
    assert (old / "options.new.yaml").read_text().startswith("keep_completions: true  # mine\n")


def test_the_folder_of_an_old_run_is_refused_and_converted(call, old):
    call("convert", "recipe.yaml")
    status, _, errors = call("run", "recipe.new.yaml", "--only_check")
    assert status == 2 and "made by another version of spec_kd (format 1, not 2)" in errors
    assert "Convert it: `spec-kd convert run`." in errors
    before = {path: read_note(path) for path in ("run/draft", "run/responses", "run/queries/curated")}
    status, result, _ = call("convert", "run")
    assert status == 0 and result["num_steps"] == 7
    check_formats("run")
    assert not (old / "run/queries").exists() and (old / "run/test_responses/.step.json").exists()
    curated, responses, draft = map(read_note, ("run/parts/curated", "run/responses", "run/draft"))
    assert curated["result"]["path"] == "run/parts/curated"
    options = before["run/queries/curated"]["inputs"]["options"]
    renamed = {"keep_completions": options.pop("keep_answers"), "completion_column": options.pop("answer_column")}
    assert curated["inputs"]["options"] == options | renamed
    assert responses["inputs"]["options"] == before["run/responses"]["inputs"]["options"] | {"temperature": 0.0}
    assert draft["inputs"]["method"] == draft["result"]["method"] == "white_box"
    assert "alpha_t1" in read_note("run/evaluation")["result"]["metrics"]
    for note in (curated, responses, draft):
        assert note["format"] == FORMAT and note["hash"] == hash_json(note["inputs"])
    assert draft["files"] == before["run/draft"]["files"]
    status, _, errors = call("convert", "run")
    assert status == 2 and "nothing to convert" in errors


def test_a_single_step_of_before_is_refused(call, old, models, prompts):
    argv = ["respond", "--target", models / "target", "--prompts", prompts, "--output_dir", "run/responses"]
    argv += ["--max_new_tokens", 6]
    status, _, errors = call(*argv)
    assert status == 2 and "`spec-kd convert run/responses`" in errors
    assert call("convert", "run/responses")[0] == 0
    status, _, errors = call(*argv)  # other inputs now, and nothing in the folder
    assert status == 0, errors
