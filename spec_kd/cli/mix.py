"""`spec-kd prompts mix`: prompt sets become one, for training and for testing."""

import itertools
import json
import logging
from dataclasses import replace

import spec_kd
from spec_kd.cli.arguments import MixFiles
from spec_kd.cli.paths import check_exists
from spec_kd.cli.rows import PROMPT_FILES, SPLITS, leave_out_leaks, load_prompts, save_prompts
from spec_kd.cli.steps import Workspace, list_options
from spec_kd.copies import open_folder
from spec_kd.files import write_text
from spec_kd.loading import load_tokenizer
from spec_kd.open_types import JsonObject

REPORT = ("prompts.json", "prompts.md", "prompts.png", "mix.json")

logger = logging.getLogger(__name__)


def check(files: MixFiles, options: spec_kd.MixOptions) -> None:
    """Raises `ValueError` for weights of other parts."""
    if options.weights is not None and set(options.weights) != set(files.parts):
        raise ValueError(f"`weights` names {', '.join(options.weights)}, but the parts are {', '.join(files.parts)}.")


def run(files: MixFiles, options: spec_kd.MixOptions, workspace: Workspace) -> JsonObject:
    """Writes `train.arrow` and `test.arrow` of all parts to `output_dir`, and a report.

    A training prompt that is a test prompt of any part is left out.

    Raises:
        ValueError: As [`check`], or a part cannot be read.
        OSError: A part or the tokenizer does not exist.
    """
    check(files, options)
    for name, folder in files.parts.items():
        check_exists(f"parts: {name}", folder)
    check_exists("tokenizer", files.tokenizer)
    fingerprints = workspace.fingerprints
    inputs = {
        "parts": {
            name: {split: fingerprints.of_data(f"{folder}/{split}.arrow") for split in SPLITS}
            for name, folder in files.parts.items()
        },
        "tokenizer": fingerprints.of_model(files.tokenizer),
        "options": list_options(options),
    }

    def work() -> JsonObject:
        train, test = ({name: load_prompts(folder, split) for name, folder in files.parts.items()} for split in SPLITS)
        weights = options.weights or dict.fromkeys(test, 1.0)
        test = {name: rows for name, rows in test.items() if len(rows) and weights[name] > 0}
        if not test:
            logger.warning("The mix has no test prompts: no part that is in it has any.")
        for name, rows in itertools.product(train, test.values()):
            train[name] = leave_out_leaks(train[name], rows, name)
        mixed = spec_kd.mix_prompts(train, options)
        given = options.weights and {name: weights[name] for name in test}
        held_out = spec_kd.mix_prompts(test, replace(options, weights=given, num_prompts=None)) if test else None
        test_rows = None if held_out is None else held_out.dataset
        saved = save_prompts(
            files.output_dir, mixed.dataset, mixed.dataset.select([]) if test_rows is None else test_rows
        )
        tokenizer = load_tokenizer(files.tokenizer) if files.tokenizer is not None else None
        report = spec_kd.describe_prompts(mixed.dataset, tokenizer, other=test_rows if test else None)
        report.save(files.output_dir)
        shares: JsonObject = {"train": mixed.report.to_dict(), "test": held_out and held_out.report.to_dict()}
        write_text(open_folder(files.output_dir) / REPORT[-1], json.dumps(shares, indent=2) + "\n")
        described: JsonObject = report.to_dict()
        return {
            **saved,
            "rows_by_part": {part["name"]: part["rows"] for part in shares["train"]["parts"]},
            "num_near_duplicates": described["num_near_duplicates"],
            "num_train_like_test": described["overlap"]["near"] if test else 0,
        }

    return workspace.do(files.output_dir, "prompts mix", inputs, (*PROMPT_FILES, *REPORT), work)
