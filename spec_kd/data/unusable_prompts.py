"""Prompts that the target cannot take: they stop a run once the others are completed, or are left out."""

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import accelerate

from spec_kd.engines.base import Engine
from spec_kd.losses import SignalSpec
from spec_kd.sampling.options import SamplingOptions
from spec_kd.sampling.prompt_batch import PromptBatch, UnusablePromptError

NUM_LISTED = 20
NUM_EXPLAINED = 3

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Unusable:
    """Stands for a completion that does not exist, because the target cannot take the prompt."""

    reason: str


def find_unusable(
    engine: Engine,
    prompts: Sequence[list[int]],
    options: SamplingOptions | None,
    signal: SignalSpec | None,
    on_unusable_prompt: str,
) -> dict[int, str]:
    """Finds the prompts that an engine knows it cannot take, before it runs, with the reasons.

    Raises:
        `UnusablePromptError`: With `"raise"`, if there are any.
        `ValueError`: For other faults, as `Engine.check`.
    """
    try:
        engine.check(prompts, options, signal)
    except UnusablePromptError as error:
        if on_unusable_prompt == "raise":
            raise type(error)(f'{error} `on_unusable_prompt="skip"` leaves such rows out.', error.fault) from error
    else:
        return {}
    unusable: dict[int, str] = {}
    _collect_unusable(engine, prompts, range(len(prompts)), options, signal, unusable)
    return unusable


def _collect_unusable(
    engine: Engine,
    prompts: Sequence[list[int]],
    rows: range,
    options: SamplingOptions | None,
    signal: SignalSpec | None,
    found: dict[int, str],
) -> None:
    """Searches by halves: a check may cost as much for one prompt as for many."""
    try:
        engine.check(PromptBatch([prompts[row] for row in rows], rows), options, signal)
    except UnusablePromptError as error:
        if len(rows) == 1:
            found[rows[0]] = str(error)
            return
        middle = len(rows) // 2
        for half in (rows[:middle], rows[middle:]):
            _collect_unusable(engine, prompts, half, options, signal, found)


def describe_unusable(unusable: Mapping[int, str], num_rows: int) -> str:
    """Describes how many rows cannot be used, which and why.

    Args:
        unusable (`Mapping[int, str]`): Reasons by row, at least one.
        num_rows (`int`): Number of rows of the dataset.
    """
    reasons = "; ".join(f"row {row}: {unusable[row]}" for row in itertools.islice(unusable, NUM_EXPLAINED))
    rows = list(itertools.islice(unusable, NUM_EXPLAINED, NUM_LISTED))
    more = f"; also rows {', '.join(map(str, rows))}" if rows else ""
    rest = f" and {len(unusable) - NUM_LISTED} more" if len(unusable) > NUM_LISTED else ""
    return f"{len(unusable)} of {num_rows} prompts cannot be used by the target ({reasons}{more}{rest})"


def raise_unusable(unusable: Mapping[int, str], num_rows: int, output_dir: object) -> None:
    """Raises `UnusablePromptError` if there are such rows; the message says where the other completions are."""
    if unusable:
        kept = "Nothing is kept" if output_dir is None else f"The other completions are kept in `{output_dir}`"
        raise UnusablePromptError(
            f"{describe_unusable(unusable, num_rows)}. {kept}. Remove these rows, raise the context of the target, or "
            'leave them out with `on_unusable_prompt="skip"`.',
            fault="refused",
        )


def report_skipped(unusable: Mapping[int, str], num_rows: int) -> None:
    """Logs one warning about the rows that are left out.

    Raises:
        `UnusablePromptError`: No row is left.
    """
    if unusable and len(unusable) == num_rows:
        raise UnusablePromptError(f"{describe_unusable(unusable, num_rows)}. Nothing is left.", fault="refused")
    if unusable and accelerate.PartialState().is_main_process:
        logger.warning("%s. They are left out.", describe_unusable(unusable, num_rows))
