"""The embedded default of examples/train_fc.py for several seeds and both methods, at equal steps.

    python -m benchmarks.embedded_seeds --seeds 0 1 2

Each seed draws its own conversations, weights and order: nothing is shared between seeds. Options that this script does
not know go to train_fc.py. A killed benchmark continues at the run it was in. Writes embedded_seeds.{json,md,png} to
`--results_dir`.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from transformers import AutoTokenizer

from benchmarks.harness import describe_machine
from examples.made_up import embedded_run
from examples.made_up.arguments import METHODS
from examples.made_up.function_calling import score_answers
from examples.made_up.record import plot_histories, save_record
from spec_kd import generate_responses

FIGURES = (("T=0", "alpha", "alpha_greedy"), ("T=1", "alpha", "alpha_t1"), ("T=0", "block_efficiency", "block eff."))


def score_target(seed: int, num_prompts: int, max_new_tokens: int) -> dict[str, float]:
    """How well the domain target's completions answer requests for unseen tools."""
    embedded = embedded_run.prepare(embedded_run.FUNCTION_CALLING, seed)  # from the cache
    prompts = embedded.test_prompts.select(range(num_prompts))
    tokenizer = AutoTokenizer.from_pretrained(embedded.models.domain_target)
    responses = generate_responses(
        embedded.models.domain_target,
        prompts.select_columns(["prompt"]),
        processing_class=tokenizer,
        max_new_tokens=max_new_tokens,
        temperature=0.0,
    )
    completions = [tokenizer.decode(ids, skip_special_tokens=True) for ids in responses["completion_ids"]]
    return score_answers(completions, list(prompts))


def summarize(runs: list[dict]) -> dict[str, dict[str, dict]]:
    """Mean, lowest and highest value over seeds, by label of the table and by figure."""
    values: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        for label, figures in run["metrics"].items():
            for temperature, name, title in FIGURES:
                label_values = values.setdefault(f"{label} ({run['method']})", {})
                label_values.setdefault(title, []).append(figures[temperature][name][0])
    return {
        label: {
            title: {"mean": round(statistics.mean(v), 4), "low": min(v), "high": max(v)} for title, v in titles.items()
        }
        for label, titles in values.items()
    }


def format_summary(summary: dict[str, dict[str, dict]]) -> str:
    """A Markdown table: mean over seeds and the range."""
    titles = [title for *_, title in FIGURES]
    lines = ["| mean over seeds [lowest, highest] | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for label, figures in summary.items():
        cells = [f"{figures[t]['mean']:.3f} [{figures[t]['low']:.3f}, {figures[t]['high']:.3f}]" for t in titles]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run(seed: int, method: str, runs_dir: Path, options: list[str]) -> dict:
    """The record of one run; one that is complete in `runs_dir` is not repeated."""
    folder = runs_dir / f"{method}-{seed}"
    path = folder / "record.json"
    if not path.exists():
        command = ["accelerate", "launch", "examples/train_fc.py", "--method", method, "--seed", str(seed)]
        subprocess.run([*command, "--output_dir", str(folder), *options], check=True)
        record = json.loads((folder / "acceptance.json").read_text(encoding="utf-8"))
        record["target_answers_on_unseen_tools"] = score_target(seed, num_prompts=64, max_new_tokens=96)
        save_record(record, path)
    return json.loads(path.read_text(encoding="utf-8"))


def main(argv: list[str]) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results_dir", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--runs_dir", type=Path, default=Path("outputs/embedded_seeds"))
    arguments, rest = parser.parse_known_args(argv)
    runs = [run(seed, method, arguments.runs_dir, rest) for seed in arguments.seeds for method in METHODS]
    summary = summarize(runs)
    record = {
        "what": "the embedded default of examples/train_fc.py; each seed has its own data, weights and order",
        "machine": describe_machine(),
        "seeds": arguments.seeds,
        "options": rest,
        "mean_over_seeds": summary,
        "runs": runs,
    }
    arguments.results_dir.mkdir(parents=True, exist_ok=True)
    save_record(record, arguments.results_dir / "embedded_seeds.json")
    table = format_summary(summary)
    (arguments.results_dir / "embedded_seeds.md").write_text(table + "\n", encoding="utf-8")
    title = f"Embedded default, seed {arguments.seeds[0]}: function calling with unseen tools"
    histories = {run["method"]: run["history"] for run in runs if run["seed"] == arguments.seeds[0]}
    plot_histories(histories, arguments.results_dir / "embedded_seeds.png", title)
    print(table)
    return record


if __name__ == "__main__":
    main(sys.argv[1:])
