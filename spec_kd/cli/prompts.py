"""`spec-kd prompts KIND`: prompt sets from what there is."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from spec_kd.cli.choices import tell_choices
from spec_kd.cli.mix import MixArguments, mix
from spec_kd.cli.parsing import Parser
from spec_kd.cli.prompt_sets import (
    PRODUCTS,
    check_test_fraction,
    describe_saved,
    hold_out,
    leave_out_leaks,
    save_prompts,
)
from spec_kd.cli.rows import check_exists, load_rows
from spec_kd.cli.steps import Workspace, list_options
from spec_kd.open_types import JsonObject
from spec_kd.options import suggest

if TYPE_CHECKING:
    from spec_kd.prompts.curated import CuratedOptions
    from spec_kd.prompts.logs.options import LogOptions

KINDS = {
    "logs": "Makes a prompt set of what users asked the target, from its logs.",
    "curated": "Makes a prompt set of the questions of a dataset, without its answers.",
    "mix": "Mixes several prompt sets, and writes a report.",
}


@dataclass
class LogArguments:
    r"""
    Options of [`~spec_kd.load_query_logs`].

    Args:
        paths (`list[str]`): Files, globs and folders.
        output_dir (`str`): For `train.arrow`, `test.arrow` and a report.
        tokenizer (`str`, *optional*): The target, whose tokens `min_tokens` and `max_tokens` count.
        others: As of [`~spec_kd.load_query_logs`].
    """

    _argument_group_name = "logs"

    paths: list[str] = field(metadata={"help": "Logs: files, globs and folders.", "aliases": ["--logs"]})
    output_dir: str = field(metadata={"help": "Folder for train.arrow, test.arrow and a report."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "The target: its chat template must take every prompt, its tokens are counted."}
    )
    format: str = field(
        default="auto",
        metadata={"help": "'openai', 'vllm', 'litellm', 'sharegpt', 'trl' or 'text'; 'auto' recognizes each record."},
    )
    turns: str = field(
        default="auto", metadata={"help": "'all' turns of the assistant or the 'last' one; 'auto' goes by the record."}
    )
    min_tokens: int | None = field(default=None, metadata={"help": "Fewest tokens of a rendered prompt."})
    max_tokens: int | None = field(default=None, metadata={"help": "Most tokens of a rendered prompt."})
    near_duplicate_threshold: float | None = field(
        default=0.8, metadata={"help": "Similarity from which on prompts are the same; none keeps near-duplicates."}
    )
    max_per_user: int | None = field(default=None, metadata={"help": "Most prompts of one user."})
    max_per_day: int | None = field(default=None, metadata={"help": "Most prompts of one day (UTC)."})
    test_fraction: float = field(default=0.05, metadata={"help": "Share of the prompts for testing."})
    split_by: str = field(default="hash", metadata={"help": "Test conversations by 'hash', or the last by 'time'."})
    redact: list[str] = field(default_factory=list, metadata={"help": "What to replace: email, phone, key, card."})
    on_error: str = field(default="skip", metadata={"help": "'skip' (and count) malformed records, or 'raise'."})
    seed: int = field(default=0, metadata={"help": "Of the split by hash."})

    def build_options(self) -> "LogOptions":
        """The options of the function; raises `ValueError` for one out of its range."""
        from spec_kd.prompts.logs.options import LogOptions

        options = LogOptions(**{one.name: getattr(self, one.name) for one in fields(LogOptions)})
        options.check_tokenizer(self.tokenizer)
        return options


def read_logs(arguments: LogArguments, workspace: Workspace) -> JsonObject:
    """The step: prompts of logs in `output_dir`."""
    from spec_kd.prompts.logs.files import find_files

    options = arguments.build_options()
    files, _ = find_files(arguments.paths, Path(arguments.output_dir))
    check_exists("tokenizer", arguments.tokenizer)
    inputs = {
        "logs": workspace.fingerprints.of_files(files),
        "tokenizer": workspace.fingerprints.of_model(arguments.tokenizer),
        "options": list_options(arguments, ("paths", "output_dir", "tokenizer")),
    }

    def work() -> JsonObject:
        from spec_kd.loading import load_tokenizer
        from spec_kd.prompts.logs.query_logs import load_query_logs

        tokenizer = load_tokenizer(arguments.tokenizer) if arguments.tokenizer is not None else None
        logs = load_query_logs(arguments.paths, arguments.output_dir, options, processing_class=tokenizer)
        report = logs.report.to_dict()
        names = ("records", "malformed", "left_out", "reasons", "notes", "ignored_files", "dropped", "with_completion")
        counts = {name: report[name] for name in names}
        return {**describe_saved(arguments.output_dir, logs.train, logs.test), **counts}

    return workspace.do(arguments.output_dir, "prompts logs", inputs, PRODUCTS, work)


@dataclass
class CuratedArguments:
    r"""
    Options of [`~spec_kd.load_curated_prompts`].

    Args:
        dataset (`str`): Name on the Hub, file or folder.
        output_dir (`str`): For `train.arrow` and `test.arrow`.
        test_split (`str`, *optional*): Split that the test prompts are from; by default some of `split` are held out.
        test_fraction (`float`, *optional*, defaults to `0.05`): Share of prompts held out, the same texts always.
        others: As of [`~spec_kd.load_curated_prompts`].
    """

    _argument_group_name = "curated set"

    dataset: str = field(metadata={"help": "Name on the Hub, file or folder."})
    output_dir: str = field(metadata={"help": "Folder for train.arrow and test.arrow."})
    split: str = field(default="train", metadata={"help": "Which part of it to train on."})
    test_split: str | None = field(
        default=None, metadata={"help": "Which part to test on; by default test_fraction of the other is held out."}
    )
    test_fraction: float = field(default=0.05, metadata={"help": "Share of the prompts held out, without test_split."})
    config_name: str | None = field(default=None, metadata={"help": "Which configuration of a set on the Hub."})
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column with the question: prompt, messages or conversations by default."}
    )
    question_template: list[str] | None = field(
        default=None, metadata={"help": "Makes the question of columns, such as '{question} {options[0]}'; or several."}
    )
    system_prompt: str | None = field(default=None, metadata={"help": "Put before the question."})
    tools_column: str | None = field(default=None, metadata={"help": "Column with schemas of tools."})
    turns: str = field(
        default="last", metadata={"help": "Of messages, the prompt before the 'last' answer, the 'first' or 'all'."}
    )
    keep_completions: bool = field(
        default=False, metadata={"help": "Whether the set's answers are kept as completion."}
    )
    completion_column: str | None = field(
        default=None, metadata={"help": "Column with the answer, with keep_completions."}
    )
    seed: int = field(default=0, metadata={"help": "Of the choice among templates and of what is held out."})

    def __post_init__(self) -> None:
        check_test_fraction(self.test_fraction)

    def build_options(self) -> "CuratedOptions":
        """The options of the function; raises `ValueError` for those that are wrong whatever the dataset is."""
        from spec_kd.prompts.curated import CuratedOptions

        return CuratedOptions(**{one.name: getattr(self, one.name) for one in fields(CuratedOptions)})


def read_curated(arguments: CuratedArguments, workspace: Workspace) -> JsonObject:
    """The step: prompts of a curated set in `output_dir`."""
    options = arguments.build_options()
    check_exists("dataset", arguments.dataset)
    inputs = {
        "dataset": {arguments.dataset: workspace.fingerprints.of_data(arguments.dataset)},
        "options": list_options(arguments, ("dataset", "output_dir")),
    }

    def work() -> JsonObject:
        from spec_kd.prompts.curated import load_curated_prompts

        rows = load_curated_prompts(arguments.dataset, options)
        if arguments.test_split is not None:
            test = load_curated_prompts(arguments.dataset, options, split=arguments.test_split)
            return save_prompts(arguments.output_dir, leave_out_leaks(rows, test), test)
        return save_prompts(arguments.output_dir, *hold_out(rows, arguments.test_fraction, arguments.seed))

    return workspace.do(arguments.output_dir, "prompts curated", inputs, PRODUCTS, work)


QueryCall = LogArguments | CuratedArguments | MixArguments


def build_parser(kind: str) -> Parser:
    """The options of a kind; raises `ValueError` for another one."""
    if kind not in KINDS:
        raise ValueError(f"there is no kind of prompts {kind!r}.{suggest(kind, KINDS)}")
    description = f"{KINDS[kind]} The result is train.arrow and test.arrow in one folder."
    arguments, common = {
        "logs": (LogArguments, ("paths", "output_dir", "tokenizer", "redact", "test_fraction")),
        "curated": (CuratedArguments, ("dataset", "output_dir", "prompt_column", "test_fraction")),
        "mix": (MixArguments, ("parts", "output_dir", "weights", "num_prompts")),
    }[kind]
    return Parser(f"prompts {kind}", description, {kind: arguments}, common)


def parse(argv: Sequence[str]) -> QueryCall:
    """The command line; the kind comes first."""
    if not argv or argv[0] in ("-h", "--help"):
        raise SystemExit(tell_choices("prompts", "KIND", KINDS, is_asked=bool(argv)))
    (arguments,) = build_parser(argv[0]).parse(argv[1:])
    return arguments


def run(arguments: QueryCall) -> JsonObject:
    """The command."""
    if isinstance(arguments, LogArguments):
        return read_logs(arguments, Workspace())
    return (mix if isinstance(arguments, MixArguments) else read_curated)(arguments, Workspace())


def check_part(arguments: LogArguments | CuratedArguments) -> None:
    """Checks the options and the sources of a part of the prompts.

    Raises:
        ValueError: For an option out of its range, or columns that a local dataset does not have.
        OSError: For sources that are not there.
    """
    if isinstance(arguments, LogArguments):
        from spec_kd.prompts.logs.files import find_files

        arguments.build_options()
        find_files(arguments.paths, Path(arguments.output_dir))
        return
    options = arguments.build_options()
    check_exists("dataset", arguments.dataset)
    if os.path.exists(arguments.dataset):
        options.find_columns(load_rows(arguments.dataset, arguments.split).column_names)
