"""Every trainer in bf16 on a GPU: the loss is the dense reference's, and training raises acceptance."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from test_stored_teacher import compute_first_loss
from tiny import build_llama, build_tokenizer

from spec_kd import (
    BlackBoxSFTConfig,
    BlackBoxSFTTrainer,
    OnlineGKDConfig,
    OnlineGKDTrainer,
    WhiteBoxDistillConfig,
    WhiteBoxDistillTrainer,
    generate_responses,
    replay,
)

pytestmark = pytest.mark.gpu

TEXTS = [f"{word} {i}" for i in range(8) for word in ("a", "hello there", "the quick brown fox", "1 + 1 =")]
ANSWERS = {"max_new_tokens": 16, "temperature": 1.0, "show_progress": False}


@pytest.fixture
def options(options):
    return {**options, "use_cpu": False}


@pytest.fixture(scope="module")
def target():
    """Nearly a table from one token to the next, so that a few hundred tokens teach it; where a user has it."""
    model = build_llama(seed=1, hidden_size=48, tie=False)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(20)
        model.lm_head.weight.mul_(5)
    return model.to("cuda")


@pytest.fixture(scope="module")
def responses(target):
    return generate_responses(
        target, TEXTS, processing_class=build_tokenizer(), teacher_signal="sampled_logprobs", num_draws=64,
        **ANSWERS,
    )  # fmt: skip


def test_loss_and_gradients_equal_the_dense_float64_reference(tokenizer, rows, options, reference_loss):
    draft, target = build_llama(seed=0, tie=False), build_llama(seed=1, hidden_size=48)
    reference = copy.deepcopy(draft).double()
    expected = reference_loss(reference, copy.deepcopy(target).double(), rows[:4])
    expected.backward()
    trainer = WhiteBoxDistillTrainer(
        model=draft, teacher_model=target, processing_class=tokenizer, train_dataset=Dataset.from_list(rows[:4]),
        args=WhiteBoxDistillConfig(**options, bf16=False),
    )  # fmt: skip
    loss = compute_first_loss(trainer)
    loss.backward()
    assert loss.device.type == "cuda" and next(trainer.teacher_model.parameters()).device.type == "cuda"
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for (name, parameter), other in zip(draft.named_parameters(), reference.parameters(), strict=True):
        assert (parameter.grad.cpu().double() - other.grad).norm() < 1e-3 * other.grad.norm(), name


KINDS = {
    "live": (WhiteBoxDistillTrainer, WhiteBoxDistillConfig, {}),
    "packed": (WhiteBoxDistillTrainer, WhiteBoxDistillConfig, {"packing": True, "max_length": 64}),
    "checkpointed": (WhiteBoxDistillTrainer, WhiteBoxDistillConfig, {"gradient_checkpointing": True}),
    "selected": (WhiteBoxDistillTrainer, WhiteBoxDistillConfig, {"token_selection": "target_entropy"}),
    "cached": (WhiteBoxDistillTrainer, WhiteBoxDistillConfig, {}),
    "lora": (WhiteBoxDistillTrainer, WhiteBoxDistillConfig, {}),
    "black box": (BlackBoxSFTTrainer, BlackBoxSFTConfig, {}),
    "on policy": (OnlineGKDTrainer, OnlineGKDConfig, {"lmbda": 1.0, "max_new_tokens": 16}),
    "streaming": (
        OnlineGKDTrainer,
        OnlineGKDConfig,
        {"mode": "streaming", "max_new_tokens": 16, "num_assistant_tokens": 3, "trained_positions": "all"},
    ),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_training_in_bfloat16_raises_acceptance(target, tokenizer, responses, options, kind):
    trainer_class, config_class, overrides = KINDS[kind]
    draft = build_llama(seed=0).to("cuda")
    measure = {"temperature": 1.0, "max_new_tokens": 16}
    before = replay(draft, target, responses, **measure).alpha.value
    has_teacher = kind not in ("cached", "black box")
    named = {"teacher_model": copy.deepcopy(target)} if has_teacher else {}
    if kind == "lora":
        named["peft_config"] = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    args = config_class(**{**options, "max_steps": 80, "learning_rate": 1e-2, "bf16": True, **overrides})
    trainer = trainer_class(
        model=draft, args=args, processing_class=tokenizer,
        train_dataset=responses.select_columns(["prompt_ids", "completion_ids"]) if has_teacher else responses, **named,
    )  # fmt: skip
    trainer.train()
    after = replay(trainer.model, target, responses, **measure).alpha.value
    assert after > before + (0.02 if kind == "lora" else 0.2)  # LoRA leaves random embeddings as they are
    logs = [log for log in trainer.state.log_history if "loss" in log]
    if trainer_class is BlackBoxSFTTrainer:  # TRL's own step, which nothing takes apart
        return
    shares = [value for name, value in logs[-1].items() if name.startswith("time/") and name.endswith("_share")]
    assert shares and 0 < sum(shares) <= 1.001 and logs[-1]["time/step_seconds"] > 0


def test_a_killed_run_resumes_to_the_same_weights(target, tokenizer, responses, options):
    def train(resume=None):
        draft = build_llama(seed=0)
        args = WhiteBoxDistillConfig(**{
            **options, "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "bf16": True, "learning_rate": 1e-3,
        })  # fmt: skip
        trainer = WhiteBoxDistillTrainer(
            model=draft, teacher_model=copy.deepcopy(target), args=args, processing_class=tokenizer,
            train_dataset=responses.select_columns(["prompt_ids", "completion_ids"]),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return {name: value.detach().cpu().clone() for name, value in draft.state_dict().items()}

    whole = train()
    resumed = train(f"{options['output_dir']}/checkpoint-3")
    for name in whole:  # sums on a GPU need not come in one order
        torch.testing.assert_close(resumed[name], whole[name], rtol=1e-3, atol=1e-4, msg=name)
