"""Exact acceptance metrics from one teacher-forced pass over responses of the target; nothing is generated."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from spec_kd.acceptance import check_sampling, expect_rounds
from spec_kd.counting import PAPER_COUNTING, REPLAY_SAMPLINGS, Counting
from spec_kd.evaluation.metrics import AcceptanceMetrics
from spec_kd.evaluation.stored_responses import check_stored_logprobs, read_stored_sparse
from spec_kd.evaluation.token_scores import SCORES, score_from_stored, score_from_target
from spec_kd.finite import check_finite_weights, check_logits
from spec_kd.heads import LogitHead, compute_last_hidden_states, evaluation_mode, find_input_device
from spec_kd.open_types import Argument, Record
from spec_kd.options import check_int, document_options, option, resolve_options
from spec_kd.probes import check_padding
from spec_kd.progress import RowProgress
from spec_kd.sampling.generation import generate_batch
from spec_kd.sampling.options import SamplingOptions, check_truncation
from spec_kd.sampling.prompts import find_causal_lm, resolve_vocab_size
from spec_kd.serving import SERVING_ENGINE_HELP, ServingEngine, find_serving_engine

MAX_LOGITS = 2**25  # logits of one model held at a time: 128 MiB in float32
ResponseRows = Iterable[Mapping[str, Sequence[int]]]


@document_options
@dataclass(frozen=True)
class ReplayOptions:
    """How the responses were sampled, and how a draft is.

    Raises:
        ValueError: If a value is out of its range.
    """

    temperature: float = option("Temperature that the responses were sampled at; 0.0 is greedy. It has no default.")
    max_new_tokens: int | None = option(
        "Limit that the responses were written under. [`replay`] needs it.", default=None
    )
    vocab_size: int | None = option("Number of real ids. By default the rows that both heads have.", default=None)
    serving_engine: str = option(
        SERVING_ENGINE_HELP,
        default="transformers",
    )
    draft_sampling: str | None = option(
        "How the draft is sampled: `stochastic` is the lossless rule of the papers and of transformers; `greedy` "
        "drafts the most likely token at any temperature, as most servers do; `matching` drafts a sample, which the "
        "target's own sample has to equal. They are equal at temperature 0. The rule of `serving_engine` by default.",
        default=None,
    )
    top_k: int = option(
        "Number of most likely ids that responses and a stochastic draft are sampled from; 0 for all. Needs a target.",
        default=0,
    )
    top_p: float = option(
        "Probability mass of the most likely ids that responses and a stochastic draft are sampled from; 1.0 for all. "
        "Needs a target.",
        default=1.0,
    )
    batch_size: int = option("Number of responses that a model reads at a time.", default=8)

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.sampling, REPLAY_SAMPLINGS)
        check_truncation(self.top_k, self.top_p)
        check_int("batch_size", self.batch_size)
        check_int("max_new_tokens", self.max_new_tokens, is_optional=True)
        check_int("vocab_size", self.vocab_size, is_optional=True)

    @property
    def engine(self) -> ServingEngine:
        """What is known of `serving_engine`."""
        return find_serving_engine(self.serving_engine)

    @property
    def counting(self) -> Counting:
        """What the serving engine counts."""
        # Greedy decoding is one rule, the default, however the draft would be sampled
        return self.engine.counting if self.temperature == 0 else self.engine.find_counting(self.sampling)

    @property
    def sampling(self) -> str:
        """`draft_sampling`, or that of the serving engine."""
        return self.engine.draft_sampling if self.draft_sampling is None else self.draft_sampling


@dataclass(frozen=True)
class ResponseScores:
    """Acceptance at every position of P responses: all that replay needs, for any number of drafted tokens.

    Args:
        values (`dict[str, torch.Tensor]`):
            Scores of every position by the names of `token_scores.SCORES`, float64 `(P, N)` on the CPU, right padded
            with zeros: `"acceptance"` (a_i) and `"alpha"`; where they are known, also `"alpha_low"` and `"alpha_high"`
            (bounds from a stored top-k) and `"target_entropy"` (nats).
        lengths (`torch.Tensor`): Number of tokens of each completion, int64 `(P,)`.
        temperature (`float`): Temperature that the responses were sampled at.
        draft_sampling (`str`): `"stochastic"`, `"greedy"` or `"matching"`.
        has_exact_alpha (`bool`): Whether alpha is exact at each position, not an estimate from a few ids.
        counting (`Counting`, *optional*): What the serving engine counts. By default what the papers do.
        past_end (`torch.Tensor`, *optional*):
            Acceptance of the tokens that the draft proposes after the end of each response, float64 `(P, gamma)`, for
            engines that count them. `None` leaves them out of the accepted tokens.
    """

    values: dict[str, torch.Tensor]
    lengths: torch.Tensor
    temperature: float
    draft_sampling: str
    has_exact_alpha: bool
    counting: Counting = PAPER_COUNTING
    past_end: torch.Tensor | None = None

    @property
    def acceptance(self) -> torch.Tensor:
        """a_i, float64 `(P, N)`."""
        return self.values["acceptance"]

    @property
    def alpha_sum(self) -> torch.Tensor:
        """Sum of alpha over the positions of each completion, float64 `(P,)`."""
        return self.values["alpha"].sum(-1)

    @property
    def alpha_bounds(self) -> tuple[float, float] | None:
        """Bounds of the mean alpha of these positions; `None` unless a top-k of the target is stored with them."""
        if "alpha_low" not in self.values:
            return None
        low, high = (self.values[name].sum() / self.lengths.sum() for name in ("alpha_low", "alpha_high"))
        return float(low), float(high)

    def replay(self, num_assistant_tokens: int, max_new_tokens: int) -> AcceptanceMetrics:
        """Metrics for one number of drafted tokens.

        Args:
            num_assistant_tokens (`int`): Number of tokens drafted in a round (gamma).
            max_new_tokens (`int`): Limit that the responses were written under.

        Raises:
            ValueError: If gamma is below 1, or a completion is longer than `max_new_tokens`.
        """
        rounds = expect_rounds(
            self.acceptance, num_assistant_tokens, max_new_tokens, self.lengths, self.counting, self.past_end
        )
        return AcceptanceMetrics.of(
            rounds,
            self.lengths,
            self.counting,
            temperature=self.temperature,
            num_assistant_tokens=num_assistant_tokens,
            draft_sampling=self.draft_sampling,
            method="replay",
            alpha_sum=self.alpha_sum.numpy(),
            alpha_tokens=self.lengths.numpy(),
        )


def replay(
    draft: PreTrainedModel,
    target: PreTrainedModel | None,
    responses: ResponseRows,
    options: ReplayOptions | None = None,
    *,
    num_assistant_tokens: int = 5,
    show_progress: bool = True,
    **given: Argument,
) -> AcceptanceMetrics:
    """Computes the metrics that speculative decoding would have on responses of the target; see [`score_responses`].

    They are exact in expectation for float32 models. In bf16, cached and teacher-forced passes can differ in an argmax.

    Args:
        draft (`PreTrainedModel` or `PeftModel`): The draft.
        target (`PreTrainedModel` or `PeftModel`, *optional*):
            The target. It is not used for greedy responses, and not needed for sampled ones with
            `teacher_token_logprobs`: all metrics but alpha are then the same, and alpha is an unbiased estimate, the
            mean of min(1, q/p) over the completion tokens.
        responses (`Dataset` or iterable of dicts):
            Rows with `prompt_ids` and `completion_ids` (EOS included), written by the target at `temperature`.
        options (`ReplayOptions`, *optional*): How the responses were sampled, and how a draft is.
        num_assistant_tokens (`int`, *optional*, defaults to `5`): Number of tokens drafted in a round.
        show_progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.
        given: Fields of [`ReplayOptions`] as keywords, which replace those of `options`. `temperature` and
            `max_new_tokens` are needed.

    Raises:
        ValueError: If an option is out of its range or a response is unusable (names its row), before any model runs.
    """
    options = resolve_options(ReplayOptions, options, given)
    check_int("num_assistant_tokens", num_assistant_tokens)
    check_int("max_new_tokens", options.max_new_tokens)
    if target is None and options.counting.end == "passed":
        raise ValueError(
            f"{options.engine.title} counts tokens that are accepted after the end of a text, which only the target "
            "knows. Pass `target`, or leave out `serving_engine`."
        )
    scores = score_responses(
        draft,
        target,
        responses,
        options,
        num_past_end_tokens=num_assistant_tokens,
        description="Replay" if show_progress else None,
    )
    return scores.replay(num_assistant_tokens, cast(int, options.max_new_tokens))


def score_responses(
    draft: PreTrainedModel,
    target: PreTrainedModel | None,
    responses: ResponseRows,
    options: ReplayOptions | None = None,
    *,
    measure_entropy: bool = False,
    num_past_end_tokens: int = 0,
    description: str | None = None,
    **given: Argument,
) -> ResponseScores:
    """Runs each model once over the responses and keeps the acceptance at every position of the completions.

    Logits are formed for completion tokens only, a bounded number at a time. Train and eval modes are restored.

    Args:
        draft (`PreTrainedModel` or `PeftModel`): The draft.
        target (`PreTrainedModel` or `PeftModel`, *optional*): The target, as for [`replay`].
        responses (`Dataset` or iterable of dicts): Rows, as for [`replay`].
        options (`ReplayOptions`, *optional*):
            How the responses were sampled, and how a draft is. Without `max_new_tokens` the lengths are checked by
            [`ResponseScores.replay`] only.
        measure_entropy (`bool`, *optional*, defaults to `False`):
            Whether to measure the target's entropy too, for which it reads greedy responses as well.
        num_past_end_tokens (`int`, *optional*, defaults to `0`):
            Number of tokens that the draft proposes after the end of each response. They are scored if there is a
            target and the serving engine counts those that it accepts.
        description (`str`, *optional*): Name of a progress bar; there is none by default.
        given: Fields of [`ReplayOptions`] as keywords, which replace those of `options`.

    Raises:
        ValueError: As [`replay`].
    """
    options = resolve_options(ReplayOptions, options, given)
    if target is None and options.temperature > 0:
        if options.top_k > 0 or options.top_p < 1:
            raise ValueError(
                f"`top_k={options.top_k}` and `top_p={options.top_p}` cut the target's distribution, of which stored "
                "log-probabilities do not say enough. Pass `target`, or leave them out."
            )
        responses = list(responses)
        check_stored_logprobs(responses, options.temperature)
    draft = find_causal_lm(draft, "draft")
    target = None if target is None else find_causal_lm(target, "target")
    vocab_size = resolve_vocab_size(options.vocab_size, draft, target)
    read = _read_responses(responses, options.max_new_tokens, vocab_size)

    # Greedy completions carry the target's choice in every token already.
    is_target_read = options.temperature > 0 or measure_entropy
    models = {"draft": draft} | ({"target": target} if target is not None and is_target_read else {})
    for role, model in models.items():
        check_finite_weights(model, role)
        check_padding(model, role)
    order = sorted(range(len(read)), key=lambda i: -len(read[i].prompt) - len(read[i].completion))
    parts = [torch.empty(0)] * len(read)
    with (
        evaluation_mode(*models.values()),
        RowProgress(len(read), description or "", description is not None) as progress,
    ):
        for start in range(0, len(order), options.batch_size):
            rows = order[start : start + options.batch_size]
            batch = [read[i] for i in rows]
            scores = _score_batch(models, batch, vocab_size, options)  # (S, N)
            for i, part in zip(rows, scores.split([len(one.completion) for one in batch], dim=-1), strict=True):
                parts[i] = part.T  # (N, S)
            progress.advance(scores.shape[-1], len(rows))
    padded = pad_sequence(parts, batch_first=True)  # (P, N, S)
    past_end = None
    if target is not None and num_past_end_tokens and options.counting.end == "passed":
        texts = [one.prompt + one.completion for one in read]
        past_end = _score_past_end(draft, target, texts, num_past_end_tokens, replace(options, vocab_size=vocab_size))
    return ResponseScores(
        values={name: padded[..., i] for i, name in enumerate(SCORES) if not padded[..., i].isnan().any()},
        lengths=torch.tensor([len(one.completion) for one in read]),
        temperature=float(options.temperature),
        draft_sampling=options.sampling,
        has_exact_alpha=options.temperature == 0 or target is not None,
        counting=options.counting,
        past_end=past_end,
    )


def _score_past_end(
    draft: PreTrainedModel, target: PreTrainedModel, texts: Sequence[list[int]], num_tokens: int, options: ReplayOptions
) -> torch.Tensor:
    """Acceptance of what the draft goes on to propose after each of P texts, float64 `(P, num_tokens)`.

    The draft writes these tokens, and the target accepts them: the roles of [`score_responses`] are exchanged.
    """
    sampling = SamplingOptions(
        temperature=options.temperature if options.sampling != "greedy" else 0.0,
        top_k=options.top_k,
        top_p=options.top_p,
        max_new_tokens=num_tokens,
    )
    rows = []
    for start in range(0, len(texts), options.batch_size):
        batch = [list(ids) for ids in texts[start : start + options.batch_size]]
        written = generate_batch(
            draft, batch, sampling, eos_ids=(), pad_id=0, vocab_size=cast(int, options.vocab_size), seed=f"past {start}"
        )
        rows += [{"prompt_ids": text, "completion_ids": ids} for text, ids in zip(batch, written.tolist(), strict=True)]
    # The target accepts a most likely token with p(x) = the chance that its own sample matches it
    rule = "matching" if options.sampling == "greedy" else options.sampling
    swapped = replace(options, serving_engine="transformers", draft_sampling=rule, max_new_tokens=None)
    return score_responses(target, draft, rows, swapped).acceptance


class _Response(NamedTuple):
    prompt: list[int]
    completion: list[int]
    row: Record


def _read_responses(responses: ResponseRows, max_new_tokens: int | None, vocab_size: int) -> list[_Response]:
    """Prompt and completion ids, checked, each with its row."""
    read = []
    for i, row in enumerate(responses):
        missing = [name for name in ("prompt_ids", "completion_ids") if name not in row]
        if missing:
            raise ValueError(
                f"The responses have no {' and no '.join(missing)}, only {sorted(row)}. "
                "`spec_kd.generate_responses` returns what is needed."
            )
        one = _Response(list(row["prompt_ids"]), list(row["completion_ids"]), row)
        for name, ids in (("prompt", one.prompt), ("completion", one.completion)):
            if not ids:
                raise ValueError(f"The {name} of row {i} has no tokens. Remove the row.")
            if max(ids) >= vocab_size:
                raise ValueError(
                    f"Row {i} contains id {max(ids)}, but draft and target share only ids below {vocab_size}. It is of "
                    "another tokenizer, or `vocab_size` is too small."
                )
        if max_new_tokens is not None and len(one.completion) > max_new_tokens:
            raise ValueError(
                f"The completion of row {i} has {len(one.completion)} tokens, more than "
                f"`max_new_tokens={max_new_tokens}`. Pass the limit that the target wrote it under."
            )
        read.append(one)
    if not read:
        raise ValueError("There are no responses to replay. Pass at least one of the target.")
    return read


def _score_batch(
    models: Mapping[str, PreTrainedModel], batch: Sequence[_Response], vocab_size: int, options: ReplayOptions
) -> torch.Tensor:
    """The scores of the batch's N completion tokens, response after response, float64 `(S, N)` on the CPU."""
    ids = pad_sequence([torch.tensor(one.prompt + one.completion) for one in batch], batch_first=True)  # (B, T)
    positions = torch.arange(ids.shape[1])
    starts = torch.tensor([len(one.prompt) for one in batch])[:, None]
    ends = starts + torch.tensor([len(one.completion) for one in batch])[:, None]
    mask = (positions < ends).long()
    predicts_completion = (positions >= starts - 1) & (positions < ends - 1)  # (B, T)
    tokens = ids.roll(-1, dims=1)[predicts_completion]  # (N,)

    hidden, heads = {}, {}
    for role, model in models.items():
        device = find_input_device(model)
        states = compute_last_hidden_states(
            model, model.get_output_embeddings(), input_ids=ids.to(device), attention_mask=mask.to(device)
        )  # (B, T, H)
        hidden[role] = states[predicts_completion.to(states.device)]  # (N, H)
        heads[role] = LogitHead.of(model, vocab_size)

    log_p = sparse = None
    if "target" not in models and options.temperature > 0:
        log_p = torch.tensor([value for one in batch for value in one.row["teacher_token_logprobs"]])
        sparse = read_stored_sparse([one.row for one in batch])
    scores = []
    draft_top_k = options.engine.find_draft_top_k(options.sampling)
    chunk_size = max(1, MAX_LOGITS // vocab_size)
    for start in range(0, len(tokens), chunk_size):
        chunk = slice(start, start + chunk_size)
        logits = {role: head(hidden[role][chunk]) for role, head in heads.items()}  # (n, V) each
        for role, values in logits.items():
            check_logits(values, models[role], role)
        draft_logits = logits["draft"]
        expected = tokens[chunk].to(draft_logits.device)
        if log_p is None:
            part = score_from_target(
                draft_logits, logits.get("target"), expected, options.temperature, options.sampling,
                options.top_k, options.top_p, draft_top_k,
            )  # fmt: skip
        else:
            part = score_from_stored(
                draft_logits,
                log_p[chunk].to(expected.device),
                expected,
                options.temperature,
                options.sampling,
                None if sparse is None else sparse[chunk].to(expected.device),
                draft_top_k,
            )
        scores.append(part.cpu())
    return torch.cat(scores, dim=-1)
