"""Work that survives a kill: results lie in shards on disk, each whole or absent, with a manifest of their settings.

The ids that the work reads lie in memory, or on disk as well.
"""

import io
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spec_kd.addresses import HERE_ONLY, check_writable, name_place
from spec_kd.copies import open_folder
from spec_kd.files import is_intact, read_json_object, replacing, sweep
from spec_kd.options import read_path

WORK_FOLDER = ".shards"  # hidden, so that `load_dataset(output_dir)` finds the finished dataset only
MANIFEST = "manifest.json"
FINISHED = "responses.parquet"
MAPPED = f"{HERE_ONLY}/responses.arrow"
KEPT = "finished shards are kept"
FORMAT = 1  # of manifests and shards; those without the number have this one


class IdLists(Sequence[list[int]]):
    """Lists of ids, stored as int32 one after the other: 4 bytes per id, in memory or in a memory-mapped file.

    Args:
        lists (`Iterable[list[int]]`): The lists, read once.
        folder (`Path`, *optional*): Folder of the file, which is deleted with this object; in memory by default.

    Attributes:
        lengths (`np.ndarray`): Length of every list, int64 `(N,)`.

    Raises:
        `OSError`: The file cannot be written.
    """

    def __init__(self, lists: Iterable[list[int]], folder: Path | None = None):
        file = io.BytesIO() if folder is None else tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        lengths = []
        for ids in lists:
            file.write(np.asarray(ids, dtype=np.int32).tobytes())
            lengths.append(len(ids))
        self.lengths = np.array(lengths, dtype=np.int64)
        self._ends = np.cumsum(self.lengths)
        file.seek(0)
        self._ids = np.frombuffer(file.read(), np.int32) if folder is None else np.memmap(file, np.int32, "r")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> list[int]:  # type: ignore[override]  # nobody wants a slice of it
        end = int(self._ends[index])
        return self._ids[end - int(self.lengths[index]) : end].tolist()


class ShardStore:
    """Shards of one run in `output_dir/.shards`, and the finished dataset in `output_dir/responses.parquet`.

    Every file is written under another name and then moved (`os.replace`), and its SHA-256 is written last, to a second
    file. A file without a matching sum counts as absent: the process was killed, the disk was full or lost a bit, or
    somebody cut the file.

    Nothing has to fit into memory: shards are Arrow files without compression, which can be memory-mapped, and the
    finished dataset has such a copy in `output_dir/.arrow`. That folder, where `datasets` also keeps what is mapped
    from the set, may be deleted; the next call with the settings of the run creates it again.

    Args:
        output_dir (`str` or `os.PathLike`): Folder or address of the run, created if needed. At an address every file
            but those in `.arrow` is uploaded when it is whole.

    Attributes:
        name (`str`): The folder or address, for messages.
        output_dir (`Path`): The folder; of an address its copy on this machine.
        folder (`Path`): Folder of the shards.
        mapped (`Path`): The finished dataset as an Arrow file, which can be memory-mapped.

    Raises:
        `ValueError`: The name is empty.
        `OSError`: Nothing can be written there.
        `ImportError`: The package for the address is not installed.
    """

    def __init__(self, output_dir: str | os.PathLike[str]):
        self.output_dir = open_folder(read_path("output_dir", output_dir, takes_address=True), "*")
        self.name = name_place(self.output_dir)
        self.folder, self.mapped = self.output_dir / WORK_FOLDER, self.output_dir / MAPPED
        try:
            for folder in (self.folder, self.mapped.parent):
                folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder) as probe:
                probe.write(b"x")
            check_writable(self.output_dir)
        except OSError as error:
            raise OSError(
                f"`output_dir={str(output_dir)!r}` cannot be written to ({error}). Choose another folder."
            ) from error

    def open_run(self, fingerprint: dict[str, object], about: dict[str, object]) -> None:
        """Starts the run with this fingerprint, or continues it.

        Args:
            fingerprint (`dict`): Everything that the results depend on, as JSON values.
            about (`dict`): Facts for people, which are not compared.

        Raises:
            `ValueError`: The folder holds results of another run (the message names every setting that differs), or
                its manifest is damaged.
        """
        path = self.folder / MANIFEST
        sweep(self.output_dir, self.folder, self.mapped.parent)
        if not path.exists():
            if (self.output_dir / FINISHED).exists():
                raise ValueError(
                    f"`{self.name}` has a {FINISHED} that no run of this kind started. Choose another folder."
                )
            with replacing(path, kept=KEPT) as file:
                manifest = {"format": FORMAT, "fingerprint": fingerprint, "about": about}
                file.write(json.dumps(manifest, indent=2, ensure_ascii=False).encode())
            return
        found = read_manifest(path)
        if found != fingerprint:
            listed = "; ".join(
                f"{name}: {found.get(name)} in the folder, {fingerprint.get(name)} now"
                for name in {**found, **fingerprint}
                if found.get(name) != fingerprint.get(name)
            )
            raise ValueError(
                f"`{self.name}` holds responses of another run ({listed}). Choose another folder, delete "
                "this one, or repeat the call with the settings of the folder to continue it."
            )

    def refresh(self) -> None:
        """Fetches what other machines have written to the address of the run; does nothing for a local folder."""
        open_folder(self.name, "*")

    def read(self, shard: int) -> pa.Table | None:
        """The shard, memory-mapped; `None` if it is absent or damaged."""
        path = self._path(shard)
        if not is_intact(path, _sum_path(path)):
            return None
        with pa.memory_map(str(path)) as file:  # the table keeps its mapping when the file is closed
            table = pa.ipc.open_file(file).read_all()
        if "unusable_prompt" not in table.column_names:  # shards of format 1 may lack that column
            table = table.append_column("unusable_prompt", pa.nulls(len(table), pa.string()))
        return table

    def write(self, shard: int, table: pa.Table) -> None:
        """Writes the shard, as a whole or not at all."""
        path = self._path(shard)
        with replacing(path, _sum_path(path), KEPT) as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)

    def finish(self, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
        """Writes the finished dataset in both forms, unless the same one is there and whole.

        Args:
            tables (`Iterable[pa.Table]`): Parts of the dataset in order; each becomes a row group.
            schema (`pa.Schema`): Schema of all tables, with the features of the dataset as metadata.
        """
        finished = self.output_dir / FINISHED
        with (
            replacing(finished, _sum_path(finished, self.folder), KEPT) as parquet_file,
            replacing(self.mapped, _sum_path(self.mapped), KEPT) as mapped_file,
            _open_parquet(parquet_file, schema) as parquet_writer,
            pa.ipc.new_stream(mapped_file, schema) as mapped_writer,
        ):
            for table in tables:
                parquet_writer.write_table(table)
                mapped_writer.write_table(table)

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.arrow"


def read_manifest(path: Path) -> dict[str, object]:
    """The fingerprint in a manifest; raises `ValueError` if the manifest is damaged or has another format."""
    fix = (
        f"It says which settings the shards in `{name_place(path.parent)}` were made with. Restore the file, or delete "
        "that folder and what lies beside it to begin again."
    )
    manifest = read_json_object(path, fix, ("fingerprint",))
    if manifest.get("format", 1) != FORMAT:
        raise ValueError(
            f"`{name_place(path.parent)}` has the format {manifest['format']!r}, and this version of spec_kd reads "
            f"{FORMAT}. Upgrade spec_kd, or choose another folder."
        )
    fingerprint = manifest["fingerprint"]
    if not isinstance(fingerprint, dict):
        raise ValueError(f"`{name_place(path)}` is damaged (its fingerprint is {fingerprint!r}). {fix}")
    return fingerprint


def _open_parquet(file: BinaryIO, schema: pa.Schema) -> pq.ParquetWriter:
    """A writer whose encodings suit ids and log-probabilities.

    Parquet's dictionaries make lists of floats a third larger and those of ids no smaller.
    """
    leaves = [
        f"{field.name}.list.element"
        for field in schema
        if pa.types.is_list(field.type) and pa.types.is_floating(field.type.value_type)
    ]
    return pq.ParquetWriter(
        file, schema, compression="zstd", use_dictionary=False, use_byte_stream_split=leaves, write_page_checksum=True
    )


def _sum_path(path: Path, folder: Path | None = None) -> Path:
    return (folder or path.parent) / f"{path.name}.sha256"
