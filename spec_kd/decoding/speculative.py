"""Speculative decoding of whole batches; transformers' assisted generation takes one sequence at a time.

A plain loop over forward passes. `generate(custom_generate=...)` prepares only one of the two models, with a cache
that drops what windowed layers have passed and processors for one position a call, and reads the shipped generation
config, which must not count here.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from spec_kd.acceptance import check_num_assistant_tokens, check_sampling
from spec_kd.checks import check_int
from spec_kd.decoding.acceptance_sampling import verify_greedily, verify_sampled
from spec_kd.decoding.ragged_model import RaggedModel, check_reversible
from spec_kd.decoding.rounds import CompletionInProgress, SpeculativeCompletion, leave_out_drafts_after_end
from spec_kd.heads import evaluation_mode, find_input_device
from spec_kd.sampling.drawing import draw_ids
from spec_kd.sampling.input_checks import check_prompts, check_room, find_causal_lm, get_max_length, resolve_vocab_size

# A pass over more prompts would be no faster on a CPU, and would need more memory
PROMPT_TOKENS_PER_PASS = 2048

Observer = Callable[[Sequence[CompletionInProgress], torch.Tensor], None]


def generate_speculatively(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    *,
    temperature: float = 0.0,
    num_assistant_tokens: int = 5,
    max_new_tokens: int,
    eos_token_id: int | list[int] | None = None,
    vocab_size: int | None = None,
    draft_sampling: str = "stochastic",
    batch_size: int = 16,
    seed: int = 0,
    show_progress: bool = False,
    observe: Observer | None = None,
) -> SpeculativeCompletion:
    """Lets the target write with the draft's help, many prompts at a time, and records every round.

    Lossless (Leviathan et al., arXiv 2211.17192): greedy text is the target's own, sampled text is distributed as the
    target's. Exact for float32 models; in bf16 a pass over several tokens and one over a single token can differ in an
    argmax. Plain greedy or plain sampling: nothing of the generation configs that the models ship counts, except the
    target's EOS. Modes and the global random state are left as they were.

    Args:
        target (`PreTrainedModel` or `PeftModel`): The target.
        draft (`PreTrainedModel` or `PeftModel`): The draft.
        prompt_ids (`list[list[int]]`): Ids of each prompt.
        temperature (`float`): 0.0 for greedy.
        num_assistant_tokens (`int`): Tokens drafted in a round (gamma).
        max_new_tokens (`int`): Most tokens written to a prompt.
        eos_token_id (`int` or `list[int]`, *optional*):
            Defaults to that of the target's generation config; an empty list for none.
        vocab_size (`int`, *optional*): Number of real ids; the rows that both heads have by default.
        draft_sampling (`str`):
            `"stochastic"` is the rule of the paper and of transformers; `"greedy"` drafts the most likely token at any
            temperature, as most servers do. Equal at temperature 0.
        batch_size (`int`): Prompts at a time, longest first; one that is complete makes room for the next.
        seed (`int`): Of the sampling. Which text is drawn depends on `batch_size` as well.
        show_progress (`bool`): Whether to show a progress bar over the prompts.
        observe (`Callable`, *optional*):
            Called after every round with the texts it served and the target's logits, float32 `(B, G + 1, vocab_size)`:
            the first `text.rounds[-1].emitted` of a row are what the text's latest tokens came from. `text.index` is
            the number of its prompt.

    Raises:
        `ValueError`:
            Before any generation, for an option out of its range, no prompts, an unusable or too long one, or a model
            with a recurrent state.
        `VocabularyMismatchError`: If a head has fewer than `vocab_size` rows.
    """
    check_num_assistant_tokens(num_assistant_tokens)
    check_sampling(temperature, draft_sampling)
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        check_int(name, value)
    check_int("seed", seed, None)
    target, draft = find_causal_lm(target, "target"), find_causal_lm(draft, "draft")
    vocab_size = resolve_vocab_size(vocab_size, draft, target)
    prompt_ids = [list(ids) for ids in prompt_ids]
    check_prompts(prompt_ids, vocab_size)
    limits = {"target": get_max_length(target), "draft": get_max_length(draft)}
    check_room(map(len, prompt_ids), max_new_tokens, limits, num_unread=1)  # the last token written is not read
    for role, model in (("target", target), ("draft", draft)):
        check_reversible(model, role)
    if eos_token_id is None:
        eos_token_id = target.generation_config.eos_token_id
    eos_ids = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())

    device = find_input_device(target)
    options = _Options(
        temperature=temperature,
        num_assistant_tokens=num_assistant_tokens,
        eos_ids=torch.tensor(sorted(eos_ids), dtype=torch.long, device=device),
        vocab_size=vocab_size,
        draft_sampling=draft_sampling,
        generator=torch.Generator(device).manual_seed(seed),
        observe=observe,
    )
    texts = [CompletionInProgress(i, max_new_tokens, eos_ids) for i in range(len(prompt_ids))]
    waiting = sorted(texts, key=lambda text: -len(prompt_ids[text.index]))
    batch = _Batch(target, draft, options)
    progress = tqdm(total=len(texts), desc="Speculative decoding", disable=not show_progress)
    start = time.perf_counter()
    with progress, evaluation_mode(target, draft):
        while waiting or batch.texts:
            while waiting and (num_free := batch_size - len(batch.texts)):
                count = min(num_free, max(1, PROMPT_TOKENS_PER_PASS // len(prompt_ids[waiting[0].index])))
                new, waiting = waiting[:count], waiting[count:]
                batch.add(new, [prompt_ids[text.index] for text in new])
            batch.write_round()
            progress.update(len(texts) - len(waiting) - len(batch.texts) - progress.n)
    return SpeculativeCompletion(
        completion_ids=[text.ids for text in texts],
        rounds=[leave_out_drafts_after_end(text.rounds) for text in texts],
        rejected_positions=[text.rejected_positions for text in texts],
        seconds=time.perf_counter() - start,
    )


@dataclass(frozen=True)
class _Options:
    temperature: float
    num_assistant_tokens: int
    eos_ids: torch.Tensor
    vocab_size: int
    draft_sampling: str
    generator: torch.Generator
    observe: Observer | None


class _Batch:
    """Texts that are written together, and what both models have read of them."""

    def __init__(self, target: PreTrainedModel, draft: PreTrainedModel, options: _Options):
        device = options.generator.device
        self.texts: list[CompletionInProgress] = []  # those that are not complete, one for each row
        self._options = options
        # (B, 2), the last tokens of each text: the target has not read the second, the draft neither
        self._last_ids = torch.zeros(0, 2, dtype=torch.long, device=device)
        self._target, self._draft = (
            RaggedModel(model, self._last_ids[:, 0], options.vocab_size, device) for model in (target, draft)
        )

    def add(self, texts: list[CompletionInProgress], prompts: Sequence[Sequence[int]]) -> None:
        """Reads the prompts of more texts, up to where the next round begins."""
        self.texts = self.texts + texts
        self._target.add_rows([prompt[:-1] for prompt in prompts], [0] * len(prompts))
        self._draft.add_rows([prompt[:-2] for prompt in prompts], [max(0, 2 - len(prompt)) for prompt in prompts])
        last_ids = torch.tensor([[0, *prompt][-2:] for prompt in prompts], device=self._last_ids.device)
        self._last_ids = torch.cat([self._last_ids, last_ids])

    def write_round(self) -> None:
        """One call of the target; texts that are complete leave the batch."""
        options = self._options
        num_left = torch.tensor([text.num_left for text in self.texts], device=options.generator.device)
        num_drafted = min(options.num_assistant_tokens, max(text.num_left for text in self.texts) - 1)
        drafted, q = _propose(self._draft, self._last_ids, num_drafted, options)  # (B, G), (B, G, V)
        limits = _count_usable(drafted, num_left, options.eos_ids)
        offered_ids = torch.cat([self._last_ids[:, 1:], drafted], dim=1)  # (B, G + 1)
        logits = self._target.read(offered_ids, num_drafted + 1)  # (B, G + 1, V)
        if options.temperature == 0:
            accepted, next_tokens = verify_greedily(logits, drafted, limits)
        else:
            p = (logits / options.temperature).softmax(dim=-1)
            accepted, next_tokens = verify_sampled(p, q, drafted, limits, options.generator)

        records = zip(drafted.tolist(), limits.tolist(), accepted.tolist(), next_tokens.tolist(), strict=True)
        for text, (offered, limit, count, token) in zip(self.texts, records, strict=True):
            text.add_round(offered[:limit], count, token)
        if options.observe is not None:
            options.observe(self.texts, logits)
        rows = _fill_gaps([not text.is_complete for text in self.texts])
        self.texts = [self.texts[i] for i in rows]
        # The draft has not read the last drafted token, if all were accepted. Reading the last two tokens again in
        # any case keeps the rows in step and costs it no pass of its own. So both models take back the same number.
        self._last_ids = torch.cat([offered_ids.gather(1, accepted[:, None]), next_tokens[:, None]], dim=1)[rows]
        for model in (self._target, self._draft):
            model.take_back(num_drafted - accepted, rows)


def _fill_gaps(is_kept: Sequence[bool]) -> list[int]:
    """The rows to keep, with the last ones in the place of those that leave."""
    count = sum(is_kept)
    last = [i for i in range(count, len(is_kept)) if is_kept[i]]
    return [i if is_kept[i] else last.pop() for i in range(count)]


def _propose(
    draft: RaggedModel, ids: torch.Tensor, num_drafted: int, options: _Options
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Drafted ids `(B, G)`, and the probabilities they were sampled from `(B, G, V)`, `None` if they were not."""
    is_sampled = options.temperature > 0 and options.draft_sampling == "stochastic"
    drafted, q = [ids[:, :0]], []
    for _ in range(num_drafted):
        logits = draft.read(ids)[:, 0]  # (B, V)
        if is_sampled:
            q.append((logits / options.temperature).softmax(dim=-1))
            ids = draw_ids(q[-1], options.generator)[:, None]
        else:
            ids = logits.argmax(dim=-1, keepdim=True)
        drafted.append(ids)
    return torch.cat(drafted, dim=1), torch.stack(q, dim=1) if q else None


def _count_usable(drafted: torch.Tensor, num_left: torch.Tensor, eos_ids: torch.Tensor) -> torch.Tensor:
    """Drafted tokens that a row may use `(B,)`: none behind a drafted EOS, and room for the target's own token."""
    is_eos = torch.isin(drafted, eos_ids).long()
    num_up_to_eos = (is_eos.cumsum(dim=1) == is_eos).sum(dim=1)
    return torch.minimum(num_up_to_eos, num_left - 1)
