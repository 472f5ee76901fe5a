"""`spec-kd prompts curated`: a prompt set of the questions of a dataset."""

import os
from dataclasses import dataclass

from spec_kd.cli.parsing import Parser
from spec_kd.cli.prompt_sets import PRODUCTS, PromptSetFiles, leave_out_leaks, save_prompts
from spec_kd.cli.prompts import KINDS
from spec_kd.cli.rows import check_exists, load_rows
from spec_kd.cli.steps import Workspace, list_options
from spec_kd.open_types import JsonObject
from spec_kd.options import document_options, option
from spec_kd.prompts.curated import CuratedOptions

COMMON = ("dataset", "output_dir", "prompt_column", "question_template", "test_fraction")


@document_options
@dataclass(frozen=True, kw_only=True)
class CuratedFiles(PromptSetFiles):
    """What `spec-kd prompts curated` reads and writes."""

    dataset: str = option("Dataset: a file, a folder or a name on the Hub.")
    test_split: str | None = option(
        "Split of the dataset for the test prompts; by default `test_fraction` of `split` is held out.", None
    )


def build_parser() -> Parser:
    """The options of the command."""
    return Parser("prompts curated", KINDS["curated"], {"files": CuratedFiles, "curated": CuratedOptions}, COMMON)


def check(files: CuratedFiles, options: CuratedOptions) -> None:
    """Checks the dataset and its columns.

    Raises:
        ValueError: A local dataset cannot be read, or does not have a column.
        OSError: The dataset does not exist.
    """
    check_exists("dataset", files.dataset)
    if os.path.exists(files.dataset):
        options.find_columns(load_rows(files.dataset, options.split).column_names)


def run(files: CuratedFiles, options: CuratedOptions, workspace: Workspace | None = None) -> JsonObject:
    """Writes the prompts of a dataset to `output_dir`; raises as [`check`]."""
    workspace = workspace or Workspace()
    check_exists("dataset", files.dataset)
    inputs = {
        "dataset": {files.dataset: workspace.fingerprints.of_data(files.dataset)},
        "options": list_options(files, ("dataset", "output_dir")) | list_options(options),
    }

    def work() -> JsonObject:
        from spec_kd.prompts.curated import load_curated_prompts
        from spec_kd.prompts.splitting import split_prompts

        rows = load_curated_prompts(files.dataset, options)
        if files.test_split is None:
            return save_prompts(files.output_dir, *split_prompts(rows, files.test_fraction, options.seed))
        test = load_curated_prompts(files.dataset, options, split=files.test_split)
        return save_prompts(files.output_dir, leave_out_leaks(rows, test), test)

    return workspace.do(files.output_dir, "prompts curated", inputs, PRODUCTS, work)
