"""`spec-kd prompts logs`: a prompt set of what users asked the target."""

from dataclasses import dataclass
from pathlib import Path

from spec_kd.cli.parsing import Parser
from spec_kd.cli.prompt_sets import PRODUCTS, describe_saved
from spec_kd.cli.prompts import KINDS
from spec_kd.cli.rows import check_exists
from spec_kd.cli.steps import Workspace, list_options
from spec_kd.open_types import JsonObject
from spec_kd.options import document_options, option
from spec_kd.prompts.logs.options import LogOptions

COMMON = ("paths", "output_dir", "tokenizer", "redact", "test_fraction")
COUNTS = ("records", "malformed", "left_out", "reasons", "notes", "ignored_files", "dropped", "with_completion")


@document_options
@dataclass(frozen=True)
class LogFiles:
    """What `spec-kd prompts logs` reads and writes."""

    paths: list[str] = option("Logs: files, globs and folders.", aliases=("--logs",))
    output_dir: str = option("Folder for train.arrow, test.arrow and a report.")
    tokenizer: str | None = option(
        "Target, whose chat template must accept every prompt and whose tokens are counted. By default prompts are not "
        "rendered.",
        None,
    )


def build_parser() -> Parser:
    """The options of the command."""
    return Parser("prompts logs", KINDS["logs"], {"files": LogFiles, "logs": LogOptions}, COMMON)


def check(files: LogFiles, options: LogOptions) -> None:
    """Checks what can be checked without reading the logs.

    Raises:
        ValueError: Limits of tokens are given without a tokenizer.
        OSError: A path matches no file, or the tokenizer does not exist.
    """
    from spec_kd.prompts.logs.files import find_files

    options.check_tokenizer(files.tokenizer)
    check_exists("tokenizer", files.tokenizer)
    find_files(files.paths, Path(files.output_dir))


def run(files: LogFiles, options: LogOptions, workspace: Workspace | None = None) -> JsonObject:
    """Writes the prompts of logs to `output_dir`; raises as [`check`], and for logs without any prompt."""
    from spec_kd.prompts.logs.files import find_files

    workspace = workspace or Workspace()
    check(files, options)
    paths, _ = find_files(files.paths, Path(files.output_dir))
    inputs = {
        "logs": workspace.fingerprints.of_files(paths),
        "tokenizer": workspace.fingerprints.of_model(files.tokenizer),
        "options": list_options(options),
    }

    def work() -> JsonObject:
        from spec_kd.loading import load_tokenizer
        from spec_kd.prompts.logs.query_logs import load_query_logs

        tokenizer = load_tokenizer(files.tokenizer) if files.tokenizer is not None else None
        logs = load_query_logs(files.paths, files.output_dir, options, processing_class=tokenizer)
        report = logs.report.to_dict()
        return {
            **describe_saved(files.output_dir, logs.train, logs.test),
            **{name: report[name] for name in COUNTS},
        }

    return workspace.do(files.output_dir, "prompts logs", inputs, PRODUCTS, work)
