"""Asks OpenVINO GenAI on CPU real prompts and records how many drafted tokens it accepted for each.

    python -m benchmarks.serving.record_openvino --data_dir DATA --work_dir outputs/serving

`benchmarks/serving/build_openvino.sh` installs OpenVINO GenAI; OPENVINO_GENAI names another folder with the same
layout. Without the hints it computes in bfloat16 on many CPUs, with an 8-bit KV cache. A killed run continues after its
last prompt. `--pack` writes the recording, compressed, where the project keeps it.
"""

from typing import Any

from benchmarks.serving.worker import Worker, record_all

WORKER = Worker(
    script="openvino_worker.py",
    tool="openvino",
    variable="OPENVINO_GENAI",
    build="build_openvino.sh",
    environment={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
)
HINTS = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "INFERENCE_NUM_THREADS": 1}
# Setting -> what the worker is told
SETTINGS = {"greedy-4": {"num_assistant_tokens": 4, "max_new_tokens": 64, "hints": HINTS}}


def describe(answer: dict[str, Any]) -> dict[str, Any]:
    """The worker's answer under the names of a recording."""
    ended_by_eos = answer["completion_ids"][-1] == answer["eos_token_id"]
    kept = ("completion_ids", "drafted", "accepted", "version")
    return {
        **{name: answer[name] for name in kept},
        "stop_type": "eos" if ended_by_eos else "limit",
        "ended_by_eos": ended_by_eos,
    }


if __name__ == "__main__":
    record_all("openvino", __doc__, WORKER, SETTINGS, describe)
