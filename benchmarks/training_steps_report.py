"""Table of `benchmarks/training_steps.py`, from its JSON and nothing else.

python -m benchmarks.training_steps_report
"""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def write_report(path: Path) -> None:
    """`training_steps.md` beside the JSON."""
    record = json.loads(path.read_text())
    machine = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    regions = sorted({name for row in record["steps"].values() for name in row["shares"]})
    titles = [name.removeprefix("time/").removesuffix("_share") for name in regions]
    text = [
        "# A step of each trainer at the size of real models",
        "",
        f"`python -m benchmarks.training_steps` on one {machine['accelerator']}; {versions}. {record['pair']}: shapes "
        f"of these models, random weights. {record['batch']} rows of {record['length']:,} tokens a step, three "
        "quarters of them the answer; bf16, gradient checkpointing and all other options at their defaults. Seconds "
        "are medians of the steps after four that do not count (on-policy trainers: after the first, and without a "
        "row where they were not measured); TRL's GKD makes all logits, and takes its batch in four parts to fit. MiB "
        "are the allocator's peak: the draft in "
        "float32, AdamW's state, and the target in bf16, which stays in memory also where it is not used.",
        "",
        f"| trainer | seconds a step | peak MiB |{''.join(f' {title} |' for title in titles)}",
        f"|---|---|---|{'---|' * len(titles)}",
    ]
    for name, row in record["steps"].items():
        shares = "".join(f" {row['shares'][region]:.0%} |" if region in row["shares"] else " |" for region in regions)
        text.append(f"| {name} | {row['seconds']:.3f} | {row['peak_mib']:,.0f} |{shares}")
    text += ["", "| what the target does before | tokens a second |", "|---|---|"]
    text += [f"| {name} | {row['tokens_per_second']:,.0f} |" for name, row in record["target"].items()]
    path.with_suffix(".md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    write_report(RESULTS / "training_steps.json")
