"""Learning from served requests: speculative decoding whose own target passes are the teacher.

Online Speculative Decoding (Liu et al., arXiv 2310.07177): requests are served with the current draft. Verifying its
tokens gives the target's distribution at every token written, and shows where the target corrected the draft. The
draft learns from that, and the improved draft serves the next requests.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from spec_kd.data.teacher_signal import TeacherInfo, pack_sparse, split_tokens, unpack_sparse
from spec_kd.data.token_columns import LOGPROB_COLUMN, SPARSE_COLUMN, TOKEN_COLUMNS
from spec_kd.data.training_rows import IGNORED_LABEL
from spec_kd.decoding import Round, generate_speculatively
from spec_kd.decoding.speculative import CompletionInProgress
from spec_kd.engines.base import Completion
from spec_kd.engines.transformers import SparseRecorder, stack_sparse
from spec_kd.losses import SparseDistribution
from spec_kd.open_types import Argument, JsonObject
from spec_kd.sampling.generation import derive_seed, find_special_ids
from spec_kd.sampling.options import SamplingOptions
from spec_kd.trainer.online.options import StreamingOptions
from spec_kd.trainer.online.writers import CompletionWriter
from spec_kd.vocabulary import ProcessingClass


@dataclass(frozen=True)
class ServedCompletion(Completion):
    """A completion that speculative decoding wrote.

    Args:
        rounds (`Sequence[Round]`): Every target call.
        rejected_positions (`Sequence[int]`): Positions at which the target replaced the drafted token.
    """

    rounds: Sequence[Round] = ()
    rejected_positions: Sequence[int] = ()


@dataclass(frozen=True)
class RequestServer(CompletionWriter):
    """Serves requests by speculative decoding, and makes training rows of what serving showed.

    Args:
        options (`SamplingOptions`): Temperature and length.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): Gives the vocabulary and an EOS.
        batch_size (`int`, *optional*): Requests served at a time; `None` for all at once.
        info (`TeacherInfo`): What is kept of the target's distribution, and at which temperature.
        streaming (`StreamingOptions`): How drafting works, and which tokens are trained on.
    """

    options: SamplingOptions
    processing_class: ProcessingClass
    batch_size: int | None
    info: TeacherInfo
    streaming: StreamingOptions

    roles = ("draft", "target")

    def write(
        self,
        models: Mapping[str, PreTrainedModel],
        prompts: Sequence[list[int]],
        seed: str,
        numbers: Sequence[int] | None = None,
    ) -> list[ServedCompletion]:
        """As [`CompletionWriter.write`], with the target's signal of every token."""
        if not prompts:
            return []
        seed = f"{seed}:{numbers}"
        recorder = SparseRecorder(self.info.signal, self.info.vocab_size, derive_seed(f"{seed}:slots"))
        keeper = _SignalKeeper(len(prompts), recorder, self.info.logprobs_temperature)
        eos_ids, _ = find_special_ids(models["target"], self.processing_class)
        served = generate_speculatively(
            models["target"],
            models["draft"],
            prompts,
            temperature=self.options.temperature,
            num_assistant_tokens=self.streaming.num_assistant_tokens,
            max_new_tokens=self.options.max_new_tokens,
            eos_token_id=sorted(eos_ids),
            vocab_size=self.info.vocab_size,
            draft_sampling=self.streaming.draft_sampling,
            batch_size=self.batch_size or len(prompts),
            seed=derive_seed(seed),
            observe=keeper,
        )
        return [
            ServedCompletion(
                ids=ids,
                finish_reason="stop" if ids[-1] in eos_ids else "length",
                token_logprobs=keeper.logprobs[i],
                sparse=stack_sparse(keeper.sparse[i]),
                rounds=served.rounds[i],
                rejected_positions=served.rejected_positions[i],
            )
            for i, ids in enumerate(served.completion_ids)
        ]

    def make_row(  # type: ignore[override]  # it gets what its own `write` returned
        self, prompt: list[int], completion: ServedCompletion
    ) -> JsonObject:
        """A training row with the loss at the trained positions, and the target's signal at every token written."""
        trains_all, rejected = self.streaming.trained_positions == "all", set(completion.rejected_positions)
        labels = [id if trains_all or i in rejected else IGNORED_LABEL for i, id in enumerate(completion.ids)]
        name, entries = LOGPROB_COLUMN, list[Argument](completion.token_logprobs or ())
        if completion.sparse is not None:  # packed and unpacked, so that a signal is rounded as in a dataset
            content = pack_sparse(completion.sparse, self.info)
            name, entries = SPARSE_COLUMN, split_tokens(*unpack_sparse(content, len(completion.ids), self.info))
        return {
            "input_ids": prompt + completion.ids,
            "labels": [IGNORED_LABEL] * len(prompt) + labels,
            name: [TOKEN_COLUMNS[name]] * len(prompt) + entries,
        }

    def count(  # type: ignore[override]  # as `make_row`
        self, completions: Sequence[ServedCompletion]
    ) -> dict[str, int]:
        """As [`CompletionWriter.count`], and the rounds with their drafted, accepted and rejected tokens."""
        rounds = [record for completion in completions for record in completion.rounds]
        return super().count(completions) | {
            "rounds": len(rounds),
            "drafted": sum(record.drafted for record in rounds),
            "accepted": sum(record.accepted for record in rounds),
            "rejected": sum(len(completion.rejected_positions) for completion in completions),
        }

    def to_metrics(self, total: Mapping[str, int]) -> dict[str, float]:
        """As [`CompletionWriter.to_metrics`], and the acceptance of the draft as it served."""
        return super().to_metrics(total) | {
            "stream/block_efficiency": total["tokens"] / total["rounds"],
            "stream/acceptance_rate": total["accepted"] / max(total["drafted"], 1),
            "stream/rejected_share": total["rejected"] / total["tokens"],
        }


class _SignalKeeper:
    """Reduces the target's logits to the signal pass by pass, so that no more than one pass is held in memory."""

    def __init__(self, num_completions: int, recorder: SparseRecorder, temperature: float):
        self._recorder, self._temperature = recorder, temperature
        self.logprobs: list[list[float]] = [[] for _ in range(num_completions)]
        self.sparse: list[list[SparseDistribution | None]] = [[] for _ in range(num_completions)]

    def __call__(self, written: Sequence[CompletionInProgress], logits: torch.Tensor) -> None:
        counts = [completion.rounds[-1].emitted for completion in written]
        ids = [token for completion, count in zip(written, counts, strict=True) for token in completion.ids[-count:]]
        scores = torch.cat([row[:count] for row, count in zip(logits, counts, strict=True)])  # (n, V)
        logprobs, sparse = self._recorder.reduce(scores / self._temperature, torch.tensor(ids, device=scores.device))
        first = 0
        for completion, count in zip(written, counts, strict=True):
            part = slice(first, first + count)
            self.logprobs[completion.index] += logprobs[part].tolist()
            self.sparse[completion.index].append(sparse if sparse is None else sparse.cut(part))
            first += count
