"""Exact acceptance metrics from one teacher-forced pass over responses of the target; nothing is generated."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from transformers import PreTrainedModel

from spec_kd.acceptance import EarlyEnds, expect_rounds
from spec_kd.counting import PAPER_COUNTING, Counting
from spec_kd.evaluation.metrics import AcceptanceMetrics
from spec_kd.evaluation.off_text import DraftContinuations
from spec_kd.evaluation.options import ReplayOptions
from spec_kd.evaluation.parallel_blocks import count_allowed, score_past_end
from spec_kd.evaluation.response_rows import ResponseRows, make_masks, read_responses
from spec_kd.evaluation.response_scoring import ResponseScorer
from spec_kd.evaluation.stored_responses import check_stored_logprobs
from spec_kd.evaluation.text_kinds import find_kinds
from spec_kd.evaluation.token_scores import CONFIDENCE, SCORES
from spec_kd.open_types import Argument, Array
from spec_kd.options import check_int, refuse, resolve_options
from spec_kd.parallel import read_parallel_drafting
from spec_kd.progress import RowProgress
from spec_kd.sampling.prompts import find_causal_lm, resolve_vocab_size
from spec_kd.sampling.token_masks import TokenMasks
from spec_kd.serving.engine import EarlyEnd
from spec_kd.vocabulary import ProcessingClass


@dataclass(frozen=True)
class ResponseScores:
    """Acceptance at every position of P responses: all that replay needs, for any number of drafted tokens.

    Args:
        values (`dict[str, torch.Tensor]`):
            Scores of every position by the names of `token_scores.SCORES`, float64 `(P, N)` on the CPU, right padded
            with zeros: `"acceptance"` (a_i) and `"alpha"`; where they are known, also `"alpha_low"` and `"alpha_high"`
            (bounds from a stored top-k), `"target_entropy"` (nats), `"log_ratio"` (log q - log p of the text's token,
            for stochastic drafts) and `"confidence"` (where the engine can end drafts early). For a parallel draft they
            are those of the first token of a round.
        lengths (`torch.Tensor`): Number of tokens of each completion, int64 `(P,)`.
        temperature (`float`): Temperature that the responses were sampled at.
        draft_sampling (`str`): `"stochastic"`, `"greedy"` or `"matching"`.
        has_exact_alpha (`bool`): Whether alpha is exact at each position, not an estimate from a few ids.
        counting (`Counting`, *optional*): What the serving engine counts. By default what the papers do.
        past_end (`torch.Tensor`, *optional*):
            Acceptance of the tokens that the draft proposes after the end of each response, float64 `(P, gamma)`, for
            engines that count them; for a parallel draft `(P, N, K)`. `None` leaves them out of the accepted tokens.
        allowed_off_text (`torch.Tensor`, *optional*):
            Number of tokens that a grammar allows in a draft that leaves the text at a token, int64 `(P, N + 1)`, for
            engines that cut the others. `None` counts all of them as drafted.
        early_ends (`EarlyEnds`, *optional*): Where drafts end early; by default nowhere.
        kinds (`dict[str, np.ndarray]`, *optional*, defaults to `{}`):
            Which responses loop and which prompts lack the chat template, see [`AcceptanceMetrics`].
        by_start (`dict[str, torch.Tensor]`, *optional*, defaults to `{}`):
            For a parallel draft the same `values` of every token of a round, float64 `(P, N, K)`: `[i, k]` is that of
            token i + k in a round that begins at token i, and 0 after the end of the response.
    """

    values: dict[str, torch.Tensor]
    lengths: torch.Tensor
    temperature: float
    draft_sampling: str
    has_exact_alpha: bool
    counting: Counting = PAPER_COUNTING
    past_end: torch.Tensor | None = None
    allowed_off_text: torch.Tensor | None = None
    early_ends: EarlyEnds | None = None
    kinds: dict[str, Array] = field(default_factory=dict)
    by_start: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def is_parallel(self) -> bool:
        """Whether the draft drafts a round in one pass, so that acceptance depends on where the round begins."""
        return bool(self.by_start)

    @property
    def acceptance(self) -> torch.Tensor:
        """a_i, float64 `(P, N)`."""
        return self.values["acceptance"]

    def read_drafted(self, name: str) -> torch.Tensor:
        """A score of drafted tokens as [`~spec_kd.acceptance.expect_rounds`] takes it: `(P, N)`, parallel `(P, N, K)`.

        Args:
            name (`str`): `"acceptance"` or `"log_ratio"`.
        """
        return (self.by_start or self.values)[name]

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

    def end_drafts(self, thresholds: Sequence[float], early_end: EarlyEnd) -> EarlyEnds:
        """Where drafts end that stop at a token below a threshold; the texts at each threshold stand below each other.

        Args:
            thresholds (`Sequence[float]`): C probabilities.
            early_end (`EarlyEnd`): How the engine ends a draft.

        Returns:
            [`~spec_kd.acceptance.EarlyEnds`] of C * P texts.
        """
        limits = torch.tensor(thresholds, dtype=torch.float64)[:, None, None]
        is_sure = (self.values[CONFIDENCE] >= limits).flatten(0, 1)  # (C * P, N)
        is_greedy = self.temperature == 0 or self.draft_sampling == "greedy"
        return EarlyEnds(is_sure, early_end.keeps_token, knows_refused=is_greedy)

    def replay(self, num_assistant_tokens: int, max_new_tokens: int) -> AcceptanceMetrics:
        """Metrics for one number of drafted tokens. Of drafts that end early `drafted` is the least there can be.

        Args:
            num_assistant_tokens (`int`): Number of tokens drafted in a round (gamma).
            max_new_tokens (`int`): Limit that the responses were written under.

        Raises:
            ValueError: If gamma is below 1, or a completion is longer than `max_new_tokens`.
        """
        rounds = expect_rounds(
            self.read_drafted("acceptance"),
            num_assistant_tokens,
            max_new_tokens,
            self.lengths,
            self.counting,
            self.past_end,
            allowed_off_text=self.allowed_off_text,
            early_ends=self.early_ends,
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
            kinds=self.kinds,
            **self._sum_alpha_by_position(num_assistant_tokens),
        )

    def _sum_alpha_by_position(self, num_assistant_tokens: int) -> dict[str, Array]:
        """Sums of alpha over the rounds that could begin, and their numbers, `(P, gamma)` each, of a parallel draft."""
        if not self.is_parallel:
            return {}
        counts = (self.lengths[:, None] - torch.arange(num_assistant_tokens)).clamp(min=0)
        sums = self.by_start["alpha"][..., :num_assistant_tokens].sum(1)
        return {"alpha_sum_by_position": sums.numpy(), "alpha_tokens_by_position": counts.numpy()}


def replay(
    draft: PreTrainedModel,
    target: PreTrainedModel | None,
    responses: ResponseRows,
    options: ReplayOptions | None = None,
    *,
    num_assistant_tokens: int = 5,
    processing_class: ProcessingClass | None = None,
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
            Rows with `prompt_ids` and `completion_ids` (EOS included), written by the target at `temperature`. The
            column `response_format` may say what each completion was held to: an object of OpenAI's requests as JSON
            text, or `{"type": "grammar", "grammar": ...}`.
        options (`ReplayOptions`, *optional*): How the responses were sampled, and how a draft is.
        num_assistant_tokens (`int`, *optional*, defaults to `5`): Number of tokens drafted in a round.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            The target's. It is needed if the server held completions to a JSON schema or a grammar, and tells which
            prompts lack the chat template.
        show_progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.
        given: Fields of [`ReplayOptions`] as keywords, which replace those of `options`. `temperature` and
            `max_new_tokens` are needed.

    Raises:
        ValueError: If an option is out of its range or a response is unusable (names its row), such as one that does
            not fit its grammar (names the token), before any model runs.
        ImportError: Completions were held to a JSON schema or a grammar, and XGrammar is missing.
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
        processing_class=processing_class,
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
    processing_class: ProcessingClass | None = None,
    description: str | None = None,
    **given: Argument,
) -> ResponseScores:
    """Runs each model once over the responses and keeps the acceptance at every position of the completions.

    Logits are formed for completion tokens only, a bounded number at a time. Train and eval modes are restored. A
    parallel draft reads each response with the masks of all rounds that could begin in it.

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
            target and the serving engine counts those that it accepts. Under a grammar also those that it proposes
            where it leaves a response, if the engine counts only what the grammar allows. For a parallel draft it is
            the number of tokens of a round that are scored; 0 scores as many as it was trained to draft.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*): The target's, as for [`replay`].
        description (`str`, *optional*): Name of a progress bar; there is none by default.
        given: Fields of [`ReplayOptions`] as keywords, which replace those of `options`.

    Raises:
        ValueError, ImportError: As [`replay`].
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
    read = read_responses(responses, options, vocab_size)
    masks = make_masks(read, options, draft if target is None else target, processing_class, vocab_size)
    if masks is not None and target is None and options.temperature > 0:
        raise ValueError(
            "Stored log-probabilities do not say how a grammar masks the target's distribution. Pass `target`."
        )
    counts_refused = masks is not None and options.counting.cuts_refused and num_past_end_tokens > 0
    parallel = read_parallel_drafting(draft.config)
    if parallel is not None:
        # One token is a round without a mask; more than the draft was trained to draft is not forbidden
        parallel = replace(parallel, num_tokens=max(2, num_past_end_tokens or parallel.num_tokens))
        refuse(
            (
                masks is not None and "draft" in options.engine.masked_models,
                f"What {options.engine.title} does with a parallel draft under a JSON schema or a grammar is not "
                'known. Pass `serving_engine="vllm"`, leave out the `response_format` of the responses, or use an '
                "autoregressive draft.",
            ),
            (
                options.assistant_confidence_threshold,
                "A parallel draft has drafted all tokens at once, and does not end at one that it is not sure of. Set "
                "`assistant_confidence_threshold` to 0.",
            ),
        )

    # Greedy completions carry the target's choice in every token already.
    is_target_read = options.temperature > 0 or measure_entropy
    scorer = ResponseScorer(
        {"draft": draft} | ({"target": target} if target is not None and is_target_read else {}),
        options,
        vocab_size,
        masks,
        options.engine.masked_models,
        counts_refused,
        parallel,
    )
    with RowProgress(len(read), description or "", description is not None) as progress:
        scores = scorer.score(read, progress)
    past_end = allowed = None
    passes_end = target is not None and num_past_end_tokens > 0 and options.counting.end == "passed"
    if parallel is not None:
        if passes_end:
            past_end = score_past_end(draft, cast(PreTrainedModel, target), read, options, vocab_size, parallel, masks)
        if counts_refused:
            allowed = count_allowed(draft, read, scores, options, vocab_size, parallel, cast(TokenMasks, masks))
    elif passes_end or counts_refused:
        continuations = DraftContinuations(draft, options, vocab_size, masks, num_past_end_tokens)
        written = continuations.write([one.text for one in read], num_past_end_tokens)
        if passes_end:
            past_end = continuations.score_past_end(cast(PreTrainedModel, target), read, written)
        if counts_refused:
            allowed = continuations.count_allowed(read, scores, written)
    known = {name: scores[name] for name in (*SCORES, CONFIDENCE) if name in scores}
    found = ResponseScores(
        values=known if parallel is None else {name: score[..., 0] for name, score in known.items()},
        lengths=torch.tensor([len(one.completion) for one in read]),
        temperature=float(options.temperature),
        draft_sampling=options.sampling,
        has_exact_alpha=options.temperature == 0 or target is not None,
        counting=options.counting,
        past_end=past_end,
        allowed_off_text=allowed,
        kinds=find_kinds([one.prompt for one in read], [one.completion for one in read], processing_class),
        by_start={} if parallel is None else known,
    )
    if not options.assistant_confidence_threshold:
        return found
    early_end = cast(EarlyEnd, options.engine.early_end)  # the options have looked
    return replace(found, early_ends=found.end_drafts([options.assistant_confidence_threshold], early_end))
