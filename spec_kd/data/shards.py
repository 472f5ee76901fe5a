"""Work that survives a kill: results in shards on disk, each whole or not there, under a manifest of what made them."""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from spec_kd.checks import read_path
from spec_kd.files import alone_in, is_intact, read_json_object, replacing, sweep

WORK_FOLDER = ".shards"  # hidden, so that `load_dataset(output_dir)` sees the finished dataset and nothing else
MAPPED_FOLDER = ".arrow"
MANIFEST = "manifest.json"
FINISHED = "responses.parquet"
MAPPED = "responses.arrow"
KEPT = "finished shards are kept"


class ShardStore:
    """Shards of one run in `output_dir/.shards`, and the finished dataset in `output_dir/responses.parquet`.

    Every file is written beside its place and moved there (`os.replace`), with its SHA-256 in a second file written
    last. A file without its matching sum counts as absent, whether the process was killed, the disk was full, the disk
    lost a bit or somebody cut it.

    Nothing has to fit into memory: shards are Arrow files without compression, which can be memory-mapped, and the
    finished dataset has a copy of that kind in `output_dir/.arrow`. That folder, where `datasets` also keeps what is
    mapped from the set, may be deleted; the next call with the settings of the run makes it anew.

    Args:
        output_dir (`str` or `os.PathLike`): Created if needed.

    Raises:
        `ValueError`: The name is empty.
        `OSError`: If nothing can be written there.
    """

    def __init__(self, output_dir: str | os.PathLike[str]):
        self.output_dir = Path(read_path("output_dir", output_dir))
        self.folder = self.output_dir / WORK_FOLDER
        self._mapped = self.output_dir / MAPPED_FOLDER / MAPPED
        try:
            for folder in (self.folder, self._mapped.parent):
                folder.mkdir(parents=True, exist_ok=True)
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
            `ValueError`: If the folder holds results of another run; names every setting that differs. If the note of
                its settings is damaged.
        """
        path = self.folder / MANIFEST
        sweep(self.output_dir, self.folder, self._mapped.parent)
        if not path.exists():
            if (self.output_dir / FINISHED).exists():
                raise ValueError(
                    f"`{self.output_dir}` has a {FINISHED} that no run of this kind started. Choose another folder."
                )
            with replacing(path, kept=KEPT) as file:
                manifest = {"fingerprint": fingerprint, "about": about}
                file.write(json.dumps(manifest, indent=2, ensure_ascii=False).encode())
            return
        found = read_manifest(path)
        if found != fingerprint:
            names = [k for k in {**found, **fingerprint} if found.get(k) != fingerprint.get(k)]
            listed = "; ".join(f"{k}: {found.get(k)} in the folder, {fingerprint.get(k)} now" for k in names)
            raise ValueError(
                f"`{self.output_dir}` holds responses of another run ({listed}). Choose another folder, delete "
                "this one, or repeat the call with the settings of the folder to continue it."
            )

    @contextmanager
    def alone(self, is_needed: bool) -> Iterator[None]:
        """Keeps other processes out of the folder until the block or the process ends, where that is needed.

        Raises:
            `BlockingIOError`: One is at work there.
        """
        with alone_in(self.folder) if is_needed else nullcontext():
            yield

    def read(self, shard: int) -> pa.Table | None:
        """The shard, memory-mapped, or `None` where it is absent or damaged."""
        path = self._path(shard)
        if not is_intact(path, _sum_path(path)):
            return None
        with pa.memory_map(str(path)) as file:  # closed, the table still has its mapping, and no file is left open
            table = pa.ipc.open_file(file).read_all()
        if "unusable_prompt" not in table.column_names:  # of a run that was begun before there was that column
            table = table.append_column("unusable_prompt", pa.nulls(len(table), pa.string()))
        return table

    def write(self, shard: int, table: pa.Table) -> None:
        """Writes the shard; it is there as a whole or not at all."""
        path = self._path(shard)
        with replacing(path, _sum_path(path), KEPT) as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)

    def finish(self, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
        """Writes the finished dataset, in both forms, unless the same one is there and whole.

        Args:
            tables (`Iterable[pa.Table]`): One after the other; each becomes a row group.
            schema (`pa.Schema`): Of all of them, with the features of the dataset as metadata.
        """
        finished, mapped = self.output_dir / FINISHED, self._mapped
        with (
            replacing(finished, _sum_path(finished, self.folder), KEPT) as parquet_file,
            replacing(mapped, _sum_path(mapped), KEPT) as mapped_file,
            _open_parquet(parquet_file, schema) as parquet_writer,
            pa.ipc.new_stream(mapped_file, schema) as mapped_writer,
        ):
            for table in tables:
                parquet_writer.write_table(table)
                mapped_writer.write_table(table)

    def open_finished(self) -> Dataset:
        """The finished dataset, memory-mapped."""
        return Dataset.from_file(str(self._mapped))

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.arrow"


def read_manifest(path: Path) -> dict[str, object]:
    """The fingerprint in a manifest; raises `ValueError` where it is damaged."""
    fix = (
        f"It says which settings the shards in `{path.parent}` were made with. Restore the file, or delete that folder "
        "and what lies beside it to begin again."
    )
    fingerprint = read_json_object(path, fix, ("fingerprint",))["fingerprint"]
    if not isinstance(fingerprint, dict):
        raise ValueError(f"`{path}` is damaged (its fingerprint is {fingerprint!r}). {fix}")
    return fingerprint


def _open_parquet(file: BinaryIO, schema: pa.Schema) -> pq.ParquetWriter:
    """A writer whose encodings suit ids and log-probabilities.

    Parquet's dictionaries make lists of floats a third larger and those of ids no smaller.
    """
    floats = [
        field.name for field in schema if pa.types.is_list(field.type) and pa.types.is_floating(field.type.value_type)
    ]
    leaves = [f"{name}.list.element" for name in floats]
    return pq.ParquetWriter(
        file, schema, compression="zstd", use_dictionary=False, use_byte_stream_split=leaves, write_page_checksum=True
    )


def _sum_path(path: Path, folder: Path | None = None) -> Path:
    return (folder or path.parent) / f"{path.name}.sha256"
