"""The report as one HTML page that needs nothing else: no network, no scripts, no fonts."""

import functools
import math
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from spec_kd.escaping import show_controls
from spec_kd.evaluation.report import charts, formatting, tables
from spec_kd.evaluation.report.content import EvaluationReport, ShownPrompt

LONG_PROMPT = 400  # characters; longer ones are folded
SHADES = 5  # classes a0 to a4 of page.css, from rejected to accepted


@dataclass(frozen=True, kw_only=True)
class SettingView:
    """What the page shows of one setting; `worst` by the name of the draft, the report's draft first."""

    name: str
    positions: charts.LineChart | None
    gammas: list[charts.LineChart]
    numbers: list[tables.Table]
    breakdowns: tables.Breakdowns
    worst: list[tuple[str, list[ShownPrompt]]]


def render_html(report: EvaluationReport) -> str:
    """The page as text; every name and text of the report is escaped.

    Args:
        report (`EvaluationReport`): What to show. Sections without figures are left out.
    """
    return _load_template().render(
        report=report,
        headline=formatting.build_headline(report),
        figures=tables.tabulate_metrics(report),
        comparisons=tables.tabulate_comparisons(report),
        settings=[_view_setting(report, name) for name in tables.list_settings(report)],
        costs=[table for table in (tables.tabulate_costs(report), tables.tabulate_speedups(report)) if table.rows],
        assisted=tables.tabulate_assisted(report),
        unmeasured=tables.tabulate_unmeasured(report),
        provenance=tables.tabulate_provenance(report),
        glossary=formatting.GLOSSARY,
        format_rate=functools.partial(formatting.format_interval, digits=formatting.RATE_DIGITS),
        format_times=formatting.format_interval,
        format_number=formatting.format_number,
        is_finite=math.isfinite,
        show_whitespace=show_whitespace,
        choose_shade=choose_shade,
        shades=SHADES,
        long_prompt=LONG_PROMPT,
        drawing=charts,
    )


def show_whitespace(text: str) -> str:
    """A token's text with line breaks, tabs, control characters and blank tokens made visible."""
    if text and not text.strip(" "):
        return "·" * len(text)
    return show_controls(text.replace("\n", "⏎\n").replace("\t", "⇥"))


def _finalize(value: object) -> object:
    """Every text of the report without control characters, which HTML forbids and a terminal obeys."""
    return show_controls(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def choose_shade(acceptance: float) -> int:
    """Number of the color, 0 for tokens that are rejected to `SHADES - 1` for accepted ones."""
    return min(SHADES - 1, int(acceptance * SHADES))


@functools.cache
def _load_template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")


def _view_setting(report: EvaluationReport, name: str) -> SettingView:
    found = tables.find_setting(report, name)
    speedups = [charts.draw_speedup(report, name, batch) for batch in tables.list_batch_sizes(report, name)]
    numbers = [tables.tabulate_gammas(report, name), tables.tabulate_positions(report, name)]
    return SettingView(
        name=name,
        positions=charts.draw_positions(report, name),
        gammas=[chart for chart in (charts.draw_block_efficiency(report, name), *speedups) if chart is not None],
        numbers=[table for table in numbers if table.rows],
        breakdowns=tables.collect_breakdowns(report, name),
        worst=[(draft.name, setting.worst) for _, draft, setting in reversed(found) if setting.worst],
    )
