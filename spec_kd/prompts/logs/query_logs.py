"""Scenario I: what users asked the target, from its logs."""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset
from datasets.fingerprint import Hasher
from tqdm.auto import tqdm

from spec_kd.checks import read_path
from spec_kd.open_types import Argument, JsonObject, JsonValue
from spec_kd.options import resolve_options
from spec_kd.prompts.logs.batches import BatchOutputs, is_batch_output
from spec_kd.prompts.logs.files import Paths, find_files, read_records
from spec_kd.prompts.logs.formats import LoggedCall, read_record, split_turns
from spec_kd.prompts.logs.ledger import LEFT_OUT, MALFORMED, READ, LogLedger
from spec_kd.prompts.logs.options import LogOptions
from spec_kd.prompts.logs.prompt_filter import REASONS, LoggedPrompt, PromptFilter, number_conversation
from spec_kd.prompts.logs.prompt_store import PromptStore
from spec_kd.prompts.logs.redaction import redact_messages, redact_text
from spec_kd.prompts.logs.report import QueryLogsReport, describe_nothing
from spec_kd.prompts.logs.tracing import LeftOutError, expand_record
from spec_kd.prompts.logs.vllm import VLLMLogReader
from spec_kd.prompts.splitting import choose_test_rows, warn_of_empty_side

if TYPE_CHECKING:
    from spec_kd.vocabulary import ProcessingClass

NUM_LISTED = NUM_NOTES = 100
OTHER_NOTES = "records with other notes"
VERSION = 3  # of what is made of the same logs with the same options

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QueryLogs:
    """The prompts of a log.

    Args:
        train (`Dataset`), test (`Dataset`): Memory-mapped.
        report (`QueryLogsReport`): What was read and why prompts were dropped.
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
    show_progress: bool = True,
    **given: Argument,
) -> QueryLogs:
    """Reads logs of what a target was asked into prompts to distill on.

    Logs are streamed. Of a prompt that is kept, memory holds what recognizes it again and nothing of its text: 800
    bytes in all, 300 without near-duplicates. The order of the logs is kept, and of
    several duplicates the first.

    The result lies in `output_dir` as `train.arrow`, `test.arrow` and `report.json`; `load_dataset(output_dir)` opens
    it too. The same call on the same files (by name, size and time of change) returns it without reading them; a call
    with others replaces it. It takes its place when it is whole, so that a killed run leaves nothing but a hidden
    folder, which the next one removes.

    Args:
        paths (`str`, `Path` or a list of them):
            Files, glob patterns and folders: JSON lines, JSON arrays, CSV, TSV, Parquet, or plain text with a prompt a
            line; numbered as log rotation does it (`.jsonl.1`); all but Parquet also compressed (`.gz`, `.zst`, `.bz2`,
            `.xz`, `.lz4`), and in UTF-8, UTF-16 or UTF-32.
        output_dir (`str` or `Path`): Created if needed.
        options (`LogOptions`, *optional*): Options of the reading; the defaults of [`LogOptions`] by default.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            The target's. With it every prompt is rendered, and a prompt that its chat template refuses is malformed.
        show_progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.
        given: The fields of [`LogOptions`] as keywords.

    Returns:
        `QueryLogs` with `train`, `test` and `report`. Columns: `prompt` (messages); `tools` (JSON text) and
        `completion` (a list with the assistant's message), `None` where a record has none, and left out where no record
        has one; `scenario` (`"historical"`), `source` (file) and `conversation_id`. Answers with a `finish_reason` that
        is not known as the target's own end are left out and counted, as are those that are not understood. That it was
        the target that wrote them is for you to know; [`add_completion_ids`] prepares them for `score_completions`.

    Raises:
        `FileNotFoundError`: A path that no log is found for.
        `ValueError`: An option out of its range, limits of tokens without `processing_class`; a file of something else
            where the result goes; with `on_error="raise"` the first malformed record, by file and line; nothing is kept
            at all, with the reasons.
    """
    start = time.monotonic()
    options = resolve_options(LogOptions, options, given)
    options.check_tokenizer(processing_class)
    store = PromptStore(Path(read_path("output_dir", output_dir)))
    store.check_place()
    files, ignored = find_files(paths, store.output_dir)
    fingerprint = {
        **options.describe(),
        "version": VERSION,
        "files": [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files],
        "processing_class": None if processing_class is None else _describe_processing_class(processing_class),
    }
    if (finished := _open(store, fingerprint)) is not None:
        return finished
    reader = _LogReader(files, options, processing_class, show_progress)
    store.write(reader.read_prompts(store.batches_path))
    if not len(store.timestamps):
        store.discard()
        raise ValueError(describe_nothing(reader.ledger, reader.filter.dropped))
    joined, groups = store.group_prompts()
    is_test = choose_test_rows(
        store.conversations[groups],
        np.array(store.timestamps),
        options.test_fraction,
        options.split_by,
        options.seed,
    )
    warn_of_empty_side(is_test, groups, options.test_fraction)
    store.split(is_test)
    report = reader.report(
        ignored_files=tuple(redact_text(str(path), options.redact) for path in ignored),
        kept=len(is_test),
        train=int((~is_test).sum()),
        test=int(is_test.sum()),
        conversations=len(np.unique(joined)),
        with_completion=store.num_completions,
        seconds=time.monotonic() - start,
    )
    for warning in report.list_warnings():
        logger.warning(warning)
    store.finish(fingerprint, report.to_dict())
    return _open(store, fingerprint)


def _open(store: PromptStore, fingerprint: JsonObject) -> QueryLogs | None:
    finished = store.open_finished(fingerprint)
    if finished is None:
        return None
    train, test, report = finished
    return QueryLogs(train, test, QueryLogsReport.from_dict(report))


class _LogReader:
    """Streams the prompts of log files through a filter, counting what becomes of them."""

    def __init__(
        self,
        files: Sequence[Path],
        options: LogOptions,
        processing_class: "ProcessingClass | None",
        show_progress: bool,
    ):
        self._files, self._options, self._redact = files, options, options.redact
        self._is_vllm = options.format == "vllm"
        self._read = VLLMLogReader(processing_class) if self._is_vllm else options.format
        self.filter = PromptFilter(options, processing_class)
        self._progress = tqdm(desc="Query logs", unit=" records", disable=not show_progress)
        self.num_records = self.num_prompts = self.num_redacted = 0
        self.malformed_examples: list[str] = []
        self.notes: Counter[str] = Counter()
        self.ledger = LogLedger()
        self._renamed: dict[str, int] = {}

    def read_prompts(self, batches_path: Path) -> Iterator[LoggedPrompt]:
        """The prompts that are kept, in order.

        Args:
            batches_path (`Path`): For the answers of batches, until all is read.
        """
        # Answers of batches are joined with requests as they are logged, not as a function makes them.
        batches = None if callable(self._options.format) else BatchOutputs.collect(self._files, batches_path)
        with self._progress:
            for path in self._files:
                self.ledger.start_file(redact_text(str(path), self._redact))
                for number, record in read_records(path, keep_text=self._is_vllm):
                    if batches is not None:
                        if is_batch_output(record) and batches.has_request(record):
                            self._note(path, number, READ)
                            continue
                        record, note = batches.join(record)
                        self._count_notes([note] if note else [])
                    for part in expand_record(record):
                        yield from self._read_one(part, path, number)
            yield from self.filter.flush()
        if batches is not None:
            batches.close()

    def _read_one(self, record: JsonValue, path: Path, number: int) -> Iterator[LoggedPrompt]:
        try:
            if isinstance(record, Exception):
                raise ValueError(str(record) or type(record).__name__) from record
            for prompt in self._encode(record, str(path)):
                yield from self.filter.push(prompt)
                self.num_prompts += 1
            self._note(path, number, READ)
        except LeftOutError as error:
            self._note(path, number, LEFT_OUT, str(error))
        except ValueError as error:
            self._note(path, number, MALFORMED, str(error), error)

    def _encode(self, record: JsonValue, source: str) -> list[LoggedPrompt]:
        try:
            call = read_record(record, self._read)
            if call is None:
                raise LeftOutError("no request of vLLM's log" if self._is_vllm else "`format` returned `None` for it")
            if self._options.split_by == "time" and call.timestamp is None:
                raise ValueError('no timestamp that is understood, which `split_by="time"` needs')
            calls = split_turns(call, self._options.turns)
            if not self._redact:
                prompts = [LoggedPrompt.encode(call, source) for call in calls]
            else:
                source = redact_text(source, self._redact)
                prompts = [
                    LoggedPrompt.encode(self._redact_call(call), source, number_conversation(call)) for call in calls
                ]
        except (ValueError, LeftOutError):
            raise
        except Exception as error:  # shapes that no reader foresaw; one record must not end the reading of a log
            raise ValueError(f"not of a known form ({type(error).__name__}: {error})") from error
        self._count_notes(call.notes)
        return prompts

    def _count_notes(self, notes: Sequence[str]) -> None:
        for note in notes:
            note = redact_text(note, self._redact)
            self.notes[note if note in self.notes or len(self.notes) < NUM_NOTES else OTHER_NOTES] += 1

    def _redact_call(self, call: LoggedCall) -> LoggedCall:
        """All of a call that is stored, redacted. A name that was replaced is numbered, so that names stay apart."""
        texts = {name: getattr(call, name) for name in ("prompt", "completion", "tools", "conversation_id")}
        redacted = {name: redact_messages(value, self._redact) for name, value in texts.items()}
        if redacted == texts:
            return call
        self.num_redacted += 1
        if (name := redacted["conversation_id"]) != call.conversation_id:
            number = self._renamed.setdefault(call.conversation_id, len(self._renamed) + 1)
            redacted["conversation_id"] = f"{name}-{number}"
        return replace(call, **redacted)

    def _note(
        self, path: Path, number: int, outcome: str, reason: str | None = None, error: ValueError | None = None
    ) -> None:
        if error is not None and self._options.on_error == "raise":
            raise ValueError(
                f'{path}:{number}: {reason}. Pass `on_error="skip"` to count such records and go on.'
            ) from error
        self.num_records += 1
        self._progress.update()
        reason = None if reason is None else redact_text(reason, self._redact)
        self.ledger.note(number, outcome, reason)
        if outcome == MALFORMED and len(self.malformed_examples) < NUM_LISTED:
            self.malformed_examples.append(f"{redact_text(str(path), self._redact)}:{number}: {reason}")

    def report(self, kept: int, **counts: Argument) -> QueryLogsReport:
        """The report, with the counts that the reader does not know.

        Raises:
            `RuntimeError`: The counts do not add up, so that prompts were lost.
        """
        dropped = {reason: self.filter.dropped[reason] for reason in REASONS if self.filter.dropped[reason]}
        if self.num_prompts != kept + sum(dropped.values()):
            raise RuntimeError(f"{self.num_prompts} prompts were read, but {kept} are kept and {dropped} dropped.")
        totals = {name: sum(file[name] for file in self.ledger.files) for name in (LEFT_OUT, MALFORMED)}
        return QueryLogsReport(
            files=len(self._files),
            records=self.num_records,
            malformed_examples=tuple(self.malformed_examples),
            prompts=self.num_prompts,
            dropped=dropped,
            kept=kept,
            redacted=self.num_redacted,
            reasons=self.ledger.count_reasons(),
            notes=dict(self.notes),
            per_file=tuple({**file, "reasons": dict(file["reasons"])} for file in self.ledger.files),
            outcomes=tuple(self.ledger.runs),
            num_unlisted_outcomes=self.ledger.num_unlisted,
            **totals,
            **counts,
        )


def _describe_processing_class(processing_class: "ProcessingClass") -> list[str]:
    from spec_kd.vocabulary import fingerprint_tokenizer  # imports torch, which is not needed otherwise

    return [fingerprint_tokenizer(processing_class), Hasher.hash(processing_class.chat_template)]
