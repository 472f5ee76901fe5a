"""`OnlineGKDTrainer` with vLLM as a writer, over stand-ins for vLLM, and where the time of its steps goes."""

import time

import fake_vllm
import pytest
import torch
from datasets import Dataset
from fake_vllm import FakeClient, FakeLLM
from tiny import build_llama
from transformers import AutoModelForCausalLM

from spec_kd import OnlineGKDConfig, OnlineGKDTrainer, WhiteBoxDistillConfig, WhiteBoxDistillTrainer

GREEDY = {"lmbda": 1.0, "generation_temperature": 0.0, "max_new_tokens": 8}
SHARES = ("time/generation_share", "time/teacher_share", "time/loss_share", "time/optimizer_share")


@pytest.fixture
def path(tmp_path, tokenizer):
    path = str(tmp_path / "draft")
    build_llama(seed=0).save_pretrained(path)
    return path


def make_trainer(draft, target, tokenizer, rows, options, **overrides):
    return OnlineGKDTrainer(
        model=draft, teacher_model=target, args=OnlineGKDConfig(**{**options, **GREEDY, **overrides}),
        processing_class=tokenizer, train_dataset=Dataset.from_list(rows),
    )  # fmt: skip


def train(path, *arguments, **overrides):
    draft = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    trainer = make_trainer(draft, *arguments, **overrides)
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log], draft.state_dict()


@pytest.mark.parametrize(("mode", "fake"), [("colocate", FakeLLM), ("server", FakeClient)])
def test_training_is_that_on_text_by_transformers(path, target, tokenizer, rows, options, monkeypatch, mode, fake):
    options = {**options, "max_steps": 3, "gradient_accumulation_steps": 2}
    losses, weights = train(path, target, tokenizer, rows, options, lmbda=0.7)
    fake_vllm.install(monkeypatch, path)
    vllm = {"use_vllm": True, "vllm_mode": mode}
    vllm_losses, vllm_weights = train(path, target, tokenizer, rows, options, lmbda=0.7, **vllm)
    assert fake.last.engine.syncs == 3
    assert 0 < len(fake.last.engine.requests[0]) < 8
    assert losses == vllm_losses
    for name, weight in weights.items():
        assert torch.equal(weight, vllm_weights[name]), name


def test_a_missing_vllm_is_said_before_anything_is_loaded(tokenizer, rows, options):
    with pytest.raises(ImportError, match="`use_vllm=True` generates with vLLM"):
        make_trainer("no/draft", "no/target", tokenizer, rows, options, use_vllm=True)


def test_prompts_have_to_fit_into_a_colocated_vllm(path, target, tokenizer, rows, options, monkeypatch):
    fake_vllm.install(monkeypatch, path)
    longest = max(len(row["prompt_ids"]) for row in rows)
    limits = {"use_vllm": True, "vllm_max_model_length": longest + 8}
    make_trainer(path, target, tokenizer, rows, options, **limits)
    with pytest.raises(ValueError, match=rf"no room for `max_new_tokens=9` in the vLLM's {longest + 8} positions"):
        make_trainer(path, target, tokenizer, rows, options, **limits, max_new_tokens=9)


@pytest.mark.parametrize("settings", [{"sample_from": "target"}, {"mode": "streaming"}, {"vllm_mode": "elsewhere"}])
def test_what_vllm_cannot_do_is_refused(options, settings):
    with pytest.raises(ValueError, match=next(iter(settings.values()))):
        OnlineGKDConfig(**options, **settings, use_vllm=True)


@pytest.mark.parametrize(
    ("mode", "slow"), [("on_policy", "teacher"), ("on_policy", "generation"), ("streaming", "generation")]
)
def test_shares_of_time_follow_what_is_slow(target, tokenizer, rows, options, monkeypatch, mode, slow):
    trainer = make_trainer(build_llama(seed=0), target, tokenizer, rows, {**options, "mode": mode})
    slowed, method = {
        "teacher": (type(trainer._teacher), "compute_targets"),
        "generation": (type(trainer._writer), "write"),
    }[slow]
    original = getattr(slowed, method)
    monkeypatch.setattr(slowed, method, lambda *args: (time.sleep(0.6), original(*args))[1])
    trainer.train()
    for log in (log for log in trainer.state.log_history if "loss" in log):
        shares = {name: log[name] for name in SHARES}
        assert all(0 <= share <= 1 for share in shares.values()) and sum(shares.values()) <= 1 + 1e-9
        assert max(shares, key=shares.get) == f"time/{slow}_share"
        assert shares[f"time/{slow}_share"] * log["time/step_seconds"] > 0.599


def test_offline_distillation_has_shares_too(target, tokenizer, rows, options):
    trainer = WhiteBoxDistillTrainer(
        model=build_llama(seed=0), teacher_model=target, args=WhiteBoxDistillConfig(**options),
        processing_class=tokenizer, train_dataset=Dataset.from_list(rows),
    )  # fmt: skip
    trainer.train()
    for log in (log for log in trainer.state.log_history if "loss" in log):
        assert {name for name in log if name.endswith("_share")} == set(SHARES[1:])
        assert 0 < sum(log[name] for name in SHARES[1:]) <= 1 + 1e-9
