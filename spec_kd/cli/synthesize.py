"""`spec-kd synthesize`: a prompt set that the target writes itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from spec_kd.cli.parsing import Parser
from spec_kd.cli.prompt_sets import PRODUCTS, PromptSetFiles, save_prompts
from spec_kd.cli.rows import check_exists, load_rows
from spec_kd.cli.steps import Workspace, list_options
from spec_kd.cli.target import GROUP, TargetArguments
from spec_kd.open_types import JsonObject, JsonValue
from spec_kd.options import document_options, option
from spec_kd.prompts.filters import TextFilter
from spec_kd.prompts.synthesis.options import SynthesisOptions

DESCRIPTION = (
    "Lets an aligned target write what users might ask it (Magpie, arXiv 2406.08464), filters it, and reports what was "
    "dropped and why. A stopped job continues."
)
COMMON = ("target", "num_queries", "output_dir", "system_prompts", "languages", "test_fraction", "engine")
CONTINUES = ("num_queries", "max_asked", "test_fraction")


@document_options
@dataclass(frozen=True, kw_only=True)
class SynthesisFiles(PromptSetFiles):
    """What `spec-kd synthesize` reads and writes."""

    test_sets: list[str] | None = option(
        "Prompts that must not be written again: files, folders or names on the Hub; none by default.", None
    )


SynthesisCall = tuple[SynthesisFiles, SynthesisOptions, TextFilter, TargetArguments]


def build_parser() -> Parser:
    """The options of the command."""
    groups = {"files": SynthesisFiles, "synthesis": SynthesisOptions, "filter": TextFilter, GROUP: TargetArguments}
    return Parser("synthesize", DESCRIPTION, groups, COMMON)


def check(files: SynthesisFiles, options: SynthesisOptions, text_filter: TextFilter, target: TargetArguments) -> None:
    """Checks a synthesis without weights; `test_sets` of a recipe do not exist yet.

    Raises:
        ValueError: The chat template does not show what it is given, or the engine cannot sample so.
        OSError: The target does not exist.
        ImportError: The engine is not installed.
    """
    from spec_kd.engines.base import check_untruncated
    from spec_kd.prompts.synthesis.synthesis import derive_pre_queries
    from spec_kd.sampling.options import SamplingOptions

    target.check()
    derive_pre_queries(options, target.load_processing_class())
    if target.engine != "transformers":
        for temperature, top_p in options.samplings:
            check_untruncated(SamplingOptions(options.max_new_tokens, temperature, top_p=top_p), target.engine)


def run(
    files: SynthesisFiles,
    options: SynthesisOptions,
    text_filter: TextFilter,
    target: TargetArguments,
    workspace: Workspace | None = None,
) -> JsonObject:
    """Writes prompts of the target to `output_dir`, and reports how many were dropped and why.

    Raises:
        ValueError: As [`check`], or no prompt was kept.
        OSError: The target or a test set does not exist.
        ImportError: The engine is not installed.
    """
    workspace = workspace or Workspace()
    check(files, options, text_filter, target)
    test_sets = files.test_sets or []
    for source in test_sets:
        check_exists("test_sets", source)
    sources = [*test_sets, *([cast(str, options.tool_catalog)] if options.tool_catalog else [])]
    chosen = list_options(options, ("tool_catalog",)) | list_options(text_filter)
    inputs = {
        "target": target.list_inputs(workspace.fingerprints),
        "sources": [workspace.fingerprints.of_data(source) for source in sources],
        "options": list_options(files, ("output_dir", "test_sets")) | chosen,
    }

    def work() -> JsonObject:
        from spec_kd.prompts.splitting import split_prompts
        from spec_kd.prompts.synthesis.synthesis import synthesize_queries

        model, processing_class = target.load()
        queries = synthesize_queries(
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

    return workspace.do(files.output_dir, "synthesize", inputs, PRODUCTS, work, CONTINUES)


def load_conversations(sources: Sequence[str]) -> list[JsonValue]:
    """Loads the prompts of several sets, as lists of messages."""
    from spec_kd.data.arrow_padding import iterate_rows

    sets = [load_rows(source, "test", option="test_sets", allow_empty=True) for source in sources]
    prompts = [row["prompt"] for rows in sets for row in iterate_rows(rows)]
    return [[{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt for prompt in prompts]
