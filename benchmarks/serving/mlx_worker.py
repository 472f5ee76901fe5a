"""Asks MLX-LM prompts and writes what it did, in its own Python environment; nothing of this project is imported.

    MLX/.venv/bin/python mlx_worker.py job.json answers.jsonl

The job names `target` and `draft` (folders), `num_draft_tokens`, `max_tokens` and `prompts` (lists of ids). Each prompt
gives one line, in the order of the job. MLX-LM tells for each token whether the draft proposed it, and no more: rounds
and drafted tokens are the calls of both models.
"""

import json
import sys
from typing import Any


class Counted:
    """A model that counts its calls."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.calls = 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        return self.model(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def count_rounds(from_draft: list[bool]) -> list[int]:
    """Accepted tokens of each round; the target's own token ends a round."""
    rounds = [0]
    for is_drafted in from_draft:
        rounds[-1] += is_drafted
        if not is_drafted:
            rounds.append(0)
    return rounds if rounds[-1] else rounds[:-1]


def main(job_path: str, output_path: str) -> None:
    with open(job_path, encoding="utf-8") as file:
        job = json.load(file)
    import mlx.core as mx
    import mlx_lm

    target, tokenizer = mlx_lm.load(job["target"])
    draft, _ = mlx_lm.load(job["draft"])
    dtypes = {
        str(value.dtype) for model in (target, draft) for _, value in mlx_lm.utils.tree_flatten(model.parameters())
    }
    with open(output_path, "w", encoding="utf-8") as file:
        for ids in job["prompts"]:
            models = Counted(target), Counted(draft)
            steps = list(
                mlx_lm.stream_generate(
                    models[0],
                    tokenizer,
                    ids,
                    max_tokens=job["max_tokens"],
                    draft_model=models[1],
                    num_draft_tokens=job["num_draft_tokens"],
                    prefill_step_size=len(ids),  # so that the prompt is one call of each model
                )
            )
            answer = {
                "completion_ids": [int(step.token) for step in steps],
                "finish_reason": steps[-1].finish_reason,
                "accepted": sum(step.from_draft for step in steps),
                "accepted_per_round": count_rounds([step.from_draft for step in steps]),
                "drafted": models[1].calls - 1,
                "target_calls": models[0].calls - 1,
                "version": f"mlx-lm {mlx_lm.__version__}, mlx {mx.__version__} on {mx.default_device()}",
                "dtypes": sorted(dtypes),
            }
            file.write(json.dumps(answer) + "\n")
            file.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
