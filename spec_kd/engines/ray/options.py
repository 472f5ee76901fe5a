"""Options of the workers on a Ray cluster."""

from dataclasses import dataclass, fields

from spec_kd.options import check_int, check_number, check_text, document_options, option


@document_options
@dataclass(frozen=True)
class RayOptions:
    """How many workers share the work on a Ray cluster, and what each of them takes.

    Raises `ValueError` for an option out of its range, and for one that says something of workers where there are none.
    """

    num_workers: int = option(
        "Number of Ray workers, each with the target in a process of its own; with 0 this process does the work, "
        "without Ray.",
        default=0,
    )
    ray_address: str | None = option(
        "Address of the Ray cluster, such as `auto` or `ray://host:10001`; by default the one in `RAY_ADDRESS`, else "
        "a new cluster on this machine. Not used where Ray is connected already.",
        default=None,
    )
    cpus_per_worker: float = option("CPU cores of a worker, and with that its number of threads.", default=1)
    gpus_per_worker: float | None = option(
        "GPUs of a worker; by default one if the cluster has any, else none.", default=None
    )
    max_attempts: int = option(
        "Number of workers that may be lost with the same shard before the job stops.", default=5
    )

    def __post_init__(self) -> None:
        check_int("num_workers", self.num_workers, 0)
        check_text("ray_address", self.ray_address, is_optional=True)
        check_number("cpus_per_worker", self.cpus_per_worker, 0)
        check_number("gpus_per_worker", self.gpus_per_worker, 0, is_optional=True)
        check_int("max_attempts", self.max_attempts)
        if said := [
            one.name for one in fields(self) if getattr(self, one.name) != one.default and not self.num_workers
        ]:
            raise ValueError(f"`{said[0]}` is of Ray workers, but `num_workers` is 0. Set `num_workers`.")
