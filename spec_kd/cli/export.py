"""`spec-kd export`: saves a draft as servers load it, with `serving.json` and GGUF files where asked."""

from spec_kd.cli.paths import check_exists
from spec_kd.cli.serving_arguments import ExportFiles
from spec_kd.cli.steps import tell
from spec_kd.evaluation import load_report
from spec_kd.hub import ExportOptions, ServingFile, export_draft
from spec_kd.open_types import JsonObject


def run(files: ExportFiles, options: ExportOptions) -> JsonObject:
    """Writes the draft to `output_dir`; returns what `serving.json` says of it, if it is written.

    Raises:
        ValueError: A model or the report cannot be read, or an engine cannot serve the draft.
        OSError: A model or the report does not exist, or there is no room for the files.
        GGUFError: A tool of llama.cpp failed.
    """
    for name in ("draft", "target", "report"):
        check_exists(name, getattr(files, name))
    folder = export_draft(
        files.draft,
        files.output_dir,
        options,
        target=files.target,
        report=None if files.report is None else load_report(files.report),
    )
    tell(f"export: the draft is in {folder}")
    result: JsonObject = {"output_dir": str(folder)}
    if options.serving_engines:
        serving = ServingFile.read(folder)
        result |= {
            "commands": {name: served.command for name, served in serving.engines.items()},
            "findings": [found for served in serving.engines.values() for found in served.findings],
            "files": list(serving.files),
        }
    return result
