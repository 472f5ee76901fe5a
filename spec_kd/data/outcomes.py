"""What becomes of each row: a completion, or the reason why there is none, which stops a run or leaves the row out."""

import itertools
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import cast

import accelerate

from spec_kd.engines.base import Completion, Engine, MissingCompletionsError
from spec_kd.engines.server.logprobs import UnidentifiedTokensError, list_examples
from spec_kd.losses import SignalSpec
from spec_kd.sampling.options import SamplingOptions
from spec_kd.sampling.prompts import PromptBatch, UnusablePromptError

NUM_LISTED = 20
NUM_EXPLAINED = 3

logger = logging.getLogger(__name__)


Outcome = Completion | list[str] | str
"""A completion; or the names of its tokens that are not exactly one id; or the reason why the prompt has none."""


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
        return _search_unusable(engine, prompts, options, signal, range(len(prompts)))
    return {}


def _search_unusable(
    engine: Engine,
    prompts: Sequence[list[int]],
    options: SamplingOptions | None,
    signal: SignalSpec | None,
    rows: range,
) -> dict[int, str]:
    """Searches by halves: a check may cost as much for one prompt as for many."""
    try:
        engine.check(PromptBatch([prompts[row] for row in rows], rows), options, signal)
    except UnusablePromptError as error:
        middle = len(rows) // 2
        if middle == 0:
            return {rows[0]: str(error)}
        search = partial(_search_unusable, engine, prompts, options, signal)
        return search(rows[:middle]) | search(rows[middle:])
    return {}


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
        outcomes = _choose_outcomes({}, error.names, error.completions)
    except MissingCompletionsError as error:
        if on_unidentified_token == "raise" and any(error.unidentified):
            raise UnidentifiedTokensError(error.unidentified, error.completions) from error
        outcomes = _choose_outcomes(error.reasons, error.unidentified, error.completions)
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


def _choose_outcomes(
    reasons: Mapping[int, str], names: Sequence[list[str]], completions: Sequence[Completion | None]
) -> list[Outcome]:
    pairs = enumerate(zip(names, completions, strict=True))
    return [reasons.get(index, unknown or cast(Completion, known)) for index, (unknown, known) in pairs]


def _list_rows(rows: Collection[int], start: int = 0) -> str:
    """The row numbers from the one at `start`, separated by commas; those after the first 20 are only counted."""
    rest = f" and {len(rows) - NUM_LISTED} more" if len(rows) > NUM_LISTED else ""
    return ", ".join(map(str, itertools.islice(rows, start, NUM_LISTED))) + rest


def describe_unusable(unusable: Mapping[int, str], num_rows: int) -> str:
    """Describes how many rows cannot be used, which and why.

    Args:
        unusable (`Mapping[int, str]`): Reasons by row, at least one.
        num_rows (`int`): Number of rows of the dataset.
    """
    reasons = "; ".join(f"row {row}: {unusable[row]}" for row in itertools.islice(unusable, NUM_EXPLAINED))
    more = f"; also rows {_list_rows(unusable, NUM_EXPLAINED)}" if len(unusable) > NUM_EXPLAINED else ""
    return f"{len(unusable)} of {num_rows} prompts cannot be used by the target ({reasons}{more})"


def describe_unidentified(unidentified: Mapping[int, Sequence[str]]) -> str:
    """Describes how many rows have tokens without an id, which tokens and which rows.

    Args:
        unidentified (`Mapping[int, Sequence[str]]`): Names of tokens by row, at least one.
    """
    count = sum(map(len, unidentified.values()))
    examples = ", ".join(map(repr, list_examples(unidentified.values())))
    return (
        f"{len(unidentified)} responses have no exact ids, as {count} of their tokens are not exactly one id of the "
        f"tokenizer, such as {examples}: rows {_list_rows(unidentified)}"
    )


def raise_unusable(unusable: Mapping[int, str], num_rows: int, output_dir: object) -> None:
    """Raises `UnusablePromptError` if there are such rows; the message says where the other completions are."""
    if unusable:
        kept = "Nothing is kept" if output_dir is None else f"The other completions are kept in `{output_dir}`"
        raise UnusablePromptError(
            f"{describe_unusable(unusable, num_rows)}. {kept}. Remove these rows, raise the context of the target, or "
            'leave them out with `on_unusable_prompt="skip"`.',
            fault="refused",
        )


def report_outcomes(unusable: Mapping[int, str], unidentified: Mapping[int, Sequence[str]], num_rows: int) -> None:
    """Logs a warning about the rows whose prompt the target cannot take, and one about those without exact ids.

    Args:
        unusable (`Mapping[int, str]`): Reasons by row.
        unidentified (`Mapping[int, Sequence[str]]`): Names of tokens by row.
        num_rows (`int`): Number of rows of the dataset.

    Raises:
        `UnusablePromptError`: No row is left whose prompt the target can take.
        `ValueError`: No other row has exact ids.
    """
    num_usable, is_main = num_rows - len(unusable), accelerate.PartialState().is_main_process
    if unusable and num_usable == 0:
        raise UnusablePromptError(f"{describe_unusable(unusable, num_rows)}. Nothing is left.", fault="refused")
    if unusable and is_main:
        logger.warning("%s. They are left out.", describe_unusable(unusable, num_rows))
    if len(unidentified) == num_usable:
        raise ValueError(
            f"{describe_unidentified(unidentified)}. Nothing is left: use a server that returns ids, or the "
            "transformers engine."
        )
    if unidentified and is_main:
        logger.warning(
            "%s. They are left out: the dataset has %d rows for %d prompts.",
            describe_unidentified(unidentified), num_usable - len(unidentified), num_usable,
        )  # fmt: skip
