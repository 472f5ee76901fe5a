"""A trainer that can generate completions: for training, and for evaluation sets of prompts alone."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from transformers import PreTrainedModel

from spec_kd.engines.base import Completion
from spec_kd.heads import unwrap_peft
from spec_kd.open_types import Argument, JsonObject
from spec_kd.sharding import whole_model
from spec_kd.trainer.arguments import EvalDataset
from spec_kd.trainer.online.online_gkd_config import OnlineGKDConfig
from spec_kd.trainer.online.rows import complete_evaluation_prompts, find_prompt, read_rows
from spec_kd.trainer.online.writers import CompletionWriter
from spec_kd.trainer.white_box_distill_trainer import WhiteBoxDistillTrainer


class GeneratingTrainer(WhiteBoxDistillTrainer):
    """The base class of [`OnlineGKDTrainer`]: a white-box trainer with a writer of completions.

    Sampling during an evaluation follows from the seed and the number of the example, so two evaluations differ by the
    models alone.
    """

    args: OnlineGKDConfig
    _writer: CompletionWriter
    _evaluates_prompts = False
    _writes_completions = False
    _num_evaluated_batches = 0

    def evaluate(
        self, eval_dataset: EvalDataset | str | None = None, *args: Argument, **kwargs: Argument
    ) -> dict[str, float]:
        """As `SFTTrainer.evaluate`; a dataset may have prompts only."""
        if self._writes_completions:  # one of several sets, which are prepared already
            return super().evaluate(eval_dataset, *args, **kwargs)
        writes = self._evaluates_prompts
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset, writes = complete_evaluation_prompts(
                eval_dataset, self.processing_class, self.args.lmbda, self.args.mode
            )
        self._writes_completions, self._num_evaluated_batches = writes, 0
        try:
            return super().evaluate(eval_dataset, *args, **kwargs)
        finally:
            self._writes_completions = False

    def prediction_step(
        self, model: torch.nn.Module, inputs: JsonObject, *args: Argument, **kwargs: Argument
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """As `SFTTrainer.prediction_step`, of completions that are generated if the dataset has prompts only."""
        if self._writes_completions:
            number = self._num_evaluated_batches
            self._num_evaluated_batches += 1
            rows = read_rows(inputs)
            prompts = [find_prompt(row, f"Row {i} of evaluation batch {number}") for i, row in enumerate(rows)]
            first = (number * self.args.world_size + self.args.process_index) * self.args.eval_batch_size
            numbers = [first + row for row in range(len(prompts))]
            completions = self._write(prompts, f"{self.args.seed}:evaluation", numbers)
            inputs = self.data_collator(list(map(self._writer.make_row, prompts, completions)))
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _write(self, prompts: list[list[int]], seed: str, numbers: list[int]) -> Sequence[Completion]:
        # entered without prompts too: under ZeRO-3 and FSDP2 all processes gather the parameters together
        with self._whole_models() as models:
            return self._writer.write(models, prompts, seed, numbers)

    @contextmanager
    def _whole_models(self) -> Iterator[dict[str, PreTrainedModel]]:
        """The models that write, unwrapped and with all their parameters, without gradient checkpointing."""
        wrapped: dict[str, Argument] = {"draft": self.model_wrapped, "target": self._teacher.model}
        options: JsonObject = {"gradient_checkpointing_kwargs": self.args.gradient_checkpointing_kwargs}
        with ExitStack() as stack:
            yield {
                name: unwrap_peft(stack.enter_context(whole_model(wrapped[name], self.accelerator, **options)))
                for name in self._writer.roles
            }
