"""The answers of a log as ids, for what needs them: `score_completions`, evaluation without the target."""

import logging

from datasets import Dataset, Features, List, Value

from spec_kd.data.prompts import drop_none, render_prompt_ids
from spec_kd.vocabulary import ProcessingClass, get_tokenizer

logger = logging.getLogger(__name__)


def add_completion_ids(dataset: Dataset, processing_class: ProcessingClass) -> Dataset:
    """Adds `prompt_ids` and `completion_ids` to prompts with the target's answers.

    The prompt is rendered as for `generate_responses`; of the conversation with the answer, what comes behind it up to
    the EOS is the completion. A server logs text and not ids, so that these are the ids that the tokenizer gives to the
    text, which are nearly always but not surely those that the target wrote.

    Args:
        dataset (`Dataset`): With `prompt` and `completion`, as [`load_query_logs`] returns them.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): The target's, with its chat template.

    Returns:
        `Dataset`: The rows with an answer and both columns (lists of int32). A warning counts the others, and those
        whose answer the template does not render behind the prompt.

    Raises:
        `ValueError`: No `completion` column, or no row is left; a prompt that cannot be rendered.
    """
    if "completion" not in dataset.column_names:
        raise ValueError(
            f"The data set has the columns {dataset.column_names} and no `completion`: no answer was logged."
        )
    tokenizer = get_tokenizer(processing_class)

    def add(row: dict) -> dict:
        row = drop_none(row)
        if not row.get("completion"):
            return {"prompt_ids": None, "completion_ids": None}
        prompt_ids = next(render_prompt_ids([row], processing_class))
        # rendered with a turn of the user behind it, an answer is part of a prompt; that turn is cut away with the EOS
        conversation = [*row["prompt"], *row["completion"], {"role": "user", "content": "-"}]
        ids = next(render_prompt_ids([{**row, "prompt": conversation}], processing_class))
        if ids[: len(prompt_ids)] != prompt_ids or tokenizer.eos_token_id not in ids[len(prompt_ids) :]:
            return {"prompt_ids": None, "completion_ids": None}
        end = ids.index(tokenizer.eos_token_id, len(prompt_ids)) + 1
        return {"prompt_ids": prompt_ids, "completion_ids": ids[len(prompt_ids) : end]}

    ids = List(Value("int32"))
    features = Features({**dataset.features, "prompt_ids": ids, "completion_ids": ids})
    added = dataset.map(add, features=features, desc="Completion ids")
    kept = added.filter(lambda ids: ids is not None, input_columns=["completion_ids"])
    if len(kept) < len(added):
        logger.warning(
            "%d of %d rows have no answer that can be rendered and are left out.", len(added) - len(kept), len(added)
        )
    if not len(kept):
        raise ValueError("No row has an answer that can be rendered behind its prompt: nothing is left.")
    return kept
