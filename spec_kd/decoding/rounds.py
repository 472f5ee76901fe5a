"""What speculative decoding leaves behind: the text, its rounds, and where the draft was corrected."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Round(NamedTuple):
    """One target call: tokens drafted for it, how many of them were accepted, and how many tokens it emitted.

    An accepted EOS counts as accepted, and ends the text without a bonus token. Tokens that were drafted for positions
    after the end of the text do not count as drafted.
    """

    drafted: int
    accepted: int
    emitted: int


@dataclass(frozen=True, kw_only=True)
class SpeculativeCompletion:
    """What was written to P prompts, and how.

    Args:
        completion_ids (`list[list[int]]`): What was written to each prompt, EOS included.
        rounds (`list[list[Round]]`): Every target call of each prompt.
        rejected_positions (`list[list[int]]`):
            Where the target wrote another token than the one drafted, ascending indices into the completion. Bonus
            tokens, for which nothing was drafted, are not among them.
        seconds (`float`): Wall-clock of all prompts together.
    """

    completion_ids: list[list[int]]
    rounds: list[list[Round]]
    rejected_positions: list[list[int]]
    seconds: float


class CompletionInProgress:
    """One completion while it is written, with its rounds and rejected positions so far.

    Args:
        index (`int`): Number of its prompt.
        max_new_tokens (`int`): Most tokens it may have.
        eos_ids (`set[int]`): Ids that end it.
    """

    def __init__(self, index: int, max_new_tokens: int, eos_ids: Collection[int]):
        self.index = index
        self.ids: list[int] = []
        self.rejected_positions: list[int] = []
        self.rounds: list[Round] = []
        self._max_new_tokens = max_new_tokens
        self._eos_ids = eos_ids

    @property
    def num_left(self) -> int:
        """Tokens that may still be written."""
        return self._max_new_tokens - len(self.ids)

    @property
    def is_complete(self) -> bool:
        """Whether it has reached an EOS or its limit."""
        return self.num_left == 0 or (bool(self.ids) and self.ids[-1] in self._eos_ids)

    def add_round(self, drafted: Sequence[int], accepted: int, next_token: int) -> None:
        """Takes in one target call.

        Args:
            drafted (`list[int]`): The tokens offered for the next positions, the first EOS among them the last.
            accepted (`int`): How many of them the target took.
            next_token (`int`): The target's own token behind those; left out if they end with an EOS.
        """
        if accepted < len(drafted):
            self.rejected_positions.append(len(self.ids) + accepted)
        emitted = list(drafted[:accepted])
        if not (emitted and emitted[-1] in self._eos_ids):
            emitted.append(next_token)
        self.ids += emitted
        self.rounds.append(Round(len(drafted), accepted, len(emitted)))


def leave_out_drafts_after_end(rounds: Sequence[Round]) -> list[Round]:
    """The rounds of one whole text without the tokens that were drafted for positions behind its last token."""
    left, counted = 0, []
    for record in reversed(rounds):
        left += record.emitted
        counted.append(record._replace(drafted=min(record.drafted, left)))
    return counted[::-1]
