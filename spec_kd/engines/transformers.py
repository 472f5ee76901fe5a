"""The engine that runs the target in this process, by transformers; its generation scores give the log-probabilities.

The distribution is reduced step by step. Keeping the scores of a batch would take tokens x vocabulary: 20 GB for 64
completions of 512 tokens with 152,000 ids.
"""

import hashlib
from collections.abc import Sequence
from typing import cast

import accelerate
import numpy as np
import torch
from transformers import LogitsProcessor, PreTrainedModel

from spec_kd._private import get_config_model_id
from spec_kd.engines.base import Completion, Engine, join_rows
from spec_kd.finite import NonFiniteError, check_finite_weights
from spec_kd.heads import LogitHead, compute_last_hidden_states, count_rows, evaluation_mode, find_input_device
from spec_kd.loading import load_model, load_tokenizer
from spec_kd.losses import SignalSpec, SparseDistribution
from spec_kd.losses.sparse import TokenSoftmax
from spec_kd.open_types import Arguments, Array
from spec_kd.probes import check_padding, group_for_generation
from spec_kd.sampling.generation import cut_after_eos, derive_seed, find_special_ids, generate_batch
from spec_kd.sampling.options import SamplingOptions
from spec_kd.sampling.prompts import (
    PromptBatch,
    check_prompt_ids,
    check_room,
    find_causal_lm,
    get_max_length,
    name_prompt,
    pick_prompts,
    report_progress,
)
from spec_kd.sampling.response_format import ResponseFormat, hash_formats
from spec_kd.sampling.token_masks import AllowedIdsOnly, TokenMasks
from spec_kd.vocabulary import ProcessingClass, count_real_ids

MAX_SCORED_LOGITS = 2**24


class TransformersEngine(Engine):
    """The target as a transformers model.

    It writes greedily, or samples from the softmax at a temperature, by top-k and top-p where asked. The target's own
    `generation_config` (its sampling, penalties and forced tokens) does not count, except for its EOS ids, which end a
    completion together with the tokenizer's. Ids beyond the tokenizer's vocabulary (padded rows of the head) are never
    written.

    Log-probabilities are those of the distribution that was sampled from, and of the plain softmax for greedy
    completions.

    Args:
        target (`PreTrainedModel` or `str`):
            The model, or a path or Hub id to load it from in its own dtype; an adapter is loaded with its base model.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            Tokenizer of the target; loaded from where the target came from by default.
        init_kwargs (`dict`, *optional*):
            Arguments of `from_pretrained` for a target given by name, such as `trust_remote_code`.
        response_formats (`Sequence[ResponseFormat | None]`, *optional*):
            What each row of the dataset is held to, `None` for free text; one alone holds for all rows. By default all
            completions are free text.

    Attributes:
        target (`PreTrainedModel`): The model, without a wrapper of PEFT.
        eos_ids (`list[int]`): Ids that end a completion.
        pad_id (`int`): Id that fills up shorter rows.
        vocab_size (`int`): Number of real ids.

    Raises:
        ValueError: No tokenizer is found, there is no EOS id, or the target has a prompt-learning adapter.
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
        response_formats: Sequence[ResponseFormat | None] | None = None,
    ):
        self.target, self.processing_class = _load(target, processing_class, init_kwargs or {})
        self.target_name = target if isinstance(target, str) else get_config_model_id(self.target.config) or None
        self.eos_ids, self.pad_id = find_special_ids(self.target, self.processing_class)
        self.vocab_size = count_real_ids(self.processing_class)
        self.response_formats = list(response_formats or ())
        self._masks: TokenMasks | None = None
        if any(self.response_formats):
            self._masks = TokenMasks(self.processing_class, self.vocab_size, self.eos_ids)
            for row, wanted in enumerate(self.response_formats):
                if wanted is not None:
                    self._masks.check(wanted, (), f"row {row}")

    def describe(self) -> dict[str, object]:
        """A hash of the target's weights, its vocabulary and EOS ids, how a seed becomes a completion, and formats."""
        return {
            "eos_token_ids": self.eos_ids,
            "real_vocab_size": self.vocab_size,
            "sampler": "one draw a token",
            "target": hash_model(self.target),
            **({"response_formats": hash_formats(self.response_formats)} if self._masks is not None else {}),
        }

    def check(self, prompts: Sequence[list[int]], options: SamplingOptions | None, signal: SignalSpec | None) -> None:
        """Checks a job before the expensive work; see [`Engine.check`].

        Raises:
            UnusablePromptError: A prompt leaves no room for a completion in the positions of the target.
            ValueError: A prompt has an id that the target does not have, or the target cannot give the signal.
            NonFiniteError: A weight is NaN or infinite.
        """
        check_finite_weights(self.target, "target")
        check_prompt_ids(prompts, count_rows(self.target.get_input_embeddings()), "the target has")
        check_room(
            map(len, prompts),
            0 if options is None else options.max_new_tokens,
            {"target": get_max_length(self.target)},
            name=lambda index: name_prompt(prompts, index),
        )
        if signal is not None:
            signal.check(self.vocab_size)

    def generate(
        self,
        prompts: Sequence[list[int]],
        options: SamplingOptions,
        signal: SignalSpec | None = None,
        seed: str = "",
    ) -> list[Completion]:
        """Writes a completion to each prompt; see [`Engine.generate`]. The ids do not depend on the signal.

        Prompts are taken one by one if the target would not read them in a batch as it reads them alone.
        """
        groups = group_for_generation(self.target, prompts)
        if len(groups) == 1:
            return self._generate(prompts, options, signal, seed)
        completions: dict[int, Completion] = {}
        for rows in groups:
            written = self._generate(pick_prompts(prompts, rows), options, signal, f"{seed}:{rows[0]}")
            completions |= zip(rows, written, strict=True)
        return [completions[i] for i in range(len(prompts))]

    def _generate(
        self, prompts: Sequence[list[int]], options: SamplingOptions, signal: SignalSpec | None, seed: str
    ) -> list[Completion]:
        recorder = None if signal is None else self._make_recorder(signal, seed)
        written = generate_batch(
            self.target,
            prompts,
            options,
            eos_ids=self.eos_ids,
            pad_id=self.pad_id,
            vocab_size=self.vocab_size,
            seed=seed,
            on_logits=self._list_processors(prompts),
            on_scores=() if recorder is None else (recorder,),
        )  # (B, T)
        completions = [cut_after_eos(ids, self.eos_ids) for ids in written.tolist()]
        if recorder is None:
            return [Completion(ids, reason) for ids, reason in completions]
        recorder.close(written[:, -1])
        return [Completion(ids, reason, *recorder.read(row, len(ids))) for row, (ids, reason) in enumerate(completions)]

    def _list_processors(self, prompts: Sequence[list[int]]) -> list[LogitsProcessor]:
        if self._masks is None:
            return []
        rows = prompts.rows if isinstance(prompts, PromptBatch) else range(len(prompts))
        formats = self.response_formats
        wanted = [formats[0] if len(formats) == 1 else formats[row] for row in rows]
        return [AllowedIdsOnly(self._masks, wanted, max(map(len, prompts)))]

    @torch.no_grad()
    def score(
        self, prompts: Sequence[list[int]], completions: Sequence[list[int]], signal: SignalSpec, seed: str = ""
    ) -> list[Completion]:
        """Reads completions in one pass, with the head on their tokens alone; see [`Engine.score`].

        Raises:
            ValueError: The target cannot give the signal, reads padding as text, or the rows do not match.
        """
        signal.check(self.vocab_size)
        check_padding(self.target, "target")
        rows = join_rows(prompts, completions)
        device, width = find_input_device(self.target), max(map(len, rows))
        ids = torch.tensor([row + [self.pad_id] * (width - len(row)) for row in rows], device=device)  # (B, T)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        with evaluation_mode(self.target):
            hidden = compute_last_hidden_states(
                self.target, self.target.get_output_embeddings(), input_ids=ids, attention_mask=mask
            )  # (B, T, H)
        head, recorder = LogitHead.of(self.target, self.vocab_size), self._make_recorder(signal, seed)
        chunk, scored = max(1, MAX_SCORED_LOGITS // self.vocab_size), []
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
            report_progress(prompts, len(completion))
        return scored

    def _make_recorder(self, signal: SignalSpec, seed: str) -> "SparseRecorder":
        return SparseRecorder(signal, self.vocab_size, derive_seed(f"{seed}:signal"))


def _load(
    target: PreTrainedModel | str, processing_class: ProcessingClass | None, init_kwargs: Arguments
) -> tuple[PreTrainedModel, ProcessingClass]:
    name = target if isinstance(target, str) else get_config_model_id(target.config)
    if processing_class is None and not name:
        raise ValueError("The target was made in memory, so its tokenizer is unknown. Give `processing_class`.")
    processing_class = processing_class or load_tokenizer(name, init_kwargs)
    if isinstance(target, str):
        state = accelerate.PartialState()
        # "auto" spreads a target over all GPUs, which only one process can do
        placement = {"device_map": state.device} if state.num_processes > 1 and state.device.type == "cuda" else {}
        target = cast(PreTrainedModel, load_model(target, **{"dtype": "auto", **placement, **init_kwargs}))
    return find_causal_lm(target, "target"), processing_class


def hash_model(model: PreTrainedModel) -> str:
    """A hash of the architecture and of up to 64 evenly spaced values of every weight."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        for part in _list_parts(weight.detach()):
            if part.numel() and not part.is_meta:
                values = part.flatten()[:: max(1, part.numel() // 64)][:64].cpu().contiguous()
                digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _list_parts(weight: torch.Tensor) -> list[torch.Tensor]:
    """The tensors of a weight: itself, or those inside a tensor subclass, such as numbers and scales of torchao."""
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight]
    names, _ = weight.__tensor_flatten__()
    return [part for name in names for part in _list_parts(getattr(weight, name))]


class SparseRecorder(LogitsProcessor):
    """Reads the distribution at every step of `generate` and keeps what the method asks for; it changes nothing.

    The token of a step is known at the next one only, so one step's logits `(B, V)` are held at a time.

    Args:
        signal (`SignalSpec`): What to keep.
        vocab_size (`int`): Number of real ids.
        seed (`int`): Seed of the draws. They have a generator of their own, so that completions do not depend on them.
    """

    def __init__(self, signal: SignalSpec, vocab_size: int, seed: int):
        self.signal, self.vocab_size, self.seed = signal.complete(), vocab_size, seed
        self._method = self.signal.sparse_method
        self._generator: torch.Generator | None = None
        self._step: TokenSoftmax | None = None
        self._kept: list[tuple[torch.Tensor, ...]] = []
        self._logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Keeps what is asked of `scores` `(B, V)`, and the log-probability of the last ids of `input_ids`."""
        self._record_tokens(input_ids[:, -1])
        self._step = TokenSoftmax(scores[:, : self.vocab_size].float())  # (B, V)
        self._kept.append(self._record(self._step))
        return scores

    def close(self, last_tokens: torch.Tensor) -> None:
        """Takes the tokens of the last step, int64 `(B,)`, and brings everything to the CPU."""
        self._record_tokens(last_tokens)
        self._step = None
        self._all_logprobs = _to_numbers(torch.stack(self._logprobs, dim=1))  # (B, T)
        self._all_kept = [torch.stack(parts, dim=1).cpu().numpy() for parts in zip(*self._kept, strict=True)]

    def read(self, row: int, length: int) -> tuple[list[float], SparseDistribution | None]:
        """Log-probabilities of the first `length` tokens of a row, and what was kept at them."""
        kept = [part[row, :length] for part in self._all_kept]
        return self._all_logprobs[row, :length].tolist(), self._method.collect(kept)

    def reduce(self, logits: torch.Tensor, tokens: torch.Tensor) -> tuple[Array, SparseDistribution | None]:
        """The same for tokens that exist: logits `(n, vocab_size)` and the tokens they are to predict, `(n,)`."""
        p = TokenSoftmax(logits)
        kept = [part.cpu().numpy() for part in self._record(p)]
        return _to_numbers(p.log_p(tokens[:, None]).squeeze(-1)), self._method.collect(kept)

    def _record_tokens(self, tokens: torch.Tensor) -> None:
        if self._step is not None:
            self._logprobs.append(self._step.log_p(tokens[:, None]).squeeze(-1))

    def _record(self, p: TokenSoftmax) -> tuple[torch.Tensor, ...]:
        if self._generator is None:
            self._generator = torch.Generator(p.logits.device).manual_seed(self.seed)
        return self._method.record(p, self.signal.size, self._generator)


def _to_numbers(logprobs: torch.Tensor) -> Array:
    """Log-probabilities as an array; raises [`NonFiniteError`] for NaN, which only logits that are not finite give."""
    values = logprobs.cpu().numpy()
    if np.isnan(values).any():
        raise NonFiniteError(
            "The target's logits are NaN or infinite, with weights that are finite: they overflow in its dtype. Load "
            "the target in bfloat16 or float32."
        )
    return values


def stack_sparse(parts: list[SparseDistribution | None]) -> SparseDistribution | None:
    """What was kept at consecutive pieces of a completion, as one."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    return SparseDistribution(
        [ids for part in known for ids in part.ids],
        None if known[0].log_p is None else [values for part in known for values in part.log_p or ()],
        None if known[0].counts is None else [counts for part in known for counts in part.counts or ()],
    )
