"""Datasets of prompts alone, whose completions are generated during the run."""

from collections.abc import Mapping

from datasets import Dataset

from spec_kd.data.arrow_padding import remove_row_padding
from spec_kd.data.prompt_rendering import prepare_prompts, render_prompt_ids
from spec_kd.data.training_rows import ACCEPTED_COLUMNS
from spec_kd.open_types import JsonObject
from spec_kd.trainer.training_data import AnyDataset, EvalDataset, find_columns
from spec_kd.vocabulary import ProcessingClass


def is_prompts_only(dataset: AnyDataset) -> bool:
    """Whether the rows have prompts and no completions."""
    columns = set(next(iter(dataset), {}))
    has_completions = any(set(accepted) <= columns for accepted in ACCEPTED_COLUMNS)
    return bool({"prompt", "prompt_ids"} & columns) and not has_completions


def add_placeholders(dataset: AnyDataset, processing_class: ProcessingClass) -> AnyDataset:
    """Prompts as `prompt_ids` with a `completion_ids` of one token, which is replaced before it is read.

    Args:
        dataset (`Dataset` or `IterableDataset`): Rows with `prompt` or `prompt_ids`.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): Renders the prompts.

    Raises:
        ValueError: As [`~spec_kd.data.prompt_rendering.render_prompt_ids`]; for a stream when it reaches that row.
    """

    def make_row(ids: list[int]) -> dict[str, list[int]]:
        return {"prompt_ids": ids, "completion_ids": ids[-1:]}

    if isinstance(dataset, Dataset):
        _, rows = prepare_prompts(dataset)
        return Dataset.from_list([make_row(ids) for ids in render_prompt_ids(rows, processing_class)])

    def render(row: JsonObject) -> dict[str, list[int]]:
        return make_row(next(render_prompt_ids([remove_row_padding(row, dataset.features)], processing_class)))

    return dataset.map(render, remove_columns=list(find_columns(dataset)))


def complete_evaluation_prompts(
    eval_dataset: EvalDataset | None, processing_class: ProcessingClass, lmbda: float, mode: str
) -> EvalDataset | None:
    """Evaluation data with a placeholder for each completion, or `None` if it has completions.

    Args:
        eval_dataset (`Dataset`, `IterableDataset` or a dictionary of them, *optional*): Evaluation data.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): Renders the prompts.
        lmbda (`float`), mode (`str`): Options of the run.

    Raises:
        ValueError: If only some of the sets have prompts alone, or if nothing would write their completions.
    """
    sets = eval_dataset if isinstance(eval_dataset, Mapping) else {"evaluation": eval_dataset}
    bare = [name for name, dataset in sets.items() if dataset is not None and is_prompts_only(dataset)]
    if not bare:
        return None
    if len(bare) < len(sets):
        raise ValueError(
            f"The evaluation sets {bare} have prompts only and the others have completions. Evaluate them one by one."
        )
    if mode != "on_policy" or lmbda == 0:
        raise ValueError(
            f"The evaluation dataset has prompts only, and nothing writes their completions with `mode={mode!r}` and "
            f"`lmbda={lmbda}`. Write them with `spec_kd.generate_responses(target, prompts)`."
        )
    prepared = {name: add_placeholders(dataset, processing_class) for name, dataset in sets.items()}
    return prepared if isinstance(eval_dataset, Mapping) else prepared["evaluation"]
