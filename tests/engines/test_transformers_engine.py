"""The signal of generation and of scoring against the target's own dense distributions."""

import pytest
import torch
from tiny import build_llama, build_tokenizer

from spec_kd.engines.transformers import TransformersEngine
from spec_kd.losses import SignalSpec
from spec_kd.sampling.options import SamplingOptions

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
METHODS = ["token_only", "sampled_counts", "sampled_logprobs", "top_k_tail"]


@pytest.fixture
def engine():
    model = build_llama(seed=1, hidden_size=48, tie=False)
    with torch.no_grad():  # close to uniform: with the seed of these tests a row ends before the others
        model.lm_head.weight.mul_(0.1)
        model.lm_head.weight[1] = 0.0
        model.lm_head.weight[200:] = 0.0
    return TransformersEngine(model, build_tokenizer())


def compute_log_p(engine, prompt, completion, temperature):
    """`(n, V)` of the tokens of a completion, from one dense pass."""
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        logits = engine.target(input_ids=ids).logits[0, len(prompt) - 1 : -1, :261]
    return (logits / (temperature or 1.0)).log_softmax(-1)


def check(engine, prompts, completions, request, temperature):
    for prompt, completion in zip(prompts, completions, strict=True):
        log_p = compute_log_p(engine, prompt, completion.ids, temperature)
        tokens = torch.tensor(completion.ids)
        expected = log_p.gather(-1, tokens[:, None]).squeeze(-1)
        torch.testing.assert_close(torch.tensor(completion.token_logprobs), expected, rtol=1e-4, atol=1e-4)
        if request.method == "token_only":
            assert completion.sparse is None
            continue
        assert len(completion.sparse.ids) == len(completion.ids)
        for i, ids in enumerate(completion.sparse.ids):
            assert len(set(ids.tolist())) == len(ids)
            if completion.sparse.log_p is not None:
                values = torch.from_numpy(completion.sparse.log_p[i].copy())
                torch.testing.assert_close(values, log_p[i, torch.from_numpy(ids).long()], rtol=1e-4, atol=1e-4)
            if request.method == "top_k_tail":
                assert set(ids.tolist()) == set(log_p[i].topk(request.top_k).indices.tolist())
            else:
                assert completion.sparse.counts[i].sum() == request.num_draws


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_generation_keeps_the_distribution_it_sampled_from_and_the_same_text(engine, method, temperature):
    options = SamplingOptions(max_new_tokens=30, temperature=temperature)
    numbers = {"top_k_tail": {"top_k": 7}, "token_only": {}}.get(method, {"num_draws": 20})
    request = SignalSpec(method, **numbers)
    plain = engine.generate(PROMPTS, options, seed="q")
    kept = engine.generate(PROMPTS, options, request, seed="q")
    assert [c.ids for c in plain] == [c.ids for c in kept]
    assert all(c.token_logprobs is None and c.sparse is None for c in plain)
    check(engine, PROMPTS, kept, request, temperature)
    if temperature:
        assert len({len(c.ids) for c in kept}) > 1
        assert any(c.finish_reason == "stop" and c.ids[-1] == 1 for c in kept)


@pytest.mark.parametrize("method", METHODS)
def test_scoring_equals_a_dense_pass_and_generation(engine, method, monkeypatch):
    monkeypatch.setattr("spec_kd.engines.transformers.MAX_SCORED_LOGITS", 261 * 4)
    numbers = {"top_k_tail": {"top_k": 7}, "token_only": {}}.get(method, {"num_draws": 20})
    request = SignalSpec(method, **numbers)
    engine.target.train()
    written = engine.generate(PROMPTS, SamplingOptions(30, temperature=1.0), request, seed="q")
    scored = engine.score(PROMPTS, [c.ids for c in written], request, seed="q")
    assert engine.target.training
    engine.target.eval()
    check(engine, PROMPTS, scored, request, 1.0)
    assert [c.finish_reason for c in scored] == [c.finish_reason for c in written]


def test_draws_come_from_p(engine):
    """Over many seeds the share of draws on each id is its probability, within five standard errors."""
    completion = [20, 21, 22]
    request = SignalSpec("sampled_counts", num_draws=200)
    total = torch.zeros(3, 261)
    for seed in range(40):
        (scored,) = engine.score([[5, 6]], [completion], request, seed=str(seed))
        for i, (ids, counts) in enumerate(zip(scored.sparse.ids, scored.sparse.counts, strict=True)):
            total[i, torch.from_numpy(ids).long()] += torch.from_numpy(counts)
    p = compute_log_p(engine, [5, 6], completion, 1.0).exp()
    error = (total / 8000 - p).abs()
    assert (error <= 5 * (p * (1 - p) / 8000).sqrt() + 1e-4).all()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (SignalSpec("logits"), "token_only, sampled_counts"),
        (SignalSpec("token_only", top_k=3), "no use for `top_k=3`"),
        (SignalSpec("top_k_tail", num_draws=3), "no use for `num_draws=3`"),
        (SignalSpec("sampled_counts", num_draws=0), "at least 1"),
        (SignalSpec("top_k_tail", top_k=1000), "261 ids"),
    ],
)
def test_requests_that_make_no_sense_are_refused(engine, request_, message):
    with pytest.raises(ValueError, match=message):
        engine.check(PROMPTS, SamplingOptions(8, 0.0), request_)
