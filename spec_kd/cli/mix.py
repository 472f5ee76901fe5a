"""`spec-kd prompts mix`: prompt sets become one, for training and for testing."""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path

from spec_kd.cli.parsing import Parser
from spec_kd.cli.prompt_sets import PRODUCTS, SPLITS, leave_out_leaks, load_prompts, save_prompts
from spec_kd.cli.prompts import KINDS
from spec_kd.cli.rows import check_exists
from spec_kd.cli.steps import Workspace, list_options
from spec_kd.files import write_text
from spec_kd.open_types import JsonObject
from spec_kd.options import document_options, option
from spec_kd.prompts.mixing import MixOptions, mix_prompts

COMMON = ("parts", "output_dir", "weights", "num_prompts")
REPORT = ("prompts.json", "prompts.md", "prompts.png", "mix.json")

logger = logging.getLogger(__name__)


@document_options
@dataclass(frozen=True)
class MixFiles:
    """What `spec-kd prompts mix` reads and writes."""

    parts: dict[str, str] = option("Prompt sets, each a folder of another command for prompts, with a name.")
    output_dir: str = option("Folder for train.arrow, test.arrow and a report of them.")
    tokenizer: str | None = option(
        "Target, whose tokens the report counts. By default the report has no numbers of tokens.", None
    )


def build_parser() -> Parser:
    """The options of the command."""
    return Parser("prompts mix", KINDS["mix"], {"files": MixFiles, "mix": MixOptions}, COMMON)


def check(files: MixFiles, options: MixOptions) -> None:
    """Raises `ValueError` for weights of other parts."""
    if options.weights is not None and set(options.weights) != set(files.parts):
        raise ValueError(f"`weights` names {', '.join(options.weights)}, but the parts are {', '.join(files.parts)}.")


def run(files: MixFiles, options: MixOptions, workspace: Workspace | None = None) -> JsonObject:
    """Writes `train.arrow` and `test.arrow` of all parts to `output_dir`, and a report.

    A training prompt that is a test prompt of any part is left out.

    Raises:
        ValueError: As [`check`], or a part cannot be read.
        OSError: A part or the tokenizer does not exist.
    """
    workspace = workspace or Workspace()
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
        from spec_kd.loading import load_tokenizer
        from spec_kd.prompts.description import describe_prompts

        train, test = ({name: load_prompts(folder, split) for name, folder in files.parts.items()} for split in SPLITS)
        weights = options.weights or dict.fromkeys(test, 1.0)
        test = {name: rows for name, rows in test.items() if len(rows) and weights[name] > 0}
        if not test:
            logger.warning("The mix has no test prompts: no part that is in it has any.")
        for name in train:
            for rows in test.values():
                train[name] = leave_out_leaks(train[name], rows, name)
        mixed, test_mixed = mix_prompts(train, options), None
        if test:
            given = options.weights and {name: weights[name] for name in test}
            test_mixed = mix_prompts(test, replace(options, weights=given, num_prompts=None))
        rows = {"train": mixed.dataset, "test": mixed.dataset.select([]) if test_mixed is None else test_mixed.dataset}
        saved = save_prompts(files.output_dir, rows["train"], rows["test"])
        tokenizer = load_tokenizer(files.tokenizer) if files.tokenizer is not None else None
        report = describe_prompts(rows["train"], tokenizer, other=rows["test"] if test else None)
        report.save(files.output_dir)
        shares: JsonObject = {"train": mixed.report.to_dict(), "test": test_mixed and test_mixed.report.to_dict()}
        write_text(Path(files.output_dir, REPORT[-1]), json.dumps(shares, indent=2) + "\n")
        described: JsonObject = report.to_dict()
        return {
            **saved,
            "rows_by_part": {part["name"]: part["rows"] for part in shares["train"]["parts"]},
            "num_near_duplicates": described["num_near_duplicates"],
            "num_train_like_test": described["overlap"]["near"] if test else 0,
        }

    return workspace.do(files.output_dir, "prompts mix", inputs, (*PRODUCTS, *REPORT), work)
