import json

import pytest

from spec_kd import generate_responses
from spec_kd.engines.server.client import ServerRequestError


@pytest.fixture
def options(models, prompts, tmp_path):
    return [
        "respond", "--target", models / "target", "--prompts", prompts, "--output_dir", tmp_path / "out",
        "--max_new_tokens", 6, "--temperature", 1.0,
    ]  # fmt: skip


def test_answers_are_those_of_the_function(call, options, models, prompts, tmp_path, read_rows):
    status, result, _ = call(*options, "--teacher_signal", "top_k_tail", "--signal_top_k", 4, "--num_prompts", 5)
    assert status == 0
    assert result["command"] == "respond" and not result["is_reused"]
    assert result["num_prompts"] == result["num_responses"] == 5
    rows = read_rows(result["path"])
    messages = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()][:5]
    expected = generate_responses(str(models / "target"), messages, max_new_tokens=6, temperature=1.0)
    assert [row["completion_ids"] for row in rows] == expected["completion_ids"]
    info = json.loads(rows[0]["teacher_info"])
    assert (info["method"], info["top_k"]) == ("top_k_tail", 4)
    assert result["num_tokens"] == sum(map(len, expected["completion_ids"]))


def test_the_same_call_again_runs_no_target(call, options, monkeypatch):
    _, first, _ = call(*options)
    monkeypatch.setattr("spec_kd.cli.respond.loaded_target", None)
    status, second, _ = call(*options)
    assert status == 0 and second == {**first, "is_reused": True}


def test_a_folder_of_other_answers_is_refused(call, options):
    call(*options)
    status, result, errors = call(*options, "--seed", 1)
    assert status == 2 and result is None
    assert "options.seed: not set before, 1 now" in errors


def test_an_option_that_changes_no_answer_is_not_an_input(call, options):
    call(*options)
    assert call(*options, "--on_unidentified_token", "drop")[1]["is_reused"]


def test_options_from_yaml_and_the_command_line(call, options, tmp_path):
    config = tmp_path / "respond.yaml"
    config.write_text("max_new_tokens: 3\nnum_prompts: 2\nengine_kwargs: {dtype: float32}\n")
    status, result, _ = call(*options[:-4], "--config", config, "--num_prompts", 3)
    assert status == 0 and result["num_responses"] == 3 and result["num_tokens"] <= 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temprature", "1"], "no option --temprature. Did you mean --temperature?"),
        (["--temperature", "hot"], "invalid float value: 'hot'"),
        (["--target", "./nowhere"], "`./nowhere` does not exist"),
        (["--prompts", "nowhere.jsonl"], "`nowhere.jsonl` does not exist"),
        (["--engine", "vlm"], "`engine` is 'vlm'. Did you mean vllm?"),
        (["--engine", "server"], "needs `base_url`"),
        (["--base_url", "http://localhost"], "`engine` is 'transformers'"),
        (["--engine_kwargs", "{dtype"], "no JSON"),
        (["--teacher_signal", "top_k"], "Unknown method 'top_k'"),
        (["--num_draws", "3"], "`num_draws` belongs to a `teacher_signal`"),
        (["--max_new_tokens", "0"], "at least 1"),
        (["stray"], "'stray' belongs to no option"),
        (["--config", "none.yaml"], "there is no file `none.yaml`"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(call, options, arguments, message):
    status, result, errors = call(*options, *arguments)
    assert status == 2 and result is None
    assert message in errors and "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("spec-kd respond: error: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_new_token: 3", "no option `max_new_token`. Did you mean max_new_tokens?"),
        ("max_new_tokens: 3.5", "`max_new_tokens` is 3.5, but must be a whole number"),
        ("temperature: [1]", "`temperature` is"),
        ("- a", "`name: value` pairs"),
        ("a: [", "no YAML"),
    ],
)
def test_wrong_yaml_is_named(call, options, tmp_path, text, message):
    config = tmp_path / "respond.yaml"
    config.write_text(text)
    status, _, errors = call(*options, "--config", config)
    assert status == 2 and message in errors


@pytest.mark.parametrize("error", [ConnectionError("refused"), ServerRequestError("refused", 0, None)])
def test_a_server_is_asked_by_its_own_name(call, options, models, monkeypatch, error):
    made = {}

    def build(name, processing_class, base_url, **kwargs):
        made.update(name=name, base_url=base_url, **kwargs)
        raise error

    monkeypatch.setattr("spec_kd.engines.ServerEngine", build)
    status, _, errors = call(
        *options, "--engine", "server", "--base_url", "http://localhost:1/v1", "--served_model_name", "served",
        "--engine_kwargs", '{"max_concurrency": 3}',
    )  # fmt: skip
    assert status == 2 and "refused" in errors and "Traceback" not in errors
    assert made == {"name": "served", "base_url": "http://localhost:1/v1", "max_concurrency": 3}
