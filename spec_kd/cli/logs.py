"""`spec-kd prompts logs`: a prompt set of what users asked the target."""

import spec_kd
from spec_kd.cli.arguments import LogFiles
from spec_kd.cli.paths import check_exists
from spec_kd.cli.rows import PROMPT_FILES, describe_saved
from spec_kd.cli.steps import Workspace, list_options
from spec_kd.copies import open_folder
from spec_kd.loading import load_tokenizer
from spec_kd.open_types import JsonObject
from spec_kd.prompts.logs.files import find_files

COUNTS = ("records", "malformed", "left_out", "reasons", "notes", "ignored_files", "dropped", "with_completion")


def check(files: LogFiles, options: spec_kd.LogOptions, scale: spec_kd.ScaleOptions) -> None:
    """Checks what can be checked without reading the logs.

    Raises:
        ValueError: Limits of tokens are given without a tokenizer, or an option that no executor can follow.
        OSError: A path matches no file, or the tokenizer does not exist.
    """
    options.check_tokenizer(files.tokenizer)
    scale.check(options)
    check_exists("tokenizer", files.tokenizer)
    find_files(files.paths, open_folder(files.output_dir))


def run(files: LogFiles, options: spec_kd.LogOptions, scale: spec_kd.ScaleOptions, workspace: Workspace) -> JsonObject:
    """Writes the prompts of logs to `output_dir`; raises as [`check`], and for logs without any prompt."""
    check(files, options, scale)
    paths, _ = find_files(files.paths, open_folder(files.output_dir))
    inputs = {
        "logs": workspace.fingerprints.of_files(paths),
        "tokenizer": workspace.fingerprints.of_model(files.tokenizer),
        "options": list_options(options),
        **({} if scale.executor is None else {"near_duplicates": "compared exactly"}),
    }

    def work() -> JsonObject:
        tokenizer = load_tokenizer(files.tokenizer) if files.tokenizer is not None else None
        logs = spec_kd.load_query_logs(files.paths, files.output_dir, options, processing_class=tokenizer, scale=scale)
        report = logs.report.to_dict()
        counts = {name: report[name] for name in COUNTS}
        return {**describe_saved(files.output_dir, logs.train, logs.test), **counts}

    return workspace.do(files.output_dir, "prompts logs", inputs, PROMPT_FILES, work)
