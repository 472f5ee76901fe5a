"""Asks MLX-LM prompts and writes what it did, in its own Python environment; nothing of this project is imported.

    MLX/.venv/bin/python mlx_worker.py job.json answers.jsonl

The job names `target` and `draft` (folders), `num_draft_tokens`, `max_tokens` and `prompts` (lists of ids). Each prompt
gives one line, in the order of the job. MLX-LM tells for each token whether the draft proposed it, and no more: the
drafted tokens are counted from the calls of both models.
"""

import json
import sys
from typing import Any


class Watched:
    """A model that notes its calls.

    Args:
        model (`Any`): A model of MLX-LM.
        name (`str`): What it notes.
        calls (list of `str`): Where.
    """

    def __init__(self, model: Any, name: str, calls: list[str]) -> None:
        self.model, self.name, self.calls = model, name, calls

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls.append(self.name)
        return self.model(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def count_drafted(calls: list[str]) -> list[int]:
    """Calls of the draft before each call of the target, without the first of both, which read the prompt."""
    return [len(drafted) for drafted in "".join(call[0] for call in calls[2:]).split("t")[:-1]]


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
            calls: list[str] = []
            models = Watched(target, "target", calls), Watched(draft, "draft", calls)
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
                "drafted_per_round": count_drafted(calls),
                "version": f"mlx-lm {mlx_lm.__version__}, mlx {mx.__version__} on {mx.default_device()}",
                "dtypes": sorted(dtypes),
            }
            file.write(json.dumps(answer) + "\n")
            file.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
