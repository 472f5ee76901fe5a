"""Drafts that cost nothing: tokens that followed the same n-gram earlier in the text, as the engines look them up."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from spec_kd.counting import Counting

WIDTH = 4  # bytes of an id, so that a search for bytes is a search for ids

Propose = Callable[[Sequence[int], int], Sequence[int]]
"""From the ids so far and the most tokens to draft to the drafted ids, none where nothing is found."""


@dataclass(frozen=True)
class Lookup:
    """How an engine drafts without a draft model.

    Args:
        name (`str`): The engine's name for it.
        propose (`Callable`): Its drafts with the engine's defaults.
        num_draft_tokens (`int`): Tokens drafted in a round by default.
        flags (`str`): What turns it on.
        source (`str`): Where it is written, with the version that was read.
        counting (`Counting`, *optional*): What is counted, where it differs from rounds with a draft model.
        min_tokens_left (`int`, *optional*, defaults to `1`): Tokens that the limit must leave for a round to draft.
    """

    name: str
    propose: Propose
    num_draft_tokens: int
    flags: str
    source: str
    counting: Counting | None = None
    min_tokens_left: int = 1


def find_ngram(text: bytes, ngram: bytes, start: int = 0) -> Iterator[int]:
    """Positions at which the ids of `ngram` begin in `text`, both as bytes, from left to right."""
    at = text.find(ngram, start * WIDTH)
    while at >= 0:
        if at % WIDTH == 0:
            yield at // WIDTH
        at = text.find(ngram, at + 1)


def to_bytes(ids: Sequence[int]) -> bytes:
    """Ids as bytes, for [`find_ngram`]."""
    return b"".join(token.to_bytes(WIDTH) for token in ids)


def propose_after_longest(ids: Sequence[int], num_tokens: int, min_ngram: int = 5, max_ngram: int = 5) -> list[int]:
    """What vLLM's `ngram` drafts: what followed the first occurrence of the longest n-gram that ends the text.

    Args:
        ids (`Sequence[int]`): The prompt and what is written.
        num_tokens (`int`): Most tokens to draft.
        min_ngram (`int`, *optional*, defaults to `5`), max_ngram (`int`, *optional*, defaults to `5`):
            `prompt_lookup_min` and `prompt_lookup_max`.
    """
    text = to_bytes(ids)
    for size in range(min(max_ngram, len(ids) - 1), min_ngram - 1, -1):
        for at in find_ngram(text[:-WIDTH], to_bytes(ids[-size:])):
            return list(ids[at + size : at + size + num_tokens])
    return []


def propose_before_eos(
    ids: Sequence[int], num_tokens: int, max_ngram: int = 2, eos_ids: Collection[int] = ()
) -> list[int]:
    """What `generate(prompt_lookup_num_tokens=...)` drafts: as vLLM from one id on, but nothing from an EOS on.

    Args:
        ids (`Sequence[int]`): The prompt and what is written.
        num_tokens (`int`): Most tokens to draft.
        max_ngram (`int`, *optional*, defaults to `2`): `max_matching_ngram_size`.
        eos_ids (`Collection[int]`, *optional*, defaults to `()`): Ids that end a completion.
    """
    drafted = propose_after_longest(ids, num_tokens, 1, max_ngram)
    return drafted[: next((k for k, token in enumerate(drafted) if token in eos_ids), None)]


def propose_after_last(ids: Sequence[int], num_tokens: int, size_n: int = 12, size_m: int = 48) -> list[int]:
    """What llama.cpp's `ngram-simple` drafts: what followed the last earlier occurrence of the n-gram at the end.

    Nothing is drafted where fewer than `size_n` tokens followed it.

    Args:
        ids (`Sequence[int]`): The prompt and what is written.
        num_tokens (`int`): Most tokens to draft.
        size_n (`int`, *optional*, defaults to `12`): `--spec-ngram-simple-size-n`.
        size_m (`int`, *optional*, defaults to `48`): `--spec-ngram-simple-size-m`.
    """
    earlier = ids[:-1]
    if len(earlier) <= size_n + size_m + 1:
        return []
    found = [at for at in find_ngram(to_bytes(earlier[:-1]), to_bytes(ids[-size_n:]), 1)]
    drafted = list(earlier[found[-1] + size_n :][:size_m]) if found else []
    return drafted[:num_tokens] if len(drafted) >= size_n else []


class CompletionStore:
    """Drafts from a store of earlier completions, as retrieval does (REST, arXiv 2311.08252; RASD, arXiv 2503.03434).

    The longest n-gram at the end of the text is looked up, first in the text itself, then in the store, where the
    latest completion counts.

    Args:
        completions (`Iterable[Sequence[int]]`): Ids of each completion.
        min_ngram (`int`, *optional*, defaults to `2`), max_ngram (`int`, *optional*, defaults to `5`):
            Sizes of the n-grams that are looked up.
    """

    def __init__(self, completions: Iterable[Sequence[int]], min_ngram: int = 2, max_ngram: int = 5):
        self.min_ngram, self.max_ngram = min_ngram, max_ngram
        self._completions = [list(ids) for ids in completions]
        self._places: dict[tuple[int, ...], tuple[int, int]] = {
            tuple(ids[at : at + size]): (row, at + size)
            for row, ids in enumerate(self._completions)
            for size in range(min_ngram, max_ngram + 1)
            for at in range(len(ids) - size)
        }

    def propose(self, ids: Sequence[int], num_tokens: int) -> list[int]:
        """Drafted ids, none where nothing is found."""
        for size in range(min(self.max_ngram, len(ids) - 1), self.min_ngram - 1, -1):
            if own := propose_after_longest(ids, num_tokens, size, size):
                return own
            if place := self._places.get(tuple(ids[-size:])):
                return self._completions[place[0]][place[1] : place[1] + num_tokens]
        return []


VLLM_NGRAM = Lookup(
    name="ngram",
    propose=propose_after_longest,
    num_draft_tokens=5,
    flags='"method": "ngram"',
    source="vllm/v1/spec_decode/ngram_proposer.py of vLLM 0.32",
)
PROMPT_LOOKUP = Lookup(
    name="prompt lookup",
    propose=propose_before_eos,
    num_draft_tokens=10,
    flags="generate(prompt_lookup_num_tokens=10)",
    source="`PromptLookupCandidateGenerator` in transformers/generation/candidate_generator.py (5.23)",
    # It looks at the limit only where one token is left
    counting=Counting(reserved_tokens=0),
    min_tokens_left=2,
)
NGRAM_SIMPLE = Lookup(
    name="ngram-simple",
    propose=propose_after_last,
    num_draft_tokens=48,
    flags="--spec-type ngram-simple",
    source="`common_ngram_simple_draft` in common/ngram-map.cpp of llama.cpp (October 2026)",
)
