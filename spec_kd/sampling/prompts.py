"""Prompts of a batch, with their rows of the dataset, and what is checked of prompts and models before any work."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from transformers import PreTrainedModel

from spec_kd.heads import count_rows, unwrap_peft
from spec_kd.probes import check_is_causal_lm
from spec_kd.vocabulary import check_head_covers


class UnusablePromptError(ValueError):
    """An engine cannot take a prompt, though it may take others of the same job.

    Args:
        message (`str`): Which prompt, why, and what to do.
        fault (`str`): Kind of fault, for counting: `"context_full"`, `"not_text"` or `"refused"`.
    """

    def __init__(self, message: str, fault: str):
        super().__init__(message)
        self.fault = fault

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.args[0], self.fault)


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
        self.rows, self.on_progress = rows, on_progress


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


def find_causal_lm(model: PreTrainedModel, role: str) -> PreTrainedModel:
    """The transformers model itself, with active adapters.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model.
        role (`str`): Name of the model in the error, such as `"target"`.

    Raises:
        ValueError: The model has a prompt-learning adapter, no output head or an encoder.
    """
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            f"The {role} has a prompt-learning adapter: its virtual tokens have no ids and exist in no server. Use "
            "LoRA instead."
        )
    check_is_causal_lm(model, role)
    return unwrap_peft(model)


def resolve_vocab_size(vocab_size: int | None, draft: PreTrainedModel, target: PreTrainedModel | None) -> int:
    """The number of ids that draft and target share: `vocab_size`, or by default the rows that both heads have.

    Raises:
        VocabularyMismatchError: A head has fewer rows than `vocab_size`.
    """
    models = {"draft": draft} | ({} if target is None else {"target": target})
    if vocab_size is None:
        return min(count_rows(model.get_output_embeddings()) for model in models.values())
    for role, model in models.items():
        check_head_covers(model, vocab_size, role)
    return vocab_size


def get_max_length(model: PreTrainedModel) -> int | None:
    """Number of positions that the config of a model names; `None` if it names none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_room(
    lengths: Iterable[int],
    max_new_tokens: int,
    limits: Mapping[str, int | None],
    *,
    num_unread: int = 0,
    name: Callable[[int], str] = "Prompt {}".format,
    advice: str = "",
) -> None:
    """Checks that prompts leave room for their completions.

    Args:
        lengths (`Iterable[int]`): Number of tokens of each prompt.
        max_new_tokens (`int`): Maximum number of tokens of a completion.
        limits (`Mapping[str, int | None]`):
            Number of positions of whatever reads or writes the completions, by its name, such as
            `{"target": get_max_length(target)}`; `None` if unlimited.
        num_unread (`int`, *optional*, defaults to `0`): Number of tokens at the end that need no position.
        name (`Callable[[int], str]`, *optional*): Names a prompt in the error by its index; `"Prompt 7"` by default.
        advice (`str`, *optional*, defaults to `""`): Further sentence of the error.

    Raises:
        UnusablePromptError: A prompt is too long. The error names the longest one.
    """
    lengths = list(lengths)
    for role, limit in limits.items():
        num_too_long = 0 if limit is None else sum(length + max_new_tokens - num_unread > limit for length in lengths)
        if num_too_long:
            longest = max(range(len(lengths)), key=lengths.__getitem__)
            raise UnusablePromptError(
                f"{name(longest)} has {lengths[longest]} tokens, which leaves no room for `max_new_tokens="
                f"{max_new_tokens}` in the {role}'s {limit} positions. {num_too_long} of {len(lengths)} prompts are "
                f"too long: remove them, or lower `max_new_tokens`. {advice}".rstrip(),
                fault="context_full",
            )


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raises `ValueError` unless there are prompts, none empty, whose ids draft and target share."""
    if not prompts:
        raise ValueError("There are no prompts. Pass the ids of at least one.")
    check_prompt_ids(prompts, vocab_size, "draft and target share")


def check_prompt_ids(prompts: Sequence[Sequence[int]], vocab_size: int, owner: str) -> None:
    """Checks that every prompt has ids, and only known ones.

    Args:
        prompts (`Sequence[Sequence[int]]`): Ids of each prompt.
        vocab_size (`int`): Number of known ids.
        owner (`str`): Whose ids they are, with a verb, for the error: `"the target has"`.

    Raises:
        ValueError: A prompt is empty or has an unknown id.
    """
    for index, ids in enumerate(prompts):
        if not len(ids):
            raise ValueError(f"{name_prompt(prompts, index)} has no tokens. A model needs at least one to start from.")
        extreme = min(ids) if min(ids) < 0 else max(ids)
        if not 0 <= extreme < vocab_size:
            raise ValueError(
                f"{name_prompt(prompts, index)} contains id {extreme}, but {owner} {vocab_size} ids. Tokenize "
                "it with the tokenizer of the target."
            )
