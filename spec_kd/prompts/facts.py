"""What is counted and measured of a prompt set, for those that show it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Lengths:
    """Lengths of prompts.

    Args:
        mean (`float`): Mean over prompts.
        percentiles (`dict[str, int]`): Lengths by percent; `"0"` is the shortest prompt, `"100"` the longest.
        edges (`tuple[int, ...]`): Edges of the bins of a histogram, which grow geometrically. A bin includes its lower
            edge, the last one also its upper edge.
        counts (`tuple[int, ...]`): Number of prompts in each bin.
    """

    mean: float
    percentiles: dict[str, int]
    edges: tuple[int, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Overlap:
    """Overlap of a prompt set with another one.

    Args:
        num_other (`int`): Number of prompts of the other set.
        exact (`int`): Number of prompts whose normalized text is in the other set.
        near (`int`): Number of prompts with nearly the same text in the other set, the exact ones included.
    """

    num_other: int
    exact: int
    near: int


@dataclass(frozen=True)
class PromptFacts:
    """The fields of a [`PromptReport`], which documents them."""

    num_prompts: int
    num_with_tools: int
    num_with_system_prompt: int
    num_with_completion: int
    num_exact_duplicates: int
    num_near_duplicates: int
    near_duplicate_threshold: float
    characters: Lengths
    tokens: Lengths | None
    turns: dict[str, int]
    languages: dict[str, int]
    scenarios: dict[str, int]
    sources: dict[str, int]
    overlap: Overlap | None
