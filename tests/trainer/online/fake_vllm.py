"""Stand-ins for vLLM under TRL's own `VLLMGeneration`: `vllm.LLM`, and TRL's client of a server.

Both hold a copy of the draft, loaded from disk, that learns of new weights only through what TRL sends, under the names
it sends, and obey the sampling parameters that TRL passes on. What vLLM's classes are called with is vLLM's API as TRL
1.16 uses it.
"""

from types import SimpleNamespace

import torch
import trl.generation
from transformers import AutoModelForCausalLM
from trl.generation import vllm_generation


class FakeEngine:
    """A draft with weights of its own, one text at a time and without a cache."""

    def __init__(self, path: str):
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.syncs = 0
        self.requests: list[list[list[int]]] = []

    def load_weights(self, named):
        weights = dict(self.model.named_parameters())
        for name, value in named:
            weights[name].data.copy_(value)

    def complete(self, prompts, params) -> list[list[int]]:
        self.requests.append(prompts)
        return [self._complete_one(prompt, params) for prompt in prompts]

    @torch.no_grad()
    def _complete_one(self, prompt, params) -> list[int]:
        assert params["ignore_eos"] and params["repetition_penalty"] == 1.0 and params["min_p"] == 0.0
        assert params["n"] == 1 and params["logprobs"] is None
        ids = list(prompt)
        for _ in range(params["max_tokens"]):
            logits = self.model(input_ids=torch.tensor([ids])).logits[0, -1]
            for token, bias in params["logit_bias"].items():
                logits[int(token)] += bias
            if params["top_k"]:
                logits[logits < logits.topk(params["top_k"]).values[-1]] = -torch.inf
            if params["temperature"] == 0:
                ids.append(int(logits.argmax()))
            else:
                ids.append(int(torch.multinomial((logits / params["temperature"]).softmax(-1), 1)))
            if ids[-1] in params["stop_token_ids"]:
                break
        return ids[len(prompt) :]


class FakeLLM:
    """`vllm.LLM`, as a colocated `VLLMGeneration` uses it."""

    last: "FakeLLM"

    def __init__(self, model, *, seed, max_model_len, **kwargs):
        torch.manual_seed(seed)  # as vLLM does
        self.engine, self.max_model_len, self.kwargs = FakeEngine(model), max_model_len, kwargs
        runner = SimpleNamespace(model=self.engine)
        worker = SimpleNamespace(model_runner=runner)
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))
        FakeLLM.last = self

    def reset_prefix_cache(self):
        self.engine.syncs += 1

    def generate(self, prompts, sampling_params, use_tqdm):
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        written = self.engine.complete(ids, vars(sampling_params))
        if self.max_model_len is not None:  # past which vLLM stops without a word
            written = [w[: self.max_model_len - len(i)] for i, w in zip(ids, written, strict=True)]
        return [
            SimpleNamespace(prompt_token_ids=i, outputs=[SimpleNamespace(token_ids=tuple(w), logprobs=None)])
            for i, w in zip(ids, written, strict=True)
        ]


class FakeClient:
    """`trl.generation.vllm_client.VLLMClient` with a server that has loaded `path`."""

    last: "FakeClient"
    path: str

    def __init__(self, base_url, group_port, connection_timeout):
        self.base_url, self.group_port, self.connection_timeout = base_url, group_port, connection_timeout
        self.engine = FakeEngine(self.path)
        FakeClient.last = self

    def init_communicator(self, device):
        self.device = device

    def update_named_params(self, metadata, named_params):
        received = list(named_params)  # vLLM packs up to 1 GiB of them before it sends any
        assert metadata == [(name, str(w.dtype).removeprefix("torch."), list(w.shape)) for name, w in received]
        self.engine.load_weights(received)

    def reset_prefix_cache(self):
        self.engine.syncs += 1

    def generate(self, *, prompts, features, generation_kwargs, structured_outputs_regex, **params):
        assert features is None and structured_outputs_regex is None
        written = self.engine.complete(prompts, {**params, **generation_kwargs})
        return {"prompt_ids": prompts, "completion_ids": written, "logprobs": None, "logprob_token_ids": None}


def install(monkeypatch, path: str) -> None:
    """Puts both in the places that vLLM has, for a draft saved in `path`, until the end of the test."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)  # TRL sets it, which the end of the test takes back
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation, "LLM", FakeLLM, raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", SimpleNamespace, raising=False)
    monkeypatch.setattr(vllm_generation, "VLLMClient", FakeClient)
    monkeypatch.setattr(FakeClient, "path", path, raising=False)
    monkeypatch.setattr(trl.generation, "VLLMGeneration", vllm_generation.VLLMGeneration, raising=False)
