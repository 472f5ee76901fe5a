"""The report as Markdown, as GitHub renders it: the tables of the page, without its charts."""

from html import escape as escape_html

from spec_kd.escaping import escape_markdown as escape
from spec_kd.escaping import make_code_block, make_table, to_one_line
from spec_kd.evaluation.report import formatting, tables
from spec_kd.evaluation.report.content import EvaluationReport, ShownPrompt

SHOWN_CHARACTERS = 600  # of a prompt; the page has all of it


def render_markdown(report: EvaluationReport) -> str:
    """The report as text; every name and text in it is escaped, and prompts stand in code blocks.

    Args:
        report (`EvaluationReport`): What to show. Sections without figures are left out.
    """
    names = tables.list_settings(report)
    parts = [f"# Speculative decoding with {escape(report.draft.name)}", escape(formatting.build_headline(report))]
    parts += ["In brackets: 95 % bootstrap intervals over prompts."]
    parts += _render_section("Figures", tables.tabulate_metrics(report), tables.tabulate_comparisons(report))
    parts.append("## How many tokens to draft")
    for name in names:
        numbers = (tables.tabulate_gammas(report, name), tables.tabulate_positions(report, name))
        parts += _fold(name, [render_table(table) for table in numbers if table.rows])
    parts += _render_section("Costs", tables.tabulate_costs(report), tables.tabulate_speedups(report))
    parts += _render_section("Cross-check", tables.tabulate_assisted(report))
    parts += _render_section("Not measured", tables.tabulate_unmeasured(report))
    breakdowns = [
        part
        for name in names
        if (collected := tables.collect_breakdowns(report, name))
        for part in _fold(name, [render_table(tables.tabulate_breakdown(report, *item)) for item in collected.items()])
    ]
    parts += ["## Where the draft fails", *breakdowns] if breakdowns else []
    parts += _render_worst(report, names)
    parts += _render_section("Provenance", tables.tabulate_provenance(report))
    parts += ["## Terms", "\n".join(f"- **{term}**: {meaning}" for term, meaning in formatting.GLOSSARY.items())]
    return "\n\n".join(parts) + "\n"


def render_table(table: tables.Table) -> str:
    """A table with its title in bold above it."""
    cells = [list(map(escape, line)) for line in (table.header, *table.rows)]
    return "\n".join([f"**{escape(table.title)}**", "", *make_table(cells[0], cells[1:])])


def _render_section(title: str, *shown: tables.Table) -> list[str]:
    rendered = [render_table(table) for table in shown if table.rows]
    return [f"## {title}", *rendered] if rendered else []


def _fold(summary: str, parts: list[str]) -> list[str]:
    return [f"<details><summary>{escape_html(to_one_line(summary))}</summary>", *parts, "</details>"]


def _render_worst(report: EvaluationReport, names: list[str]) -> list[str]:
    parts = []
    for name in names:
        for _, draft, setting in reversed(tables.find_setting(report, name)):
            if setting.worst:
                shown = [part for prompt in setting.worst for part in _render_prompt(prompt)]
                parts += _fold(f"{name}, {draft.name}", shown)
    intro = "In ⟦brackets⟧: tokens that are more likely rejected than accepted."
    return ["## Worst prompts", intro, *parts] if parts else []


def _render_prompt(shown: ShownPrompt) -> list[str]:
    prompt, left_out = shown.prompt[-SHOWN_CHARACTERS:], max(0, len(shown.prompt) - SHOWN_CHARACTERS)
    note = f" (its first {left_out:,} characters are left out here)" if left_out else ""
    completion = "".join(
        f"⟦{text}⟧" if acceptance < 0.5 else text
        for text, acceptance in zip(shown.tokens, shown.acceptance, strict=True)
    ).replace("⟧⟦", "")
    return [
        f"**Prompt {shown.row}**: {formatting.format_number(shown.block_efficiency)} tokens per target pass{note}",
        make_code_block(prompt),
        make_code_block(completion),
    ]
