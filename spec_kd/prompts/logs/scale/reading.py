"""Reads a share of a log: its prompts go to disk, with the hashes by which they are compared and grouped."""

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from spec_kd.open_types import JsonValue
from spec_kd.prompts.deduplication import normalize_text
from spec_kd.prompts.logs.batches import BatchOutputs
from spec_kd.prompts.logs.conversations import hash_history
from spec_kd.prompts.logs.log_reader import LogReader
from spec_kd.prompts.logs.options import LogOptions
from spec_kd.prompts.logs.prompt_filter import REASONS, LoggedPrompt, PromptFilter, describe_context, hash_prompt
from spec_kd.prompts.logs.prompt_store import FEATURES, ROWS_AT_A_TIME, open_writer, to_batch
from spec_kd.prompts.logs.scale.shares import FilePart
from spec_kd.prompts.logs.scale.step import LogStep
from spec_kd.prompts.logs.scale.work_folder import WorkFolder
from spec_kd.prompts.logs.text_decoding import LogPath
from spec_kd.prompts.similarity import TextFile
from spec_kd.prompts.splitting import hash_text

if TYPE_CHECKING:
    from spec_kd.vocabulary import ProcessingClass

# Of each row of a share. `reason` is the place in `REASONS` plus one, or 0 for a prompt of allowed length.
ROW = np.dtype(
    [
        ("identity", "<u8"), ("conversation", "<u8"), ("whole", "<u8"), ("timestamp", "<f8"), ("reason", "u1"),
        ("has_completion", "?"), ("has_tools", "?"), ("is_renamed", "?"),
    ]
)  # fmt: skip
# Where the texts of a row are that near-duplicates are found by.
PLACE = np.dtype(
    [
        ("text", "<u8"), ("text_size", "<u4"), ("context", "<u8"), ("context_size", "<u4"), ("context_hash", "<u8"),
        ("turns", "<u2"),
    ]
)  # fmt: skip


class RenamedStr(str):
    """The redacted name of a conversation, which gets its number when all shares are read."""


class LengthFilter(PromptFilter):
    """Returns every prompt at once; duplicates are found when all shares are read.

    Attributes:
        reason (`str`, *optional*): Why the last prompt is dropped unless it is an exact duplicate.
    """

    reason: str | None = None

    def push(self, prompt: LoggedPrompt) -> Iterator[LoggedPrompt]:
        """Returns the prompt; raises `ValueError` as [`PromptFilter.push`] does."""
        self.reason = self._check_length(prompt.call)
        yield prompt


class ShareReader(LogReader):
    """Streams the prompts of a share.

    Args:
        parts (`Sequence[FilePart]`): The share.
        options (`LogOptions`): Options of the reading.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*): The target's.

    Attributes:
        filter (`LengthFilter`): Which prompts are too short or too long.
    """

    filter: LengthFilter

    def __init__(
        self, parts: Sequence[FilePart], options: LogOptions, processing_class: "ProcessingClass | None"
    ) -> None:
        files = cast(Sequence[LogPath], parts)
        super().__init__(files, options, processing_class, show_progress=False, folder=Path())
        self.filter = LengthFilter(options, processing_class)
        self._ends: list[tuple[bool, bool]] = []  # of each part, whether its first and its last record were not read

    def describe(self) -> dict[str, JsonValue]:
        """What became of the records, as JSON values."""
        files = [{**file, "reasons": dict(file["reasons"])} for file in self.ledger.files]
        return {
            "files": files,
            "ends": self._ends,
            "lines": [part.count_lines() for part in self._files if isinstance(part, FilePart)],
            "runs": self.ledger.runs,
            "num_unlisted": self.ledger.num_unlisted,
            "malformed_examples": self.ledger.malformed_examples,
            "notes": dict(self._notes),
            "prompts": self._num_prompts,
            "redacted": self._num_redacted,
        }

    def list_renamed(self) -> Sequence[int]:
        """Hashes of the names that were redacted, in the order in which they appeared."""
        return [hash_text(name) for name in self._renamed]

    def _collect_batches(self) -> BatchOutputs | None:
        return None

    def _find_line(self, path: LogPath, number: int) -> int:
        return number + (path.count_lines_before() if isinstance(path, FilePart) else 0)

    def _rename(self, name: str, redacted: str) -> str:
        self._renamed.setdefault(name, 0)
        return RenamedStr(redacted)

    def _note(self, number: int, outcome: str, reason: str | None = None) -> None:
        super()._note(number, outcome, reason)
        is_left = reason is not None
        if len(self._ends) < len(self.ledger.files):
            self._ends += [(False, False)] * (len(self.ledger.files) - len(self._ends) - 1) + [(is_left, is_left)]
        else:
            self._ends[-1] = (self._ends[-1][0], is_left)


class ReadShares(LogStep):
    """Reads one share in each task.

    Args:
        work (`WorkFolder`): Folder of the run.
        shares (`list[list[FilePart]]`): The shares.
        options (`LogOptions`): Options of the reading.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*): The target's.
    """

    name = "read"

    def __init__(
        self,
        work: WorkFolder,
        shares: Sequence[Sequence[FilePart]],
        options: LogOptions,
        processing_class: "ProcessingClass | None",
    ):
        super().__init__(work)
        self.shares, self.options, self.processing_class = shares, options, processing_class

    def do(self, task: int, num_tasks: int) -> None:
        """Reads a share."""
        reader = ShareReader(self.shares[task], self.options, self.processing_class)
        writer = _RowWriter(self.work, task, has_texts=self.options.near_duplicate_threshold is not None)
        with writer:
            for prompt in reader.read_prompts():
                writer.add(prompt, reader.filter.reason)
        writer.sort()
        self.work.save("renamed", task, np.array(reader.list_renamed(), dtype=np.uint64))
        self.work.save_json("ledgers", task, reader.describe())


class _RowWriter:
    """Writes the rows of a share: prompts, hashes, and the texts by which near-duplicates are found."""

    def __init__(self, work: WorkFolder, part: int, has_texts: bool):
        self._work, self._part, self._has_texts = work, part, has_texts
        self._waiting: list[LoggedPrompt] = []
        self._rows: list[tuple[Any, ...]] = []  # type: ignore[explicit-any]  # values of `ROW`
        self._places: list[tuple[int, ...]] = []
        self._contexts: dict[int, tuple[int, int]] = {}
        self._beginnings, self._beginning_rows = array("Q"), array("Q")
        self._num_rows = 0

    def __enter__(self) -> "_RowWriter":
        self._stream = open_writer(self._work.place("prompts", self._part), FEATURES.arrow_schema, "zstd")
        self._prompts = self._stream.__enter__()
        self._row_file = self._work.place("rows", self._part).open("wb")
        if self._has_texts:
            self._texts, self._context_texts = (
                TextFile(self._work.place(name, self._part).open("wb")) for name in ("texts", "contexts")
            )
            self._place_file = self._work.place("places", self._part).open("wb")
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:  # type: ignore[explicit-any]  # Python calls it
        if kind is None:
            self._flush()
        self._stream.__exit__(kind, error, trace)
        self._row_file.close()
        if self._has_texts:
            self._texts.close()
            self._context_texts.close()
            self._place_file.close()

    def add(self, prompt: LoggedPrompt, reason: str | None) -> None:
        call = prompt.call
        whole, beginnings = hash_history(call.prompt)
        self._beginnings.extend(beginnings)
        self._beginning_rows.extend([self._num_rows] * len(beginnings))
        self._rows.append(
            (
                hash_prompt(prompt), prompt.conversation, whole,
                np.nan if call.timestamp is None else call.timestamp,
                0 if reason is None else REASONS.index(reason) + 1,
                prompt.completion is not None, prompt.tools is not None,
                isinstance(call.conversation_id, RenamedStr),
            )
        )  # fmt: skip
        if self._has_texts:
            context, num_turns = describe_context(prompt)
            identity = hash_text(context)
            if identity not in self._contexts:
                self._contexts[identity] = self._context_texts.write(normalize_text(context))
            text = self._texts.write(normalize_text(call.prompt))
            self._places.append((*text, *self._contexts[identity], identity, num_turns))
        self._waiting.append(prompt)
        self._num_rows += 1
        if len(self._waiting) == ROWS_AT_A_TIME:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._prompts.write_batch(to_batch(self._waiting))
            self._row_file.write(np.array(self._rows, dtype=ROW).tobytes())
            if self._has_texts:
                self._place_file.write(np.array(self._places, dtype=PLACE).tobytes())
        self._waiting, self._rows, self._places = [], [], []

    def sort(self) -> None:
        """Sorts what is compared with other shares."""
        rows = load_rows(self._work, self._part)
        self._work.save_hashes("identities", self._part, rows["identity"].copy(), np.arange(len(rows)))
        self._work.save("beginnings", self._part, np.array(self._beginnings, dtype=np.uint64))
        self._work.save("beginning_rows", self._part, np.array(self._beginning_rows, dtype=np.uint32))


def load_rows(work: WorkFolder, part: int) -> Any:  # type: ignore[explicit-any]  # a structured array
    """What is known of the rows of a share, `ROW`, `(N,)`."""
    return np.fromfile(work.place("rows", part), dtype=ROW)
