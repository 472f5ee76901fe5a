"""What speculative decoding records: completions, their rounds, and where the target corrected the draft."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple


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
        self._max_new_tokens = max_new_tokens
        self._eos_ids = eos_ids

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
