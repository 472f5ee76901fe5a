"""`spec-kd prompts curated`: a prompt set of the questions of a dataset."""

import os

import spec_kd
from spec_kd.addresses import is_address
from spec_kd.cli.arguments import CuratedFiles
from spec_kd.cli.paths import check_exists
from spec_kd.cli.rows import PROMPT_FILES, leave_out_leaks, load_rows, save_prompts
from spec_kd.cli.steps import Workspace, list_options
from spec_kd.open_types import JsonObject
from spec_kd.prompts.splitting import split_prompts


def check(files: CuratedFiles, options: spec_kd.CuratedOptions) -> None:
    """Checks the dataset and its columns.

    Raises:
        ValueError: A local dataset cannot be read, or does not have a column.
        OSError: The dataset does not exist.
    """
    check_exists("dataset", files.dataset)
    if is_address(files.dataset) or os.path.exists(files.dataset):
        options.find_columns(load_rows(files.dataset, options.split).column_names)


def run(files: CuratedFiles, options: spec_kd.CuratedOptions, workspace: Workspace) -> JsonObject:
    """Writes the prompts of a dataset to `output_dir`; raises as [`check`]."""
    check_exists("dataset", files.dataset)
    inputs = {
        "dataset": {files.dataset: workspace.fingerprints.of_data(files.dataset)},
        "options": list_options(files, ("dataset", "output_dir")) | list_options(options),
    }

    def work() -> JsonObject:
        rows = spec_kd.load_curated_prompts(files.dataset, options)
        if files.test_split is None:
            return save_prompts(files.output_dir, *split_prompts(rows, files.test_fraction, options.seed))
        test = spec_kd.load_curated_prompts(files.dataset, options, split=files.test_split)
        return save_prompts(files.output_dir, leave_out_leaks(rows, test), test)

    return workspace.do(files.output_dir, "prompts curated", inputs, PROMPT_FILES, work)
