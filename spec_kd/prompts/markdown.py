"""A prompt report as Markdown tables."""

from spec_kd.escaping import make_table
from spec_kd.prompts.facts import PromptFacts
from spec_kd.reports.markdown import render_counts

MOST_ROWS = 10  # of a table; the JSON has all
PERCENT_NAMES = {"0": "shortest", "50": "median", "100": "longest"}
BREAKDOWNS = {"user turns": "turns", "language": "languages", "scenario": "scenarios", "source": "sources"}


def render_markdown(report: PromptFacts) -> str:
    """Counts, lengths, and prompts by turns, language, scenario and source.

    Args:
        report (`PromptFacts`): What to show. Tables without rows are left out.
    """
    counts = {
        "all": report.num_prompts,
        "with tools": report.num_with_tools,
        "with a system prompt": report.num_with_system_prompt,
        "with a completion": report.num_with_completion,
        "same text as an earlier one": report.num_exact_duplicates,
        f"nearly the same (similarity {report.near_duplicate_threshold:g})": report.num_near_duplicates,
    }
    if (overlap := report.overlap) is not None:
        counts[f"also in the other set (of {overlap.num_other:,})"] = overlap.exact
        counts["nearly in the other set"] = overlap.near
    lines = render_counts("prompts", counts, report.num_prompts)
    percents = [PERCENT_NAMES.get(percent, f"{percent} %") for percent in report.characters.percentiles]
    rows = [
        [unit, f"{lengths.mean:,.1f}", *(f"{value:,}" for value in lengths.percentiles.values())]
        for unit, lengths in (("tokens", report.tokens), ("characters", report.characters))
        if lengths is not None
    ]
    lines += ["", *make_table(["length", "mean", *percents], rows)]
    for title, name in BREAKDOWNS.items():
        found = getattr(report, name)
        shown = dict(list(found.items())[:MOST_ROWS])
        if len(found) > MOST_ROWS:
            shown[f"{len(found) - MOST_ROWS} others"] = sum(found.values()) - sum(shown.values())
        lines += ["", *render_counts(title, shown, report.num_prompts)] if found else []
    return "\n".join(lines) + "\n"
