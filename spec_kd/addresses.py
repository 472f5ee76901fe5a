"""Data at addresses: `s3://`, `gs://`, `hf://` and all others of fsspec. No other module speaks to a store.

A set or a report at an address has a copy on this machine, in which a run works as in any local folder. Each file is
uploaded when it is whole, and before it takes its place in the copy: the address never has less than the copy. Logs
have no copy, they are read where they lie.
"""

import contextlib
import io
import json
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, cast

from huggingface_hub.constants import HF_HOME

from spec_kd.open_types import Argument, JsonObject

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
SHORTENED = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:/[^/]")  # what `Path` makes of one; `C:/` is a drive
LOCAL = ("file://", "local://")
COPIES = Path(HF_HOME).absolute() / "spec_kd"  # by protocol and path
TAGS = ".tags"
PART_SUFFIX = ".part"  # of files that are being written
HERE_ONLY = ".arrow"  # folders whose files can be made again, and have to be mapped into memory
# Stores in which an upload appears at once or not at all. Anywhere else a file is moved to its place.
OBJECT_STORES = {"s3", "gs", "az", "abfs", "hf", "oss", "oci", "memory"}
# Which of them tells the versions of a file apart: the first that a store knows.
TAG_KEYS = ("ETag", "etag", "blob_id", "xet_hash", "md5Hash", "mtime", "LastModified", "last_modified", "created")
BLOCK_SIZE = 2**23  # bytes of a log read at a time


class AddressError(RuntimeError):
    """A log cannot be read on; no error of one record, so it ends the call."""


@dataclass(frozen=True)
class RemoteFile:
    """A file at an address, with what of `Path` the reading of logs needs.

    Args:
        address (`str`): Its address.
        size (`int`): Bytes; -1 if the store does not say.
        tag (`str`): Changes when the file does; empty if the store does not say.
    """

    address: str
    size: int = field(compare=False)
    tag: str = field(compare=False)

    def __str__(self) -> str:
        return self.address

    @property
    def name(self) -> str:
        """The last part of the address."""
        return PurePosixPath(self.address).name

    def relative_to(self, folder: str) -> PurePosixPath:
        """The path below an address."""
        return PurePosixPath(self.address.removeprefix(folder.rstrip("/")).lstrip("/"))

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """Opens the file for reading; errors of the store are `AddressError`s."""
        return io.BufferedReader(_Reader(self.address, mode), BLOCK_SIZE)


class _Reader(io.RawIOBase):
    """A file of fsspec whose errors name its address."""

    def __init__(self, address: str, mode: str):
        self._address, self._file = address, cast(Argument, None)
        with self._explaining():
            store, place = connect(address)
            self._file = store.open(place, mode, block_size=BLOCK_SIZE)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Argument) -> int:
        with self._explaining():
            return self._file.readinto(buffer)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise AddressError(
                f"`{self._address}` cannot be read ({type(error).__name__}: {error}). Repeat the call."
            ) from error


def is_address(path: object) -> bool:
    """Whether a path is an address, and not one of this machine."""
    return isinstance(path, str) and ADDRESS.match(path) is not None and not path.startswith(LOCAL)


def is_pattern(address: str) -> bool:
    """Whether an address stands for all files that it matches."""
    return any(sign in address for sign in "*?[")


def find_copy(address: str) -> Path:
    """The place of the copy of what is at an address.

    Raises:
        `ValueError`: The address has an empty part, or one of dots.
    """
    protocol, _, path = address.partition("://")
    parts = path.strip("/").split("/")
    if {"", ".", ".."} & set(parts):
        raise ValueError(f"`{address}` has an empty part, `.` or `..`. Write the address without them.")
    return COPIES.joinpath(protocol, *parts)


def name_place(path: Path) -> str:
    """The address that a path is a copy of, or the path itself, as messages name it."""
    if not path.is_relative_to(COPIES):
        return str(path)
    protocol, *parts = path.relative_to(COPIES).parts
    return f"{protocol}://{'/'.join(parts)}"


def connect(address: str) -> "tuple[AbstractFileSystem, str]":
    """The store of an address, configured by its own environment variables and fsspec's, and the path in it.

    Raises:
        `ImportError`: Its package is not installed; names it.
        `ValueError`: There is no such kind of address.
    """
    import fsspec

    try:
        store, place = fsspec.core.url_to_fs(address)
    except ImportError as error:
        raise ImportError(f"`{address}` cannot be reached: {error}.") from error
    except ValueError as error:
        raise ValueError(f"`{address}` is no address that fsspec knows ({error}).") from error
    store.invalidate_cache()  # others write there too
    return store, place


@contextmanager
def reaching(address: str) -> Iterator[None]:
    """Names the address in errors of its store.

    Raises:
        `FileNotFoundError`: There is no such bucket, repository or file.
        `OSError`: Anything else that a store says.
    """
    try:
        yield
    except (ImportError, ValueError) as error:
        if f"`{address}`" in str(error):
            raise
        raise OSError(f"`{address}` cannot be reached ({type(error).__name__}: {error}).") from error
    except Exception as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        raise kind(
            f"`{address}` cannot be reached ({type(error).__name__}: {error}). Check that its bucket or repository "
            "exists, and the credentials of this machine."
        ) from error


def exists(address: str) -> bool:
    """Whether a file or folder is at an address.

    Raises:
        `OSError`: It cannot be reached.
        `ImportError`: The package of the store is not installed.
    """
    with reaching(address):
        store, place = connect(address)
        return bool(store.exists(place))


def list_remote(address: str) -> list[RemoteFile]:
    """All whole files at or below an address, or that a pattern with `*` matches, sorted; none if there is nothing.

    Raises:
        `OSError`: It cannot be reached.
        `ImportError`: The package of the store is not installed.
    """
    with reaching(address):
        store, place = connect(address)
        try:
            found = store.glob(place, detail=True) if is_pattern(address) else store.find(place, detail=True)
        except FileNotFoundError:
            found = {}
        if not any(found.values()) and store.isfile(place):  # of a web server, which lists links alone
            found = {place: store.info(place)}
        files = []
        for name, info in sorted(found.items()):
            # some stores mark folders by a slash
            if info.get("type") == "file" and not name.endswith(("/", PART_SUFFIX)):
                matched = f"{address.partition('://')[0]}://{name.lstrip('/')}"
                below = address.rstrip("/") + name.removeprefix(place.rstrip("/"))
                files.append(RemoteFile(matched if is_pattern(address) else below, *_read_state(info)))
        return files


def download(file: RemoteFile, target: Path) -> None:
    """Writes a file at an address to one here, and raises `OSError` if it is not whole."""
    with reaching(file.address):
        store, place = connect(file.address)
        store.get_file(place, str(target))
    if file.size not in (-1, target.stat().st_size):
        raise OSError(
            f"`{file.address}` has {file.size} bytes, but {target.stat().st_size} were read. Repeat the call."
        )


def upload(source: Path, path: Path) -> None:
    """Uploads a whole file to where `path` is the copy of, as a whole or not at all; does nothing for other paths.

    Args:
        source (`Path`): The file, which takes its place in the copy afterwards.
        path (`Path`): Its place there.
    """
    if not _has_address(path):
        return
    address = name_place(path)
    with reaching(address):
        store, place = connect(address)
        protocols = {store.protocol} if isinstance(store.protocol, str) else set(store.protocol)
        if protocols & OBJECT_STORES:
            store.put_file(str(source), place)
        else:
            folder, _, name = place.rpartition("/")
            store.makedirs(folder, exist_ok=True)
            part = f"{folder}/.{name}.{uuid.uuid4().hex[:8]}{PART_SUFFIX}"
            try:
                store.put_file(str(source), part)
                store.mv(part, place)
            except BaseException:
                with contextlib.suppress(Exception):
                    store.rm_file(part)
                raise
        note_copy(path, RemoteFile(address, *_read_state(store.info(place))), source)


def remove_remote(path: Path) -> None:
    """Removes the file that `path` is the copy of, if there is one; does nothing for other paths."""
    if _has_address(path):
        address = name_place(path)
        with reaching(address):
            store, place = connect(address)
            if store.exists(place):
                store.rm_file(place)
        _find_note(path).unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raises `OSError` unless files can be written to where a folder is the copy of; does nothing for others."""
    if _has_address(folder):
        address = name_place(folder)
        with reaching(address):
            store, place = connect(f"{address}/.{uuid.uuid4().hex[:8]}{PART_SUFFIX}")
            store.pipe_file(place, b"x")
            store.rm_file(place)


def is_copied(file: RemoteFile, copy: Path) -> bool:
    """Whether a copy is of this version of a file, and has not been changed here."""
    try:
        noted = json.loads(_find_note(copy).read_text(encoding="utf-8"))
        return bool(file.tag) and noted == _describe_copy(file, copy)
    except (OSError, ValueError):
        return False


def note_copy(copy: Path, file: RemoteFile, source: Path | None = None) -> None:
    """Notes that a file here, which `source` has until it takes its place, is that of an address."""
    note = _find_note(copy)
    note.parent.mkdir(parents=True, exist_ok=True)
    part = note.with_name(f".{note.name}.{uuid.uuid4().hex[:8]}")
    part.write_text(json.dumps(_describe_copy(file, source or copy)), encoding="utf-8")
    os.replace(part, note)


def list_copies(path: Path) -> set[Path]:
    """Files at or below a place that are copies of what was at an address."""
    folder = COPIES / TAGS / path.relative_to(COPIES)
    notes = [_find_note(path), *folder.rglob("*.json")]
    return {COPIES / note.relative_to(COPIES / TAGS).with_suffix("") for note in notes if note.is_file()}


def drop_copy(copy: Path) -> None:
    """Removes a file here that is no longer at its address."""
    copy.unlink(missing_ok=True)
    _find_note(copy).unlink(missing_ok=True)


def _has_address(path: Path) -> bool:
    return path.is_relative_to(COPIES) and HERE_ONLY not in path.parts


def _find_note(copy: Path) -> Path:
    place = COPIES / TAGS / copy.relative_to(COPIES)
    return place.with_name(f"{place.name}.json")


def _describe_copy(file: RemoteFile, copy: Path) -> JsonObject:
    state = copy.stat()
    return {"tag": file.tag, "size": state.st_size, "mtime_ns": state.st_mtime_ns}


def _read_state(info: JsonObject) -> tuple[int, str]:
    """Size and tag of what a store says of a file."""
    tag = next((str(info[key]) for key in TAG_KEYS if info.get(key)), "")
    return -1 if info.get("size") is None else int(info["size"]), tag
