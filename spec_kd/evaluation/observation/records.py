"""What was observed of a running server: each request, and what follows from all of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from spec_kd.evaluation.metrics import Interval, bootstrap_median, bootstrap_ratio
from spec_kd.evaluation.report.left_out import LeftOut, describe_kinds
from spec_kd.evaluation.text_kinds import find_kinds
from spec_kd.open_types import Array, JsonObject
from spec_kd.serving.observer import DraftCounts
from spec_kd.vocabulary import ProcessingClass

NAN = float("nan")


@dataclass(frozen=True, kw_only=True)
class ObservedRequest:
    """One request and its answer.

    Args:
        row (`int`): Number of the prompt.
        completion_ids (`list[int]`): Ids that the server wrote, EOS included.
        finish_reason (`str`): `"stop"` at an EOS, else `"length"`.
        request_seconds (`float`): Seconds from the request to its whole answer.
        decoding_seconds (`float`, *optional*): Seconds from the first to the last token, as the server tells.
        counts (`DraftCounts`, *optional*): What the server tells of the drafts of this request.
        response_format (`dict`, *optional*):
            What the completion was held to, as [`~spec_kd.replay`] reads it; `None` for free text.
    """

    row: int
    completion_ids: list[int]
    finish_reason: str
    request_seconds: float
    decoding_seconds: float | None = None
    counts: DraftCounts | None = None
    response_format: JsonObject | None = None

    @property
    def known_counts(self) -> DraftCounts | None:
        """`counts`, or zeros for a single token, which the prompt's pass wrote; SGLang tells nothing of such a one."""
        return self.counts or (DraftCounts(0, 0, 0, []) if len(self.completion_ids) == 1 else None)

    def count_per_second(self, uses_decoding: bool) -> float:
        """Tokens a second: those after the first by `decoding_seconds`, or all by `request_seconds`; NaN for none."""
        tokens, seconds = len(self.completion_ids), self.request_seconds
        if uses_decoding:
            tokens, seconds = tokens - 1, self.decoding_seconds or 0.0
        return tokens / seconds if seconds > 0 and tokens > 0 else NAN


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What a server did with a draft on P prompts.

    Args:
        serving_engine (`str`): Engine of the server.
        model (`str`): Name of the target there.
        temperature (`float`): Temperature that the target sampled at, 0.0 for greedy.
        max_new_tokens (`int`): Limit of the completions.
        concurrency (`int`): Requests at a time.
        num_assistant_tokens (`int`, *optional*): Tokens drafted in a round; `None` if unknown.
        prompt_ids (`list[list[int]]`): Ids of each prompt.
        requests (`list[ObservedRequest]`): Requests with the draft, in the order of the prompts.
        plain_requests (`list[ObservedRequest]`): The same without the draft; empty if they were not asked.
        counters (`DraftCounts`, *optional*): What the server's counters grew by; `None` if they were not read.
        counted_requests (`int`): Requests that were asked between two readings of the counters.
        assistant_confidence_threshold (`float`, *optional*, defaults to `0.0`):
            Probability below which a draft ends; 0.0 where drafts end nowhere.
        unusable (`dict[int, str]`): Why a prompt has no request, by its number.
    """

    serving_engine: str
    model: str
    temperature: float
    max_new_tokens: int
    concurrency: int
    num_assistant_tokens: int | None
    prompt_ids: list[list[int]]
    requests: list[ObservedRequest]
    plain_requests: list[ObservedRequest] = field(default_factory=list)
    counters: DraftCounts | None = None
    counted_requests: int = 0
    assistant_confidence_threshold: float = 0.0
    unusable: dict[int, str] = field(default_factory=dict)

    @property
    def drafted(self) -> Array | None:
        """Drafted tokens of each request `(P,)`; `None` if the server tells only of all of them together."""
        return self._list("drafted")

    @property
    def accepted(self) -> Array | None:
        """Accepted drafted tokens of each request `(P,)`; `None` as `drafted`."""
        return self._list("accepted")

    @property
    def drafting_rounds(self) -> Array | None:
        """Rounds of each request that drafted at least one token `(P,)`; `None` as `drafted`."""
        return self._list("rounds")

    @property
    def accepted_by_position(self) -> Array | None:
        """Rounds of each request in which drafted token k was accepted `(P, gamma)`; `None` as `drafted`."""
        counts = [request.known_counts for request in self.requests]
        found = [None if one is None else one.accepted_by_position for one in counts]
        if any(one is None for one in found):
            return None
        # a server may leave out positions at which nothing was accepted
        longest = max(self.num_assistant_tokens or 0, *(len(one or ()) for one in found))
        return np.array([[*(one or ()), *[0] * (longest - len(one or ()))] for one in found])

    @property
    def totals(self) -> DraftCounts | None:
        """The server's counters, where they are of these requests and of no others."""
        counted = self.counters
        if counted is None or self.counted_requests != len(self.requests):
            return None
        own = [(counted.drafted, self.drafted), (counted.accepted, self.accepted)]
        return counted if all(a is None or b is None or a == b.sum() for a, b in own) else None

    @property
    def acceptance_rate(self) -> Interval:
        """Accepted over drafted tokens, with bounds where they are known for each request."""
        return self._divide("accepted", "drafted")

    @property
    def mean_acceptance_length(self) -> Interval:
        """1 + accepted tokens / drafting rounds, with bounds where they are known for each request."""
        return Interval(*(1 + value for value in self._divide("accepted", "drafting_rounds")))

    @property
    def acceptance_rate_per_position(self) -> list[Interval]:
        """Share of the drafting rounds in which drafted token k = 1, 2, ... was accepted; empty if unknown."""
        by_position, rounds, totals = self.accepted_by_position, self.drafting_rounds, self.totals
        if by_position is not None and rounds is not None:
            return [bootstrap_ratio(column, rounds) for column in by_position.T]
        if totals is None or not totals.rounds:
            return []
        return [Interval(accepted / totals.rounds, NAN, NAN) for accepted in totals.accepted_by_position or ()]

    @property
    def has_decoding_seconds(self) -> bool:
        """Whether all requests were timed by the server itself, without the prompt's pass."""
        return all(one.decoding_seconds is not None for one in (*self.requests, *self.plain_requests))

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second of one request with the draft: all tokens over the sum of their times."""
        return self._rate(self.requests)

    @property
    def plain_tokens_per_second(self) -> float:
        """The same without the draft; NaN if it was not asked."""
        return self._rate(self.plain_requests)

    @property
    def speedups(self) -> Array:
        """Tokens a second with the draft over those without it, of each request `(P,)`; NaN where one is missing."""
        plain = {one.row: one.count_per_second(self.has_decoding_seconds) for one in self.plain_requests}
        return np.array(
            [one.count_per_second(self.has_decoding_seconds) / plain.get(one.row, NAN) for one in self.requests]
        )

    @property
    def speedup(self) -> Interval:
        """Median of the speed-ups over prompts, with its bootstrap interval; NaN without plain requests."""
        known = self.speedups[np.isfinite(self.speedups)]
        return bootstrap_median(known) if len(known) else Interval(NAN, NAN, NAN)

    @property
    def num_equal_completions(self) -> int:
        """Prompts with the same completion with and without the draft."""
        plain = {one.row: one.completion_ids for one in self.plain_requests}
        return sum(plain.get(one.row) == one.completion_ids for one in self.requests)

    def select(self, is_chosen: Array) -> "Observation":
        """Some requests alone. The server's counters, which are of all of them, are left out.

        Args:
            is_chosen (`np.ndarray`): Which requests, bool `(P,)`; plain ones to the same prompts go with them.
        """
        requests = [one for one, is_kept in zip(self.requests, is_chosen, strict=True) if is_kept]
        rows = {one.row for one in requests}
        plain = [one for one in self.plain_requests if one.row in rows]
        return replace(self, requests=requests, plain_requests=plain, counters=None, counted_requests=0)

    def list_left_out(self, processing_class: ProcessingClass | None = None) -> list[LeftOut]:
        """The metrics with and without looping completions and prompts that lack the chat template.

        Completions are judged as the target wrote them without the draft, where it was asked.

        Args:
            processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
                The target's. Without it nothing is said of the prompts.
        """
        plain = {one.row: one.completion_ids for one in self.plain_requests}
        completions = [plain.get(one.row, one.completion_ids) for one in self.requests]
        prompts = [self.prompt_ids[one.row] for one in self.requests]

        def measure(is_chosen: Array) -> dict[str, Interval | None]:
            chosen = self if is_chosen.all() else self.select(is_chosen)
            return {
                "acceptance_rate": chosen.acceptance_rate,
                "mean_acceptance_length": chosen.mean_acceptance_length,
                "speedup": chosen.speedup if plain else None,
            }

        return describe_kinds(find_kinds(prompts, completions, processing_class), measure)

    def list_responses(self) -> list[JsonObject]:
        """Prompt, completion and format of each request with the draft, as [`~spec_kd.replay`] reads them."""
        return [
            {
                "prompt_ids": self.prompt_ids[one.row],
                "completion_ids": one.completion_ids,
                "response_format": one.response_format,
            }
            for one in self.requests
        ]

    def _list(self, name: str) -> Array | None:
        values = [getattr(request.known_counts, name, None) for request in self.requests]
        return None if None in values else np.array(values)

    def _divide(self, numerator: str, denominator: str) -> Interval:
        columns = getattr(self, numerator), getattr(self, denominator)
        if columns[0] is not None and columns[1] is not None:
            return bootstrap_ratio(*columns)
        names = {"drafting_rounds": "rounds"}
        above, below = (getattr(self.totals, names.get(name, name), None) for name in (numerator, denominator))
        return Interval(above / below if above is not None and below else NAN, NAN, NAN)

    def _rate(self, requests: Sequence[ObservedRequest]) -> float:
        rates = [one.count_per_second(self.has_decoding_seconds) for one in requests]
        tokens = [len(one.completion_ids) - self.has_decoding_seconds for one in requests]
        timed = [(count, rate) for count, rate in zip(tokens, rates, strict=True) if math.isfinite(rate)]
        return sum(count for count, _ in timed) / sum(count / rate for count, rate in timed) if timed else NAN
