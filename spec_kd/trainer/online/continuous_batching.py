"""Completions by transformers' continuous batching over a paged cache: a finished one makes room for the next."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import ContinuousBatchingConfig

from spec_kd.engines.base import Completion
from spec_kd.heads import count_rows, evaluation_mode, find_input_device
from spec_kd.sampling.generation import cut_after_eos, find_special_ids
from spec_kd.trainer.online.model_writer import ModelWriter, seeded
from spec_kd.vocabulary import VocabularyMismatchError, count_real_ids


@dataclass(frozen=True, kw_only=True)
class ContinuousBatchingWriter(ModelWriter):
    """[`ModelWriter`] of one model, which runs `generate_batch` on all prompts at a time.

    Args:
        config (`ContinuousBatchingConfig`): Options of the cache and the scheduler.
    """

    config: ContinuousBatchingConfig

    def check(self, model: PreTrainedModel) -> None:
        """Raises `VocabularyMismatchError` for a model with more rows than ids: the others cannot be ruled out here."""
        rows, ids = count_rows(model.get_output_embeddings()), count_real_ids(self.processing_class)
        if rows > ids:
            raise VocabularyMismatchError(
                f"The head of the model that writes has {rows} rows but the tokenizer has {ids} ids, and continuous "
                "batching cannot rule the rest out. Set `use_transformers_continuous_batching=False`."
            )

    def write(self, models: Mapping[str, PreTrainedModel], prompts: Sequence[list[int]], seed: str) -> list[Completion]:
        """As [`ModelWriter.write`].

        Raises:
            RuntimeError: If transformers returns fewer completions than prompts.
        """
        if not prompts:
            return []
        writer, options = models[self.roles[0]], self.options
        eos_ids, pad_id = find_special_ids(writer, self.processing_class)
        sampling = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
        generation_config = GenerationConfig(
            do_sample=options.temperature > 0,
            **(sampling if options.temperature > 0 else {}),
            max_new_tokens=options.max_new_tokens,
            eos_token_id=eos_ids,
            pad_token_id=pad_id,
        )
        with evaluation_mode(writer), seeded(seed, find_input_device(writer)):
            outputs = writer.generate_batch(  # type: ignore[operator]  # declared as a tensor
                [list(ids) for ids in prompts],
                generation_config=generation_config,
                continuous_batching_config=self.config,
                progress_bar=False,
            )
        written = [output.generated_tokens for output in outputs.values()]
        if len(written) != len(prompts) or not all(written):
            raise RuntimeError(
                f"Continuous batching returned {sum(map(bool, written))} completions for {len(prompts)} prompts. Its "
                "log says why. Give it more room with `transformers_continuous_batching_config`, or switch it off."
            )
        return [Completion(*cut_after_eos(ids, eos_ids)) for ids in written]
