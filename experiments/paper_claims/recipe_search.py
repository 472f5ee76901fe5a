"""The search of a recipe on validation prompts.

One axis at a time in the ablation's domain; the best of each axis in the others, too; then what helped there together.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from spec_kd import WhiteBoxDistillConfig
from spec_kd.losses import SPARSE_METHODS

from .cells import DIVERGED, Cell, apply_changes, compute_key, make_base
from .compare import BLOCK_EFFICIENCY, SETTING_NAMES, Lines, find_common_lines
from .profile import Profile
from .questions import TUNING_SEEDS, SearchOutcome, list_search_axes
from .record import Record

WORTH_TRYING = 0.01  # log of tokens a target pass over the base cell's in the ablation's domain


def find_search_outcome(profile: Profile, record: Record) -> SearchOutcome:
    """How far the search is by what is in the record."""
    finalists = find_finalists(profile, record)
    if finalists is None:
        return SearchOutcome()
    combined = find_combined(profile, record, finalists)
    if combined is None:
        return SearchOutcome(finalists)
    return SearchOutcome(finalists, combined, find_winner(profile, record, finalists, combined))


def score_changes(
    profile: Profile, record: Record, changes: dict[str, Any], domains: Sequence[str] | None = None
) -> float | None:
    """Mean over domains, by default all, and settings of log(tokens a target pass over the base cell's).

    Minus infinity if a cell diverged, `None` if not all were run.
    """
    scores = []
    for domain in domains or profile.domains:
        base = replace(make_base(profile, domain), split="validation")
        if has_diverged(profile, record, apply_changes(base, changes)):
            return -math.inf
        lines = find_common_lines(profile, record, [apply_changes(base, changes), base], TUNING_SEEDS)
        if not all(own.by_seed for own in lines):
            return None
        scores += [
            _find_efficiency(lines[0], setting) - _find_efficiency(lines[1], setting) for setting in SETTING_NAMES
        ]
    return float(np.mean(scores))


def has_diverged(profile: Profile, record: Record, cell: Cell) -> bool:
    """Whether the loss was not finite with a seed that the search uses."""
    keys = (compute_key(profile, replace(cell, seed=seed)) for seed in TUNING_SEEDS)
    return any(record.find_builds(DIVERGED, key) for key in keys)


def _find_efficiency(lines: Lines, setting: str) -> float:
    tokens, calls = lines.sum_columns(setting, BLOCK_EFFICIENCY, TUNING_SEEDS)
    return float(np.log(tokens.sum() / calls.sum()))


def find_finalists(profile: Profile, record: Record) -> list[dict[str, Any]] | None:
    """The best change of each axis in the ablation's domain if it is worth trying elsewhere; `None` before all were
    run."""
    finalists = []
    for options in list_search_axes(profile).values():
        scores = {n: score_changes(profile, record, c, [profile.plan.ablation_domain]) for n, c in options.items()}
        if None in scores.values():
            return None
        best = max(scores, key=scores.__getitem__)
        if scores[best] > WORTH_TRYING:
            finalists.append(options[best])
    return finalists


def find_combined(profile: Profile, record: Record, finalists: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The finalists that beat the base cell over all domains, put together, the best first; `None` before all were run.

    A cached teacher does not serve every loss: what does not go with a better finalist is left out. With one of them or
    none there is nothing to put together: an empty dict.
    """
    scores = [score_changes(profile, record, changes) for changes in finalists]
    if None in scores:
        return None
    combined: dict[str, Any] = {}
    number = 0
    for score, changes in sorted(zip(scores, finalists, strict=True), key=lambda pair: pair[0], reverse=True):
        candidate = {**combined, **changes, "options": {**combined.get("options", {}), **changes.get("options", {})}}
        if score > 0 and is_served(profile, candidate):
            combined, number = candidate, number + 1
    return combined if number > 1 else {}


def is_served(profile: Profile, changes: dict[str, Any]) -> bool:
    """Whether what is kept of a cached teacher is enough for the loss."""
    if changes.get("signal") is None:
        return True
    options = {name: changes[name] for name in ("divergence", "token_selection") if name in changes}
    loss = WhiteBoxDistillConfig(output_dir="unused", **options, **changes.get("options", {})).build_loss()
    try:
        loss.check_served_by(SPARSE_METHODS[profile.training.signals[changes["signal"]]["method"]])
    except ValueError:
        return False
    return loss.temperature == 1.0


def find_winner(
    profile: Profile, record: Record, finalists: Sequence[dict[str, Any]], combined: dict[str, Any]
) -> dict[str, Any] | None:
    """The finalist, or all together, with the highest score over all domains.

    `None` before all were run or if none beats the base.
    """
    candidates = [*finalists, *([combined] if combined else [])]
    scores = [score_changes(profile, record, changes) for changes in candidates]
    if None in scores or not scores or max(scores) <= 0:
        return None
    return candidates[scores.index(max(scores))]
