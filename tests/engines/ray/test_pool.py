"""Which worker gets which task, and what becomes of the tasks of lost workers, on a stand-in for Ray."""

import pickle
import sys

import forked
import pytest
from ray_stand_in import StandIn

from spec_kd import RayEngine, RayOptions
from spec_kd.engines import MissingCompletionsError, UnusablePromptError
from spec_kd.engines.base import Completion, Engine
from spec_kd.engines.server.logprobs import UnidentifiedTokensError
from spec_kd.progress import RowProgress
from spec_kd.sampling.options import SamplingOptions


class Echo(Engine):
    name, is_reproducible = "echo", True

    def describe(self):
        return {"voice": "mine"}

    def generate(self, prompts, options, signal=None, seed=""):
        if prompts[0] == [13]:
            raise UnusablePromptError("Row 13 is unlucky.", fault="refused")
        return [Completion([*ids], "stop") for ids in prompts]


class LockedError(RuntimeError):
    """It cannot be unpickled."""

    def __init__(self, name, *, key):
        super().__init__(f"{name} {key}")


class Refusing(Echo):
    def generate(self, prompts, options, signal=None, seed=""):
        raise LockedError("door", key=7)


class Changing(Echo):
    """Says another thing in every worker."""

    count = 0

    def __init__(self):
        Changing.count += 1
        self.voice = f"voice {Changing.count}"

    def describe(self):
        return {"voice": self.voice}


def double(engine, task, progress):
    with progress.batch(task):
        return 2 * task


@pytest.fixture
def make_engine(monkeypatch):
    def make(build=Echo, lost=lambda *call: False, **options):
        ray = StandIn(lost)
        ray.install(monkeypatch)
        return RayEngine(build, **{"num_workers": 3, **options}), ray

    return make


def run(engine, tasks):
    with RowProgress(sum(tasks), "", is_shown=False) as progress:
        found = dict(engine.run_tasks(double, iter(tasks), progress))
    return found, progress.num_rows


def test_every_task_is_done_once_by_no_more_workers_than_there_are_tasks(make_engine):
    engine, ray = make_engine()
    assert engine.describe() == {"voice": "mine"} and engine.name == "echo" and ray.num_workers == 1
    assert run(engine, [5]) == ({5: 10}, 5) and ray.num_workers == 1
    tasks = list(range(1, 9))
    assert run(engine, tasks) == ({task: 2 * task for task in tasks}, sum(tasks))
    assert ray.num_workers == 3 and sorted(task for _, task in ray.calls) == sorted([5, *tasks])
    engine.close()
    assert sorted(ray.killed) == [0, 1, 2]


def test_every_worker_has_a_bar_below_that_of_all(make_engine, capsys):
    engine, _ = make_engine(num_workers=2)
    with RowProgress(10, "Target responses") as progress:
        assert len(list(engine.run_tasks(double, iter([1, 2, 3, 4]), progress))) == 4
    shown = capsys.readouterr().err
    assert "Target responses: 100%" in shown and "10/10" in shown
    assert all(f"worker {number} (10.0.0.1): " in shown for number in (0, 1))


def test_a_lost_worker_is_replaced_and_its_task_goes_to_another(make_engine, caplog):
    fates = {0: 2, 2: 4}  # the number of calls after which a worker is lost
    counts = dict.fromkeys(range(9), 0)

    def lose(number, method, arguments):
        counts[number] += method == "run"
        return counts[number] >= fates.get(number, 99)

    engine, ray = make_engine(lost=lose)
    tasks = list(range(1, 20))
    found, num_rows = run(engine, tasks)
    assert found == {task: 2 * task for task in tasks} and num_rows == sum(tasks)
    assert set(ray.killed) == {0, 2} and ray.num_workers == 5
    assert len(ray.calls) == len(tasks) + 2
    assert "Worker 0 on 10.0.0.1 is lost (RayError: the node is gone). Another does its work." in caplog.messages


def test_a_task_that_costs_every_worker_ends_the_job(make_engine):
    lose = lambda number, method, arguments: method == "run" and arguments[1] == 4  # noqa: E731
    engine, ray = make_engine(lost=lose, max_attempts=3)
    with pytest.raises(RuntimeError, match=r"3 workers were lost with the same shard.*node is gone.*Finished shards"):
        run(engine, [1, 2, 3, 4, 5])
    assert [task for _, task in ray.calls].count(4) == 3


def test_workers_that_never_start_end_the_job(make_engine):
    with pytest.raises(RuntimeError, match="2 workers were lost while they started"):
        make_engine(lost=lambda number, method, arguments: method == "start", max_attempts=2)


def test_a_worker_that_would_write_other_completions_is_refused(make_engine):
    engine, _ = make_engine(Changing)
    with pytest.raises(RuntimeError, match=r"its `voice` is 'voice \d+', not 'voice \d+'. Give every node the same"):
        run(engine, [1, 2, 3])


def test_errors_of_the_engine_are_raised_here_as_they_are(make_engine):
    engine, ray = make_engine()
    with pytest.raises(UnusablePromptError, match="Row 13 is unlucky") as caught:
        engine.generate([[13]], SamplingOptions())
    assert caught.value.fault == "refused" and type(caught.value) is UnusablePromptError
    assert engine.generate([[7]], SamplingOptions()) == [Completion([7], "stop")] and ray.killed == []
    with pytest.raises(RuntimeError, match="LockedError: door 7"):  # no worker was lost
        make_engine(Refusing)[0].generate([[7]], SamplingOptions())


@pytest.mark.parametrize(
    "error",
    [
        UnusablePromptError("too long", fault="context_full"),
        MissingCompletionsError("some", {1: "refused"}, [Completion([3], "stop"), None], [[], []]),
        UnidentifiedTokensError([["half"], []], [None, Completion([3], "stop")]),
    ],
)
def test_errors_about_prompts_can_be_sent(error):
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is type(error) and str(found) == str(error) and vars(found) == vars(error)


def test_prompts_are_checked_in_parts_with_their_rows(make_engine, monkeypatch):
    parts = []
    monkeypatch.setattr("spec_kd.engines.ray.engine.MAX_CHECKED_IDS", 4)
    monkeypatch.setattr(Echo, "check", lambda self, prompts, *rest: parts.append((prompts.rows, list(prompts))))
    engine, _ = make_engine()
    engine.check([[1, 2], [3, 4], [5], [6]], SamplingOptions(), None)
    assert parts == [([0, 1], [[1, 2], [3, 4]]), ([2, 3], [[5], [6]])]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "`num_workers` is 0, but `RayEngine` needs at least one"),
        ({"num_workers": -1}, "`num_workers` is -1, but must be at least 0"),
        ({"num_workers": 1, "gpus_per_worker": -0.5}, "`gpus_per_worker` is -0.5"),
        ({"ray_address": "auto"}, "`ray_address` is of Ray workers, but `num_workers` is 0"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        RayEngine("my-org/target", **options)


def test_processes_that_share_the_shards_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="Start one process"):
        RayEngine("my-org/target", num_workers=1)


def test_without_ray_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install spec_kd\[ray\]"):
        RayEngine("my-org/target", num_workers=1)


def test_work_in_one_process_does_not_import_ray():
    program = """
import sys
from tiny import build_llama, build_tokenizer
import spec_kd
spec_kd.generate_responses(build_llama(), ["a"], processing_class=build_tokenizer(), max_new_tokens=2)
print(spec_kd.RayOptions(), "ray" in sys.modules)
"""
    done = forked.run(program)
    assert done.stdout.strip() == f"{RayOptions()} False", done.stderr
