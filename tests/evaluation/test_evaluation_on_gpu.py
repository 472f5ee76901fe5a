"""Acceptance on a GPU: replay is what `generate(assistant_model=...)` does there, and what a CPU says."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from spec_kd import SpeculativeEvalCallback, evaluate_draft, replay
from spec_kd.evaluation.assisted import generate_assisted

pytestmark = pytest.mark.gpu

EXACT = ("tokens", "target_calls", "accepted", "drafted", "drafting_rounds", "accepted_by_position")


@pytest.fixture
def pair(pair):
    return tuple(model.to("cuda") for model in pair)


def as_rows(prompts, figures):
    return [{"prompt_ids": p, "completion_ids": c} for p, c in zip(prompts, figures.completion_ids, strict=True)]


@pytest.mark.parametrize("num_assistant_tokens", [1, 4])
def test_greedy_replay_equals_assisted_prompt_by_prompt(pair, prompts, num_assistant_tokens):
    draft, target = pair
    options = {"temperature": 0.0, "num_assistant_tokens": num_assistant_tokens, "max_new_tokens": 20}
    figures = generate_assisted(target, draft, prompts, **options)
    replayed = replay(draft, target, as_rows(prompts, figures), **options)
    for name in EXACT:
        np.testing.assert_array_equal(getattr(figures, name), getattr(replayed, name), err_msg=name)
    assert 0.1 < figures.acceptance_rate.value < 0.9


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replay_is_that_of_a_cpu(pair, prompts, tools, temperature):
    draft, target = (copy.deepcopy(model).to("cpu") for model in pair)
    rows = tools.write_texts(target, prompts, 20, temperature)
    options = {"temperature": temperature, "num_assistant_tokens": 4, "max_new_tokens": 20}
    expected, measured = replay(draft, target, rows, **options), replay(*pair, rows, **options)
    assert measured.alpha.value == pytest.approx(expected.alpha.value, abs=1e-5)
    assert measured.block_efficiency.value == pytest.approx(expected.block_efficiency.value, rel=1e-4)


def test_sampled_assisted_generation_agrees_with_replay(target, tools):
    draft, target = tools.add_noise(target, scale=0.03).to("cuda"), target.to("cuda")
    generator = torch.Generator().manual_seed(5)
    prompts = torch.randint(5, 261, (60, 4), generator=generator).tolist()
    options = {"temperature": 1.0, "num_assistant_tokens": 4, "max_new_tokens": 16}
    figures = generate_assisted(target, draft, prompts, seed=3, **options)
    replayed = replay(draft, target, as_rows(prompts, figures), **options)
    difference = figures.target_calls - replayed.target_calls
    assert abs(difference.mean()) < 3 * difference.std(ddof=1) / np.sqrt(len(difference))


def test_a_whole_report_with_measured_costs(pair, tokenizer):
    questions = Dataset.from_dict({"prompt": ["how far", "when", "天气", "why not?", "who", "where is it", "x", "y"]})
    report = evaluate_draft(
        *pair, questions, processing_class=tokenizer, max_new_tokens=16, num_assistant_tokens=3, gammas=(1, 3),
        num_assisted_prompts=2, show_progress=False,
    )  # fmt: skip
    setting = report.draft.setting("greedy")
    assert setting.at_gamma(3).block_efficiency.value > 1
    assert report.draft.costs and all(cost.cost_ratio > 0 for cost in report.draft.costs)


def test_the_callback_measures_the_draft_that_trains(pair, tokenizer, tmp_path):
    draft, target = pair
    callback = SpeculativeEvalCallback(["hello there", "two words"], target, num_assistant_tokens=2, max_new_tokens=8)
    rows = Dataset.from_list([{"prompt": "hello", "completion": "some answer"}] * 8)
    args = SFTConfig(
        str(tmp_path), max_steps=2, eval_strategy="steps", eval_steps=1, save_strategy="no", bf16=True, report_to=[],
        learning_rate=1e-3, disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=draft, args=args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer, callbacks=[callback]
    )
    callback.bind(trainer)
    trainer.train()
    alphas = [log["eval_alpha_t1"] for log in trainer.state.log_history if "eval_alpha_t1" in log]
    assert len(alphas) == 3 and alphas[0] != alphas[2]
