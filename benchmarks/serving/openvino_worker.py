"""Asks OpenVINO GenAI prompts and writes what it did, in its own Python environment; imports nothing of this project.

    OPENVINO/.venv/bin/python openvino_worker.py job.json answers.jsonl

The job names `target` and `draft` (folders, which are converted beside the answers if they are not yet),
`num_assistant_tokens`, `max_new_tokens`, `hints` (properties of the device) and `prompts` (lists of ids). Each prompt
gives one line, in the order of the job.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def convert(model: str, folder: Path) -> str:
    """The model in OpenVINO's form, in float32, in a folder that is whole once it is there."""
    output = folder / f"openvino-{Path(model).name}"
    if not output.exists():
        from optimum.exporters.openvino import main_export
        from optimum.intel import OVConfig

        partial = output.with_suffix(".partial")
        main_export(
            model,
            partial,
            task="text-generation-with-past",
            ov_config=OVConfig(dtype="fp32"),
            convert_tokenizer=True,
        )
        os.replace(partial, output)
    return str(output)


def read_ids(result: Any) -> list[int]:
    """The completion of the one sequence of a result."""
    return [int(token) for token in result.tokens[0]]


def main(job_path: str, output_path: str) -> None:
    with open(job_path, encoding="utf-8") as file:
        job = json.load(file)
    folder = Path(output_path).parent
    target, draft = convert(job["target"], folder), convert(job["draft"], folder)
    import numpy
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 1  # GB
    scheduler.enable_prefix_caching = False
    pipeline = openvino_genai.LLMPipeline(
        target,
        "CPU",
        scheduler_config=scheduler,
        draft_model=openvino_genai.draft_model(draft, "CPU", scheduler_config=scheduler, **job["hints"]),
        **job["hints"],
    )
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = job["max_new_tokens"]
    config.num_assistant_tokens = job["num_assistant_tokens"]
    config.do_sample = False
    eos = pipeline.get_tokenizer().get_eos_token_id()
    config.eos_token_id, config.stop_token_ids = eos, {eos}
    with open(output_path, "w", encoding="utf-8") as file:
        for ids in job["prompts"]:
            prompt = openvino.Tensor(numpy.array([ids], dtype=numpy.int64))
            result = pipeline.generate(prompt, config)
            metrics = result.extended_perf_metrics
            answer = {
                "completion_ids": read_ids(result),
                "accepted": metrics.get_num_accepted_tokens(),
                "drafted": metrics.get_num_draft_tokens(),
                "eos_token_id": eos,
                "version": f"openvino-genai {openvino_genai.get_version()}",
            }
            file.write(json.dumps(answer) + "\n")
            file.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
