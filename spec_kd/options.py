"""Options: each is a field of one dataclass that stands beside the code that uses it.

Functions, commands and recipes read the same class, so an option's default, text and check exist once. Every check
raises a `ValueError` that names the option, the value and what it must be. No check reads a file.
"""

import difflib
import inspect
import math
import operator
import os
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields, replace
from functools import partial
from numbers import Integral, Real
from typing import TYPE_CHECKING, TypeVar, overload

from spec_kd.addresses import LOCAL, SHORTENED, is_address
from spec_kd.open_types import Argument, Arguments

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")

DOC_WIDTH = 120
MAX_LISTED = 20


def option(
    help: str,
    default: Argument = MISSING,  # any value may be a default
    *,
    default_factory: Callable[[], object] | None = None,
    aliases: Iterable[str] = (),
    takes_address: bool = False,
) -> Argument:  # as `dataclasses.field`, whose value stands for one of the field's own type
    """A dataclass field with the text that `--help`, the API reference and `help()` show.

    Args:
        help (`str`): What the option does, in a sentence that begins with a noun or a verb. The default is added to it.
        default (*optional*): Value of the field; a field without one is required.
        default_factory (`Callable`, *optional*): Makes the default of a mutable field.
        aliases (`Iterable[str]`, *optional*, defaults to `()`): Further names on the command line, such as `--draft`.
        takes_address (`bool`, *optional*, defaults to `False`): Whether a path may be an address; see [`read_path`].

    Returns:
        `dataclasses.Field`.
    """
    metadata: dict[str, object] = {"help": help}
    if aliases:
        metadata["aliases"] = list(aliases)
    if takes_address:
        metadata["takes_address"] = True
    if default_factory is not None:
        return field(default_factory=default_factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def document_options(cls: type[Options], *, own_only: bool = False) -> type[Options]:
    """Adds the fields to the docstring of a dataclass: name, type, default and the text of [`option`].

    Args:
        cls (`type`): A dataclass whose docstring has no `Args` section.
        own_only (`bool`, *optional*, defaults to `False`): Whether fields of base classes are left out.
    """
    lines = ["", "", "Args:"]
    own = inspect.get_annotations(cls)
    for one in (one for one in fields(cls) if one.name in own or not own_only):
        entry = f"{one.name} ({_describe_type(one)}): {one.metadata['help']}"
        lines.append(textwrap.indent(textwrap.fill(entry, DOC_WIDTH - 8, subsequent_indent="    "), "    "))
    cls.__doc__ = inspect.cleandoc(cls.__doc__ or "") + "\n".join(lines) + "\n"
    return cls


document_own_options = partial(document_options, own_only=True)
"""Decorator for a trainer's configuration, whose bases document the fields that they bring."""


def resolve_options(cls: type[Options], options: Options | None, given: Arguments) -> Options:
    """The options of a call that takes an options object, the same names as keywords, or both.

    Args:
        cls (`type`): The options dataclass.
        options (*optional*): An instance of it.
        given (`dict[str, Any]`): Keywords of the call, which replace fields of `options`.

    Raises:
        TypeError: `options` is of another class, a keyword is no option (names the nearest one), or an option
            without a default is missing.
    """
    names = [one.name for one in fields(cls)]
    for name in given:
        if name not in names:
            raise TypeError(f"{cls.__name__} has no option `{name}`.{suggest(name, names)}")
    if options is None:
        for one in fields(cls):
            if one.default is one.default_factory is MISSING and one.name not in given:
                raise TypeError(f"`{one.name}` is missing: {one.metadata['help']}")
        return cls(**given)
    if not isinstance(options, cls):
        raise TypeError(f"`options` must be {cls.__name__}, got {type(options).__name__}.")
    return replace(options, **given) if given else options


def suggest(name: str, known: Iterable[str]) -> str:
    """A sentence with the nearest known name, or all of them where they are few; begins with a space."""
    known = list(dict.fromkeys(known))
    if nearest := difflib.get_close_matches(name, known, n=1):
        return f" Did you mean {nearest[0]}?"
    if len(known) <= MAX_LISTED:
        return f" There is {', '.join(known)}."
    return " `--help` lists what there is."


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
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    _require(is_whole, name, value, "be a whole number", is_optional)
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
    is_finite = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    _require(is_finite, name, value, "be a finite number", is_optional)
    _check_bounds(name, value, minimum, maximum, above, below, reason)


def check_numbers(name: str, values: object, minimum: float | None = None) -> None:
    """Raises `ValueError` unless `values` is a list of different numbers as of [`check_number`], at least one."""
    numbers = _check_list(name, values)
    for value in numbers:
        check_number(name, value, minimum)
    _require(len(set(numbers)) == len(numbers), name, list(numbers), "hold different numbers")


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


def check_finite_options(options: "DataclassInstance") -> None:
    """Raises `ValueError` for a field of a dataclass, or an entry of one that is a dict, that is NaN or infinite."""
    given = {field.name: getattr(options, field.name, None) for field in fields(options)}
    entries = {
        f"{name}[{key!r}]": entry
        for name, value in given.items()
        if isinstance(value, Mapping)
        for key, entry in value.items()
    }
    for name, value in {**given, **entries}.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"`{name}` is {value}, but must be a finite number.")


def check_flag(name: str, value: object) -> None:
    """Raises `ValueError` unless `value` is `True` or `False`: a text such as `"false"` would count as true."""
    _require(isinstance(value, bool), name, value, "be True or False")


def check_choice(name: str, value: object, choices: Collection[str], *, is_optional: bool = False) -> None:
    """Raises `ValueError` unless `value` is one of `choices`."""
    is_known = isinstance(value, str) and value in choices
    _require(is_known, name, value, f"be one of {', '.join(choices)}", is_optional)


def check_text(name: str, value: object, *, is_optional: bool = False) -> None:
    """Raises `ValueError` unless `value` is text that is not blank."""
    is_text = isinstance(value, str) and value.strip() != ""
    _require(is_text, name, value, "be text that is not empty", is_optional)


@overload
def read_path(name: str, value: object, *, takes_address: bool = False) -> str: ...
@overload
def read_path(name: str, value: object, *, is_optional: bool, takes_address: bool = False) -> str | None: ...
def read_path(name: str, value: object, *, is_optional: bool = False, takes_address: bool = False) -> str | None:
    """A path as text, with the home folder in place of a leading `~`, and without `file://`.

    Args:
        name (`str`): Name of the option, for the message.
        value (`str` or `os.PathLike`): Path of a file or folder, or the name of something on the Hub.
        is_optional (`bool`, *optional*, defaults to `False`): Whether `None` is allowed, which is then returned.
        takes_address (`bool`, *optional*, defaults to `False`): Whether an address such as `s3://bucket/run` is
            allowed.

    Raises:
        `ValueError`: For an empty path, which libraries take for the working directory, for what is no path, and for an
            address where only a local path works.
    """
    if value is None and is_optional:
        return None
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str):
        raise ValueError(f"`{name}` is {value!r}, but must be a path{' or None' if is_optional else ''}.")
    if not path.strip() or "\0" in path:
        raise ValueError(f"`{name}` is {path!r}, which names no file or folder. Give a path; `.` is the current one.")
    if isinstance(value, os.PathLike) and SHORTENED.match(path):
        raise ValueError(f"`{name}` is {path!r}, an address that has lost a slash. Give it as text, not as a `Path`.")
    if is_address(path) and not takes_address:
        raise ValueError(
            f"`{name}` is {path!r}, an address, but must be a path on this machine. Give such a path, and copy the "
            "files from or to the address yourself."
        )
    if path.startswith(LOCAL):
        from urllib.request import url2pathname  # imports a web client

        return url2pathname(path.partition("://")[2])
    return os.path.expanduser(path)


def check_dataset(name: str, value: object) -> None:
    """Raises `ValueError` unless `value` is a `Dataset` with at least one row."""
    from datasets import Dataset

    if not isinstance(value, Dataset):
        hint = " Make one with `Dataset.from_list`." if isinstance(value, list | tuple) else ""
        kind = "None" if value is None else f"a {type(value).__name__}"
        raise ValueError(f"`{name}` is {kind}, but must be a `datasets.Dataset`.{hint}")
    if len(value) == 0:
        raise ValueError(f"`{name}` has no rows.")


def _require(holds: bool, name: str, value: object, must: str, is_optional: bool = False) -> None:
    if not holds and not (is_optional and value is None):
        raise ValueError(f"`{name}` is {value!r}, but must {must}{' or None' if is_optional else ''}.")


def _check_bounds(
    name: str,
    value: object,
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
    if isinstance(value, Real) and not all(holds(value, bound) for _, bound, holds in given):
        listed = " and ".join(f"{words} {bound}" for words, bound, _ in given)
        raise ValueError(f"`{name}` is {value!r}, but must be {listed}. {reason}".rstrip())


def _check_list(name: str, values: object) -> Sequence[object]:
    if not isinstance(values, Sequence) or isinstance(values, str | bytes) or not len(values):
        raise ValueError(f"`{name}` is {values!r}, but must be a list of one or more numbers.")
    return values


def _describe_type(one: Field[object]) -> str:
    kind = one.type if isinstance(one.type, str) else inspect.formatannotation(one.type).replace("typing.", "")
    text = f"`{kind.removesuffix(' | None')}`"
    default = one.default if one.default_factory is MISSING else one.default_factory()
    if default is MISSING:
        return text
    return f"{text}, *optional*" if default is None else f"{text}, *optional*, defaults to `{default!r}`"
