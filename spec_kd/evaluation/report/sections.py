"""The sections of an evaluation report, in their order. A new one is a class like these, in a file of its own."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from markupsafe import Markup

from spec_kd.escaping import escape_markdown, make_code_block
from spec_kd.evaluation.report import tables
from spec_kd.evaluation.report.content import EvaluationReport, ShownPrompt
from spec_kd.evaluation.report.observed import list_observed_tables
from spec_kd.evaluation.report.recommended_section import RecommendedSection
from spec_kd.reports.charts import LineChart, Series, draw_lines
from spec_kd.reports.numbers import format_number
from spec_kd.reports.rendering import Section, Table, fold, render_part, render_table

LONG_PROMPT = 400  # characters; longer ones are folded
SHADES = 5  # classes a0 to a4 of page.css, from rejected to accepted
SHOWN_CHARACTERS = 600  # of a prompt in Markdown; the page has all of it

GLOSSARY = {
    "alpha": "Expected acceptance of one drafted token, mean over the tokens of the target's completions.",
    "acceptance rate": "Accepted over drafted tokens, over all rounds.",
    "block efficiency": "Tokens emitted per target pass, the target's own token included; 1 is plain decoding.",
    "gamma": "Number of tokens drafted in a round (num_assistant_tokens).",
    "greedy, t1, t0.7, ...": "How the target samples: the most likely token, or temperature 1, 0.7, ...",
    "draft sampling": "Whether the draft samples too (stochastic) or always proposes its most likely token (greedy).",
    "cost ratio": "Time of a draft step over that of a target step.",
    "verify cost": "Time of a target pass over gamma + 1 tokens over that of a pass over one.",
    "predicted speed-up": "block efficiency / (gamma x cost ratio + verify cost + overhead of a round).",
    "break-even alpha": "Acceptance below which even the best gamma is no faster than plain decoding.",
    "looping completion": "A completion that repeats itself at its end, or over half of it; it is accepted easily.",
    "prompt without the chat template": "A prompt that lacks what the target's template writes around every message.",
    "replay": "Acceptance computed from one pass over the target's completions; nothing is generated.",
    "interval": "In brackets: 95 % bootstrap interval over prompts; that of a difference is paired.",
}

render_own_part = partial(render_part, template="macros.html", folder=Path(__file__).parent)


class TableSection(Section[EvaluationReport]):
    """A section of tables alone.

    Args:
        title (`str`): Title of the section.
        tabulators (`Callable`): Each makes one table of a report.
    """

    def __init__(self, title: str, *tabulators: Callable[[EvaluationReport], Table]):
        self.title = title
        self._tabulators = tabulators

    def list_tables(self, report: EvaluationReport) -> list[Table]:
        """One table of each tabulator."""
        return [tabulate(report) for tabulate in self._tabulators]


class MetricsSection(TableSection):
    """The headline metrics and the differences between drafts."""

    def find_title(self, report: EvaluationReport) -> str:
        """`"Before and after"` with several drafts."""
        return "Before and after" if len(report.drafts) > 1 else self.title


class PositionsSection(Section[EvaluationReport]):
    """Charts of the acceptance by position; Markdown has them as tables of the next section."""

    title = "Acceptance by position"

    def render_html(self, report: EvaluationReport) -> list[Markup]:
        """One chart for each setting."""
        drawn = [draw_positions(report, name) for name in tables.list_settings(report)]
        shown = [chart for chart in drawn if chart is not None]
        gamma = report.num_assistant_tokens
        intro = f"Share of the drafting rounds in which drafted token k was accepted, at gamma {gamma}."
        return [render_part("show_paragraph", intro), render_part("show_charts", shown)] if shown else []


class GammasSection(Section[EvaluationReport]):
    """Charts and tables over the number of drafted tokens."""

    title = "How many tokens to draft"

    def render_html(self, report: EvaluationReport) -> list[Markup]:
        """Charts of each setting, with their numbers folded."""
        parts = []
        for name in tables.list_settings(report):
            drawn = [draw_block_efficiency(report, name)]
            drawn += [draw_speedup(report, name, batch) for batch in tables.list_batch_sizes(report, name)]
            shown = [render_part("show_table", table) for table in _list_numbers(report, name)]
            parts += [
                render_part("show_heading", name),
                render_part("show_charts", [chart for chart in drawn if chart is not None]),
                render_part("show_folded", f"Numbers of the charts, {name}", shown, False),
            ]
        return parts

    def render_markdown(self, report: EvaluationReport) -> list[str]:
        """The numbers of each setting, folded."""
        return [
            part
            for name in tables.list_settings(report)
            for part in fold(name, list(map(render_table, _list_numbers(report, name))))
        ]


class CrossCheckSection(TableSection):
    """Real assisted generation beside replay and the costs."""

    def render_html(self, report: EvaluationReport) -> list[Markup]:
        """The table, after a sentence on what it compares."""
        intro = "The same drafts in real assisted generation, beside what replay and the costs say of the same prompts."
        parts = super().render_html(report)
        return [render_part("show_paragraph", intro), *parts] if parts else []


class ObservedSection(Section[EvaluationReport]):
    """What running servers did, beside what replay predicts."""

    title = "Predicted and observed"

    def list_tables(self, report: EvaluationReport) -> list[Table]:
        """The tables of each observation."""
        return [table for one in report.observed for table in list_observed_tables(one)]


class BreakdownSection(Section[EvaluationReport]):
    """alpha by properties of the tokens and of the prompts."""

    title = "Where the draft fails"

    def render_html(self, report: EvaluationReport) -> list[Markup]:
        """Bars, folded for each setting but the first."""
        parts: list[Markup] = []
        for name in tables.list_settings(report):
            found = tables.collect_breakdowns(report, name).items()
            shown = [render_own_part("show_breakdown", title, rows, report.drafts) for title, rows in found]
            parts += [render_part("show_folded", name, shown, not parts)] if shown else []
        return parts

    def render_markdown(self, report: EvaluationReport) -> list[str]:
        """Tables, folded for each setting."""
        parts = []
        for name in tables.list_settings(report):
            found = tables.collect_breakdowns(report, name).items()
            shown = [render_table(tables.tabulate_breakdown(report, *item)) for item in found]
            parts += fold(name, shown) if shown else []
        return parts


class WorstPromptsSection(Section[EvaluationReport]):
    """The prompts with the lowest block efficiency, token by token."""

    title = "Worst prompts"

    def render_html(self, report: EvaluationReport) -> list[Markup]:
        """Colored tokens, folded for each setting and draft but the first."""
        parts: list[Markup] = []
        for summary, prompts in _list_worst(report):
            shown = [
                render_own_part(
                    "show_prompt", one, list(map(choose_shade, one.acceptance)), len(one.prompt) > LONG_PROMPT
                )
                for one in prompts
            ]
            parts.append(render_part("show_folded", summary, shown, not parts))
        intro = (
            "Completions of the prompts with the lowest block efficiency. Each token is colored by the probability "
            "that it is accepted when drafting reaches it; the number appears under the pointer."
        )
        return [render_part("show_paragraph", intro), render_own_part("show_legend", SHADES), *parts] if parts else []

    def render_markdown(self, report: EvaluationReport) -> list[str]:
        """Code blocks, folded for each setting and draft."""
        parts = [
            part
            for summary, prompts in _list_worst(report)
            for part in fold(summary, [line for one in prompts for line in _render_prompt(one)])
        ]
        return ["In ⟦brackets⟧: tokens that are more likely rejected than accepted.", *parts] if parts else []


class TermsSection(Section[EvaluationReport]):
    """The glossary."""

    title = "Terms"

    def render_html(self, report: EvaluationReport) -> list[Markup]:
        """A list of definitions."""
        return [render_part("show_terms", GLOSSARY)]

    def render_markdown(self, report: EvaluationReport) -> list[str]:
        """A list of definitions."""
        return ["\n".join(f"- **{escape_markdown(term)}**: {meaning}" for term, meaning in GLOSSARY.items())]


SECTIONS: list[Section[EvaluationReport]] = [
    MetricsSection("Metrics", tables.tabulate_metrics, tables.tabulate_comparisons),
    TableSection("Loops and templates", tables.tabulate_left_out),
    PositionsSection(),
    GammasSection(),
    TableSection("Costs", tables.tabulate_costs, tables.tabulate_speedups),
    RecommendedSection(),
    CrossCheckSection("Cross-check", tables.tabulate_assisted),
    ObservedSection(),
    TableSection("Not measured", tables.tabulate_unmeasured),
    BreakdownSection(),
    WorstPromptsSection(),
    TableSection("Provenance", tables.tabulate_provenance),
    TermsSection(),
]


def register_section(section: Section[EvaluationReport], before: str = "Provenance") -> None:
    """Adds a section to every page and Markdown file that is rendered from now on.

    Args:
        section (`Section[EvaluationReport]`): The section.
        before (`str`, *optional*, defaults to `"Provenance"`): Title of the section that follows it.

    Raises:
        ValueError: If there is a section of its title, or none of the title `before`.
    """
    titles = [one.title for one in SECTIONS]
    if section.title in titles or before not in titles:
        raise ValueError(
            f"The section {section.title!r} cannot stand before {before!r}: there are {', '.join(titles)}. Give it a "
            "title of its own, and the title of a section that is there."
        )
    SECTIONS.insert(titles.index(before), section)


def draw_positions(report: EvaluationReport, name: str) -> LineChart | None:
    """Acceptance of drafted token k for each draft, at one setting."""
    series = [
        Series(index=index, label=draft.name, points=list(enumerate(setting.acceptance_rate_per_position, start=1)))
        for index, draft, setting in tables.find_setting(report, name)
    ]
    return draw_lines(name, "drafted token", "share of rounds", series, floor=0, ceiling=1)


def draw_block_efficiency(report: EvaluationReport, name: str) -> LineChart | None:
    """Block efficiency over gamma for each draft, at one setting."""
    series = [
        Series(
            index=index,
            label=draft.name,
            points=[(at_gamma.num_assistant_tokens, at_gamma.block_efficiency) for at_gamma in setting.by_gamma],
        )
        for index, draft, setting in tables.find_setting(report, name)
    ]
    return draw_lines(f"Block efficiency, {name}", "gamma", "tokens per target pass", series, floor=1)


def draw_speedup(report: EvaluationReport, name: str, batch_size: str) -> LineChart | None:
    """Predicted speed-up over gamma for each draft with known costs, at one setting and batch size."""
    series = []
    for index, draft, setting in tables.find_setting(report, name):
        speedups, best = setting.get_speedups(batch_size), setting.best_gamma.get(batch_size)
        gain = "" if best is None else f": {format_number(speedups[best].value)}x at its best gamma, {best}"
        series.append(Series(index=index, label=draft.name + gain, points=list(speedups.items()), marked_x=best))
    title = f"Predicted speed-up, {name}, batch {batch_size}"
    return draw_lines(
        title, "gamma", "times plain decoding", series, floor=0, reference=1.0, reference_label="1.0: plain decoding"
    )


def choose_shade(acceptance: float) -> int:
    """Number of the color, 0 for tokens that are rejected to `SHADES - 1` for accepted ones."""
    return min(SHADES - 1, int(acceptance * SHADES))


def _list_numbers(report: EvaluationReport, name: str) -> list[Table]:
    numbers = (tables.tabulate_gammas(report, name), tables.tabulate_positions(report, name))
    return [table for table in numbers if table.rows]


def _list_worst(report: EvaluationReport) -> list[tuple[str, list[ShownPrompt]]]:
    """Name of the setting and the draft, and the worst prompts; the report's draft first."""
    return [
        (f"{name}, {draft.name}", setting.worst)
        for name in tables.list_settings(report)
        for _, draft, setting in reversed(tables.find_setting(report, name))
        if setting.worst
    ]


def _render_prompt(shown: ShownPrompt) -> list[str]:
    prompt, left_out = shown.prompt[-SHOWN_CHARACTERS:], max(0, len(shown.prompt) - SHOWN_CHARACTERS)
    note = f" (its first {left_out:,} characters are left out here)" if left_out else ""
    completion = "".join(
        f"⟦{text}⟧" if acceptance < 0.5 else text
        for text, acceptance in zip(shown.tokens, shown.acceptance, strict=True)
    ).replace("⟧⟦", "")
    return [
        f"**Prompt {shown.row}**: {format_number(shown.block_efficiency)} tokens per target pass{note}",
        make_code_block(prompt),
        make_code_block(completion),
    ]
