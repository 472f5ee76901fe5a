"""Work that survives a kill: results in shards on disk, each whole or not there, under a manifest of what made them."""

import hashlib
import json
import os
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

WORK_FOLDER = ".shards"  # hidden, so that `load_dataset(output_dir)` sees the finished data set and nothing else
MANIFEST = "manifest.json"
FINISHED = "responses.parquet"


class ShardStore:
    """Shards of one run in `output_dir/.shards`, and the finished data set in `output_dir/responses.parquet`.

    Every file is written beside its place and moved there (`os.replace`), with its SHA-256 in a second file written
    last. A file without its matching sum counts as absent, whether the process was killed, the disk was full or
    somebody cut it. Two processes that write the same run write the same bytes.

    Args:
        output_dir (`str` or `Path`): Created if needed.

    Raises:
        `OSError`: If nothing can be written there.
    """

    def __init__(self, output_dir: str | Path):
        self.output_dir = Path(output_dir)
        self.folder = self.output_dir / WORK_FOLDER
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder) as probe:
                probe.write(b"x")
        except OSError as error:
            raise OSError(
                f"`output_dir={str(output_dir)!r}` cannot be written to ({error}). Choose another folder."
            ) from error

    def open_run(self, fingerprint: dict[str, object], about: dict[str, object]) -> None:
        """Starts the run with this fingerprint, or continues it.

        Args:
            fingerprint (`dict`): Everything that the results depend on; JSON values.
            about (`dict`): Written down for people and not compared.

        Raises:
            `ValueError`: If the folder holds results of another run; names every setting that differs.
        """
        path = self.folder / MANIFEST
        if not path.exists():
            if (self.output_dir / FINISHED).exists():
                raise ValueError(
                    f"`{self.output_dir}` has a {FINISHED} that no run of this kind started. Choose another folder."
                )
            content = json.dumps({"fingerprint": fingerprint, "about": about}, indent=2, ensure_ascii=False)
            _replace(path, content.encode())
            return
        found = json.loads(path.read_text(encoding="utf-8"))["fingerprint"]
        if found != fingerprint:
            names = [k for k in {**found, **fingerprint} if found.get(k) != fingerprint.get(k)]
            listed = "; ".join(f"{k}: {found.get(k)} in the folder, {fingerprint.get(k)} now" for k in names)
            raise ValueError(
                f"`{self.output_dir}` holds responses of another run ({listed}). Choose another folder, delete "
                "this one, or repeat the call with the settings of the folder to continue it."
            )

    def read(self, shard: int) -> pa.Table | None:
        """The shard, or `None` where it is absent or damaged."""
        return _read_checked(self._path(shard))

    def write(self, shard: int, table: pa.Table) -> None:
        """Writes the shard; it is there as a whole or not at all."""
        _write_checked(self._path(shard), table)

    def finish(self, dataset: Dataset) -> None:
        """Writes the finished data set, unless the same one is there and whole."""
        table = dataset.with_format("arrow")[:].replace_schema_metadata(dataset.features.arrow_schema.metadata)
        _write_checked(self.output_dir / FINISHED, table, self.folder)

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.parquet"


def _sum_path(path: Path, folder: Path | None = None) -> Path:
    return (folder or path.parent) / f"{path.name}.sha256"


def _is_intact(path: Path, folder: Path | None = None) -> bool:
    try:
        return _sum_path(path, folder).read_text() == hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return False


def _read_checked(path: Path) -> pa.Table | None:
    return pq.read_table(pa.BufferReader(path.read_bytes())) if _is_intact(path) else None


def _write_checked(path: Path, table: pa.Table, folder: Path | None = None) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    content = sink.getvalue().to_pybytes()
    digest = hashlib.sha256(content).hexdigest()
    if _is_intact(path, folder) and _sum_path(path, folder).read_text() == digest:
        return
    _sum_path(path, folder).unlink(missing_ok=True)
    _replace(path, content)
    _replace(_sum_path(path, folder), digest.encode())


def _replace(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"`{path}` could not be written ({error.strerror}); finished shards are kept. Make room and repeat the "
            "call to go on from there",
        ) from error
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
