"""Text and stored signal on a GPU against the target's own dense distributions there."""

import pytest
import torch
from test_transformers_engine import METHODS, PROMPTS, check
from tiny import build_llama, build_tokenizer

from spec_kd.engines.transformers import TransformersEngine
from spec_kd.losses import SignalSpec
from spec_kd.sampling.options import SamplingOptions

pytestmark = pytest.mark.gpu


@pytest.fixture
def engine():
    return TransformersEngine(build_llama(seed=1, hidden_size=48, tie=False).to("cuda"), build_tokenizer())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_and_scoring_keep_the_distribution_sampled_from(engine, method, temperature):
    options = SamplingOptions(max_new_tokens=20, temperature=temperature)
    numbers = {"top_k_tail": {"top_k": 7}, "token_only": {}}.get(method, {"num_draws": 20})
    request = SignalSpec(method, **numbers)
    state = torch.cuda.get_rng_state()
    kept = engine.generate(PROMPTS, options, request, seed="q")
    assert [c.ids for c in kept] == [c.ids for c in engine.generate(PROMPTS, options, seed="q")]
    assert torch.equal(state, torch.cuda.get_rng_state())
    dense = TransformersEngine(engine.target.to("cpu"), engine.processing_class)
    check(dense, PROMPTS, kept, request, temperature)
    if temperature:
        engine.target.to("cuda")
        scored = engine.score(PROMPTS, [c.ids for c in kept], SignalSpec("token_only"))
        for a, b in zip(scored, kept, strict=True):
            torch.testing.assert_close(
                torch.tensor(a.token_logprobs), torch.tensor(b.token_logprobs), rtol=1e-3, atol=1e-3
            )
