"""A worker: an engine in a process of its own, on any node of a Ray cluster."""

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import transformers

from spec_kd.engines.base import Engine, Result, Task
from spec_kd.progress import RowProgress
from spec_kd.version import __version__
from spec_kd.vocabulary import ProcessingClass


@dataclass(frozen=True)
class WorkerFacts:
    """What a worker says of itself.

    Args:
        host (`str`): Address of its node.
        description (`dict`): What its engine's `describe` returns.
        versions (`dict[str, str]`): Versions of the libraries that compute, by name.
        name (`str`): This and all below are the attributes of its engine.
        target_name (`str`, *optional*): See [`Engine`].
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*): See [`Engine`].
        default_batch_size (`int`, *optional*): See [`Engine`].
        is_reproducible (`bool`): See [`Engine`].
        logprobs_mode (`str`): See [`Engine`].
    """

    host: str
    description: dict[str, object]
    versions: dict[str, str]
    name: str
    target_name: str | None
    processing_class: ProcessingClass | None
    default_batch_size: int | None
    is_reproducible: bool
    logprobs_mode: str


class Worker:
    """Runs an engine in one thread, while another tells how far it is."""

    def __init__(self) -> None:
        self._progress = RowProgress(0, "", is_shown=False)

    def start(self, build: Callable[[], Engine], folder: str) -> WorkerFacts:
        """Makes the engine.

        Args:
            build (`Callable`): Makes it.
            folder (`str`): Working directory of the driver. It becomes the worker's where it exists, so that relative
                paths mean the same.
        """
        import ray

        if os.path.isdir(folder):
            os.chdir(folder)
        with _raising_readable_errors():
            self._engine = engine = build()
            return WorkerFacts(
                ray.util.get_node_ip_address(),
                engine.describe(),
                {"spec_kd": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
                engine.name,
                engine.target_name,
                engine.processing_class,
                engine.default_batch_size,
                engine.is_reproducible,
                engine.logprobs_mode,
            )

    def run(self, function: Callable[[Engine, Task, RowProgress], Result], task: Task) -> tuple[Result, int, int]:
        """Runs a function on a task; returns its result, and what `count` returns after it."""
        with _raising_readable_errors():
            result = function(self._engine, task, self._progress)
        return (result, *self.count())

    def count(self) -> tuple[int, int]:
        """The tokens and the rows of this worker since its start."""
        return self._progress.num_tokens, self._progress.num_rows


@contextmanager
def _raising_readable_errors() -> Iterator[None]:
    """Raises errors that the driver can unpickle; Ray would replace others by one of its own."""
    try:
        yield
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        raise
