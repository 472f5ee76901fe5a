"""Short hashes of the files and models that a step depends on."""

import contextlib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from spec_kd.addresses import RemoteFile
from spec_kd.cli.paths import list_files
from spec_kd.copies import fetch
from spec_kd.files import compute_sum, list_model_files, read_json_object, write_text
from spec_kd.open_types import JsonObject, Record


class Fingerprints:
    """Identifies datasets and models by short hashes: of the content of files, and of names on the Hub.

    A file counts by its content (SHA-256), so that it may be moved, copied or touched. The hash of a file is computed
    once and remembered, by its path, size and time of modification. A name on the Hub counts as such, with the revision
    that the options name. The content on the Hub is not compared, so pin a revision where it may change.

    Args:
        memory (`Path`, *optional*): File that keeps hashes between runs; they are not kept by default.
    """

    def __init__(self, memory: Path | None = None):
        self._memory = memory
        self._known: JsonObject = {}
        if memory is not None and memory.exists():
            with contextlib.suppress(ValueError):  # damaged: what it remembers can be computed again
                self._known = read_json_object(memory, "")

    def of_data(self, source: str) -> str:
        """The hash of a file, or of all files of a folder with their names in it; a name on the Hub as it is.

        What is at an address is copied here first, and counts as the same files in a local folder.
        """
        path = fetch(source)
        if path.is_file():
            return self._of_file(path)
        return self._of_folder(path, list_files(path)) if path.is_dir() else source

    def of_files(self, paths: Iterable[Path | RemoteFile]) -> dict[str, str]:
        """The hashes of files by their paths; of one at an address what its store says of its version."""
        return {
            str(path): self._of_file(path) if isinstance(path, Path) else f"{path.size} {path.tag}" for path in paths
        }

    def of_model(self, source: str | None) -> str | None:
        """The hash of the files directly in a model's folder; a name on the Hub as it is."""
        if source is None or not Path(source).is_dir():
            return source
        return self._of_folder(Path(source), list_model_files(Path(source)))

    def _of_folder(self, folder: Path, files: Iterable[Path]) -> str:
        return hash_json({str(file.relative_to(folder)): self._of_file(file) for file in files})

    def _of_file(self, path: Path) -> str:
        state, name = path.stat(), str(path.resolve())
        known = self._known.get(name)
        if isinstance(known, list) and known[:2] == [state.st_size, state.st_mtime_ns] and isinstance(known[-1], str):
            return known[-1]
        digest = compute_sum(path)
        self._known[name] = [state.st_size, state.st_mtime_ns, digest]
        if self._memory is not None:
            write_text(self._memory, json.dumps(self._known, indent=1))
        return digest


def hash_json(value: Record) -> str:
    """The SHA-256 of JSON values, and of the text of anything else."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
