"""The stages by which datatrove reads a large log.

Read, compare by hashes, find near-duplicates, group into conversations, write. Tasks hand on arrays in a hidden folder
of the result, so that the memory of a task follows its share, and a killed run goes on after the tasks that were
complete.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spec_kd.addresses import name_place
from spec_kd.open_types import JsonObject
from spec_kd.prompts.logs.batches import holds_batch
from spec_kd.prompts.logs.options import LogOptions
from spec_kd.prompts.logs.scale.exact_duplicates import FindExactDuplicates
from spec_kd.prompts.logs.scale.executors import Stages
from spec_kd.prompts.logs.scale.grouping import LinkConversations, SortKept
from spec_kd.prompts.logs.scale.near_duplicates import (
    NUM_BANDS,
    ComparePairs,
    DropNearDuplicates,
    PairPrompts,
    ReadTexts,
    SignPrompts,
)
from spec_kd.prompts.logs.scale.options import ScaleOptions
from spec_kd.prompts.logs.scale.reading import ReadShares
from spec_kd.prompts.logs.scale.shares import FilePart, cut_into_shares
from spec_kd.prompts.logs.scale.work_folder import WorkFolder
from spec_kd.prompts.logs.scale.writing import RemoveTexts, WriteResult
from spec_kd.prompts.logs.text_decoding import LogPath

if TYPE_CHECKING:
    from spec_kd.vocabulary import ProcessingClass

VERSION = 1  # raised when the folder of a run holds other things
WORK_FOLDER = ".scale"
RUN_FILE = "run.json"


def write_large_log(
    files: Sequence[LogPath],
    ignored_files: Sequence[str],
    output_dir: Path,
    options: LogOptions,
    scale: ScaleOptions,
    processing_class: "ProcessingClass | None",
    fingerprint: JsonObject,
    show_progress: bool,
) -> None:
    """Writes the prompts of a large log, as [`load_query_logs`] says.

    Args:
        files (`Sequence[Path]`): Files of the log, in order.
        ignored_files (`Sequence[str]`): Names of the files that are left out, for the report.
        output_dir (`Path`): Folder of the result.
        options (`LogOptions`), scale (`ScaleOptions`): Options of the call.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*): The target's.
        fingerprint (`dict`): Of the call.
        show_progress (`bool`): Whether to show a progress bar.

    Raises:
        ValueError: The log has batches, whose responses stand anywhere; or no prompt is kept.
        RuntimeError: A task failed.
    """
    if not callable(options.format) and (batch := next(filter(holds_batch, files), None)) is not None:
        raise ValueError(
            f"`{batch}` is of a batch, whose responses may be in any other file. Set no `executor`, or leave it out."
        )
    if scale.executor != "local" and name_place(output_dir) != str(output_dir):
        raise ValueError(
            f"`output_dir` is `{name_place(output_dir)}`, an address, but tasks on other machines hand on files in a "
            "folder that all of them see. Give such a folder, and copy the result to the address."
        )
    folder = output_dir.absolute() / WORK_FOLDER
    shares = _open_run(folder, files, scale.num_tasks, fingerprint)
    stages = build_stages(folder, shares, options, scale, processing_class, show_progress)
    facts = {"files": len(files), "ignored_files": list(ignored_files), "started": time.time()}
    work = WorkFolder(str(folder / "work"), len(shares))
    stages.add("result", 1, WriteResult(work, str(output_dir), options, fingerprint, facts))
    stages.run()
    shutil.rmtree(folder, ignore_errors=True)


def build_stages(
    folder: Path,
    shares: Sequence[Sequence[FilePart]],
    options: LogOptions,
    scale: ScaleOptions,
    processing_class: "ProcessingClass | None",
    show_progress: bool,
) -> Stages:
    """The stages before the writing of the result."""
    num_tasks, threshold = len(shares), options.near_duplicate_threshold
    work, signatures = WorkFolder(str(folder / "work"), num_tasks), str(folder / "signatures")
    stages = Stages(folder / "stages", scale, show_progress)
    stages.add("read", num_tasks, ReadShares(work, shares, options, processing_class))
    stages.add("exact", num_tasks, FindExactDuplicates(work))
    if threshold is not None:
        stages.add("signatures", num_tasks, ReadTexts(work), SignPrompts(signatures))
        stages.add("pairs", NUM_BANDS, PairPrompts(work, signatures))
        stages.add("near", num_tasks, ComparePairs(work, threshold))
        stages.add("dropped", 1, DropNearDuplicates(work))
    stages.add("kept", num_tasks, SortKept(work, threshold is not None))
    if threshold is not None:
        stages.add("clean-up", 1, RemoveTexts(work, signatures))
    stages.add("conversations", num_tasks, LinkConversations(work))
    return stages


def _open_run(folder: Path, files: Sequence[LogPath], num_tasks: int, fingerprint: JsonObject) -> list[list[FilePart]]:
    """The shares of a run; removes what a run of another call left in the folder."""
    call = {"version": VERSION, "num_tasks": num_tasks, "fingerprint": fingerprint}
    digest = hashlib.sha256(json.dumps(call, sort_keys=True).encode()).hexdigest()
    path = folder / RUN_FILE
    if not path.exists() or path.read_text(encoding="utf-8") != digest:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        path.write_text(digest, encoding="utf-8")
    return cut_into_shares(files, num_tasks)
