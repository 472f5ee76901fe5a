"""Answers of which the exact ids are not known: a reason to stop, or rows to leave out and to say so."""

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence

import accelerate

from spec_kd.data.unusable import Unusable
from spec_kd.engines.base import Completion, UnansweredPromptsError
from spec_kd.engines.server_logprobs import UnmappedTokensError, list_examples

CHOICES = ("raise", "drop")
NUM_LISTED = 20

Answer = Completion | list[str] | Unusable
"""A completion, or the names of those of its tokens that are not exactly one id of the tokenizer, or why none."""

logger = logging.getLogger(__name__)


def check_on_unmapped(on_unmapped: str) -> None:
    """Raises `ValueError` for a choice that does not exist."""
    if on_unmapped not in CHOICES:
        raise ValueError(f"`on_unmapped` must be one of {', '.join(map(repr, CHOICES))}, got {on_unmapped!r}.")


def answer_batch(
    run: Callable[[], list[Completion]], rows: Sequence[int], vocab_size: int, on_unmapped: str
) -> list[Answer]:
    """The answers of an engine to some rows.

    Args:
        run (`Callable`): Runs the engine.
        rows (`Sequence[int]`): Numbers of the rows, for the error.
        vocab_size (`int`): Number of real ids.
        on_unmapped (`str`): `"raise"` or `"drop"`.

    Raises:
        `UnmappedTokensError`: With `"raise"`, from the engine.
        `ValueError`: With `"raise"`, for ids that no tokenizer knows, which an engine writes that does not mask the
            padded rows of a head.
    """
    try:
        answers = list(run())
    except UnmappedTokensError as error:
        if on_unmapped == "raise":
            raise
        answers = [names or completion for names, completion in zip(error.names, error.completions, strict=True)]
    except UnansweredPromptsError as error:
        if on_unmapped == "raise" and any(error.unmapped):
            raise UnmappedTokensError(error.unmapped, error.completions) from error
        answers = [names or completion for names, completion in zip(error.unmapped, error.completions, strict=True)]
        for position, reason in error.reasons.items():
            answers[position] = Unusable(reason)
    for position, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        beyond = [id for id in answer.ids if id >= vocab_size] if isinstance(answer, Completion) else []
        if beyond and on_unmapped == "raise":
            raise ValueError(
                f"The response to row {row} contains id {beyond[0]}, but the tokenizer has {vocab_size}: a padded row "
                'of the target\'s head. Leave such rows out with `on_unmapped="drop"`, or use the transformers engine, '
                "which never writes such ids."
            )
        if beyond:
            answers[position] = [f"(id {id}, beyond the tokenizer)" for id in beyond]
    return answers


def describe_unmapped(unmapped: Mapping[int, Sequence[str]]) -> str:
    """How many rows, which tokens, which rows.

    Args:
        unmapped (`Mapping[int, Sequence[str]]`): Names of tokens by row, at least one.
    """
    count = sum(map(len, unmapped.values()))
    rows = ", ".join(map(str, itertools.islice(unmapped, NUM_LISTED)))
    rest = f" and {len(unmapped) - NUM_LISTED} more" if len(unmapped) > NUM_LISTED else ""
    return (
        f"{len(unmapped)} responses have no exact ids, as {count} of their tokens are not exactly one id of the "
        f"tokenizer, such as {', '.join(map(repr, list_examples(unmapped.values())))}: rows {rows}{rest}"
    )


def report_dropped(unmapped: Mapping[int, Sequence[str]], num_rows: int) -> None:
    """Logs one warning about the rows that are left out.

    Args:
        unmapped (`Mapping[int, Sequence[str]]`): Names of tokens by row.
        num_rows (`int`): Rows that were answered.

    Raises:
        `ValueError`: No row is left.
    """
    if len(unmapped) == num_rows:
        raise ValueError(
            f"{describe_unmapped(unmapped)}. Nothing is left: use a server that returns ids, or the transformers "
            "engine."
        )
    if unmapped and accelerate.PartialState().is_main_process:
        logger.warning(
            "%s. They are left out: the data set has %d rows for %d prompts.",
            describe_unmapped(unmapped),
            num_rows - len(unmapped),
            num_rows,
        )
