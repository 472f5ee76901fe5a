"""Scenario I: prompts that users sent to the target, from its logs."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset
from datasets.fingerprint import Hasher

from spec_kd.open_types import Argument, JsonObject
from spec_kd.options import read_path, resolve_options
from spec_kd.prompts.logs.files import Paths, describe_version, find_files
from spec_kd.prompts.logs.log_reader import LogReader
from spec_kd.prompts.logs.options import LogOptions
from spec_kd.prompts.logs.prompt_store import PromptStore
from spec_kd.prompts.logs.redaction import redact_text
from spec_kd.prompts.logs.report import QueryLogsReport, describe_nothing
from spec_kd.prompts.logs.scale.options import ScaleOptions
from spec_kd.prompts.logs.text_decoding import LogPath
from spec_kd.prompts.splitting import choose_test_rows, warn_of_empty_side

if TYPE_CHECKING:
    from spec_kd.vocabulary import ProcessingClass

VERSION = 3  # raised when earlier results are no longer good enough; a folder with another one is read again

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QueryLogs:
    """The prompts of a log.

    Args:
        train (`Dataset`), test (`Dataset`): Prompts for training and for testing, memory-mapped.
        report (`QueryLogsReport`): What was read, and why prompts were dropped.
    """

    train: Dataset
    test: Dataset
    report: QueryLogsReport


def load_query_logs(
    paths: Paths,
    output_dir: str | Path,
    options: LogOptions | None = None,
    *,
    processing_class: "ProcessingClass | None" = None,
    scale: ScaleOptions | None = None,
    show_progress: bool = True,
    **given: Argument,
) -> QueryLogs:
    """Reads the prompts that users sent to a target from its logs.

    Logs are streamed. Memory holds what is needed to recognize a kept prompt again, and not its text: 800 bytes a
    prompt, 300 without near-duplicates, whose texts wait on disk. The order of the logs is kept, and so is the first
    one of several duplicates.

    The result lies in `output_dir` as `train.arrow`, `test.arrow` and `report.json`; `load_dataset(output_dir)` opens
    it too. The same call on the same files (by name, size and time of change) returns it without reading them again; a
    call with other files or options replaces it. The result is moved to its place when it is complete: a killed run
    leaves only a hidden folder, which the next run removes.

    Args:
        paths (`str`, `Path` or a list of them):
            Files, glob patterns and folders, here or at addresses (`s3://...`): JSON lines, JSON arrays, CSV, TSV,
            Parquet, or plain text with one prompt per line. Files may be numbered by log rotation (`.jsonl.1`). All but
            Parquet may be compressed (`.gz`, `.zst`, `.bz2`, `.xz`, `.lz4`), and in UTF-8, UTF-16 or UTF-32.
        output_dir (`str` or `Path`): Folder or address of the result; created if it does not exist.
        options (`LogOptions`, *optional*): Options of the reading; the defaults of [`LogOptions`] by default.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            The target's. With it every prompt is rendered, and a prompt that its chat template refuses is malformed.
        scale (`ScaleOptions`, *optional*):
            How datatrove shares out the reading of a log that is too large for one process; by default this process
            reads it.
        show_progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.
        given: The fields of [`LogOptions`] as keywords.

    Returns:
        `QueryLogs`: `train`, `test` and `report`. The columns are `prompt` (messages); `tools` (JSON text) and
        `completion` (a list with the assistant's message), both `None` where a record has none, and left out where no
        record has one; `scenario` (`"historical"`), `source` (the file) and `conversation_id`. A completion is left out
        and counted if its `finish_reason` does not say that the target ended it, or if it is not understood. You have
        to know whether the target wrote the completions; [`add_completion_ids`] prepares them for `score_completions`.

    Raises:
        FileNotFoundError: No log is found for a path.
        OSError: An address cannot be reached or written to.
        AddressError: A log at an address cannot be read to its end.
        ValueError: An option is out of its range; a limit of tokens is given without `processing_class`; a file of
            something else lies where the result goes; with `on_error="raise"`, a record is malformed (names its file
            and line); no prompt is kept (names the reasons).
    """
    start = time.monotonic()
    options = resolve_options(LogOptions, options, given)
    options.check_tokenizer(processing_class)
    scale = scale or ScaleOptions()
    scale.check(options)
    store = PromptStore(read_path("output_dir", output_dir, takes_address=True))
    store.check_place()
    files, ignored = find_files(paths, store.output_dir)
    fingerprint = {
        **options.describe(),
        "version": VERSION,
        "files": [[str(path), *describe_version(path)] for path in files],
        "processing_class": None if processing_class is None else _describe_processing_class(processing_class),
    }
    if scale.executor is not None:
        fingerprint["paired"] = "by datatrove"  # near-duplicates, of which it misses others than one process
    if (finished := store.read_finished(fingerprint)) is not None:
        return QueryLogs(*store.open_splits(), QueryLogsReport.from_dict(finished))
    if scale.executor is not None:
        return _load_large_log(files, ignored, store, options, scale, processing_class, fingerprint, show_progress)
    reader = LogReader(files, options, processing_class, show_progress, store.partial)
    store.write(reader.read_prompts())
    if not store.timestamps:
        raise ValueError(describe_nothing(reader.ledger, reader.filter.dropped))
    joined, groups = store.links.join(), store.links.group()
    is_test = choose_test_rows(
        store.links.numbers[groups],
        np.array(store.timestamps),
        options.test_fraction,
        options.split_by,
        options.seed,
    )
    warn_of_empty_side(is_test, groups, options.test_fraction)
    store.split(is_test, joined)
    report = reader.report(
        ignored_files=tuple(redact_text(str(path), options.redact) for path in ignored),
        kept=len(is_test),
        train=int((~is_test).sum()),
        test=int(is_test.sum()),
        conversations=len(np.unique(joined)),
        with_completion=store.num_completions,
        seconds=time.monotonic() - start,
    )
    _warn(report)
    store.finish(fingerprint, report.to_dict())
    return QueryLogs(*store.open_splits(), report)


def _load_large_log(
    files: list[LogPath],
    ignored: list[LogPath],
    store: PromptStore,
    options: LogOptions,
    scale: ScaleOptions,
    processing_class: "ProcessingClass | None",
    fingerprint: JsonObject,
    show_progress: bool,
) -> QueryLogs:
    try:
        from spec_kd.prompts.logs.scale.pipeline import write_large_log
    except ImportError as error:
        raise ImportError(f"`executor` needs datatrove ({error}). Install it: pip install spec_kd[scale]") from error
    names = [redact_text(str(path), options.redact) for path in ignored]
    write_large_log(files, names, store.output_dir, options, scale, processing_class, fingerprint, show_progress)
    finished = store.read_finished(fingerprint)
    if finished is None:
        raise RuntimeError(f"`{store.output_dir}` was changed by someone else while it was written. Repeat the call.")
    report = QueryLogsReport.from_dict(finished)
    _warn(report)
    return QueryLogs(*store.open_splits(), report)


def _warn(report: QueryLogsReport) -> None:
    for warning in report.list_warnings():
        logger.warning(warning)


def _describe_processing_class(processing_class: "ProcessingClass") -> list[str]:
    from spec_kd.vocabulary import fingerprint_tokenizer  # imports torch, which is not needed otherwise

    return [fingerprint_tokenizer(processing_class), Hasher.hash(processing_class.chat_template)]
