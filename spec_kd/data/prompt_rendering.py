"""Prompts in any accepted form, rendered to the ids that the target reads."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

from datasets import Dataset, Features, Json, List

from spec_kd.data.arrow_padding import iterate_rows
from spec_kd.data.chat_rendering import ChatRenderer
from spec_kd.open_types import JsonObject, Record
from spec_kd.stored_sets import check_stored_set
from spec_kd.vocabulary import ProcessingClass

Prompts: TypeAlias = Sequence[str] | Sequence[Sequence[Mapping[str, object]]] | Dataset


def prepare_prompts(prompts: Prompts) -> tuple[Dataset, Iterable[JsonObject]]:
    """Checks the form of `prompts`.

    Returns:
        The prompts as a dataset, and their rows for rendering. Messages of a list are stored as JSON, each with its own
        keys in its own order: a template that prints tool calls as JSON shows both.

    Raises:
        `ValueError`: No prompts, neither a `prompt` nor a `prompt_ids` column, or a stored set that is damaged.
        `TypeError`: Prompts that are neither a list of texts, nor a list of conversations, nor a `Dataset`.
    """
    if isinstance(prompts, Dataset):
        check_stored_set(prompts)
        dataset = prompts
    elif isinstance(prompts, list | tuple) and (
        all(isinstance(p, str) for p in prompts) or all(isinstance(p, list) for p in prompts)
    ):
        features = None if not prompts or isinstance(prompts[0], str) else Features({"prompt": List(Json())})
        dataset = Dataset.from_dict({"prompt": list(prompts)}, features=features)
    else:
        raise TypeError(
            f"`prompts` must be a list of texts, a list of conversations or a Dataset, got {prompts!r:.80}."
        )
    if len(dataset) == 0:
        raise ValueError("`prompts` is empty: there is nothing for the target to complete.")
    if not {"prompt", "prompt_ids"} & set(dataset.column_names):
        raise ValueError(
            f"The dataset has the columns {dataset.column_names} but neither `prompt` (text or messages) nor "
            "`prompt_ids`. Rename the column with `dataset.rename_column(...)`."
        )
    names = ("prompt", "prompt_ids", "tools", "chat_template_kwargs")
    return dataset, iterate_rows(dataset.select_columns([n for n in names if n in dataset.column_names]))


def render_prompt_ids(rows: Iterable[JsonObject], processing_class: ProcessingClass) -> Iterator[list[int]]:
    """Yields the ids of every prompt as the target reads them.

    Conversations go through the chat template with `add_generation_prompt=True`, `tools` and `chat_template_kwargs`.
    Texts go through the tokenizer with its special tokens, as in `SFTTrainer`. `prompt_ids` alone are used as they are.

    Raises:
        `ValueError`: Names the row: an empty prompt, a conversation that ends with the assistant, ids that do not
            belong to the text beside them, a conversation without a chat template.
    """
    renderer = ChatRenderer(processing_class)
    for i, row in enumerate(rows):
        given = row.get("prompt_ids")
        ids = list(given or []) if "prompt" not in row else _render(row, i, renderer)
        if not ids:
            raise ValueError(f"The prompt of row {i} has no tokens: the target needs at least one to start from.")
        if given is not None and ids != list(given):
            raise ValueError(
                f"Row {i} has {len(given)} `prompt_ids`, but the target's processing class makes {len(ids)} other ones "
                "of its `prompt`. Drop one of the columns: `prompt_ids` to render the prompts again, `prompt` to use "
                "the ids as they are."
            )
        yield ids


def _render(row: JsonObject, index: int, renderer: ChatRenderer) -> list[int]:
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return renderer.tokenizer(prompt)["input_ids"]
    if prompt and prompt[-1].get("role") == "assistant":
        raise ValueError(
            f"The conversation of row {index} ends with an assistant turn. The target writes that turn: remove it."
        )
    check_chat_template(renderer.processing_class)
    return renderer.render_prompt(prompt, **read_template_arguments(row))


def check_chat_template(processing_class: ProcessingClass) -> None:
    """Raises `ValueError` if there is no chat template to render conversations with."""
    if not processing_class.chat_template:
        raise ValueError(
            "The prompts are conversations but the target's processing class has no chat template: set "
            "`processing_class.chat_template`, or pass prompts as text."
        )


def read_template_arguments(row: Record) -> JsonObject:
    """`tools` (parsed if they are JSON text) and `chat_template_kwargs` of a row, for its chat template."""
    tools = row.get("tools") or None
    return {"tools": json.loads(tools) if isinstance(tools, str) else tools, **(row.get("chat_template_kwargs") or {})}
