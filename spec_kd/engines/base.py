"""Who runs the target: one small protocol, behind which stand transformers, vLLM and OpenAI-compatible servers."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from spec_kd.losses import SignalSpec, SparseDistribution
from spec_kd.sampling.options import SamplingOptions


class UnsupportedByEngineError(ValueError):
    """An engine was asked for something it cannot give; the message names what can."""


class UnusablePromptError(ValueError):
    """A prompt that an engine cannot take, while others of the same job may do.

    Args:
        message (`str`): Which prompt, why, and what to do.
        fault (`str`): In a word, for counting: `"context_full"`, `"not_text"` or `"refused"`.
    """

    def __init__(self, message: str, fault: str):
        super().__init__(message)
        self.fault = fault


class MissingCompletionsError(UnusablePromptError):
    """Prompts of a batch turned out to be unusable when they were asked; the others have their answers.

    Args:
        message (`str`): Which prompts, why, and what to do.
        reasons (`Mapping[int, str]`): Why, by the index in the batch.
        completions (`Sequence[Completion | None]`): Of the batch; `None` for these and for unidentified ones.
        unidentified (`Sequence[list[str]]`): As the `names` of `UnidentifiedTokensError`.
    """

    def __init__(
        self,
        message: str,
        reasons: Mapping[int, str],
        completions: Sequence["Completion | None"],
        unidentified: Sequence[list[str]],
    ):
        super().__init__(message, fault="refused")
        self.reasons = dict(reasons)
        self.completions = list(completions)
        self.unidentified = list(unidentified)


class PromptBatch(list[list[int]]):
    """Prompts of a job, as ids, that know their places in it and whom to tell of what is done.

    An engine that does not look at either treats it as the list that it is.

    Args:
        prompts (`Iterable[list[int]]`): The prompts.
        places (`Sequence[int]`): Of each in the dataset, for errors and warnings.
        tell (`Callable[[int, int], None]`, *optional*):
            Called with tokens that were written and completions that are done by them, 0 or more.
    """

    def __init__(
        self,
        prompts: Iterable[list[int]],
        places: Sequence[int],
        tell: Callable[[int, int], None] | None = None,
    ):
        super().__init__(prompts)
        self.places = places
        self.tell = tell


def pick_prompts(prompts: Sequence[list[int]], indices: Sequence[int]) -> list[list[int]]:
    """Some of the prompts of a batch, with what the batch knows of them."""
    picked = [prompts[index] for index in indices]
    if not isinstance(prompts, PromptBatch):
        return picked
    return PromptBatch(picked, [prompts.places[index] for index in indices], prompts.tell)


def name_prompt(prompts: Sequence[list[int]], index: int) -> str:
    """A prompt by its place in the dataset, where that is known: `"Row 7"`, else `"Prompt 7"` of the batch."""
    return f"Row {prompts.places[index]}" if isinstance(prompts, PromptBatch) else f"Prompt {index}"


def tell_of(prompts: Sequence[list[int]], num_tokens: int, num_rows: int = 1) -> None:
    """Tells whoever waits for these prompts of tokens and of completions that are done."""
    if isinstance(prompts, PromptBatch) and prompts.tell is not None:
        prompts.tell(num_tokens, num_rows)


@dataclass(frozen=True)
class Completion:
    """One answer of the target.

    Args:
        ids (`list[int]`): What it wrote, the EOS included if it wrote one, nothing behind it.
        finish_reason (`str`): `"stop"` or `"length"`.
        token_logprobs (`list[float]`, *optional*): log p of each id; `None` where the engine cannot say.
        sparse (`SparseDistribution`, *optional*): What was kept of p, if the signal keeps ids.
    """

    ids: list[int]
    finish_reason: str
    token_logprobs: list[float] | None = None
    sparse: SparseDistribution | None = None


class Engine(Protocol):
    """Runs the target on token ids. The chat template is rendered by the caller: both sides mean the same tokens.

    Attributes:
        name (`str`): As in a dataset's provenance.
        is_reproducible (`bool`): Whether the same call gives the same answer, also when sampling.
        logprobs_mode (`str`):
            `"processed"`: log-probabilities of the distribution that was sampled from, temperature included; `"raw"`:
            of the model before any temperature (what most servers return). Equal at temperature 1; for greedy text,
            which has no distribution of its own, engines return raw ones and say so.
    """

    name: str
    is_reproducible: bool
    logprobs_mode: str

    def check(self, prompts: Sequence[list[int]], options: SamplingOptions | None, signal: SignalSpec | None) -> None:
        """Raises before the expensive work: prompts that do not fit, options or a signal that cannot be met.

        Args:
            prompts (`Sequence[list[int]]`): Ids of each; rows with their completions, if they are only scored.
            options (`SamplingOptions`, *optional*): `None` if nothing is to be written.
            signal (`SignalSpec`, *optional*): `None` if nothing is to be kept.

        Raises:
            UnusablePromptError: For a prompt that leaves no room for an answer, or that the engine cannot be sent.
            ValueError: For other prompts, or options.
            UnsupportedByEngineError: For a signal.
        """
        ...

    def describe(self) -> dict[str, object]:
        """What answers depend on besides the options, as JSON values: model, revision, versions. No secrets."""
        ...

    def generate(
        self,
        prompts: Sequence[list[int]],
        options: SamplingOptions,
        signal: SignalSpec | None = None,
        seed: str = "",
    ) -> list[Completion]:
        """Answers prompts, given as ids, in their order.

        Args:
            prompts (`Sequence[list[int]]`): A batch.
            options (`SamplingOptions`): For all of them.
            signal (`SignalSpec`, *optional*): What to keep of p; `None` keeps nothing.
            seed (`str`): Distinguishes this batch from the job's others.

        Raises:
            UnsupportedByEngineError: Before any generation, for a signal the engine cannot give.
            UnidentifiedTokensError: After the batch, for completions of which the engine does not know the exact ids.
            MissingCompletionsError: After the batch, for prompts that turned out to be unusable.
        """
        ...

    def score(
        self, prompts: Sequence[list[int]], completions: Sequence[list[int]], signal: SignalSpec, seed: str = ""
    ) -> list[Completion]:
        """The log-probabilities (and kept ids) of completions that exist already, raw, in their order.

        Raises:
            UnsupportedByEngineError: If the engine cannot score given text, or not by this method.
        """
        ...


def check_untruncated(options: SamplingOptions, engine: str) -> None:
    """Raises `UnsupportedByEngineError` for top-k and top-p, which only the transformers engine has."""
    if options.is_truncated:
        raise UnsupportedByEngineError(
            f"The engine {engine!r} samples from the plain softmax here, not with `top_k={options.top_k}` and "
            f"`top_p={options.top_p}`. Leave them out, or use the transformers engine."
        )


def derive_seed(text: str, bits: int) -> int:
    """The first `bits` bits of the text's SHA-256: the same on every machine, whatever else was drawn before."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big") >> (256 - bits)


def join_texts(prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> list[list[int]]:
    """Each prompt with its completion, as `score` needs them.

    Raises:
        ValueError: If there is not one completion for each prompt, or one of either is empty.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"Got {len(prompts)} prompts and {len(completions)} completions: give one for each.")
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if not len(prompt) or not len(completion):
            raise ValueError(f"Row {index} has an empty prompt or completion, so nothing to score: leave it out.")
    return [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
