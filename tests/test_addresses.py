"""Data at addresses: a local S3 server, stores that fail, and runs that are killed between any two uploads."""

import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import example_report
import fsspec
import hub_api
import pytest
from datasets import Dataset, load_dataset
from fsspec.implementations.memory import MemoryFileSystem

import spec_kd
from spec_kd import addresses, files
from spec_kd.addresses import AddressError, find_copy, is_address, list_remote, name_place
from spec_kd.cli.main import main
from spec_kd.cli.rows import load_rows
from spec_kd.copies import fetch, open_folder
from spec_kd.data.shards import ShardStore
from spec_kd.evaluation import load_report, save_report
from spec_kd.options import read_path
from spec_kd.prompts.logs.files import find_files, read_records

ROOT = Path(__file__).parents[1]
TEXTS = ["a", "hello there", "the quick brown fox", "the lazy dog"]
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


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


@pytest.fixture(scope="module")
def server():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
            patch.setenv(name, value)
        yield
    server.stop()


@pytest.fixture
def bucket(server, machine, request):
    """The address of an empty bucket."""
    name = f"bucket-{hashlib.md5(request.node.name.encode()).hexdigest()[:12]}"
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Starts on another machine: one that has no copies."""

    def enter(name):
        monkeypatch.setattr(addresses, "COPIES", tmp_path / name)
        (tmp_path / name).mkdir(exist_ok=True)

    enter("first machine")
    return enter


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


def test_the_way_from_logs_to_a_report_is_the_same_as_on_one_machine(bucket, machine, tmp_path, target, tokenizer):
    write_logs(f"{bucket}/logs")
    fsspec.filesystem("s3").get(f"{bucket}/logs", str(tmp_path / "logs"), recursive=True)
    local = spec_kd.load_query_logs(tmp_path / "logs", tmp_path / "prompts", show_progress=False)
    remote = spec_kd.load_query_logs(f"{bucket}/logs", f"{bucket}/prompts", show_progress=False)
    assert remote.train["prompt"] == local.train["prompt"] and remote.test["prompt"] == local.test["prompt"]
    assert remote.report.kept == local.report.kept == 81 and remote.report.ignored_files == (
        f"{bucket}/logs/notes.xyz",
    )
    assert {name.removeprefix(f"{bucket}/logs/") for name in remote.train["source"]} == {
        "a.jsonl", "d.parquet", "day/b.jsonl.1.gz"
    }  # fmt: skip

    machine("second machine")
    again = spec_kd.load_query_logs(f"{bucket}/logs", f"{bucket}/prompts", show_progress=False)
    assert again.report == remote.report  # with the seconds of the first run: nothing was read again
    prompts = load_rows(f"{bucket}/prompts").select(range(5))
    assert prompts["prompt"] == local.train[:5]["prompt"]

    options = {"processing_class": tokenizer, "max_new_tokens": 6, "shard_size": 2, "show_progress": False}
    rows = spec_kd.generate_responses(target, prompts, output_dir=f"{bucket}/run", **options)
    spec_kd.generate_responses(target, prompts, output_dir=str(tmp_path / "run"), **options)
    written = read_store(f"{bucket}/run")
    assert written["/responses.parquet"] == (tmp_path / "run/responses.parquet").read_bytes()
    assert {name for name in written if "/.arrow" in name or name.endswith((".part", "lock"))} == set()

    machine("third machine")
    assert load_rows(f"{bucket}/run").to_list() == load_rows(f"{bucket}/run/responses.parquet").to_list()
    assert load_rows(f"{bucket}/run").to_list() == rows.to_list()
    assert not find_copy(f"{bucket}/run/.shards/00000.arrow").exists()  # nobody reads it there
    report = example_report.build_small_report()
    assert set(save_report(report, f"{bucket}/report")) == set(save_report(report, tmp_path / "report"))
    for name, content in read_store(f"{bucket}/report").items():
        assert content == Path(f"{tmp_path}/report{name}").read_bytes()
    machine("fourth machine")
    loaded = load_report(f"{bucket}/report")
    assert loaded.to_json() == load_report(f"{bucket}/report/report.json").to_json() == report.to_json()


def test_datasets_reads_a_finished_set_at_its_address(bucket, target, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    rows = respond(target, tokenizer, f"{bucket}/run")
    read = load_dataset(
        "parquet", data_files=f"{bucket}/run/responses.parquet", split="train", cache_dir=str(tmp_path / "cache")
    )
    assert read.to_list() == rows.to_list()


def test_a_run_that_is_killed_at_any_upload_continues_on_another_machine(
    bucket, machine, target, tokenizer, monkeypatch
):
    respond(target, tokenizer, f"{bucket}/whole")
    whole, upload, killed_at = read_store(f"{bucket}/whole"), files.upload, 0
    assert sum(name.startswith("/.shards/0") for name in whole) == 4
    manifest = json.loads(whole["/.shards/manifest.json"])
    while True:
        killed_at, count, place = killed_at + 1, 0, f"{bucket}/run-{killed_at}"

        def upload_or_die(source, path, killed_at=killed_at):
            nonlocal count
            count += addresses.name_place(path).startswith("s3://") and ".arrow/" not in str(path)
            if count == killed_at:
                raise KilledError
            upload(source, path)

        machine(f"machine {killed_at} that dies")
        with monkeypatch.context() as patch:
            patch.setattr(files, "upload", upload_or_die)
            try:
                respond(target, tokenizer, place)
            except KilledError:
                pass
            else:
                break
        left = read_store(place)
        assert len(left) == killed_at - 1
        machine(f"machine {killed_at} that goes on")
        done = [int(name[9:14]) for name in left if name.startswith("/.shards/0") and name.endswith("sha256")]
        with monkeypatch.context() as patch:
            written = []
            patch.setattr(
                files, "upload", lambda source, path, written=written: written.append(path) or upload(source, path)
            )
            respond(target, tokenizer, place)
        assert not {path.name for path in written} & {f"{number:05d}.arrow" for number in done}
        now = read_store(place)
        assert json.loads(now.pop("/.shards/manifest.json"))["fingerprint"] == manifest["fingerprint"]
        assert now == {name: content for name, content in whole.items() if name != "/.shards/manifest.json"}
    assert killed_at == len(whole) + 1 == 8


READ_LOGS = """
import os, signal, sys
from pathlib import Path
from spec_kd import addresses, files
addresses.COPIES, upload, count = Path(sys.argv[1]), files.upload, 0
def upload_then_die(source, path):
    global count
    upload(source, path)
    count += addresses.name_place(path).startswith("s3://")
    if count == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
files.upload = upload_then_die
from spec_kd.prompts.logs.query_logs import load_query_logs
load_query_logs(sys.argv[3] + "/logs", sys.argv[3] + "/prompts", show_progress=False)
"""


def test_a_reading_of_logs_that_is_killed_leaves_no_half_set(bucket, machine, tmp_path):
    write_logs(f"{bucket}/logs")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [tmp_path / "killed", 2, bucket]
    died = subprocess.run([sys.executable, "-c", READ_LOGS, *map(str, arguments)], env=environment, timeout=120)
    assert died.returncode == -signal.SIGKILL
    left = {"/report.json", "/train.arrow"}  # of which the first says that the set is not complete
    assert set(read_store(f"{bucket}/prompts")) == left
    logs = spec_kd.load_query_logs(f"{bucket}/logs", f"{bucket}/prompts", show_progress=False)
    assert set(read_store(f"{bucket}/prompts")) == {
        "/train.arrow", "/.train.arrow.sha256", "/test.arrow", "/.test.arrow.sha256", "/report.json"
    }  # fmt: skip
    assert len(logs.train) + len(logs.test) == 81


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


def test_a_run_lies_in_a_repository_of_the_hub(machine, target, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with hub_api.run_hub() as hub:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": hub.url, "token": "hf_of_nobody"})
        rows = respond(target, tokenizer, "hf://datasets/me/set/run")
        respond(target, tokenizer, str(tmp_path / "run"))
        assert hub.files["run/responses.parquet"] == (tmp_path / "run/responses.parquet").read_bytes()
        assert hub.num_commits == len(hub.files) + 2 == 9  # each file, and a probe that comes and goes
        machine("second machine")
        del hub.files["run/.shards/00001.arrow"]
        assert respond(target, tokenizer, "hf://datasets/me/set/run").to_list() == rows.to_list()
        machine("third machine")
        assert load_rows("hf://datasets/me/set/run/responses.parquet").to_list() == rows.to_list()
        with pytest.raises(OSError, match=r"`hf://datasets/me/none/run.*repository"):
            respond(target, tokenizer, "hf://datasets/me/none/run")


def test_a_web_server_is_read_too(bucket):
    write_logs(f"{bucket}/logs")
    fsspec.filesystem("s3").chmod(f"{bucket}/logs/a.jsonl", "public-read")
    address = f"{os.environ['AWS_ENDPOINT_URL']}/{bucket.removeprefix('s3://')}/logs/a.jsonl"
    assert fetch(address).read_bytes() == fetch(f"{bucket}/logs/a.jsonl").read_bytes() != b""
    assert len(list(read_records(find_files(address, Path("out"))[0][0]))) == 40


def test_a_run_sees_the_shards_of_other_machines(bucket, machine, target, tokenizer):
    respond(target, tokenizer, f"{bucket}/run")
    machine("second machine")
    store = ShardStore(f"{bucket}/run")
    fsspec.filesystem("s3").rm_file(f"{bucket}/run/.shards/00001.arrow.sha256")
    store.refresh()
    assert [store.read(number) is not None for number in range(2)] == [True, False]
    machine("third machine")
    respond(target, tokenizer, f"{bucket}/run")
    machine("second machine")
    store.refresh()
    assert store.read(1) is not None


def test_a_set_that_has_changed_at_its_address_is_refused(bucket, machine, target, tokenizer):
    respond(target, tokenizer, f"{bucket}/run")
    fsspec.filesystem("s3").pipe_file(f"{bucket}/run/responses.parquet", b"PAR1 something else")
    for source in (f"{bucket}/run", f"{bucket}/run/responses.parquet"):
        with pytest.raises(ValueError, match=f"`{bucket}/run/responses.parquet` is not what was written"):
            load_rows(source)


def test_another_run_at_an_address_is_refused_by_its_name(bucket, target, tokenizer):
    respond(target, tokenizer, f"{bucket}/run")
    with pytest.raises(ValueError, match=rf"`{bucket}/run` holds responses of another run \(max_new_tokens: 6 in"):
        respond(target, tokenizer, f"{bucket}/run", max_new_tokens=7)


def test_a_missing_bucket_is_an_error_before_any_work(server, machine, tokenizer):
    with pytest.raises(OSError, match=r"`s3://no-such-bucket/run` cannot be reached.*bucket does not exist"):
        respond("no such target", tokenizer, "s3://no-such-bucket/run")
    with pytest.raises(OSError, match="`s3://no-such-bucket/prompts` cannot be reached"):
        spec_kd.load_query_logs(str(ROOT / "README.md"), "s3://no-such-bucket/prompts")
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
    with pytest.raises(ValueError, match=r"`output_dir` is PosixPath.*lost a slash|lost a slash"):
        read_path("output_dir", Path("s3://b/run"), takes_address=True)
    assert read_path("output_dir", f"file://{tmp_path}/a%20b") == f"{tmp_path}/a b"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("target: t\noutput_dir: s3://b/run\ndraft: d\nprompts: {historical: {paths: [x]}}\ntrain: {}\n")
    train = ["train", "white_box", "--responses", "r", "--draft", "d", "--output_dir", "s3://b/run"]
    for command in (train, ["run", str(recipe)]):
        assert main(command) == 2
        assert "`output_dir` is 's3://b/run', an address" in capsys.readouterr().err


def test_commands_read_and_write_at_addresses(bucket, machine, capsys, tmp_path):
    def call(*arguments):
        assert main([*arguments]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    write_logs(f"{bucket}/logs")
    logs = ("prompts", "logs", "--paths", f"{bucket}/logs/a.jsonl", "--output_dir", f"{bucket}/prompts")
    first = call(*logs)
    assert (first["num_train"] + first["num_test"], first["path"]) == (40, f"{bucket}/prompts")
    machine("second machine")
    assert call(*logs)["is_reused"]
    mixed = call("prompts", "mix", "--parts", f"logs={bucket}/prompts", "--output_dir", f"{bucket}/mix")
    assert mixed["num_train"] == first["num_train"]
    assert {"/.step.json", "/mix.json", "/prompts.json", "/train.arrow"} <= set(read_store(f"{bucket}/mix"))
    local = call("prompts", "mix", "--parts", f"logs={bucket}/prompts", "--output_dir", str(tmp_path / "mix"))
    assert {**local, "path": ""} == {**mixed, "path": ""}
    shutil.rmtree(find_copy(f"{bucket}/mix"))
    assert call("prompts", "mix", "--parts", f"logs={bucket}/prompts", "--output_dir", f"{bucket}/mix")["is_reused"]
    assert main(["respond", "--target", "t", "--prompts", f"{bucket}/none", "--output_dir", "out"]) == 2


def test_machines_that_were_launched_together_share_the_shards_of_an_address(
    bucket, machine, target, tokenizer, monkeypatch
):
    whole = respond(target, tokenizer, f"{bucket}/whole")
    store = fsspec.filesystem("s3")

    class FirstOfTwo:
        process_index, num_processes, is_main_process = 0, 2, True

        def wait_for_everyone(self):  # until the other machine has written the second shard
            for name in ("00001.arrow", "00001.arrow.sha256"):
                store.copy(f"{bucket}/whole/.shards/{name}", f"{bucket}/run/.shards/{name}")

    machine("first of two")
    monkeypatch.setattr("accelerate.PartialState", FirstOfTwo)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert respond(target, tokenizer, f"{bucket}/run").to_list() == whole.to_list()
    assert {name for name in read_store(f"{bucket}/run") if name.startswith("/.shards/0")} == {
        f"/.shards/0000{number}.arrow{end}" for number in range(2) for end in ("", ".sha256")
    }
