"""Runs whose data lies at addresses: from logs to a report, killed between any two uploads, and shared by machines."""

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
from address_stores import KilledError, read_store, respond, write_logs

import spec_kd
from spec_kd import addresses, files
from spec_kd.addresses import find_copy
from spec_kd.cli.main import main
from spec_kd.cli.rows import load_rows
from spec_kd.data.shards import ShardStore
from spec_kd.evaluation import load_report, save_report

ROOT = Path(__file__).parents[2]


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
