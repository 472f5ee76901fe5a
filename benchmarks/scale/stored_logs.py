"""The same log read from a folder and from an S3 server on this machine, and its prompts written back there.

    python -m benchmarks.scale.stored_logs                       # a million lines
    python -m benchmarks.scale.stored_logs --lines 10000000 --scratch DIR  # hours, and 45 GB of disk

Both runs are processes of their own, measured as by `benchmarks.scale.logs`; the server is not. Prompts are
compared row for row in all columns; of the source, which names a place, the file name is. Writes stored_logs.json to
benchmarks/results/scale.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pyarrow as pa

from benchmarks.harness import describe_machine
from benchmarks.scale.growth import FOLDER
from benchmarks.scale.logs import run_apart
from benchmarks.scale.made_logs import make_log

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
BUCKET = "s3://logs"
SPLITS = ("train.arrow", "test.arrow")


@contextmanager
def serve_s3(folder: Path) -> Iterator[None]:
    """A server of moto's, whose objects are files in a folder; this process and its children use it for `s3://`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    objects = {**os.environ, "TMPDIR": str(folder), "MOTO_S3_DEFAULT_KEY_BUFFER_SIZE": str(2**20)}
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, env=objects, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            os.environ |= {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
            wait_for(port)
            fsspec.filesystem("s3").mkdir(BUCKET)
            yield
        finally:
            server.terminate()


def wait_for(port: int) -> None:
    for _ in range(600):
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError(f"nothing listens on port {port} after a minute")


def read_rows(path: Path) -> Iterator[tuple]:
    """The rows of a file of prompts, with the file name in place of the source."""
    with pa.OSFile(str(path)) as file:
        for batch in pa.ipc.open_stream(file):
            names = batch.schema.names
            columns = [batch.column(name) for name in names]
            stored = [column.storage if hasattr(column, "storage") else column for column in columns]
            values = dict(zip(names, (column.to_pylist() for column in stored), strict=True))
            values["source"] = [source.rsplit("/", 1)[-1] for source in values["source"]]
            yield from zip(*(values[name] for name in sorted(values)), strict=True)


def compare_rows(one: Path, other: Path) -> bool:
    """Whether two files of prompts have the same rows in the same order."""
    missing = object()
    rows, others = read_rows(one), read_rows(other)
    return all(row == next(others, missing) for row in rows) and next(others, missing) is missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--scratch", type=Path, help="Folder for logs and results; one of the system by default")
    parser.add_argument("--results", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    path = arguments.results / "stored_logs.json"
    record = json.loads(path.read_text()) if path.exists() else {"machine": describe_machine(), "found": {}}
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
        folder = Path(name)
        (folder / "objects").mkdir()
        make_log(arguments.lines, folder / "log")
        with serve_s3(folder / "objects"):
            store = fsspec.filesystem("s3")
            store.put(str(folder / "log"), f"{BUCKET}/log", recursive=True)
            here = run_apart("shared", arguments.lines, folder / "log", folder / "out")
            # A cache of this run alone, so that nothing is read but what the server has
            os.environ["HF_HOME"] = str(folder / "cache")
            there = run_apart("shared", arguments.lines, f"{BUCKET}/log", f"{BUCKET}/out")
            store.get([f"{BUCKET}/out/{split}" for split in SPLITS], str(folder / "fetched") + "/")
        is_equal = {split: compare_rows(folder / "out" / split, folder / "fetched" / split) for split in SPLITS}
    record["found"][str(arguments.lines)] = {"folder": here, "s3": there, "is_equal": is_equal}
    print(record["found"], flush=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
