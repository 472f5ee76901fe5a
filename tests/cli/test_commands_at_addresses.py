"""Commands whose data lies at addresses; `tests/addresses` has an S3 server."""

import fsspec
import pytest

from spec_kd import addresses
from spec_kd.cli.paths import place_paths, relate
from spec_kd.copies import fetch


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """Starts on another machine: one that has no copies."""

    def enter(name):
        monkeypatch.setattr(addresses, "COPIES", tmp_path / name)

    enter("first machine")
    fsspec.filesystem("memory").store.clear()
    return enter


def test_responses_a_training_and_an_evaluation(call, models, prompts, tmp_path, flags, machine, read_rows):
    fsspec.filesystem("memory").pipe_file("/data/prompts.jsonl", prompts.read_bytes())
    ask = [
        "respond", "--target", models / "target", "--prompts", "memory://data/prompts.jsonl", "--max_new_tokens", 6,
        "--teacher_signal", "sampled_logprobs", "--output_dir",
    ]  # fmt: skip
    status, remote, errors = call(*ask, "memory://run/responses")
    assert status == 0, errors
    assert remote["path"] == "memory://run/responses/responses.parquet"
    local = call(*ask, tmp_path / "responses")[1]
    assert fetch(remote["path"]).read_bytes() == (tmp_path / "responses/responses.parquet").read_bytes()
    machine("second machine")
    assert call(*ask, "memory://run/responses")[1] == {**remote, "is_reused": True}
    status, _, errors = call(*ask, "memory://run/responses", "--seed", 1)
    assert status == 2 and "`memory://run/responses` was made from other inputs" in errors

    # data counts by its content, wherever it lies
    train = ["train", "white_box", "--draft", models / "draft", "--output_dir", tmp_path / "draft", *flags]
    status, trained, errors = call(*train, "--responses", "memory://run/responses")
    assert status == 0, errors
    assert trained["num_rows"] == local["num_responses"]
    assert call(*train, "--responses", tmp_path / "responses")[1]["is_reused"]

    evaluate = [
        "evaluate", "--draft", models / "draft", "--target", models / "target", "--prompts", "memory://data/prompts.jsonl",
        "--output_dir", "memory://run/report", "--max_new_tokens", 6, "--costs", "none", "--num_prompts", 3,
    ]  # fmt: skip
    status, result, errors = call(*evaluate, "--fail_under", "block_efficiency=1")
    assert status == 0, errors
    assert result["report"]["html"] == "memory://run/report/report.html" and result["has_passed"]
    machine("third machine")
    status, again, _ = call(*evaluate, "--fail_under", "block_efficiency=100")
    assert status == 3 and again["is_reused"] and again["metrics"] == result["metrics"]


def test_a_recipe_leaves_addresses_as_they_are():
    values = {"paths": ["s3://bucket/logs/*.jsonl", "logs"], "dataset": "hf://datasets/me/set/a.parquet"}
    assert place_paths(values, "recipes") == {**values, "paths": [values["paths"][0], "recipes/logs"]}
    assert relate("s3://bucket/logs", "recipes") == "s3://bucket/logs"


@pytest.mark.parametrize("option", ["--target", "--draft", "--output_dir", "--costs"])
def test_what_takes_no_address_is_refused_by_its_name(call, option):
    options = {"--target": "t", "--draft": "d", "--output_dir": "o", "--costs": "c", "--prompts": "p"}
    words = [word for pair in {**options, option: "s3://bucket/x"}.items() for word in pair]
    status, _, errors = call("evaluate", *words)
    if option == "--output_dir":
        assert "is 's3://bucket/x', an address" not in errors
    else:
        name = option[2:].replace("draft", "drafts")
        assert status == 2 and f"`{name}` is 's3://bucket/x', an address, but must be a path" in errors
