"""Logits processors for `generate`: which ids may be written, the distribution that is sampled from, and the draw."""

from collections.abc import Collection, Sequence

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from spec_kd.open_types import Argument
from spec_kd.sampling.drawing import draw_ids
from spec_kd.sampling.prompt_batch import report_progress

NO_IDS: Argument = None  # previous tokens for processors that do not read them


def build_warpers(temperature: float, top_k: int = 0, top_p: float = 1.0) -> LogitsProcessorList:
    """The processors that turn logits `(N, V)` into those that are sampled from, in the order of transformers.

    None of them reads the previous tokens (pass `NO_IDS`), so one pass can process a whole completion.
    Repetition penalties do read them, and are left out.

    Args:
        temperature (`float`): Temperature of the softmax; 0.0 is greedy and gives an empty list.
        top_k (`int`, *optional*, defaults to `0`): Number of most likely ids to sample from; 0 samples from all.
        top_p (`float`, *optional*, defaults to `1.0`): Probability mass of the most likely ids to sample from.
    """
    warpers = LogitsProcessorList()
    if temperature == 0:
        return warpers
    if temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k > 0:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    return warpers


class RealIdsOnly(LogitsProcessor):
    """Rules out the padded rows of an output head: no tokenizer knows their ids.

    Args:
        vocab_size (`int`): Number of ids of the tokenizer.
    """

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores `(B, V)` with -inf at the padded rows, in place."""
        scores[:, self.vocab_size :] = -torch.inf
        return scores


class DrawnToken(LogitsProcessor):
    """Draws an id from the softmax of each row and rules out all others, so that a greedy `generate` samples.

    `generate` itself draws a number for every id of the vocabulary, which on a CPU takes as long as a small model. This
    must be the last processor.

    Args:
        generator (`torch.Generator`): Generator on the device of the scores.
    """

    def __init__(self, generator: torch.Generator):
        self._generator = generator

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores `(B, V)`: 0 at the drawn id and -inf elsewhere."""
        drawn = draw_ids(scores.softmax(dim=-1), self._generator)  # (B,)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn[:, None], 0.0)  # (B, V)


class ProgressWatch(LogitsProcessor):
    """Reports tokens and completions while they are written; scores stay as they are.

    Args:
        prompts (`Sequence[list[int]]`): The batch whose completions are written.
        eos_ids (`Collection[int]`): Ids that end a completion.
    """

    def __init__(self, prompts: Sequence[list[int]], eos_ids: Collection[int]):
        self._prompts, self._eos_ids = prompts, set(eos_ids)
        self._is_open = [True] * len(prompts)
        self._is_first = True

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores `(B, V)`, unchanged; `input_ids` `(B, T)` tell the tokens of the step before."""
        if not self._is_first:
            self.note(input_ids[:, -1].tolist())
        self._is_first = False
        return scores

    def note(self, written: list[int], is_last: bool = False) -> None:
        """Counts the newest token of each row, unless the row ended before it.

        Args:
            written (`list[int]`): Newest id of each row.
            is_last (`bool`, *optional*, defaults to `False`): Whether generation ends after this token.
        """
        num_open = sum(self._is_open)
        self._is_open = [
            is_open and not is_last and id not in self._eos_ids
            for is_open, id in zip(self._is_open, written, strict=True)
        ]
        report_progress(self._prompts, num_open, num_open - sum(self._is_open))
