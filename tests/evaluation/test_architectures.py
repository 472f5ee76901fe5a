"""Replay is assisted generation on other architectures too: greedy exactly, sampled in expectation."""

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from spec_kd.evaluation import generate_assisted, replay

SHARED = {
    "vocab_size": 261, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.1, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
ARCHITECTURES = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8, "tie_word_embeddings": False}),
    "gemma2, soft-capped": (
        Gemma2ForCausalLM,
        Gemma2Config,
        {"head_dim": 8, "final_logit_softcapping": 4.0, "attn_logit_softcapping": 20.0, "sliding_window": 256},
    ),
}


@pytest.fixture(params=ARCHITECTURES)
def pair(request, tools):
    model_class, config_class, options = ARCHITECTURES[request.param]
    torch.manual_seed(1)
    target = model_class(config_class(**SHARED, **options)).eval()
    return tools.add_noise(target, scale=0.015), target


def test_greedy_replay_equals_assisted(pair, prompts):
    draft, target = pair
    options = {"temperature": 0.0, "num_assistant_tokens": 4, "max_new_tokens": 20}
    figures = generate_assisted(target, draft, prompts, **options)
    rows = [{"prompt_ids": p, "completion_ids": c} for p, c in zip(prompts, figures.completion_ids, strict=True)]
    replayed = replay(draft, target, rows, **options)
    for name in ("tokens", "target_calls", "accepted", "drafted", "accepted_by_position"):
        np.testing.assert_array_equal(getattr(figures, name), getattr(replayed, name), err_msg=name)
    assert 0.05 < figures.acceptance_rate.value < 0.95  # there is something to get wrong


def test_sampled_replay_agrees_within_its_interval(pair):
    draft, target = pair
    prompts = torch.randint(5, 261, (40, 4), generator=torch.Generator().manual_seed(5)).tolist()
    options = {"temperature": 1.0, "num_assistant_tokens": 3, "max_new_tokens": 12}
    figures = generate_assisted(target, draft, prompts, seed=3, **options)
    rows = [{"prompt_ids": p, "completion_ids": c} for p, c in zip(prompts, figures.completion_ids, strict=True)]
    replayed = replay(draft, target, rows, **options)
    difference = figures.target_calls - replayed.target_calls
    assert abs(difference.mean()) < 3 * difference.std(ddof=1) / np.sqrt(len(difference))
    # the run is what has luck in it, the replay is an expectation
    assert figures.block_efficiency.low <= replayed.block_efficiency.value <= figures.block_efficiency.high
