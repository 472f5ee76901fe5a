"""The yield of a synthesis: what was asked, what was kept, and why the rest was dropped."""

from collections import Counter
from dataclasses import asdict, dataclass

from spec_kd.prompts.synthesis.options import Conversation


@dataclass(frozen=True)
class SynthesisReport:
    """How many conversations were asked for, and what became of them.

    Args:
        num_queries (`int`): Wanted.
        asked (`int`): Begun: `kept` + `surplus` + all `dropped`.
        kept (`int`): In the dataset.
        surplus (`int`): Good, but more than wanted.
        dropped (`dict[str, int]`): By reason, most frequent first: those of [`TextFilter.find_fault`]; `"unfinished"`
            (the turn did not end within `max_new_tokens`), `"special_tokens"`, `"test_overlap"`, `"near_duplicate"`,
            `"unfinished_completion"`, `"empty_completion"`, `"context_full"`, `"not_text"` (a server takes no ids),
            `"unmapped_tokens"` (a server did not say which).
        by_sampling (`list[dict]`): For each temperature and top-p what was asked, and what was good.
        rounds (`int`): How often the target was asked for more.
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
        """Whether there are as many as were wanted."""
        return self.kept >= self.num_queries

    @property
    def share_good(self) -> float:
        """The yield: which share of what was asked passed all filters."""
        return (self.kept + self.surplus) / self.asked

    def to_dict(self) -> dict[str, object]:
        """As JSON values."""
        return {**asdict(self), "is_complete": self.is_complete, "share_good": self.share_good}


class Tally:
    """Counts conversations until the report is made.

    Args:
        num_queries (`int`): How many are wanted.
    """

    def __init__(self, num_queries: int):
        self._num_queries = num_queries
        self._dropped, self._asked, self._good = Counter(), Counter(), Counter()
        self.num_rounds = 0

    @property
    def num_asked(self) -> int:
        """Conversations counted."""
        return self._asked.total()

    @property
    def num_good(self) -> int:
        """Those without a fault."""
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
        """The report on all that was counted."""
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
