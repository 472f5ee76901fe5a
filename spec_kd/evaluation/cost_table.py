"""The costs of a serving engine as a file, for those who measured them where they serve."""

import json
import os
from dataclasses import fields
from pathlib import Path

from spec_kd.evaluation.cost import ServingCosts

KNOWN = tuple(field.name for field in fields(ServingCosts))
NEEDED = ("cost_ratio", "verify_cost")
EXAMPLE = '[{"batch_size": 1, "cost_ratio": 0.08, "verify_cost": {"1": 1.0, "5": 1.06}, "source": "my server"}]'


def read_costs(path: str | os.PathLike[str]) -> list[ServingCosts]:
    """[`ServingCosts`] from a JSON file: an object with its arguments, or a list of them, one for each batch size.

    Args:
        path (`str` or `os.PathLike`): The file; gammas are strings there, as JSON wants keys.

    Raises:
        ValueError: If the file is not such JSON, or for a cost that cannot be; the message has an example.
        FileNotFoundError: If there is no such file.
    """
    try:
        tables = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"`{path}` is not JSON: {error}. It should be like {EXAMPLE}.") from error
    tables = tables if isinstance(tables, list) else [tables]
    if not tables:
        raise ValueError(f"`{path}` has no costs in it. It should be like {EXAMPLE}.")
    return [_make_costs(path, table) for table in tables]


def _make_costs(path: str | os.PathLike[str], table: object) -> ServingCosts:
    own = table if isinstance(table, dict) else {}
    unknown, missing = sorted(set(own) - set(KNOWN)), [name for name in NEEDED if name not in own]
    if unknown or missing:
        raise ValueError(
            f"`{path}` has costs {table!r}, which lack {missing} and have the unknown {unknown}. Known are "
            f"{list(KNOWN)}: it should be like {EXAMPLE}."
        )
    try:
        gammas = {int(gamma): float(cost) for gamma, cost in own["verify_cost"].items()}
        return ServingCosts(**{**own, "verify_cost": gammas})
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"`{path}` has costs that cannot be: {error}. It should be like {EXAMPLE}.") from error
