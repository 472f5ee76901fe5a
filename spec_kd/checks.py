"""Checks of options: one place for what a number, a path or a name may be, used by every function and command.

Each check raises a `ValueError` that names the option, the value and what it must be. None of them reads a file or
imports a heavy library.
"""

import math
import operator
import os
from collections.abc import Collection, Sequence
from numbers import Integral, Real
from typing import overload


def check_int(
    name: str, value: object, minimum: int | None = 1, maximum: int | None = None, *, is_optional: bool = False
) -> None:
    """Raises `ValueError` unless `value` is a whole number within bounds; `True`, `2.0` and `"2"` are not.

    Args:
        name (`str`): Name of the option, for the message.
        value: Value of the option. Integers of NumPy count as whole numbers.
        minimum (`int`, *optional*, defaults to `1`), maximum (`int`, *optional*): Bounds, both allowed values.
        is_optional (`bool`, *optional*, defaults to `False`): Whether `None` is allowed.
    """
    if value is None and is_optional:
        return
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ValueError(f"`{name}` is {value!r}, but must be a whole number{_or_none(is_optional)}.")
    _check_bounds(name, value, minimum, maximum)


def check_number(
    name: str,
    value: object,
    minimum: float | None = None,
    maximum: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
    is_optional: bool = False,
    reason: str = "",
) -> None:
    """Raises `ValueError` unless `value` is a finite number within bounds; NaN, infinities, `True`, `"0.5"` are not.

    Args:
        name (`str`): Name of the option, for the message.
        value: Value of the option.
        minimum (`float`, *optional*), maximum (`float`, *optional*): Bounds, both allowed values.
        above (`float`, *optional*), below (`float`, *optional*): Bounds that are not allowed values.
        is_optional (`bool`, *optional*, defaults to `False`): Whether `None` is allowed.
        reason (`str`, *optional*): Sentence after the message, such as what another value would mean.
    """
    if value is None and is_optional:
        return
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"`{name}` is {value!r}, but must be a finite number{_or_none(is_optional)}.")
    _check_bounds(name, value, minimum, maximum, above, below, reason)


def check_numbers(name: str, values: object, minimum: float | None = None) -> None:
    """Raises `ValueError` unless `values` is a list of different numbers as of [`check_number`], at least one."""
    numbers = _check_list(name, values)
    for value in numbers:
        check_number(name, value, minimum)
    _check_different(name, numbers)


def check_ints(name: str, values: object, minimum: int | None = 1, maximum: int | None = None) -> None:
    """Raises `ValueError` unless `values` is a list of whole numbers as of [`check_int`], at least one."""
    for value in _check_list(name, values):
        check_int(name, value, minimum, maximum)


def refuse(*problems: tuple[object, str]) -> None:
    """Raises `ValueError` with the message of the first condition that holds.

    Args:
        problems (`tuple`): Pairs of a condition and the message that names the value, the reason and the fix.
    """
    for is_there, message in problems:
        if is_there:
            raise ValueError(message)


def check_flag(name: str, value: object) -> None:
    """Raises `ValueError` unless `value` is `True` or `False`: a text such as `"false"` would count as true."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` is {value!r}, but must be True or False.")


def check_choice(name: str, value: object, choices: Collection[str], *, is_optional: bool = False) -> None:
    """Raises `ValueError` unless `value` is one of `choices`."""
    if value is None and is_optional:
        return
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` is {value!r}, but must be one of {', '.join(choices)}{_or_none(is_optional)}.")


def check_text(name: str, value: object, *, is_optional: bool = False) -> None:
    """Raises `ValueError` unless `value` is text that is not blank."""
    if value is None and is_optional:
        return
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"`{name}` is {value!r}, but must be text that is not empty.")


@overload
def read_path(name: str, value: object) -> str: ...
@overload
def read_path(name: str, value: object, *, is_optional: bool) -> str | None: ...
def read_path(name: str, value: object, *, is_optional: bool = False) -> str | None:
    """A path as text, with the home folder in place of a leading `~`.

    Args:
        name (`str`): Name of the option, for the message.
        value (`str` or `os.PathLike`): Path of a file or folder, or the name of something on the Hub.
        is_optional (`bool`, *optional*, defaults to `False`): Whether `None` is allowed, which is then returned.

    Raises:
        `ValueError`: For an empty path, which libraries take for the working directory, and for what is no path.
    """
    if value is None and is_optional:
        return None
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str):
        raise ValueError(f"`{name}` is {value!r}, but must be a path{_or_none(is_optional)}.")
    if not path.strip() or "\0" in path:
        raise ValueError(f"`{name}` is {path!r}, which names no file or folder. Give a path; `.` is the current one.")
    return os.path.expanduser(path)


def check_dataset(name: str, value: object) -> None:
    """Raises `ValueError` unless `value` is a `Dataset` with at least one row."""
    from datasets import Dataset

    if not isinstance(value, Dataset):
        hint = " Make one with `Dataset.from_list`." if isinstance(value, list | tuple) else ""
        raise ValueError(f"`{name}` is {_describe_type(value)}, but must be a `datasets.Dataset`.{hint}")
    if len(value) == 0:
        raise ValueError(f"`{name}` has no rows.")


def _check_bounds(
    name: str,
    value: Real,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    reason: str = "",
) -> None:
    bounds = (
        ("at least", minimum, operator.ge),
        ("above", above, operator.gt),
        ("at most", maximum, operator.le),
        ("below", below, operator.lt),
    )
    given = [(words, bound, holds) for words, bound, holds in bounds if bound is not None]
    if not all(holds(value, bound) for _, bound, holds in given):
        listed = " and ".join(f"{words} {bound}" for words, bound, _ in given)
        raise ValueError(f"`{name}` is {value!r}, but must be {listed}. {reason}".rstrip())


def _or_none(is_optional: bool) -> str:
    return " or None" if is_optional else ""


def _check_list(name: str, values: object) -> Sequence[object]:
    if not isinstance(values, Sequence) or isinstance(values, str | bytes) or not len(values):
        raise ValueError(f"`{name}` is {values!r}, but must be a list of one or more numbers.")
    return values


def _check_different(name: str, values: Sequence[object]) -> None:
    if len(set(values)) < len(values):
        raise ValueError(f"`{name}` is {list(values)!r}, but must hold different numbers.")


def _describe_type(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
