"""What a running server did, beside what replay predicts: the data and the tables of one observation."""

from dataclasses import dataclass, field

from spec_kd.evaluation.report.left_out import TITLE, LeftOut, list_cells, list_header
from spec_kd.reports.numbers import DASH, RATE_DIGITS, Interval, format_interval, format_number
from spec_kd.reports.rendering import Table

MOST_ROWS = 100  # of the table of prompts; the JSON file has all


@dataclass(frozen=True, kw_only=True)
class ObservedMetric:
    """One metric, observed and predicted. Differences are observed minus predicted, paired by prompt.

    Args:
        name (`str`): Name of the metric.
        engine_name (`str`): The engine's own name for it; empty if it has none.
        observed (`Interval`): What the server did.
        predicted (`Interval`, *optional*): What replay says of the very tokens that the server wrote.
        same_tokens (`Interval`, *optional*):
            Observed minus predicted, on the same tokens: precision, rounding, and luck where a draft is sampled.
        earlier (`Interval`, *optional*): What was predicted on other responses, before the server ran.
        other_tokens (`Interval`, *optional*):
            Predicted on the server's tokens minus predicted on the other responses: length, template, sampling.
    """

    name: str
    engine_name: str
    observed: Interval
    predicted: Interval | None = None
    same_tokens: Interval | None = None
    earlier: Interval | None = None
    other_tokens: Interval | None = None


@dataclass(frozen=True, kw_only=True)
class ObservedPrompt:
    """One prompt; `None` where a number is not known.

    Args:
        row (`int`): Number of the prompt.
        tokens (`int`): Tokens that the server wrote.
        drafted (`int`, *optional*), accepted (`int`, *optional*): What the server counted.
        predicted_drafted (`float`, *optional*), predicted_accepted (`float`, *optional*): What replay says.
        tokens_per_second (`float`, *optional*): With the draft.
        plain_tokens_per_second (`float`, *optional*): Without it.
    """

    row: int
    tokens: int
    drafted: int | None = None
    accepted: int | None = None
    predicted_drafted: float | None = None
    predicted_accepted: float | None = None
    tokens_per_second: float | None = None
    plain_tokens_per_second: float | None = None

    @property
    def is_equal(self) -> bool | None:
        """Whether the server counted what replay says; `None` where one of the two is not known."""
        known = (self.drafted, self.accepted, self.predicted_drafted, self.predicted_accepted)
        if self.drafted is None or self.accepted is None or None in known:
            return None
        pairs = ((self.drafted, self.predicted_drafted), (self.accepted, self.predicted_accepted))
        return all(abs(observed - (predicted or 0.0)) < 1e-6 for observed, predicted in pairs)


@dataclass(frozen=True, kw_only=True)
class ObservedReport:
    """What [`~spec_kd.compare_observed`] returns. Intervals are 95 % bootstrap intervals over prompts.

    Args:
        serving_engine (`str`): Engine of the server.
        title (`str`): The engine's name as its makers write it.
        model (`str`): Name of the target on the server.
        temperature (`float`): Temperature that the target sampled at, 0.0 for greedy.
        concurrency (`int`): Requests at a time.
        num_assistant_tokens (`int`, *optional*): Tokens drafted in a round; `None` if unknown.
        metrics (`list[ObservedMetric]`): Acceptance, observed and predicted.
        prompts (`list[ObservedPrompt]`): The same for each prompt.
        tokens_per_second (`float`): Tokens a second of a request with the draft.
        plain_tokens_per_second (`float`): The same without it; NaN if it was not asked.
        request_seconds (`float`): Mean time of a whole request with the draft.
        speedup (`Interval`): Median over prompts of tokens a second with the draft over those without it.
        predicted_speedup (`Interval`, *optional*):
            The same by replay of the server's tokens and the costs of a round, without the prompt's pass; `None`
            without costs.
        timing (`str`): What the times are of, in words.
        notes (`list[str]`): What a reader must know beside the numbers, in sentences.
        left_out (`list[LeftOut]`):
            Metrics without looping completions and without prompts that lack the chat template.
    """

    serving_engine: str
    title: str
    model: str
    temperature: float
    concurrency: int
    num_assistant_tokens: int | None
    metrics: list[ObservedMetric]
    prompts: list[ObservedPrompt]
    tokens_per_second: float
    plain_tokens_per_second: float
    request_seconds: float
    speedup: Interval
    timing: str
    notes: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    predicted_speedup: Interval | None = None

    @property
    def num_equal(self) -> int:
        """Prompts whose counts are those of replay."""
        return sum(one.is_equal is True for one in self.prompts)

    @property
    def num_compared(self) -> int:
        """Prompts for which both are known."""
        return sum(one.is_equal is not None for one in self.prompts)

    @property
    def headline(self) -> str:
        """What was observed, in a sentence or two."""
        how = "with greedy decoding" if self.temperature == 0 else f"at temperature {self.temperature:g}"
        rate, length = (next(m.observed for m in self.metrics if m.name == name) for name in HEADLINE)
        parts = [
            f"{self.title} served {len(self.prompts)} prompts {how}: acceptance rate "
            f"{format_interval(rate, RATE_DIGITS)}, mean acceptance length {format_interval(length)}"
        ]
        if self.num_compared:
            parts.append(f"counts as replay predicts on {self.num_equal} of {self.num_compared} prompts")
        if self.speedup.value == self.speedup.value:  # not NaN
            parts.append(f"speed-up {format_interval(self.speedup)}")
        if self.predicted_speedup is not None:
            parts.append(f"predicted speed-up {format_interval(self.predicted_speedup)}")
        return "; ".join(parts) + "."


HEADLINE = ("acceptance rate", "mean acceptance length")


def list_observed_tables(observed: ObservedReport) -> list[Table]:
    """The metrics, the speed, what is left out, the prompts and the notes of one observation."""
    return [
        tabulate_observed_metrics(observed),
        tabulate_speed(observed),
        Table(title=TITLE, header=list_header(observed.left_out), rows=list(map(list_cells, observed.left_out))),
        tabulate_observed_prompts(observed),
        Table(title="Notes", header=["what"], rows=[[note] for note in observed.notes]),
    ]


def tabulate_observed_metrics(observed: ObservedReport) -> Table:
    """Each metric as it was observed and predicted; columns without any value are left out."""
    columns: dict[str, list[Interval | None]] = {
        "observed": [one.observed for one in observed.metrics],
        "predicted on the same tokens": [one.predicted for one in observed.metrics],
        "difference": [one.same_tokens for one in observed.metrics],
        "predicted on other responses": [one.earlier for one in observed.metrics],
        "difference between the responses": [one.other_tokens for one in observed.metrics],
    }
    shown = {name: cells for name, cells in columns.items() if any(cell is not None for cell in cells)}
    rows = [
        [
            one.name + (f" ({one.engine_name})" if one.engine_name else ""),
            *(
                format_interval(cells[i], RATE_DIGITS, "+" if name.startswith("difference") else "")
                for name, cells in shown.items()
            ),
        ]
        for i, one in enumerate(observed.metrics)
    ]
    gamma = observed.num_assistant_tokens
    drafting = f", {gamma} drafted token{'s' if gamma > 1 else ''}" if gamma else ""
    title = f"{observed.title}, temperature {observed.temperature:g}{drafting}, {len(observed.prompts)} prompts"
    return Table(title=title, header=["metric", *shown], rows=rows)


def tabulate_speed(observed: ObservedReport) -> Table:
    """Tokens a second, time per token and time of a request."""
    rates = [("with the draft", observed.tokens_per_second), ("without it", observed.plain_tokens_per_second)]
    rows = [
        [name, format_number(rate), format_number(1000 / rate if rate else None), DASH, DASH, DASH]
        for name, rate in rates
        if rate == rate  # not NaN
    ]
    if rows:
        speedups = (observed.speedup, observed.predicted_speedup)
        rows[0][3:] = [format_number(observed.request_seconds), *map(format_interval, speedups)]
    header = ["requests", "tokens/s", "ms per token", "seconds per request", "speed-up, median of prompts"]
    header.append("the same, predicted")
    return Table(title=f"Speed at {observed.concurrency} at a time ({observed.timing})", header=header, rows=rows)


def tabulate_observed_prompts(observed: ObservedReport) -> Table:
    """Drafted and accepted tokens of each prompt, the ones that differ first."""
    order = sorted(observed.prompts, key=lambda one: (one.is_equal is not False, one.row))
    words = {True: "yes", False: "no", None: DASH}
    rows = [
        [
            str(one.row),
            str(one.tokens),
            _pair(one.accepted, one.drafted, 0),
            _pair(one.predicted_accepted, one.predicted_drafted, 0 if one.is_equal else 2),
            words[one.is_equal],
            format_number(one.tokens_per_second),
            format_number(one.plain_tokens_per_second),
        ]
        for one in order[:MOST_ROWS]
    ]
    more = f"; {len(order) - MOST_ROWS} more are in the JSON file" if len(order) > MOST_ROWS else ""
    header = ["prompt", "tokens", "observed", "predicted", "equal", "tokens/s", "tokens/s without draft"]
    return Table(title=f"Accepted of drafted tokens by prompt{more}", header=header, rows=rows)


def _pair(accepted: float | None, drafted: float | None, digits: int) -> str:
    if accepted is None or drafted is None:
        return DASH
    return f"{format_number(accepted, digits)} of {format_number(drafted, digits)}"
