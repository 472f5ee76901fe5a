"""An evaluation report in every form: as a headline, as a page, as Markdown, and as files with a picture."""

import os
from pathlib import Path

from spec_kd.addresses import name_place
from spec_kd.copies import find_file
from spec_kd.evaluation.report.content import EvaluationReport
from spec_kd.evaluation.report.plots import plot_report
from spec_kd.evaluation.report.sections import SECTIONS
from spec_kd.options import read_path
from spec_kd.reports.numbers import format_bounds, format_interval, format_number, is_apart_from_zero
from spec_kd.reports.plots import save_files
from spec_kd.reports.rendering import render_document, render_page

INTERVALS = "In brackets: 95 % bootstrap intervals over prompts."


def build_headline(report: EvaluationReport) -> str:
    """What a server gains, in a sentence or two, at the first setting of the draft that the report is about."""
    draft, gamma = report.draft, report.num_assistant_tokens
    setting = draft.settings[0]
    block_efficiency = setting.at_gamma(gamma).block_efficiency
    words = {"greedy": " with a greedy draft", "matching": " with drafts that the target has to sample too"}
    drafts = words.get(setting.draft_sampling, "")
    is_sampled = setting.temperature > 0
    sampling = f"at temperature {setting.temperature:g}{drafts}" if is_sampled else "with greedy decoding"
    parts = [
        f"With “{draft.name}” a server drafting {gamma} token{'s' if gamma > 1 else ''} a round emits "
        f"{format_number(block_efficiency.value)} tokens per target pass {sampling} {format_bounds(block_efficiency)}"
    ]
    if setting.best_gamma:
        batch_size = "1" if "1" in setting.best_gamma else next(iter(setting.best_gamma))
        best = setting.best_gamma[batch_size]
        speedup = setting.get_speedups(batch_size)[best].value
        parts.append(
            f"best gamma {best}, predicted speed-up {format_number(speedup)}x (batch {batch_size})"
            + (", slower than plain decoding" if speedup < 1 else "")
        )
    if setting.assisted is not None:
        parts.append(f"measured in assisted generation: {format_number(setting.assisted.speedup.value)}x")
    headline = "; ".join(parts) + "."
    wanted = (setting.name, "block_efficiency", draft.name, report.drafts[0].name)
    verdicts = {True: ", an interval that excludes 0", False: ", an interval that includes 0", None: ""}
    for one in report.comparisons:
        if (one.setting, one.metric, one.draft, one.baseline) == wanted:
            difference, verdict = (
                format_interval(one.difference, sign="+"),
                verdicts[is_apart_from_zero(one.difference)],
            )
            headline += f" Tokens per target pass against “{one.baseline}”: {difference}{verdict}."
    return headline


def render_html(report: EvaluationReport) -> str:
    """The report as one HTML page; every name and text of the report is escaped.

    Args:
        report (`EvaluationReport`): Report to show. Sections without content are left out.
    """
    name = report.draft.name
    rule = f"Rule of acceptance ({report.serving_engine}): {report.serving_rule}"
    return render_page(
        f"{name}: report on speculative decoding",
        f"Speculative decoding with {name}",
        build_headline(report),
        [rule, INTERVALS],
        SECTIONS,
        report,
    )


def render_markdown(report: EvaluationReport) -> str:
    """The report as Markdown, as GitHub renders it: the tables of the page, without its charts.

    Every name and text of the report is escaped, and prompts stand in code blocks.

    Args:
        report (`EvaluationReport`): Report to show. Sections without content are left out.
    """
    heading = f"Speculative decoding with {report.draft.name}"
    return render_document(heading, [build_headline(report), INTERVALS], SECTIONS, report)


def save_report(report: EvaluationReport, output_dir: str | os.PathLike[str]) -> dict[str, Path]:
    """Writes `report.json`, `report.md`, `report.html` and, with matplotlib, `report.png`. Older ones are replaced.

    Saving a report that [`load_report`] read writes the same files again.

    Args:
        report (`EvaluationReport`): Report to save.
        output_dir (`str` or `os.PathLike`): Folder or address for the files; created if needed.

    Returns:
        `dict[str, Path]`: The files by `"json"`, `"md"`, `"html"` and `"png"`, the last only where it was written; at
        an address their copies on this machine.

    Raises:
        ValueError: If `output_dir` is no path, or the report holds a value that JSON cannot hold.
    """
    output_dir = read_path("output_dir", output_dir, takes_address=True)
    data = report.to_json()
    # Renders what `load_report` reads: JSON turns tuples into lists, and numbers without a value into null.
    report = EvaluationReport.from_json(data)
    texts = {"json": data, "md": render_markdown(report), "html": render_html(report)}
    return save_files(output_dir, "report", texts, lambda: plot_report(report))


def load_report(path: str | os.PathLike[str]) -> EvaluationReport:
    """Reads a `report.json`, given itself or its folder.

    Args:
        path (`str` or `os.PathLike`): File, folder or address that [`save_report`] wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no report, or a report of a later version.
    """
    path = find_file(path, "report.json")
    if not path.exists():
        raise FileNotFoundError(
            f"There is no report at `{name_place(path)}`. Pass a `report.json` of `save_report`, or its folder."
        )
    try:
        return EvaluationReport.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`{name_place(path)}` cannot be read: {error}") from error
