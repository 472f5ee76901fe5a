"""What datatrove's tasks make of a log, against what one process makes of it."""

import gzip
import json
import random
import shutil
from pathlib import Path

import pytest
from datasets import load_dataset

from spec_kd.prompts.logs.options import LogOptions
from spec_kd.prompts.logs.query_logs import load_query_logs
from spec_kd.prompts.logs.scale import pipeline
from spec_kd.prompts.logs.scale.grouping import LinkConversations
from spec_kd.prompts.logs.scale.options import ScaleOptions
from spec_kd.prompts.logs.scale.reading import ReadShares

WORDS = ["weather", "chess", "tea", "volcano", "violin", "tax", "orbit", "bread", "fern", "glacier", "loom", "quartz"]
NUM_LINES = 2_500
LOCAL = ScaleOptions(executor="local", num_tasks=7)


def compose(rng: random.Random, num_words: int = 12) -> str:
    return " ".join(f"{rng.choice(WORDS)}{rng.randrange(60)}" for _ in range(num_words))


def make_line(rng: random.Random, number: int, before: list[dict]) -> str:
    """A line of any kind: duplicates, conversations under one and under several names, names to redact, errors."""
    draw = rng.random()
    if draw < 0.03:
        return rng.choice(["not json", '{"error": {}}', '{"messages": [{"role": "user", "content": "\\ud800"}]}', ""])
    if draw < 0.06:
        return f"data: {json.dumps({'choices': [{'delta': {'content': 'Yes.'}, 'finish_reason': 'stop'}]})}"
    if draw < 0.3 and before:
        return json.dumps(rng.choice(before))
    name = rng.choice([f"c{number}", f"user{number % 40}@example.org", f"+49 151 2345 {number % 30 + 1000}"])
    messages = [{"role": "user", "content": compose(rng)}]
    if draw < 0.5 and before:  # continues a conversation, under its name, another one, or none
        earlier = rng.choice(before)
        messages = [*earlier["messages"], {"role": "assistant", "content": "Yes."}, *messages]
        name = rng.choice([earlier.get("conversation_id"), name])
    elif draw < 0.6:
        messages.insert(0, {"role": "system", "content": "Be kind. " * rng.randint(1, 3)})
    record = {"messages": messages, "timestamp": 1.7e9 + rng.randrange(10**6)}
    if name is not None and rng.random() < 0.8:
        record["conversation_id"] = name
    if rng.random() < 0.5:
        record["choices"] = [{"message": {"role": "assistant", "content": "Write to me@example.org."}}]
    if rng.random() < 0.1:
        record["tools"] = [{"type": "function", "function": {"name": f"tool{number % 3}", "parameters": {}}}]
    before.append(record)
    return json.dumps(record)


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("log")
    rng, before = random.Random(0), []
    lines = [make_line(rng, number, before) for number in range(NUM_LINES)]
    (folder / "a.jsonl").write_text("\n".join(lines[: NUM_LINES // 2]) + "\n")
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.write("\n".join(lines[NUM_LINES // 2 : -200]))
    (folder / "c.json").write_text(json.dumps([json.loads(line) for line in lines[-200:] if line.startswith('{"m')]))
    (folder / "d.txt").write_text("\n".join(compose(rng, 3) for _ in range(100)))
    (folder / "notes.md").touch()
    return folder


def load(log: Path, output_dir: Path, scale: ScaleOptions | None = None, **options):
    return load_query_logs(log, output_dir, scale=scale, show_progress=False, **options)


def describe(result) -> dict:
    return {**result.report.to_dict(), "seconds": None}


@pytest.mark.parametrize(
    "options",
    [
        {"redact": ["email", "phone"]},
        {"split_by": "time", "test_fraction": 0.3, "turns": "all"},
        {"seed": 3, "test_fraction": 0.2},
    ],
    ids=["redacted", "by-time", "by-hash"],
)
def test_exact_steps_are_those_of_one_process(log, tmp_path, options):
    if "split_by" in options:
        (log := Path(shutil.copytree(log, tmp_path / "log"))).joinpath("d.txt").unlink()
    here = load(log, tmp_path / "here", near_duplicate_threshold=None, **options)
    shared = load(log, tmp_path / "shared", LOCAL, near_duplicate_threshold=None, **options)
    assert describe(shared) == describe(here)
    assert here.report.malformed > 10
    assert here.report.dropped["exact_duplicate"] > 100
    assert here.report.conversations < here.report.kept
    for split in ("train", "test"):
        assert len(getattr(here, split)) > 10
        assert (tmp_path / "shared" / f"{split}.arrow").read_bytes() == (
            tmp_path / "here" / f"{split}.arrow"
        ).read_bytes()


def test_a_result_is_like_that_of_one_process(log, tmp_path):
    first = load(log, tmp_path / "out", LOCAL)
    assert {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")} == {
        "train.arrow", "test.arrow", "report.json",
    }  # fmt: skip
    assert not (tmp_path / "out" / pipeline.WORK_FOLDER).exists()
    assert len(load_dataset(str(tmp_path / "out"), split="train")) == first.report.train
    seconds = first.report.seconds
    assert load(log, tmp_path / "out", LOCAL).report.seconds == seconds  # not read again
    other = ScaleOptions(executor="local", num_tasks=3)
    assert load(log, tmp_path / "out", other).report.seconds == seconds  # whoever shares it out
    assert load(log, tmp_path / "out", LOCAL, seed=1).report.seconds != seconds


def test_a_killed_run_goes_on(log, tmp_path, monkeypatch):
    """After the stage that failed, only tasks that were not complete are done."""
    done: list[tuple[str, int]] = []

    def watch(step: type, fails_at: int | None = None) -> None:
        do = step.do

        def watched(self, task: int, num_tasks: int) -> None:
            if task == fails_at:
                raise KeyboardInterrupt
            do(self, task, num_tasks)
            done.append((step.__name__, task))

        monkeypatch.setattr(step, "do", watched)

    with monkeypatch.context() as context:
        context.setattr(ReadShares, "do", ReadShares.do)
        watch(ReadShares)
        watch(LinkConversations, fails_at=4)
        with pytest.raises(KeyboardInterrupt):
            load(log, tmp_path / "out", LOCAL)
        assert [task for name, task in done if name == "ReadShares"] == list(range(7))
    monkeypatch.undo()
    done.clear()
    watch(ReadShares)
    watch(LinkConversations)
    resumed = load(log, tmp_path / "out", LOCAL)
    assert done == [("LinkConversations", 4), ("LinkConversations", 5), ("LinkConversations", 6)]
    whole = load(log, tmp_path / "whole", LOCAL)
    assert describe(resumed) == describe(whole)
    assert (tmp_path / "out" / "train.arrow").read_bytes() == (tmp_path / "whole" / "train.arrow").read_bytes()


def test_a_malformed_line_is_named_where_it_stands(tmp_path):
    lines = [json.dumps({"messages": [{"role": "user", "content": f"Question {n}"}]}) for n in range(500)]
    lines[437] = "not json"
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"log\.jsonl:438: not JSON"):
        load(tmp_path / "log.jsonl", tmp_path / "out", LOCAL, on_error="raise")


def test_nothing_kept_says_why(tmp_path):
    (tmp_path / "log.jsonl").write_text("not json\n" * 50)
    with pytest.raises(ValueError, match="No prompt of 50 records is kept: 50 are malformed"):
        load(tmp_path / "log.jsonl", tmp_path / "out", LOCAL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_per_user": 3}, "`max_per_user` is 3, but"),
        ({"max_per_day": 9}, "`max_per_day` is 9, but"),
        ({"near_duplicate_threshold": 0.6}, "`near_duplicate_threshold` is 0.6, but with an executor must be at least"),
    ],
)
def test_options_of_one_process_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LOCAL.check(LogOptions(**options))
    ScaleOptions().check(LogOptions(**options))


def test_batches_are_refused(tmp_path):
    request = {"custom_id": "1", "body": {"messages": [{"role": "user", "content": "Why?"}]}}
    (tmp_path / "batch.jsonl").write_text(json.dumps(request) + "\n")
    with pytest.raises(ValueError, match=r"batch\.jsonl` is of a batch"):
        load(tmp_path, tmp_path / "out", LOCAL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"executor": "cloud"}, "`executor` is 'cloud', but must be one of local, slurm, ray"),
        ({"num_tasks": 4}, "`executor` is None"),
        ({"executor": "local", "num_workers": 0}, "`num_workers` is 0"),
        ({"executor": "slurm"}, "SLURM needs a partition and a time limit"),
        ({"executor": "local", "executor_kwargs": [1]}, "executor_kwargs"),
    ],
)
def test_scale_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        ScaleOptions(**options)
