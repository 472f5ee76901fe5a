"""Copies on this machine of what lies at addresses, brought up to date when a call begins."""

import os
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from filelock import FileLock

from spec_kd.addresses import (
    download,
    drop_copy,
    exists,
    find_copy,
    is_address,
    is_copied,
    list_copies,
    list_remote,
    name_place,
    note_copy,
)
from spec_kd.files import scratch_file

SUM_SUFFIX = ".sha256"


def fetch(path: str | os.PathLike[str]) -> Path:
    """The path itself; of an address the copy of what is there now, without hidden files such as shards.

    Sums that lie beside a file come with it.

    Raises:
        `FileNotFoundError`: There is nothing at the address, or no such bucket.
        `OSError`: It cannot be reached, or there is no room for the copy.
        `ImportError`: The package of the store is not installed.
    """
    if not is_address(path):
        return Path(path)
    copy = find_copy(str(path))
    if not _update(str(path), copy, lambda name: not _is_hidden(name) or name.endswith(SUM_SUFFIX)):
        raise FileNotFoundError(f"There is nothing at `{path}`.")
    if copy.is_file():
        for place in list_sums(copy):
            _update(name_place(place), place, lambda _: True)
    return copy


def list_sums(path: Path) -> tuple[Path, ...]:
    """Where the file with the SHA-256 of another one may be."""
    name = f"{path.name}{SUM_SUFFIX}"
    return path.with_name(f".{name}"), path.parent / ".shards" / name, path.with_name(name)


def open_folder(path: str | os.PathLike[str], *names: str) -> Path:
    """A folder to write to: the path itself, or the copy of an address.

    What [`~spec_kd.files.replacing`] and its neighbors write below the copy is uploaded, but for what lies in folders
    named `.arrow`.

    Args:
        path (`str` or `os.PathLike`): The folder or its address; neither need exist. A copy is created.
        names (`str`): Patterns of the files there that are needed here; `*` for all.

    Raises:
        `OSError`: The address cannot be reached, or there is no room for the copy.
        `ImportError`: The package of the store is not installed.
    """
    if not is_address(path):
        return Path(path)
    copy = find_copy(str(path))
    if names:
        _update(str(path), copy, lambda name: any(fnmatchcase(name, pattern) for pattern in names))
    copy.mkdir(parents=True, exist_ok=True)
    return copy


def find_file(path: str | os.PathLike[str], name: str) -> Path:
    """A file that is given by itself or by its folder; of an address its copy, where nothing else is copied.

    Raises:
        `OSError`: The address cannot be reached.
    """
    if not is_address(path):
        return Path(path, name) if Path(path).is_dir() else Path(path)
    inside = f"{path}/{name}"
    return fetch(inside if exists(inside) else path)


def _update(address: str, copy: Path, is_wanted: Callable[[str], bool]) -> bool:
    """Makes a copy what is at its address now, as far as it is wanted; returns whether anything is there."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(copy.with_name(f".{copy.name}.lock")):
        # Before the listing: a file is uploaded before it takes its place, so one that is not listed is gone.
        copied = list_copies(copy)
        found = {find_copy(file.address): file for file in list_remote(address)}
        for gone in copied - found.keys():
            drop_copy(gone)
        for place, file in found.items():
            if is_wanted(place.relative_to(copy).as_posix()) and not is_copied(file, place):
                place.parent.mkdir(parents=True, exist_ok=True)
                with scratch_file(place) as scratch:
                    download(file, Path(scratch.name))
                    os.replace(scratch.name, place)
                note_copy(place, file)
    return bool(found)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)
