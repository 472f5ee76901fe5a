"""Scenario II: prompts of a curated dataset, whose own answers are left aside."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset

from spec_kd.checks import check_int
from spec_kd.data.arrow_padding import remove_row_padding
from spec_kd.open_types import JsonValue, Record
from spec_kd.prompts.curated_files import load_file
from spec_kd.prompts.logs.formats import LoggedCall, read_record, split_turns
from spec_kd.prompts.logs.messages import parse_json
from spec_kd.prompts.logs.prompt_filter import LoggedPrompt
from spec_kd.prompts.logs.prompt_store import FEATURES
from spec_kd.prompts.question_templates import fill_template, find_fields
from spec_kd.prompts.tool_catalog import read_tools

CONVERSATION_COLUMNS = ("prompt", "messages", "conversations")
TURNS = ("first", "last", "all")
NUM_LISTED = 5

logger = logging.getLogger(__name__)


def load_curated_prompts(
    dataset: Dataset | DatasetDict | str,
    *,
    split: str = "train",
    config_name: str | None = None,
    prompt_column: str | None = None,
    question_template: str | Sequence[str] | None = None,
    system_prompt: str | None = None,
    tools_column: str | None = None,
    turns: str = "last",
    keep_completions: bool = False,
    completion_column: str | None = None,
    seed: int = 0,
) -> Dataset:
    r"""Takes the questions of a curated dataset as prompts for the target.

    Its answers are left aside, because a draft has to learn what the *target* would answer, not what would be right.

    ```python
    load_curated_prompts(
        "openlifescienceai/medmcqa",
        question_template="{question}\n\nA. {opa}\nB. {opb}\nC. {opc}\nD. {opd}",
        system_prompt="You are a physician. Answer with a short explanation.",
    )
    ```

    Args:
        dataset (`Dataset`, `DatasetDict` or `str`):
            A dataset, a name on the Hub, or a local folder or file (JSON lines, CSV, TSV, Parquet, text). Cells of a
            CSV or TSV file are text as it stands, also `007` and `None`.
        split (`str`): Which part of it; ignored for a `Dataset`.
        config_name (`str`, *optional*): Which configuration, for a dataset on the Hub with several.
        prompt_column (`str`, *optional*):
            Column with the question: text, which is taken as it stands, or messages in the form of TRL or ShareGPT,
            also as JSON text. By default the first of `prompt`, `messages` and `conversations`.
        question_template (`str` or `list[str]`, *optional*):
            Makes the question of the columns of a row by `str.format`: `"{question} {options[0]}"`. Of several
            templates each row gets one at random. In place of `prompt_column`. A row with an empty cell, or one that is
            neither text nor a number, is left out.
        system_prompt (`str`, *optional*): Put before the question, in place of the row's own.
        tools_column (`str`, *optional*): Column with schemas of tools, as a list or JSON text.
        turns (`str`):
            Of messages, the prompt before the last answer (`"last"`), before the first (`"first"`), or before each
            (`"all"`). Earlier answers stay in the prompt as what the user and the target have before them.
        keep_completions (`bool`): Keep the answers as `completion`: what `completion_column` or the messages have.
        completion_column (`str`, *optional*):
            Column with the answer, as text or messages; with `keep_completions` only. By default `completion` beside a
            `prompt`, or the turn after the prompt in messages.
        seed (`int`): Of the choice among templates.

    Returns:
        `Dataset` with `prompt`, `tools` (JSON text, with `tools_column`), `completion` (with `keep_completions`),
        `scenario` (`"curated"`), `source` and `conversation_id` (the source, its split and the number of the row).
        Rows that make no prompt, such as those without a question, are left out; a warning counts them and names the
        first.

    Raises:
        `ValueError`: Names columns that the dataset does not have, and those that it has; options that contradict each
            other; no row with a question.
    """
    check_curated_options(turns, prompt_column, question_template, keep_completions, completion_column)
    check_int("seed", seed, 0)
    is_bare = isinstance(dataset, Dataset)
    dataset, source = _open(dataset, split, config_name)
    prefix = source if is_bare else f"{source}:{split}"  # a row of another split is another conversation
    templates = [question_template] if isinstance(question_template, str) else list(question_template or [])
    prompt_column = check_curated_columns(
        dataset.column_names,
        prompt_column=prompt_column,
        question_template=question_template,
        tools_column=tools_column,
        completion_column=completion_column,
    )
    if (
        keep_completions
        and completion_column is None
        and prompt_column == "prompt"
        and "completion" in dataset.column_names
    ):
        completion_column = "completion"
    choices = np.random.default_rng(seed).integers(len(templates) or 1, size=len(dataset))
    left_out: list[str] = []

    def build(rows: Mapping[str, list], indices: list[int]) -> dict[str, list]:
        prompts = []
        for position, index in enumerate(indices):
            marked = {name: _strip_mark(values[position]) for name, values in rows.items()}
            row = remove_row_padding(marked, dataset.features)
            try:
                question = row.get(prompt_column)
                if templates:
                    question = [{"role": "user", "content": fill_template(templates[choices[index]], row)}]
                calls = _read_question(question, row.get(completion_column), row.get(tools_column), turns)
            except ValueError as error:
                left_out.append(f"row {index}: {error}")
                continue
            for call in calls:
                if system_prompt is not None:
                    call = _replace_system(call, system_prompt)
                prompts.append((LoggedPrompt.encode(call, source), f"{prefix}:{index}"))
        return {
            "prompt": [prompt.messages for prompt, _ in prompts],
            "tools": [prompt.tools for prompt, _ in prompts],
            "completion": [None if prompt.completion is None else [prompt.completion] for prompt, _ in prompts],
            "scenario": ["curated"] * len(prompts),
            "source": [source] * len(prompts),
            "conversation_id": [name for _, name in prompts],
        }

    prompts = dataset.with_format(None).map(
        build,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=FEATURES,
        load_from_cache_file=False,  # rows that are left out are counted while it runs
        desc="Curated prompts",
    )
    reasons = (
        f"{len(left_out)} of {len(dataset)} rows of `{source}` make no prompt ({'; '.join(left_out[:NUM_LISTED])})"
    )
    if not len(prompts):
        raise ValueError(f"{reasons}: nothing is left. Check which column has the question.")
    if left_out:
        logger.warning("%s and are left out.", reasons)
    unused = ([] if keep_completions else ["completion"]) + ([] if tools_column else ["tools"])
    return prompts.remove_columns(unused)


def check_curated_options(
    turns: str,
    prompt_column: str | None,
    question_template: str | Sequence[str] | None,
    keep_completions: bool,
    completion_column: str | None,
) -> None:
    """Raises `ValueError` for options of [`load_curated_prompts`] that are wrong whatever the dataset is."""
    if turns not in TURNS:
        raise ValueError(f"`turns` must be one of {', '.join(map(repr, TURNS))}, got {turns!r}.")
    if prompt_column is not None and question_template is not None:
        raise ValueError("`prompt_column` and `question_template` both say what the question is: give one of them.")
    if completion_column is not None and not keep_completions:
        raise ValueError(
            "`completion_column` is given, but answers are left aside: pass `keep_completions=True` to keep them."
        )


def check_curated_columns(
    columns: Sequence[str],
    *,
    prompt_column: str | None,
    question_template: str | Sequence[str] | None,
    tools_column: str | None,
    completion_column: str | None,
) -> str | None:
    """The column with the question: `prompt_column`, or by default the first of `prompt`, `messages`, ...

    Args:
        columns (`Sequence[str]`): Columns of the dataset.
        others: As of [`load_curated_prompts`].

    Raises:
        `ValueError`: Names columns that the dataset does not have, and those that it has.
    """
    templates = [question_template] if isinstance(question_template, str) else list(question_template or [])
    if not templates and prompt_column is None:
        prompt_column = next((name for name in CONVERSATION_COLUMNS if name in columns), None)
        if prompt_column is None:
            raise ValueError(
                f"Which column has the question? The dataset has {list(columns)}, but none of "
                f"{', '.join(CONVERSATION_COLUMNS)}: give `prompt_column` or `question_template`."
            )
    wanted = {
        "prompt_column": [prompt_column],
        "tools_column": [tools_column],
        "completion_column": [completion_column],
    }
    wanted["question_template"] = [name for template in templates for name in find_fields(template)]
    for option, names in wanted.items():
        missing = sorted({name for name in names if name is not None} - set(columns))
        if missing:
            raise ValueError(
                f"`{option}` names {', '.join(map(repr, missing))}, but the dataset has the columns {list(columns)}."
            )
    return prompt_column


def _open(dataset: Dataset | DatasetDict | str, split: str, config_name: str | None) -> tuple[Dataset, str]:
    """The dataset and a name for it."""
    source = str(dataset)
    if isinstance(dataset, str):
        if Path(dataset).is_file():
            dataset = load_file(dataset, split)
        else:
            dataset = load_dataset(dataset, config_name, split=split)
    elif isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise ValueError(f"`split` is {split!r}, but the dataset has {', '.join(map(repr, dataset))}.")
        dataset, source = dataset[split], "dataset"
    elif isinstance(dataset, Dataset):
        source = "dataset"
    else:
        raise TypeError(f"`dataset` must be a `Dataset`, a `DatasetDict` or a name, got {type(dataset).__name__}.")
    if not len(dataset):
        raise ValueError(f"`{source}` has no rows.")
    return dataset, source if source != "dataset" else dataset.info.dataset_name or source


def _read_question(question: JsonValue, answer: JsonValue, tools: JsonValue, turns: str) -> list[LoggedCall]:
    """The prompts of a question that is text, messages of TRL or ShareGPT, or JSON text of such messages."""
    messages, answers = _find_messages(question), _find_messages(answer)
    tools = read_tools(tools)
    if answers is None and answer is not None:
        answers = [{"role": "assistant", "content": _read_text(answer, "answer")}]
    if messages is None:
        text = _read_text(question, "question")
        if not text.strip():
            raise ValueError("the question is empty")
        messages = [{"role": "user", "content": text}]
        calls = [read_record({"prompt": messages, "completion": answers, "tools": tools}, "trl")]
    elif "from" in messages[0]:
        calls = split_turns(read_record({"conversations": messages, "tools": tools}), "all")
    elif answers is not None:
        calls = [read_record({"prompt": messages, "completion": answers, "tools": tools}, "trl")]
    else:
        calls = split_turns(read_record({"messages": messages, "tools": tools}, "trl"), "all")
    return {"first": calls[:1], "last": calls[-1:], "all": calls}[turns]


def _find_messages(value: JsonValue) -> list[Record] | None:
    """The messages that a value is, or holds as JSON text; `None` for all else, such as a question about JSON."""
    messages = parse_json(value)
    if not isinstance(messages, list | tuple) or not messages:
        return None
    if not all(isinstance(message, Mapping) and ("role" in message or "from" in message) for message in messages):
        return None
    has_text = all(len(message) > 1 for message in messages)
    return list(messages) if has_text or not isinstance(value, str) else None


def _read_text(value: JsonValue, what: str) -> str:
    if value is None:
        raise ValueError(f"the {what} is empty")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(
            f"the {what} is no text, and no messages, but {value!r:.60}. Make text of it with `question_template` or "
            "`dataset.map`"
        )
    return value


def _strip_mark(value: JsonValue) -> JsonValue:
    """Text without the byte order mark that a file of Windows may begin with."""
    return value.removeprefix("\ufeff") if isinstance(value, str) else value


def _replace_system(call: LoggedCall, system_prompt: str) -> LoggedCall:
    rest = [message for message in call.prompt if message["role"] not in ("system", "developer")]
    return replace(call, prompt=[{"role": "system", "content": system_prompt}, *rest])
