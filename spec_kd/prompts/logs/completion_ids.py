"""The completions of a log as token ids, for `score_completions` and for evaluation without the target."""

from collections.abc import Iterable

from datasets import Dataset, Features, List, Value
from jinja2 import TemplateError

from spec_kd.data.arrow_padding import remove_row_padding
from spec_kd.data.chat_rendering import ChatRenderer
from spec_kd.data.conversation_rows import (
    count_values,
    describe_reasons,
    report_added_reasoning,
    report_left_out,
)
from spec_kd.data.prompt_rendering import check_chat_template, read_template_arguments
from spec_kd.data.rendered_completion import TurnNotRenderedError
from spec_kd.open_types import JsonObject
from spec_kd.options import check_dataset
from spec_kd.vocabulary import ProcessingClass

COLUMNS = ("prompt", "completion")
LEFT_OUT, ADDED = "left_out", "added_reasoning"


def add_completion_ids(
    dataset: Dataset, processing_class: ProcessingClass, *, eos_token_id: int | Iterable[int] | None = None
) -> Dataset:
    """Adds `prompt_ids` and `completion_ids` to prompts with the target's completions.

    The prompt is rendered as for `generate_responses`. The completion is rendered as the last turn, with its reasoning,
    up to and including the end of turn. A server logs text and not ids, so these are the ids that the tokenizer gives
    to the text. They are nearly always the ids that the target wrote, but this is not certain.

    Args:
        dataset (`Dataset`): Rows with `prompt` and `completion` (messages), as [`load_query_logs`] returns them.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): The target's, with its chat template.
        eos_token_id (`int` or `Iterable[int]`, *optional*): Ids at which the target's server stops, as in its
            generation config. By default those of the tokenizer, of the chat template, and of the generation config
            that was saved with the tokenizer.

    Returns:
        `Dataset`: The rows with a completion, and the two columns (lists of int32). A warning says how many rows are
        left out and why: there is no completion, it has several messages, or the template does not print all of it.
        Another warning says for how many rows the template wrote an empty reasoning that the completion does not have.

    Raises:
        ValueError: A column is missing or holds text instead of messages, no row is left, or a prompt cannot be
            rendered.
    """
    check_dataset("dataset", dataset)
    missing = [name for name in COLUMNS if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"The dataset has the columns {dataset.column_names} and no `{missing[0]}`. Give a dataset with `prompt` "
            "and `completion`, as `load_query_logs` returns it."
        )
    check_chat_template(processing_class)
    renderer = ChatRenderer(processing_class, eos_token_id)
    features = dataset.features

    def add(row: JsonObject, index: int) -> JsonObject:
        row = remove_row_padding(row, features)
        for name in COLUMNS:
            if isinstance(row.get(name), str):
                raise ValueError(
                    f"`{name}` of row {index} is text, but messages are needed to render it as a server does. Make it "
                    'a list of `{"role": ..., "content": ...}`.'
                )
        prompt, completion = row.get("prompt") or [], row.get("completion") or []
        role = completion[0].get("role") if completion else None
        unusable = (
            (not completion, "there is no completion"),
            (len(completion) > 1, "the completion has several messages"),
            (role != "assistant", f"the completion has the role {role!r}"),
            (not prompt, "there is no prompt"),
            (prompt and prompt[-1].get("role") == "assistant", "the prompt ends with an assistant turn"),
        )
        if reason := next((reason for is_unusable, reason in unusable if is_unusable), None):
            return _leave_out(reason)
        try:
            turn = renderer.render_turn(prompt, completion[0], **read_template_arguments(row))
        except TurnNotRenderedError as error:
            return _leave_out(str(error))
        except (TemplateError, TypeError, KeyError) as error:
            raise ValueError(
                f"The chat template cannot render row {index} ({error}). Correct the row or leave it out."
            ) from error
        ids = {"prompt_ids": turn.prompt_ids, "completion_ids": turn.completion_ids}
        return {**ids, LEFT_OUT: None, ADDED: turn.has_added_reasoning}

    ids = List(Value("int32"))
    added = dataset.map(
        add,
        with_indices=True,
        features=Features(
            {**features, "prompt_ids": ids, "completion_ids": ids, LEFT_OUT: Value("string"), ADDED: Value("bool")}
        ),
        desc="Completion ids",
    )
    left_out = count_values(added, LEFT_OUT)
    report_added_reasoning(sum(added[ADDED]), "completions")
    if left_out.total() == len(dataset):
        raise ValueError(
            f"No row has a completion that can be rendered: nothing is left. {describe_reasons(left_out)}."
        )
    if left_out:
        report_left_out(left_out, f"of {len(dataset)} rows")
        added = added.filter(lambda reason: reason is None, input_columns=[LEFT_OUT])
    return added.remove_columns([LEFT_OUT, ADDED])


def _leave_out(reason: str) -> JsonObject:
    return {"prompt_ids": None, "completion_ids": None, LEFT_OUT: reason, ADDED: False}
