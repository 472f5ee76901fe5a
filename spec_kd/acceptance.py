"""The definitions of speculative decoding's metrics, as pure functions on tensors; nothing else defines them.

p is the target's next-token distribution and q the draft's, both at the sampling temperature; gamma is the number of
tokens drafted in a round. Accepted and emitted tokens follow the papers (Leviathan et al., arXiv 2211.17192).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spec_kd.counting import DRAFT_SAMPLINGS, PAPER_COUNTING, Counting
from spec_kd.options import check_choice, check_int, check_number, refuse

LOG_ZERO = -1e30
"""Stands for log 0: exp() of it is 0 and 0 times it is 0, where -inf would give NaN."""


def compute_alpha(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """sum_v min(p, q) = 1 - TV(p, q): the probability that one drafted token is accepted (arXiv 2211.17192, eq. 2).

    Args:
        p (`torch.Tensor`): Probabilities of the target, `(..., V)`.
        q (`torch.Tensor`): Probabilities of the draft, `(..., V)`.

    Returns:
        `torch.Tensor` of shape `(...)`.
    """
    return torch.minimum(p, q).sum(dim=-1)


def weigh_(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`values * weights` in place, and 0 where the weight is 0, whatever the value: 0 log 0 = 0.

    A NaN stays one. Both have the same shape; `values` is returned.
    """
    return values.mul_(weights).masked_fill_(weights == 0, 0.0)


def compute_greedy_draft_alpha(log_p: torch.Tensor, draft_choice: torch.Tensor) -> torch.Tensor:
    """p(argmax q): the probability that a greedily drafted token is accepted where the target samples.

    Args:
        log_p (`torch.Tensor`): Log-probabilities of the target, `(..., V)`.
        draft_choice (`torch.Tensor`): The draft's most likely ids, int64 `(...)`.

    Returns:
        `torch.Tensor` of shape `(...)`.
    """
    return log_p.gather(-1, draft_choice.unsqueeze(-1)).squeeze(-1).exp()


def compute_token_acceptance(token_log_p: torch.Tensor, token_log_q: torch.Tensor) -> torch.Tensor:
    """min(1, q(x) / p(x)) for x sampled from p: P(token x is accepted | drafting reaches it, the text is x).

    Needs the log-probabilities of the text's own tokens only, any shape, and keeps it. Use float32 or better: float16
    rounds by 0.004 at log p = -8.
    """
    return (token_log_q - token_log_p).clamp(max=0).exp()


def bound_alpha(log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds of sum_v min(p, q) where p is known at K ids only: what they share, and at most what the rest could add.

    sum_K min(p, q) <= alpha <= sum_K min(p, q) + min(1 - sum_K p, 1 - sum_K q).

    Args:
        log_p (`torch.Tensor`): Log-probabilities of the target at K different ids, `(..., K)`; -inf in unused places.
        log_q (`torch.Tensor`): Log-probabilities of the draft at the same ids, `(..., K)`.

    Returns:
        Lower and upper bound, `(...)` each.
    """
    p = log_p.exp()
    q = log_q.exp().masked_fill(p == 0, 0.0)
    low = torch.minimum(p, q).sum(dim=-1)
    rest = torch.minimum(1.0 - p.sum(dim=-1), 1.0 - q.sum(dim=-1)).clamp(min=0.0)
    return low, (low + rest).clamp(max=1.0)


def match_tokens(draft_choice: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[argmax q = x] as float64: the acceptance of token x wherever the draft is greedy. int64 of any, equal shape."""
    return (draft_choice == tokens).double()


@dataclass(frozen=True)
class LookedUp:
    """Drafts that were looked up, by the token of each of P texts at which their round begins; both int64 `(P, N)`.

    Args:
        drafted (`torch.Tensor`): Number of tokens; 0 where nothing was found, so that the draft model drafts.
        accepted (`torch.Tensor`): Number of them that equal the text, up to the first that does not.
    """

    drafted: torch.Tensor
    accepted: torch.Tensor


@dataclass(frozen=True)
class Rounds:
    """What speculative decoding spends on given texts, in expectation: one entry for each of P texts, all float64.

    Args:
        target_calls (`torch.Tensor`): Target forward passes `(P,)`, without the prompt's where it drafts nothing.
        accepted (`torch.Tensor`): Drafted tokens that were accepted, as [`Counting`] says `(P,)`.
        accepted_variance (`torch.Tensor`): Variance of that number over runs that write the same text `(P,)`.
        drafted (`torch.Tensor`): Drafted tokens, as [`Counting`] says `(P,)`.
        drafting_rounds (`torch.Tensor`): Rounds that drafted at least one token `(P,)`.
        accepted_by_position (`torch.Tensor`): Rounds in which drafted token k = 1..gamma was accepted `(P, gamma)`.
        drafted_by_position (`torch.Tensor`): Rounds in which token k was drafted `(P, gamma)`.
        known_drafts (`torch.Tensor`): Rounds whose draft has n = 0..gamma tokens, the limit aside `(P, gamma + 1)`.
        open_drafts (`torch.Tensor`):
            Rounds whose draft has at least n = 1..gamma tokens; how many is not known `(P, gamma)`. Drafts that end
            early are open once a token is refused: the draft goes on from its own token, which the text does not have.
    """

    target_calls: torch.Tensor
    accepted: torch.Tensor
    accepted_variance: torch.Tensor
    drafted: torch.Tensor
    drafting_rounds: torch.Tensor
    accepted_by_position: torch.Tensor
    drafted_by_position: torch.Tensor
    known_drafts: torch.Tensor
    open_drafts: torch.Tensor


@dataclass(frozen=True)
class EarlyEnds:
    """Where drafts end because the draft model is not sure of a token.

    Args:
        is_sure (`torch.Tensor`):
            Whether the draft is sure enough of the token that it proposes at each position of each text, bool `(P, N)`.
        keeps_token (`bool`): Whether the first token that the draft is not sure of is drafted, as the last one.
        knows_refused (`bool`):
            Whether `is_sure` is about the proposed token where it is not the text's token, too, as it is for a greedy
            draft. It matters only if such a token is kept.
    """

    is_sure: torch.Tensor
    keeps_token: bool
    knows_refused: bool


def expect_rounds(
    acceptance: torch.Tensor,
    gamma: int,
    max_new_tokens: int,
    lengths: torch.Tensor | None = None,
    counting: Counting = PAPER_COUNTING,
    past_end: torch.Tensor | None = None,
    looked_up: LookedUp | None = None,
    has_draft: bool = True,
    allowed_off_text: torch.Tensor | None = None,
    early_ends: EarlyEnds | None = None,
    block_log_ratio: torch.Tensor | None = None,
) -> Rounds:
    """Exact expectation over all rounds of speculative decoding that could have written a text.

    With u(i) the probability that a round starts at token i, u(first round) = 1 and, for g drafted tokens,
    u(i + k + 1) += u(i) * prod_{j<k} a_{i+j} * (1 - a_{i+k} if k < g else 1). Everything else is a sum over rounds
    weighted by u. For the variance, the same recursion carries on the mean and the mean square of what was accepted
    before a round. g is gamma, or what the limit leaves: max_new_tokens - i - 1 with one reserved token. By the
    counting of the papers a round that reaches the text's last token (its EOS) by acceptance ends there without a bonus
    token, and `drafted` is an upper bound for engines that let a draft stop at an EOS of its own.

    Drafts that end early: as long as tokens are accepted the draft reads the text, so that the place where it ends is
    that of the text, and all is exact but the length of drafts with a refused token (`open_drafts`). `drafted` counts
    these at their least length.

    Block verification (arXiv 2403.10444): with w_k = prod_{j<=k} q(x_j) / p(x_j) over the first k tokens of a round,
    P(at least k tokens are accepted | the text is x) = min(1, w_1, ..., w_k), which takes the place of prod a. Proof:
    the rule accepts at least k tokens of a draft X with probability b_k(X), where b_0 = 1 and
    b_k = min(1, b_{k-1} p(X_k) / q(X_k)) (its h_k is made so that this holds). It is lossless, so the first k tokens
    written have probability P_k(x) = prod p, and P(at least k accepted | x) = prod q(x_j) b_k(x) / P_k(x) = w_k b_k(x).
    That is the minimum, because w_k b_k = min(w_k, w_{k-1} b_{k-1}). What follows changes nothing: a round that accepts
    k tokens goes on with max(b_k p - q, 0), and w_k max(b_k - q(x) / p(x), 0) = m_k - m_{k+1} with m the minimum, so
    P(exactly k | the whole text) is that difference. Later rounds are independent.

    Args:
        acceptance (`torch.Tensor`):
            a_i of one text `(N,)` or of several `(P, N)`, right padded with anything finite. For parallel drafts
            `(P, N, at least gamma)`: of token i + k in a round that begins at token i, if it reaches that token.
        gamma (`int`): Tokens drafted in a round.
        max_new_tokens (`int`): The limit that the text was written under.
        lengths (`torch.Tensor`, *optional*): Tokens of each text, int64 `(P,)`; N by default.
        counting (`Counting`, *optional*): What the engine counts. By default what the papers do.
        past_end (`torch.Tensor`, *optional*):
            Acceptance of the tokens that a draft proposes after the end of each text, `(P, at least gamma)`; 0 by
            default. For parallel drafts of the shape of `acceptance`, and read only there. They matter only if
            `counting.end` is `"passed"`.
        looked_up (`LookedUp`, *optional*): Rounds whose tokens are looked up instead of drafted by a model.
        has_draft (`bool`, *optional*, defaults to `True`): Whether a model drafts where nothing was looked up.
        allowed_off_text (`torch.Tensor`, *optional*):
            Number of tokens that a grammar allows in a draft that leaves the text at a token, from that token on:
            int64 `(P, N + 1)`, the last place for a draft that reaches the end of the text. For parallel drafts of the
            shape of `acceptance`, for a draft that begins at token i and leaves the text at i + k. It matters only if
            `counting.cuts_refused`; by default nothing is refused.
        early_ends (`EarlyEnds`, *optional*): Where drafts end early; by default each has gamma tokens.
        block_log_ratio (`torch.Tensor`, *optional*):
            log q(x) - log p(x) of the text's tokens, of the shape of `acceptance`, which is not read: drafts are
            verified as blocks. By default each token is verified by itself.

    Returns:
        [`Rounds`] of P texts (P = 1 for a single one).

    Raises:
        `ValueError`: gamma < 1, a text that is empty or longer than `max_new_tokens`, an a_i outside [0, 1], or fewer
            than gamma tokens of a round.
    """
    check_num_assistant_tokens(gamma)
    a = torch.atleast_2d(acceptance.double())
    is_parallel = a.dim() == 3
    num_texts, longest = a.shape[:2]
    lengths = torch.full((num_texts,), longest) if lengths is None else lengths.cpu()
    is_text = torch.arange(longest, device=a.device) < lengths.to(a.device)[:, None]
    refuse(
        (lengths.min() < 1, "A text has no tokens: there is nothing to replay. Remove empty completions."),
        (
            lengths.max() > max_new_tokens,
            f"A text has {int(lengths.max())} tokens, more than `max_new_tokens={max_new_tokens}`. Pass the limit that "
            "the text was written under.",
        ),
        (
            is_parallel and a.shape[-1] < gamma,
            f"Responses were scored for rounds of {a.shape[-1]} drafted tokens, fewer than {gamma}. Score them again.",
        ),
        (
            not (((a >= 0) & (a <= 1)) | ~(is_text[..., None] if is_parallel else is_text)).all(),
            "An acceptance probability lies outside [0, 1]. Pass `min(1, q / p)` of finite log-probs.",
        ),
        (
            looked_up is not None and early_ends is not None,
            "Drafts that are looked up do not end early. Pass `looked_up` or `early_ends`, not both.",
        ),
    )
    lengths = lengths.to(a.device)
    first, widest = counting.first_round, max(gamma, 0 if looked_up is None else int(looked_up.drafted.max()))
    a = _list_by_start(a, lengths, widest, 0.0, past_end if counting.end == "passed" else None)
    log_ratio = None
    if block_log_ratio is not None:
        log_ratio = _list_by_start(block_log_ratio.to(a), lengths, widest, -torch.inf)
    # The number of sure tokens in a row, at every token: a draft that begins there has as many if all are accepted
    run = None
    if early_ends is not None:
        sure = _list_by_start(early_ends.is_sure.to(a), lengths, widest, 1.0)  # (P, N + 1, widest)
        run = sure.cumprod(dim=-1).sum(dim=-1).long() + early_ends.keeps_token  # (P, N + 1)
    # u(i), and the mean and the mean square of what was accepted before, times u(i)
    moments = a.new_zeros(3, num_texts, longest + widest + 1)
    moments[0, :, first] = 1
    accepted, drafted = a.new_zeros(num_texts, widest), a.new_zeros(num_texts, widest)
    calls, drafting_rounds = a.new_zeros(num_texts), a.new_zeros(num_texts)
    known, unknown = a.new_zeros(num_texts, widest + 1), a.new_zeros(num_texts, widest)
    k = torch.arange(widest, device=a.device)
    for i in range(first, longest):
        room = widest if counting.reserved_tokens is None else max_new_tokens - i - counting.reserved_tokens
        before = moments[:, :, i, None] * (i < lengths)[:, None]  # (3, P, 1)
        u = before[0, :, 0]  # (P,)
        whole = torch.full_like(lengths, gamma * has_draft)[:, None]  # (P, 1): tokens of a draft, the limit aside
        chances = a[:, i]  # (P, widest)
        if run is not None:
            whole = torch.minimum(whole, run[:, i, None])
        if looked_up is not None:
            is_found = looked_up.drafted[:, i, None] > 0
            whole = torch.where(is_found, looked_up.drafted[:, i, None], whole)
            chances = torch.where(is_found, (k < looked_up.accepted[:, i, None]).to(a), chances)
        g = whole.clamp(max=room)
        is_drafted = k < g  # (P, widest)
        if log_ratio is None:
            reach = (chances * is_drafted).cumprod(dim=-1)  # (P, widest): token k is accepted in such a round
        else:
            reach = log_ratio[:, i].cumsum(dim=-1).cummin(dim=-1).values.clamp(max=0).exp() * is_drafted
        left = (lengths - i)[:, None]  # (P, 1)
        is_counted = torch.ones_like(reach)
        if counting.end == "if_last":  # the end is an EOS: no draft reaches a last token that the limit made
            is_counted = is_counted.masked_fill((k == left - 1) & (k < g - 1), 0.0)
        reach_before = torch.nn.functional.pad(reach, (1, 0), value=1.0)  # (P, widest + 1)
        stops = reach_before - torch.nn.functional.pad(reach, (0, 1))
        gain = torch.nn.functional.pad(is_counted.cumsum(dim=-1), (1, 0))  # (P, widest + 1): tokens counted by then
        uncounted = torch.zeros_like(u)[:, None]  # (P, 1): probability that the round ends the text and is not counted
        if not counting.counts_last_round:
            ends_text = torch.arange(widest + 1, device=a.device) >= left - 1
            uncounted = (stops * ends_text).sum(dim=-1, keepdim=True)
            gain = gain.masked_fill(ends_text, 0.0)
        after = moments[:, :, i + 1 : i + widest + 2]
        after[0] += stops * before[0]
        after[1] += stops * (before[1] + gain * before[0])
        after[2] += stops * (before[2] + 2 * gain * before[1] + gain**2 * before[0])
        moments[:, :, i] -= before[:, :, 0]  # moved on
        calls += u
        drafting_rounds += u * (g[:, 0] > 0)
        accepted += u[:, None] * (reach - uncounted).clamp(min=0.0) * is_counted
        if early_ends is None or run is None:
            known.scatter_add_(1, whole, u[:, None])
            is_proposed = is_drafted * ((k < left) | counting.counts_drafted_past_end) * (1 - uncounted)
        else:  # a draft with a refused token, or with tokens after the end, goes on unseen
            known.scatter_add_(1, whole, u[:, None] * reach_before.gather(1, g))
            place = torch.minimum(k, left.clamp(min=1) - 1)  # (P, widest)
            refused = u[:, None] * stops[:, :-1] * is_drafted
            is_last = (place + 1 == run[:, i, None]) & (early_ends.keeps_token and early_ends.knows_refused)
            is_known = (place == gamma - 1) | is_last
            known.scatter_add_(1, place + 1, refused * is_known)
            unknown.scatter_add_(1, place, refused * ~is_known)
            is_proposed = (reach_before[:, :-1] - uncounted).clamp(min=0.0) * is_drafted * (k < left)
        if allowed_off_text is not None and counting.cuts_refused:
            allowed = allowed_off_text[:, i] if is_parallel else allowed_off_text[:, i : i + widest]
            is_proposed = is_proposed * _expect_uncut(chances * (k < left), allowed[:, :widest])
        drafted += u[:, None] * is_proposed
    mean, square = moments[1:].sum(dim=-1)  # (P,) each: every text has ended
    variance = (square - mean**2).clamp(min=0.0)
    sums = (accepted.sum(dim=-1), variance, drafted.sum(dim=-1), drafting_rounds, accepted, drafted)
    return Rounds(calls, *sums, known, unknown)


def _list_by_start(
    values: torch.Tensor, lengths: torch.Tensor, widest: int, fill: float, past_end: torch.Tensor | None = None
) -> torch.Tensor:
    """Values of the tokens that a round can draft, by the token at which it begins, `(P, at least N, widest)`.

    `values` are `(P, N)`, or by start already `(P, N, K)`. After the end of a text stand `past_end`, or else `fill`.
    """
    place = torch.arange(values.shape[1], device=values.device)
    after = values.new_tensor(fill) if past_end is None else past_end.to(values)
    if values.dim() == 3:
        place = place[:, None] + torch.arange(values.shape[2], device=values.device)
        values = torch.where(place >= lengths[:, None, None], after, values)
        return torch.nn.functional.pad(values, (0, widest - values.shape[2]), value=fill)
    values = torch.nn.functional.pad(values.masked_fill(place >= lengths[:, None], fill), (0, widest), value=fill)
    if past_end is not None:
        place = lengths[:, None] + torch.arange(min(widest, after.shape[1]), device=values.device)
        values = values.scatter(1, place, after[:, : place.shape[1]])
    return values.unfold(1, widest, 1)


def _expect_uncut(chances: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Probability that token k of a draft stands before the first one that the grammar refuses, `(P, K)`.

    Args:
        chances (`torch.Tensor`): Probability that token k is the text's if all before it are, `(P, K)`.
        allowed (`torch.Tensor`): Number of tokens that are allowed from token k on if it is not, int64 `(P, <= K)`.
    """
    size = chances.shape[-1]
    on_text = chances.cumprod(dim=-1)
    leaves = torch.cat([torch.ones_like(on_text[:, :1]), on_text[:, :-1]], dim=-1) - on_text  # (P, K): first at token k
    allowed = torch.nn.functional.pad(allowed.to(chances.device), (0, size - allowed.shape[-1]))
    distance = torch.arange(size, device=chances.device) - torch.arange(size, device=chances.device)[:, None]  # (K, K)
    is_uncut = (distance >= 0) & (distance < allowed[:, :, None])  # (P, K, K): left at a token, token k is allowed
    return on_text + (leaves[:, :, None] * is_uncut).sum(dim=1)


def check_num_assistant_tokens(num_assistant_tokens: int) -> None:
    """Raises `ValueError` unless at least one token is drafted in a round."""
    check_int("num_assistant_tokens", num_assistant_tokens)


def check_sampling(
    temperature: float, draft_sampling: str = "stochastic", samplings: Sequence[str] = DRAFT_SAMPLINGS
) -> None:
    """Raises `ValueError` for a negative temperature or a `draft_sampling` that is not among `samplings`."""
    check_number("temperature", temperature, 0, reason="0 is greedy.")
    check_choice("draft_sampling", draft_sampling, samplings)


def expect_block_efficiency(alpha: float, gamma: int) -> float:
    """Tokens per target pass: (1 - alpha^(gamma + 1)) / (1 - alpha) (arXiv 2211.17192, eq. 1).

    It holds if every drafted token is accepted with the same probability, independently of the others. Real texts are
    not so; `expect_rounds` is exact for them.
    """
    return float(sum(alpha**k for k in range(gamma + 1)))


def compute_round_cost(
    num_draft_steps: int, cost_ratio: float, verify_cost: float, round_overhead: float = 0.0
) -> float:
    """Draft steps x c + v + overhead: the time of a round, in steps of the target.

    Args:
        num_draft_steps (`int`): Passes of the draft in the round.
        cost_ratio (`float`): c, a draft step over a target step.
        verify_cost (`float`): v(gamma), a target pass over gamma + 1 tokens over one over one token.
        round_overhead (`float`): What else a round costs in this engine.
    """
    return num_draft_steps * cost_ratio + verify_cost + round_overhead


def predict_speedup(
    block_efficiency: float, gamma: int, cost_ratio: float, verify_cost: float, round_overhead: float = 0.0
) -> float:
    """block_efficiency / (gamma c + v(gamma) + overhead): tokens per unit of time, over those of plain decoding.

    Theorem 3.8 of arXiv 2211.17192 with a verification that need not be free. All costs are in steps of the target.

    Args:
        block_efficiency (`float`): Tokens per target pass at this gamma.
        gamma (`int`): Tokens drafted in a round, each by a pass of the draft.
        cost_ratio (`float`), verify_cost (`float`), round_overhead (`float`): As in [`compute_round_cost`].
    """
    return block_efficiency / compute_round_cost(gamma, cost_ratio, verify_cost, round_overhead)
