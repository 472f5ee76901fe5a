"""`spec-kd prompts mix`: prompt sets become one, for training and for testing."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from spec_kd.checks import check_int, check_number
from spec_kd.cli.prompt_sets import PRODUCTS, SPLITS, leave_out_leaks, load_prompts, save_prompts
from spec_kd.cli.rows import check_exists
from spec_kd.cli.steps import Workspace, list_options
from spec_kd.open_types import JsonObject

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

REPORT = ("prompts.json", "prompts.md", "prompts.png", "mix.json")


@dataclass
class MixArguments:
    r"""
    Options of [`~spec_kd.prompts.mix_prompts`].

    Args:
        parts (`dict[str, str]`): Folders by name, as the other commands for prompts leave them.
        output_dir (`str`): For `train.arrow`, `test.arrow` and a report of them.
        weights (`dict`, *optional*): By name of the part.
        tokenizer (`str`, *optional*): The target, to count tokens for the report.
        others: As of [`~spec_kd.prompts.mix_prompts`]; `num_prompts` is of the training prompts.
    """

    _argument_group_name = "mix"

    parts: dict[str, str] = field(metadata={"help": "Prompt sets as NAME=FOLDER, of the other commands for prompts."})
    output_dir: str = field(metadata={"help": "Folder for train.arrow, test.arrow and a report of them."})
    weights: dict[str, float] | None = field(
        default=None, metadata={"help": "How much of each part, such as logs=2 synthetic=1; all by default."}
    )
    num_prompts: int | None = field(
        default=None, metadata={"help": "Training prompts in the mix; as many as the weights allow by default."}
    )
    order: str = field(
        default="shuffled", metadata={"help": "'shuffled', 'curriculum' (part by part) or a column to sort by."}
    )
    seed: int = field(default=0, metadata={"help": "Of the choice of rows and of their order."})
    tokenizer: str | None = field(default=None, metadata={"help": "The target, to count tokens for the report."})

    def __post_init__(self) -> None:
        for name, weight in (self.weights or {}).items():
            check_number(f"weights: {name}", weight, 0)
        check_int("num_prompts", self.num_prompts, is_optional=True)
        check_int("seed", self.seed, 0)
        if self.weights is not None and set(self.weights) != set(self.parts):
            raise ValueError(f"`weights` names {', '.join(self.weights)}, but the parts are {', '.join(self.parts)}.")


def mix(arguments: MixArguments, workspace: Workspace) -> JsonObject:
    """The step: `train.arrow` and `test.arrow` of all parts in `output_dir`, and a report.

    A training prompt that is a test prompt of any part is left out.
    """
    parts = arguments.parts
    for name, folder in parts.items():
        check_exists(f"parts: {name}", folder)
    check_exists("tokenizer", arguments.tokenizer)
    fingerprints = workspace.fingerprints
    inputs = {
        "parts": {
            name: {split: fingerprints.of_data(f"{folder}/{split}.arrow") for split in SPLITS}
            for name, folder in parts.items()
        },
        "tokenizer": fingerprints.of_model(arguments.tokenizer),
        "options": list_options(arguments, ("parts", "output_dir", "tokenizer")),
    }

    def work() -> JsonObject:
        import json
        from pathlib import Path

        from spec_kd.files import write_text
        from spec_kd.loading import load_tokenizer
        from spec_kd.prompts.report import describe_prompts

        sets = {split: {name: load_prompts(folder, split) for name, folder in parts.items()} for split in SPLITS}
        tests = {name: rows for name, rows in sets["test"].items() if len(rows) and is_in(name, arguments.weights)}
        if not tests:
            logger.warning("The mix has no test prompts: no part that is in it has any.")
        for name, rows in sets["train"].items():
            for test in tests.values():
                rows = leave_out_leaks(rows, test, name)
            sets["train"][name] = rows
        mixes = {"train": mix_parts(sets["train"], arguments.weights, arguments.num_prompts, arguments)}
        weights = {name: arguments.weights[name] for name in tests} if arguments.weights is not None else None
        mixes["test"] = mix_parts(tests, weights, None, arguments) if tests else None
        train = mixes["train"].dataset
        test = mixes["test"].dataset if tests else train.select([])
        saved = save_prompts(arguments.output_dir, train, test)
        tokenizer = load_tokenizer(arguments.tokenizer) if arguments.tokenizer is not None else None
        report = describe_prompts(train, tokenizer, other=test if tests else None)
        report.save(arguments.output_dir)
        shares = {split: mixed.report.to_dict() if mixed is not None else None for split, mixed in mixes.items()}
        write_text(Path(arguments.output_dir, REPORT[-1]), json.dumps(shares, indent=2) + "\n")
        described = report.to_dict()
        return {
            **saved,
            "rows_by_part": {part["name"]: part["rows"] for part in shares["train"]["parts"]},
            "num_near_duplicates": described["num_near_duplicates"],
            "num_train_like_test": described["overlap"]["near"] if tests else 0,
        }

    return workspace.do(arguments.output_dir, "prompts mix", inputs, (*PRODUCTS, *REPORT), work)


def is_in(name: str, weights: Mapping[str, float] | None) -> bool:
    """Whether a part is in the mix."""
    return weights is None or weights[name] > 0


def mix_parts(
    parts: "dict[str, Dataset]", weights: Mapping[str, float] | None, num_prompts: int | None, arguments: MixArguments
) -> Any:
    """`mix_prompts` with the order and the seed of the command."""
    from spec_kd.prompts.mixing import mix_prompts

    return mix_prompts(parts, weights=weights, num_prompts=num_prompts, order=arguments.order, seed=arguments.seed)
