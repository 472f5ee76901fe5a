"""Learning from served requests: speculative decoding whose own target passes are the teacher.

Online Speculative Decoding (Liu et al., arXiv 2310.07177): requests are served with the draft as it is; what the target
thought of every token it wrote is known from verifying, and where it corrected the draft as well. The draft learns from
that, and the next requests are served with the draft that has learnt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from spec_kd._private import get_config_model_id
from spec_kd.data.teacher_signal import TeacherInfo, pack_sparse, split_tokens, unpack_sparse
from spec_kd.data.token_columns import LOGPROB_COLUMN, SPARSE_COLUMN, TOKEN_COLUMNS
from spec_kd.data.training_rows import IGNORED_LABEL
from spec_kd.decoding import Round, generate_speculatively
from spec_kd.decoding.rounds import CompletionInProgress
from spec_kd.engines.base import Completion, SignalSpec, SparseDistribution, derive_seed
from spec_kd.engines.sparse_recorder import SparseRecorder, complete_request, stack_sparse
from spec_kd.engines.transformers import SEED_BITS, find_special_ids
from spec_kd.open_types import JsonObject
from spec_kd.sampling.options import SamplingOptions
from spec_kd.trainer.teachers.live import LiveTargets, LiveTeacher
from spec_kd.trainer.teachers.stored import StoredTargets, StoredTeacher
from spec_kd.vocabulary import ProcessingClass, count_real_ids, fingerprint_tokenizer

TRAINED_POSITIONS = ("rejected", "all")


@dataclass(frozen=True)
class ServedCompletion(Completion):
    """A completion that speculative decoding wrote.

    Args:
        rounds (`list[Round]`): Every target call.
        rejected_positions (`list[int]`): Where the target wrote another token than the one drafted.
    """

    rounds: Sequence[Round] = ()
    rejected_positions: Sequence[int] = ()


@dataclass(frozen=True)
class RequestServer:
    """Serves requests, and makes training rows of what serving showed.

    Args:
        options (`SamplingOptions`): Temperature and length.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): Of the vocabulary and an EOS.
        info (`TeacherInfo`): What is kept of the target's distribution, and at which temperature.
        num_assistant_tokens (`int`): Tokens drafted in a round.
        draft_sampling (`str`): As for `generate_speculatively`.
        trained_positions (`str`): One of `TRAINED_POSITIONS`.
        batch_size (`int`, *optional*): Requests served at a time; all at once by default.
    """

    options: SamplingOptions
    processing_class: ProcessingClass
    info: TeacherInfo
    num_assistant_tokens: int
    draft_sampling: str
    trained_positions: str
    batch_size: int | None = None
    writers: tuple[str, ...] = ("draft", "target")

    def write(
        self, models: dict[str, PreTrainedModel], prompts: Sequence[list[int]], seed: str
    ) -> list[ServedCompletion]:
        """Serves prompts with speculative decoding: one completion each, with the target's signal of every token.

        Args:
            models (`dict[str, PreTrainedModel]`): `"draft"` and `"target"`, not wrapped.
            prompts (`Sequence[list[int]]`): Ids of each prompt, at least one of each.
            seed (`str`): All that is random follows from it and from the batches.
        """
        if not prompts:
            return []
        recorder = SparseRecorder(self.info.request, self.info.vocab_size, derive_seed(f"{seed}:slots", SEED_BITS))
        keeper = _SignalKeeper(len(prompts), recorder, self.info.logprobs_temperature)
        eos_ids, _ = find_special_ids(models["target"], self.processing_class)
        served = generate_speculatively(
            models["target"],
            models["draft"],
            prompts,
            temperature=self.options.temperature,
            num_assistant_tokens=self.num_assistant_tokens,
            max_new_tokens=self.options.max_new_tokens,
            eos_token_id=sorted(eos_ids),
            vocab_size=self.info.vocab_size,
            draft_sampling=self.draft_sampling,
            batch_size=self.batch_size or len(prompts),
            seed=derive_seed(seed, SEED_BITS),
            observe=keeper,
        )
        return [
            ServedCompletion(
                ids=ids,
                finish_reason="stop" if ids[-1] in eos_ids else "length",
                token_logprobs=keeper.logprobs[i],
                slots=stack_sparse(keeper.slots[i]),
                rounds=served.rounds[i],
                rejected_positions=served.rejected_positions[i],
            )
            for i, ids in enumerate(served.completion_ids)
        ]

    def make_row(self, prompt: list[int], completion: ServedCompletion) -> dict[str, list[Any]]:
        """A training row: the loss at the positions to be trained, and the target's signal at every token written."""
        if self.trained_positions == "all":
            labels = list(completion.ids)
        else:
            labels = [IGNORED_LABEL] * len(completion.ids)
            for position in completion.rejected_positions:
                labels[position] = completion.ids[position]
        if self.info.method == "token_only":
            name, entries = LOGPROB_COLUMN, completion.token_logprobs
        else:  # by way of the bytes of a dataset, so that a signal is rounded here as it is there
            content = pack_sparse(completion.slots, self.info)
            name, entries = SPARSE_COLUMN, split_tokens(*unpack_sparse(content, len(completion.ids), self.info))
        return {
            "input_ids": prompt + completion.ids,
            "labels": [IGNORED_LABEL] * len(prompt) + labels,
            name: [TOKEN_COLUMNS[name]] * len(prompt) + list(entries),
        }


class _SignalKeeper:
    """Reduces the target's logits to the signal, pass by pass: no more than one pass's are held."""

    def __init__(self, num_texts: int, recorder: SparseRecorder, temperature: float):
        self._recorder, self._temperature = recorder, temperature
        self.logprobs: list[list[float]] = [[] for _ in range(num_texts)]
        self.slots: list[list[SparseDistribution | None]] = [[] for _ in range(num_texts)]

    def __call__(self, texts: Sequence[CompletionInProgress], logits: torch.Tensor) -> None:
        counts = [text.rounds[-1].emitted for text in texts]
        written = [token for text, count in zip(texts, counts, strict=True) for token in text.ids[-count:]]
        scores = torch.cat([row[:count] for row, count in zip(logits, counts, strict=True)])  # (n, V)
        tokens = torch.tensor(written, device=scores.device)
        logprobs, slots = self._recorder.reduce(scores / self._temperature, tokens)
        first = 0
        for text, count in zip(texts, counts, strict=True):
            part = slice(first, first + count)
            self.logprobs[text.index] += logprobs[part].tolist()
            self.slots[text.index].append(slots if slots is None else slots.cut(part))
            first += count


class ServedTeacher(StoredTeacher):
    """Of served text, the signal that serving left; of any other (an evaluation set), the live target.

    Args:
        info (`TeacherInfo`): Of the signal.
        live (`LiveTeacher`): The target.
    """

    def __init__(self, info: TeacherInfo, live: LiveTeacher):
        super().__init__(info)
        self._live = live
        self.model = live.model

    def compute_signal(self, inputs: JsonObject) -> StoredTargets | LiveTargets:
        """Takes the columns out of `inputs`, or runs the target over them where they have none."""
        has_columns = any(name in inputs for name in self.tensor_names)
        return super().compute_signal(inputs) if has_columns else self._live.compute_signal(inputs)


def describe_served_signal(
    target: PreTrainedModel,
    processing_class: ProcessingClass,
    options: SamplingOptions,
    signal: SignalSpec,
    temperature: float,
) -> TeacherInfo:
    """What will be kept of the target while it serves.

    Args:
        target (`PreTrainedModel`): The target.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): Its tokenizer.
        options (`SamplingOptions`): How requests are served.
        signal (`SignalSpec`): What to keep.
        temperature (`float`): Of the distribution that is kept: that of the loss.

    Raises:
        ValueError: For an unknown method, or a number out of its range.
    """
    signal = complete_request(signal)
    name = get_config_model_id(target.config)
    return TeacherInfo(
        target_name=name,
        target=name or type(target).__name__,
        tokenizer=fingerprint_tokenizer(processing_class),
        vocab_size=count_real_ids(processing_class),
        engine="speculative decoding",
        method=signal.method,
        num_draws=signal.num_draws,
        top_k=signal.top_k,
        sampling_temperature=options.temperature,
        max_new_tokens=options.max_new_tokens,
        logprobs_mode="processed",
        logprobs_temperature=temperature,
    )
