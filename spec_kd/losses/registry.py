"""Divergences by name: those of the package, and those that users register."""

import inspect
import math

from spec_kd.losses.divergences import (
    Divergence,
    ForwardKL,
    JensenShannon,
    LKHybrid,
    NegLogAcceptance,
    ReverseKL,
    TotalVariation,
    TVDPlusPlus,
)
from spec_kd.open_types import Argument

DIVERGENCES: dict[str, type[Divergence]] = {}


def register_divergence(cls: type[Divergence]) -> type[Divergence]:
    """Makes a divergence known by its `name`, to every trainer and command; usable as a decorator.

    Args:
        cls (`type[Divergence]`): With a `name` of its own.

    Returns:
        `cls`.

    Raises:
        TypeError: If `cls` is not a concrete [`Divergence`], or has no `name`.
        ValueError: If the name belongs to another class.

    Example:

    ```python
    @register_divergence
    class SquaredError(Divergence):
        name = "squared_error"

        def compute_value(self, d):
            return (d.p - d.q).square().sum(-1)

        def compute_gradient(self, d, value):
            slope = 2 * (d.q - d.p)  # dD/dq; dq/dz makes it q (slope - E_q slope)
            return d.q * (slope - (d.q * slope).sum(-1, keepdim=True))


    config = WhiteBoxDistillConfig(divergence="squared_error")
    ```
    """
    if not (isinstance(cls, type) and issubclass(cls, Divergence)) or inspect.isabstract(cls):
        raise TypeError(f"{cls!r} is not a divergence: derive it from `Divergence` and write its value and gradient.")
    check_name(cls, DIVERGENCES.get(getattr(cls, "name", "")), "divergence")
    DIVERGENCES[cls.name] = cls
    return cls


def check_name(cls: type, known: type | None, kind: str) -> None:
    """Raises for a class without a `name` (`TypeError`), or whose name belongs to another class (`ValueError`).

    The same class may come again, as when a notebook cell or a module is run twice.

    Args:
        cls (`type`): The class to be registered.
        known (`type`, *optional*): The class that has the name already.
        kind (`str`): What is registered, for the message.
    """
    name = getattr(cls, "name", None)
    if not isinstance(name, str):
        raise TypeError(f"{cls.__name__} has no `name`, so it could not be chosen. Give the class one.")
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(
            f"The {kind} name {name!r} belongs to {known.__module__}.{known.__qualname__} already. "
            f"Give {cls.__qualname__} another `name`."
        )


for _cls in (ForwardKL, ReverseKL, JensenShannon, TotalVariation, NegLogAcceptance, LKHybrid, TVDPlusPlus):
    register_divergence(_cls)


def resolve_divergence_name(divergence: str | None, beta: float | None) -> str:
    """The divergence that `divergence` and TRL's `beta` name together.

    Args:
        divergence (`str`, *optional*): A name of `DIVERGENCES`; `None` leaves the choice to `beta`.
        beta (`float`, *optional*): TRL's option: 0 = forward KL, 1 = reverse KL, between = JSD with that weight.

    Returns:
        `str`: The name; `"forward_kl"` when neither is given.

    Raises:
        ValueError: If the name is unknown, `beta` lies outside [0, 1], or the two disagree.
    """
    if divergence is not None and divergence not in DIVERGENCES:
        raise ValueError(
            f"Unknown `divergence` {divergence!r}. Choose one of: {', '.join(sorted(DIVERGENCES))}; or register yours "
            "with `spec_kd.losses.register_divergence` before this point."
        )
    if beta is None:
        return divergence or ForwardKL.name
    if not (math.isfinite(beta) and 0.0 <= beta <= 1.0):
        raise ValueError(f"`beta` must lie in [0, 1], got {beta}: 0 is forward KL, 1 reverse KL, between them JSD.")
    asked = {0.0: ForwardKL.name, 1.0: ReverseKL.name}.get(beta, JensenShannon.name)
    if divergence is not None and divergence != asked:
        raise ValueError(
            f"`divergence={divergence!r}` and `beta={beta}` disagree: in TRL's convention beta={beta} means "
            f"{asked!r}. Set only `divergence`, or only `beta`."
        )
    return asked


def build_divergence(divergence: str | None = None, beta: float | None = None, **options: Argument) -> Divergence:
    """The divergence object for a name and/or TRL's `beta`.

    Args:
        divergence (`str`, *optional*): As in [`resolve_divergence_name`].
        beta (`float`, *optional*): As in [`resolve_divergence_name`]; also the weight of the JSD.
        options: Other arguments of the divergence's class, such as `eta` of `"lk_hybrid"`.

    Raises:
        ValueError: As [`resolve_divergence_name`]; also for options that the divergence does not have, or refuses.
    """
    cls = DIVERGENCES[resolve_divergence_name(divergence, beta)]
    if cls is JensenShannon and beta is not None:
        options = {"beta": beta, **options}
    known = [] if cls.__init__ is object.__init__ else list(inspect.signature(cls).parameters)
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"The divergence {cls.name!r} has no option {', '.join(map(repr, unknown))}; "
            + (f"it has: {', '.join(known)}." if known else "it has none.")
        )
    return cls(**options)
