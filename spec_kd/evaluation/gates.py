"""Thresholds on a report, for a script that must fail where a draft is not good enough."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

from spec_kd.evaluation.metrics import Interval
from spec_kd.evaluation.report.content import DraftReport, EvaluationReport, SettingReport
from spec_kd.evaluation.report.left_out import WORDS
from spec_kd.evaluation.text_kinds import EITHER

Metric: TypeAlias = Callable[[SettingReport, int], Interval | None]
METRICS: dict[str, Metric] = {
    "alpha": lambda setting, gamma: setting.alpha,
    "block_efficiency": lambda setting, gamma: setting.at_gamma(gamma).block_efficiency,
    "acceptance_rate": lambda setting, gamma: setting.at_gamma(gamma).acceptance_rate,
    "predicted_speedup": lambda setting, gamma: setting.get_speedups("1").get(setting.best_gamma.get("1", 0)),
    "speedup": lambda setting, gamma: setting.assisted.speedup if setting.assisted is not None else None,
}


def _find_without(metric: str, kind: str, setting: SettingReport, gamma: int) -> Interval | None:
    """A metric without the responses of a kind; NaN if none are left, `None` where the report does not say."""
    known = {one.kind: one for one in setting.left_out}
    if kind == EITHER and kind not in known:  # one of the two has no responses, so that the other is both
        kind = next((name for name, one in known.items() if one.responses), kind)
    if not known:
        return None
    if kind not in known or not known[kind].responses:
        return METRICS[metric](setting, gamma)
    if known[kind].share == 1:
        return Interval(math.nan, math.nan, math.nan)
    if metric == "alpha":
        return next((one.without for one in known[kind].metrics if one.name == metric), None)
    of_gamma = [one.without[kind] for one in setting.by_gamma if kind in one.without]
    return METRICS[metric](replace(setting, by_gamma=of_gamma), gamma) if of_gamma else None


ALL_METRICS: dict[str, Metric] = METRICS | {
    f"{metric}_without_{kind}": partial(_find_without, metric, kind)
    for metric in METRICS
    for kind in WORDS
    if metric != "speedup"  # assisted generation runs on a few prompts
}


def _needs_setting(metric: str) -> bool:
    return metric.startswith("alpha")  # it does not depend on gamma, and is never without its setting


@dataclass(frozen=True, kw_only=True)
class Gate:
    """`name` must be at least `threshold`."""

    name: str
    threshold: float


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """One gate, checked.

    Args:
        name (`str`): Name of the metric, as the gate gave it.
        threshold (`float`): Lowest value that passes.
        value (`Interval`): Value of the metric in the report.
        has_passed (`bool`): Whether the point estimate reaches the threshold.
        is_sure (`bool`): Whether the lower bound of the interval reaches it too.
    """

    name: str
    threshold: float
    value: Interval
    has_passed: bool
    is_sure: bool


def parse_gate(text: str, settings: Sequence[str] | None = None) -> Gate:
    """Reads `NAME=THRESHOLD`, such as `"block_efficiency=2.5"` or `"alpha_t1=0.6"`.

    | name | metric |
    |---|---|
    | `alpha_SETTING` | expected acceptance of one drafted token |
    | `block_efficiency[_SETTING]` | tokens per target pass, at the report's gamma |
    | `acceptance_rate[_SETTING]` | accepted over drafted tokens, at the report's gamma |
    | `predicted_speedup[_SETTING]` | by the costs, at the best gamma, batch size 1 |
    | `speedup[_SETTING]` | measured in assisted generation |

    SETTING is the name of a setting: `greedy`, `t1`, ...; the report's first one where it is left out, which alpha
    does not allow. Before it, `_without_looping`, `_without_untemplated` or `_without_looping_or_untemplated` leaves
    responses out that say little of use: `block_efficiency_without_looping_t1=2`. Only `speedup` does not take it.

    Args:
        text (`str`): The gate.
        settings (`Sequence[str]`, *optional*): Names of the settings that will be there; any by default.

    Raises:
        ValueError: If the text has another form, no report can have such a metric, or the threshold is no finite
            number.
    """
    name, equals, threshold = (part.strip() for part in text.rpartition("="))
    begins = [metric for metric in ALL_METRICS if name == metric or name.startswith(f"{metric}_")]
    metric = max(begins, key=len, default=None)
    setting = name.removeprefix(f"{metric}_")
    try:
        number = float(threshold)
    except ValueError:
        number = math.nan
    is_known = name == metric or settings is None or setting in settings
    for problem, is_there in {
        "is not of the form NAME=THRESHOLD, such as 'block_efficiency=2.5'": not equals or not name,
        f"names no metric: {name!r} does not begin with {' or '.join(METRICS)}": metric is None,
        f"names no setting, which alpha needs: {name}_greedy, {name}_t1, ...": name == metric and _needs_setting(name),
        f"names the setting {setting!r}, but there are {', '.join(settings or ())}": not is_known,
        f"has the threshold {threshold!r}, which is no finite number": not math.isfinite(number),
    }.items():
        if is_there:
            raise ValueError(f"The gate {text!r} {problem}.")
    return Gate(name=name, threshold=number)


def check_measured(
    gates: Sequence[str], settings: Mapping[str, str] | None, *, has_costs: bool, has_assisted: bool
) -> None:
    """Raises `ValueError` for a gate on a metric that an evaluation will not have, before it runs.

    Args:
        gates (`Sequence[str]`): `NAME=THRESHOLD` each.
        settings (`Mapping[str, str]`, *optional*):
            How each setting will draft, `"stochastic"` or `"greedy"`, by its name; `None` if that is not known.
        has_costs (`bool`): Whether there will be costs at batch size 1.
        has_assisted (`bool`): Whether assisted generation will be run.
    """
    names = None if settings is None else list(settings)
    for text in gates:
        gate = parse_gate(text, names)
        setting = gate.name.removeprefix("predicted_").removeprefix("speedup").removeprefix("_") or (names or [""])[0]
        if gate.name.startswith("predicted_speedup") and not has_costs:
            raise ValueError(
                f"The gate {text!r} needs costs at batch size 1, but none will be known. Set `costs` and "
                "`batch_sizes`, or drop the gate."
            )
        is_checked = has_assisted and (settings is None or settings.get(setting) == "stochastic")
        if gate.name.startswith("speedup") and not is_checked:
            raise ValueError(
                f"The gate {text!r} needs assisted generation, which samples the draft and runs on "
                "`num_assisted_prompts` prompts. Raise that number, choose another setting, or drop the gate."
            )


def check_gates(report: EvaluationReport, gates: Sequence[str], draft: str | None = None) -> list[GateResult]:
    """Compares the metrics of a draft with thresholds; see [`parse_gate`] for their form.

    Args:
        report (`EvaluationReport`): Report to check.
        gates (`Sequence[str]`): `NAME=THRESHOLD` each.
        draft (`str`, *optional*): Name of the draft; the last one, which the report is about, by default.

    Raises:
        ValueError: If the report has no such draft or metric, or a gate cannot be read. The message lists what the
            report has.
    """
    drafts = {one.name: one for one in report.drafts}
    if draft is not None and draft not in drafts:
        raise ValueError(f"The report has no draft {draft!r}; it has {', '.join(drafts)}.")
    values = collect_metrics(report, report.draft if draft is None else drafts[draft], ALL_METRICS)
    parsed = [parse_gate(gate) for gate in gates]
    unknown = [gate.name for gate in parsed if gate.name not in values]
    if unknown:
        raise ValueError(
            f"The report has no {' and no '.join(unknown)} to compare with a gate; it has "
            f"{', '.join(collect_metrics(report, report.draft))}. A predicted speed-up needs costs at batch size 1, a "
            "measured one needs assisted generation. For a metric without loops, evaluate again if the report is older."
        )
    return [
        GateResult(
            name=gate.name,
            threshold=gate.threshold,
            value=values[gate.name],
            has_passed=values[gate.name].value >= gate.threshold,  # False for NaN, as below
            is_sure=values[gate.name].low >= gate.threshold,
        )
        for gate in parsed
    ]


def collect_metrics(
    report: EvaluationReport, draft: DraftReport, metrics: Mapping[str, Metric] = METRICS
) -> dict[str, Interval]:
    """Metrics by the names that gates have for them; those of the first setting also without a setting.

    Args:
        report (`EvaluationReport`): The report.
        draft (`DraftReport`): One of its drafts.
        metrics (`Mapping[str, Callable]`, *optional*, defaults to `METRICS`): The metrics, `ALL_METRICS` for all.
    """
    named: dict[str, Interval] = {}
    for setting in draft.settings:
        for metric, find in metrics.items():
            value = find(setting, report.num_assistant_tokens)
            if value is not None:
                is_default = setting is draft.settings[0] and not _needs_setting(metric)
                named |= ({metric: value} if is_default else {}) | {f"{metric}_{setting.name}": value}
    return named
