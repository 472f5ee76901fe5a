"""Makes questions from the columns of a row by `str.format`, and only from text and numbers."""

import re
import string

from spec_kd.open_types import JsonValue, Record


class _RowFormatter(string.Formatter):
    """`str.format` for text and numbers only: other values would look like Python code, which no user writes."""

    def format_field(self, value: JsonValue, format_spec: str) -> str:
        if value is None or value != value:  # a missing number in a table is NaN
            raise ValueError("a place is empty")
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise ValueError(f"a place holds {value!r:.60}, which is neither text nor a number")
        return super().format_field(value, format_spec)


def find_fields(template: str) -> list[str]:
    """Names of the columns that a template reads.

    Args:
        template (`str`): Template of `str.format`, such as `"{question} {options[0]}"`.

    Raises:
        ValueError: The braces do not match, a place has no column's name, or there is no place.
    """
    try:
        places = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"`question_template` {template!r} cannot be read ({error}). Write braces that are text twice: "
            "{{ and }}."
        ) from error
    columns = {name: re.split(r"[.\[]", name, maxsplit=1)[0] for _, name, _, _ in places if name is not None}
    for name, column in columns.items():
        if not column or column.isdigit():
            raise ValueError(
                f"`question_template` has a place without a column's name, {{{name}}}, in {template!r}. Write braces "
                "that are text twice: {{ and }}."
            )
    if not columns:
        raise ValueError(f"`question_template` reads no column: {template!r}. Write a column's name in braces.")
    return list(columns.values())


def fill_template(template: str, row: Record) -> str:
    """The question that a template makes from a row.

    Args:
        template (`str`): Template that [`find_fields`] accepts.
        row (`dict`): Values by column.

    Raises:
        ValueError: A cell is empty, is missing, is neither text nor a number, or does not fit its format.
    """
    if empty := [name for name in find_fields(template) if row.get(name) is None]:
        raise ValueError(f"the column {', '.join(map(repr, empty))} is empty")
    try:
        return _RowFormatter().vformat(template, (), row)
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"the template cannot be filled ({reason})") from error
