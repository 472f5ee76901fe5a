import sys

import fake_llama_server as fake
import pytest

from spec_kd.evaluation import read_costs


@pytest.fixture
def options(tmp_path):
    program = tmp_path / "llama-server"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{fake.__file__}" "$@"\n')
    program.chmod(0o755)
    for name in ("draft", "target"):
        (tmp_path / f"{name}.gguf").write_bytes(b"GGUF")
    return [
        "measure-costs", "--draft", tmp_path / "draft.gguf", "--target", tmp_path / "target.gguf", "--server", program,
        "--output_dir", tmp_path / "out", "--num_rounds", 3, "--repeats", 1, "--server_flags=--threads 1",
    ]  # fmt: skip


def test_costs_that_an_evaluation_reads(call, options, models, prompts, tmp_path):
    status, result, errors = call(*options, "--gammas", 2, 5)
    assert status == 0, errors
    true = {gamma: fake.ROUND[gamma] + gamma * fake.ACCEPTED / 2 for gamma in (2, 5)}
    [costs] = read_costs(result["path"])
    assert costs.round_cost == pytest.approx(true)
    assert f"1 at a time, 2 drafted: a round takes {true[2]:.2f} steps" in errors
    assert call(*options, "--gammas", 2, 5)[1]["is_reused"]
    status, evaluated, errors = call(
        "evaluate", "--draft", models / "draft", "--target", models / "target", "--prompts", prompts, "--num_prompts",
        2, "--output_dir", tmp_path / "report", "--serving_engine", "llama.cpp", "--temperatures", 0, "--gammas", 5,
        "--costs", result["path"], "--max_new_tokens", 6,
    )  # fmt: skip
    assert status == 0, errors
    predicted, efficiency = (evaluated["metrics"][name][0] for name in ("predicted_speedup", "block_efficiency"))
    assert predicted == pytest.approx(efficiency / true[5])
    page = (tmp_path / "report" / "report.md").read_text()
    assert f"{true[5]:.3f}" in page and "rounds of llama-server" in page


def test_speed_of_a_draft_that_is_not_trained(call, options):
    status, result, errors = call(*options, "--acceptance_rates", 1.0, 1.0)
    assert status == 0, errors
    assert result["path"].endswith("speed.json")
    [speed] = result["speeds"]
    assert speed["speedup"] == pytest.approx(3 / (fake.ROUND[2] + 2 * fake.ACCEPTED))
    assert "tokens/s" in errors


def test_wrong_input(call, options, tmp_path):
    status, _, errors = call(*options, "--acceptance_rates", 0.2, 0.5)
    assert status == 2 and "none higher than the one before it" in errors
    (tmp_path / "draft.gguf").unlink()
    status, _, errors = call(*options)
    assert status == 2 and "draft.gguf` does not exist" in errors
