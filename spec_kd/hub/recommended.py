"""Recommended settings of a serving engine in the card of a draft."""

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from spec_kd.hub.card import CardFacts, extend_model_card
from spec_kd.serving.configuration import EngineConfiguration


def recommend_in_card(path: str | os.PathLike[str], configurations: Sequence[EngineConfiguration]) -> None:
    """Adds the recommended settings of a report to the card of its draft, in place of earlier ones.

    The commands name the draft and the target as the card does.

    Args:
        path (`str` or `os.PathLike`): The `README.md` or its folder, for example of a draft that a trainer saved.
        configurations (`Sequence[EngineConfiguration]`):
            The settings: `report.draft.recommendations.configurations` of an evaluation.

    Raises:
        ValueError: If the card was not written by this package.
    """
    path = Path(path) / "README.md" if Path(path).is_dir() else Path(path)
    facts = CardFacts.read(path.read_text(encoding="utf-8")) if path.is_file() else None
    if facts is None:
        raise ValueError(
            f"`{path}` is no card of a draft. Save the draft with its trainer or with `export_draft`, which write one."
        )
    extend_model_card(path, replace(facts, configurations=list(map(asdict, configurations))))
