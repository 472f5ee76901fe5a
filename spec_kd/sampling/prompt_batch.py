"""Batches of prompts that know their rows of the dataset and report progress."""

from collections.abc import Callable, Iterable, Sequence


class UnusablePromptError(ValueError):
    """An engine cannot take a prompt, though it may take others of the same job.

    Args:
        message (`str`): Which prompt, why, and what to do.
        fault (`str`): Kind of fault, for counting: `"context_full"`, `"not_text"` or `"refused"`.
    """

    def __init__(self, message: str, fault: str):
        super().__init__(message)
        self.fault = fault


class PromptBatch(list[list[int]]):
    """Ids of prompts, with their rows of the dataset and a function that is told of progress.

    An engine that uses neither can treat it as the list that it is.

    Args:
        prompts (`Iterable[list[int]]`): Ids of each prompt.
        rows (`Sequence[int]`): Row of each prompt in the dataset, for errors and warnings.
        on_progress (`Callable[[int, int], None]`, *optional*):
            Called with the number of new tokens and the number of completions that they finish, which may be 0.
    """

    def __init__(
        self,
        prompts: Iterable[list[int]],
        rows: Sequence[int],
        on_progress: Callable[[int, int], None] | None = None,
    ):
        super().__init__(prompts)
        self.rows = rows
        self.on_progress = on_progress


def pick_prompts(prompts: Sequence[list[int]], indices: Sequence[int]) -> list[list[int]]:
    """Some prompts of a batch, with their rows and the progress function where the batch has them."""
    picked = [prompts[index] for index in indices]
    if not isinstance(prompts, PromptBatch):
        return picked
    return PromptBatch(picked, [prompts.rows[index] for index in indices], prompts.on_progress)


def name_prompt(prompts: Sequence[Sequence[int]], index: int) -> str:
    """`"Row 7"` by its row of the dataset where that is known, else `"Prompt 7"` by its index in the batch."""
    return f"Row {prompts.rows[index]}" if isinstance(prompts, PromptBatch) else f"Prompt {index}"


def report_progress(prompts: Sequence[list[int]], num_tokens: int, num_completions: int = 1) -> None:
    """Reports new tokens and finished completions of a batch that has a progress function."""
    if isinstance(prompts, PromptBatch) and prompts.on_progress is not None:
        prompts.on_progress(num_tokens, num_completions)
