"""Options: each is a field of one dataclass that stands beside the code that uses it.

Functions, commands and recipes read the same class, so an option's default, text and check exist once.
"""

import difflib
import inspect
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

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
) -> Argument:  # as `dataclasses.field`, whose value stands for one of the field's own type
    """A dataclass field with the text that `--help`, the API reference and `help()` show.

    Args:
        help (`str`): What the option does, in a sentence that begins with a noun or a verb. The default is added to it.
        default (*optional*): Value of the field; a field without one is required.
        default_factory (`Callable`, *optional*): Makes the default of a mutable field.
        aliases (`Iterable[str]`, *optional*, defaults to `()`): Further names on the command line, such as `--draft`.

    Returns:
        `dataclasses.Field`.
    """
    metadata = {"help": help} | ({"aliases": list(aliases)} if aliases else {})
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


def _describe_type(one: Field[object]) -> str:
    kind = one.type if isinstance(one.type, str) else inspect.formatannotation(one.type).replace("typing.", "")
    text = f"`{kind.removesuffix(' | None')}`"
    default = one.default if one.default_factory is MISSING else one.default_factory()
    if default is MISSING:
        return text
    return f"{text}, *optional*" if default is None else f"{text}, *optional*, defaults to `{default!r}`"
