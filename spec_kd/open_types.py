"""Types of values whose form is decided outside this package, and so no narrower than `Any`.

Mypy refuses `Any` everywhere else (`disallow_any_explicit`), but on a line that says why.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

Result = TypeVar("Result")

JsonValue: TypeAlias = Any  # type: ignore[explicit-any]  # from a file, a log or a request; its reader checks it
JsonObject: TypeAlias = dict[str, Any]  # type: ignore[explicit-any]  # the same, known to be an object
Record: TypeAlias = Mapping[str, Any]  # type: ignore[explicit-any]  # the same, only read: also a row or a message
Argument: TypeAlias = Any  # type: ignore[explicit-any]  # passed on to a function of another library, which checks it
Arguments: TypeAlias = dict[str, Any]  # type: ignore[explicit-any]  # the same, by name
Call: TypeAlias = Callable[..., Result]  # type: ignore[explicit-any]  # takes what another library passes

if TYPE_CHECKING:
    import numpy as np

    Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]  # type: ignore[explicit-any]  # docstrings give shape and dtype
    Chunk: TypeAlias = slice[int, int, None]  # some tokens of a batch, one after another
else:
    Array, Chunk = object, slice  # without the time that importing NumPy takes
