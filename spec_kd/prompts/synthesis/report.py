"""The yield of a synthesis: how many conversations were begun and kept, and why the others were dropped."""

from collections import Counter
from dataclasses import asdict, dataclass

from spec_kd.prompts.synthesis.options import Conversation


@dataclass(frozen=True)
class SynthesisReport:
    """Counts of conversations in a synthesis.

    Args:
        num_queries (`int`): Number of queries that were wanted.
        asked (`int`): Number of conversations begun: `kept`, `surplus` and all `dropped`.
        kept (`int`): Number of conversations in the dataset.
        surplus (`int`): Number of good conversations beyond the wanted ones.
        dropped (`dict[str, int]`): Number of dropped conversations by reason, the most frequent first: those of
            [`TextFilter.find_fault`], `"unfinished"` (the turn did not end within `max_new_tokens`),
            `"special_tokens"`, `"test_overlap"`, `"near_duplicate"`, `"unfinished_completion"`, `"empty_completion"`,
            `"context_full"`, `"not_text"` (the prompt has no text, which a server needs), `"unidentified_tokens"` (a
            server did not say which tokens it wrote).
        by_sampling (`list[dict]`): For each temperature and top-p the number of conversations begun, and of good ones.
        rounds (`int`): Number of rounds.
    """

    num_queries: int
    asked: int
    kept: int
    surplus: int
    dropped: dict[str, int]
    by_sampling: list[dict[str, float]]
    rounds: int

    @property
    def is_complete(self) -> bool:
        """Whether as many queries are kept as were wanted."""
        return self.kept >= self.num_queries

    @property
    def share_good(self) -> float:
        """The yield: the share of conversations begun that passed all filters."""
        return (self.kept + self.surplus) / self.asked

    def to_dict(self) -> dict[str, object]:
        """The report as JSON values."""
        return {**asdict(self), "is_complete": self.is_complete, "share_good": self.share_good}


class Tally:
    """Counts conversations for the report.

    Args:
        num_queries (`int`): Number of queries that are wanted.
    """

    def __init__(self, num_queries: int):
        self._num_queries = num_queries
        self._dropped: Counter[str] = Counter()
        self._asked: Counter[tuple[float, float]] = Counter()
        self._good: Counter[tuple[float, float]] = Counter()
        self.num_rounds = 0

    @property
    def num_asked(self) -> int:
        """Number of conversations counted."""
        return self._asked.total()

    @property
    def num_good(self) -> int:
        """Number of conversations without a fault."""
        return self._good.total()

    def add(self, conversation: Conversation) -> None:
        """Counts a conversation that was written."""
        sampling = (conversation.temperature, conversation.top_p)
        self._asked[sampling] += 1
        if conversation.fault is None:
            self._good[sampling] += 1
        else:
            self._dropped[conversation.fault] += 1

    def build_report(self) -> SynthesisReport:
        """The report on all conversations counted."""
        kept = min(self.num_good, self._num_queries)
        return SynthesisReport(
            num_queries=self._num_queries,
            asked=self.num_asked,
            kept=kept,
            surplus=self.num_good - kept,
            dropped=dict(self._dropped.most_common()),
            by_sampling=[
                {"temperature": t, "top_p": p, "asked": count, "good": self._good[t, p]}
                for (t, p), count in sorted(self._asked.items())
            ],
            rounds=self.num_rounds,
        )
