"""An evaluation report on disk."""

import os
from pathlib import Path

from spec_kd.checks import read_path
from spec_kd.evaluation.report.content import EvaluationReport
from spec_kd.evaluation.report.html import render_html
from spec_kd.evaluation.report.markdown import render_markdown
from spec_kd.evaluation.report.plots import plot_report
from spec_kd.reports.plots import save_files


def save_report(report: EvaluationReport, output_dir: str | os.PathLike[str]) -> dict[str, Path]:
    """Writes `report.json`, `report.md`, `report.html` and, with matplotlib, `report.png`, over those that are there.

    Saving what [`load_report`] read writes the same files again.

    Args:
        report (`EvaluationReport`): What was found.
        output_dir (`str` or `os.PathLike`): Folder for the files; made where there is none.

    Returns:
        `dict[str, Path]`: The files by `"json"`, `"md"`, `"html"` and `"png"`, the last only where it was written.

    Raises:
        `ValueError`: If the report holds a value that JSON has no place for.
    """
    output_dir = read_path("output_dir", output_dir)
    data = report.to_json()
    # What is shown is what was saved: tuples are lists, numbers without a value are gone.
    report = EvaluationReport.from_json(data)
    texts = {"json": data, "md": render_markdown(report), "html": render_html(report)}
    return save_files(output_dir, "report", texts, lambda: plot_report(report))


def load_report(path: str | os.PathLike[str]) -> EvaluationReport:
    """Reads a `report.json`, given itself or its folder.

    Args:
        path (`str` or `os.PathLike`): What [`save_report`] wrote.

    Raises:
        `FileNotFoundError`: Where there is none.
        `ValueError`: For a file that is no report of this version.
    """
    path = Path(path)
    path = path / "report.json" if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(
            f"There is no report at `{path}`. Pass a `report.json` of `save_report`, or its folder."
        )
    try:
        return EvaluationReport.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`{path}` cannot be read: {error}") from error
