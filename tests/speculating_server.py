"""A local server that speculates by the loop of a serving engine, and tells of it as that engine does."""

import itertools
import threading
from typing import Any

import torch
from engine_loops import pick, serve
from local_server import LocalServer

OWNERS = {"vllm": "vllm", "llama.cpp": "llamacpp", "sglang": "sglang"}
PATHS = {"vllm": "/v1/completions", "llama.cpp": "/completion", "sglang": "/generate"}


class SpeculatingServer(LocalServer):
    """A server of one engine over tiny models.

    Args:
        engine (`str`): Whose loop decodes, and in whose form answers are.
        target (`PreTrainedModel`): Writes.
        draft (`PreTrainedModel`): Drafts greedily; `None` decodes plainly.
        gamma (`int`): Tokens drafted in a round.
        **traits:
            Those of `LocalServer`, and `tells` (`False`: answers say nothing of drafts), `counts` (`False`: there is no
            `/metrics`), `choose` (how the target picks a token), `names` (`False`: there is no `/v1/models`),
            `allow` (which ids may follow a text, for requests with the toy grammar).
    """

    def __init__(self, engine: str, target: Any, draft: Any, tokenizer: Any, gamma: int = 3, **traits: Any):
        super().__init__(target, tokenizer, **traits)
        self.engine, self.draft, self.gamma = engine, draft, gamma
        self.rounds: list[tuple[int, int]] = []
        self._count_lock = threading.Lock()

    def show(self, path: str) -> str | None:
        """`/v1/models`, and `/metrics` in the text format of Prometheus."""
        if path == "/v1/models":
            owner = OWNERS[self.engine]
            names = f'{{"data": [{{"id": "tiny", "owned_by": "{owner}"}}]}}'
            return names if self.traits.get("names", True) else None
        if path != "/metrics" or not self.traits.get("counts", True):
            return None
        drafted, accepted = (sum(column) for column in zip(*self.rounds, strict=True)) if self.rounds else (0, 0)
        prefix = {"vllm": "vllm:", "llama.cpp": "llamacpp:", "sglang": "sglang:"}[self.engine]
        lines = ["# HELP a page", f'{prefix}num_requests{{model_name="tiny"}} 1.0']
        labels = "" if self.engine == "llama.cpp" else '{engine="0",model_name="tiny"}'
        if self.engine == "sglang":
            return "\n".join([*lines, f"sglang:spec_verify_calls_total{labels} {len(self.rounds)}.0"])
        if self.draft is None and self.engine == "vllm":
            return "\n".join(lines)
        for name, value in (("draft_tokens", drafted), ("accepted_tokens", accepted), ("drafts", len(self.rounds))):
            lines.append(f"{prefix}spec_decode_num_{name}_total{labels} {float(value)}")
            lines.append(f"{prefix}spec_decode_num_{name}_created{labels} 1.7e+09")
        for k in range(self.gamma if self.rounds else 0):
            at_position = sum(accepted > k for _, accepted in self.rounds)
            place = f'{{{labels.strip("{}")},position="{k}"}}'.replace("{,", "{")
            lines.append(f"{prefix}spec_decode_num_accepted_tokens_per_pos_total{place} {at_position}")
        return "\n".join(lines)

    def _open(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        assert path == PATHS[self.engine]
        assert "logprobs" not in body  # they would cost time that counts as decoding
        if self.engine == "sglang":
            sampling = body["sampling_params"]
            own = {"prompt": body["input_ids"], "max_tokens": sampling["max_new_tokens"]}
            return {**own, "grammar": sampling.get("ebnf"), **sampling}
        assert self.engine == "vllm" or (body["return_tokens"] and "model" not in body)
        return {**body, "grammar": body.get("structured_outputs", body).get("grammar")}

    def _answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        prompt, limit = list(body["prompt"]), body["max_tokens"]
        if len(prompt) + limit > self.traits.get("context", 10**6):
            return 400, {"error": {"message": "the prompt is longer than the context"}}
        choose, eos = self.traits.get("choose", pick), self.tokenizer.eos_token_id
        allow = self.traits["allow"] if body["grammar"] else None
        with self._model_lock, torch.no_grad():
            if self.draft is None:
                ids: list[int] = []
                while len(ids) < limit and eos not in ids:
                    ids.append(choose(self.model, prompt + ids, allow and allow(ids)))
                rounds = []
            else:
                ids, rounds = serve(self.engine, self.draft, self.model, prompt, self.gamma, eos, limit, choose, allow)
        with self._count_lock:
            self.rounds += rounds
        answer = getattr(self, f"_answer_{OWNERS[self.engine]}")(prompt, ids, rounds)
        return 200, answer | ({"generation_settings": {"grammar": body["grammar"] or ""}} if "tokens" in answer else {})

    def _answer_vllm(self, prompt: list[int], ids: list[int], rounds: list[tuple[int, int]]) -> dict[str, Any]:
        reason = "stop" if ids[-1] == self.tokenizer.eos_token_id else "length"
        choice = {"index": 0, "text": self._decode(ids), "finish_reason": reason, "logprobs": None}
        choice |= {"token_ids": ids, "prompt_token_ids": prompt}
        told = None
        if self.traits.get("tells", True):
            accepted = [number for _, number in rounds]
            told = {
                "num_draft_tokens": sum(number for number, _ in rounds),
                "num_accepted_draft_tokens": sum(accepted),
                "num_spec_steps": len(rounds),
                "acceptance_histogram": [accepted.count(k) for k in range(self.gamma + 1)],
                "per_step_accepted": accepted,
                "per_step_drafted": [number for number, _ in rounds],
            }
        usage = {"completion_tokens": len(ids)}
        return {"choices": [choice], "usage": usage, "metrics": told and {"speculative_decoding": told}}

    def _answer_llamacpp(self, prompt: list[int], ids: list[int], rounds: list[tuple[int, int]]) -> dict[str, Any]:
        timings: dict[str, Any] = {"predicted_n": len(ids), "predicted_ms": 10.0 * len(ids), "prompt_ms": 5.0}
        if rounds:
            timings |= dict(zip(("draft_n", "draft_n_accepted"), map(sum, zip(*rounds, strict=True)), strict=True))
        stop_type = "eos" if ids[-1] == self.tokenizer.eos_token_id else "limit"
        answer = {"content": self._decode(ids), "tokens": ids, "stop_type": stop_type, "tokens_predicted": len(ids)}
        return answer | ({"timings": timings} if self.traits.get("tells", True) else {})

    def _answer_sglang(self, prompt: list[int], ids: list[int], rounds: list[tuple[int, int]]) -> dict[str, Any]:
        eos = self.tokenizer.eos_token_id
        end = {"type": "stop", "matched": eos} if ids[-1] == eos else {"type": "length", "length": len(ids)}
        info = {"finish_reason": end, "completion_tokens": len(ids), "prompt_tokens": len(prompt)}
        if rounds and self.traits.get("tells", True):
            accepted = [number for _, number in rounds]
            info |= {
                "spec_num_proposed_drafts": len(rounds) * self.gamma,
                "spec_num_correct_drafts": sum(accepted),
                "spec_verify_ct": len(rounds),
                "spec_correct_drafts_histogram": [accepted.count(k) for k in range(max(accepted) + 1)],
            }
        return {"text": self._decode(ids), "output_ids": ids, "meta_info": info}


def alternates(*servers: LocalServer) -> bool:
    """Whether the requests of two servers came strictly in turn."""
    times = sorted((time, number) for number, server in enumerate(servers) for time in server.times)
    return all(a[1] != b[1] for a, b in itertools.pairwise(times))
