"""All that online distillation reads of whoever writes its completions: a model, vLLM, or a server of requests."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from transformers import PreTrainedModel

from spec_kd.engines.base import Completion
from spec_kd.open_types import JsonObject
from spec_kd.trainer.online.generated_rows import join_row


class CompletionWriter(Protocol):
    """Writes the completions that an online run trains on."""

    @property
    def roles(self) -> tuple[str, ...]:
        """The models that `write` needs: `"draft"`, `"target"`, both, or none."""

    def write(
        self, models: Mapping[str, PreTrainedModel], prompts: Sequence[list[int]], seed: str
    ) -> Sequence[Completion]:
        """Writes one completion for each prompt, in the order of the prompts.

        All processes call it together, each with prompts of its own. Modes, generation configs and the global random
        state of the models are left as they were, and no gradient is recorded.

        Args:
            models (`Mapping[str, PreTrainedModel]`): The models of `roles`, not wrapped.
            prompts (`Sequence[list[int]]`): Ids of each prompt, at least one id each; there may be no prompts.
            seed (`str`): Sampling seed; all random numbers follow from it and from the batches.
        """

    def make_row(self, prompt: list[int], completion: Completion) -> JsonObject:
        """A training row of a prompt and its completion; by default with the loss on the whole completion."""
        return join_row(prompt, completion.ids)

    def count(self, completions: Sequence[Completion]) -> dict[str, int]:
        """Counts for the metrics, which are summed over processes: always completions, their tokens, those cut off."""
        return {
            "completions": len(completions),
            "tokens": sum(len(completion.ids) for completion in completions),
            "clipped": sum(completion.finish_reason == "length" for completion in completions),
        }

    def to_metrics(self, total: Mapping[str, int]) -> dict[str, float]:
        """Metrics of at least one completion, from the summed counts of all processes."""
        return {
            "completions/mean_length": total["tokens"] / total["completions"],
            "completions/clipped_ratio": total["clipped"] / total["completions"],
        }
