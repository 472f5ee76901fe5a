"""Near-duplicates among all shares of a log: found by datatrove's MinHash, and compared exactly.

Signatures are datatrove's, of our windows of characters, hashed by rensa: each of 16 bands of 8 hashes is one number.
The number of turns and one hash of the system prompts with the tools are part of it, so that prompts that cannot be
duplicates do not meet. Prompts with an equal band are compared by the exact Jaccard similarity of their windows.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import islice

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
from datatrove.utils.word_tokenizers import WordTokenizer

from spec_kd.open_types import Array
from spec_kd.prompts.deduplication import BATCH_SIZE, NUM_HASHES, compute_signatures
from spec_kd.prompts.logs.scale.exact_duplicates import find_candidates
from spec_kd.prompts.logs.scale.reading import PLACE
from spec_kd.prompts.logs.scale.step import LogStep
from spec_kd.prompts.logs.scale.work_folder import (
    MOST_AT_ONCE,
    WorkFolder,
    make_orders,
    mark_repeats,
    split_orders,
)
from spec_kd.prompts.similarity import MULTIPLIER, ComparedText, RecentTexts, TextFile, hash_windows

NUM_BANDS = 16
BAND_BITS = 60  # datatrove takes hashes below 2**61 - 1
# Make one number of the hashes of a band; odd powers of an odd number, of which none is small.
BAND_WEIGHTS = np.cumprod(np.full(NUM_HASHES // NUM_BANDS, MULTIPLIER))
# Of a prompt's equals in a band those it is compared with: the first one and some before it. Two would find all
# duplicates if all equals were duplicates; others may stand between them.
NUM_BEFORE = 4
SIGNATURE = np.dtype([("band", "<u8"), ("candidate", "<u4")])  # datatrove's file for one hash in a band
NUM_REMEMBERED = 1024  # contexts


class _NoWords(WordTokenizer):
    """Stands where datatrove wants to split texts into words; windows of characters need none."""

    def word_tokenize(self, text: str) -> list[str]:
        raise NotImplementedError

    sent_tokenize = span_tokenize = word_tokenize


class ReadTexts(PipelineStep):
    """Reads the texts of a share's candidates as documents.

    Args:
        work (`WorkFolder`): Folder of the run.
    """

    type, name = "query logs", "texts"

    def __init__(self, work: WorkFolder):
        super().__init__()
        self.work = work

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """The documents of a share."""
        candidates, _ = find_candidates(self.work, rank)
        self.work.save("candidates", rank, candidates.astype(np.uint32))
        texts, contexts = (TextFile(self.work.place(name, rank).open("rb")) for name in ("texts", "contexts"))
        places = np.memmap(self.work.place("places", rank), PLACE, "r") if len(candidates) else np.zeros(0, PLACE)
        for row in candidates:
            start, size, context, context_size, identity, turns = places[row].item()
            scope = {"context": contexts.read(context, context_size), "context_hash": identity, "turns": turns}
            yield Document(text=texts.read(start, size), id=str(row), metadata=scope)
        texts.close()
        contexts.close()


class SignPrompts(MinhashDedupSignature):
    """datatrove's signatures, of our windows.

    Args:
        folder (`str`): Place of the signatures.
    """

    def __init__(self, folder: str):
        config = MinhashConfig(num_buckets=NUM_BANDS, hashes_per_bucket=1)
        super().__init__(folder, config, language=_NoWords())

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        """Writes the signatures of a share."""
        self._contexts: OrderedDict[int, Array] = OrderedDict()
        super().run(self._sign(data), rank, world_size)

    def get_shingles(self, text: str) -> Array:
        """The bands of the document that [`_sign`] has just returned, `(NUM_BANDS,)`, uint64."""
        return self._bands

    def get_signature(self, shingles: Array) -> list[list[int]]:
        """One number for each band, each in a list of its own."""
        return [[band] for band in shingles.tolist()]

    def _sign(self, data: DocumentsPipeline) -> Iterator[Document]:
        """The documents; many are signed at once, which takes a third of the time."""
        documents = iter(data)
        while batch := list(islice(documents, BATCH_SIZE)):
            hashes = compute_signatures(*hash_windows([document.text for document in batch]))
            # Unlike contexts meet in few bands, and contexts that are nearly the same in most.
            contexts = np.stack([self._sign_context(document) for document in batch])
            turns = np.array([[document.metadata["turns"]] for document in batch], dtype=np.uint64)
            texts = hashes.reshape(len(batch), NUM_BANDS, -1) @ BAND_WEIGHTS
            for document, bands in zip(batch, _mix(_mix(contexts, turns), texts), strict=True):
                self._bands = bands >> np.uint64(64 - BAND_BITS)
                yield document

    def _sign_context(self, document: Document) -> Array:
        """One hash for each band, `(NUM_BANDS,)`, uint64."""
        identity = document.metadata["context_hash"]
        if identity not in self._contexts:
            if len(self._contexts) == NUM_REMEMBERED:
                self._contexts.popitem(last=False)
            hashes = compute_signatures(*hash_windows([document.metadata["context"]]))
            self._contexts[identity] = hashes[0, :NUM_BANDS].astype(np.uint64)
        return self._contexts[identity]


class PairPrompts(LogStep):
    """Pairs prompts with an equal band, one band in each task. Does what `MinhashDedupBuckets` does.

    That step of datatrove takes one signature after the other from a heap, which takes 30 times as long (measured on
    8 shares of 10,000 prompts), and pairs a prompt only with the one before it.

    Args:
        work (`WorkFolder`): Folder of the run.
        folder (`str`): Place of the signatures.
    """

    name = "pairs"

    def __init__(self, work: WorkFolder, folder: str):
        super().__init__(work)
        self.folder = WorkFolder(folder, work.num_shares)

    def do(self, task: int, num_tasks: int) -> None:
        """Pairs the prompts of one band; saves them sorted by the later one."""
        files = [self.folder.place(f"bucket_{task:03d}/{part:05d}.minhash.sig") for part in range(self.work.num_shares)]
        saved = [np.memmap(path, SIGNATURE, "r") if path.stat().st_size else np.zeros(0, SIGNATURE) for path in files]
        num_ranges = max(1, -(-sum(map(len, saved)) // MOST_AT_ONCE))
        bounds = [(i * 2**BAND_BITS) // num_ranges for i in range(num_ranges + 1)]
        found = [np.zeros((0, 2), dtype=np.uint64)]
        starts = [0] * len(saved)
        for high in bounds[1:]:
            parts = []
            for part, signatures in enumerate(saved):
                end = _find_end(signatures, starts[part], high)
                cut = np.array(signatures[starts[part] : end])
                starts[part] = end
                parts.append((cut["band"].copy(), make_orders(part, cut["candidate"])))
            bands, orders = (np.concatenate(values) for values in zip(*parts, strict=True))
            order = np.argsort(bands, kind="stable")
            found.append(_pair_equals(bands[order], orders[order]))
        pairs = np.concatenate(found)
        self.work.save("pairs", task, pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))])


def _find_end(signatures: Array, start: int, high: int) -> int:
    """Where the bands below a number end in sorted signatures; reads few of them."""
    end = len(signatures)
    while start < end:
        middle = (start + end) // 2
        if int(signatures[middle]["band"]) < high:
            start = middle + 1
        else:
            end = middle
    return start


def _pair_equals(bands: Array, orders: Array) -> Array:
    """Each prompt with the first one of its band and with those just before it, `(M, 2)`, the earlier one first."""
    is_repeat = mark_repeats(bands)
    places = np.arange(len(bands))
    firsts = np.maximum.accumulate(np.where(is_repeat, 0, places))  # of the band of each
    found = [np.zeros((0, 2), dtype=np.uint64)]
    for others in [firsts, *(places - back for back in range(1, NUM_BEFORE + 1))]:
        is_pair = (others >= firsts) & (others < places)
        found.append(np.stack([orders[others[is_pair]], orders[is_pair]], axis=1))
    return np.concatenate(found)


class ComparePairs(LogStep):
    """Keeps the pairs that are near-duplicates, of the prompts of one share in each task.

    Args:
        work (`WorkFolder`): Folder of the run.
        threshold (`float`): Similarity of duplicates.
    """

    name = "comparisons"

    def __init__(self, work: WorkFolder, threshold: float):
        super().__init__(work)
        self.threshold = threshold

    def do(self, task: int, num_tasks: int) -> None:
        """Compares the pairs whose later prompt is in a share."""
        found = [np.zeros((0, 2), dtype=np.uint64)]
        for band in self.work.list_parts("pairs"):
            pairs = self.work.load("pairs", band, mapped=True)
            start, end = (_find_order(pairs, part << 32) for part in (task, task + 1))
            found.append(np.array(pairs[start:end]))
        pairs = np.concatenate(found)
        pairs = pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))]
        if len(pairs):  # each once
            pairs = pairs[np.concatenate([[True], (pairs[1:] != pairs[:-1]).any(axis=1)])]
        prompts = RecentTexts(_PromptReader(self.work).read)
        is_near = [prompts[one].is_like(prompts[other], self.threshold) for one, other in pairs.tolist()]
        self.work.save("near", task, pairs[np.array(is_near, dtype=bool)])


def _find_order(pairs: Array, order: int) -> int:
    """The first pair whose later prompt is not before this one; reads few of them."""
    start, end = 0, len(pairs)
    while start < end:
        middle = (start + end) // 2
        if int(pairs[middle, 1]) < order:
            start = middle + 1
        else:
            end = middle
    return start


class DropNearDuplicates(LogStep):
    """Drops each prompt that is nearly the same as an earlier one that stays; one task."""

    name = "near-duplicates"

    def do(self, task: int, num_tasks: int) -> None:
        """Saves the candidates of each share that are dropped."""
        counts = [len(self.work.load("candidates", part, mapped=True)) for part in range(self.work.num_shares)]
        is_dropped = [np.zeros(count, dtype=bool) for count in counts]
        for part in range(self.work.num_shares):
            pairs = self.work.load("near", part)
            (others, other_rows), (_, rows) = split_orders(pairs[:, 0]), split_orders(pairs[:, 1])
            own = is_dropped[part]
            for other, other_row, row in zip(others.tolist(), other_rows.tolist(), rows.tolist(), strict=True):
                if not is_dropped[other][other_row]:
                    own[row] = True
        for part, flags in enumerate(is_dropped):
            self.work.save("dropped", part, np.flatnonzero(flags).astype(np.uint32))


class _Prompt(ComparedText):
    """What of a prompt is compared.

    Args:
        text (`str`): The text of the user's turns.
        turns (`int`): Number of these turns.
        context_hash (`int`): Hash of the system prompts with the tools.
        read_context (`Callable`): Reads these.
    """

    def __init__(self, text: str, turns: int, context_hash: int, read_context: Callable[[], str]):
        super().__init__(text, compare_ends=True)
        self.turns, self._context_hash, self._read_context = turns, context_hash, read_context

    def is_like(self, other: ComparedText, threshold: float) -> bool:
        """Whether two prompts are near-duplicates, see [`PromptFilter`]."""
        assert isinstance(other, _Prompt)
        if self.turns != other.turns or not super().is_like(other, threshold):
            return False
        if self._context_hash == other._context_hash:
            return True
        contexts = (ComparedText(prompt._read_context(), compare_ends=False) for prompt in (self, other))
        return next(contexts).is_like(next(contexts), threshold)


class _PromptReader:
    """Reads candidates of any share.

    Args:
        work (`WorkFolder`): Folder of the run.
    """

    def __init__(self, work: WorkFolder):
        self._work = work
        self._open = lru_cache(maxsize=64)(self._load_share)

    def _load_share(self, part: int) -> tuple[Array, Array, TextFile, TextFile]:
        texts, contexts = (TextFile(self._work.place(name, part).open("rb")) for name in ("texts", "contexts"))
        places = np.memmap(self._work.place("places", part), PLACE, "r")
        return self._work.load("candidates", part, mapped=True), places, texts, contexts

    def read(self, order: int) -> _Prompt:
        """The candidate at this place in the log."""
        candidates, places, texts, contexts = self._open(order >> 32)
        start, size, context, context_size, context_hash, turns = places[candidates[order & (2**32 - 1)]].item()
        return _Prompt(texts.read(start, size), turns, context_hash, partial(contexts.read, context, context_size))


def _mix(one: Array, other: Array) -> Array:
    """One number for each pair, whose high bits depend on all bits of both."""
    values = (one ^ (one >> np.uint64(29))) * MULTIPLIER + other
    return (values ^ (values >> np.uint64(32))) * MULTIPLIER
