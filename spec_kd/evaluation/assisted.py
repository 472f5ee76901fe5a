"""Real assisted generation, measured: `target.generate(assistant_model=draft)` with every round recorded."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation import BaseStreamer

from spec_kd.acceptance import check_num_assistant_tokens
from spec_kd.decoding import Round
from spec_kd.decoding.speculative import leave_out_drafts_after_end
from spec_kd.evaluation.cost import synchronize
from spec_kd.evaluation.metrics import AcceptanceMetrics, Interval, bootstrap
from spec_kd.evaluation.text_kinds import find_kinds
from spec_kd.heads import count_rows, evaluation_mode, find_input_device
from spec_kd.open_types import Argument, Arguments, Array
from spec_kd.options import resolve_options
from spec_kd.sampling.generation import build_warpers
from spec_kd.sampling.options import SamplingOptions
from spec_kd.sampling.prompts import check_prompts, find_causal_lm, resolve_vocab_size

if TYPE_CHECKING:
    from transformers._typing import GenerativePreTrainedModel


@dataclass(frozen=True, kw_only=True)
class GenerationTiming:
    """Wall-clock seconds of P completions, with the draft and without it.

    Args:
        assisted_seconds (`np.ndarray`): Seconds with the draft `(P,)`.
        assisted_first_seconds (`np.ndarray`): Seconds with the draft until the first round was over `(P,)`.
        plain_seconds (`np.ndarray`): Seconds of the target without the draft `(P,)`.
        plain_first_seconds (`np.ndarray`): Seconds without the draft until the first token was written `(P,)`.
        plain_tokens (`np.ndarray`):
            Number of tokens written without the draft `(P,)`; for greedy decoding the same as with the draft.
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
        rounds (`list[list[Round]]`): Every pass of the target for each prompt.
        timing (`GenerationTiming`, *optional*): Measured times; `None` if the speed was not measured.
    """

    completion_ids: list[list[int]]
    rounds: list[list[Round]]
    timing: GenerationTiming | None = None

    @property
    def speedup(self) -> Interval | None:
        """Tokens per second with the draft over those without; `None` if the speed was not measured."""
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
        """Tokens per second with the draft and without it; `None` if the speed was not measured."""
        if self.timing is None:
            return None
        plain = self.timing.plain_tokens.sum() / self.timing.plain_seconds.sum()
        return float(self.tokens.sum() / self.timing.assisted_seconds.sum()), float(plain)

    def to_metrics(self, prefix: str = "eval", suffix: str = "") -> dict[str, float]:
        """As [`AcceptanceMetrics.to_metrics`], with tokens per second and the speed-up if they were measured."""
        metrics = super().to_metrics(prefix, suffix)
        if self.speedup is not None and self.tokens_per_second is not None:
            names = (f"{prefix}_tokens_per_second_assisted{suffix}", f"{prefix}_tokens_per_second_plain{suffix}")
            metrics |= dict(zip(names, self.tokens_per_second, strict=True))
            metrics[f"{prefix}_speedup{suffix}"] = self.speedup.value
        return metrics


def generate_assisted(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    options: SamplingOptions | None = None,
    *,
    num_assistant_tokens: int = 5,
    eos_token_id: int | list[int] | None = None,
    vocab_size: int | None = None,
    measure_speed: bool = False,
    **given: Argument,
) -> AssistedMetrics:
    """Lets the target write with the draft's help, one prompt after the other, and records every round.

    The generation configs that the models ship do not count, except for the target's EOS: decoding is greedy, or
    samples as `options` say. Generation configs, train and eval modes, the draft's `config.vocab_size` and the global
    random state are restored.

    Args:
        target (`PreTrainedModel` or `PeftModel`): The target.
        draft (`PreTrainedModel` or `PeftModel`): The draft.
        prompt_ids (`Sequence[Sequence[int]]`): Ids of each prompt.
        options (`SamplingOptions`, *optional*):
            Sampling of both models. By default greedy decoding of at most 512 tokens.
        num_assistant_tokens (`int`, *optional*, defaults to `5`): Number of tokens drafted in a round (gamma).
        eos_token_id (`int` or `list[int]`, *optional*):
            Ids that end a completion; those of the target's generation config by default.
        vocab_size (`int`, *optional*): Number of real ids; the rows that both heads have by default.
        measure_speed (`bool`, *optional*, defaults to `False`):
            Whether to time each completion, and plain generation for the same prompt right after it. Both are warmed up
            once. The time that recording the rounds takes is part of the assisted time.
        given: Fields of [`SamplingOptions`] as keywords, which replace those of `options`.

    Raises:
        ValueError: If an option is out of its range, there are no prompts, or a prompt is unusable. Raised before any
            generation.
    """
    options = resolve_options(SamplingOptions, options or SamplingOptions(temperature=0.0), given)
    check_num_assistant_tokens(num_assistant_tokens)
    target, draft = find_causal_lm(target, "target"), find_causal_lm(draft, "draft")
    if target is draft:
        raise ValueError("`target` and `draft` are the same model object. Pass a copy to measure a model on itself.")
    vocab_size = resolve_vocab_size(vocab_size, draft, target)
    check_prompts(prompt_ids, vocab_size)
    if eos_token_id is None:
        eos_token_id = target.generation_config.eos_token_id

    runs, plain_runs = [], []
    with _neutral_pair(target, draft, options, num_assistant_tokens, eos_token_id) as config:
        processors = LogitsProcessorList()
        rows = [count_rows(model.get_output_embeddings()) for model in (target, draft)]
        if {vocab_size} != set(rows):
            processors.append(_FitVocabulary(vocab_size, rows[0]))
        shared: Arguments = {
            "generation_config": config,
            "logits_processor": processors + build_warpers(options.temperature, options.top_k, options.top_p),
        }
        if measure_speed:  # warms both up
            RecordedRun(target, prompt_ids[0], options.seed, assistant_model=draft, **shared)
            _Run(target, prompt_ids[0], options.seed, **shared)
        for seed, prompt in enumerate(prompt_ids, options.seed):
            runs.append(RecordedRun(target, prompt, seed, assistant_model=draft, **shared))
            if measure_speed:  # at once, so that a machine that changes its pace does so for both
                plain_runs.append(_Run(target, prompt, seed, **shared))

    def count(value: Callable[[Round], int]) -> Array:
        return np.array([sum(map(value, run.rounds)) for run in runs])

    positions = range(1, num_assistant_tokens + 1)
    return AssistedMetrics(
        tokens=count(lambda r: r.emitted),
        target_calls=count(lambda r: 1),
        accepted=count(lambda r: r.accepted),
        drafted=count(lambda r: r.drafted),
        drafting_rounds=count(lambda r: r.drafted > 0),
        accepted_by_position=np.array([[sum(r.accepted >= k for r in run.rounds) for k in positions] for run in runs]),
        temperature=options.temperature,
        num_assistant_tokens=num_assistant_tokens,
        draft_sampling="stochastic",
        method="assisted",
        kinds=find_kinds(prompt_ids, [run.completion for run in runs]),
        completion_ids=[run.completion for run in runs],
        rounds=[run.rounds for run in runs],
        timing=GenerationTiming(
            assisted_seconds=np.array([run.seconds for run in runs]),
            assisted_first_seconds=np.array([run.first_seconds for run in runs]),
            plain_seconds=np.array([run.seconds for run in plain_runs]),
            plain_first_seconds=np.array([run.first_seconds for run in plain_runs]),
            plain_tokens=np.array([len(run.completion) for run in plain_runs]),
        )
        if measure_speed
        else None,
    )


@contextmanager
def _neutral_pair(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    options: SamplingOptions,
    num_assistant_tokens: int,
    eos_token_id: int | list[int] | None,
) -> Iterator[GenerationConfig]:
    """Sets both models up for plain assisted generation, yields the config for `generate`, and restores everything."""
    # `generate` fills what it is not told from `model.generation_config`, so that is replaced, not only overridden.
    # A temperature in the config would be applied to the draft twice (T squared), hence a logits processor; top_k is 50
    # unless told. A pad id other than EOS makes the draft mask that id wherever it occurs in the text.
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    shared: Arguments = {
        **(sampling if options.temperature > 0 else {"do_sample": False}),
        "eos_token_id": eos_token_id,
        "pad_token_id": eos_token_id[0] if isinstance(eos_token_id, list) else eos_token_id,
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
            yield GenerationConfig(**shared, max_new_tokens=options.max_new_tokens)
        finally:
            target.generation_config, draft.generation_config, draft_config.vocab_size = saved


class _FitVocabulary(LogitsProcessor):
    """Scores of either model in the target's number of columns, -inf where there is no real id."""

    def __init__(self, vocab_size: int, target_rows: int):
        self.vocab_size, self.target_rows = vocab_size, target_rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        fitted = scores.new_full((len(scores), self.target_rows), -torch.inf)
        fitted[:, : self.vocab_size] = scores[:, : self.vocab_size]
        return fitted  # (B, target_rows)


class _Run(BaseStreamer):
    """One call of `generate`: its completion, its seconds, and those until its first new tokens."""

    first_at: float | None = None
    _has_prompt = False

    def __init__(self, target: PreTrainedModel, prompt: Sequence[int], seed: int, **options: Argument):
        device = find_input_device(target)
        ids = torch.tensor([list(prompt)], device=device)  # (1, L)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            synchronize(device)
            start = time.perf_counter()
            output = cast("GenerativePreTrainedModel", target).generate(ids, streamer=self, **options)
            synchronize(device)
            self.seconds = time.perf_counter() - start
        self.first_seconds = cast(float, self.first_at) - start
        self.completion: list[int] = output[0, len(prompt) :].tolist()

    def put(self, value: torch.Tensor) -> None:
        if self._has_prompt and self.first_at is None:
            self.first_at = time.perf_counter()
        self._has_prompt = True  # `generate` hands over the prompt first

    def end(self) -> None:
        pass


class RecordedRun(_Run):
    """Pairs what goes into each pass of the target (drafted tokens) with what comes out of it (emitted tokens)."""

    def __init__(self, target: PreTrainedModel, prompt: Sequence[int], seed: int, **options: Argument):
        self.rounds: list[Round] = []
        self._prompt_length = len(prompt)
        self._candidates: list[int] = []
        with target.register_forward_pre_hook(self._record_call, with_kwargs=True):
            super().__init__(target, prompt, seed, **options)
        self.rounds = leave_out_drafts_after_end(self.rounds)

    def _record_call(self, _module: torch.nn.Module, _args: tuple[object, ...], kwargs: Arguments) -> None:
        # The first call reads the prompt as well, later ones the last emitted token.
        self._candidates = kwargs["input_ids"][0, 1 if self.rounds else self._prompt_length :].tolist()

    def put(self, value: torch.Tensor) -> None:
        """Pairs new tokens with the pass that wrote them."""
        super().put(value)
        if self.first_at is not None:
            self.rounds.append(_build_round(self._candidates, value.flatten().tolist()))


def _build_round(candidates: list[int], emitted: list[int]) -> Round:
    # transformers counts `emitted - 1`, which misses an accepted EOS (it ends the text without a bonus token). The
    # common prefix counts it, and is exact: a rejected token has p < q, so its correction is never the same token.
    matches = [drafted == token for drafted, token in zip(candidates, emitted, strict=False)]
    accepted = matches.index(False) if False in matches else len(matches)
    return Round(len(candidates), accepted, len(emitted))
