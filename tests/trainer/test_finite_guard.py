"""A NaN stops a run in every set-up: nothing is saved over the last good checkpoint, and no log says 0.0 for it."""

import hashlib
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny import build_llama, build_tokenizer
from transformers import TrainerCallback

from spec_kd import (
    BlackBoxSFTConfig,
    BlackBoxSFTTrainer,
    OnlineGKDConfig,
    OnlineGKDTrainer,
    WhiteBoxDistillConfig,
    WhiteBoxDistillTrainer,
    generate_responses,
)
from spec_kd.finite import NonFiniteError, find_nonfinite_parameter
from spec_kd.options import check_finite_options

TEACHER = "teacher_model"
ONLINE = {"lmbda": 1.0, "max_new_tokens": 6}
SET_UPS = {
    "black_box": (BlackBoxSFTTrainer, BlackBoxSFTConfig, {}),
    "white_box": (WhiteBoxDistillTrainer, WhiteBoxDistillConfig, {}),
    "stored": (WhiteBoxDistillTrainer, WhiteBoxDistillConfig, {}),
    "on-policy": (OnlineGKDTrainer, OnlineGKDConfig, ONLINE),
    "streaming": (OnlineGKDTrainer, OnlineGKDConfig, {"mode": "streaming", "max_new_tokens": 6}),
}


@pytest.fixture(scope="module")
def stored():
    return generate_responses(
        build_llama(seed=1), [f"{i} and" for i in range(16)], processing_class=build_tokenizer(), max_new_tokens=6,
        temperature=1.0, teacher_signal="sampled_logprobs", show_progress=False,
    )  # fmt: skip


@pytest.fixture
def make_trainer(tokenizer, dataset, options, stored):
    def make(set_up, callbacks=(), teacher=None, draft=None, **overrides):
        trainer_class, config_class, own = SET_UPS[set_up]
        named = {"train_dataset": stored if set_up == "stored" else dataset}
        named |= {name: overrides.pop(name) for name in ("train_dataset", "eval_dataset") if name in overrides}
        if set_up not in ("black_box", "stored"):
            named[TEACHER] = teacher or build_llama(seed=1)
        args = config_class(
            **{**options, "save_strategy": "steps", "save_steps": 1, "max_steps": 4, **own, **overrides}
        )
        return trainer_class(
            model=draft or build_llama(seed=0),
            args=args,
            processing_class=tokenizer,
            callbacks=list(callbacks),
            **named,
        )

    return make


class Poison(TrainerCallback):
    """Makes one weight of the draft NaN when a step begins."""

    def __init__(self, step, value=math.nan):
        self.step, self.value = step, value

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                model.model.layers[1].mlp.up_proj.weight[3, 5] = self.value


def hash_files(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).rglob("*") if path.is_file()}


class KeepSums(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        self.sums = {step.name: hash_files(step) for step in Path(args.output_dir).glob("checkpoint-*")}


@pytest.mark.parametrize("set_up", SET_UPS)
def test_a_nan_in_the_draft_stops_the_run_and_leaves_the_last_checkpoint(set_up, make_trainer, options):
    sums = KeepSums()
    trainer = make_trainer(set_up, callbacks=[Poison(step=2), sums])
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj\.weight.*after step 2.*learning_rate"):
        trainer.train()
    found = {step.name: hash_files(step) for step in Path(options["output_dir"]).glob("checkpoint-*")}
    assert found.keys() == {"checkpoint-1", "checkpoint-2"}
    assert found["checkpoint-2"] == sums.sums["checkpoint-2"]
    weights = load_file(Path(options["output_dir"], "checkpoint-2", "model.safetensors"))
    assert all(value.isfinite().all() for value in weights.values())
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 2 and all(0 < loss < math.inf for loss in losses)
    with pytest.raises(NonFiniteError):
        trainer.save_model()
    assert not Path(options["output_dir"], "model.safetensors").exists()

    resumed = make_trainer(set_up)  # the checkpoint can be gone on from
    assert resumed.train(resume_from_checkpoint=True).global_step == 4


@pytest.mark.parametrize("set_up", [name for name in SET_UPS if name not in ("black_box", "stored")])
def test_a_nan_in_the_teacher_is_named(set_up, make_trainer):
    teacher = build_llama(seed=1)
    trainer = make_trainer(set_up, teacher=teacher)
    with torch.no_grad():
        teacher.model.layers[0].self_attn.o_proj.weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"teacher's weight `model\.layers\.0\.self_attn\.o_proj\.weight`"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("role", ["draft", "teacher"])
def test_a_nan_from_the_start_is_refused_by_the_constructor(role, make_trainer):
    broken = build_llama(seed=3)
    with torch.no_grad():
        broken.model.norm.weight[0] = math.nan
    with pytest.raises(NonFiniteError, match=f"logits of the {role}.*model.norm.weight"):
        make_trainer("white_box", **{role: broken})


@pytest.mark.parametrize("set_up", SET_UPS)
def test_a_weight_that_no_token_reaches_is_found_before_the_first_step(set_up, make_trainer, tokenizer):
    draft = build_llama(seed=0, tie=False)
    trainer = make_trainer(set_up, draft=draft)
    with torch.no_grad():
        draft.get_input_embeddings().weight[2, 0] = math.inf  # an id that no row has
    with pytest.raises(NonFiniteError, match=r"Before the first step: The draft's weight `model.embed_tokens\.weight"):
        trainer.train()


@pytest.mark.parametrize("set_up", ["black_box", "white_box"])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_learning_rate_that_is_too_high(set_up, steps, make_trainer, options):
    """Where the last update is the bad one, no loss shows it: the save does."""
    trainer = make_trainer(set_up, learning_rate=1e38, optim="sgd", max_grad_norm=1e9, max_steps=steps)
    trainer.model.model.norm.weight.register_hook(lambda gradient: gradient * 1e4)
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight.*after step 1.*learning_rate"):
        trainer.train()
    assert not list(Path(options["output_dir"]).rglob("model.safetensors"))


def test_weights_that_are_finite_and_absurd_are_named(make_trainer):
    trainer = make_trainer("white_box", learning_rate=1e36, optim="sgd", max_steps=3)
    with pytest.raises(NonFiniteError, match=r"at step 2.*has grown to .*e\+3.*learning_rate.*resume from an earlier"):
        trainer.train()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_loss_of_every_batch_is_checked(accumulation, make_trainer, monkeypatch):
    """A batch of several that one optimizer step is made of; found before its backward pass."""
    calls = []

    class OneBadBatch(BlackBoxSFTTrainer):
        def training_step(self, *args, **kwargs):
            calls.append(self.state.global_step)
            if len(calls) == 2:
                head = self.model.get_output_embeddings()
                handle = self.model.model.register_forward_hook(
                    lambda module, inputs, output: output.__setitem__("last_hidden_state", output[0] * math.inf)
                )
                try:
                    return super().training_step(*args, **kwargs)
                finally:
                    handle.remove()
                    assert head.weight.grad is None or head.weight.grad.isfinite().all()
            return super().training_step(*args, **kwargs)

    monkeypatch.setitem(SET_UPS, "black_box", (OneBadBatch, BlackBoxSFTConfig, {}))
    trainer = make_trainer("black_box", gradient_accumulation_steps=accumulation)
    with pytest.raises(NonFiniteError, match=rf"training loss is nan at step {3 - accumulation}\b"):
        trainer.train()
    assert len(calls) == 2


def test_a_gradient_norm_that_is_not_finite_stops_before_the_optimizer(make_trainer):
    trainer = make_trainer("black_box")
    weight = trainer.model.model.norm.weight
    weight.register_hook(lambda gradient: gradient * math.inf)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(NonFiniteError, match=r"gradient norm is (inf|nan) at step 1"):
        trainer.train()
    assert all(value.equal(before[name]) for name, value in trainer.model.state_dict().items())


def test_an_overflow_that_a_scaler_handles_is_no_reason_to_stop(make_trainer):
    """As in fp16: steps are skipped until the scale fits; only where none does, the run stops."""
    trainer = make_trainer("black_box", save_strategy="no", max_steps=8)
    scaler = trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    norm = trainer.model.model.norm.weight
    hook = norm.register_hook(lambda g: g * (math.inf if scaler.get_scale() > 2.0**12 else 1.0))
    assert trainer.train().global_step == 8
    assert scaler.get_scale() == 2.0**12

    hook.remove()
    norm.register_hook(lambda gradient: gradient * math.inf)
    trainer.args.max_steps = 40
    with pytest.raises(NonFiniteError, match=r"gradient norm"):
        trainer.train()
    assert scaler.get_scale() <= 1.0


def test_evaluations_say_nan_and_stop_a_training(make_trainer, tokenizer, dataset):
    """A loss that is infinite in one evaluation batch: transformers would leave it out of the mean."""
    trainer = make_trainer(
        "black_box", eval_dataset=dataset, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4
    )
    assert trainer.args.logging_nan_inf_filter is False
    batches = iter([False, True] + [False] * 100)
    forward = trainer.model.model.forward

    def fail_once(*args, **kwargs):
        output = forward(*args, **kwargs)
        if not trainer.model.training and next(batches):
            output["last_hidden_state"] = output["last_hidden_state"] * math.nan
        return output

    trainer.model.model.forward = fail_once
    with pytest.raises(NonFiniteError, match=r"evaluation after step 1 gave \{'eval_loss': nan\}"):
        trainer.train()
    assert math.isnan(next(log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log))
    assert not list(Path(trainer.args.output_dir).glob("checkpoint-*"))


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "max_grad_norm", "temperature", "num_train_epochs"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_options_refuse_what_is_no_finite_number(name, value, options):
    with pytest.raises(ValueError, match=f"`{name}` is {value}|`temperature`"):
        WhiteBoxDistillConfig(**{**options, name: value})


def test_options_are_checked_within_dicts(options):
    args = BlackBoxSFTConfig(**options)
    args.lr_scheduler_kwargs = {"min_lr": math.nan}
    with pytest.raises(ValueError, match=r"`lr_scheduler_kwargs\['min_lr'\]` is nan"):
        check_finite_options(args)


def test_a_mask_in_the_heads_bias_is_finite_and_nothing_else_is():
    model = torch.nn.Module()
    head = torch.nn.Linear(4, 8)
    model.head, model.get_output_embeddings = head, lambda: head
    model.other = torch.nn.Linear(2, 2)
    with torch.no_grad():
        head.bias[:3] = -math.inf
        assert find_nonfinite_parameter(model) is None
        model.other.bias[0] = -math.inf
        assert find_nonfinite_parameter(model) == "other.bias"
        model.other.bias[0] = 0.0
        head.bias[4] = math.inf
        assert find_nonfinite_parameter(model) == "head.bias"
        head.bias[4] = math.nan
        assert find_nonfinite_parameter(model) == "head.bias"


def test_rows_without_a_label_have_a_loss_of_zero_and_train_on(make_trainer):
    ids = [[7, 8, 9]] * 8
    rows = Dataset.from_dict({"input_ids": ids, "labels": [[-100] * 3] * 4 + [[-100, 8, 9]] * 4})
    trainer = make_trainer("white_box", train_dataset=rows, max_steps=2, max_length=None, save_strategy="no")
    assert trainer.train().global_step == 2
