"""Costs of rounds as JSON files."""

import json
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from spec_kd.evaluation.cost import ServingCosts
from spec_kd.files import write_text
from spec_kd.open_types import JsonObject

KNOWN = tuple(field.name for field in fields(ServingCosts))
NEEDED = ("cost_ratio", "verify_cost")
BY_GAMMA = ("verify_cost", "round_cost", "round_cost_range", "draft_cost")
EXAMPLE = '[{"batch_size": 1, "cost_ratio": 0.08, "verify_cost": {"1": 1.0, "5": 1.06}, "source": "my server"}]'


def read_costs(path: str | os.PathLike[str]) -> list[ServingCosts]:
    """[`ServingCosts`] from a JSON file: an object with its arguments, or a list of them, one for each batch size.

    Args:
        path (`str` or `os.PathLike`): The file. Its gammas are strings, as JSON demands of keys.

    Raises:
        ValueError: If the file is not such JSON, or a cost is out of its range; the message has an example.
        FileNotFoundError: If there is no such file.
    """
    try:
        tables = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"`{path}` is not JSON: {error}. It should be like {EXAMPLE}.") from error
    tables = tables if isinstance(tables, list) else [tables]
    if not tables:
        raise ValueError(f"`{path}` has no costs in it. It should be like {EXAMPLE}.")
    return [make_costs(path, table) for table in tables]


def write_costs(costs: Sequence[ServingCosts], path: str | os.PathLike[str]) -> None:
    """Writes costs as a JSON file that [`read_costs`] reads.

    Args:
        costs (`Sequence[ServingCosts]`): The costs, one for each batch size.
        path (`str` or `os.PathLike`): The file; its folder is there.
    """
    write_text(path, json.dumps(list(map(list_costs, costs)), indent=1) + "\n")


def list_costs(costs: ServingCosts) -> JsonObject:
    """The arguments of the costs that are known, of which [`make_costs`] makes them again."""
    return {name: value for name, value in vars(costs).items() if value is not None}


def make_costs(path: str | os.PathLike[str], table: object) -> ServingCosts:
    """[`ServingCosts`] from the JSON object with its arguments; errors name the file that it stands in."""
    own = table if isinstance(table, dict) else {}
    needed = () if "round_cost" in own else NEEDED[1:] if "draft_cost" in own else NEEDED
    unknown, missing = sorted(set(own) - set(KNOWN)), [name for name in needed if name not in own]
    if unknown or missing:
        raise ValueError(
            f"`{path}` has costs {table!r}, which lack {missing} and have the unknown {unknown}. Known are "
            f"{list(KNOWN)}: it should be like {EXAMPLE}."
        )
    try:
        gammas = {name: {int(gamma): value for gamma, value in own[name].items()} for name in BY_GAMMA if own.get(name)}
        return ServingCosts(**{**own, **gammas})
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"`{path}` has costs that cannot be: {error}. It should be like {EXAMPLE}.") from error
