"""How the reading of a large log is shared out."""

from dataclasses import dataclass

from spec_kd.open_types import Arguments
from spec_kd.options import check_choice, check_int, document_options, option, refuse
from spec_kd.prompts.logs.options import LogOptions

EXECUTORS = ("local", "slurm", "ray")
NUM_TASKS = 16
LOWEST_THRESHOLD = 0.75


@document_options
@dataclass(frozen=True)
class ScaleOptions:
    """How datatrove shares out the reading of a log that is too large for one process, see [`load_query_logs`].

    Raises:
        ValueError: An option is out of its range.
    """

    executor: str | None = option(
        "Who does the work, with datatrove (`pip install spec_kd[scale]`): local (processes of this machine), slurm "
        "(jobs) or ray (a cluster). By default this process reads the log and remembers every prompt in its memory.",
        default=None,
    )
    num_tasks: int = option(
        "Number of shares of the log. Memory follows the largest share: plain JSON lines are cut evenly, any other "
        "file is in one share.",
        default=NUM_TASKS,
    )
    num_workers: int = option("Most tasks at a time.", default=1)
    executor_kwargs: Arguments | None = option(
        "Further arguments of datatrove's executor, such as partition=cpu and time=4:00:00 for SLURM, which needs both;"
        " none by default.",
        default=None,
    )

    def __post_init__(self) -> None:
        check_choice("executor", self.executor, EXECUTORS, is_optional=True)
        check_int("num_tasks", self.num_tasks)
        check_int("num_workers", self.num_workers)
        given = self.executor_kwargs or {}
        refuse(
            (not isinstance(given, dict), f"`executor_kwargs` is {given!r}, but must be a dictionary or None."),
            (
                self.executor is None and (given or self.num_tasks != NUM_TASKS or self.num_workers != 1),
                "`num_tasks`, `num_workers` and `executor_kwargs` are of an executor, but `executor` is None. Set "
                "`executor`, such as to 'local'.",
            ),
        )
        if self.executor == "slurm" and not {"partition", "time"} <= set(given):
            raise ValueError(
                f"`executor_kwargs` is {given!r}, but SLURM needs a partition and a time limit. Give `partition` and "
                "`time`."
            )

    def check(self, options: LogOptions) -> None:
        """Raises `ValueError` for an option of the reading that only one process can follow."""
        if self.executor is None:
            return
        threshold = options.near_duplicate_threshold
        for name in ("max_per_user", "max_per_day"):
            if getattr(options, name) is not None:
                raise ValueError(
                    f"`{name}` is {getattr(options, name)}, but which prompts are the first of a limit is only known "
                    "where one process reads the whole log. Leave it out, or set no `executor`."
                )
        if threshold is not None and threshold < LOWEST_THRESHOLD:
            raise ValueError(
                f"`near_duplicate_threshold` is {threshold}, but with an executor must be at least {LOWEST_THRESHOLD}: "
                "below it, too many prompts of a large log would be compared. Raise it, or set no `executor`."
            )
