import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer

from spec_kd.cli.train import find_last_checkpoint


@pytest.fixture
def options(models, responses, tmp_path, flags):
    return ["--draft", models / "draft", "--responses", responses, "--output_dir", tmp_path / "out", *flags]


def load_weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def assert_same_weights(left, right):
    left, right = load_weights(left), load_weights(right)
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=0)


@pytest.mark.parametrize("method", ["white_box", "black_box"])
def test_offline_training_loads_no_target(call, options, models, tmp_path, method, monkeypatch):
    monkeypatch.setattr("spec_kd.trainer.white_box_distill_trainer.load_teacher", None)
    status, result, errors = call(
        "train", method, *options, "--target", models / "target", "--align_vocabulary",
        "--eval_strategy", "steps", "--eval_steps", 2,
    )  # fmt: skip
    assert status == 0, errors
    assert result["method"] == method and result["steps"] == 4
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 288
    assert (tmp_path / "out" / "README.md").exists()
    history = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert any("eval_block_efficiency" in log for log in history)


def test_without_a_signal_the_target_is_the_teacher(call, options, models, prompts, tmp_path):
    folder = tmp_path / "plain"
    call("respond", "--target", models / "target", "--prompts", prompts, "--output_dir", folder, "--max_new_tokens", 6)
    plain = [*options[:2], "--responses", folder / "responses.parquet", *options[4:]]
    status, _, errors = call("train", "white_box", *plain)
    assert status == 2 and "`teacher_model` is required" in errors
    status, result, errors = call("train", "white_box", *plain, "--target", models / "target", "--divergence", "tvd")
    assert status == 0 and result["steps"] == 4, errors


def test_online_training_from_prompts_alone(call, options, models, prompts):
    options[3] = prompts
    status, result, errors = call(
        "train", "online_gkd", *options, "--target", models / "target", "--lmbda", 1, "--max_new_tokens", 4,
    )  # fmt: skip
    assert status == 0 and result["steps"] == 4, errors


class Killed(BaseException):
    """What a process does that is killed: nothing catches it."""


def test_a_killed_training_ends_with_the_same_weights(call, options, tmp_path, monkeypatch):
    whole = [tmp_path / "whole" if argument == tmp_path / "out" else argument for argument in options]
    assert call("train", "white_box", *whole)[0] == 0

    steps, train_step = [], Trainer.training_step

    def die_in_step_4(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) == 4:
            raise Killed
        return train_step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", die_in_step_4)
    with pytest.raises(Killed):
        call("train", "white_box", *options)
    status, result, _ = call("train", "white_box", *options)
    assert status == 0 and not result["is_reused"]
    assert steps == [0, 1, 2, 3, 2, 3]  # from the checkpoint of step 2
    assert_same_weights(tmp_path / "whole", tmp_path / "out")
    assert call("train", "white_box", *options)[1]["is_reused"]


def test_a_checkpoint_that_was_cut_off_is_not_resumed(tmp_path):
    for step, state in ((2, '{"global_step": 2}'), (10, '{"global_step": 10}'), (12, '{"glob'), (14, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert find_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")
    assert find_last_checkpoint(str(tmp_path / "none")) is None


def test_logging_is_no_input_and_learning_is(call, options):
    call("train", "black_box", *options)
    assert call("train", "black_box", *options, "--logging_steps", 2)[1]["is_reused"]
    status, _, errors = call("train", "black_box", *options, "--learning_rate", 0.5)
    assert status == 2 and "options.learning_rate: 0.01 before, 0.5 now" in errors


def test_a_folder_with_a_foreign_draft_is_refused(call, options, models, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    status, _, errors = call("train", "black_box", *options)
    assert status == 2 and "config.json that this command did not write" in errors
    assert Path(tmp_path / "out" / "config.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["white_bax"], "no method 'white_bax'. Did you mean white_box?"),
        (["white_box", "--divergance", "tvd"], "Did you mean --divergence?"),
        (["white_box", "--divergence", "reverse_kl"], "cannot serve the divergence 'reverse_kl'"),
        (["white_box", "--draft", "./nowhere"], "`./nowhere` does not exist"),
        (["online_gkd"], "needs a live `teacher_model`"),
    ],
)
def test_wrong_arguments(call, options, arguments, message):
    status, _, errors = call("train", arguments[0], *options, *arguments[1:])
    assert status == 2 and message in errors


def test_rows_without_an_answer_are_counted(call, options, tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
        {"prompt": [{"role": "user", "content": "c"}], "completion": None},
    ]
    options[3] = tmp_path / "rows.jsonl"
    options[3].write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, _, errors = call("train", "black_box", *options)
    assert status == 2 and "1 of 2 rows have no `completion`" in errors


def test_a_raised_budget_continues_the_run(call, options, caplog):
    at = options.index("--max_steps")
    options = [*options[:at], *options[at + 2 :]]
    status, first, errors = call("train", "white_box", *options, "--max_train_tokens", 100)
    assert status == 0 and first["steps"] > 1, errors
    assert "Training budget: 100 tokens (0 used)" in caplog.text
    caplog.clear()
    status, second, errors = call("train", "white_box", *options, "--max_train_tokens", 200)
    assert status == 0 and second["steps"] > first["steps"] and "(0 used)" not in caplog.text, errors
    assert call("train", "white_box", *options, "--max_train_tokens", 200)[1]["is_reused"]
