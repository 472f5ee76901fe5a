"""Completions whose exact ids are not known: they stop a run, or are left out with a warning."""

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import accelerate

from spec_kd.data.unusable_prompts import Unusable
from spec_kd.engines.base import Completion, MissingCompletionsError
from spec_kd.engines.server.logprobs import UnidentifiedTokensError, list_examples

NUM_LISTED = 20

Outcome = Completion | list[str] | Unusable
"""A completion; or the names of its tokens that are not exactly one id; or the reason why there is none."""

logger = logging.getLogger(__name__)


def complete_batch(
    run: Callable[[], list[Completion]], rows: Sequence[int], vocab_size: int, on_unidentified_token: str
) -> list[Outcome]:
    """Runs an engine on some rows, and returns an outcome for each.

    Args:
        run (`Callable`): Runs the engine.
        rows (`Sequence[int]`): Row numbers, for the error.
        vocab_size (`int`): Number of real ids.
        on_unidentified_token (`str`): `"raise"` or `"drop"`.

    Raises:
        `UnidentifiedTokensError`: With `"raise"`, from the engine.
        `ValueError`: With `"raise"`, for ids beyond the tokenizer: an engine that does not mask the padded rows of a
            head may write them.
    """
    try:
        outcomes: list[Outcome] = list(run())
    except UnidentifiedTokensError as error:
        if on_unidentified_token == "raise":
            raise
        outcomes = _prefer_names(error.names, error.completions)
    except MissingCompletionsError as error:
        if on_unidentified_token == "raise" and any(error.unidentified):
            raise UnidentifiedTokensError(error.unidentified, error.completions) from error
        outcomes = _prefer_names(error.unidentified, error.completions)
        for position, reason in error.reasons.items():
            outcomes[position] = Unusable(reason)
    for position, (row, outcome) in enumerate(zip(rows, outcomes, strict=True)):
        beyond = [id for id in outcome.ids if id >= vocab_size] if isinstance(outcome, Completion) else []
        if beyond and on_unidentified_token == "raise":
            raise ValueError(
                f"The response to row {row} contains id {beyond[0]}, but the tokenizer has {vocab_size}: a padded row "
                'of the target\'s head. Leave such rows out with `on_unidentified_token="drop"`, or use the '
                "transformers engine, which never writes such ids."
            )
        if beyond:
            outcomes[position] = [f"(id {id}, beyond the tokenizer)" for id in beyond]
    return outcomes


def _prefer_names(names: Sequence[list[str]], completions: Sequence[Completion | None]) -> list[Outcome]:
    return [unknown or cast(Completion, known) for unknown, known in zip(names, completions, strict=True)]


def describe_unidentified(unidentified: Mapping[int, Sequence[str]]) -> str:
    """Describes how many rows are concerned, which tokens and which rows.

    Args:
        unidentified (`Mapping[int, Sequence[str]]`): Names of tokens by row, at least one.
    """
    count = sum(map(len, unidentified.values()))
    rows = ", ".join(map(str, itertools.islice(unidentified, NUM_LISTED)))
    rest = f" and {len(unidentified) - NUM_LISTED} more" if len(unidentified) > NUM_LISTED else ""
    return (
        f"{len(unidentified)} responses have no exact ids, as {count} of their tokens are not exactly one id of the "
        f"tokenizer, such as {', '.join(map(repr, list_examples(unidentified.values())))}: rows {rows}{rest}"
    )


def report_dropped(unidentified: Mapping[int, Sequence[str]], num_rows: int) -> None:
    """Logs one warning about the rows that are left out.

    Args:
        unidentified (`Mapping[int, Sequence[str]]`): Names of tokens by row.
        num_rows (`int`): Number of rows whose prompt the target took.

    Raises:
        `ValueError`: No row is left.
    """
    if len(unidentified) == num_rows:
        raise ValueError(
            f"{describe_unidentified(unidentified)}. Nothing is left: use a server that returns ids, or the "
            "transformers engine."
        )
    if unidentified and accelerate.PartialState().is_main_process:
        logger.warning(
            "%s. They are left out: the dataset has %d rows for %d prompts.",
            describe_unidentified(unidentified),
            num_rows - len(unidentified),
            num_rows,
        )
