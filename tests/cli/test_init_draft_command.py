"""`spec-kd init-draft`: a draft on disk, made once, and refused with one line where it cannot be made."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture
def responses(tmp_path):
    path = tmp_path / "responses.jsonl"
    rows = [{"prompt_ids": [5, 6, 7 + row], "completion_ids": [8, 9, 10, 1]} for row in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_draft_is_made_once(call, models, responses, tmp_path):
    command = ("init-draft", "--target", models / "target", "--responses", responses, "--output_dir", tmp_path / "new")
    options = ("--num_hidden_layers", 1, "--hidden_size", 16)
    status, result, said = call(*command, *options)
    assert status == 0 and "in the head" in said and "before training" in said
    draft = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    target = AutoModelForCausalLM.from_pretrained(models / "target")
    assert (draft.config.num_hidden_layers, draft.config.hidden_size) == (1, 16)
    assert draft.config.vocab_size == target.config.vocab_size
    assert result["num_parameters"] == draft.num_parameters() and 0 <= result["alpha"] <= 1
    assert len(AutoTokenizer.from_pretrained(tmp_path / "new")) == len(AutoTokenizer.from_pretrained(models / "target"))
    assert call(*command, *options)[1]["is_reused"]
    status, _, said = call(*command, "--num_hidden_layers", 1)
    assert status == 2 and "hidden_size" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_hidden_layers", "1"], "Sample text decides"),
        (["--num_hidden_layers", "99", "--fresh_layers", "True", "--hidden_size", "9999"], "larger than the donor's"),
        (["--donor", "nowhere/at-all"], "nowhere/at-all"),
        (["--temperature", "-1"], "temperature"),
    ],
)
def test_wrong_input_is_refused(call, models, tmp_path, options, message):
    status, _, said = call("init-draft", "--target", models / "target", "--output_dir", tmp_path / "new", *options)
    assert status == 2 and message in said
    assert not (tmp_path / "new" / "config.json").exists()
