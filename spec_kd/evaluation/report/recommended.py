"""What to set in the serving engine for a draft."""

from dataclasses import dataclass, field

from spec_kd.reports.numbers import Interval
from spec_kd.serving.configuration import EngineConfiguration

FIXED, THRESHOLD, BLOCK, PARALLEL, ALONE = "fixed", "threshold", "block", "parallel", "alone"
WORDS = {
    FIXED: "a fixed number of tokens",
    THRESHOLD: "ends where the draft is not sure",
    BLOCK: "verified as a block",
    PARALLEL: "written while the target verifies (what if)",
    ALONE: "without a draft",
}
"""The ways of drafting, in words."""


@dataclass(frozen=True, kw_only=True)
class DraftingPlan:
    """One way of drafting at one temperature and batch size, at its best number of drafted tokens.

    Args:
        setting (`str`): Name of the report's setting.
        temperature (`float`): Temperature of the target, 0.0 for greedy.
        batch_size (`int`): Sequences at a time.
        draft_sampling (`str`): `"stochastic"`, `"greedy"` or `"matching"`.
        method (`str`): `"fixed"`, `"threshold"`, `"block"`, `"parallel"` or `"alone"`, see `WORDS`.
        num_assistant_tokens (`int`): Tokens drafted in a round, at most; 0 without a draft.
        threshold (`float`): Probability below which a draft ends; 0.0 for none.
        block_efficiency (`Interval`): Tokens per target pass.
        drafted (`tuple[float, float]`): Least and most drafted tokens of a round on average; equal where known.
        predicted_speedup (`Interval`): Predicted speed-up; the lowest possible where the drafted tokens are bounded.
        highest_speedup (`float`): The highest possible one; equal where the drafted tokens are known.
        is_recommended (`bool`): Whether this plan is the one to use.
    """

    setting: str
    temperature: float
    batch_size: int
    draft_sampling: str
    method: str
    num_assistant_tokens: int
    threshold: float
    block_efficiency: Interval
    drafted: tuple[float, float]
    predicted_speedup: Interval
    highest_speedup: float
    is_recommended: bool = False


@dataclass(frozen=True, kw_only=True)
class Recommendations:
    """What to set in the engine for one draft.

    Args:
        plans (`list[DraftingPlan]`): What each way of drafting gives; one is recommended for each temperature and size.
        configurations (`list[EngineConfiguration]`): The recommended ones, as the engine takes them.
        notes (`list[str]`): What a reader must know beside them, in sentences.
    """

    plans: list[DraftingPlan]
    configurations: list[EngineConfiguration]
    notes: list[str] = field(default_factory=list)
