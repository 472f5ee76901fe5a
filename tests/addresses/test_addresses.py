"""Data at addresses: a local S3 server, copies of it, and stores that fail."""

import os
from pathlib import Path

import fsspec
import pytest
from address_stores import read_store, respond, write_logs
from datasets import load_dataset
from fsspec.implementations.memory import MemoryFileSystem

import spec_kd
from spec_kd import addresses, files
from spec_kd.addresses import AddressError, find_copy, is_address, list_remote, name_place
from spec_kd.cli.main import main
from spec_kd.copies import fetch, open_folder
from spec_kd.evaluation import load_report
from spec_kd.options import read_path
from spec_kd.prompts.logs.files import find_files, read_records


def test_datasets_reads_a_finished_set_at_its_address(bucket, target, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    rows = respond(target, tokenizer, f"{bucket}/run")
    read = load_dataset(
        "parquet", data_files=f"{bucket}/run/responses.parquet", split="train", cache_dir=str(tmp_path / "cache")
    )
    assert read.to_list() == rows.to_list()


def test_a_log_that_has_changed_at_its_address_is_read_again(bucket):
    write_logs(f"{bucket}/logs")
    call = (f"{bucket}/logs/*.jsonl", f"{bucket}/prompts")
    assert spec_kd.load_query_logs(*call, show_progress=False).report.kept == 40
    line = b'{"messages": [{"role": "user", "content": "Another"}]}\n'
    fsspec.filesystem("s3").pipe_file(f"{bucket}/logs/a.jsonl", line)
    assert spec_kd.load_query_logs(*call, show_progress=False).report.kept == 1


def test_a_copy_follows_its_address(bucket, machine):
    store, folder = fsspec.filesystem("s3"), open_folder(f"{bucket}/run")
    for name in ("same", "changed", "removed", "spoiled"):
        files.write_text(folder / name, name)
    (folder / "own").write_text("was never there")
    store.pipe_file(f"{bucket}/run/changed", b"by another machine")
    store.rm_file(f"{bucket}/run/removed")
    (folder / "spoiled").write_text("here")
    number = (folder / "same").stat().st_ino
    assert fetch(f"{bucket}/run") == folder
    texts = {path.name: path.read_text() for path in folder.iterdir()}
    assert texts == {"same": "same", "changed": "by another machine", "spoiled": "spoiled", "own": "was never there"}
    assert (folder / "same").stat().st_ino == number  # not copied again
    files.remove(folder / "same")
    assert set(read_store(f"{bucket}/run")) == {"/changed", "/spoiled"}


def test_a_web_server_is_read_too(bucket):
    write_logs(f"{bucket}/logs")
    fsspec.filesystem("s3").chmod(f"{bucket}/logs/a.jsonl", "public-read")
    address = f"{os.environ['AWS_ENDPOINT_URL']}/{bucket.removeprefix('s3://')}/logs/a.jsonl"
    assert fetch(address).read_bytes() == fetch(f"{bucket}/logs/a.jsonl").read_bytes() != b""
    assert len(list(read_records(find_files(address, Path("out"))[0][0]))) == 40


def test_a_missing_bucket_is_an_error_before_any_work(server, machine, tokenizer):
    with pytest.raises(OSError, match=r"`s3://no-such-bucket/run` cannot be reached.*bucket does not exist"):
        respond("no such target", tokenizer, "s3://no-such-bucket/run")
    with pytest.raises(OSError, match="`s3://no-such-bucket/prompts` cannot be reached"):
        spec_kd.load_query_logs(str(Path(__file__).parents[2] / "README.md"), "s3://no-such-bucket/prompts")
    with pytest.raises(FileNotFoundError, match="`s3://no-such-bucket/logs` is no file"):
        spec_kd.load_query_logs("s3://no-such-bucket/logs", "prompts")
    with pytest.raises(FileNotFoundError, match="There is nothing at `s3://no-such-bucket/report`"):
        load_report("s3://no-such-bucket/report")


def test_a_store_whose_package_is_missing_is_named(machine):
    fsspec.register_implementation("absent", "no_such_package.Store", clobber=True, errtxt="Install no_such_package")
    for call in (lambda: open_folder("absent://a/b", "*"), lambda: find_files("absent://a/b", Path("out"))):
        with pytest.raises(ImportError, match="`absent://a/b` cannot be reached: Install no_such_package"):
            call()
    with pytest.raises(ValueError, match=r"`nothing://a/b` is no address that fsspec knows"):
        open_folder("nothing://a/b", "*")


def test_half_an_upload_leaves_nothing_at_a_file_server(machine):
    folder = open_folder("halting://run")
    with pytest.raises(OSError, match=r"`halting://run/a.txt` cannot be reached \(ConnectionError: the line is down"):
        files.write_text(folder / "a.txt", "whole")
    assert read_store("halting://run") == {} and not (folder / "a.txt").exists()


def test_half_a_download_is_no_file(machine, monkeypatch):
    store, place = addresses.connect("memory://half/a.txt")
    store.pipe_file(place, b"whole")
    monkeypatch.setattr(MemoryFileSystem, "get_file", lambda self, rpath, lpath: Path(lpath).write_bytes(b"wh"))
    with pytest.raises(OSError, match=r"`memory://half/a.txt` has 5 bytes, but 2 were read"):
        fetch("memory://half/a.txt")
    assert [path for path in find_copy("memory://half").rglob("*.txt*") if path.suffix != ".lock"] == []


def test_a_log_that_breaks_off_on_its_way_is_no_malformed_record(tmp_path, machine):
    store, place = addresses.connect("flaky://logs")
    store.pipe_file(f"{place}/a.jsonl", b'{"messages": [{"role": "user", "content": "Hi"}]}\n' * 100)
    with pytest.raises(AddressError, match=r"`flaky://logs/a.jsonl` cannot be read \(ConnectionError"):
        spec_kd.load_query_logs("flaky://logs", tmp_path / "prompts", show_progress=False)
    assert not (tmp_path / "prompts/report.json").exists()
    with pytest.raises(AddressError):
        list(read_records(list_remote("flaky://logs")[0]))


@pytest.mark.parametrize("address", ["s3://b/run", "memory://run/x", "hf://datasets/me/set/run"])
def test_a_copy_knows_its_address(address, machine):
    assert is_address(address) and name_place(find_copy(address)) == address
    assert find_copy(f"{address}/") == find_copy(address)


@pytest.mark.parametrize("address", ["s3://b//run", "s3://b/../run", "s3://"])
def test_an_address_with_an_empty_part_has_no_copy(address):
    with pytest.raises(ValueError, match="empty part"):
        find_copy(address)


def test_only_options_for_data_take_addresses(capsys, tmp_path):
    refusal = r"`output_dir` is 's3://b/run', an address, but must be a path on this machine\. Give such a path"
    with pytest.raises(ValueError, match=refusal):
        spec_kd.WhiteBoxDistillConfig(output_dir="s3://b/run")
    with pytest.raises(ValueError, match=refusal):
        spec_kd.export_draft("draft", "s3://b/run")
    with pytest.raises(ValueError, match="an address that has lost a slash"):
        read_path("output_dir", Path("s3://b/run"), takes_address=True)
    assert read_path("output_dir", f"file://{tmp_path}/a%20b") == f"{tmp_path}/a b"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("target: t\noutput_dir: s3://b/run\ndraft: d\nprompts: {historical: {paths: [x]}}\ntrain: {}\n")
    train = ["train", "white_box", "--responses", "r", "--draft", "d", "--output_dir", "s3://b/run"]
    for command in (train, ["run", str(recipe)]):
        assert main(command) == 2
        assert "`output_dir` is 's3://b/run', an address" in capsys.readouterr().err
