"""Stores that fail, and what the tests write to an address and read there."""

import gzip
import json
from pathlib import Path

import fsspec
from datasets import Dataset
from fsspec.implementations.memory import MemoryFileSystem

import spec_kd
from spec_kd import addresses

TEXTS = ["a", "hello there", "the quick brown fox", "the lazy dog"]


class KilledError(BaseException):
    """As a kill, this is no `Exception`."""


class HaltingStore(MemoryFileSystem):
    """Files appear while they are written, as on a file server, and only the first half gets there."""

    protocol = "halting"

    def put_file(self, lpath, rpath, **options):
        self.pipe_file(rpath, Path(lpath).read_bytes()[:2])
        raise ConnectionError("the line is down")


class FlakyStore(MemoryFileSystem):
    """Files can be listed, and read up to their middle."""

    protocol = "flaky"

    def _open(self, path, mode="rb", **options):
        file = super()._open(path, mode=mode, **options)
        if mode == "rb":
            size, read = file.size // 2, file.read

            def read_half(length=-1):
                if file.tell() >= size:
                    raise ConnectionError("the line is down")
                return read(min(length, size - file.tell()) if length >= 0 else size)

            file.read, file.readinto = read_half, lambda buffer: _read_into(buffer, read_half)
        return file


def _read_into(buffer, read):
    data = read(len(buffer))
    buffer[: len(data)] = data
    return len(data)


for store in (HaltingStore, FlakyStore):
    fsspec.register_implementation(store.protocol, store, clobber=True)


def read_store(address):
    """The content of all files at an address, by their path below it."""
    store, place = addresses.connect(address)
    return {name.removeprefix(place): store.cat_file(name) for name in store.find(place)}


def write_logs(address):
    store, place = addresses.connect(address)
    records = [{"messages": [{"role": "user", "content": f"Question {n} about {n * n} things"}]} for n in range(40)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    store.pipe_file(f"{place}/a.jsonl", lines.encode())
    store.pipe_file(f"{place}/day/b.jsonl.1.gz", gzip.compress(lines.replace("Question", "Why").encode()))
    store.pipe_file(f"{place}/.hidden/c.jsonl", lines.encode())
    with store.open(f"{place}/d.parquet", "wb") as file:
        Dataset.from_dict({"prompt": [[{"role": "user", "content": "From Parquet"}]]}).to_parquet(file)
    store.pipe_file(f"{place}/notes.xyz", b"no log")


def respond(target, tokenizer, output_dir, **options):
    options = {"max_new_tokens": 6, "batch_size": 2, "shard_size": 2, "teacher_signal": "sampled_logprobs"} | options
    return spec_kd.generate_responses(
        target, TEXTS, processing_class=tokenizer, output_dir=output_dir, show_progress=False, **options
    )
