"""Asks vLLM prompts and prints what it did, in vLLM's own Python environment; nothing of this project is imported.

    VLLM/.venv/bin/python vllm_worker.py job.json answers.jsonl

The job names `target` (a folder), `speculation` (vLLM's speculative config, or null), `sampling` (keys of
`SamplingParams`), `engine` (more arguments of `LLM`), `chunk` (prompts at once) and `prompts`: objects with
`ids`, `seed` and, for structured output, `schema`. Each prompt gives one line, in the order of the job.
"""

import json
import sys
from typing import Any

COUNTERS = "vllm:spec_decode_"


def read_counters(llm: Any) -> dict[str, Any]:
    """The counters of speculative decoding since the engine started."""
    metrics = [metric for metric in llm.get_metrics() if metric.name.startswith(COUNTERS)]
    return {
        metric.name.removeprefix(COUNTERS): list(metric.values) if hasattr(metric, "values") else metric.value
        for metric in metrics
    }


def describe(output: Any) -> dict[str, Any]:
    """What the engine says about one request."""
    completion = output.outputs[0]
    metrics = completion.spec_decode_metrics
    return {
        "completion_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "speculative_decoding": metrics.to_dict() if metrics is not None else None,
    }


def main(job_path: str, output_path: str) -> None:
    with open(job_path, encoding="utf-8") as file:
        job = json.load(file)
    import vllm
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    options = dict(job["engine"])
    if job["speculation"] is not None:
        options["speculative_config"] = job["speculation"]
        options["per_request_spec_decode_metrics"] = "detailed"
    llm = LLM(model=job["target"], disable_log_stats=False, **options)
    runner = "V2" if llm.llm_engine.vllm_config.use_v2_model_runner else "V1"
    with open(output_path, "w", encoding="utf-8") as file:
        for start in range(0, len(job["prompts"]), job["chunk"]):
            prompts = job["prompts"][start : start + job["chunk"]]
            sampling = [SamplingParams(seed=prompt["seed"], **job["sampling"]) for prompt in prompts]
            for parameters, prompt in zip(sampling, prompts, strict=True):
                if prompt.get("schema") is not None:
                    parameters.structured_outputs = StructuredOutputsParams(json=prompt["schema"])
            before = read_counters(llm)
            outputs = llm.generate(
                [{"prompt_token_ids": prompt["ids"]} for prompt in prompts], sampling, use_tqdm=False
            )
            counters = {"before": before, "after": read_counters(llm)}
            for output in outputs:
                answer = {**describe(output), "version": vllm.__version__, "model_runner": runner, "counters": counters}
                file.write(json.dumps(answer) + "\n")
            file.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
