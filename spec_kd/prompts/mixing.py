"""Mixes several prompt sets into one, by weights and in an order, with a report."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset, concatenate_datasets

from spec_kd.escaping import escape_markdown, make_table
from spec_kd.open_types import Argument, Array, JsonValue
from spec_kd.options import check_int, check_number, document_options, option, resolve_options
from spec_kd.prompts.unified_columns import unify_columns
from spec_kd.stored_sets import check_stored_set

if TYPE_CHECKING:
    Order = str | Callable[[dict[str, object]], object]
else:
    Order = str  # a command line names an order; only Python can give a function


@document_options
@dataclass(frozen=True)
class MixOptions:
    """Options of [`mix_prompts`].

    In Python, `order` may also be a function of a row, by whose value the rows are sorted.

    Raises:
        ValueError: An option is out of its range.
    """

    weights: dict[str, float] | None = option(
        "Weight of each part relative to the others; 0 leaves a part out. By default every row counts the same.", None
    )
    num_prompts: int | None = option(
        "Number of rows of the mix. By default the most that the weights allow without repeating a row. With more, "
        "parts that are too small are repeated: each of their rows comes k or k + 1 times.",
        None,
    )
    order: Order = option(
        "Order of the rows: shuffled, curriculum (one part after the other, in the order given), or the name of a "
        "column to sort by, smallest first, ties shuffled.",
        "shuffled",
    )
    seed: int = option(
        "Seed of the choice of rows and of the shuffling. The rows chosen from a part do not depend on the other "
        "parts, except for their number.",
        0,
    )

    def __post_init__(self) -> None:
        for name, weight in (self.weights or {}).items():
            check_number(f"weights[{name!r}]", weight, 0)
        check_int("num_prompts", self.num_prompts, is_optional=True)
        check_int("seed", self.seed, 0)


@dataclass(frozen=True)
class MixedPart:
    """The share of one part in a mix.

    Args:
        name (`str`): Name of the part.
        available (`int`): Number of rows of the part.
        rows (`int`): Number of its rows in the mix.
        repeated (`int`): Number of rows in the mix that repeat another one of the part.
        share_asked (`float`): Share of its weight in the sum of the weights.
        share (`float`): Share of its rows in the mix.
    """

    name: str
    available: int
    rows: int
    repeated: int
    share_asked: float
    share: float


@dataclass(frozen=True)
class MixReport:
    """The shares of all parts in a mix.

    Args:
        num_prompts (`int`): Number of rows of the mix.
        order (`str`): `"shuffled"`, `"curriculum"`, or the name of a column or a function.
        seed (`int`): Seed of the choice of rows and of the order.
        parts (`tuple[MixedPart, ...]`): The parts, in the order given.
    """

    num_prompts: int
    order: str
    seed: int
    parts: tuple[MixedPart, ...]

    def to_dict(self) -> dict[str, object]:
        """The report as JSON values."""
        return {**asdict(self), "parts": [asdict(part) for part in self.parts]}

    def to_markdown(self) -> str:
        """The report as a Markdown table."""
        rows = [
            [escape_markdown(p.name), f"{p.rows:,}", f"{p.available:,}", f"{p.repeated:,}", f"{p.share_asked:.1%}",
             f"{p.share:.1%}"]
            for p in self.parts
        ]  # fmt: skip
        return "\n".join(make_table(("part", "rows", "of", "repeated", "share asked", "share"), rows)) + "\n"


@dataclass(frozen=True)
class MixedPrompts:
    """A mix and its report.

    Args:
        dataset (`Dataset`): Rows of the mix.
        report (`MixReport`): Shares of the parts.
    """

    dataset: Dataset
    report: MixReport


def mix_prompts(datasets: Mapping[str, Dataset], options: MixOptions | None = None, **given: Argument) -> MixedPrompts:
    """Mixes prompt sets, such as those of the three scenarios.

    The rows of a part are chosen at random. Columns that only some parts have are `None` in the rows of the others.
    Columns that differ in shape are unified without loss (see [`unify_columns`]).

    Args:
        datasets (`Mapping[str, Dataset]`): The parts, by name.
        options (`MixOptions`, *optional*): Options of the mix; the defaults of [`MixOptions`] by default.
        given: The fields of [`MixOptions`] as keywords.

    Returns:
        `MixedPrompts`: `dataset` and `report`.

    Raises:
        ValueError: There are no rows; a part has no column `prompt`; weights are negative, all 0, of unknown parts or
            missing for a part; an empty part has a weight; an option is out of its range; the order is unknown; a
            column has types that do not fit together.
    """
    if not isinstance(datasets, Mapping):
        raise ValueError(f"`datasets` must be prompt sets by name, got a {type(datasets).__name__}.")
    for name, dataset in datasets.items():
        if not isinstance(dataset, Dataset):
            raise ValueError(f"`datasets[{name!r}]` must be a `datasets.Dataset`, got a {type(dataset).__name__}.")
    check_stored_set(datasets)
    options = resolve_options(MixOptions, options, given)
    sizes = {name: len(dataset) for name, dataset in datasets.items()}
    if not sum(sizes.values()):
        raise ValueError(f"There is nothing to mix: the parts {list(datasets)} have no rows.")
    for name, dataset in datasets.items():
        if "prompt" not in dataset.column_names:
            raise ValueError(
                f"`{name}` has the columns {dataset.column_names} but no `prompt`. Rename its column with "
                "`dataset.rename_column(...)`."
            )
    shares = _compute_shares(sizes, options.weights)
    counts = _count_rows(sizes, shares, options.num_prompts)
    used = {
        name: datasets[name].select(_choose_rows(name, sizes[name], count, options.seed))
        for name, count in counts.items()
        if count
    }
    _check_order(options.order, used)
    mixed = concatenate_datasets(list(unify_columns(used).values()))
    mixed = _arrange(mixed, options.order, np.random.default_rng(options.seed))
    parts = tuple(
        MixedPart(
            name=name,
            available=size,
            rows=counts[name],
            repeated=max(0, counts[name] - size),
            share_asked=float(shares[name]),
            share=counts[name] / len(mixed),
        )
        for name, size in sizes.items()
    )
    order = options.order if isinstance(options.order, str) else getattr(options.order, "__name__", repr(options.order))
    return MixedPrompts(mixed, MixReport(len(mixed), order, options.seed, parts))


def _check_order(order: Order, datasets: Mapping[str, Dataset]) -> None:
    columns = {column for dataset in datasets.values() for column in dataset.column_names}
    if isinstance(order, str) and order not in {"shuffled", "curriculum", *columns}:
        raise ValueError(
            f"`order` is {order!r}, but must be 'shuffled', 'curriculum', a function of a row or one of the columns "
            f"{sorted(columns)}."
        )


def _compute_shares(sizes: Mapping[str, int], weights: Mapping[str, float] | None) -> dict[str, Fraction]:
    """The share of each part by its weight; exact, so that 0.1 of 10 rows is one row."""
    weights = sizes if weights is None else weights
    if set(weights) != set(sizes):
        raise ValueError(
            f"`weights` names {sorted(weights)}, but the parts are {sorted(sizes)}. Give each part a weight; 0 leaves "
            "it out."
        )
    for name, weight in weights.items():
        if weight and not sizes[name]:
            raise ValueError(f"`{name}` has the weight {weight} but no rows. Give it the weight 0 or leave it out.")
    exact = {name: Fraction(str(weights[name])) for name in sizes}
    if not (total := sum(exact.values())):
        raise ValueError("All `weights` are 0: nothing would be in the mix.")
    return {name: weight / total for name, weight in exact.items()}


def _count_rows(sizes: Mapping[str, int], shares: Mapping[str, Fraction], num_prompts: int | None) -> dict[str, int]:
    """Number of rows of each part, which sum to `num_prompts`, by the largest remainders."""
    if num_prompts is None:
        num_prompts = min(int(sizes[name] / share) for name, share in shares.items() if share)
    if num_prompts < 1:
        raise ValueError(
            f"The mix would have {num_prompts} rows. Give `num_prompts` of 1 or more, or weights closer to the numbers "
            f"of rows: {dict(sizes)}."
        )
    wanted = {name: share * num_prompts for name, share in shares.items()}
    counts = {name: int(number) for name, number in wanted.items()}
    by_remainder = sorted(wanted, key=lambda name: counts[name] - wanted[name])
    for name in by_remainder[: num_prompts - sum(counts.values())]:
        counts[name] += 1
    return counts


def _choose_rows(name: str, size: int, count: int, seed: int) -> Array:
    """Indices of `count` rows; a row is repeated only when all rows were taken equally often."""
    rng = np.random.default_rng([seed, *name.encode()])
    passes = [rng.permutation(size) for _ in range(-(-count // size))]
    return np.concatenate(passes)[:count]


def _arrange(dataset: Dataset, order: Order, rng: np.random.Generator) -> Dataset:
    if order == "curriculum":
        return dataset
    dataset = dataset.select(rng.permutation(len(dataset)))
    if isinstance(order, str):
        return dataset if order == "shuffled" else dataset.sort(order)  # rows without a value come last
    keys: list[JsonValue] = [order(row) for row in dataset]
    return dataset.select(sorted(range(len(dataset)), key=keys.__getitem__))
