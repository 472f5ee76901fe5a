"""Renders rows of conversations or text to ids, with labels on the tokens that the target wrote."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import accelerate
from datasets import Dataset, Features, IterableDataset, List, Value
from jinja2 import TemplateError
from trl import is_conversational_from_value, maybe_convert_to_chatml

from spec_kd.data.arrow_padding import remove_row_padding
from spec_kd.data.chat_rendering import ChatRenderer, Message, Turn
from spec_kd.data.prompt_rendering import check_chat_template, read_template_arguments
from spec_kd.data.rendered_completion import TurnNotRenderedError
from spec_kd.open_types import Arguments, JsonObject, JsonValue, Record
from spec_kd.version import __version__

IGNORED_LABEL = -100
SPEAKERS = {"human": "user", "gpt": "assistant"}
"""Roles in datasets of `from` and `value`, and what chat templates call them."""

Row = JsonObject
"""`input_ids` and `labels`, or why they are `left_out`; `added` counts the turns whose reasoning the template added."""

logger = logging.getLogger(__name__)


def render_rows(
    dataset: Dataset | IterableDataset,
    renderer: ChatRenderer,
    *,
    completion_only_loss: bool | None = None,
    join_turns: bool = True,
    num_proc: int | None = None,
    name: str = "training",
) -> Dataset | IterableDataset:
    """Renders `messages`, or `prompt` and `completion`, to `input_ids` and `labels`.

    Every assistant turn in `messages` and in `completion` counts as written by the target. Turns share a row as long as
    the conversation before a turn, as a server reads it, begins with the whole row so far. Otherwise (templates that
    drop reasoning from history, or end the last turn in another way) the turn begins a new row.

    Args:
        dataset (`Dataset` or `IterableDataset`): Has `messages` or `conversations`, or `prompt` and `completion`
            (conversations or text), and optionally `tools` and `chat_template_kwargs`.
        renderer (`ChatRenderer`): Renderer with the target's processing class.
        completion_only_loss (`bool`, *optional*): `False` puts labels on everything. `None` and `True` are the same.
        join_turns (`bool`, *optional*, defaults to `True`): Whether turns share a row where they can.
        num_proc (`int`, *optional*): Number of processes for a `Dataset`.
        name (`str`, *optional*, defaults to `"training"`): Name of the dataset in messages.

    Returns:
        The rows. Turns that cannot be rendered as the target wrote them have no labels, and a warning counts them.

    Raises:
        ValueError: If no turn is left; while mapping, if the chat template refuses a row.
    """
    columns = list(dataset.column_names or next(iter(dataset)))
    features = dataset.features
    unread = ("messages", "conversations") if {"prompt", "completion"} <= set(columns) else ("prompt", "completion")

    def render(batch: Mapping[str, list[JsonValue]], indices: list[int], version: str) -> dict[str, list[JsonValue]]:
        made: list[Row] = []
        for position, index in enumerate(indices):
            row = remove_row_padding(
                {key: values[position] for key, values in batch.items() if key not in unread}, features
            )
            reasons: list[str] = []
            try:
                made += _render_row(row, renderer, reasons, join_turns)
            except (TemplateError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(
                    f"The chat template cannot render row {index} of the {name} dataset ({error}). Correct the row "
                    "or leave it out."
                ) from error
            made += [{"input_ids": [], "labels": [], "left_out": reason, "added": 0} for reason in reasons]
        rendered = {name: [row[name] for row in made] for name in ("input_ids", "labels", "left_out", "added")}
        return rendered if completion_only_loss is not False else {**rendered, "labels": rendered["input_ids"]}

    # the version is in the fingerprint: `datasets` reuses rows on disk, and sees no change of this package
    options: Arguments = {
        "batched": True,
        "with_indices": True,
        "fn_kwargs": {"version": __version__},
        "remove_columns": columns,
        "features": Features(
            {
                "input_ids": List(Value("int32")),
                "labels": List(Value("int32")),
                "left_out": Value("string"),
                "added": Value("int32"),
            }
        ),
    }
    keep_rendered: Arguments = {"function": lambda reason: reason is None, "input_columns": ["left_out"]}
    if not isinstance(dataset, Dataset):  # a row at a time: the next one may not be there yet
        mapped = dataset.map(render, **options, batch_size=1).filter(**keep_rendered)
        return mapped.remove_columns(["left_out", "added"])
    mapped = dataset.with_format(None).map(render, **options, num_proc=num_proc, desc=f"Rendering {name} dataset")
    left_out = count_values(mapped, "left_out")
    report_added_reasoning(sum(mapped.with_format("numpy")["added"]), f"turns of the {name} dataset")
    if left_out:
        report_left_out(left_out, f"turns of the {name} dataset")
        mapped = mapped.filter(**keep_rendered)
        if not len(mapped):
            raise ValueError(f"No turn of the {name} dataset is left to learn from: {describe_reasons(left_out)}.")
    return mapped.remove_columns(["left_out", "added"])


def count_values(dataset: Dataset, column: str) -> Counter[str]:
    """How often each value is in a column, without `None`."""
    counts = dataset.select_columns([column]).with_format("arrow")[:][column].value_counts().to_pylist()
    return Counter({pair["values"]: pair["counts"] for pair in counts if pair["values"] is not None})


def report_added_reasoning(count: int, what: str) -> None:
    """Logs one warning if the template added empty reasoning."""
    if count and accelerate.PartialState().is_main_process:
        logger.warning(
            "%d %s have no reasoning, and the chat template writes an empty one before them. If the target did reason "
            "and your data does not have it, the target wrote something else there: leave these rows out.",
            count,
            what,
        )


def report_left_out(reasons: Counter[str], what: str) -> None:
    """Logs one warning that counts what is left out, by reason."""
    if accelerate.PartialState().is_main_process:
        logger.warning("%d %s are left out: %s.", reasons.total(), what, describe_reasons(reasons))


def describe_reasons(reasons: Counter[str]) -> str:
    """Lists the reasons with their counts."""
    return "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common())


def _render_row(row: JsonObject, renderer: ChatRenderer, reasons: list[str], join_turns: bool) -> Iterator[Row]:
    texts = [isinstance(row[name], str) for name in ("prompt", "completion") if name in row]
    if texts == [True, True]:
        yield _start(renderer.render_text(row["prompt"], row["completion"]))
        return
    if any(texts):
        reasons.append("`prompt` and `completion` are not both text or both conversations")
        return
    if is_conversational_from_value(row):
        row = maybe_convert_to_chatml(row)
        row["messages"] = [{**m, "role": SPEAKERS.get(m["role"], m["role"])} for m in row["messages"]]
    messages, first = row.get("messages") or row.get("conversations"), 0
    if messages is None and not (row.get("prompt") and row.get("completion")):
        reasons.append(f"there is no {'completion' if row.get('prompt') else 'prompt'}")
        return
    if messages is None:
        messages, first = [*row["prompt"], *row["completion"]], len(row["prompt"])
    check_chat_template(renderer.processing_class)
    joined: Row | None = None
    for turn in _render_turns(messages, first, renderer, read_template_arguments(row), reasons):
        following = _start(turn)
        length = len(joined["input_ids"]) if joined else 0
        if joined and join_turns and turn.prompt_ids[:length] == joined["input_ids"]:
            following["labels"] = joined["labels"] + following["labels"][length:]
            following["added"] += joined["added"]
        elif joined:
            yield joined
        joined = following
    if joined:
        yield joined


def _render_turns(
    messages: Sequence[Message], first: int, renderer: ChatRenderer, arguments: Record, reasons: list[str]
) -> Iterator[Turn]:
    targets = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
    if not targets:
        roles = sorted({str(message["role"]) for message in messages[first:]})
        reasons.append(f"no message has the role 'assistant', only {roles}")
    if 0 in targets:
        reasons.append("a conversation begins with the assistant")
    for i in filter(None, targets):
        try:
            yield renderer.render_turn(messages[:i], messages[i], **arguments)
        except TurnNotRenderedError as error:
            reasons.append(str(error))


def _start(turn: Turn) -> Row:
    labels = [id if shown else IGNORED_LABEL for id, shown in zip(turn.completion_ids, turn.mask, strict=True)]
    return {
        "input_ids": turn.prompt_ids + turn.completion_ids,
        "labels": [IGNORED_LABEL] * len(turn.prompt_ids) + labels,
        "left_out": None,
        "added": int(turn.has_added_reasoning),
    }
