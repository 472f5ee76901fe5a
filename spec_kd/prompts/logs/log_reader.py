"""Reads the records of log files one by one into prompts, and counts what became of each record."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from spec_kd.open_types import Argument, JsonValue
from spec_kd.prompts.logs.batches import BatchOutputs, is_batch_output
from spec_kd.prompts.logs.files import read_records
from spec_kd.prompts.logs.formats import read_record
from spec_kd.prompts.logs.logged_call import LoggedCall, split_turns
from spec_kd.prompts.logs.options import LogOptions
from spec_kd.prompts.logs.prompt_filter import REASONS, LoggedPrompt, PromptFilter, number_conversation
from spec_kd.prompts.logs.redaction import redact_messages, redact_text
from spec_kd.prompts.logs.report import LEFT_OUT, MALFORMED, READ, LogLedger, QueryLogsReport, count_note
from spec_kd.prompts.logs.text_decoding import LogPath
from spec_kd.prompts.logs.tracing import LeftOutError, expand_record
from spec_kd.prompts.logs.vllm import VLLMLogReader

if TYPE_CHECKING:
    from spec_kd.vocabulary import ProcessingClass

NUM_NOTES = 100
OTHER_NOTES = "records with other notes"


class LogReader:
    """Streams the prompts of log files through a filter, and counts what becomes of them.

    Args:
        files (`Sequence[Path]`): Files of the log, in the order in which they are read.
        options (`LogOptions`): Options of the reading.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*): The target's.
        show_progress (`bool`): Whether to show a progress bar.
        folder (`Path`): Folder for what waits on disk meanwhile; it must exist when the reading begins.

    Attributes:
        filter (`PromptFilter`): Decides which prompts are kept, and counts the others.
        ledger (`LogLedger`): What became of each record.
    """

    def __init__(
        self,
        files: Sequence[LogPath],
        options: LogOptions,
        processing_class: "ProcessingClass | None",
        show_progress: bool,
        folder: Path,
    ):
        self._files, self._options, self._redact, self._folder = files, options, options.redact, folder
        self._is_vllm = options.format == "vllm"
        self._read = VLLMLogReader(processing_class) if self._is_vllm else options.format
        self._progress = tqdm(desc="Query logs", unit=" records", disable=not show_progress)
        self._num_prompts = self._num_redacted = 0
        self._notes: Counter[str] = Counter()
        self._renamed: dict[str, int] = {}
        self.filter = PromptFilter(options, processing_class, folder)
        self.ledger = LogLedger()

    def read_prompts(self) -> Iterator[LoggedPrompt]:
        """The prompts that are kept, in order.

        Raises:
            ValueError: With `on_error="raise"` the first malformed record; names its file and line.
        """
        batches = self._collect_batches()
        with self._progress:
            for path in self._files:
                self.ledger.start_file(redact_text(str(path), self._redact))
                for number, record in read_records(path, keep_text=self._is_vllm):
                    if batches is not None:
                        if is_batch_output(record) and batches.has_request(record):
                            self._note(number, READ)
                            continue
                        record, note = batches.join(record)
                        self._count_notes([note] if note else [])
                    for part in expand_record(record):
                        yield from self._read_one(part, path, number)
            yield from self.filter.flush()
        if batches is not None:
            batches.close()

    def _collect_batches(self) -> BatchOutputs | None:
        # Responses of batches are joined with the requests as they are logged, not as a function returns them.
        return None if callable(self._options.format) else BatchOutputs.collect(self._files, self._folder)

    def _read_one(self, record: JsonValue, path: LogPath, number: int) -> Iterator[LoggedPrompt]:
        try:
            if isinstance(record, Exception):
                raise ValueError(str(record) or type(record).__name__) from record
            for prompt in self._encode(record, str(path)):
                yield from self.filter.push(prompt)
                self._num_prompts += 1
            self._note(number, READ)
        except LeftOutError as error:
            self._note(number, LEFT_OUT, str(error))
        except ValueError as error:
            if self._options.on_error == "raise":
                raise ValueError(
                    f'{path}:{self._find_line(path, number)}: {error}. Pass `on_error="skip"` to count such records '
                    "and go on."
                ) from error
            self._note(number, MALFORMED, str(error))

    def _find_line(self, path: LogPath, number: int) -> int:
        """The line of the file with this number of what is read of it."""
        return number

    def _encode(self, record: JsonValue, source: str) -> list[LoggedPrompt]:
        try:
            call = read_record(record, self._read)
            if call is None:
                raise LeftOutError("no request of vLLM's log" if self._is_vllm else "`format` returned `None` for it")
            if self._options.split_by == "time" and call.timestamp is None:
                raise ValueError('no timestamp that is understood, which `split_by="time"` needs')
            prompts = [
                LoggedPrompt.encode(
                    self._redact_call(turn), redact_text(source, self._redact), number_conversation(turn)
                )
                for turn in split_turns(call, self._options.turns)
            ]
        except ValueError:
            raise
        except Exception as error:  # a shape that no format foresees; one record must not end the reading of a log
            raise ValueError(f"not of a known form ({type(error).__name__}: {error})") from error
        self._count_notes(call.notes)
        return prompts

    def _count_notes(self, notes: Sequence[str]) -> None:
        for note in notes:
            count_note(self._notes, redact_text(note, self._redact), NUM_NOTES, OTHER_NOTES)

    def _redact_call(self, call: LoggedCall) -> LoggedCall:
        """The call with all that is stored of it redacted; replaced names get numbers, so that they stay different."""
        if not self._redact:
            return call
        logged = {name: getattr(call, name) for name in ("prompt", "completion", "tools", "conversation_id")}
        redacted = {name: redact_messages(value, self._redact) for name, value in logged.items()}
        if redacted == logged:
            return call
        self._num_redacted += 1
        if (name := redacted["conversation_id"]) != call.conversation_id:
            redacted["conversation_id"] = self._rename(str(call.conversation_id), name)
        return replace(call, **redacted)

    def _rename(self, name: str, redacted: str) -> str:
        """The redacted name of a conversation, with the number that tells it from others."""
        return number_name(redacted, self._renamed.setdefault(name, len(self._renamed) + 1))

    def _note(self, number: int, outcome: str, reason: str | None = None) -> None:
        self._progress.update()
        self.ledger.note(number, outcome, None if reason is None else redact_text(reason, self._redact))

    def report(self, kept: int, **counts: Argument) -> QueryLogsReport:
        """The report, with the counts that the reader does not know.

        Args:
            kept (`int`): Number of prompts that were written.
            counts: Further fields of [`QueryLogsReport`].

        Raises:
            RuntimeError: The counts do not add up, so prompts were lost.
        """
        return build_report(
            self.ledger,
            self._notes,
            files=len(self._files),
            prompts=self._num_prompts,
            dropped=self.filter.dropped,
            kept=kept,
            redacted=self._num_redacted,
            **counts,
        )


def number_name(redacted: str, number: int) -> str:
    """The redacted name of the conversation whose name was the so-manieth that had to be redacted."""
    return f"{redacted}-{number}"


def build_report(
    ledger: LogLedger, notes: Mapping[str, int], prompts: int, dropped: Mapping[str, int], kept: int, **counts: Argument
) -> QueryLogsReport:
    """The report of a reading.

    Args:
        ledger (`LogLedger`): What became of each record.
        notes (`Mapping[str, int]`): Further counts of records that were read.
        prompts (`int`): Number of prompts that were read.
        dropped (`Mapping[str, int]`): How many of them were dropped, by reason, one of [`REASONS`].
        kept (`int`): Number of prompts that were written.
        counts: The other fields of [`QueryLogsReport`].

    Raises:
        RuntimeError: The counts do not add up, so prompts were lost.
    """
    dropped = {reason: dropped[reason] for reason in REASONS if dropped.get(reason)}
    if prompts != kept + sum(dropped.values()):
        raise RuntimeError(f"{prompts} prompts were read, but {kept} are kept and {dropped} dropped.")
    return QueryLogsReport(
        malformed_examples=tuple(ledger.malformed_examples),
        prompts=prompts,
        dropped=dropped,
        kept=kept,
        reasons=ledger.count_reasons(),
        notes=dict(notes),
        per_file=tuple({**file, "reasons": dict(file["reasons"])} for file in ledger.files),
        outcomes=tuple(ledger.runs),
        num_unlisted_outcomes=ledger.num_unlisted,
        **ledger.count_outcomes(),
        **counts,
    )
