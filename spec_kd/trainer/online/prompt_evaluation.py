"""Evaluation on prompts alone: the completions are written as they are in training."""

from collections.abc import Mapping
from typing import Any

from spec_kd.open_types import Argument, JsonObject
from spec_kd.trainer.online.on_policy import add_placeholders, find_prompt, is_prompts_only, read_rows
from spec_kd.vocabulary import ProcessingClass


def prepare_prompts_only(eval_dataset: Any, processing_class: ProcessingClass, lmbda: float, mode: str) -> Any:
    """Evaluation data with a placeholder for each completion, or `None` if it has completions.

    Args:
        eval_dataset (`Dataset`, `IterableDataset` or a dictionary of them, *optional*): Evaluation data.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): Renders the prompts.
        lmbda (`float`), mode (`str`): Of the configuration.

    Raises:
        ValueError: If only some of the sets have prompts alone, or nothing writes completions on policy.
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


class PromptEvaluation:
    """Of an online trainer: generates the completions of evaluation sets that have none, batch by batch.

    What is sampled follows from the seed and the number of the batch, so two evaluations differ by the models alone.
    """

    _evaluates_prompts = False
    _writes_completions = False
    _num_evaluated_batches = 0

    def evaluate(self, eval_dataset: Any = None, *args: Argument, **kwargs: Argument) -> dict[str, float]:
        """As `SFTTrainer.evaluate`; a dataset may have prompts only."""
        if self._writes_completions:  # one of several sets, prepared before
            return super().evaluate(eval_dataset, *args, **kwargs)
        writes = self._evaluates_prompts
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            prepared = prepare_prompts_only(eval_dataset, self.processing_class, self.args.lmbda, self.args.mode)
            writes = prepared is not None
            eval_dataset = eval_dataset if prepared is None else prepared
        self._writes_completions, self._num_evaluated_batches = writes, 0
        try:
            return super().evaluate(eval_dataset, *args, **kwargs)
        finally:
            self._writes_completions = False

    def prediction_step(self, model: Any, inputs: JsonObject, *args: Argument, **kwargs: Argument) -> tuple:
        """As `SFTTrainer.prediction_step`."""
        if self._writes_completions:
            inputs = self._write_completions(inputs)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _write_completions(self, batch: JsonObject) -> JsonObject:
        number = self._num_evaluated_batches
        self._num_evaluated_batches += 1
        prompts = [find_prompt(row, f"Row {i} of evaluation batch {number}") for i, row in enumerate(read_rows(batch))]
        with self._whole_models() as models:
            completions = self._source.write(
                models, prompts, f"{self.args.seed}:evaluation:{number}:{self.args.process_index}"
            )
        rows = [self._source.make_row(*pair) for pair in zip(prompts, completions, strict=True)]
        return self.data_collator(rows)
