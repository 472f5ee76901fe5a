"""What every engine has: an engine runs the target, by transformers, vLLM or a server.

A new engine is a subclass of [`Engine`].
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from spec_kd.losses import SignalSpec, SparseDistribution
from spec_kd.progress import RowProgress
from spec_kd.sampling.options import SamplingOptions
from spec_kd.sampling.prompts import UnusablePromptError

if TYPE_CHECKING:
    from spec_kd.vocabulary import ProcessingClass

Task = TypeVar("Task")
Result = TypeVar("Result")


class UnsupportedByEngineError(ValueError):
    """An engine was asked for something that it cannot give. The message names what can."""


class MissingCompletionsError(UnusablePromptError):
    """An engine could not use some prompts of a batch. The others have their completions.

    Args:
        message (`str`): Which prompts, why, and what to do.
        reasons (`Mapping[int, str]`): Reason for each unusable prompt, by its index in the batch.
        completions (`Sequence[Completion | None]`):
            Completions of the batch; `None` for unusable prompts, and for completions with unidentified tokens.
        unidentified (`Sequence[list[str]]`): Unidentified tokens of each completion, as the `names` of
            [`UnidentifiedTokensError`].
    """

    def __init__(
        self,
        message: str,
        reasons: Mapping[int, str],
        completions: Sequence["Completion | None"],
        unidentified: Sequence[list[str]],
    ):
        super().__init__(message, fault="refused")
        self.reasons, self.completions, self.unidentified = dict(reasons), list(completions), list(unidentified)

    def __reduce__(self) -> tuple[object, ...]:
        return MissingCompletionsError, (self.args[0], self.reasons, self.completions, self.unidentified)


@dataclass(frozen=True)
class Completion:
    """A completion that the target wrote.

    Args:
        ids (`list[int]`): Ids after the prompt, up to and including the EOS if there is one.
        finish_reason (`str`): `"stop"` at an EOS, else `"length"`.
        token_logprobs (`list[float]`, *optional*): log p of each id; `None` if no signal was asked for.
        sparse (`SparseDistribution`, *optional*): More of p at each token; `None` for the signal `"token_only"`.
    """

    ids: list[int]
    finish_reason: str
    token_logprobs: list[float] | None = None
    sparse: SparseDistribution | None = None


class Engine(ABC):
    """Runs the target on token ids. The caller renders the chat template, so both sides mean the same tokens.

    A subclass needs a `name`, `describe` and `generate`. The defaults of the rest are those of an engine that only
    writes: it keeps no signal, scores nothing, and gets whole shards of prompts, which it batches by itself.

    Attributes:
        name (`str`): Name of the engine, as stored with the responses.
        target_name (`str`, *optional*, defaults to `None`): Path or Hub id of the target.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*, defaults to `None`):
            Tokenizer of the target. Without it, callers must pass one.
        default_batch_size (`int`, *optional*, defaults to `None`):
            Number of prompts in a call of `generate` unless the user chooses one; `None` for a whole shard.
        is_reproducible (`bool`, *optional*, defaults to `False`):
            Whether the same call gives the same completions, also when sampling. If not, two processes never write the
            same shard.
        logprobs_mode (`str`, *optional*, defaults to `"raw"`):
            `"processed"` if log-probabilities are those of the distribution that was sampled from, with temperature;
            `"raw"` if they are the model's own, before any temperature, as of most servers. The two are equal at
            temperature 1. Greedy completions always have raw ones.
    """

    name: str
    target_name: str | None = None
    processing_class: "ProcessingClass | None" = None
    default_batch_size: int | None = None
    is_reproducible: bool = False
    logprobs_mode: str = "raw"

    @abstractmethod
    def describe(self) -> dict[str, object]:
        """What completions depend on besides the options, as JSON values: model, revision, versions. No secrets."""

    @abstractmethod
    def generate(
        self,
        prompts: Sequence[list[int]],
        options: SamplingOptions,
        signal: SignalSpec | None = None,
        seed: str = "",
    ) -> list[Completion]:
        """Writes a completion to each prompt.

        Args:
            prompts (`Sequence[list[int]]`): Ids of each prompt; a [`PromptBatch`] wants to be told of progress.
            options (`SamplingOptions`): Options for all prompts.
            signal (`SignalSpec`, *optional*): What to keep of p; `None` keeps nothing.
            seed (`str`, *optional*, defaults to `""`): Tells this batch from the others of the job.

        Returns:
            `list[Completion]` in the order of the prompts.

        Raises:
            UnsupportedByEngineError: The engine cannot give this signal. Raised before any generation.
            UnidentifiedTokensError: The exact ids of some completions are unknown. Raised after the batch.
            MissingCompletionsError: Some prompts turned out to be unusable. Raised after the batch.
        """

    def check(self, prompts: Sequence[list[int]], options: SamplingOptions | None, signal: SignalSpec | None) -> None:
        """Checks a job before the expensive work.

        Args:
            prompts (`Sequence[list[int]]`): Ids of each prompt; of prompt and completion if they are only scored.
            options (`SamplingOptions`, *optional*): `None` if nothing is written.
            signal (`SignalSpec`, *optional*): `None` if nothing is kept.

        Raises:
            UnusablePromptError: A prompt leaves no room for a completion, or cannot be sent.
            UnsupportedByEngineError: The engine cannot give the signal, or not sample with `top_k` or `top_p`.
            ValueError: Any other fault of prompts or options.
        """
        check_untruncated(options, self.name)
        if signal is not None:
            raise UnsupportedByEngineError(
                f"The engine {self.name!r} gives no log-probabilities, so no {signal.method!r}. Use another engine, or "
                "leave the `teacher_signal` out."
            )

    def score(
        self, prompts: Sequence[list[int]], completions: Sequence[list[int]], signal: SignalSpec, seed: str = ""
    ) -> list[Completion]:
        """Reads completions that exist already.

        Args:
            prompts (`Sequence[list[int]]`): Ids of each prompt, at least one.
            completions (`Sequence[list[int]]`): Ids of each completion, at least one.
            signal (`SignalSpec`): What to keep of p, which is the model's own, before any temperature.
            seed (`str`, *optional*, defaults to `""`): Tells this batch from the others of the job.

        Returns:
            `list[Completion]` with the given ids, in their order. `finish_reason` is `"stop"` if the last id is an EOS.

        Raises:
            UnsupportedByEngineError: The engine cannot score, or not by this method.
        """
        raise UnsupportedByEngineError(f"The engine {self.name!r} cannot score completions. Use another engine.")

    def run_tasks(
        self, function: Callable[["Engine", Task, RowProgress], Result], tasks: Iterator[Task], progress: RowProgress
    ) -> Iterator[tuple[Task, Result]]:
        """Runs a function on each task with this engine, one after the other; [`RayEngine`] shares them out.

        Args:
            function (`Callable`): From an engine, a task and the bar to a result. It can be pickled, and so can tasks
                and results.
            tasks (`Iterator`): Tasks, each read when its turn comes.
            progress (`RowProgress`): Bar that the function tells of tokens and rows.

        Yields:
            Every task with its result, in any order.
        """
        for task in tasks:
            yield task, function(self, task, progress)


def check_untruncated(options: SamplingOptions | None, engine: str) -> None:
    """Raises `UnsupportedByEngineError` for sampling with top-k or top-p, which only the transformers engine has."""
    if options is not None and options.is_truncated:
        raise UnsupportedByEngineError(
            f"The engine {engine!r} samples from the whole softmax, not with `top_k={options.top_k}` and "
            f"`top_p={options.top_p}`. Leave them out, or use the transformers engine."
        )


def count_likely_ids(signal: SignalSpec | None, engine: str) -> int:
    """Number of most likely ids per token that a signal needs from an engine that returns these, but draws none.

    Args:
        signal (`SignalSpec`, *optional*): What to keep; `None` needs no ids.
        engine (`str`): Name of the engine in the error.

    Raises:
        UnsupportedByEngineError: The signal needs draws.
        ValueError: The method is unknown, or its `top_k` is missing.
    """
    if signal is None:
        return 0
    if (top_k := signal.sparse_method.count_likely_ids(signal)) is None:
        raise UnsupportedByEngineError(
            f"The engine {engine!r} returns the most likely ids of the target, not draws from it, so it cannot give "
            f"{signal.method!r}. Ask for 'top_k_tail' or 'token_only', or use the transformers engine."
        )
    return top_k


def join_rows(prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> list[list[int]]:
    """Joins each prompt with its completion, as `Engine.score` reads them.

    Raises:
        ValueError: The numbers of prompts and completions differ, or one of them is empty.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"There are {len(prompts)} prompts and {len(completions)} completions. Give one for each.")
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if not len(prompt) or not len(completion):
            raise ValueError(f"Row {index} has an empty prompt or completion, so nothing can be scored. Remove it.")
    return [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
