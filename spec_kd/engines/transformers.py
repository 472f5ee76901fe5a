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
from spec_kd.engines.sparse_recorder import SparseRecorder, stack_sparse
from spec_kd.finite import check_finite_weights
from spec_kd.heads import LogitHead, compute_last_hidden_states, count_rows, evaluation_mode, find_input_device
from spec_kd.loading import load_model, load_tokenizer
from spec_kd.losses import SignalSpec
from spec_kd.open_types import Arguments
from spec_kd.probes import check_padding, group_for_generation
from spec_kd.sampling.drawing import derive_seed
from spec_kd.sampling.generation import cut_after_eos, find_special_ids, generate_batch
from spec_kd.sampling.input_checks import check_prompt_ids, check_room, find_causal_lm, get_max_length
from spec_kd.sampling.options import SamplingOptions
from spec_kd.sampling.prompt_batch import name_prompt, pick_prompts, report_progress
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
    ):
        self.target, self.processing_class = _load(target, processing_class, init_kwargs or {})
        self.target_name = target if isinstance(target, str) else get_config_model_id(self.target.config) or None
        self.eos_ids, self.pad_id = find_special_ids(self.target, self.processing_class)
        self.vocab_size = count_real_ids(self.processing_class)

    def describe(self) -> dict[str, object]:
        """A hash of the target's weights, its vocabulary and EOS ids, and how a seed becomes a completion."""
        return {
            "eos_token_ids": self.eos_ids,
            "real_vocab_size": self.vocab_size,
            "sampler": "one draw a token",
            "target": hash_model(self.target),
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
        watching: list[LogitsProcessor] = [] if recorder is None else [recorder]
        written = generate_batch(
            self.target,
            prompts,
            options,
            eos_ids=self.eos_ids,
            pad_id=self.pad_id,
            vocab_size=self.vocab_size,
            seed=seed,
            on_scores=watching,
        )  # (B, T)
        completions = [cut_after_eos(ids, self.eos_ids) for ids in written.tolist()]
        if recorder is None:
            return [Completion(ids, reason) for ids, reason in completions]
        recorder.close(written[:, -1])
        return [Completion(ids, reason, *recorder.read(row, len(ids))) for row, (ids, reason) in enumerate(completions)]

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
        device = find_input_device(self.target)
        width = max(map(len, rows))
        ids = torch.tensor([row + [self.pad_id] * (width - len(row)) for row in rows], device=device)  # (B, T)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        with evaluation_mode(self.target):
            hidden = compute_last_hidden_states(
                self.target, self.target.get_output_embeddings(), input_ids=ids, attention_mask=mask
            )  # (B, T, H)
        head = LogitHead.of(self.target, self.vocab_size)
        recorder = self._make_recorder(signal, seed)
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
            report_progress(prompts, len(completion))
        return scored

    def _make_recorder(self, signal: SignalSpec, seed: str) -> SparseRecorder:
        return SparseRecorder(signal, self.vocab_size, derive_seed(f"{seed}:signal"))


def _load(
    target: PreTrainedModel | str, processing_class: ProcessingClass | None, init_kwargs: Arguments
) -> tuple[PreTrainedModel, ProcessingClass]:
    name = target if isinstance(target, str) else get_config_model_id(target.config)
    if processing_class is None:
        if not name:
            raise ValueError("The target was made in memory, so its tokenizer is unknown. Give `processing_class`.")
        processing_class = load_tokenizer(name, init_kwargs)
    if isinstance(target, str):
        state = accelerate.PartialState()
        # "auto" spreads a target over all GPUs, which only one process can do
        placement = {"device_map": state.device} if state.num_processes > 1 and state.device.type == "cuda" else {}
        model = cast(PreTrainedModel, load_model(target, **{"dtype": "auto", **placement, **init_kwargs}))
    else:
        model = target
    return find_causal_lm(model, "target"), processing_class


def hash_model(model: PreTrainedModel) -> str:
    """A hash of the architecture and of up to 64 evenly spaced values of every weight."""
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
    """The tensors of a weight: itself, or those inside a tensor subclass, such as numbers and scales of torchao."""
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight]
    names, _ = weight.__tensor_flatten__()
    return [part for name in names for part in _list_parts(getattr(weight, name))]
