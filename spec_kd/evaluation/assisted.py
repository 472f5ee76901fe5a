"""Real assisted generation, measured: `target.generate(assistant_model=draft)` with every round recorded."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation import BaseStreamer

from spec_kd.acceptance import check_num_assistant_tokens, check_sampling
from spec_kd.decoding import Round
from spec_kd.decoding.rounds import leave_out_drafts_after_end
from spec_kd.evaluation.device_timing import synchronize
from spec_kd.evaluation.metrics import AcceptanceMetrics
from spec_kd.evaluation.statistics import Interval, bootstrap
from spec_kd.heads import count_rows, evaluation_mode, find_input_device
from spec_kd.open_types import Arguments, Array
from spec_kd.options import check_int
from spec_kd.sampling.input_checks import check_prompts, find_causal_lm, resolve_vocab_size
from spec_kd.sampling.logits_processors import build_warpers
from spec_kd.sampling.options import check_truncation

if TYPE_CHECKING:
    from transformers._typing import GenerativePreTrainedModel


@dataclass(frozen=True, kw_only=True)
class GenerationTiming:
    """Wall-clock time of P completions, with the draft and without it, in seconds.

    Args:
        assisted_seconds (`np.ndarray`): Time with the draft `(P,)`.
        assisted_first_seconds (`np.ndarray`): The part of it until the first round was over `(P,)`.
        plain_seconds (`np.ndarray`): Time of the same target without the draft `(P,)`.
        plain_first_seconds (`np.ndarray`): The part of it until the first token was there `(P,)`.
        plain_tokens (`np.ndarray`): Tokens written without the draft `(P,)`; the same as with it if greedy.
    """

    assisted_seconds: Array
    assisted_first_seconds: Array
    plain_seconds: Array
    plain_first_seconds: Array
    plain_tokens: Array


@dataclass(frozen=True, kw_only=True)
class AssistedMetrics(AcceptanceMetrics):
    """[`AcceptanceMetrics`] of real assisted generation, with its completions, its rounds and its speed.

    Args:
        completion_ids (`list[list[int]]`): Completion of each prompt.
        rounds (`list[list[Round]]`): Every target call of each prompt.
        timing (`GenerationTiming`, *optional*): Time it took; `None` if it was not measured.
    """

    completion_ids: list[list[int]]
    rounds: list[list[Round]]
    timing: GenerationTiming | None = None

    @property
    def speedup(self) -> Interval | None:
        """Tokens per second with the draft over those without; `None` if no speed was measured."""
        if self.timing is None:
            return None
        return bootstrap(
            lambda tokens, seconds, plain_tokens, plain_seconds: (tokens / seconds) / (plain_tokens / plain_seconds),
            self.tokens,
            self.timing.assisted_seconds,
            self.timing.plain_tokens,
            self.timing.plain_seconds,
        )

    @property
    def tokens_per_second(self) -> tuple[float, float] | None:
        """Tokens per second with the draft and without it; `None` if no speed was measured."""
        if self.timing is None:
            return None
        plain = self.timing.plain_tokens.sum() / self.timing.plain_seconds.sum()
        return float(self.tokens.sum() / self.timing.assisted_seconds.sum()), float(plain)

    def to_metrics(self, prefix: str = "eval", suffix: str = "") -> dict[str, float]:
        """As [`AcceptanceMetrics.to_metrics`], with tokens per second and the speed-up where they were measured."""
        metrics = super().to_metrics(prefix, suffix)
        if self.speedup is not None and self.tokens_per_second is not None:
            assisted, plain = self.tokens_per_second
            metrics[f"{prefix}_tokens_per_second_assisted{suffix}"] = assisted
            metrics[f"{prefix}_tokens_per_second_plain{suffix}"] = plain
            metrics[f"{prefix}_speedup{suffix}"] = self.speedup.value
        return metrics


def generate_assisted(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    num_assistant_tokens: int = 5,
    max_new_tokens: int,
    eos_token_id: int | list[int] | None = None,
    vocab_size: int | None = None,
    seed: int = 0,
    measure_speed: bool = False,
) -> AssistedMetrics:
    """Lets the target write with the draft's help, prompt by prompt, and records every round.

    Plain greedy or plain sampling: nothing of the generation configs that the models ship counts, except the target's
    EOS. Everything touched (generation configs, modes, the draft's `config.vocab_size`, the random state) is restored.

    Args:
        target (`PreTrainedModel` or `PeftModel`): The target.
        draft (`PreTrainedModel` or `PeftModel`): The draft.
        prompt_ids (`list[list[int]]`): Ids of each prompt.
        temperature (`float`, *optional*, defaults to `0.0`): Sampling temperature; 0.0 is greedy.
        top_k (`int`, *optional*, defaults to `0`), top_p (`float`, *optional*, defaults to `1.0`):
            Most likely ids that both models sample from, by number and by mass; 0 and 1.0 are all ids.
        num_assistant_tokens (`int`, *optional*, defaults to `5`): Tokens drafted in a round.
        max_new_tokens (`int`): Most tokens written to a prompt.
        eos_token_id (`int` or `list[int]`, *optional*): Defaults to that of the target's generation config.
        vocab_size (`int`, *optional*): Number of real ids; the rows that both heads have by default.
        seed (`int`, *optional*, defaults to `0`): Sampling seed.
        measure_speed (`bool`, *optional*, defaults to `False`):
            Whether to time each call, and plain generation for the same prompt right after it; both are warmed up once.
            The recorder's own cost counts as assisted time.

    Raises:
        `ValueError`: Before any generation, for an option out of its range, no prompts or an unusable one.
    """
    check_num_assistant_tokens(num_assistant_tokens)
    check_sampling(temperature)
    check_truncation(top_k, top_p)
    check_int("max_new_tokens", max_new_tokens)
    target, draft = find_causal_lm(target, "target"), find_causal_lm(draft, "draft")
    if target is draft:
        raise ValueError("`target` and `draft` are the same model object. Pass a copy to measure a model on itself.")
    vocab_size = resolve_vocab_size(vocab_size, draft, target)
    prompt_ids = [list(ids) for ids in prompt_ids]
    check_prompts(prompt_ids, vocab_size)
    if eos_token_id is None:
        eos_token_id = target.generation_config.eos_token_id

    with _neutral_pair(target, draft, temperature, num_assistant_tokens, max_new_tokens, eos_token_id) as options:
        options["logits_processor"] = _fit_vocabularies(target, draft, vocab_size)
        options["logits_processor"] += build_warpers(temperature, top_k, top_p)
        recorder, watch = _RoundRecorder(), _FirstTokenWatch()

        writer = cast("GenerativePreTrainedModel", target)

        def run_assisted(ids: torch.Tensor) -> torch.Tensor:
            recorder.start()
            hook = target.register_forward_pre_hook(recorder.record_call, with_kwargs=True)
            try:
                return cast("GenerativePreTrainedModel", target).generate(
                    ids, assistant_model=draft, streamer=recorder, **options
                )
            finally:
                hook.remove()

        def run_plain(ids: torch.Tensor) -> torch.Tensor:
            watch.start()
            return writer.generate(ids, streamer=watch, **options)

        if measure_speed:
            for run in (run_assisted, run_plain):
                _time_generation(run, prompt_ids[0], target, seed)
        completions, rounds, timings, plain = [], [], [], []
        for i, prompt in enumerate(prompt_ids):
            completion, pair = _time_generation(run_assisted, prompt, target, seed + i, recorder)
            completions.append(completion)
            rounds.append(recorder.rounds)
            timings.append(pair)
            if measure_speed:  # at once, so that a machine that changes its pace does so for both
                plain.append(_time_generation(run_plain, prompt, target, seed + i, watch))
        timing = None
        if measure_speed:
            seconds, plain_seconds = (np.array(pairs) for pairs in (timings, [pair for _, pair in plain]))  # (P, 2)
            timing = GenerationTiming(
                assisted_seconds=seconds[:, 0],
                assisted_first_seconds=seconds[:, 1],
                plain_seconds=plain_seconds[:, 0],
                plain_first_seconds=plain_seconds[:, 1],
                plain_tokens=np.array([len(completion) for completion, _ in plain]),
            )

    def count(value: Callable[[Round], int]) -> Array:
        return np.array([sum(map(value, prompt_rounds)) for prompt_rounds in rounds])

    return AssistedMetrics(
        tokens=count(lambda r: r.emitted),
        target_calls=count(lambda r: 1),
        accepted=count(lambda r: r.accepted),
        drafted=count(lambda r: r.drafted),
        drafting_rounds=count(lambda r: r.drafted > 0),
        accepted_by_position=np.stack(
            [count(partial(_has_accepted, k)) for k in range(1, num_assistant_tokens + 1)], axis=1
        ),
        temperature=float(temperature),
        num_assistant_tokens=num_assistant_tokens,
        draft_sampling="stochastic",
        method="assisted",
        completion_ids=completions,
        rounds=rounds,
        timing=timing,
    )


@contextmanager
def _neutral_pair(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    temperature: float,
    num_assistant_tokens: int,
    max_new_tokens: int,
    eos_token_id: int | list[int] | None,
) -> Iterator[Arguments]:
    """Both models set up for plain assisted generation; yields the options of `generate`, restores everything."""
    # `generate` fills what it is not told from `model.generation_config`, so that is replaced, not only overridden.
    # A temperature in the config would be applied to the draft twice (T squared), hence a logits processor; top_k is 50
    # unless told. A pad id other than EOS makes the draft mask that id wherever it occurs in the text.
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    first_eos = eos_token_id[0] if isinstance(eos_token_id, list) else eos_token_id
    shared: Arguments = {
        **(sampling if temperature > 0 else {"do_sample": False}),
        "eos_token_id": eos_token_id,
        "pad_token_id": first_eos,
        "use_cache": True,
    }
    draft_config, target_config = draft.config.get_text_config(), target.config.get_text_config()
    saved = (target.generation_config, draft.generation_config, draft_config.vocab_size)
    with evaluation_mode(target, draft):
        try:
            target.generation_config = GenerationConfig(**shared)
            # read from here and nowhere else; the default threshold 0.4 stops a draft when it is unsure
            draft.generation_config = GenerationConfig(
                **shared,
                num_assistant_tokens=num_assistant_tokens,
                num_assistant_tokens_schedule="constant",
                assistant_confidence_threshold=0.0,
            )
            # `generate` refuses a pair with differently padded heads; `_FitVocabulary` makes their scores equal
            draft_config.vocab_size = target_config.vocab_size
            yield {"generation_config": GenerationConfig(**shared, max_new_tokens=max_new_tokens)}
        finally:
            target.generation_config, draft.generation_config, draft_config.vocab_size = saved


def _fit_vocabularies(target: PreTrainedModel, draft: PreTrainedModel, vocab_size: int) -> LogitsProcessorList:
    target_rows, draft_rows = (count_rows(model.get_output_embeddings()) for model in (target, draft))
    is_needed = not vocab_size == target_rows == draft_rows
    return LogitsProcessorList([_FitVocabulary(vocab_size, target_rows)] if is_needed else [])


class _FitVocabulary(LogitsProcessor):
    """Scores of either model in the target's number of columns, -inf where there is no real id."""

    def __init__(self, vocab_size: int, target_rows: int):
        self.vocab_size = vocab_size
        self.target_rows = target_rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        fitted = scores.new_full((len(scores), self.target_rows), -torch.inf)
        fitted[:, : self.vocab_size] = scores[:, : self.vocab_size]
        return fitted  # (B, target_rows)


class _FirstTokenWatch(BaseStreamer):
    """Notes when the first new tokens were there; `generate` hands over the prompt first."""

    def start(self) -> None:
        self.first_at: float | None = None
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self._has_prompt and self.first_at is None:
            self.first_at = time.perf_counter()
        self._has_prompt = True

    def end(self) -> None:
        pass


class _RoundRecorder(_FirstTokenWatch):
    """Pairs what goes into each target call (drafted tokens) with what comes out of it (emitted tokens)."""

    def start(self) -> None:
        super().start()
        self.rounds: list[Round] = []
        self._prompt_length: int | None = None
        self._candidates: list[int] = []

    def record_call(self, _module: torch.nn.Module, _args: tuple[object, ...], kwargs: Arguments) -> None:
        ids = kwargs["input_ids"][0].tolist()
        # The first call reads the prompt as well, later ones the last emitted token.
        self._candidates = ids[1:] if self.rounds else ids[self._prompt_length :]

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        tokens = value.flatten().tolist()
        if self._prompt_length is None:
            self._prompt_length = len(tokens)
        else:
            self.rounds.append(_build_round(self._candidates, tokens))

    def end(self) -> None:
        """Takes the tokens that were drafted for positions after the end of the text out of the count."""
        self.rounds = leave_out_drafts_after_end(self.rounds)


def _has_accepted(num_tokens: int, one: Round) -> int:
    return one.accepted >= num_tokens


def _build_round(candidates: list[int], emitted: list[int]) -> Round:
    # transformers counts `emitted - 1`, which misses an accepted EOS (it ends the text without a bonus token). The
    # common prefix counts it, and is exact: a rejected token has p < q, so its correction is never the same token.
    matches = [drafted == token for drafted, token in zip(candidates, emitted, strict=False)]
    accepted = matches.index(False) if False in matches else len(matches)
    return Round(len(candidates), accepted, len(emitted))


def _time_generation(
    generate: Callable[[torch.Tensor], torch.Tensor],
    prompt: Sequence[int],
    model: PreTrainedModel,
    seed: int,
    watch: _FirstTokenWatch | None = None,
) -> tuple[list[int], tuple[float, float]]:
    """The completion, and seconds in all and until the watch saw a token; the global random state stays as it was."""
    device = find_input_device(model)
    ids = torch.tensor([list(prompt)], device=device)  # (1, L)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        synchronize(device)
        start = time.perf_counter()
        output = generate(ids)
        synchronize(device)
        elapsed = time.perf_counter() - start
    first = float("nan") if watch is None or watch.first_at is None else watch.first_at - start
    return output[0, len(prompt) :].tolist(), (elapsed, first)
