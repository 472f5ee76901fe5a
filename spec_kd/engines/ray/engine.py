"""The engine that lets workers of a Ray cluster run the target."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType

from spec_kd.engines.base import Completion, Engine, Result, Task
from spec_kd.engines.ray.options import RayOptions
from spec_kd.engines.ray.pool import WorkerPool
from spec_kd.engines.transformers import TransformersEngine
from spec_kd.losses import SignalSpec
from spec_kd.open_types import Argument
from spec_kd.options import check_text, resolve_options
from spec_kd.progress import RowProgress
from spec_kd.sampling.options import SamplingOptions
from spec_kd.sampling.prompts import PromptBatch

MAX_CHECKED_IDS = 2**22


class RayEngine(Engine):
    """Lets workers of a Ray cluster run the target, each with an engine of its own on one of the nodes.

    `generate_responses` and `score_completions` share out the shards of their run. A worker computes a whole shard, as
    one machine does, and returns it to the driver (this process), which writes it: no node needs the `output_dir`, and
    every shard is written once. If a worker or a node is lost, another worker gets its shard. If the driver is lost,
    the same call continues after the shards that are on disk.

    Every node needs the same packages, and must find the target under the same name. Workers take the driver's working
    directory where it exists. In all else this engine is the one that the workers run: its `name`, its checks, what it
    can do. `generate` and `score` ask one worker.

    Args:
        target (`str` or `Callable[[], Engine]`):
            Path or Hub id of the target, which workers run with [`TransformersEngine`]; or a function without
            arguments that makes another engine in a worker, such as
            `lambda: VLLMEngine("my-org/target", tensor_parallel_size=2)`.
        options (`RayOptions`, *optional*): How many workers, what each takes, and which cluster.
        given: The fields of [`RayOptions`] as keywords; `num_workers` is required.

    Raises:
        ImportError: Ray is not installed.
        TypeError: A keyword is no option.
        ValueError: An option is out of its range, or several processes were launched, which would share the shards too.
        ConnectionError: There is no Ray cluster at `ray_address`.
        Exception: What the first worker raised as it made its engine.

    Example:

    ```python
    with RayEngine("my-org/target", num_workers=8, ray_address="auto") as target:
        responses = generate_responses(target, prompts, output_dir="distilled")
    ```
    """

    def __init__(self, target: str | Callable[[], Engine], options: RayOptions | None = None, **given: Argument):
        options = resolve_options(RayOptions, options, given)
        if not options.num_workers:
            raise ValueError("`num_workers` is 0, but `RayEngine` needs at least one. Set `num_workers`.")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("Ray shares out the shards, and so would these launched processes. Start one process.")
        if not callable(target):
            check_text("target", target)
            target = partial(TransformersEngine, target)
        ray, self._is_mine = _connect(options.ray_address)
        self._pool = WorkerPool(ray, target, options)
        try:
            facts = self._pool.start()
        except BaseException:
            self.close()
            raise
        self.name, self.target_name, self._description = facts.name, facts.target_name, facts.description
        self.processing_class, self.default_batch_size = facts.processing_class, facts.default_batch_size
        self.is_reproducible, self.logprobs_mode = facts.is_reproducible, facts.logprobs_mode

    def __enter__(self) -> "RayEngine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers, and disconnects from Ray if this engine connected to it."""
        self._pool.close()
        if self._is_mine:
            self._pool.ray.shutdown()
            self._is_mine = False

    def describe(self) -> dict[str, object]:
        """What the engine of the workers says; all of them must say the same."""
        return self._description

    def check(self, prompts: Sequence[list[int]], options: SamplingOptions | None, signal: SignalSpec | None) -> None:
        """Lets a worker check the prompts, some at a time; see [`Engine.check`]."""
        for part in _divide(prompts):
            self._ask("check", part, options, signal)

    def generate(
        self,
        prompts: Sequence[list[int]],
        options: SamplingOptions,
        signal: SignalSpec | None = None,
        seed: str = "",
    ) -> list[Completion]:
        """Lets one worker write completions; see [`Engine.generate`]."""
        return self._ask("generate", _copy(prompts), options, signal, seed)

    def score(
        self, prompts: Sequence[list[int]], completions: Sequence[list[int]], signal: SignalSpec, seed: str = ""
    ) -> list[Completion]:
        """Lets one worker score completions; see [`Engine.score`]."""
        return self._ask("score", _copy(prompts), list(completions), signal, seed)

    def run_tasks(
        self, function: Callable[[Engine, Task, RowProgress], Result], tasks: Iterator[Task], progress: RowProgress
    ) -> Iterator[tuple[Task, Result]]:
        """Shares tasks out to the workers, and yields them as they are done; see [`Engine.run_tasks`].

        Raises:
            RuntimeError: Too many workers were lost with the same task, or as they started, or a worker would write
                other completions than the first.
            Exception: What the function raised in a worker.
        """
        return self._pool.run(function, tasks, progress)

    def _ask(self, method: str, *arguments: object) -> Argument:
        """What a method of the engine returns in one worker."""
        with RowProgress(None, "", is_shown=False) as progress:
            [(_, result)] = self.run_tasks(_call, iter([(method, arguments)]), progress)
        return result


def _call(engine: Engine, task: tuple[str, tuple[object, ...]], progress: RowProgress) -> Argument:
    method, arguments = task
    return getattr(engine, method)(*arguments)


def _copy(prompts: Sequence[list[int]], chosen: range | None = None) -> PromptBatch:
    """Some prompts, or all, as another process can read them: with their rows, and nobody to tell of progress."""
    chosen = range(len(prompts)) if chosen is None else chosen
    rows = prompts.rows if isinstance(prompts, PromptBatch) else range(len(prompts))
    return PromptBatch([prompts[index] for index in chosen], [rows[index] for index in chosen])


def _divide(prompts: Sequence[list[int]]) -> Iterator[PromptBatch]:
    """The prompts in parts with about `MAX_CHECKED_IDS` ids, so that a message has a bounded size."""
    start = count = 0
    for index, ids in enumerate(prompts):
        count += len(ids)
        if count >= MAX_CHECKED_IDS or index == len(prompts) - 1:
            yield _copy(prompts, range(start, index + 1))
            start, count = index + 1, 0


def import_ray() -> ModuleType:
    """Ray; raises `ImportError` with the command that installs it."""
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise ImportError(f"Workers need Ray ({error}). Install it: pip install spec_kd[ray]") from error
    return ray


def _connect(address: str | None) -> tuple[ModuleType, bool]:
    """Ray, connected to its cluster, and whether this call connected it."""
    ray = import_ray()
    if ray.is_initialized():
        return ray, False
    try:
        ray.init(address, logging_level=logging.WARNING)
    except ConnectionError as error:
        raise ConnectionError(
            f"No Ray cluster answers at `ray_address={address!r}` ({error}). Start one with `ray start --head`, or "
            "leave the address out for a cluster on this machine."
        ) from error
    return ray, True
