"""Asks MLX-LM on CPU real prompts and records which of its tokens the draft proposed.

    python -m benchmarks.serving.record_mlx --data_dir DATA --work_dir outputs/serving

`benchmarks/serving/build_mlx.sh` installs MLX-LM; MLX_LM names another folder with the same layout. A killed run
continues after its last prompt. `--pack` writes the recording, compressed, where the project keeps it.
"""

from typing import Any

from benchmarks.serving.worker import Worker, record_all

MAX_NEW_TOKENS = 24  # so that MLX's CPU backend, which is slow, answers 48 prompts
WORKER = Worker(
    script="mlx_worker.py",
    tool="mlx",
    variable="MLX_LM",
    build="build_mlx.sh",
    environment={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
)
# Setting -> arguments of `stream_generate`
SETTINGS = {"greedy-4": {"num_draft_tokens": 4, "max_tokens": MAX_NEW_TOKENS}}


def describe(answer: dict[str, Any]) -> dict[str, Any]:
    """The worker's answer under the names of a recording."""
    return {
        "completion_ids": answer["completion_ids"],
        "stop_type": answer["finish_reason"],
        "ended_by_eos": answer["finish_reason"] == "stop",
        "drafted": sum(answer["drafted_per_round"]),
        "accepted": answer["accepted"],
        "drafted_per_round": answer["drafted_per_round"],
        "accepted_per_round": answer["accepted_per_round"],
        "dtypes": answer["dtypes"],
        "version": answer["version"],
    }


if __name__ == "__main__":
    record_all("mlx-lm", __doc__, WORKER, SETTINGS, describe)
