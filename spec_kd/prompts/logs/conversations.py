"""Finds out which logged prompts belong to one conversation, so that a split keeps it together."""

import hashlib
import re
from array import array
from collections.abc import Sequence

import numpy as np

from spec_kd.open_types import Array
from spec_kd.prompts.deduplication import normalize_text
from spec_kd.prompts.logs.messages import Message
from spec_kd.prompts.splitting import group_rows

NUM_PREFIXES = 8
# Pieces of a long ShareGPT conversation are named `QWJhYvA_0`, `QWJhYvA_17`: seven characters of base 62 and a number.
# Their mix of upper and lower case, which no word has, tells them from numbered names such as `testSet_1`.
SHAREGPT_PIECE = re.compile(
    r"(?=[^_]*[a-z])(?=[^_]+[A-Z][^_]*[A-Z]|[^_]+[A-Z][^_]*\d|[^_]*\d[^_]*[A-Z])([A-Za-z0-9]{7})_\d+", re.ASCII
)


def strip_piece_number(name: str) -> str:
    """The conversation that a ShareGPT id names: the same for all pieces of a long conversation.

    Only ids of ShareGPT's own form name pieces. Other ids that end with a number (`identity_0`, `identity_1`) number
    the conversations, and to merge them would make one conversation of a whole file.
    """
    found = SHAREGPT_PIECE.fullmatch(name)
    return found[1] if found else name


def hash_history(messages: Sequence[Message]) -> tuple[int, list[int]]:
    """64-bit hashes of the turns of the user and of tools: of all of them, and of those before each earlier completion.

    A request repeats the history of its conversation, so the hash of all turns of one request is among the hashes of
    the beginnings of the requests that continue it. System prompts do not count, because many contain the date, and
    neither does the assistant's text, because clients shorten it.

    Args:
        messages (`list[dict]`): A prompt.

    Returns:
        `tuple[int, list[int]]`: The hash of the whole prompt, and those of its beginnings: of more than 8, the first
        and the last 7.
    """
    state = hashlib.blake2b(digest_size=8)
    beginnings = []
    for position, message in enumerate(messages):
        if message["role"] in ("user", "tool"):
            state.update(normalize_text(message["content"]).encode() + b"\0")
        elif message["role"] == "assistant" and position:
            beginnings.append(int.from_bytes(state.digest(), "little"))
    whole = int.from_bytes(state.digest(), "little")
    beginnings = [beginning for beginning in dict.fromkeys(beginnings) if beginning != whole]
    if len(beginnings) > NUM_PREFIXES:
        beginnings = beginnings[:1] + beginnings[1 - NUM_PREFIXES :]
    return whole, beginnings


class ConversationLinks:
    """Joins conversations that have different names in a log although one request continues another one's history.

    Some loggers give each request a new name (LiteLLM fills `session_id` so), which would put the requests of one
    conversation on both sides of a split. Two prompts are of one conversation if their numbers are equal, or if one
    begins with all turns of the user in the other, and its own conversation has no prompt with these turns.

    Memory: 16 bytes for each prompt, and 16 for each of its earlier turns, of which at most 8 count.
    """

    def __init__(self) -> None:
        self._numbers, self._wholes = array("Q"), array("Q")
        self._rows, self._beginnings = array("Q"), array("Q")

    @property
    def numbers(self) -> Array:
        """Numbers of the conversations, by name or by the user's first turn, `(N,)`, uint64."""
        return np.array(self._numbers, dtype=np.uint64)

    def add(self, number: int, messages: Sequence[Message]) -> None:
        """Adds the next prompt, of the conversation with this number by name or by the user's first turn."""
        whole, beginnings = hash_history(messages)
        self._rows.extend([len(self._wholes)] * len(beginnings))
        self._beginnings.extend(beginnings)
        self._numbers.append(number)
        self._wholes.append(whole)

    def join(self) -> Array:
        """For each prompt the first one of its conversation, `(N,)`, int64."""
        return group_rows(self.numbers, links=self._find_links())

    def group(self) -> Array:
        """For each prompt the first one that belongs on the same side of a split, `(N,)`, int64.

        These are the prompts of its conversation, and prompts of others with the same turns of the user, under any
        system prompts.
        """
        return group_rows(self.numbers, np.array(self._wholes, dtype=np.uint64), links=self._find_links())

    def _find_links(self) -> Array:
        """Pairs of a prompt and an earlier prompt of its conversation under another name, `(M, 2)`."""
        wholes, beginnings = (np.array(values, dtype=np.uint64) for values in (self._wholes, self._beginnings))
        rows, numbers = np.array(self._rows, dtype=np.int64), self.numbers
        is_wanted, places = find_continued(wholes, numbers, beginnings, numbers[rows])
        return np.stack([rows[is_wanted], places[is_wanted]], axis=1)


def find_continued(wholes: Array, numbers: Array, beginnings: Array, beginning_numbers: Array) -> tuple[Array, Array]:
    """For each beginning of a prompt, whether and where there is a prompt with these turns under another name.

    Args:
        wholes (`np.ndarray`), numbers (`np.ndarray`):
            Hashes of all turns of each prompt, and the numbers of their conversations, uint64, `(N,)`.
        beginnings (`np.ndarray`), beginning_numbers (`np.ndarray`):
            Hashes of beginnings, and the numbers of the conversations of their prompts, uint64, `(M,)`.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: bool and int64, `(M,)`: whether there is one, and the first prompt with these
        turns. There is none if a prompt of the same conversation has these turns.
    """
    if not len(wholes) or not len(beginnings):
        return np.zeros(len(beginnings), dtype=bool), np.zeros(len(beginnings), dtype=np.int64)
    order = np.argsort(wholes, kind="stable")
    places = np.minimum(np.searchsorted(wholes, beginnings, sorter=order), len(wholes) - 1)
    is_wanted = wholes[order[places]] == beginnings
    is_wanted &= ~np.isin(_pair(beginnings, beginning_numbers), _pair(wholes, numbers))
    return is_wanted, order[places]


def _pair(one: Array, other: Array) -> Array:
    """One number for each pair."""
    return one * np.uint64(0x9E3779B97F4A7C15) + other
