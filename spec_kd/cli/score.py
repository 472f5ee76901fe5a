"""`spec-kd score`: the target reads text that it did not write, and leaves a teacher signal."""

from typing import cast

import spec_kd
from spec_kd.cli.arguments import CorpusFiles, TargetArguments
from spec_kd.cli.paths import check_exists
from spec_kd.cli.respond import CHANGE_NO_ROW, PRODUCTS, share_on_cpu
from spec_kd.cli.rows import load_rows, take_first
from spec_kd.cli.steps import Workspace, list_options
from spec_kd.cli.target import check_target, list_inputs, loaded_target
from spec_kd.open_types import JsonObject

NOT_INPUTS = ("corpus", "output_dir")  # the first by its content

ScoreCall = tuple[CorpusFiles, spec_kd.ScoreOptions, spec_kd.RayOptions, TargetArguments]


def run(
    files: CorpusFiles,
    options: spec_kd.ScoreOptions,
    workers: spec_kd.RayOptions,
    target: TargetArguments,
    workspace: Workspace,
) -> JsonObject:
    """Writes the corpus with its teacher signal to `output_dir/responses.parquet`.

    Raises:
        ValueError: The target or the corpus cannot be read, or the engine cannot do what is asked.
        OSError: The target or the corpus does not exist.
        ImportError: The engine is not installed.
    """
    check_target(target, workers)
    check_exists("corpus", files.corpus)
    inputs = {
        "target": list_inputs(target, workspace.fingerprints),
        "corpus": workspace.fingerprints.of_data(files.corpus),
        "options": list_options(files, NOT_INPUTS) | list_options(options, CHANGE_NO_ROW),
    }

    def work() -> JsonObject:
        share_on_cpu()
        corpus = take_first(load_rows(files.corpus, files.split, option="corpus"), files.num_rows)
        with loaded_target(target, workers) as (engine, processing_class):
            rows = spec_kd.tokenize_corpus(
                corpus, processing_class, max_length=files.max_length, text_field=files.text_field
            )
            scored = spec_kd.score_completions(
                engine, rows, options, processing_class=processing_class, output_dir=files.output_dir
            )
        return {
            "path": f"{files.output_dir}/{PRODUCTS[0]}",
            "num_texts": len(corpus),
            "num_rows": len(scored),
            "num_tokens": sum(map(len, cast(list[list[int]], scored["completion_ids"]))),
        }

    return workspace.do(files.output_dir, "score", inputs, PRODUCTS, work)
