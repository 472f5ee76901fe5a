"""The table and the picture of the result, from the answers of the servers that are kept.

    python -m experiments.smollm2.report

Writes `result.md` and `result.png` beside this file. The front page of the project shows both.
"""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.smollm2.conversations import KEPT
from spec_kd.evaluation.looping import find_loop
from spec_kd.reports.numbers import Interval, format_interval
from spec_kd.reports.plots import new_figure

FOLDER = Path(__file__).parent
# Drafted tokens and where drafts end were chosen on the validation prompts
RESULTS = {"function_calling": "192x8-seed0-train-f16-3-1t-test-pmin0.5"}
TITLES = {"function_calling": "function calling", "biology": "biology", "general": "general"}
COLORS = {"plain": "#9aa5b1", "draft": "#1f77b4"}


@dataclass(frozen=True)
class Result:
    """What llama-server did with a domain's draft and without it, on P prompts.

    Args:
        domain (`str`): Name of the domain.
        num_prompts (`int`): P.
        num_equal (`int`): Prompts with the same text on both sides.
        num_loops (`int`): Prompts whose plain completion loops.
        rates (`dict[str, numpy.ndarray]`):
            Tokens a second of each prompt `(P,)`: `"plain"` and `"draft"` while decoding, `"plain request"` and
            `"draft request"` with the prompt's time.
        speedup, request_speedup, predicted (`Interval`): Medians over prompts, and what replay and costs predicted.
    """

    domain: str
    num_prompts: int
    num_equal: int
    num_loops: int
    rates: dict[str, Any]
    speedup: Interval
    request_speedup: Interval
    predicted: Interval


def read_result(domain: str) -> Result:
    """The result of a domain from its raw answers."""
    name, folder = RESULTS[domain], KEPT / domain / "measured"
    found = json.loads((folder / f"{name}.json").read_text())
    with gzip.open(folder / f"{name}.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    rates = {}
    for side in ("plain", "draft"):
        answers = sorted((row for row in rows if row.get("side") == side), key=lambda row: row["row"])
        tokens = np.array([len(row["completion_ids"]) for row in answers])
        rates[side] = (tokens - 1) / [row["decoding_seconds"] or np.nan for row in answers]
        rates[f"{side} request"] = tokens / [row["request_seconds"] for row in answers]
    return Result(
        domain,
        found["requests"],
        found["equal_texts"],
        sum(find_loop(row["completion_ids"]) is not None for row in rows if row.get("side") == "plain"),
        rates,
        *(Interval(*found[key]) for key in ("speedup", "request_speedup", "predicted_speedup")),
    )


def write_table(results: list[Result]) -> str:
    """The results as a table in Markdown."""
    lines = [
        "| domain | tokens per second: without, with the draft | times faster | predicted | whole request, prompt "
        "included | same text | loops |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in results:
        without, with_draft = (np.nanmedian(one.rates[side]) for side in ("plain", "draft"))
        lines.append(
            f"| {TITLES[one.domain]} | {without:.1f}, {with_draft:.1f} | **{format_interval(one.speedup)}** "
            f"| {format_interval(one.predicted)} | {format_interval(one.request_speedup)} "
            f"| {one.num_equal} of {one.num_prompts} | {one.num_loops} |"
        )
    return "\n".join(lines) + "\n"


def draw(results: list[Result], path: Path) -> None:
    """Bars of tokens per second, median over prompts, while decoding and for whole requests."""
    figure = new_figure(7.5, 3.0)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, suffix, title in zip(axes, ("", " request"), ("decoding", "whole request, prompt included"), strict=True):
        for i, one in enumerate(results):
            for j, (side, label) in enumerate((("plain", "target alone"), ("draft", "with the trained draft"))):
                height = np.nanmedian(one.rates[side + suffix])
                axis.bar(i + 0.38 * (j - 0.5), height, 0.36, color=COLORS[side], label=label if i == 0 else None)
                axis.text(i + 0.38 * (j - 0.5), height, f"{height:.0f}", ha="center", va="bottom", fontsize=9)
        axis.set_xticks(range(len(results)), [TITLES[one.domain] for one in results])
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("tokens per second, one core")
    axes[0].legend(frameon=False, fontsize=9)
    axes[0].margins(y=0.25)
    figure.savefig(path, dpi=130)


def main() -> None:
    results = [read_result(domain) for domain in RESULTS]
    table = write_table(results)
    (FOLDER / "result.md").write_text(table)
    draw(results, FOLDER / "result.png")
    print(table)


if __name__ == "__main__":
    main()
