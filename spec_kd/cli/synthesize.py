"""`spec-kd synthesize`: a prompt set that the target writes itself."""

from collections.abc import Sequence
from typing import cast

import spec_kd
from spec_kd.cli.arguments import SynthesisFiles, TargetArguments
from spec_kd.cli.paths import check_exists
from spec_kd.cli.rows import PROMPT_FILES, load_rows, save_prompts
from spec_kd.cli.steps import Workspace, list_options
from spec_kd.cli.target import check_target, list_inputs, load_processing_class, load_target
from spec_kd.data.arrow_padding import iterate_rows
from spec_kd.engines.base import check_untruncated
from spec_kd.open_types import JsonObject, JsonValue
from spec_kd.prompts.splitting import split_prompts
from spec_kd.prompts.synthesis.pre_query import derive_pre_queries
from spec_kd.sampling.options import SamplingOptions

CONTINUES = ("num_queries", "max_asked", "test_fraction")


def check(
    files: SynthesisFiles,
    options: spec_kd.SynthesisOptions,
    text_filter: spec_kd.TextFilter,
    target: TargetArguments,
) -> None:
    """Checks a synthesis without weights; `test_sets` of a recipe do not exist yet.

    Raises:
        ValueError: The chat template does not show what it is given, or the engine cannot sample so.
        OSError: The target does not exist.
        ImportError: The engine is not installed.
    """
    check_target(target)
    derive_pre_queries(options, load_processing_class(target))
    if target.engine != "transformers":
        for temperature, top_p in options.samplings:
            check_untruncated(SamplingOptions(options.max_new_tokens, temperature, top_p=top_p), target.engine)


def run(
    files: SynthesisFiles,
    options: spec_kd.SynthesisOptions,
    text_filter: spec_kd.TextFilter,
    target: TargetArguments,
    workspace: Workspace,
) -> JsonObject:
    """Writes prompts of the target to `output_dir`, and reports how many were dropped and why.

    Raises:
        ValueError: As [`check`], or no prompt was kept.
        OSError: The target or a test set does not exist.
        ImportError: The engine is not installed.
    """
    check(files, options, text_filter, target)
    test_sets = files.test_sets or []
    for source in test_sets:
        check_exists("test_sets", source)
    sources = [*test_sets, *([cast(str, options.tool_catalog)] if options.tool_catalog else [])]
    chosen = list_options(options, ("tool_catalog",)) | list_options(text_filter)
    inputs = {
        "target": list_inputs(target, workspace.fingerprints),
        "sources": [workspace.fingerprints.of_data(source) for source in sources],
        "options": list_options(files, ("output_dir", "test_sets")) | chosen,
    }

    def work() -> JsonObject:
        model, processing_class = load_target(target)
        queries = spec_kd.synthesize_queries(
            model,
            options,
            processing_class=processing_class,
            text_filter=text_filter,
            test_set=load_conversations(test_sets) or None,
            output_dir=files.output_dir,
        )
        report: JsonObject = queries.report.to_dict()
        if not len(queries.dataset):
            reasons = ", ".join(f"{reason}: {count}" for reason, count in report["dropped"].items() if count)
            raise ValueError(
                f"None of {report['asked']} queries was kept ({reasons}). Look at the filters and the target."
            )
        saved = save_prompts(files.output_dir, *split_prompts(queries.dataset, files.test_fraction, options.seed))
        return {**saved, "yield": report}

    return workspace.do(files.output_dir, "synthesize", inputs, PROMPT_FILES, work, CONTINUES)


def load_conversations(sources: Sequence[str]) -> list[JsonValue]:
    """Loads the prompts of several sets, as lists of messages."""
    sets = [load_rows(source, "test", option="test_sets", allow_empty=True) for source in sources]
    prompts = [row["prompt"] for rows in sets for row in iterate_rows(rows)]
    return [[{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt for prompt in prompts]
