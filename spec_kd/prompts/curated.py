"""Scenario II: prompts of a curated dataset, without its own completions."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset

from spec_kd.addresses import is_address
from spec_kd.copies import fetch
from spec_kd.data.arrow_padding import remove_row_padding
from spec_kd.open_types import Argument, JsonValue, Record
from spec_kd.options import check_choice, check_int, document_options, option, resolve_options
from spec_kd.prompts.curated_files import load_file
from spec_kd.prompts.logs.formats import read_form
from spec_kd.prompts.logs.logged_call import LoggedCall, split_turns
from spec_kd.prompts.logs.messages import parse_json
from spec_kd.prompts.logs.prompt_filter import LoggedPrompt
from spec_kd.prompts.logs.prompt_store import FEATURES
from spec_kd.prompts.question_templates import fill_template, find_fields
from spec_kd.prompts.tool_catalog import read_tools

CONVERSATION_COLUMNS = ("prompt", "messages", "conversations")
TURNS = ("first", "last", "all")
NUM_LISTED = 5

logger = logging.getLogger(__name__)


@document_options
@dataclass(frozen=True)
class CuratedOptions:
    """Options of [`load_curated_prompts`].

    Raises:
        ValueError: An option is out of its range, or two options contradict each other.
    """

    split: str = option("Split of the dataset to read; ignored for a `Dataset`.", "train")
    config_name: str | None = option("Configuration of a dataset on the Hub; the only one by default.", None)
    prompt_column: str | None = option(
        "Column with the question: text, which is taken as it stands, or messages in the form of TRL or ShareGPT, also "
        "as JSON text. By default the first of `prompt`, `messages` and `conversations`.",
        None,
    )
    question_template: list[str] | None = option(
        "Template that makes the question from the columns of a row by `str.format`, such as `{question} "
        "{options[0]}`, in place of `prompt_column`; none by default. Of several templates each row gets one at "
        "random. A row with an empty cell, or with one that is neither text nor a number, is left out.",
        None,
    )
    system_prompt: str | None = option("System prompt, in place of the row's own, which is kept by default.", None)
    tools_column: str | None = option(
        "Column with the schemas of tools, as a list or as JSON text; no tools by default.", None
    )
    turns: str = option(
        "Prompts to make of messages: the one before the last completion (last), before the first (first), or before "
        "each (all). Earlier completions stay in the prompt, because the user and the target see them.",
        "last",
    )
    keep_completions: bool = option(
        "Whether to keep the dataset's own completions, from `completion_column` or from the messages, as "
        "`completion`.",
        False,
    )
    completion_column: str | None = option(
        "Column with the completion, as text or messages; needs `keep_completions`. By default `completion` beside a "
        "`prompt`, or the turn after the prompt in messages.",
        None,
    )
    seed: int = option("Seed of the choice among templates.", 0)

    def __post_init__(self) -> None:
        if isinstance(self.question_template, str):
            object.__setattr__(self, "question_template", [self.question_template])
        check_choice("turns", self.turns, TURNS)
        check_int("seed", self.seed, 0)
        if self.prompt_column is not None and self.question_template is not None:
            raise ValueError("`prompt_column` and `question_template` both say what the question is: give one of them.")
        if self.completion_column is not None and not self.keep_completions:
            raise ValueError(
                "`completion_column` is given, but completions are not kept: pass `keep_completions=True` to keep them."
            )

    def find_columns(self, columns: Sequence[str]) -> "CuratedOptions":
        """The options with the columns that they mean by default in a dataset with these columns.

        Raises:
            ValueError: Columns that the dataset does not have; names them, and those that it has.
        """
        prompt_column, completion_column = self.prompt_column, self.completion_column
        if not self.question_template and prompt_column is None:
            prompt_column = next((name for name in CONVERSATION_COLUMNS if name in columns), None)
            if prompt_column is None:
                raise ValueError(
                    f"Which column has the question? The dataset has {list(columns)}, but none of "
                    f"{', '.join(CONVERSATION_COLUMNS)}: give `prompt_column` or `question_template`."
                )
        if self.keep_completions and completion_column is None and prompt_column == "prompt":
            completion_column = "completion" if "completion" in columns else None
        wanted: dict[str, list[str | None]] = {
            "prompt_column": [prompt_column],
            "tools_column": [self.tools_column],
            "completion_column": [completion_column],
            "question_template": [n for template in self.question_template or () for n in find_fields(template)],
        }
        for name, named in wanted.items():
            if missing := sorted({column for column in named if column is not None} - set(columns)):
                raise ValueError(
                    f"`{name}` names {', '.join(map(repr, missing))}, but the dataset has the columns {list(columns)}."
                )
        return replace(self, prompt_column=prompt_column, completion_column=completion_column)


def load_curated_prompts(
    dataset: Dataset | DatasetDict | str, options: CuratedOptions | None = None, **given: Argument
) -> Dataset:
    r"""Takes the questions of a curated dataset as prompts for the target.

    The dataset's own completions are left out by default: a draft has to learn what the *target* writes, not what is
    right.

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
            CSV or TSV file are read as text, also `007` and `None`.
        options (`CuratedOptions`, *optional*): Options of the reading; the defaults of [`CuratedOptions`] by default.
        given: The fields of [`CuratedOptions`] as keywords.

    Returns:
        `Dataset`: The columns `prompt`, `tools` (JSON text, with `tools_column`), `completion` (with
        `keep_completions`), `scenario` (`"curated"`), `source` and `conversation_id` (the source, its split and the
        number of the row). Rows that make no prompt, such as those without a question, are left out; a warning counts
        them and names the first ones.

    Raises:
        ValueError: The dataset does not have a column (names those that it has), two options contradict each other, or
            no row has a question.
        TypeError: `dataset` is of another type.
    """
    options = resolve_options(CuratedOptions, options, given)
    # The rows of each split are other conversations.
    split = "" if isinstance(dataset, Dataset) else f":{options.split}"
    dataset, source = _open(dataset, options)
    options = options.find_columns(dataset.column_names)
    templates = options.question_template or []
    choices = np.random.default_rng(options.seed).integers(len(templates) or 1, size=len(dataset))
    left_out: list[str] = []

    def build(rows: Mapping[str, list[JsonValue]], indices: list[int]) -> dict[str, list[JsonValue]]:
        prompts = []
        for position, index in enumerate(indices):
            cells = ((name, values[position]) for name, values in rows.items())
            # A file from Windows may begin with a byte order mark.
            clean = {name: cell.removeprefix("\ufeff") if isinstance(cell, str) else cell for name, cell in cells}
            row = remove_row_padding(clean, dataset.features)
            try:
                question = _get(row, options.prompt_column)
                if templates:
                    question = [{"role": "user", "content": fill_template(templates[choices[index]], row)}]
                calls = _read_question(question, row, options)
            except ValueError as error:
                left_out.append(f"row {index}: {error}")
                continue
            for call in calls:
                if options.system_prompt is not None:
                    rest = [message for message in call.prompt if message["role"] not in ("system", "developer")]
                    call = replace(call, prompt=[{"role": "system", "content": options.system_prompt}, *rest])
                prompts.append((LoggedPrompt.encode(call, source), f"{source}{split}:{index}"))
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
    unused = ([] if options.keep_completions else ["completion"]) + ([] if options.tools_column else ["tools"])
    return prompts.remove_columns(unused)


def _open(dataset: Dataset | DatasetDict | str, options: CuratedOptions) -> tuple[Dataset, str]:
    """Opens the dataset; returns it and a name for it."""
    source = dataset if isinstance(dataset, str) else "dataset"
    if isinstance(dataset, str):
        path = str(fetch(dataset)) if is_address(dataset) else dataset
        dataset = (
            load_file(path, options.split)
            if Path(path).is_file()
            else load_dataset(path, options.config_name, split=options.split)
        )
    elif isinstance(dataset, DatasetDict):
        if options.split not in dataset:
            raise ValueError(f"`split` is {options.split!r}, but the dataset has {', '.join(map(repr, dataset))}.")
        dataset = dataset[options.split]
    elif not isinstance(dataset, Dataset):
        raise TypeError(f"`dataset` must be a `Dataset`, a `DatasetDict` or a name, got {type(dataset).__name__}.")
    if not len(dataset):
        raise ValueError(f"`{source}` has no rows.")
    return dataset, source if source != "dataset" else dataset.info.dataset_name or source


def _read_question(question: JsonValue, row: Record, options: CuratedOptions) -> list[LoggedCall]:
    """The prompts of a question that is text, messages of TRL or ShareGPT, or JSON text of such messages."""
    cell, tools = _get(row, options.completion_column), read_tools(_get(row, options.tools_column))
    messages, completion = _find_messages(question), _find_messages(cell)
    if completion is None and cell is not None:
        completion = [{"role": "assistant", "content": _read_text(cell, "completion")}]
    if messages is None:
        text = _read_text(question, "question")
        if not text.strip():
            raise ValueError("the question is empty")
        messages = [{"role": "user", "content": text}]
        calls = [read_form({"prompt": messages, "completion": completion, "tools": tools}, "trl")]
    elif "from" in messages[0]:
        calls = split_turns(read_form({"conversations": messages, "tools": tools}), "all")
    elif completion is not None:
        calls = [read_form({"prompt": messages, "completion": completion, "tools": tools}, "trl")]
    else:
        calls = split_turns(read_form({"messages": messages, "tools": tools}, "trl"), "all")
    return {"first": calls[:1], "last": calls[-1:], "all": calls}[options.turns]


def _get(row: Record, column: str | None) -> JsonValue:
    return None if column is None else row.get(column)


def _find_messages(value: JsonValue) -> list[Record] | None:
    """The messages that a value is, or contains as JSON text; `None` for all else, such as a question about JSON."""
    messages = parse_json(value)
    is_chat = isinstance(messages, list | tuple) and all(
        isinstance(message, Mapping) and ("role" in message or "from" in message) for message in messages
    )
    if not is_chat or not messages or (isinstance(value, str) and any(len(message) < 2 for message in messages)):
        return None
    return list(messages)


def _read_text(value: JsonValue, what: str) -> str:
    if value is None:
        raise ValueError(f"the {what} is empty")
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise ValueError(
            f"the {what} is no text, and no messages, but {value!r:.60}. Make text of it with `question_template` or "
            "`dataset.map`"
        )
    return str(value)
