"""Divergences by name: those of the package, and those that users register."""

import inspect
from collections.abc import Mapping

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
from spec_kd.options import refuse

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
    check_class(cls, Divergence, DIVERGENCES, "divergence", "derive it from `Divergence`, with value and gradient")
    DIVERGENCES[cls.name] = cls
    return cls


def check_class(cls: type, base: type, registered: Mapping[str, type], kind: str, advice: str) -> None:
    """Checks a class before it is registered by its `name`.

    The same class may come again, as when a notebook cell or a module is run twice.

    Args:
        cls (`type`): The class to be registered.
        base (`type`): What it must be derived from.
        registered (`Mapping[str, type]`): The classes that have a name already.
        kind (`str`): What is registered, for the message.
        advice (`str`): How to write such a class, for the message.

    Raises:
        TypeError: If `cls` is not a concrete class of this kind, or has no `name`.
        ValueError: If the name belongs to another class.
    """
    if not (isinstance(cls, type) and issubclass(cls, base)) or inspect.isabstract(cls):
        raise TypeError(f"{cls!r} is not a {kind}: {advice}.")
    name = getattr(cls, "name", None)
    if not isinstance(name, str):
        raise TypeError(f"{cls.__name__} has no `name`, so it could not be chosen. Give the class one.")
    known = registered.get(name)
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
    by_beta = {None: divergence or ForwardKL.name, 0.0: ForwardKL.name, 1.0: ReverseKL.name}
    asked = by_beta.get(beta, JensenShannon.name)
    refuse(
        (
            divergence is not None and divergence not in DIVERGENCES,
            f"Unknown `divergence` {divergence!r}. Choose one of: {', '.join(sorted(DIVERGENCES))}; or register yours "
            "with `spec_kd.losses.register_divergence` before this point.",
        ),
        (
            beta is not None and not 0.0 <= beta <= 1.0,
            f"`beta` must lie in [0, 1], got {beta}: 0 is forward KL, 1 reverse KL, between them JSD.",
        ),
        (
            divergence is not None and divergence != asked,
            f"`divergence={divergence!r}` and `beta={beta}` disagree: in TRL's convention beta={beta} means "
            f"{asked!r}. Set only `divergence`, or only `beta`.",
        ),
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
