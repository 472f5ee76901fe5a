"""A resumed run ends as the uninterrupted one, goes on from what is whole, and says what is not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import IterableDataset
from safetensors.torch import load_file
from test_finite_guard import SET_UPS, hash_files
from tiny import build_llama, build_tokenizer
from transformers import EarlyStoppingCallback, TrainerCallback

from spec_kd import BlackBoxSFTConfig, BlackBoxSFTTrainer, generate_responses
from spec_kd.trainer.checkpoint_sums import SUMS_FILE, find_damage, find_whole_checkpoint, write_sums


@pytest.fixture(scope="module")
def stored():
    return generate_responses(
        build_llama(seed=1), [f"{i} and" for i in range(16)], processing_class=build_tokenizer(), max_new_tokens=6,
        temperature=1.0, teacher_signal="sampled_logprobs", show_progress=False,
    )  # fmt: skip


@pytest.fixture
def make_trainer(tokenizer, dataset, options, stored):
    def make(set_up="black_box", callbacks=(), train_dataset=None, eval_dataset=None, seed=0, **overrides):
        trainer_class, config_class, own = SET_UPS[set_up]
        if train_dataset is None:
            train_dataset = stored if set_up == "stored" else dataset
        named = {} if set_up in ("black_box", "stored") else {"teacher_model": build_llama(seed=1)}
        args = {**options, "save_strategy": "steps", "save_steps": 1, "max_steps": 3, **own, **overrides}
        return trainer_class(
            model=build_llama(seed=seed), args=config_class(**args), train_dataset=train_dataset,
            eval_dataset=eval_dataset, processing_class=tokenizer, callbacks=list(callbacks), **named,
        )  # fmt: skip

    return make


def get_weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize("set_up", SET_UPS)
def test_a_checkpoint_at_max_steps_goes_straight_to_the_end(set_up, make_trainer, options):
    first = make_trainer(set_up)
    first.train()
    files = hash_files(options["output_dir"])
    again = make_trainer(set_up, seed=5)
    output = again.train(resume_from_checkpoint=True)
    assert output.global_step == again.state.global_step == 3
    assert_same(get_weights(again), get_weights(first))
    assert hash_files(options["output_dir"]) == files  # nothing was written over
    losses = [log["loss"] for log in again.state.log_history if "loss" in log]
    assert losses == [log["loss"] for log in first.state.log_history if "loss" in log] and len(losses) == 3
    assert all("train_loss" not in log for log in again.state.log_history)


@pytest.mark.parametrize(
    "limits",
    [
        {"max_steps": -1, "num_train_epochs": 1},
        {"max_steps": -1, "num_train_epochs": 1.5},
        {"max_steps": 4},
        {"max_steps": 6, "gradient_accumulation_steps": 2},
        {"max_steps": 5, "save_strategy": "epoch", "eval_strategy": "epoch"},
    ],
    ids=["an epoch", "one and a half", "end of an epoch", "accumulation", "by epoch"],
)
@pytest.mark.parametrize("at", [0, -1], ids=["first checkpoint", "last checkpoint"])
def test_every_limit_is_the_uninterrupted_runs(limits, at, make_trainer, options, dataset):
    eval_dataset = dataset if "eval_strategy" in limits else None
    first = make_trainer(**limits, eval_dataset=eval_dataset)
    first.train()
    checkpoints = sorted(Path(options["output_dir"]).glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    again = make_trainer(**limits, eval_dataset=eval_dataset, seed=5)
    again.train(resume_from_checkpoint=str(checkpoints[at]))
    assert again.state.global_step == first.state.global_step
    assert_same(get_weights(again), get_weights(first))


def test_a_raised_limit_is_trained_up_to(make_trainer):
    make_trainer(max_steps=2).train()
    again = make_trainer(max_steps=4)
    again.train(resume_from_checkpoint=True)
    whole = make_trainer(max_steps=4, save_strategy="no")
    whole.train()
    assert again.state.global_step == 4
    assert_same(get_weights(again), get_weights(whole))


def test_early_stopping_ends_where_it_ended_and_counts_on(make_trainer, dataset, options):
    """`threshold=100`: no evaluation is ever better enough, so each counts; the third ends the run."""
    options = {
        "max_steps": 10, "eval_strategy": "steps", "eval_steps": 1, "eval_dataset": dataset,
        "metric_for_best_model": "eval_loss", "load_best_model_at_end": False,
    }  # fmt: skip

    def make(seed=0):
        return make_trainer(callbacks=[EarlyStoppingCallback(3, 100.0)], seed=seed, **options)

    first = make()
    first.train()
    end = first.state.global_step
    assert end < 10
    for step in (end, end - 1, 1):
        again = make(seed=5)
        again.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-{step}")
        assert again.state.global_step == end, step
        assert_same(get_weights(again), get_weights(first))
    more = make_trainer(callbacks=[EarlyStoppingCallback(5, 100.0)], **options)  # its own options count
    more.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-{end}")
    assert more.state.global_step == end + 2


@pytest.mark.parametrize("set_up", ["black_box", "streaming"])
@pytest.mark.parametrize("step", [2, 3, 5])
def test_a_stream_that_is_read_again_goes_on_within_its_second_reading(set_up, step, make_trainer, rows):
    stream = IterableDataset.from_generator(lambda: iter(rows[:12]))  # three steps of four rows
    first = make_trainer(set_up, train_dataset=stream, max_steps=6)
    first.train()
    again = make_trainer(set_up, train_dataset=stream, max_steps=6, seed=5)
    again.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-{step}")
    assert again.state.global_step == 6
    assert_same(get_weights(again), get_weights(first))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json"]


@pytest.fixture(scope="module")
def kept_run(tmp_path_factory, stored):
    """A run of three steps with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("run")
    args = BlackBoxSFTConfig(
        output_dir=str(folder), max_steps=3, save_strategy="steps", save_steps=1, use_cpu=True, report_to=[],
        learning_rate=1e-2, per_device_train_batch_size=4, gradient_checkpointing=False, disable_tqdm=True, seed=0,
        lr_scheduler_type="constant", logging_steps=1,
    )  # fmt: skip
    named = {"train_dataset": stored, "processing_class": build_tokenizer()}
    BlackBoxSFTTrainer(model=build_llama(), args=args, **named).train()
    return folder


@pytest.mark.parametrize("harm", [flip, cut, Path.unlink], ids=["flipped", "cut", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_left_for_the_one_before(name, harm, kept_run, tmp_path):
    shutil.copytree(kept_run, tmp_path, dirs_exist_ok=True)
    assert find_whole_checkpoint(tmp_path) == (tmp_path / "checkpoint-3", {})
    harm(tmp_path / "checkpoint-3" / name)
    whole, damages = find_whole_checkpoint(tmp_path)
    assert whole == tmp_path / "checkpoint-2" and name in damages[tmp_path / "checkpoint-3"]


def test_a_run_falls_back_to_a_whole_checkpoint_and_says_so(kept_run, stored, make_trainer, options, caplog):
    shutil.copytree(kept_run, options["output_dir"])
    checkpoint = Path(options["output_dir"], "checkpoint-3")
    flip(checkpoint / "optimizer.pt")
    with pytest.raises(ValueError, match=r"resume from the checkpoint .*checkpoint-3: .*optimizer\.pt.*checkpoint-2"):
        make_trainer(train_dataset=stored).train(resume_from_checkpoint=str(checkpoint))
    trainer = make_trainer(train_dataset=stored, seed=5)
    trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-2, since later checkpoints are damaged: in checkpoint-3, `optimizer.pt`" in caplog.text
    expected = load_file(kept_run / "checkpoint-3" / "model.safetensors")
    assert all(trainer.model.state_dict()[name].equal(value) for name, value in expected.items())
    assert find_damage(checkpoint) is None  # written again


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth"])
def test_a_checkpoint_without_sums_is_checked_by_its_form(name, kept_run, tmp_path):
    shutil.copytree(kept_run / "checkpoint-2", tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / SUMS_FILE).unlink()
    assert find_whole_checkpoint(tmp_path) == (tmp_path / "checkpoint-2", {})
    cut(tmp_path / "checkpoint-2" / name)
    whole, damages = find_whole_checkpoint(tmp_path)
    assert whole is None and name in damages[tmp_path / "checkpoint-2"]


def test_a_kill_before_the_sums_leaves_a_checkpoint_that_gets_them(make_trainer, options):
    make_trainer(max_steps=2).train()
    newest = Path(options["output_dir"], "checkpoint-2")
    sums = (newest / SUMS_FILE).read_text()
    (newest / SUMS_FILE).unlink()
    (newest / f"{SUMS_FILE}.part").write_text(sums[:20])
    make_trainer().train(resume_from_checkpoint=True)
    assert (newest / SUMS_FILE).read_text() == sums
    assert not (newest / f"{SUMS_FILE}.part").exists()


def test_none_whole_is_said(make_trainer, options):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    cut(Path(options["output_dir"], "checkpoint-1", "optimizer.pt"))
    with pytest.raises(ValueError, match=r"No whole checkpoint .*checkpoint-1, `optimizer.pt` has \d+ bytes instead"):
        trainer.train(resume_from_checkpoint=True)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("file", ["optimizer.pt", "rng_state.pth", "on_policy_window_0.pt", "trainer_state.json"])
def test_a_kill_while_a_checkpoint_is_written_over_leaves_none_that_counts(file, make_trainer, options, monkeypatch):
    """The window of reused completions is among the files that are there before the mark is."""
    reuse = {"num_iterations": 2, "max_steps": 3, "gradient_accumulation_steps": 1}
    make_trainer("on-policy", **reuse).train()
    folder = Path(options["output_dir"], "checkpoint-3")
    assert (folder / "on_policy_window_0.pt").exists()
    trainer = make_trainer("on-policy", **reuse)
    save, dump = torch.save, type(trainer.state).save_to_json

    def save_or_die(content, path, *args, **kwargs):
        if str(path).endswith(f"checkpoint-3/{file}"):
            raise Killed
        return save(content, path, *args, **kwargs)

    def dump_or_die(state, path):
        assert (folder / "on_policy_window_0.pt").exists() or "checkpoint-3" not in path
        if path.endswith(f"checkpoint-3/{file}"):
            raise Killed
        return dump(state, path)

    monkeypatch.setattr(torch, "save", save_or_die)
    monkeypatch.setattr(type(trainer.state), "save_to_json", dump_or_die)
    with pytest.raises(Killed):
        trainer.train(resume_from_checkpoint=f"{options['output_dir']}/checkpoint-2")
    assert "trainer_state.json" in find_damage(folder)
    assert find_whole_checkpoint(options["output_dir"])[0].name == "checkpoint-2"


def test_the_best_checkpoint_is_verified_before_it_is_loaded(make_trainer, dataset):
    class Harm(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 3:
                path = Path(state.best_model_checkpoint, "model.safetensors")
                path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")

    trainer = make_trainer(
        callbacks=[Harm()], eval_strategy="steps", eval_steps=1, eval_dataset=dataset, load_best_model_at_end=True,
        max_steps=3,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"load_best_model_at_end=True.*model\.safetensors"):
        trainer.train()


def test_sums_cover_folders_and_leave_the_card(tmp_path):
    (tmp_path / "global_step1").mkdir()
    for name in ("global_step1/optimizer.bin", "model.safetensors", "README.md"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 1}))
    write_sums(tmp_path)
    assert set(json.loads((tmp_path / SUMS_FILE).read_text())) == {
        "global_step1/optimizer.bin", "model.safetensors", "trainer_state.json",
    }  # fmt: skip
    (tmp_path / "README.md").write_text("edited")
    assert find_damage(tmp_path) is None
    flip(tmp_path / "global_step1" / "optimizer.bin")
    assert "`global_step1/optimizer.bin` is not what was saved" in find_damage(tmp_path)
