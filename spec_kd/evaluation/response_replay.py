"""Exact acceptance figures from one teacher-forced pass over text that the target wrote; nothing is generated."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from spec_kd.acceptance import check_num_assistant_tokens, check_sampling, expect_rounds
from spec_kd.checks import check_int
from spec_kd.evaluation.metrics import AcceptanceMetrics
from spec_kd.evaluation.stored_responses import check_stored_logprobs, read_stored_sparse
from spec_kd.evaluation.token_scores import SCORES, score_from_stored, score_from_target
from spec_kd.finite import check_finite_weights, check_logits
from spec_kd.heads import LogitHead, compute_last_hidden_states, evaluation_mode, find_input_device
from spec_kd.open_types import Record
from spec_kd.probes import check_padding
from spec_kd.progress import RowProgress
from spec_kd.sampling.input_checks import find_causal_lm, resolve_vocab_size
from spec_kd.sampling.options import check_truncation

MAX_LOGITS = 2**25  # logits of one model held at a time: 128 MiB in float32
ResponseRows = Iterable[Mapping[str, Sequence[int]]]


@dataclass(frozen=True)
class ResponseScores:
    """Acceptance at every position of P texts: all that replay needs, for any number of drafted tokens.

    Args:
        values (`dict[str, torch.Tensor]`):
            What is known of every position by the names of `token_scores.SCORES`, float64 `(P, N)` on the CPU, right
            padded with zeros: `"acceptance"` (a_i), `"alpha"`, and where there is something to say of them
            `"alpha_low"` and `"alpha_high"` (bounds from a stored top-k) and `"target_entropy"` (nats).
        lengths (`torch.Tensor`): Tokens of each text, int64 `(P,)`.
        temperature (`float`): That the texts were written at.
        draft_sampling (`str`): `"stochastic"` or `"greedy"`.
        has_exact_alpha (`bool`): Whether alpha is exact at each position, not an estimate from a few ids.
    """

    values: dict[str, torch.Tensor]
    lengths: torch.Tensor
    temperature: float
    draft_sampling: str
    has_exact_alpha: bool

    @property
    def acceptance(self) -> torch.Tensor:
        """a_i, float64 `(P, N)`."""
        return self.values["acceptance"]

    @property
    def alpha_sum(self) -> torch.Tensor:
        """Sum of alpha over the positions of each text, float64 `(P,)`."""
        return self.values["alpha"].sum(-1)

    @property
    def alpha_bounds(self) -> tuple[float, float] | None:
        """Bounds of the mean alpha of these positions, where the texts come with a top-k of the target."""
        if "alpha_low" not in self.values:
            return None
        low, high = (self.values[name].sum() / self.lengths.sum() for name in ("alpha_low", "alpha_high"))
        return float(low), float(high)

    def replay(self, num_assistant_tokens: int, max_new_tokens: int) -> AcceptanceMetrics:
        """Figures for one number of drafted tokens.

        Args:
            num_assistant_tokens (`int`): gamma.
            max_new_tokens (`int`): The limit that the texts were written under.

        Raises:
            `ValueError`: gamma < 1, or a text longer than `max_new_tokens`.
        """
        rounds = expect_rounds(self.acceptance, num_assistant_tokens, max_new_tokens, self.lengths)
        tokens = self.lengths.numpy()
        return AcceptanceMetrics(
            tokens=tokens,
            target_calls=rounds.target_calls.numpy(),
            accepted=rounds.accepted.numpy(),
            drafted=rounds.drafted.numpy(),
            drafting_rounds=rounds.drafting_rounds.numpy(),
            accepted_by_position=rounds.accepted_by_position.numpy(),
            temperature=self.temperature,
            num_assistant_tokens=num_assistant_tokens,
            draft_sampling=self.draft_sampling,
            method="replay",
            alpha_sum=self.alpha_sum.numpy(),
            alpha_tokens=tokens,
        )


def replay(
    draft: PreTrainedModel,
    target: PreTrainedModel | None,
    texts: ResponseRows,
    *,
    temperature: float = 0.0,
    num_assistant_tokens: int = 5,
    max_new_tokens: int,
    vocab_size: int | None = None,
    draft_sampling: str = "stochastic",
    top_k: int = 0,
    top_p: float = 1.0,
    batch_size: int = 8,
    show_progress: bool = True,
) -> AcceptanceMetrics:
    """The figures that speculative decoding would have on texts the target wrote; see [`score_responses`].

    Exact in expectation for float32 models (in bf16 a cached and a teacher-forced pass can differ in an argmax).

    Args:
        draft (`PreTrainedModel` or `PeftModel`): The draft.
        target (`PreTrainedModel` or `PeftModel`, *optional*):
            The target. Not used for greedy text, and not needed for sampled text that comes with its
            `teacher_token_logprobs`: everything but alpha is then the same, and alpha an unbiased estimate, the mean of
            min(1, q/p) over the tokens written.
        texts (`Dataset` or iterable of dicts):
            `prompt_ids` and `completion_ids` (EOS included), written by the target at `temperature`.
        temperature (`float`): Sampling temperature of the text, 0.0 for greedy.
        num_assistant_tokens (`int`): Tokens drafted in a round.
        max_new_tokens (`int`): The limit that the texts were written under.
        vocab_size (`int`, *optional*): Number of real ids; the rows that both heads have by default.
        draft_sampling (`str`):
            `"stochastic"` is the lossless rule of the papers and of transformers; `"greedy"` drafts the most likely
            token at any temperature, as most servers do. Equal at temperature 0.
        top_k (`int`), top_p (`float`):
            Of the sampling of the text and of a stochastic draft; 0 and 1.0 for none. Needs the target.
        batch_size (`int`): Texts at a time.
        show_progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Raises:
        `ValueError`: Before any model runs, for an option out of its range or an unusable text (names its row).
    """
    check_num_assistant_tokens(num_assistant_tokens)
    scores = score_responses(
        draft,
        target,
        texts,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        vocab_size=vocab_size,
        draft_sampling=draft_sampling,
        top_k=top_k,
        top_p=top_p,
        batch_size=batch_size,
        description="Replay" if show_progress else None,
    )
    return scores.replay(num_assistant_tokens, max_new_tokens)


def score_responses(
    draft: PreTrainedModel,
    target: PreTrainedModel | None,
    texts: ResponseRows,
    *,
    temperature: float = 0.0,
    max_new_tokens: int | None = None,
    vocab_size: int | None = None,
    draft_sampling: str = "stochastic",
    top_k: int = 0,
    top_p: float = 1.0,
    batch_size: int = 8,
    measure_entropy: bool = False,
    description: str | None = None,
) -> ResponseScores:
    """Runs each model once over the texts and keeps the acceptance at every position of the completions.

    Logits are formed for completion tokens only, a bounded number at a time. Train and eval modes are restored.
    Arguments and errors are those of [`replay`]; without `max_new_tokens` the lengths are checked by
    [`ResponseScores.replay`] only. With `measure_entropy` the target, if there is one, reads greedy text too. With a
    `description` there is a progress bar of that name.
    """
    check_sampling(temperature, draft_sampling)
    check_truncation(top_k, top_p)
    check_int("batch_size", batch_size)
    check_int("max_new_tokens", max_new_tokens, is_optional=True)
    check_int("vocab_size", vocab_size, is_optional=True)
    if target is None and temperature > 0 and (top_k > 0 or top_p < 1):
        raise ValueError(
            f"`top_k={top_k}` and `top_p={top_p}` cut the target's distribution, which stored log-probabilities do not "
            "say enough of. Pass `target`, or leave them out."
        )
    if target is None and temperature > 0:
        texts = list(texts)
        check_stored_logprobs(texts, temperature)
    draft = find_causal_lm(draft, "draft")
    target = None if target is None else find_causal_lm(target, "target")
    vocab_size = resolve_vocab_size(vocab_size, draft, target)
    texts = _read_texts(texts, max_new_tokens)
    _check_ids(texts, vocab_size)

    # Greedy text carries the target's choice in every token already.
    needs_target = target is not None and (temperature > 0 or measure_entropy)
    models = [draft, target] if needs_target else [draft]
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i].prompt) - len(texts[i].completion))
    parts: list[torch.Tensor | None] = [None] * len(texts)
    for role, model in zip(("draft", "target"), models, strict=False):
        check_finite_weights(model, role)
        check_padding(model, role)
    with (
        evaluation_mode(*models),
        RowProgress(len(texts), description or "", description is not None) as progress,
    ):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = [texts[i] for i in rows]
            scores = _score_batch(models, batch, vocab_size, temperature, draft_sampling, top_k, top_p)  # (S, N)
            for i, part in zip(rows, scores.split([len(text.completion) for text in batch], dim=-1), strict=True):
                parts[i] = part.T  # (N, S)
            progress.advance(scores.shape[-1], len(rows))
    padded = pad_sequence(parts, batch_first=True)  # (P, N, S)
    return ResponseScores(
        values={name: padded[..., i] for i, name in enumerate(SCORES) if not padded[..., i].isnan().any()},
        lengths=torch.tensor([len(text.completion) for text in texts]),
        temperature=float(temperature),
        draft_sampling=draft_sampling,
        has_exact_alpha=temperature == 0 or target is not None,
    )


class _Text(NamedTuple):
    prompt: list[int]
    completion: list[int]
    row: Record


def _read_texts(texts: ResponseRows, max_new_tokens: int | None) -> list[_Text]:
    """Prompt and completion ids, checked, and the target's log-probabilities where they are stored."""
    read = []
    for i, row in enumerate(texts):
        missing = [name for name in ("prompt_ids", "completion_ids") if name not in row]
        if missing:
            raise ValueError(
                f"The texts have no {' and no '.join(missing)}, only {sorted(row)}. "
                "`spec_kd.data.generate_responses` returns what is needed."
            )
        prompt, completion = list(row["prompt_ids"]), list(row["completion_ids"])
        for name, ids in (("prompt", prompt), ("completion", completion)):
            if not ids:
                raise ValueError(f"The {name} of row {i} has no tokens. Remove the row, or let the target answer it.")
        if max_new_tokens is not None and len(completion) > max_new_tokens:
            raise ValueError(
                f"The completion of row {i} has {len(completion)} tokens, more than `max_new_tokens={max_new_tokens}`. "
                "Pass the limit that the target wrote it under."
            )
        read.append(_Text(prompt, completion, row))
    if not read:
        raise ValueError("There are no texts to replay. Pass at least one that the target wrote.")
    return read


def _check_ids(texts: list[_Text], vocab_size: int) -> None:
    highest = [max(max(text.prompt), max(text.completion)) for text in texts]
    row = int(np.argmax(highest))
    if highest[row] >= vocab_size:
        raise ValueError(
            f"Row {row} contains id {highest[row]}, but draft and target share only ids below {vocab_size}. "
            "The text is of another tokenizer, or `vocab_size` is too small."
        )


def _score_batch(
    models: list[PreTrainedModel],
    batch: list[_Text],
    vocab_size: int,
    temperature: float,
    draft_sampling: str,
    top_k: int,
    top_p: float,
) -> torch.Tensor:
    """The scores of the batch's N completion tokens, text after text, float64 `(S, N)` on the CPU."""
    ids = pad_sequence([torch.tensor(t.prompt + t.completion) for t in batch], batch_first=True)  # (B, T)
    positions = torch.arange(ids.shape[1])
    starts = torch.tensor([len(text.prompt) for text in batch])[:, None]
    ends = starts + torch.tensor([len(text.completion) for text in batch])[:, None]
    mask = (positions < ends).long()
    predicts_completion = (positions >= starts - 1) & (positions < ends - 1)  # (B, T)
    tokens = ids.roll(-1, dims=1)[predicts_completion]  # (N,)

    hidden, heads = [], []
    for model in models:
        device = find_input_device(model)
        states = compute_last_hidden_states(
            model, model.get_output_embeddings(), input_ids=ids.to(device), attention_mask=mask.to(device)
        )  # (B, T, H)
        hidden.append(states[predicts_completion.to(states.device)])  # (N, H)
        heads.append(LogitHead.of(model, vocab_size))

    stored = None
    if len(models) == 1 and temperature > 0:
        log_p = torch.tensor([value for text in batch for value in text.row["teacher_token_logprobs"]])
        stored = log_p, read_stored_sparse([text.row for text in batch])
    scores = []
    chunk_size = max(1, MAX_LOGITS // vocab_size)
    for start in range(0, len(tokens), chunk_size):
        chunk = slice(start, start + chunk_size)
        logits = [head(states[chunk]) for head, states in zip(heads, hidden, strict=True)]  # (n, V) each
        for role, model, values in zip(("draft", "target"), models, logits, strict=False):
            check_logits(values, model, role)
        expected = tokens[chunk].to(logits[0].device)
        if stored is None:
            target_logits = logits[1] if len(models) > 1 else None
            part = score_from_target(logits[0], target_logits, expected, temperature, draft_sampling, top_k, top_p)
        else:
            log_p, sparse = stored[0][chunk].to(expected.device), stored[1]
            sparse = None if sparse is None else sparse[chunk].to(expected.device)
            part = score_from_stored(logits[0], log_p, expected, temperature, draft_sampling, sparse)
        scores.append(part.cpu())
    return torch.cat(scores, dim=-1)
