"""Finds completions that repeat themselves to no end: greedy decoding of small models ends in loops."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Loop(NamedTuple):
    """A part of a text in which every token equals the one a period before it.

    Args:
        start (`int`): Index of its first token.
        length (`int`): Number of its tokens.
        period (`int`): Number of tokens after which it repeats.
    """

    start: int
    length: int
    period: int


def find_loop(
    ids: Sequence[int],
    *,
    max_period: int = 128,
    min_repeats: int = 3,
    min_tokens: int = 24,
    long_tokens: int = 96,
    min_share: float = 0.5,
) -> Loop | None:
    """The loop that a completion has fallen into; `None` if there is none.

    A loop is a part of the text whose tokens repeat with a period of at most `max_period`. It has at least `min_tokens`
    tokens, and at least `min_repeats` repetitions, or 2 if it has `long_tokens` tokens. It reaches the end of the text,
    where it may stop within a period, or it is at least `min_share` of the text. With several periods, the shortest
    counts.

    Loops are accepted more often than other text, and say nothing of the use of a draft. Greedy decoding makes them
    (Holtzman et al. 2020, arXiv 1904.09751). Judge the text that the target wrote without a draft.

    Args:
        ids (`Sequence[int]`): Ids of the completion `(N,)`, with its EOS if it has one.
        max_period (`int`, *optional*, defaults to `128`): Longest period in tokens, such as a list of function calls.
        min_repeats (`int`, *optional*, defaults to `3`):
            Least number of repetitions. Real texts say a sentence, a verse or a function call twice.
        min_tokens (`int`, *optional*, defaults to `24`):
            Least number of tokens in the loop. Rules of tables, dots, zeros in lists and short refrains repeat as
            often, and end sooner.
        long_tokens (`int`, *optional*, defaults to `96`):
            Number of tokens from which 2 repetitions are enough: a long period has no room for more below the usual
            limits of completions.
        min_share (`float`, *optional*, defaults to `0.5`): Share of the text at which a loop counts that was left.
    """
    text = np.asarray(ids)
    for period in range(1, min(max_period, len(text) // 2) + 1):
        needed = max(min_tokens, min(min_repeats * period, max(2 * period, long_tokens)))
        differs = np.flatnonzero(text[period:] != text[:-period])
        starts = np.concatenate([[0], differs + 1])  # each part starts a period before its first equal token
        lengths = np.diff([*starts, len(text) - period + 1]) - 1 + period
        counts = (lengths >= needed) & (lengths >= min_share * len(text))
        counts[-1] = lengths[-1] >= needed
        if counts.any():
            found = int(np.flatnonzero(counts)[0])
            return Loop(int(starts[found]), int(lengths[found]), period)
    return None
