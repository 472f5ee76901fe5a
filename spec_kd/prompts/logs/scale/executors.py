"""datatrove's executors, and how this process waits for them."""

import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from tqdm.auto import tqdm

from spec_kd.prompts.logs.scale.options import ScaleOptions
from spec_kd.prompts.logs.scale.step import QuietStep

POLL_SECONDS = 10.0


class Stages:
    """The stages of a run: each begins when the one before it is complete.

    Args:
        folder (`Path`): Where datatrove keeps its messages, and which tasks are complete; these are not repeated.
        options (`ScaleOptions`): The executor, and how many tasks it runs at a time.
        show_progress (`bool`): Whether to show a progress bar.
    """

    def __init__(self, folder: Path, options: ScaleOptions, show_progress: bool):
        self._folder, self._options, self._show_progress = folder, options, show_progress
        self._kwargs = options.executor_kwargs or {}
        self._stages: list[tuple[str, list[PipelineStep], int]] = []

    def add(self, name: str, num_tasks: int, *steps: PipelineStep) -> None:
        """Adds a stage of so many tasks."""
        self._stages.append((name, list(steps), num_tasks))

    def run(self) -> None:
        """Runs the stages that are not complete.

        Raises:
            ImportError: The executor's package is not installed.
            RuntimeError: A task failed on another machine; names the folder with its messages.
            Exception: What a task on this machine raised.
        """
        run = {"local": self._run_local, "ray": self._run_ray, "slurm": self._run_slurm}
        run[str(self._options.executor)]()

    def build_slurm(self) -> list[SlurmPipelineExecutor]:
        """The executors of SLURM, one for each stage, each of which depends on the one before it."""
        executors: list[SlurmPipelineExecutor] = []
        for number, (name, steps, num_tasks) in enumerate(self._stages):
            executors.append(
                SlurmPipelineExecutor(
                    pipeline=steps,
                    tasks=num_tasks,
                    workers=self._options.num_workers,
                    depends=executors[-1] if executors else None,
                    logging_dir=self._name_folder(number, name),
                    **{"job_name": f"logs-{name}", **self._kwargs},
                )
            )
        return executors

    def _name_folder(self, number: int, name: str) -> str:
        return str(self._folder / f"{number}-{name}")

    def _run_each(self, build: Callable[[list[PipelineStep], int, str], PipelineStep]) -> None:
        for number, (name, steps, num_tasks) in enumerate(
            tqdm(self._stages, desc="Query logs", unit=" stages", disable=not self._show_progress)
        ):
            executor = build([QuietStep(), *steps], num_tasks, self._name_folder(number, name))
            executor.run()
            if missing := executor.get_incomplete_ranks():
                raise RuntimeError(
                    f"{len(missing)} of {num_tasks} tasks of the stage `{name}` failed. Their messages are in "
                    f"`{self._name_folder(number, name)}/logs`; repeat the call to go on from there."
                )

    def _run_local(self) -> None:
        import multiprocess

        modules = {type(step).__module__ for _, steps, _ in self._stages for step in steps}
        multiprocess.set_forkserver_preload(sorted(modules))  # once, and not in each worker

        def build(steps: list[PipelineStep], num_tasks: int, folder: str) -> LocalPipelineExecutor:
            workers = min(self._options.num_workers, num_tasks)
            return LocalPipelineExecutor(steps, tasks=num_tasks, workers=workers, logging_dir=folder, **self._kwargs)

        self._run_each(build)

    def _run_ray(self) -> None:
        try:
            import ray
        except ImportError as error:
            raise ImportError(
                f"`executor='ray'` needs Ray ({error}). Install it: pip install spec_kd[scale,ray]"
            ) from error
        if not ray.is_initialized():
            ray.init(log_to_driver=False)

        def build(steps: list[PipelineStep], num_tasks: int, folder: str) -> RayPipelineExecutor:
            workers = min(self._options.num_workers, num_tasks)
            return RayPipelineExecutor(steps, tasks=num_tasks, workers=workers, logging_dir=folder, **self._kwargs)

        self._run_each(build)

    def _run_slurm(self) -> None:
        if shutil.which("sbatch") is None:
            raise FileNotFoundError(
                "`executor='slurm'` hands jobs in with `sbatch`, which is not on this machine. Call from a login node."
            )
        executors = self.build_slurm()
        executors[-1].run()
        bar = tqdm(total=len(executors), desc="Query logs", unit=" stages", disable=not self._show_progress)
        with bar:
            for executor in executors:
                while executor.get_incomplete_ranks(skip_completed=True):
                    if not _has_jobs([one.job_id for one in executors]):
                        break
                    time.sleep(POLL_SECONDS)
                if missing := executor.get_incomplete_ranks(skip_completed=True):
                    raise RuntimeError(
                        f"The jobs have ended, but {len(missing)} tasks of `{executor.job_name}` are not complete. "
                        f"Their messages are in `{self._folder}`; repeat the call to go on from there."
                    )
                bar.update()


def _has_jobs(ids: Sequence[object]) -> bool:
    """Whether SLURM still has any of these jobs, waiting or running."""
    known = ",".join(str(one) for one in ids if one not in (None, -1))
    if not known:
        return False
    found = subprocess.run(["squeue", "--noheader", "--jobs", known], capture_output=True, text=True, check=False)
    return bool(found.stdout.strip())
