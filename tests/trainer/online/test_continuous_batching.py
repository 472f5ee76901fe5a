"""Text by continuous batching is the text of plain generation."""

import pytest
import torch
from datasets import Dataset
from test_online_gkd import GREEDY, assert_equal_weights, losses, make_trainer, weights
from tiny import build_llama
from transformers.generation import ContinuousBatchingConfig

from spec_kd import OnlineGKDConfig, VocabularyMismatchError
from spec_kd.sampling.options import SamplingOptions
from spec_kd.trainer.online.writers import ContinuousBatchingWriter

ROOM = {"num_blocks": 64, "max_batch_tokens": 64, "page_size": 32}
CONTINUOUS = {"use_transformers_continuous_batching": True, "transformers_continuous_batching_config": ROOM}


def test_a_run_is_that_of_plain_generation(target, tokenizer, rows, options):
    runs = []
    for overrides in ({}, CONTINUOUS):
        draft = build_llama(seed=0)
        trainer = make_trainer(draft, target, tokenizer, Dataset.from_list(rows), options, **GREEDY, **overrides)
        trainer.train()
        runs.append((trainer.responses, losses(trainer), weights(draft)))
    assert runs[0][:2] == runs[1][:2]
    assert_equal_weights(runs[0][2], runs[1][2])


def test_sampled_text_has_the_distribution_and_the_seed(tokenizer):
    model = build_llama(seed=1, initializer_range=0.3)
    writer = ContinuousBatchingWriter(
        options=SamplingOptions(max_new_tokens=1, temperature=0.7), processing_class=tokenizer,
        config=ContinuousBatchingConfig(num_blocks=600, max_batch_tokens=1500, page_size=32),
    )  # fmt: skip
    prompt = [5, 6, 7]
    state = torch.get_rng_state()
    written = writer.write({"draft": model}, [prompt] * 1500, "a")
    assert torch.equal(state, torch.get_rng_state())
    assert written == writer.write({"draft": model}, [prompt] * 1500, "a")
    assert written != writer.write({"draft": model}, [prompt] * 1500, "b")
    counts = torch.bincount(torch.tensor([completion.ids[0] for completion in written]), minlength=261) / 1500
    with torch.no_grad():
        expected = (model(input_ids=torch.tensor([prompt])).logits[0, -1] / 0.7).softmax(-1)
    assert ((counts - expected).abs() < 5 * (expected * (1 - expected) / 1500).sqrt() + 1e-3).all()
    assert writer.write({"draft": model}, [], "a") == []


def test_what_it_cannot_do_is_refused(target, tokenizer, rows, options):
    for overrides in ({"sample_from": "mixed"}, {"mode": "streaming"}):
        with pytest.raises(ValueError, match="one model writes on policy"):
            OnlineGKDConfig(**options, **CONTINUOUS, **overrides)
    padded = build_llama(seed=1, vocab_size=288)
    with pytest.raises(VocabularyMismatchError, match="288 rows but the tokenizer has 261"):
        make_trainer(padded, target, tokenizer, Dataset.from_list(rows), options, **GREEDY, **CONTINUOUS)
