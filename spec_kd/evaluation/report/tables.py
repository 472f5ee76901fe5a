"""The tables of an evaluation report."""

import json
from collections.abc import Iterator, Mapping
from itertools import zip_longest

from spec_kd.evaluation.report.content import BreakdownRow, CostReport, DraftReport, EvaluationReport, SettingReport
from spec_kd.evaluation.report.left_out import TITLE, list_cells, list_header
from spec_kd.open_types import Record
from spec_kd.reports.numbers import DASH, RATE_DIGITS, format_interval, format_number, is_apart_from_zero
from spec_kd.reports.rendering import Table

METRIC_NAMES = {"alpha": "alpha", "block_efficiency": "block efficiency"}
Breakdowns = dict[str, dict[str, list[tuple[int, BreakdownRow]]]]


def list_settings(report: EvaluationReport) -> list[str]:
    """Names of all settings, in the order of the draft that the report is about."""
    return list(dict.fromkeys(setting.name for draft in reversed(report.drafts) for setting in draft.settings))


def find_setting(report: EvaluationReport, name: str) -> list[tuple[int, DraftReport, SettingReport]]:
    """Number, draft and setting of every draft that was measured at it."""
    return [
        (index, draft, setting)
        for index, draft in enumerate(report.drafts)
        for setting in draft.settings
        if setting.name == name
    ]


def walk_settings(report: EvaluationReport) -> Iterator[tuple[DraftReport, SettingReport]]:
    """Every setting of every draft; the drafts of one setting stand together."""
    return ((draft, setting) for name in list_settings(report) for _, draft, setting in find_setting(report, name))


def list_batch_sizes(report: EvaluationReport, name: str) -> list[str]:
    """Batch sizes (as text) with a predicted speed-up at a setting."""
    gammas = [at_gamma for *_, setting in find_setting(report, name) for at_gamma in setting.by_gamma]
    return list(dict.fromkeys(batch_size for at_gamma in gammas for batch_size in at_gamma.predicted_speedup))


def tabulate_metrics(report: EvaluationReport) -> Table:
    """alpha, acceptance rate and block efficiency at the report's gamma: settings by drafts."""
    gamma = report.num_assistant_tokens
    rows = [
        [
            setting.name,
            draft.name,
            format_interval(setting.alpha, RATE_DIGITS),
            format_interval(setting.at_gamma(gamma).acceptance_rate, RATE_DIGITS),
            format_interval(setting.at_gamma(gamma).block_efficiency),
            f"{setting.prompts:,}",
            f"{setting.tokens:,}",
            _describe_alpha(setting),
        ]
        for draft, setting in walk_settings(report)
    ]
    header = ["setting", "draft", "alpha", "acceptance rate", "block efficiency", "prompts", "tokens", "alpha is"]
    if all(row[-1] == "exact" for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return Table(title=f"Metrics at gamma {gamma}", header=header, rows=rows, labels=2)


def _describe_alpha(setting: SettingReport) -> str:
    if setting.alpha_bounds is None:
        return setting.alpha_kind
    low, high = (format_number(bound, RATE_DIGITS) for bound in setting.alpha_bounds)
    return f"{setting.alpha_kind}, bounded by {low} and {high}"


def tabulate_left_out(report: EvaluationReport) -> Table:
    """Metrics at the report's gamma with and without looping completions and prompts that lack the chat template."""
    found = [(draft, setting, one) for draft, setting in walk_settings(report) for one in setting.left_out]
    rows = [[setting.name, draft.name, *list_cells(one)] for draft, setting, one in found]
    header = ["setting", "draft", *list_header([one for *_, one in found])]
    return Table(title=TITLE, header=header, rows=rows, labels=3)


def tabulate_comparisons(report: EvaluationReport) -> Table:
    """Paired differences between drafts, and whether they are apart from 0."""
    words = {True: "yes", False: "no", None: DASH}
    rows = [
        [
            c.setting,
            METRIC_NAMES.get(c.metric, c.metric),
            f"{c.draft} minus {c.baseline}",
            format_interval(c.difference, RATE_DIGITS, "+"),
            words[is_apart_from_zero(c.difference)],
        ]
        for c in report.comparisons
    ]
    header = ["setting", "metric", "drafts", "difference", "interval excludes 0"]
    return Table(title="Paired differences on the same prompts", header=header, rows=rows, labels=3)


def tabulate_positions(report: EvaluationReport, name: str) -> Table:
    """Acceptance of drafted token k at one setting: positions by drafts."""
    found = find_setting(report, name)
    by_position = zip_longest(*(setting.acceptance_rate_per_position for *_, setting in found))
    rows = [
        [str(k), *(format_interval(rate, RATE_DIGITS) for rate in rates)]
        for k, rates in enumerate(by_position, start=1)
    ]
    header = ["drafted token", *(draft.name for _, draft, _ in found)]
    return Table(title=f"Acceptance by position, {name}", header=header, rows=rows)


def tabulate_gammas(report: EvaluationReport, name: str) -> Table:
    """Every metric over gamma at one setting."""
    batch_sizes = list_batch_sizes(report, name)
    header = ["gamma", "draft", "block efficiency", "acceptance rate"]
    header += [f"predicted speed-up, batch {batch_size}" for batch_size in batch_sizes]
    rows = [
        [
            str(at_gamma.num_assistant_tokens),
            draft.name,
            format_interval(at_gamma.block_efficiency),
            format_interval(at_gamma.acceptance_rate, RATE_DIGITS),
            *(format_interval(at_gamma.predicted_speedup.get(batch_size)) for batch_size in batch_sizes),
        ]
        for _, draft, setting in find_setting(report, name)
        for at_gamma in setting.by_gamma
    ]
    return Table(title=f"Metrics over gamma, {name}", header=header, rows=rows, labels=2)


def tabulate_costs(report: EvaluationReport) -> Table:
    """What a round costs, at each batch size."""
    gamma = report.num_assistant_tokens
    rows = [
        [
            draft.name,
            str(cost.batch_size),
            format_number(cost.cost_ratio, RATE_DIGITS),
            format_number(cost.verify_cost.get(str(gamma)), RATE_DIGITS),
            format_number(cost.round_overhead, RATE_DIGITS),
            format_number(None if cost.target_step_seconds is None else 1000 * cost.target_step_seconds),
            _describe_break_even(draft, cost),
            format_number(cost.round_cost.get(str(gamma)), RATE_DIGITS),
            cost.source,
        ]
        for draft in report.drafts
        for cost in draft.costs
    ]
    header = ["draft", "batch size", "cost ratio", f"verify cost at gamma {gamma}", "round overhead", "target step, ms"]
    header += ["break-even alpha", f"whole round at gamma {gamma}", "source"]
    return Table(title="Costs of a round", header=header, rows=rows, labels=2)


def tabulate_unmeasured(report: EvaluationReport) -> Table:
    """What was asked for and could not be measured, and why."""
    rows = [[draft.name, sentence] for draft in report.drafts for sentence in draft.unmeasured]
    return Table(title="Left out of this report", header=["draft", "what and why"], rows=rows)


def _describe_break_even(draft: DraftReport, cost: CostReport) -> str:
    key = str(cost.batch_size)
    by_setting = {s.name: format_number(s.break_even_alpha.get(key), RATE_DIGITS) for s in draft.settings}
    different = set(by_setting.values())
    return different.pop() if len(different) == 1 else ", ".join(f"{n}: {alpha}" for n, alpha in by_setting.items())


def tabulate_speedups(report: EvaluationReport) -> Table:
    """The best gamma of every setting, draft and batch size, and the speed-up that the costs predict there."""
    gamma = report.num_assistant_tokens
    rows = [
        [
            setting.name,
            draft.name,
            batch_size,
            str(best),
            *(format_interval(setting.get_speedups(batch_size).get(shown)) for shown in (best, gamma)),
        ]
        for draft, setting in walk_settings(report)
        for batch_size, best in setting.best_gamma.items()
    ]
    header = ["setting", "draft", "batch size", "best gamma", "predicted speed-up there", f"at gamma {gamma}"]
    return Table(title="Predicted speed-up", header=header, rows=rows, labels=3)


def tabulate_assisted(report: EvaluationReport) -> Table:
    """Real assisted generation beside what replay and the costs say of the same prompts."""
    rows = [
        [
            setting.name,
            draft.name,
            str(assisted.num_assistant_tokens),
            format_interval(assisted.block_efficiency),
            format_interval(assisted.replayed_block_efficiency),
            format_interval(assisted.speedup),
            format_number(assisted.predicted_speedup),
            format_interval(assisted.acceptance_rate, RATE_DIGITS),
            f"{assisted.tokens_per_second:,.1f}",
            f"{assisted.plain_tokens_per_second:,.1f}",
            f"{assisted.prompts:,}",
        ]
        for draft, setting in walk_settings(report)
        if (assisted := setting.assisted) is not None
    ]
    metrics = ["block efficiency", "the same, replayed", "speed-up", "the same, predicted", "acceptance rate"]
    header = ["setting", "draft", "gamma", *metrics, "tokens/s", "tokens/s without draft", "prompts"]
    return Table(title="Measured in assisted generation, batch size 1", header=header, rows=rows, labels=2)


def collect_breakdowns(report: EvaluationReport, name: str) -> Breakdowns:
    """By title and label, the rows of all drafts with their numbers; the last draft's order of titles and labels."""
    collected: Breakdowns = {}
    for index, _, setting in reversed(find_setting(report, name)):
        for breakdown in setting.breakdowns:
            rows = collected.setdefault(breakdown.title, {})
            for row in breakdown.rows:
                rows.setdefault(row.label, []).insert(0, (index, row))
    return collected


def tabulate_breakdown(report: EvaluationReport, title: str, rows: dict[str, list[tuple[int, BreakdownRow]]]) -> Table:
    """One breakdown of [`collect_breakdowns`]; block efficiency only where it has any."""
    flat = [(label, index, row) for label, group in rows.items() for index, row in group]
    has_block_efficiency = any(row.block_efficiency is not None for *_, row in flat)
    cells = [
        [
            label,
            report.drafts[index].name,
            format_interval(row.alpha, RATE_DIGITS),
            *([format_interval(row.block_efficiency)] if has_block_efficiency else []),
            f"{row.tokens:,}",
            f"{row.prompts:,}",
        ]
        for label, index, row in flat
    ]
    header = [title, "draft", "alpha", *(["block efficiency"] if has_block_efficiency else []), "tokens", "prompts"]
    return Table(title=f"alpha by {title}", header=header, rows=cells, labels=2)


def tabulate_provenance(report: EvaluationReport) -> Table:
    """What was evaluated, how and where; nested values under dotted names."""
    rows = [
        ["serving engine", report.serving_engine],
        ["rule of acceptance", report.serving_rule],
        ["gamma", str(report.num_assistant_tokens)],
        *map(list, _flatten(report.provenance)),
    ]
    return Table(title="What was evaluated, how and where", header=["what", "value"], rows=rows)


def _flatten(values: Record, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield prefix + key, DASH if value is None else text
