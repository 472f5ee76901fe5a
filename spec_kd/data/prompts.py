"""Prompts in the forms people have them, rendered to the ids that the target will see."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence

from datasets import Dataset

from spec_kd.vocabulary import ProcessingClass, get_tokenizer

Prompts = Sequence[str] | Sequence[Sequence[Mapping[str, object]]] | Dataset


def prepare_prompts(prompts: Prompts) -> tuple[Dataset, Iterable[dict[str, object]]]:
    """Checks the form of `prompts`.

    Returns:
        The prompts as a data set, and their rows for rendering. The rows of a list are its own objects: Arrow gives all
        messages the same keys in the same order, which a template that prints tool calls as JSON would show.

    Raises:
        `ValueError`: No prompt at all, or neither a `prompt` nor a `prompt_ids` column.
        `TypeError`: Something else than texts, conversations or a `Dataset`.
    """
    if isinstance(prompts, Dataset):
        dataset, rows = prompts, None
    elif isinstance(prompts, list | tuple) and (
        all(isinstance(p, str) for p in prompts) or all(isinstance(p, list) for p in prompts)
    ):
        rows = [{"prompt": prompt} for prompt in prompts]
        dataset = Dataset.from_list(rows, on_mixed_types="use_json")
    else:
        raise TypeError(
            f"`prompts` must be a list of texts, a list of conversations or a Dataset, got {prompts!r:.80}."
        )
    if len(dataset) == 0:
        raise ValueError("`prompts` is empty: there is nothing for the target to answer.")
    if not {"prompt", "prompt_ids"} & set(dataset.column_names):
        raise ValueError(
            f"The data set has the columns {dataset.column_names} but neither `prompt` (text or messages) nor "
            "`prompt_ids`. Rename the column with `dataset.rename_column(...)`."
        )
    if rows is None:
        names = ("prompt", "prompt_ids", "tools", "chat_template_kwargs")
        rows = map(drop_none, dataset.select_columns([n for n in names if n in dataset.column_names]))
    return dataset, rows


def render_prompt_ids(rows: Iterable[dict[str, object]], processing_class: ProcessingClass) -> Iterator[list[int]]:
    """Ids of every prompt as the target sees them, one prompt at a time.

    Conversations go through the chat template with `add_generation_prompt=True`, `tools` and `chat_template_kwargs`;
    texts through the tokenizer with its special tokens, as `SFTTrainer` does; `prompt_ids` alone are taken as they are.

    Raises:
        `ValueError`: Names the row: an empty prompt, a conversation that the assistant has already answered, ids that
            do not belong to the text beside them, a conversation without a chat template.
    """
    for i, row in enumerate(rows):
        given = row.get("prompt_ids")
        ids = list(given or []) if "prompt" not in row else _render(row, i, processing_class)
        if not ids:
            raise ValueError(f"The prompt of row {i} has no tokens: the target needs at least one to start from.")
        if given is not None and ids != list(given):
            raise ValueError(
                f"Row {i} has {len(given)} `prompt_ids`, but the target's processing class makes {len(ids)} other ones "
                "of its `prompt`. Drop the column that you do not mean: `prompt_ids` to render the prompts anew, "
                "`prompt` to use the ids as they are."
            )
        yield ids


def _render(row: dict[str, object], index: int, processing_class: ProcessingClass) -> list[int]:
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return get_tokenizer(processing_class)(prompt)["input_ids"]
    if prompt and prompt[-1].get("role") == "assistant":
        raise ValueError(
            f"The conversation of row {index} ends with an assistant turn. The target writes that turn: remove it."
        )
    if not processing_class.chat_template:
        raise ValueError(
            "The prompts are conversations but the target's processing class has no chat template: set "
            "`processing_class.chat_template`, or give texts."
        )
    tools = row.get("tools") or None
    return processing_class.apply_chat_template(
        prompt,
        tools=json.loads(tools) if isinstance(tools, str) else tools,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **row.get("chat_template_kwargs", {}),
    )["input_ids"]


def drop_none(value: object) -> object:
    """Removes the `None` entries that Arrow adds to messages with different keys, which templates would print."""
    if isinstance(value, Mapping):
        return {k: drop_none(v) for k, v in value.items() if v is not None}
    return [drop_none(v) for v in value] if isinstance(value, list) else value
