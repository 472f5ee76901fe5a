"""Speculative decoding of whole batches. The assisted generation of transformers takes one sequence at a time.

This is a plain loop over forward passes. `generate(custom_generate=...)` prepares only one of the two models, with a
cache that drops tokens outside of attention windows, with processors for one position per call, and with the generation
config that the model ships, which must not count here.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from spec_kd.decoding.acceptance_sampling import verify_greedily, verify_sampled
from spec_kd.decoding.drafting import Drafter, ParallelDrafter, StepwiseDrafter
from spec_kd.decoding.options import SpeculationOptions
from spec_kd.decoding.ragged_model import RaggedModel, check_reversible
from spec_kd.heads import evaluation_mode, find_input_device
from spec_kd.open_types import Argument
from spec_kd.options import resolve_options
from spec_kd.parallel import read_parallel_drafting
from spec_kd.sampling.generation import NO_IDS, build_warpers
from spec_kd.sampling.prompts import check_prompts, check_room, find_causal_lm, get_max_length, resolve_vocab_size

# more prompts in a pass would not be faster on a CPU, and would need more memory
PROMPT_TOKENS_PER_PASS = 2048


class Round(NamedTuple):
    """One pass of the target.

    An accepted EOS counts as accepted, and ends the completion without a bonus token. Tokens that were drafted for
    positions after the end of the completion do not count as drafted.

    Args:
        drafted (`int`): Number of drafted tokens.
        accepted (`int`): Number of drafted tokens that the target accepted.
        emitted (`int`): Number of tokens by which the completion grew.
    """

    drafted: int
    accepted: int
    emitted: int


@dataclass(frozen=True, kw_only=True)
class SpeculativeCompletion:
    """The completions of P prompts, and how they were written.

    Args:
        completion_ids (`list[list[int]]`): Ids of each completion, the EOS included.
        rounds (`list[list[Round]]`): Every pass of the target for each prompt.
        rejected_positions (`list[list[int]]`):
            Positions of each completion at which the target replaced the drafted token, ascending. Bonus tokens, for
            which nothing was drafted, are not among them.
        seconds (`float`): Wall-clock seconds for all prompts together.
    """

    completion_ids: list[list[int]]
    rounds: list[list[Round]]
    rejected_positions: list[list[int]]
    seconds: float


class CompletionInProgress:
    """A completion that is being written, with its rounds and rejected positions so far.

    Args:
        index (`int`): Index of its prompt.
        max_new_tokens (`int`): Maximum number of tokens.
        eos_ids (`Collection[int]`): Ids that end it.
    """

    def __init__(self, index: int, max_new_tokens: int, eos_ids: Collection[int]):
        self.index = index
        self.ids: list[int] = []
        self.rejected_positions: list[int] = []
        self.rounds: list[Round] = []
        self._max_new_tokens, self._eos_ids = max_new_tokens, eos_ids

    @property
    def num_left(self) -> int:
        """Number of tokens that may still be written."""
        return self._max_new_tokens - len(self.ids)

    @property
    def is_complete(self) -> bool:
        """Whether it ends with an EOS or has reached its maximum."""
        return self.num_left == 0 or (bool(self.ids) and self.ids[-1] in self._eos_ids)

    def add_round(self, drafted: Sequence[int], accepted: int, next_token: int) -> None:
        """Adds one pass of the target.

        Args:
            drafted (`Sequence[int]`): Drafted tokens, none after an EOS.
            accepted (`int`): Number of drafted tokens that the target accepted.
            next_token (`int`): The target's own token after those, which is left out after an EOS.
        """
        if accepted < len(drafted):
            self.rejected_positions.append(len(self.ids) + accepted)
        emitted = list(drafted[:accepted])
        if not (emitted and emitted[-1] in self._eos_ids):
            emitted.append(next_token)
        self.ids += emitted
        self.rounds.append(Round(len(drafted), accepted, len(emitted)))


def leave_out_drafts_after_end(rounds: Sequence[Round]) -> list[Round]:
    """The rounds of a whole completion, without the tokens that were drafted for positions after its end."""
    left, counted = 0, []
    for record in reversed(rounds):
        left += record.emitted
        counted.append(record._replace(drafted=min(record.drafted, left)))
    return counted[::-1]


Observer = Callable[[Sequence[CompletionInProgress], torch.Tensor], None]


def generate_speculatively(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    options: SpeculationOptions | None = None,
    *,
    eos_token_id: int | list[int] | None = None,
    vocab_size: int | None = None,
    show_progress: bool = False,
    observe: Observer | None = None,
    **given: Argument,
) -> SpeculativeCompletion:
    """Lets the target write with the help of the draft, many prompts at a time, and records every round.

    Speculative decoding is lossless (Leviathan et al., arXiv 2211.17192): greedy completions are the target's own, and
    sampled completions are distributed as the target's. This is exact for float32 models. In bfloat16, a pass over
    several tokens and a pass over one token can differ in an argmax. The generation configs that the models ship do not
    count, except for the target's EOS. Train and eval modes and the global random state are restored.

    A parallel draft, which its configuration tells ([`~spec_kd.parallel.read_parallel_drafting`]), drafts all tokens of
    a round in one pass. Each is sampled from its own distribution, which does not depend on the others of the round.

    Args:
        target (`PreTrainedModel` or `PeftModel`): The target.
        draft (`PreTrainedModel` or `PeftModel`): The draft, autoregressive or parallel.
        prompt_ids (`Sequence[Sequence[int]]`): Ids of each prompt.
        options (`SpeculationOptions`, *optional*): Sampling and batches; the defaults of [`SpeculationOptions`] by
            default.
        eos_token_id (`int` or `list[int]`, *optional*):
            Ids that end a completion, an empty list for none; those of the target's generation config by default.
        vocab_size (`int`, *optional*): Number of real ids; the rows that both heads have by default.
        show_progress (`bool`, *optional*, defaults to `False`): Whether to show a progress bar over the prompts.
        observe (`Callable`, *optional*):
            Function that is called after every round with its completions and the target's logits, float32
            `(B, G + 1, vocab_size)`. The latest `completion.rounds[-1].emitted` tokens of a completion came from as
            many first logits of its row. `completion.index` is the index of its prompt.
        given: Fields of [`SpeculationOptions`] as keywords, which replace those of `options`.

    Returns:
        [`SpeculativeCompletion`] with the completions in the order of the prompts.

    Raises:
        ValueError: An option is out of its range, there are no prompts, a prompt is unusable or too long, or a model
            has a recurrent state. Raised before any generation.
        VocabularyMismatchError: A head has fewer than `vocab_size` rows.
    """
    options = resolve_options(SpeculationOptions, options, given)
    target, draft = find_causal_lm(target, "target"), find_causal_lm(draft, "draft")
    vocab_size = resolve_vocab_size(vocab_size, draft, target)
    prompt_ids = [list(ids) for ids in prompt_ids]
    check_prompts(prompt_ids, vocab_size)
    check_room(
        map(len, prompt_ids),
        options.max_new_tokens,
        {"target": get_max_length(target), "draft": get_max_length(draft)},
        num_unread=1,  # nothing reads the last token
    )
    for role, model in (("target", target), ("draft", draft)):
        check_reversible(model, role)
    if eos_token_id is None:
        eos_token_id = target.generation_config.eos_token_id
    eos_ids = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())

    completions = [CompletionInProgress(i, options.max_new_tokens, eos_ids) for i in range(len(prompt_ids))]
    waiting = sorted(completions, key=lambda completion: -len(prompt_ids[completion.index]))
    batch = _Batch(target, draft, options, vocab_size, eos_ids)
    progress = tqdm(total=len(completions), desc="Speculative decoding", disable=not show_progress)
    start = time.perf_counter()
    with progress, evaluation_mode(target, draft):
        while waiting or batch.completions:
            while waiting and (num_free := options.batch_size - len(batch.completions)):
                count = min(num_free, max(1, PROMPT_TOKENS_PER_PASS // len(prompt_ids[waiting[0].index])))
                new, waiting = waiting[:count], waiting[count:]
                batch.add(new, [prompt_ids[completion.index] for completion in new])
            batch.write_round(observe)
            progress.update(len(completions) - len(waiting) - len(batch.completions) - progress.n)
    return SpeculativeCompletion(
        completion_ids=[completion.ids for completion in completions],
        rounds=[leave_out_drafts_after_end(completion.rounds) for completion in completions],
        rejected_positions=[completion.rejected_positions for completion in completions],
        seconds=time.perf_counter() - start,
    )


class _Batch:
    """Completions that are written together, and what both models have read of them."""

    def __init__(
        self,
        target: PreTrainedModel,
        draft: PreTrainedModel,
        options: SpeculationOptions,
        vocab_size: int,
        eos_ids: set[int],
    ):
        self._device = device = find_input_device(target)
        self.completions: list[CompletionInProgress] = []  # those that are not complete, one for each row
        self._options = options
        self._warp = build_warpers(options.temperature, options.top_k, options.top_p)
        self._eos_ids = torch.tensor(sorted(eos_ids), dtype=torch.long, device=device)
        self._generator = torch.Generator(device).manual_seed(options.seed)
        no_rows = torch.zeros(0, dtype=torch.long, device=device)
        self._target, draft_model = (RaggedModel(model, no_rows, vocab_size, device) for model in (target, draft))
        parallel = read_parallel_drafting(draft.config)
        self._drafter: Drafter = (
            StepwiseDrafter(draft_model, options, self._generator)
            if parallel is None
            else ParallelDrafter(draft_model, options, self._generator, parallel)
        )
        # (B, L), the last tokens of each row: the draft has read none of them, the target all but the very last
        self._last_ids = no_rows.new_zeros(0, self._drafter.num_last)

    def add(self, completions: list[CompletionInProgress], prompts: Sequence[Sequence[int]]) -> None:
        """Adds completions, and reads their prompts up to where the next round begins."""
        num_last = self._drafter.num_last
        missing = [max(0, num_last - len(prompt)) for prompt in prompts]
        self.completions = self.completions + completions
        self._target.add_rows([prompt[:-1] for prompt in prompts], [0] * len(prompts))
        self._drafter.model.add_rows([prompt[:-num_last] for prompt in prompts], missing)
        last = [[0] * count + list(prompt[-num_last:]) for count, prompt in zip(missing, prompts, strict=True)]
        self._last_ids = torch.cat([self._last_ids, self._last_ids.new_tensor(last)])

    def write_round(self, observe: Observer | None) -> None:
        """Drafts tokens for each row, verifies them in one pass of the target, and drops complete rows."""
        options = self._options
        num_left = torch.tensor([completion.num_left for completion in self.completions], device=self._device)
        num_drafted = min(options.num_assistant_tokens, int(num_left.max()) - 1)
        drafted, q = self._drafter.propose(self._last_ids, num_drafted)  # (B, G), (B, G, V)
        limits = _count_usable(drafted, num_left, self._eos_ids)
        text = torch.cat([self._last_ids, drafted], dim=1)  # (B, L + G)
        logits = self._target.read(text[:, -num_drafted - 1 :], num_drafted + 1)  # (B, G + 1, V)
        if options.temperature == 0:
            accepted, next_tokens = verify_greedily(logits, drafted, limits)
        else:
            p = self._warp(NO_IDS, logits.flatten(0, 1)).softmax(dim=-1).view_as(logits)
            accepted, next_tokens = verify_sampled(p, q, drafted, limits, self._generator)

        records = zip(drafted.tolist(), limits.tolist(), accepted.tolist(), next_tokens.tolist(), strict=True)
        for completion, (offered, limit, count, token) in zip(self.completions, records, strict=True):
            completion.add_round(offered[:limit], count, token)
        if observe is not None:
            observe(self.completions, logits)
        rows = _fill_gaps([not completion.is_complete for completion in self.completions])
        self.completions = [self.completions[i] for i in rows]
        # The draft reads its last tokens again in every round, as many in each row: this keeps the rows in step, needs
        # no extra pass, and lets the models take back what differs between rows by the same number.
        num_last, ends = self._drafter.num_last, accepted[:, None] + 1  # (B, 1)
        text = torch.cat([text, text[:, :1]], dim=1).scatter(1, ends + num_last - 1, next_tokens[:, None])
        self._last_ids = text.gather(1, ends + torch.arange(num_last, device=ends.device))[rows]
        self._target.take_back(num_drafted - accepted, rows)
        self._drafter.model.take_back(num_drafted - accepted + num_last - 2, rows)


def _fill_gaps(is_kept: Sequence[bool]) -> list[int]:
    """The rows to keep, with the last ones in the places of those that leave."""
    count = sum(is_kept)
    last = [i for i in range(count, len(is_kept)) if is_kept[i]]
    return [i if is_kept[i] else last.pop() for i in range(count)]


def _count_usable(drafted: torch.Tensor, num_left: torch.Tensor, eos_ids: torch.Tensor) -> torch.Tensor:
    """Number of drafted tokens that each row may use, int64 `(B,)`: none after an EOS, and one less than are left."""
    is_eos = torch.isin(drafted, eos_ids).long()
    num_up_to_eos = (is_eos.cumsum(dim=1) == is_eos).sum(dim=1)
    return torch.minimum(num_up_to_eos, num_left - 1)
