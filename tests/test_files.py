"""Files that are whole or not there: modes, leftovers, full disks, locks, damage."""

import errno
import os
import stat
import subprocess
import sys

import pytest
from safetensors import SafetensorError

from spec_kd import files
from spec_kd.files import (
    FullDiskError,
    alone_in,
    explain_full_disk,
    is_intact,
    read_json_object,
    replacing,
    sweep,
    write_text,
)


@pytest.fixture
def umask():
    previous = os.umask(0o027)
    yield 0o027
    os.umask(previous)


def test_files_follow_the_umask_and_replace_as_a_whole(tmp_path, umask):
    path, sum_path = tmp_path / "data", tmp_path / "data.sha256"
    for content in (b"one", b"two"):
        with replacing(path, sum_path) as file:
            file.write(content)
        assert path.read_bytes() == content and is_intact(path, sum_path)
    assert {stat.S_IMODE(p.stat().st_mode) for p in (path, sum_path)} == {0o640}
    with pytest.raises(ZeroDivisionError), replacing(path, sum_path) as file:
        file.write(b"three")
        _ = 1 / 0
    assert path.read_bytes() == b"two" and is_intact(path, sum_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "data.sha256"]


def test_the_same_content_is_left_alone(tmp_path):
    path, sum_path = tmp_path / "data", tmp_path / "data.sha256"
    numbers = []
    for _ in range(2):
        with replacing(path, sum_path) as file:
            file.write(b"one")
        numbers.append(path.stat().st_ino)
    assert numbers[0] == numbers[1]


def test_what_killed_processes_left_is_swept_and_what_is_written_stays(tmp_path):
    (tmp_path / ".data.0123abcd.part").write_bytes(b"half")
    (tmp_path / ".hidden").touch()
    with replacing(tmp_path / "data") as file:
        file.write(b"whole")
        sweep(tmp_path)
        assert len(list(tmp_path.glob(".*.part"))) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [".hidden", "data"]


@pytest.mark.parametrize("damage", [b"", b"\xff" * 64, b"0" * 63, b"z" * 64])
def test_a_damaged_sum_is_the_sum_of_nothing(tmp_path, damage):
    path, sum_path = tmp_path / "data", tmp_path / "data.sha256"
    with replacing(path, sum_path) as file:
        file.write(b"one")
    sum_path.write_bytes(damage)
    assert not is_intact(path, sum_path)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EFBIG, "File too large"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/0"),
    ],
)
def test_a_full_disk_is_one_sentence(tmp_path, error):
    with (
        pytest.raises(
            FullDiskError, match=r"model` could not be written \(.*\); the last is kept\. Make room"
        ) as raised,
        explain_full_disk(tmp_path / "model", "the last is kept"),
    ):
        raise error
    assert "\n" not in str(raised.value)
    for other in (OSError(errno.EACCES, "denied"), RuntimeError("shapes differ")):
        with pytest.raises(type(other), match=r"denied|shapes"), explain_full_disk(tmp_path):
            raise other


@pytest.mark.parametrize("text", [b"", b"{", b"\xff{}", b"[1]", b'{"other": 1}', b"[" * 100_000])
def test_damaged_json_is_named_with_what_to_do(tmp_path, text):
    path = tmp_path / "note.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=r"note.json` is damaged \(.*Delete it\.$"):
        read_json_object(path, "Delete it.", ("inputs",))
    write_text(path, '{"inputs": {}}')
    assert read_json_object(path, "", ("inputs",)) == {"inputs": {}}


HOLDER = """
import sys, time
from pathlib import Path
from spec_kd.files import alone_in
with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_is_held_by_one_process_and_released_by_a_kill(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, env=environment)
    assert holder.stdout.readline() == b"held\n"
    words = r"Another process is at work in .*Wait until it has finished, or choose"
    with pytest.raises(BlockingIOError, match=words), alone_in(tmp_path):
        pass
    monkeypatch.setenv("RANK", "1")  # launched together with the one that holds it
    with alone_in(tmp_path):
        pass
    monkeypatch.setenv("RANK", "0")
    holder.kill()
    holder.wait()
    with alone_in(tmp_path):
        pass
    with alone_in(tmp_path):
        pass


def test_without_locks_on_the_file_system_the_work_goes_on(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(files.FileLock, "acquire", refuse)
    with alone_in(tmp_path):
        pass
