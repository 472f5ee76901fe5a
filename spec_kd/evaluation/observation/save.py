"""An observation as files: what every rendering reads, a page and Markdown."""

import json
import os
from pathlib import Path

from spec_kd.addresses import name_place
from spec_kd.copies import find_file
from spec_kd.evaluation.report.content import from_plain, to_plain
from spec_kd.evaluation.report.observed import ObservedReport, list_observed_tables
from spec_kd.evaluation.report.rendering import INTERVALS
from spec_kd.reports.plots import save_files
from spec_kd.reports.rendering import Section, Table, render_document, render_page

FORMAT = 1


def save_observed(report: ObservedReport, output_dir: str | os.PathLike[str]) -> dict[str, Path]:
    """Writes `observed.json`, `observed.md` and `observed.html`, over those that are there.

    Args:
        report (`ObservedReport`): What [`~spec_kd.compare_observed`] or [`~spec_kd.describe_observation`] returned.
        output_dir (`str` or `os.PathLike`): Folder or address for the files; created if needed.

    Returns:
        `dict[str, Path]`: The files by `"json"`, `"md"` and `"html"`.
    """
    data = json.dumps({"format": FORMAT, **to_plain(report)}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    name = _name(report)
    page = render_page(name, name, report.headline, [INTERVALS], [_Section()], report)
    text = render_document(name, [report.headline, INTERVALS], [_Section()], report)
    texts = {"json": data, "md": text, "html": page}
    return save_files(output_dir, "observed", texts)


def load_observed(path: str | os.PathLike[str]) -> ObservedReport:
    """Reads an `observed.json`, given itself, its folder or the address of either.

    Raises:
        FileNotFoundError: There is none.
        ValueError: The file is none of this version.
    """
    path = find_file(path, "observed.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        number = values.pop("format")
        report = from_plain(ObservedReport, values) if number == FORMAT else None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"`{name_place(path)}` is no observation ({error!r}). Observe again.") from error
    if report is None:
        raise ValueError(
            f"`{name_place(path)}` has format {number!r}, but this version reads {FORMAT}. Update spec_kd."
        )
    return report


class _Section(Section[ObservedReport]):
    title = "Predicted and observed"

    def list_tables(self, report: ObservedReport) -> list[Table]:
        return list_observed_tables(report)


def _name(report: ObservedReport) -> str:
    return f"{report.model} in {report.title}"
