"""Writers of completions: all that online distillation reads of one, and the draft, the target or both as writers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel
from transformers.generation import ContinuousBatchingConfig

from spec_kd.decoding.ragged_model import RaggedModel
from spec_kd.engines.base import Completion
from spec_kd.heads import count_rows, evaluation_mode, find_input_device
from spec_kd.open_types import JsonObject
from spec_kd.probes import group_for_generation
from spec_kd.sampling.generation import RowGenerators, cut_after_eos, derive_seed, find_special_ids, generate_batch
from spec_kd.sampling.options import SamplingOptions
from spec_kd.trainer.online.rows import join_row
from spec_kd.vocabulary import ProcessingClass, VocabularyMismatchError, count_real_ids

SOURCES = ("draft", "target", "mixed")


class CompletionWriter(Protocol):
    """Writes the completions that an online run trains on."""

    @property
    def roles(self) -> tuple[str, ...]:
        """The models that `write` needs: `"draft"`, `"target"`, both, or none."""

    def write(
        self,
        models: Mapping[str, PreTrainedModel],
        prompts: Sequence[list[int]],
        seed: str,
        numbers: Sequence[int] | None = None,
    ) -> Sequence[Completion]:
        """Writes one completion for each prompt, in the order of the prompts.

        All processes call it together, each with prompts of its own. Modes, generation configs and the global random
        state of the models are left as they were, and no gradient is recorded.

        Args:
            models (`Mapping[str, PreTrainedModel]`): The models of `roles`, not wrapped.
            prompts (`Sequence[list[int]]`): Ids of each prompt, at least one id each; there may be no prompts.
            seed (`str`): Sampling seed, the same on all processes.
            numbers (`Sequence[int]`, *optional*):
                Number of each prompt among those of all processes; its index by default. All random numbers follow
                from the seed and the numbers.
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


@contextmanager
def seeded(seed: str, device: torch.device) -> Iterator[None]:
    """Seeds the global random state inside, for writers that sample from it, and restores it afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(seed))
        yield


@dataclass(frozen=True)
class ModelWriter(CompletionWriter):
    """Writes completions with the models of the run, by transformers' `generate`.

    The generation configs of the models are not read, except for their EOS ids, which end a completion as the
    tokenizer's does. Ids beyond the tokenizer's vocabulary are never written.

    Args:
        options (`SamplingOptions`): Temperature, top-k, top-p, length.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): Gives the vocabulary and an EOS.
        batch_size (`int`, *optional*): Prompts at a time, of similar lengths; all at once by default.
        sample_from (`str`, *optional*, defaults to `"draft"`): One of `SOURCES`.
        mix (`float`, *optional*, defaults to `0.5`): Probability that a token is the draft's, with `"mixed"`.
    """

    options: SamplingOptions
    processing_class: ProcessingClass
    batch_size: int | None = None
    sample_from: str = "draft"
    mix: float = 0.5

    @property
    def roles(self) -> tuple[str, ...]:
        """As [`CompletionWriter.roles`]."""
        return ("draft", "target") if self.sample_from == "mixed" else (self.sample_from,)

    def write(
        self,
        models: Mapping[str, PreTrainedModel],
        prompts: Sequence[list[int]],
        seed: str,
        numbers: Sequence[int] | None = None,
    ) -> list[Completion]:
        """As [`CompletionWriter.write`]; what a prompt draws does not depend on the others."""
        seeds = [f"{seed}:{number}" for number in numbers or range(len(prompts))]
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        size = self.batch_size or len(prompts) or 1
        written: dict[int, Completion] = {}
        for first in range(0, len(order), size):
            batch = order[first : first + size]
            for group in group_for_generation(models[self.roles[0]], [prompts[i] for i in batch]):
                rows = [batch[i] for i in group]
                completions = self._write_batch(models, [prompts[i] for i in rows], [seeds[i] for i in rows])
                written |= dict(zip(rows, completions, strict=True))
        return [written[i] for i in range(len(prompts))]

    def _write_batch(
        self, models: Mapping[str, PreTrainedModel], prompts: list[list[int]], seeds: list[str]
    ) -> list[Completion]:
        writers = [models[name] for name in self.roles]
        special = [find_special_ids(writer, self.processing_class) for writer in writers]
        eos_ids, pad_id = sorted({eos for ids, _ in special for eos in ids}), special[0][1]
        vocab_size = count_real_ids(self.processing_class)
        mixing: list[LogitsProcessor] = []
        if len(writers) == 2:
            device, longest = find_input_device(writers[0]), max(map(len, prompts))
            padding = torch.tensor([longest - len(ids) for ids in prompts], device=device)  # (B,)
            other = RaggedModel(writers[1], padding, vocab_size, device)
            mixing = [_MixedScores(other, self.mix, RowGenerators([f"{seed}:mix" for seed in seeds]))]
        with evaluation_mode(*writers):
            written = generate_batch(
                writers[0],
                prompts,
                self.options,
                eos_ids=eos_ids,
                pad_id=pad_id,
                vocab_size=vocab_size,
                seed=seeds,
                on_logits=mixing,
            )  # (B, T)
        return [Completion(*cut_after_eos(ids, eos_ids)) for ids in written.tolist()]


class _MixedScores(LogitsProcessor):
    """Replaces the scores of one model by another's in random rows, so that each token is drawn from one of the two."""

    def __init__(self, other: RaggedModel, mix: float, generators: RowGenerators):
        self._other, self._mix, self._generators = other, mix, generators
        self._has_read_prompts = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        other = self._other.read(input_ids[:, -1:] if self._has_read_prompts else input_ids)[:, 0]  # (B, real ids)
        self._has_read_prompts = True
        is_own = self._generators.draw(scores.device) < self._mix  # (B, 1)
        scores[:, : other.shape[1]] = torch.where(is_own, scores[:, : other.shape[1]], other)  # (B, V)
        return scores


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

    def write(
        self,
        models: Mapping[str, PreTrainedModel],
        prompts: Sequence[list[int]],
        seed: str,
        numbers: Sequence[int] | None = None,
    ) -> list[Completion]:
        """As [`CompletionWriter.write`]; transformers samples all prompts from one generator.

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
        with evaluation_mode(writer), seeded(f"{seed}:{numbers}", find_input_device(writer)):
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
