"""Files that are whole or not there, whenever the process is killed and whatever the disk does; so are whole models.

One rule for modes: what is written follows the umask, as what other tools write does.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from io import BufferedRandom
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from spec_kd.addresses import PART_SUFFIX, name_place, remove_remote, upload
from spec_kd.open_types import JsonObject

try:
    import fcntl
except ImportError:  # Windows, which does not remove a file that is open
    fcntl = None  # type: ignore[assignment]  # nothing of it is called there

# Builders of `datasets`, by the ending of a file with rows.
BUILDERS = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json",
    ".csv": "csv", ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}  # fmt: skip
LOCK_FILE = "lock"
ADAPTER_CONFIG = "adapter_config.json"
# Hidden folders in that of a model: files that are being written, and whole ones that are moved to their places.
STAGING, SEALED = ".export.part", ".export"
FILE_LIST = ".files.json"
# What an earlier save may have left: engines that load every weight file of a folder would load these too.
WEIGHT_PATTERNS = ("model*.safetensors*", "pytorch_model*.bin*", "adapter_model.*", ADAPTER_CONFIG)
SERVING_FILE = "serving.json"
COSTS_FILE = "costs.json"
# In a model's folder: what loading it does not read, and what a trainer writes again each time.
NOT_OF_MODEL = (".md", "training_args.bin", SERVING_FILE)
FULL_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What libraries say that write without Python: torch's zip writer gives no reason at all.
FULL_DISK_WORDS = (
    "No space left",
    "File too large",
    "Disk quota exceeded",
    "PytorchStreamWriter failed",
    "basic_ios::clear: iostream error",
)


class FullDiskError(OSError):
    """A file could not be written as there is no room for it; the message names the file."""


@contextmanager
def replacing(path: Path, sum_path: Path | None = None, kept: str = "") -> Iterator[BinaryIO]:
    """A file that takes its place when the block ends, and is not there if it fails; the same at its address.

    Args:
        path (`Path`): Its place.
        sum_path (`Path`, *optional*):
            Of a second file with its SHA-256, written last. A file that has the same sum already is not replaced.
        kept (`str`, *optional*): What a full disk leaves, for the error.

    Raises:
        `FullDiskError`: There is no room for it.
    """
    digest = ""
    with explain_full_disk(path, kept), scratch_file(path) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
        if sum_path is not None:
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if is_intact(path, sum_path) and read_sum(sum_path) == digest:
                return
            remove(sum_path)
        if os.name == "nt":
            file.close()
        move(Path(file.name), path)
    if sum_path is not None:
        with replacing(sum_path, kept=kept) as file:
            file.write(digest.encode())


@contextmanager
def scratch_file(path: Path) -> Iterator[BufferedRandom]:
    """A hidden file beside `path` that is removed when the block ends, and by [`sweep`] if the process is killed."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PART_SUFFIX}")
    try:
        with open(temporary, "x+b") as file:
            _mark_in_use(file)
            yield file
    finally:
        temporary.unlink(missing_ok=True)


def move(source: Path, path: Path) -> None:
    """Moves a whole file to its place, and to its address if that is in the copy of one."""
    upload(source, path)
    os.replace(source, path)


def remove(path: Path) -> None:
    """Removes a file if it is there, at its address too."""
    remove_remote(path)
    path.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    r"""Writes UTF-8 with `\n` as it stands; an older file stays whole until the new one is."""
    with replacing(Path(path)) as file:
        file.write(text.encode("utf-8"))


def list_model_files(folder: Path) -> list[Path]:
    """The visible files directly in a model's folder that say what the model is, sorted by name."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    return [path for path in files if not path.name.endswith(NOT_OF_MODEL)]


def read_sum(sum_path: Path) -> str | None:
    """The SHA-256 in a file, or `None` where there is none or it is damaged."""
    try:
        text = sum_path.read_bytes()
    except FileNotFoundError:
        return None
    is_sum = len(text) == 64 and all(byte in b"0123456789abcdef" for byte in text)
    return text.decode() if is_sum else None


def compute_sum(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_intact(path: Path, sum_path: Path) -> bool:
    """Whether a file has the SHA-256 that stands in the other one."""
    expected = read_sum(sum_path)
    return expected is not None and path.is_file() and compute_sum(path) == expected


def read_json_object(path: Path, fix: str, names: Sequence[str] = ()) -> JsonObject:
    """The JSON object in a file of ours.

    Args:
        path (`Path`): The file.
        fix (`str`): What to do where it is damaged, a sentence.
        names (`Sequence[str]`, *optional*): What it must hold.

    Raises:
        `FileNotFoundError`: There is none.
        `ValueError`: It is damaged; names it and the fix.
    """
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`{name_place(path)}` is damaged ({type(error).__name__}: {error}). {fix}") from error
    missing = [name for name in names if not isinstance(value, dict) or name not in value]
    if missing or not isinstance(value, dict):
        what = f"has no {', '.join(map(repr, missing))}" if isinstance(value, dict) else "holds no JSON object"
        raise ValueError(f"`{name_place(path)}` is damaged (it {what}). {fix}")
    return value


def sweep(*folders: Path) -> None:
    """Removes files that killed processes left half written; those that are being written stay."""
    for folder in folders:
        for path in folder.glob(f".*{PART_SUFFIX}"):
            if path.is_file() and not _is_in_use(path):
                with contextlib.suppress(OSError):
                    path.unlink()


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, which the end of the process releases, however it ends.

    Processes that were launched together (`RANK` in the environment) share the work and hold it together.

    Raises:
        `BlockingIOError`: Another process holds it.
    """
    with contextlib.ExitStack() as stack:
        try:
            if int(os.environ.get("RANK", "0")) == 0:
                with contextlib.suppress(NotImplementedError):  # a file system without locks
                    stack.enter_context(FileLock(folder / LOCK_FILE, timeout=0))
        except Timeout:
            raise BlockingIOError(
                f"Another process is at work in `{name_place(folder)}`, and the two would write different results into "
                "it. Wait until it has finished, or choose another folder; `accelerate launch` lets processes share "
                "the work."
            ) from None
        yield


@contextmanager
def explain_full_disk(path: str | os.PathLike[str], kept: str = "") -> Iterator[None]:
    """Says in one sentence that there is no room, whichever library found out.

    Args:
        path (`str` or `os.PathLike`): What is written in the block.
        kept (`str`, *optional*): What is there nevertheless, as the end of the sentence.

    Raises:
        `FullDiskError`: In place of the errors of Python, safetensors and torch.
    """
    try:
        yield
    except FullDiskError:  # of a file that was written in the block
        raise
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        if (code := _find_full_disk(error)) is None:
            raise
        raise FullDiskError(
            code,
            f"`{path}` could not be written ({os.strerror(code)}){kept and f'; {kept}'}. Make room and repeat the call "
            "to go on from there",
        ) from error


def replace_model(folder: Path) -> None:
    """Moves the files in `folder/.export.part` to their places: a whole model, in place of what is there.

    Weights come first, then what says how to read them; weights of the model before go last, other files stay.
    """
    staging = folder / STAGING
    names = sorted(str(path.relative_to(staging)) for path in staging.rglob("*") if path.is_file())
    for name in names:
        with (staging / name).open("rb") as file:
            os.fsync(file.fileno())
    write_text(staging / FILE_LIST, json.dumps(names))
    os.replace(staging, folder / SEALED)  # which says that all files are on the disk, and listed
    finish_replacement(folder)


def finish_replacement(folder: str | os.PathLike[str]) -> None:
    """Finishes, or removes, what a killed process left of a model in its folder; does nothing anywhere else.

    Args:
        folder (`str` or `os.PathLike`): Folder of a model, or a Hub id, which has no such folder.
    """
    folder = Path(folder)
    if (folder / STAGING).is_dir():
        shutil.rmtree(folder / STAGING)
    if (folder / SEALED).is_dir():
        _move_in(folder / SEALED, folder)


def _find_full_disk(error: BaseException | None) -> int | None:
    """The number of the error that says so, of this one or of one that it came from; closing a file hides the first."""
    while error is not None:
        code = getattr(error, "errno", None)
        if code in FULL_DISK_ERRORS:
            return code
        if any(word in str(error) for word in FULL_DISK_WORDS):
            return errno.ENOSPC
        error = error.__cause__ or error.__context__
    return None


def _mark_in_use(file: BinaryIO) -> None:
    """Locks a file for this process, as long as it is open."""
    if fcntl is not None:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_in_use(path: Path) -> bool:
    if fcntl is None:
        return False
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, FileNotFoundError)
    return False


def _move_in(sealed: Path, output_dir: Path) -> None:
    """Moves whole files to their places, from wherever an earlier call was killed."""
    if not (sealed / FILE_LIST).exists():  # the last that is removed, when all is in its place
        shutil.rmtree(sealed)
        return
    names = set(json.loads((sealed / FILE_LIST).read_text(encoding="utf-8")))
    for file in sorted(sealed.rglob("*"), key=lambda path: (_rank(path.name), str(path))):
        name = str(file.relative_to(sealed))
        # PEFT writes a README of its own; a model card that is there is worth more
        if not file.is_file() or name == FILE_LIST or (name == "README.md" and (output_dir / name).exists()):
            continue
        (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, output_dir / name)
    # The configuration of an adapter makes its folder one: without it, a full model beside it counts.
    patterns = (*WEIGHT_PATTERNS, SERVING_FILE)  # which states the sums of the weights before
    stale = {path for pattern in patterns for path in output_dir.glob(pattern) if path.name not in names}
    for path in sorted(stale, key=lambda path: (path.name != ADAPTER_CONFIG, path.name)):
        path.unlink()
    shutil.rmtree(sealed)


def _rank(name: str) -> int:
    """In which order files take their places: weights, then what says how to read them, then the rest."""
    is_weight = any(fnmatch(name, pattern) for pattern in WEIGHT_PATTERNS) and name != ADAPTER_CONFIG
    return 0 if is_weight else 1 if name in ("config.json", ADAPTER_CONFIG) else 2
