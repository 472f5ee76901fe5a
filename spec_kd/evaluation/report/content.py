"""What an evaluation found, as plain data: every rendering reads it, and `report.json` holds it.

Nothing here is computed; `evaluation/evaluate.py` fills it. Intervals are 95 % bootstrap intervals over prompts.
"""

import json
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import get_args, get_origin, get_type_hints

from spec_kd.evaluation.report.left_out import LeftOut
from spec_kd.evaluation.report.observed import ObservedReport
from spec_kd.evaluation.report.recommended import Recommendations
from spec_kd.open_types import JsonObject, JsonValue
from spec_kd.reports.numbers import Interval

FORMAT = 2  # of `report.json`; format 1 named the serving engine `engine` and the responses `texts`


@dataclass(frozen=True, kw_only=True)
class GammaReport:
    """Metrics at one number of drafted tokens per round.

    Args:
        num_assistant_tokens (`int`): gamma.
        block_efficiency (`Interval`): Tokens per target pass.
        acceptance_rate (`Interval`): Accepted over drafted tokens.
        predicted_speedup (`dict[str, Interval]`):
            Predicted speed-up by batch size (as text), where costs are known:
            block_efficiency / (gamma c + v(gamma) + overhead).
        without (`dict[str, GammaReport]`):
            The same without `"looping"`, `"untemplated"` or `"looping_or_untemplated"` responses, where there are some
            and others.
    """

    num_assistant_tokens: int
    block_efficiency: Interval
    acceptance_rate: Interval
    predicted_speedup: dict[str, Interval] = field(default_factory=dict)
    without: dict[str, "GammaReport"] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BreakdownRow:
    """One part of the tokens or of the prompts.

    Args:
        label (`str`): Name of the part.
        prompts (`int`): Number of prompts that have tokens in the part.
        tokens (`int`): Number of completion tokens in the part.
        alpha (`Interval`): Expected acceptance of a drafted token in the part.
        block_efficiency (`Interval`, *optional*):
            Tokens per target pass; `None` unless the part consists of whole prompts.
    """

    label: str
    prompts: int
    tokens: int
    alpha: Interval
    block_efficiency: Interval | None = None


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    """alpha by a property of the tokens or of the prompts, such as `"position"` or `"token class"`."""

    title: str
    rows: list[BreakdownRow]


@dataclass(frozen=True, kw_only=True)
class ShownPrompt:
    """One prompt and its completion, token by token.

    Args:
        row (`int`): Index of the prompt, from 0.
        prompt (`str`): Text of the prompt, special tokens included.
        tokens (`list[str]`): Text of each completion token.
        acceptance (`list[float]`):
            P(the token is accepted | drafting reaches it) for each token; 0 or 1 if the draft is greedy.
        block_efficiency (`float`): Tokens per target pass on this prompt, at the report's gamma.
    """

    row: int
    prompt: str
    tokens: list[str]
    acceptance: list[float]
    block_efficiency: float


@dataclass(frozen=True, kw_only=True)
class AssistedReport:
    """The draft in real assisted generation (`target.generate(assistant_model=draft)`), batch size 1.

    Args:
        prompts (`int`): Number of prompts that were run.
        num_assistant_tokens (`int`): gamma.
        block_efficiency (`Interval`): Measured tokens per target pass.
        acceptance_rate (`Interval`): Measured share of the drafted tokens that were accepted.
        speedup (`Interval`): Measured tokens per second over those of plain generation.
        tokens_per_second (`float`): Measured tokens per second with the draft.
        plain_tokens_per_second (`float`): Measured tokens per second without the draft.
        replayed_block_efficiency (`Interval`): Tokens per target pass by replay of the same prompts.
        predicted_speedup (`float`, *optional*): Speed-up that the costs predict for the same prompts.
    """

    prompts: int
    num_assistant_tokens: int
    block_efficiency: Interval
    acceptance_rate: Interval
    speedup: Interval
    tokens_per_second: float
    plain_tokens_per_second: float
    replayed_block_efficiency: Interval
    predicted_speedup: float | None = None


@dataclass(frozen=True, kw_only=True)
class SettingReport:
    """One draft at one way of sampling.

    Args:
        name (`str`): `"greedy"`, `"t1"`, `"t0.7"`, ...; `"t1_greedy_draft"` where only the draft is greedy.
        temperature (`float`): Sampling temperature of the responses; 0.0 is greedy.
        draft_sampling (`str`): `"stochastic"` or `"greedy"`.
        prompts (`int`), tokens (`int`): Numbers of prompts and of completion tokens that were read.
        alpha (`Interval`): Expected acceptance of one drafted token.
        alpha_kind (`str`):
            `"exact"`, or `"estimate"` where only stored log-probabilities of the target were known.
        alpha_bounds (`tuple[float, float]`, *optional*): Bounds of alpha from a stored top-k.
        acceptance_rate_per_position (`list[Interval]`): Acceptance rate of drafted token k = 1..gamma.
        by_gamma (`list[GammaReport]`): Metrics at every number of drafted tokens.
        best_gamma (`dict[str, int]`): The gamma with the highest predicted speed-up, by batch size (as text).
        break_even_alpha (`dict[str, float]`):
            Acceptance below which even the best gamma is no faster than plain decoding, by batch size (as text).
        breakdowns (`list[Breakdown]`): Where the draft fails.
        worst (`list[ShownPrompt]`): Prompts with the lowest block efficiency, worst first.
        assisted (`AssistedReport`, *optional*): Real assisted generation, if it was run.
        left_out (`list[LeftOut]`):
            alpha and block efficiency, at the report's gamma, without looping completions and without prompts that lack
            the chat template.
    """

    name: str
    temperature: float
    draft_sampling: str
    prompts: int
    tokens: int
    alpha: Interval
    alpha_kind: str
    by_gamma: list[GammaReport]
    acceptance_rate_per_position: list[Interval]
    alpha_bounds: tuple[float, float] | None = None
    best_gamma: dict[str, int] = field(default_factory=dict)
    break_even_alpha: dict[str, float] = field(default_factory=dict)
    breakdowns: list[Breakdown] = field(default_factory=list)
    worst: list[ShownPrompt] = field(default_factory=list)
    assisted: AssistedReport | None = None
    left_out: list[LeftOut] = field(default_factory=list)

    def at_gamma(self, num_assistant_tokens: int) -> GammaReport:
        """The metrics at one gamma; raises `KeyError` for a gamma that was not asked for."""
        return {report.num_assistant_tokens: report for report in self.by_gamma}[num_assistant_tokens]

    def get_speedups(self, batch_size: str) -> dict[int, Interval]:
        """Predicted speed-up by gamma, for the gammas whose costs are known at this batch size (as text)."""
        return {
            report.num_assistant_tokens: report.predicted_speedup[batch_size]
            for report in self.by_gamma
            if batch_size in report.predicted_speedup
        }


@dataclass(frozen=True, kw_only=True)
class CostReport:
    """What a round costs at one batch size, in steps of the target (one token in a pass).

    Args:
        batch_size (`int`): Sequences at a time.
        cost_ratio (`float`, *optional*):
            c, a draft step over a target step; `None` where whole rounds, or passes of a parallel draft, were measured.
        verify_cost (`dict[str, float]`):
            v(gamma) by gamma (as text): the time of a target pass over gamma + 1 tokens over that of one token; empty
            where whole rounds were measured.
        round_overhead (`float`): Other costs of a round.
        round_cost (`dict[str, float]`, *optional*): The whole round by gamma (as text).
        target_step_seconds (`float`, *optional*): Seconds of a target step, where it was measured.
        source (`str`): Origin of the numbers.
    """

    batch_size: int
    cost_ratio: float | None
    verify_cost: dict[str, float]
    round_overhead: float
    source: str
    round_cost: dict[str, float] = field(default_factory=dict)
    target_step_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class DraftReport:
    """Everything about one draft.

    Args:
        name (`str`): Name of the draft.
        settings (`list[SettingReport]`): Its settings, in the report's order.
        costs (`list[CostReport]`): Its costs at each batch size, where they are known.
        unmeasured (`list[str]`): A sentence for everything that was asked for and could not be measured.
        recommendations (`Recommendations`, *optional*): What to set in the serving engine, where costs are known.
    """

    name: str
    settings: list[SettingReport]
    costs: list[CostReport] = field(default_factory=list)
    unmeasured: list[str] = field(default_factory=list)
    recommendations: Recommendations | None = None

    def setting(self, name: str) -> SettingReport:
        """The setting of that name; raises `KeyError` if the draft has none."""
        return {report.name: report for report in self.settings}[name]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A difference between two drafts on the same prompts, with its paired interval.

    Args:
        setting (`str`): Name of the setting.
        metric (`str`): `"alpha"` or `"block_efficiency"` (at the report's gamma).
        draft (`str`), baseline (`str`): Names of the two; the difference is draft minus baseline.
        difference (`Interval`): Paired 95 % interval.
    """

    setting: str
    metric: str
    draft: str
    baseline: str
    difference: Interval


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """The result of [`~spec_kd.evaluate_draft`].

    Args:
        drafts (`list[DraftReport]`):
            The drafts in the order given. With several, the first is the baseline (before training).
        comparisons (`list[Comparison]`): Differences of every pair of drafts, by setting and metric.
        num_assistant_tokens (`int`): gamma of the headline.
        serving_engine (`str`): Engine whose draft sampling was used.
        serving_rule (`str`): How that engine proposes and accepts a token, with a source.
        provenance (`dict[str, Any]`): Models, revisions, data, versions, machine, command, time; JSON values.
        observed (`list[ObservedReport]`): What running servers did, see [`~spec_kd.compare_observed`].
    """

    drafts: list[DraftReport]
    comparisons: list[Comparison]
    num_assistant_tokens: int
    serving_engine: str
    serving_rule: str
    provenance: JsonObject
    observed: list[ObservedReport] = field(default_factory=list)

    @property
    def draft(self) -> DraftReport:
        """The last draft: the one the report is about."""
        return self.drafts[-1]

    def expect(self, num_assistant_tokens: int) -> JsonObject:
        """What the report says of its draft with so many drafted tokens, for `serving.json`.

        Args:
            num_assistant_tokens (`int`): Tokens drafted in a round.

        Returns:
            `dict[str, dict]`: The fields of [`GammaReport`] as JSON values, by the name of the setting, and `left_out`:
            the shares of looping and of untemplated responses.

        Raises:
            ValueError: The report has no metrics for that number.
        """
        try:
            return {
                one.name: {
                    **to_plain(one.at_gamma(num_assistant_tokens)),
                    "left_out": {kind.kind: kind.share for kind in one.left_out},
                }
                for one in self.draft.settings
            }
        except KeyError:
            raise ValueError(
                f"The report has no metrics with {num_assistant_tokens} drafted tokens. Evaluate again with "
                f"`gammas=[{num_assistant_tokens}]`."
            ) from None

    def with_observed(self, observed: ObservedReport) -> "EvaluationReport":
        """The report with what a running server did, in the section "Predicted and observed"."""
        return replace(self, observed=[*self.observed, observed])

    def to_json(self) -> str:
        """Strict JSON (no NaN: an undefined bound is null)."""
        values = {"format": FORMAT, **to_plain(self)}
        text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        # UTF-8 has no halves of surrogate pairs: these are written as JSON escapes
        return text.encode("utf-8", "backslashreplace").decode()

    @classmethod
    def from_json(cls, text: str) -> "EvaluationReport":
        """Reads what `to_json` wrote, also in format 1, which stated no number.

        Raises:
            ValueError: If the text is no report, or a report of a later format.
        """
        try:
            values = json.loads(text)
            number = values.pop("format", 1)
            if number == 1:
                values["serving_engine"], values["serving_rule"] = values.pop("engine"), values.pop("engine_rule")
                values["provenance"]["responses"] = values["provenance"].pop("texts")
            report = from_plain(cls, values) if number in (1, FORMAT) else None
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"This is no evaluation report ({error!r}). Run the evaluation again.") from error
        if report is None:
            raise ValueError(f"The report has format {number!r}, but this version reads {FORMAT}. Update spec_kd.")
        return report


def to_plain(value: JsonValue) -> JsonValue:
    """A report, or a part of one, as JSON values; a number that is not finite is null."""
    if isinstance(value, Interval):
        return {name: to_plain(part) for name, part in value._asdict().items()}
    if is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_plain(kind: JsonValue, value: JsonValue) -> JsonValue:
    """The inverse of [`to_plain`], led by the type hints of `kind`."""
    if kind is Interval:
        return Interval(*(float("nan") if value[name] is None else value[name] for name in Interval._fields))
    if isinstance(kind, type) and is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: from_plain(hints[name], part) for name, part in value.items()})
    origin, args = get_origin(kind), get_args(kind)
    if origin is list:
        return [from_plain(args[0], part) for part in value]
    if origin is dict:
        return {key: from_plain(args[1], part) for key, part in value.items()}
    if origin is tuple:
        return tuple(value)
    if origin is types.UnionType:
        return None if value is None else from_plain(args[0], value)
    return float("nan") if kind is float and value is None else value
