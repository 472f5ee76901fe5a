"""Scenario I: what users asked the target, from its logs."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from datasets import Dataset
from datasets.fingerprint import Hasher
from tqdm.auto import tqdm

from spec_kd.checks import check_int, read_path
from spec_kd.open_types import Argument, JsonObject, JsonValue
from spec_kd.prompts.deduplication import check_threshold
from spec_kd.prompts.logs.batches import BatchOutputs, is_batch_output
from spec_kd.prompts.logs.files import Paths, find_files, read_records
from spec_kd.prompts.logs.formats import FORMATS, TURNS, LoggedCall, read_record, split_turns
from spec_kd.prompts.logs.ledger import LEFT_OUT, MALFORMED, READ, LogLedger
from spec_kd.prompts.logs.prompt_filter import REASONS, LoggedPrompt, PromptFilter, number_conversation
from spec_kd.prompts.logs.prompt_store import PromptStore
from spec_kd.prompts.logs.redaction import check_redactions, redact_messages, redact_text
from spec_kd.prompts.logs.report import QueryLogsReport, describe_nothing
from spec_kd.prompts.logs.tracing import LeftOutError, expand_record
from spec_kd.prompts.logs.vllm import VLLMLogReader
from spec_kd.prompts.splitting import SPLITS, check_test_fraction, choose_test_rows, warn_of_empty_side

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
    *,
    format: str | Callable[[JsonValue], JsonValue] = "auto",
    turns: str = "auto",
    processing_class=None,
    min_tokens: int | None = None,
    max_tokens: int | None = None,
    near_duplicate_threshold: float | None = 0.8,
    max_per_user: int | None = None,
    max_per_day: int | None = None,
    test_fraction: float = 0.05,
    split_by: str = "hash",
    redact: Sequence[str] = (),
    on_error: str = "skip",
    seed: int = 0,
    show_progress: bool = True,
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
        format (`str` or `Callable`):
            `"auto"` recognizes each record by its keys, also runs of LangSmith and observations of Langfuse.
            `"openai"`: requests of the chat completions, Responses and Anthropic APIs, in one object with the response
            or as `request` and `response`, also as a stream of events, which is also how LiteLLM (`"litellm"`: its
            standard payload and its table of spend logs) has it; input and output files of batches are joined.
            `"vllm"`: the same (files of `vllm run-batch`), or the log that the server prints with
            `--enable-log-requests`, whose rendered prompts are read with the chat template of the `processing_class`;
            its other lines are left out. `"sharegpt"`: `conversations`. `"trl"`: `prompt` and `completion`, or
            `messages`. `"text"`: `prompt` or `text`, or lines of text. A function is given each record and returns it
            in one of these forms, or `None` to leave it out.
        turns (`str`):
            Every turn of the assistant is a prompt with the history it had (`"all"`), or the last one (`"last"`).
            `"auto"`: all of a record that is a conversation as a whole, and the last of one that is a request, since
            earlier turns had requests of their own.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            The target's. With it every prompt is rendered, and what its chat template refuses is malformed.
        min_tokens (`int`, *optional*), max_tokens (`int`, *optional*): Of the rendered prompt.
        near_duplicate_threshold (`float`, *optional*, defaults to 0.8):
            Similarity from which on prompts count as the same, see [`PromptFilter`] for what is compared. `None` keeps
            near-duplicates, which may then be on both sides of the split.
        max_per_user (`int`, *optional*), max_per_day (`int`, *optional*): Most prompts of a user, of a day (UTC).
        test_fraction (`float`): Share of the prompts for testing. A warning says where a side has none.
        split_by (`str`):
            `"hash"`: by conversation, stable when the log grows. `"time"`: the conversations that began last. A
            conversation is on one side: it is known by its logged `conversation_id`, `session_id`, `thread_id` or
            `chat_id`, else by the user's first turn. Ids of a trace or a request do not count, and a request that
            continues the history of another is of the same conversation whatever its ids are. Conversations that hold
            the same prompt, under whatever system prompts, are on one side as well.
        redact (`Sequence[str]`):
            Of `"email"`, `"phone"`, `"key"` and `"card"`: what to replace in all that is stored (prompts, answers,
            arguments of tool calls, tools, ids, names of files), see [`redact_text`].
        on_error (`str`): A malformed record is counted and listed (`"skip"`), or an error (`"raise"`).
        seed (`int`): Of the split by hash.
        show_progress (`bool`): Whether to show a progress bar.

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
    check_log_options(
        format=format, turns=turns, processing_class=processing_class, min_tokens=min_tokens, max_tokens=max_tokens,
        near_duplicate_threshold=near_duplicate_threshold, max_per_user=max_per_user, max_per_day=max_per_day,
        test_fraction=test_fraction, split_by=split_by, redact=redact, on_error=on_error, seed=seed,
    )  # fmt: skip
    output_dir = read_path("output_dir", output_dir)
    prompts = PromptFilter(
        near_duplicate_threshold, processing_class, min_tokens, max_tokens, max_per_user, max_per_day
    )
    store = PromptStore(Path(output_dir))
    store.check_place()
    files, ignored = find_files(paths, store.output_dir)
    fingerprint = {
        "version": VERSION,
        "files": [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files],
        "format": format if isinstance(format, str) else Hasher.hash(format),
        "processing_class": None if processing_class is None else _describe_processing_class(processing_class),
        "turns": turns, "min_tokens": min_tokens, "max_tokens": max_tokens,
        "near_duplicate_threshold": near_duplicate_threshold, "max_per_user": max_per_user, "max_per_day": max_per_day,
        "test_fraction": test_fraction, "split_by": split_by, "redact": sorted(redact), "on_error": on_error,
        "seed": seed,
    }  # fmt: skip
    if (finished := _open(store, fingerprint)) is not None:
        return finished
    reader = _LogReader(
        files, format, turns, redact, on_error, split_by == "time", prompts, processing_class, show_progress
    )
    store.write(reader.read_prompts(store.batches_path))
    if not len(store.timestamps):
        store.discard()
        ledger = reader.ledger
        raise ValueError(describe_nothing(ledger, prompts.dropped))
    joined, groups = store.group_prompts()
    is_test = choose_test_rows(store.conversations[groups], np.array(store.timestamps), test_fraction, split_by, seed)
    warn_of_empty_side(is_test, groups, test_fraction)
    store.split(is_test)
    report = reader.report(
        ignored_files=tuple(redact_text(str(path), redact) for path in ignored),
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


def check_log_options(
    *,
    format: str | Callable[[JsonValue], JsonValue],
    turns: str,
    processing_class: JsonValue,
    min_tokens: int | None,
    max_tokens: int | None,
    near_duplicate_threshold: float | None,
    max_per_user: int | None,
    max_per_day: int | None,
    test_fraction: float,
    split_by: str,
    redact: Sequence[str],
    on_error: str,
    seed: int,
) -> None:
    """Raises `ValueError` for options of [`load_query_logs`] that are wrong whatever the logs hold.

    Of `processing_class` only counts whether there is one.
    """
    if format not in FORMATS and not callable(format):
        raise ValueError(f"`format` must be one of {', '.join(map(repr, FORMATS))} or a function, got {format!r}.")
    for name, value, choices in (
        ("turns", turns, TURNS),
        ("split_by", split_by, SPLITS),
        ("on_error", on_error, ("skip", "raise")),
    ):
        if value not in choices:
            raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")
    check_test_fraction(test_fraction)
    for name, value in (
        ("min_tokens", min_tokens),
        ("max_tokens", max_tokens),
        ("max_per_user", max_per_user),
        ("max_per_day", max_per_day),
    ):
        check_int(name, value, is_optional=True)
    check_int("seed", seed, 0)
    if processing_class is None and (min_tokens is not None or max_tokens is not None):
        raise ValueError("`min_tokens` and `max_tokens` count the target's tokens: give its `processing_class`.")
    check_redactions(redact)
    check_threshold(near_duplicate_threshold, "near_duplicate_threshold", is_optional=True)


def _open(store: PromptStore, fingerprint: JsonObject) -> QueryLogs | None:
    finished = store.open_finished(fingerprint)
    if finished is None:
        return None
    train, test, report = finished
    return QueryLogs(train, test, QueryLogsReport.from_dict(report))


class _LogReader:
    """Streams the prompts of log files through a filter, counting what becomes of them."""

    def __init__(
        self, files, format, turns, redact, on_error, needs_time, prompts: PromptFilter, processing_class, show_progress
    ):
        self._files, self._format, self._turns, self._redact = files, format, turns, redact
        self._read = VLLMLogReader(processing_class) if format == "vllm" else format
        self._on_error, self._needs_time, self._prompts = on_error, needs_time, prompts
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
        batches = None if callable(self._format) else BatchOutputs.collect(self._files, batches_path)
        with self._progress:
            for path in self._files:
                self.ledger.start_file(redact_text(str(path), self._redact))
                for number, record in read_records(path, keep_text=self._format == "vllm"):
                    if batches is not None:
                        if is_batch_output(record) and batches.has_request(record):
                            self._note(path, number, READ)
                            continue
                        record, note = batches.join(record)
                        self._count_notes([note] if note else [])
                    for part in expand_record(record):
                        yield from self._read_one(part, path, number)
            yield from self._prompts.flush()
        if batches is not None:
            batches.close()

    def _read_one(self, record: JsonValue, path: Path, number: int) -> Iterator[LoggedPrompt]:
        try:
            if isinstance(record, Exception):
                raise ValueError(str(record) or type(record).__name__) from record
            for prompt in self._encode(record, str(path)):
                yield from self._prompts.push(prompt)
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
                is_log = self._format == "vllm"
                raise LeftOutError("no request of vLLM's log" if is_log else "`format` returned `None` for it")
            if self._needs_time and call.timestamp is None:
                raise ValueError('no timestamp that is understood, which `split_by="time"` needs')
            calls = split_turns(call, self._turns)
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
        if error is not None and self._on_error == "raise":
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
        dropped = {reason: self._prompts.dropped[reason] for reason in REASONS if self._prompts.dropped[reason]}
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


def _describe_processing_class(processing_class) -> list[str]:
    from spec_kd.vocabulary import fingerprint_tokenizer  # imports torch, which is not needed otherwise

    return [fingerprint_tokenizer(processing_class), Hasher.hash(processing_class.chat_template)]
