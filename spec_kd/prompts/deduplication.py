"""Finds texts that are nearly the same, with about 300 bytes of memory for each text.

Signatures are computed by rensa (MinHash, Broder 1997). Two texts are compared exactly if one band of their signatures
is equal (locality-sensitive hashing, Indyk and Motwani 1998), and their signatures are not too different. rensa has an
index as well, but that takes 1,400 bytes a text (measured on 100,000 texts), so a million prompts would not fit into
1 GiB.
"""

import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import compress, islice
from pathlib import Path

import numpy as np
from rensa import RMinHash

from spec_kd.open_types import Array
from spec_kd.options import check_number
from spec_kd.prompts.similarity import END, LONG, MULTIPLIER, ComparedText, RecentTexts, TextList, hash_windows

NUM_HASHES = 128
BATCH_SIZE = 256
LOWEST_THRESHOLD = 0.5
EMPTY = np.uint32(2**32 - 1)
END_HASHES = 64
# Texts are compared exactly from this much below the threshold: more than three standard deviations of the estimate
# from all hashes and from those of an end.
MARGIN, END_MARGIN = 0.12, 0.17
# Bound the search among texts that share a band without being duplicates, such as those of one template. The most alike
# ones, by the estimate, are compared.
MAX_STEPS = 64
MAX_COMPARED = 16


def normalize_text(messages_or_text: str | Sequence[Mapping[str, object]]) -> str:
    """The text by which prompts are compared: the user's, without differences of case, width and white space.

    Args:
        messages_or_text (`str` or `list[dict]`):
            Text or messages. Of messages the turns of the user and of tools count; the system prompt, which many
            prompts share, and the assistant's turns would hide the differences.

    Returns:
        `str`: Unicode NFKC, case-folded, white space as single spaces.
    """
    if not isinstance(messages_or_text, str):
        turns = (m for m in messages_or_text if m["role"] in ("user", "tool"))
        messages_or_text = "\n".join(str(m.get("content") or "") for m in turns)
    return " ".join(unicodedata.normalize("NFKC", messages_or_text).casefold().split())


def find_near_duplicates(texts: Iterable[str], threshold: float = 0.8, *, compare_ends: bool = False) -> Array:
    """Finds texts that are nearly the same as an earlier text that is no duplicate itself.

    Args:
        texts (`Iterable[str]`): Texts; normalize them by [`normalize_text`] if case and spaces should not count.
        threshold (`float`, *optional*, defaults to `0.8`): See [`NearDuplicateIndex`].
        compare_ends (`bool`, *optional*, defaults to `False`): See [`NearDuplicateIndex`].

    Returns:
        `np.ndarray` of bool, one for each text.
    """
    index = NearDuplicateIndex(threshold, compare_ends=compare_ends)
    texts = iter(texts)
    flags = [index.find_and_add(batch) for batch in iter(lambda: list(islice(texts, BATCH_SIZE)), [])]
    return np.concatenate(flags) if flags else np.zeros(0, dtype=bool)


def check_threshold(threshold: float | None, name: str = "threshold", is_optional: bool = False) -> None:
    """Raises `ValueError` for a similarity by which [`NearDuplicateIndex`] cannot find duplicates."""
    reason = "Texts less alike share too few hashes to be found."
    check_number(name, threshold, LOWEST_THRESHOLD, 1, is_optional=is_optional, reason=reason)


class NearDuplicateIndex:
    """Remembers texts, and finds out whether a new one is nearly the same as one of them.

    "Nearly the same" means that the Jaccard similarity of the sets of windows of 5 characters is at least `threshold`.
    Texts are compared exactly, so that no other ones are found. Pairs to compare are chosen by 128 hashes, whose bands
    miss 5 % of the pairs at 0.8 and one in 8,000 at 0.9 (with a threshold below 0.75: 13 % at 0.5, 1 % at 0.6).

    A text takes 144 bytes and its place in the tables: 4 bytes in each of 16 bands (32 for thresholds below 0.75),
    which are at most 70 % full. This makes 240 to 330 bytes. The texts themselves are in a file without a name, which
    ends with the index.

    With `compare_ends`, long texts (over 150 characters) must also be nearly the same in their first and in their last
    100 characters. A question before or after a long document is a small part of the whole, and different questions
    about one document are no duplicates. A difference only in the middle of a long text is not found. A text takes 155
    bytes more.

    Args:
        threshold (`float`, *optional*, defaults to `0.8`): Similarity of duplicates, from 0.5 to 1.
        compare_ends (`bool`, *optional*, defaults to `False`): Whether the ends of long texts are compared as well.
        folder (`Path`, *optional*):
            Folder of the file, which is made with the first text; by default the system's for temporary files.

    Raises:
        ValueError: The threshold is out of its range.
    """

    def __init__(self, threshold: float = 0.8, *, compare_ends: bool = False, folder: Path | None = None):
        check_threshold(threshold)
        self.threshold, self._compare_ends = threshold, compare_ends
        self._texts = TextList(folder)
        self._recent = RecentTexts(lambda row: ComparedText(self._texts[row], compare_ends))
        self._band_type = np.dtype(np.uint64 if threshold >= 0.75 else np.uint32)  # one byte for each hash of the band
        self._num_bands = NUM_HASHES // self._band_type.itemsize
        # Each band has its own salt, otherwise equal bands would land on the same places.
        self._salts = np.arange(1, self._num_bands + 1, dtype=np.uint64) * np.uint64(0xD6E8FEB86659FD93)
        self._signatures = np.empty((1024, NUM_HASHES), dtype=np.uint8)
        self._scopes = np.empty(1024, dtype=np.uint64)
        # Hashes of both ends, and a flag for long texts.
        self._ends = np.empty((1024, 2 * END_HASHES + 1 if compare_ends else 0), dtype=np.uint8)
        self._tables = np.full((self._num_bands, 2048), EMPTY)  # row numbers, open addressing
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def contains(self, text: str) -> bool:
        """Whether an earlier text is nearly the same."""
        return self.find(text) is not None

    def find(self, text: str) -> int | None:
        """The number of an earlier text that is nearly the same, in the order of adding; `None` if there is none."""
        row = int(self._find([text], *_sign([text], None), self._sign_ends([text]))[0])
        return None if row < 0 else row

    def add(self, text: str) -> int:
        """Adds a text, even if one is nearly the same, and returns its number."""
        self._append([text], *_sign([text], None), self._sign_ends([text]))
        return self._size - 1

    def find_and_add(
        self,
        texts: Sequence[str],
        scopes: Sequence[int] | None = None,
        admit: Callable[[int], bool] = lambda position: True,
    ) -> Array:
        """Finds the texts that are nearly the same as an earlier one, and adds the others.

        Args:
            texts (`Sequence[str]`): Some hundreds of texts, because all pairs of them are compared.
            scopes (`Sequence[int]`, *optional*):
                64-bit numbers. Only texts of the same scope can be duplicates of each other; by default all have one.
            admit (`Callable`, *optional*):
                Function called with the position of each text that is no duplicate, in order. A text for which it
                returns `False` is not added; by default all are.

        Returns:
            `np.ndarray` of bool, `(N,)`: whether each text is a duplicate.
        """
        signatures, keys = _sign(texts, scopes)
        ends = self._sign_ends(texts)
        flags = self._find(texts, signatures, keys, ends) >= 0
        # (N, N): pairs within the batch
        similarity = _compare(signatures[:, None], signatures[None])
        may_be_alike = (keys[:, None] == keys) & (similarity >= self.threshold - MARGIN)
        rows, others = np.nonzero(may_be_alike)
        may_be_alike[rows, others] = self._may_ends_be_alike(ends[rows], ends[others])
        compared = RecentTexts(lambda position: ComparedText(texts[position], self._compare_ends))
        added = np.zeros(len(texts), dtype=bool)
        for position in range(len(texts)):
            if not flags[position]:
                near = np.flatnonzero(may_be_alike[position] & added)
                nearest = near[np.argsort(-similarity[position, near], kind="stable")][:MAX_COMPARED].tolist()
                flags[position] = any(compared[position].is_like(compared[other], self.threshold) for other in nearest)
            added[position] = not flags[position] and admit(position)
        self._append(list(compress(texts, added)), signatures[added], keys[added], ends[added])
        return flags

    def _sign_ends(self, texts: Sequence[str]) -> Array:
        """(N, 2 * END_HASHES + 1), or (N, 0) where ends are not compared."""
        if not self._ends.shape[1]:
            return np.empty((len(texts), 0), dtype=np.uint8)
        signed = np.zeros((len(texts), self._ends.shape[1]), dtype=np.uint8)
        if rows := [row for row, text in enumerate(texts) if len(text) > LONG]:
            signatures, _ = _sign([texts[row][:END] for row in rows] + [texts[row][-END:] for row in rows], None)
            heads, tails = np.split(signatures[:, :END_HASHES], 2)
            signed[rows] = np.concatenate([heads, tails, np.ones((len(rows), 1), np.uint8)], axis=1)
        return signed

    def _may_ends_be_alike(self, first: Array, second: Array) -> Array:
        """Whether two texts are not both long, or may have like ends: (..., E), (..., E) -> (...)."""
        if not self._ends.shape[1]:
            return np.ones(np.broadcast_shapes(first.shape, second.shape)[:-1], dtype=bool)
        halves = (slice(0, END_HASHES), slice(END_HASHES, 2 * END_HASHES))
        lowest = self.threshold - END_MARGIN
        heads, tails = (_compare(first[..., half], second[..., half]) >= lowest for half in halves)
        return (heads & tails) | ((first[..., -1] & second[..., -1]) == 0)

    def _find(self, texts: Sequence[str], signatures: Array, scopes: Array, ends: Array) -> Array:
        """Rows that are nearly the same, -1 where there is none: (N,), (N, H), (N,), (N, E) -> (N,)."""
        found = np.full(len(signatures), -1, dtype=np.int64)
        compared = RecentTexts(lambda query: ComparedText(texts[query], self._compare_ends))
        tried: list[set[int]] = [set() for _ in texts]
        bands = signatures.view(self._band_type)  # (N, num_bands)
        slots = self._place(bands, scopes)
        queries, numbers = np.nonzero(np.ones_like(slots, dtype=bool))
        slots = slots.ravel()
        stored = self._signatures.view(self._band_type)
        for _ in range(MAX_STEPS):
            rows = self._tables[numbers, slots]
            is_open = (rows != EMPTY) & (found[queries] < 0)
            queries, numbers, slots, rows = (part[is_open] for part in (queries, numbers, slots, rows))
            if not len(queries):
                break
            is_candidate = (stored[rows, numbers] == bands[queries, numbers]) & (self._scopes[rows] == scopes[queries])
            candidates, asking = rows[is_candidate], queries[is_candidate]
            similarity = _compare(self._signatures[candidates], signatures[asking])
            is_chosen = similarity >= self.threshold - MARGIN
            is_chosen &= self._may_ends_be_alike(self._ends[candidates], ends[asking])
            chosen = np.flatnonzero(is_chosen)
            chosen = chosen[np.argsort(-similarity[chosen], kind="stable")]
            for query, row in zip(asking[chosen].tolist(), candidates[chosen].tolist(), strict=True):
                if found[query] < 0 and row not in tried[query] and len(tried[query]) < MAX_COMPARED:
                    tried[query].add(row)
                    if compared[query].is_like(self._recent[row], self.threshold):
                        found[query] = row
            slots = (slots + 1) & (self._tables.shape[1] - 1)
        return found

    def _append(self, texts: Sequence[str], signatures: Array, scopes: Array, ends: Array) -> None:
        for text in texts:
            self._texts.append(text)
        start, self._size = self._size, self._size + len(signatures)
        for stored, added in ((self._signatures, signatures), (self._scopes, scopes), (self._ends, ends)):
            if self._size > len(stored):
                # Grown in place by a quarter if the system allows it: doubling would keep both copies in memory.
                stored.resize((max(self._size, len(stored) * 5 // 4), *stored.shape[1:]), refcheck=False)
            stored[start : self._size] = added
        if self._size > 0.7 * self._tables.shape[1]:
            width = 2 * self._tables.shape[1]
            del self._tables
            self._tables = np.full((self._num_bands, width), EMPTY)
            start = 0
        for first in range(start, self._size, 4096):
            self._insert(np.arange(first, min(first + 4096, self._size)))

    def _insert(self, rows: Array) -> None:
        slots = self._place(self._signatures[rows].view(self._band_type), self._scopes[rows])
        numbers = np.broadcast_to(np.arange(self._num_bands), slots.shape).ravel()
        slots, rows = slots.ravel(), np.repeat(rows, self._num_bands).astype(np.uint32)
        for _ in range(MAX_STEPS):
            is_free = self._tables[numbers, slots] == EMPTY
            self._tables[numbers[is_free], slots[is_free]] = rows[is_free]
            is_left = self._tables[numbers, slots] != rows  # also if two rows wanted the same free place
            numbers, slots, rows = numbers[is_left], slots[is_left], rows[is_left]
            if not len(rows):
                break
            slots = (slots + 1) & (self._tables.shape[1] - 1)

    def _place(self, bands: Array, scopes: Array) -> Array:
        """The place in the table of each band where a search begins: (N, num_bands), (N,) -> (N, num_bands)."""
        keys = bands.astype(np.uint64) ^ scopes[:, None] ^ self._salts
        keys = (keys ^ (keys >> np.uint64(32))) * MULTIPLIER
        return (keys >> np.uint64(32)).astype(np.int64) & (self._tables.shape[1] - 1)


def _compare(first: Array, second: Array) -> Array:
    """Estimated Jaccard similarity from the low bytes of the hashes: (..., H), (..., H) -> (...)."""
    num_equal = (first == second).view(np.uint8).sum(-1, dtype=np.uint8)  # fast, and 128 fits
    chance = 1 / 256  # for different hashes to have the same low byte
    return (num_equal / first.shape[-1] - chance) / (1 - chance)


def _sign(texts: Sequence[str], scopes: Sequence[int] | None) -> tuple[Array, Array]:
    """Low bytes of the signatures, (N, H), and the scopes, (N,)."""
    signatures = compute_signatures(*hash_windows(texts)).astype(np.uint8)
    return signatures, np.zeros(len(texts), np.uint64) if scopes is None else np.asarray(scopes, dtype=np.uint64)


def compute_signatures(windows: Array, offsets: Array) -> Array:
    """MinHash signatures of the texts whose windows [`hash_windows`] returned, `(N, NUM_HASHES)`, uint32."""
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(windows, offsets, NUM_HASHES, 0)
    return np.array(matrix.to_rows(), dtype=np.uint32)
