"""The search of a recipe on validation prompts: one axis at a time, then what helped on each axis together."""

import math
from dataclasses import replace
from typing import Any

import numpy as np

from .cells import DIVERGED, TUNING_SEEDS, Cell, apply_changes, compute_key, list_search_axes, make_base
from .compare import BLOCK_EFFICIENCY, SETTING_NAMES, Lines, find_lines
from .profile import Profile
from .record import Record


def score_changes(profile: Profile, record: Record, changes: dict[str, Any]) -> float | None:
    """Mean over domains and settings of log(tokens a target pass over the base cell's).

    Minus infinity if a cell diverged, `None` if not all were run.
    """
    scores = []
    for domain in profile.domains:
        base = replace(make_base(profile, domain), split="validation")
        if has_diverged(profile, record, apply_changes(base, changes)):
            return -math.inf
        lines = [find_lines(profile, record, cell, TUNING_SEEDS) for cell in (apply_changes(base, changes), base)]
        if not all(own.by_seed for own in lines):
            return None
        scores += [
            _find_efficiency(lines[0], setting) - _find_efficiency(lines[1], setting) for setting in SETTING_NAMES
        ]
    return float(np.mean(scores))


def has_diverged(profile: Profile, record: Record, cell: Cell) -> bool:
    """Whether the loss was not finite with a seed that the search uses."""
    keys = (compute_key(profile, replace(cell, seed=seed)) for seed in TUNING_SEEDS)
    return any(record.find(DIVERGED, key) for key in keys)


def _find_efficiency(lines: Lines, setting: str) -> float:
    tokens, calls = lines.sum_columns(setting, BLOCK_EFFICIENCY, TUNING_SEEDS)
    return float(np.log(tokens.sum() / calls.sum()))


def find_combined(profile: Profile, record: Record) -> dict[str, Any] | None:
    """The best change of each axis where it beats the base cell, put together; `None` before all were run.

    With one such axis or none there is nothing to put together: an empty dict.
    """
    chosen: list[dict[str, Any]] = []
    for options in list_search_axes(profile).values():
        scores = {name: score_changes(profile, record, changes) for name, changes in options.items()}
        if None in scores.values():
            return None
        best = max(scores, key=scores.__getitem__)
        if scores[best] > 0:
            chosen.append(options[best])
    if len(chosen) < 2:
        return {}
    combined: dict[str, Any] = {}
    for changes in chosen:
        combined |= {**changes, "options": {**combined.get("options", {}), **changes.get("options", {})}}
    return combined


def find_winner(profile: Profile, record: Record) -> dict[str, Any] | None:
    """The change, alone or combined, with the highest score; `None` before all were run or if none beats the base."""
    combined = find_combined(profile, record)
    if combined is None:
        return None
    candidates = [changes for options in list_search_axes(profile).values() for changes in options.values()]
    candidates += [combined] if combined else []
    scores = [score_changes(profile, record, changes) for changes in candidates]
    if None in scores or not scores or max(scores) <= 0:
        return None
    return candidates[scores.index(max(scores))]
