"""What every step of the reading of a large log is to datatrove."""

from collections.abc import Iterable

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from loguru import logger

from spec_kd.open_types import JsonObject
from spec_kd.prompts.logs.scale.work_folder import WorkFolder


class LogStep(PipelineStep):
    """A step whose tasks hand on arrays in a folder, and no documents.

    Args:
        work (`WorkFolder`): The folder.
    """

    type = "query logs"

    def __init__(self, work: WorkFolder):
        super().__init__()
        self.work = work

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> Iterable[object]:
        """Does one task."""
        with self.track_time("task"):
            self.do(rank, world_size)
        return ()

    def do(self, task: int, num_tasks: int) -> None:
        """Does one of so many tasks."""
        raise NotImplementedError


class QuietStep(PipelineStep):
    """A first step that does nothing but keep datatrove's messages from the terminal, also in workers."""

    type, name = "query logs", "quiet"

    def __init__(self) -> None:
        super().__init__()
        self.__setstate__({})

    def __setstate__(self, state: JsonObject) -> None:
        self.__dict__.update(state)
        logger.disable("datatrove")

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Passes on what it gets."""
        return data
