"""Workers on a Ray cluster, which the driver gives one task at a time. Whoever is lost is replaced, and its task too.

Ray could start a lost actor again and repeat its calls (`max_restarts`, `max_task_retries`). The repeated call would
then wait for this one actor, and so for its node, while all other workers have nothing to do.
"""

import itertools
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Generic, cast

from spec_kd.engines.base import Engine, Result, Task
from spec_kd.engines.ray.options import RayOptions
from spec_kd.engines.ray.worker import Worker, WorkerFacts
from spec_kd.open_types import Argument, Call
from spec_kd.progress import RowProgress
from spec_kd.version import __version__

POLL_SECONDS = 1.0
PATIENCE_SECONDS = 60.0

logger = logging.getLogger(__name__)


@dataclass
class _Attempt(Generic[Task]):
    """A task, and how many workers were lost with it."""

    task: Task
    num_lost: int = 0


@dataclass
class _Member:
    """What the driver knows of a worker.

    Args:
        number (`int`): Its number, from 0 on, for people.
        actor: Ray's handle of its [`Worker`].
        answer (*optional*): Ray's reference to what it does now, which may be its start; `None` if it is idle.
        attempt (`_Attempt`, *optional*): The task that it works on.
        bar (`RowProgress`, *optional*): Its progress bar, from its first task of a run on.
        host (`str`, *optional*): Address of its node; `None` until it has started.
        count (`tuple[int, int]`): Tokens and rows that it has told of.
        rows_before (`int`): Its rows when it got its task.
        counting (*optional*): Ray's reference to the count that it was asked for.
    """

    number: int
    actor: Argument
    answer: Argument
    attempt: _Attempt[Argument] | None = None
    bar: RowProgress | None = None
    host: str | None = None
    count: tuple[int, int] = (0, 0)
    rows_before: int = 0
    counting: Argument = None

    def __str__(self) -> str:
        return f"Worker {self.number} on {self.host}" if self.host else f"Worker {self.number}, which was starting,"


@dataclass
class WorkerPool:
    """The workers of one driver. They end with it, or with this object.

    Args:
        ray (`ModuleType`): Ray, connected to its cluster.
        build (`Callable`): Makes the engine of a worker. It is pickled.
        options (`RayOptions`): How many workers, and what each takes.

    Attributes:
        facts (`WorkerFacts`, *optional*): What the first worker said; all others must say the same of their engine.
    """

    ray: ModuleType
    build: Callable[[], Engine]
    options: RayOptions
    facts: WorkerFacts | None = None
    _members: list[_Member] = field(default_factory=list)
    _num_started: int = 0
    _num_lost_starting: int = 0

    def start(self) -> WorkerFacts:
        """Starts the first worker, and returns what it says of itself; raises what its engine raises."""
        asked = time.monotonic()
        while self.facts is None:
            if not self._members:
                self._start_member()
            self._wait(None)
            if self.facts is None and asked and time.monotonic() - asked > PATIENCE_SECONDS:
                logger.warning(
                    "No worker has started for %.0f seconds. It needs %s, and the cluster has %s.",
                    PATIENCE_SECONDS, self._list_resources(), self.ray.cluster_resources(),
                )  # fmt: skip
                asked = 0.0
        return self.facts

    def run(
        self, function: Callable[[Engine, Task, RowProgress], Result], tasks: Iterator[Task], progress: RowProgress
    ) -> Iterator[tuple[Task, Result]]:
        """Runs a function on tasks; see `Engine.run_tasks`.

        A task is read when there is a worker for it, so that no more than `num_workers` of them are in memory.

        Raises:
            RuntimeError: `max_attempts` workers were lost with the same task, or one after the other while starting.
            Exception: What the function raised in a worker.
        """
        waiting: deque[_Attempt[Task]] = deque()
        try:
            while True:
                busy = [member for member in self._members if member.attempt is not None]
                wanted = self.options.num_workers - len(busy) - len(waiting)
                waiting += map(_Attempt, itertools.islice(tasks, max(wanted, 0)))
                if not busy and not waiting:
                    return
                while len(self._members) < min(self.options.num_workers, len(busy) + len(waiting)):
                    self._start_member()
                for member in self._members:
                    if member.answer is None and waiting:
                        self._give(member, function, waiting.popleft(), progress)
                if (ended := self._wait(progress)) is not None:
                    attempt, result = ended
                    if result is None:
                        waiting.appendleft(attempt)
                    else:
                        yield attempt.task, cast(Result, result[0])
                self._ask_counts(progress)
        finally:  # also after an error, here or in the caller's block
            for member in [member for member in self._members if member.attempt is not None]:
                self._remove(member)
            for member in self._members:
                if member.bar is not None:
                    member.bar.close()
                    member.bar = None

    def close(self) -> None:
        """Ends the workers."""
        for member in list(self._members):
            self._remove(member)

    def _list_resources(self) -> dict[str, float]:
        gpus = self.options.gpus_per_worker
        if gpus is None:
            gpus = float(self.ray.cluster_resources().get("GPU", 0) > 0)
        return {"num_cpus": self.options.cpus_per_worker, "num_gpus": gpus}

    def _start_member(self) -> None:
        # a second thread answers `count`
        actor = self.ray.remote(Worker).options(**self._list_resources(), max_concurrency=2).remote()
        self._members.append(_Member(self._num_started, actor, actor.start.remote(self.build, os.getcwd())))
        self._num_started += 1

    def _give(self, member: _Member, function: Call[object], attempt: _Attempt[Task], progress: RowProgress) -> None:
        if member.bar is None:
            member.bar = RowProgress(None, f"  worker {member.number} ({member.host})", progress.is_shown)
        member.attempt, member.rows_before = attempt, member.count[1]
        member.answer = member.actor.run.remote(function, attempt.task)

    def _wait(self, progress: RowProgress | None) -> tuple[_Attempt[Argument], tuple[object] | None] | None:
        """Waits for a worker; returns its task with the result, or with `None` if the worker is lost."""
        asked = {member.answer: member for member in self._members if member.answer is not None}
        ready, _ = self.ray.wait(list(asked), num_returns=1, timeout=POLL_SECONDS)
        if not ready:
            return None
        member = asked[ready[0]]
        attempt = member.attempt
        try:
            found = self.ray.get(member.answer)
        except self.ray.exceptions.RayTaskError as error:  # our code raised it, as it would in any worker
            member.answer = member.attempt = None
            if member.host is None:
                self._remove(member)
            raise error.cause from error
        except self.ray.exceptions.RayError as error:
            self._lose(member, error, progress)
            return None if attempt is None else (attempt, None)
        member.answer = member.attempt = None
        if attempt is None:
            self._welcome(member, found)
            return None
        self._count(member, found[1:], cast(RowProgress, progress))
        return attempt, found[:1]

    def _welcome(self, member: _Member, facts: WorkerFacts) -> None:
        """Takes a worker that has started; refuses one that would write other completions than the first."""
        member.host, self._num_lost_starting = facts.host, 0
        first = self.facts = self.facts or facts
        mine = {**facts.description, **facts.versions}
        expected = {**first.description, **first.versions, "spec_kd": __version__}
        for name in sorted(mine.keys() | expected.keys()):
            if mine.get(name) != expected.get(name):
                self._remove(member)
                raise RuntimeError(
                    f"{member} would write other completions: its `{name}` is {mine.get(name)!r}, not "
                    f"{expected.get(name)!r}. Give every node the same packages and the same target."
                )

    def _lose(self, member: _Member, error: Exception, progress: RowProgress | None) -> None:
        self._remove(member)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if member.attempt is None:
            self._num_lost_starting += 1
            num_lost, doing = self._num_lost_starting, "while they started"
        else:
            member.attempt.num_lost += 1
            num_lost, doing = member.attempt.num_lost, "with the same shard"
            cast(RowProgress, progress).advance(num_rows=member.rows_before - member.count[1])
        if num_lost >= self.options.max_attempts:
            raise RuntimeError(
                f"{num_lost} workers were lost {doing}, the last one by {reason}. Lower `batch_size` or give workers "
                "more memory if they run out of it. Finished shards are kept."
            )
        logger.warning("%s is lost (%s). Another does its work.", member, reason)

    def _remove(self, member: _Member) -> None:
        self.ray.kill(member.actor)  # it may be alive, and only cut off
        self._members.remove(member)
        if member.bar is not None:
            member.bar.close()

    def _ask_counts(self, progress: RowProgress) -> None:
        """Shows how far the workers are, as far as they have told without being waited for."""
        for member in self._members:
            if member.attempt is None:
                continue
            if member.counting is not None and self.ray.wait([member.counting], timeout=0)[0]:
                answer, member.counting = member.counting, None
                try:
                    self._count(member, self.ray.get(answer), progress)
                except self.ray.exceptions.RayError:
                    continue  # lost, as its task will tell
            member.counting = member.counting or member.actor.count.remote()

    def _count(self, member: _Member, count: tuple[int, int], progress: RowProgress) -> None:
        tokens, rows = (max(new - old, 0) for new, old in zip(count, member.count, strict=True))
        member.count = (member.count[0] + tokens, member.count[1] + rows)
        for bar in (progress, member.bar):
            if bar is not None and (tokens or rows):
                bar.advance(tokens, rows)
