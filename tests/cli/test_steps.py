"""Steps keep what was done: nothing is deleted, damaged notes are named, secrets stay out of them."""

import json
import re
from pathlib import Path

import pytest

from spec_kd.cli.steps import STEP_FILE, Workspace

INPUTS = {"prompts": "abc", "options": {"seed": 1}}


@pytest.fixture
def do(tmp_path):
    """Does a step in `run/draft` of a recipe's folder that writes one file."""

    def do_step(inputs=INPUTS, text="weights", owner=True):
        run = tmp_path / "run"
        workspace = Workspace(str(run)) if owner else Workspace()

        def work():
            Path(run, "draft", "model.txt").write_text(text)
            return {"path": str(run / "draft")}

        return workspace.do(str(run / "draft"), "train", inputs, ("model.txt",), work)

    return do_step


def change(**options):
    return {**INPUTS, "options": {**INPUTS["options"], **options}}


def test_a_changed_option_moves_the_old_result_aside(do, tmp_path, capsys):
    for seed, text in enumerate(("first", "second", "third")):
        assert not do(change(seed=seed), text)["is_reused"]
    assert (tmp_path / "run/draft/model.txt").read_text() == "third"
    kept = [(tmp_path / f"run/replaced/draft-{n}/model.txt").read_text() for n in (1, 2)]
    assert kept == ["first", "second"]
    said = capsys.readouterr().err
    assert (
        "options.seed: 1 before, 2 now" in said and "run/replaced/draft-2: delete them if you do not need them" in said
    )


def test_work_that_was_cut_off_is_moved_aside_too(do, tmp_path):
    do()
    note = json.loads((tmp_path / "run/draft" / STEP_FILE).read_text())
    (tmp_path / "run/draft" / STEP_FILE).write_text(json.dumps({**note, "result": None, "files": None}))
    do(change(seed=2), "new")
    assert (tmp_path / "run/replaced/draft-1/model.txt").read_text() == "weights"


def test_a_folder_with_a_note_alone_leaves_nothing_behind(do, tmp_path):
    do()
    (tmp_path / "run/draft/model.txt").unlink()
    do(change(seed=2))
    assert not (tmp_path / "run/replaced").exists()


@pytest.mark.parametrize("owner", [True, False])
@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "null",
        lambda text: "{}",
        lambda text: "[" * 10_000,
        lambda text: text.replace('"options"', '"optoins"'),
        lambda text: text.replace('"files": {', '"files": null, "file": {'),
        lambda text: re.sub('"model.txt": [^\\n]*', '"model.txt": [7]', text),
        lambda text: text.encode("utf-16"),
    ],
)
def test_a_damaged_note_is_named_with_what_to_do(do, tmp_path, owner, damage):
    do()
    note = tmp_path / "run/draft" / STEP_FILE
    damaged = damage(note.read_text())
    assert damaged != note.read_text()
    note.write_bytes(damaged) if isinstance(damaged, bytes) else note.write_text(damaged)
    with pytest.raises(ValueError) as caught:
        do(owner=owner)
    assert f"`{note}` is damaged" in str(caught.value) and "move the folder away" in str(caught.value)
    assert (tmp_path / "run/draft/model.txt").read_text() == "weights"


def test_secrets_are_no_inputs_and_are_not_written_down(do, tmp_path):
    secret = {"engine_kwargs": {"token": "hf_abcdefghijklmnop", "revision": "v1"}, "hub_token": "hf_qrstuvwxyzabcdef"}
    do(change(**secret))
    text = (tmp_path / "run/draft" / STEP_FILE).read_text()
    assert "hf_" not in text and '"revision": "v1"' in text
    # another token gives access to the same
    assert do(change(**{**secret, "hub_token": "hf_0123456789"}))["is_reused"]


def test_a_half_written_file_of_a_killed_run_is_removed(tmp_path):
    left = tmp_path / "..hashes.json.92c69f9b.part"
    left.write_text("{")
    other = tmp_path / "notes.part"
    other.write_text("not ours")
    Workspace(str(tmp_path))
    assert not left.exists() and other.exists()
