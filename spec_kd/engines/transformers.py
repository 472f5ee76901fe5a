"""The target in this process, through transformers: its own generation scores give the log-probabilities.

What is kept of the distribution is reduced step by step as it appears. Keeping the scores of a batch would be tokens x
vocabulary: 20 GB at 64 x 512 x 152k.
"""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import accelerate
import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)
from typing_extensions import override

from spec_kd._private import get_config_model_id
from spec_kd.engines.base import (
    Completion,
    PromptBatch,
    UnusablePromptError,
    derive_seed,
    join_texts,
    pick_prompts,
    tell_of,
)
from spec_kd.engines.sparse_recorder import SparseRecorder, stack_sparse
from spec_kd.finite import check_finite_weights
from spec_kd.heads import (
    LogitHead,
    check_is_causal_lm,
    compute_last_hidden_states,
    count_rows,
    evaluation_mode,
    find_input_device,
    unwrap_peft,
)
from spec_kd.loading import load_model, load_tokenizer
from spec_kd.losses import SignalSpec
from spec_kd.open_types import Arguments
from spec_kd.probes import check_padding, group_for_generation
from spec_kd.sampling.drawn_token import DrawnToken
from spec_kd.sampling.logits_processors import build_warpers
from spec_kd.sampling.options import SamplingOptions
from spec_kd.vocabulary import ProcessingClass, count_real_ids, get_tokenizer

if TYPE_CHECKING:
    from transformers._typing import GenerativePreTrainedModel

MAX_SCORED_LOGITS = 2**24
SEED_BITS = 56  # of a torch generator's 64


class TransformersEngine:
    """A target as a transformers model.

    Greedy, or sampled from the softmax at a temperature, by top-k and top-p where asked: the target's own
    `generation_config` (its sampling, penalties, forced tokens) does not count, except for its EOS ids, which end a
    completion together with the tokenizer's. Ids beyond the tokenizer's vocabulary (padded rows of the head) are never
    written.

    Log-probabilities are those of the distribution that was sampled from; of greedy text the plain softmax's.

    Args:
        target (`PreTrainedModel` or `str`):
            The model, or a path or Hub id to load it from (in its own dtype); an adapter comes with its base model.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            The target's. Loaded from where the target came from by default.

        init_kwargs (`dict`, *optional*):
            Arguments of `from_pretrained` for a target given by name, such as `trust_remote_code`.

    Attributes:
        target_name (`str`, *optional*): Where the target was loaded from, if anywhere.

    Raises:
        ValueError: If no tokenizer is found, there is no EOS id, or the target has a prompt-learning adapter.
    """

    name = "transformers"
    is_reproducible = True
    logprobs_mode = "processed"
    default_batch_size = 8

    def __init__(
        self,
        target: PreTrainedModel | str,
        processing_class: ProcessingClass | None = None,
        *,
        init_kwargs: Arguments | None = None,
    ):
        self.target, self.processing_class = _load(target, processing_class, init_kwargs or {})
        self.target_name = target if isinstance(target, str) else get_config_model_id(self.target.config) or None
        self.eos_ids, self.pad_id = find_special_ids(self.target, self.processing_class)
        self.vocab_size = count_real_ids(self.processing_class)

    def describe(self) -> dict[str, object]:
        """Weights (as a hash), vocabulary and EOS ids of the target, and how a seed becomes text."""
        return {
            "eos_token_ids": self.eos_ids,
            "real_vocab_size": self.vocab_size,
            "sampler": "one draw a token",
            "target": hash_model(self.target),
        }

    def check(self, prompts: Sequence[list[int]], options: SamplingOptions | None, signal: SignalSpec | None) -> None:
        """Raises `ValueError` for prompts that do not fit the target, or a signal it cannot give.

        And [`NonFiniteError`] for weights that are not finite: what a NaN writes is not text.
        """
        check_finite_weights(self.target, "target")
        check_prompts_fit(prompts, self.target, 0 if options is None else options.max_new_tokens)
        if signal is not None:
            signal.check(self.vocab_size)

    def generate(
        self,
        prompts: Sequence[list[int]],
        options: SamplingOptions,
        signal: SignalSpec | None = None,
        seed: str = "",
    ) -> list[Completion]:
        """As [`Engine.generate`]; the text does not depend on what is kept of the distribution.

        Prompts are answered one by one where the target would not read them in a batch as it does alone.
        """
        groups = group_for_generation(self.target, prompts)
        if len(groups) == 1:
            return self._generate(prompts, options, signal, seed)
        answers: dict[int, Completion] = {}
        for rows in groups:
            written = self._generate(pick_prompts(prompts, rows), options, signal, f"{seed}:{rows[0]}")
            answers |= dict(zip(rows, written, strict=True))
        return [answers[i] for i in range(len(prompts))]

    def _generate(
        self, prompts: Sequence[list[int]], options: SamplingOptions, signal: SignalSpec | None, seed: str
    ) -> list[Completion]:
        length = max(map(len, prompts))
        padded = [[self.pad_id] * (length - len(ids)) + ids for ids in prompts]
        mask = [[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts]
        device = find_input_device(self.target)
        processors = LogitsProcessorList([RealIdsOnly(self.vocab_size)])
        processors += build_warpers(options.temperature, options.top_k, options.top_p)
        watch = ProgressWatch(prompts, self.eos_ids)
        if isinstance(prompts, PromptBatch):
            processors.append(watch)
        recorder = None
        if signal is not None:
            recorder = SparseRecorder(signal, self.vocab_size, derive_seed(f"{seed}:signal", SEED_BITS))
            processors.append(recorder)
        if options.temperature > 0:
            generator = torch.Generator(device).manual_seed(derive_seed(seed, SEED_BITS))
            processors.append(DrawnToken(generator))
        with neutral(self.target, options.max_new_tokens, self.eos_ids, self.pad_id):
            output = cast("GenerativePreTrainedModel", self.target).generate(
                input_ids=torch.tensor(padded, device=device),  # (B, L)
                attention_mask=torch.tensor(mask, device=device),
                generation_config=self.target.generation_config,
                logits_processor=processors,
            )
        written = output[:, length:]  # (B, T)
        watch.note(written[:, -1].tolist(), is_last=True)
        answers = [cut_after_eos(ids, self.eos_ids) for ids in written.tolist()]
        if recorder is None:
            return [Completion(ids, reason) for ids, reason in answers]
        recorder.close(written[:, -1])
        return [Completion(ids, reason, *recorder.read(row, len(ids))) for row, (ids, reason) in enumerate(answers)]

    @torch.no_grad()
    def score(
        self, prompts: Sequence[list[int]], completions: Sequence[list[int]], signal: SignalSpec, seed: str = ""
    ) -> list[Completion]:
        """As [`Engine.score`]: one teacher-forced pass, the head on the completion tokens alone."""
        signal.check(self.vocab_size)
        check_padding(self.target, "target")
        rows = join_texts(prompts, completions)
        device = find_input_device(self.target)
        width = max(map(len, rows))
        ids = torch.tensor([row + [self.pad_id] * (width - len(row)) for row in rows], device=device)  # (B, T)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        with evaluation_mode(self.target):
            hidden = compute_last_hidden_states(
                self.target, self.target.get_output_embeddings(), input_ids=ids, attention_mask=mask
            )  # (B, T, H)
        head = LogitHead.of(self.target, self.vocab_size)
        recorder = SparseRecorder(signal, self.vocab_size, derive_seed(f"{seed}:signal", SEED_BITS))
        chunk = max(1, MAX_SCORED_LOGITS // self.vocab_size)
        scored = []
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            states = hidden[i, len(prompt) - 1 : len(prompt) + len(completion) - 1]  # (n, H)
            tokens = ids[i, len(prompt) : len(prompt) + len(completion)]
            parts = [
                recorder.reduce(head(states[start : start + chunk]), tokens[start : start + chunk])
                for start in range(0, len(completion), chunk)
            ]
            reason = "stop" if completion[-1] in self.eos_ids else "length"
            logprobs = np.concatenate([logprobs for logprobs, _ in parts]).tolist()
            scored.append(Completion(list(completion), reason, logprobs, stack_sparse([s for _, s in parts])))
            tell_of(prompts, len(completion))
        return scored


def cut_after_eos(ids: list[int], eos_ids: Collection[int]) -> tuple[list[int], str]:
    """What was written up to its first EOS, and the finish reason: `"stop"`, or `"length"` without an EOS."""
    end = next((i for i, token in enumerate(ids) if token in eos_ids), None)
    return (ids, "length") if end is None else (ids[: end + 1], "stop")


class RealIdsOnly(LogitsProcessor):
    """Rules out the padded rows of a head: no tokenizer knows these ids."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    @override
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self.vocab_size :] = -torch.inf  # (B, V)
        return scores


class ProgressWatch(LogitsProcessor):
    """Tells of tokens and of completions as they are written; changes no score.

    Args:
        prompts (`Sequence[list[int]]`): The batch that is answered.
        eos_ids (`Collection[int]`): What ends a completion.
    """

    def __init__(self, prompts: Sequence[list[int]], eos_ids: Collection[int]):
        self._prompts, self._eos_ids = prompts, set(eos_ids)
        self._is_open = [True] * len(prompts)
        self._is_first = True

    @override
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self._is_first:
            self.note(input_ids[:, -1].tolist())
        self._is_first = False
        return scores

    def note(self, written: list[int], is_last: bool = False) -> None:
        """Counts a token of each row that has not ended before it."""
        num_open = sum(self._is_open)
        self._is_open = [
            is_open and not is_last and id not in self._eos_ids
            for is_open, id in zip(self._is_open, written, strict=True)
        ]
        tell_of(self._prompts, num_open, num_open - sum(self._is_open))


@contextmanager
def neutral(target: PreTrainedModel, max_new_tokens: int, eos_ids: list[int], pad_id: int) -> Iterator[None]:
    """The target in eval mode with a neutral, greedy generation config; both are restored.

    What `generate` is not told it takes from `model.generation_config`, so that is replaced, not only overridden.
    Temperature and sampling are processors of ours: in the config they would come after those that read the
    distribution.
    """
    shipped = target.generation_config
    target.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_ids,
        pad_token_id=pad_id,
        use_cache=True,
    )
    try:
        with evaluation_mode(target):
            yield
    finally:
        target.generation_config = shipped


def _load(
    target: PreTrainedModel | str, processing_class: ProcessingClass | None, init_kwargs: Arguments
) -> tuple[PreTrainedModel, ProcessingClass]:
    name = target if isinstance(target, str) else get_config_model_id(target.config)
    if processing_class is None:
        if not name:
            raise ValueError(
                "The target was not loaded from anywhere, so its tokenizer is unknown: give `processing_class`."
            )
        processing_class = load_tokenizer(name, init_kwargs)
    if isinstance(target, str):
        state = accelerate.PartialState()
        # "auto" spreads a target over all cards, which only one process can do
        placement = {"device_map": state.device} if state.num_processes > 1 and state.device.type == "cuda" else {}
        model = cast(PreTrainedModel, load_model(target, **{"dtype": "auto", **placement, **init_kwargs}))
    else:
        model = target
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError("A target with a prompt-learning adapter is not supported: its virtual tokens have no ids.")
    check_is_causal_lm(model, "target")
    return unwrap_peft(model), processing_class


def find_special_ids(target: PreTrainedModel, processing_class: ProcessingClass) -> tuple[list[int], int]:
    """EOS ids of the target (its generation config's and its tokenizer's) and a pad id; raises without any EOS."""
    tokenizer = get_tokenizer(processing_class)
    shipped = target.generation_config.eos_token_id
    found = {*(shipped if isinstance(shipped, list) else [shipped]), tokenizer.eos_token_id}
    eos_ids = sorted(id for id in found if id is not None)
    if not eos_ids:
        raise ValueError(
            "Neither the target's generation config nor its tokenizer has an EOS token, so no response would ever end: "
            "set `processing_class.eos_token`."
        )
    return eos_ids, tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos_ids[0]


def check_prompts_fit(prompt_ids: Sequence[list[int]], target: PreTrainedModel, max_new_tokens: int) -> None:
    """Raises `UnusablePromptError` without room for an answer, `ValueError` for ids that the target does not have."""
    limit = getattr(target.config.get_text_config(), "max_position_embeddings", None)
    too_long = [i for i, ids in enumerate(prompt_ids) if limit is not None and len(ids) + max_new_tokens > limit]
    if too_long:
        longest = max(too_long, key=lambda i: len(prompt_ids[i]))
        raise UnusablePromptError(
            f"{len(too_long)} of {len(prompt_ids)} prompts leave no room for `max_new_tokens={max_new_tokens}` in the "
            f"target's {limit} positions; the longest is row {longest} with {len(prompt_ids[longest])} tokens. Remove "
            "them or lower `max_new_tokens`.",
            fault="context_full",
        )
    rows, highest = count_rows(target.get_input_embeddings()), max(map(max, prompt_ids))
    if highest >= rows:
        raise ValueError(f"The prompts contain id {highest}, but the target has {rows}: they are of another tokenizer.")


def hash_model(model: PreTrainedModel) -> str:
    """Hash over the architecture and up to 64 evenly spaced values of every weight."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        for part in _list_parts(weight.detach()):
            if part.numel() and not part.is_meta:
                flat = part.flatten()
                values = flat[:: max(1, len(flat) // 64)][:64].cpu().contiguous()
                digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _list_parts(weight: torch.Tensor) -> list[torch.Tensor]:
    """The tensors of a weight: itself, or those inside a tensor subclass (numbers and scales of torchao)."""
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight]
    names, _ = weight.__tensor_flatten__()
    return [part for name in names for part in _list_parts(getattr(weight, name))]
