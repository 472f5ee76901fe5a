"""A table as data."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table whose cells are text that is not escaped yet.

    Args:
        title (`str`): What it shows.
        header (`list[str]`): A name for each column.
        rows (`list[list[str]]`): One cell for each column; no rows where there is nothing to show.
        labels (`int`, *optional*, defaults to `1`): How many of the first columns name the row.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    labels: int = 1
