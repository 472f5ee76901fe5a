"""Table, plot and verdict of `benchmarks/losses.py`, from its CSV and nothing else.

python benchmarks/losses_report.py
"""

import csv
import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
FLOOR, OURS, SPARSE = "four matrix products", "spec_kd", "spec_kd, sparse top-64"
TRL, DENSE = "TRL chunked divergence", "dense autograd"
CLAIMED = [(512, "256:384"), (2048, "256:384"), (512, "896:3584"), (2048, "896:3584")]
CLAIMED_VOCABULARY = 151936


def read(path: Path) -> dict[tuple[int, int, str], dict[tuple[str, str], tuple[float, float]]]:
    """Seconds and MiB by cell, by (loss, method)."""
    cells: dict = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            cell = cells.setdefault((int(row["tokens"]), int(row["vocab"]), row["hidden"]), {})
            cell[row["loss"], row["method"]] = (float(row["seconds"]), float(row["peak_mib"]))
    return cells


def judge(cells: dict) -> list[str]:
    """One line for each claim and cell: the worst figure beside the limit."""
    lines = []
    for tokens, hidden in CLAIMED:
        cell = cells.get((tokens, CLAIMED_VOCABULARY, hidden))
        if cell is None:
            continue
        floor = cell["-", FLOOR][0]
        losses = [loss for loss, method in cell if method == OURS]
        peers = [loss for loss in losses if (loss, TRL) in cell]
        limit = 1.3 if hidden == "896:3584" else 2.0
        figures = [
            ("time, of TRL's chunked divergence", max((cell[p, OURS][0] / cell[p, TRL][0], p) for p in peers), 0.5),
            ("peak memory, of TRL's", max((cell[p, OURS][1] / cell[p, TRL][1], p) for p in peers), 0.6),
            ("time, of the four products", max((cell[loss, OURS][0] / floor, loss) for loss in losses), limit),
            (
                "time of a sparse top-64 teacher, of the live one",
                (cell["forward_kl", SPARSE][0] / cell["forward_kl", OURS][0], "forward_kl"),
                0.8,
            ),
        ]
        if ("tvd", DENSE) in cell:
            worst = max((cell[loss, OURS][0] / cell[loss, DENSE][0], loss) for loss in losses)
            figures.append(("time, of its own dense loss", worst, 1.0))
        for what, (value, loss), most in figures:
            verdict = "held" if value <= most else "missed"
            lines.append(f"| {tokens} | {hidden} | {what} | {value:.2f} ({loss}) | {most} | {verdict} |")
    return lines


def write_tables(cells: dict, path: Path, threads: int, machine: dict) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    text = [
        "# Losses: time and memory",
        "",
        f"`python benchmarks/losses.py` on {machine['cpu']}, {threads} threads, float32; {versions}, Liger "
        f"{machine['liger']}. Forward and backward, with gradients of hidden states and head. Hidden sizes are "
        "draft:teacher. Seconds are medians; MiB the peak of the resident set over its state before the call, head "
        "gradient included; in brackets seconds over those of the four bare matrix products, each one call over all "
        "tokens. All methods of a cell took turns in one process, two or three rounds (in the CSV; TRL at 8,192 tokens "
        "once, whose two minutes other processes kept disturbing). The cells of 512 tokens were measured before the "
        "sparse losses took one softmax, which made those faster. No GPU was at hand: the compiled path is not "
        "measured.",
        "",
        "## What was asked for",
        "",
        f"Vocabulary {CLAIMED_VOCABULARY:,}. The worst divergence of each line stands beside its limit.",
        "",
        "| tokens | hidden | figure | worst | limit | |",
        "|---|---|---|---|---|---|",
        *judge(cells),
    ]
    for (tokens, vocab, hidden), cell in sorted(cells.items()):
        floor = cell["-", FLOOR][0]
        text += [
            "",
            f"## {tokens:,} tokens, vocabulary {vocab:,}, hidden {hidden}",
            "",
            "| loss | method | seconds | MiB |",
            "|---|---|---|---|",
        ]
        for (loss, method), (seconds, peak) in sorted(cell.items(), key=lambda item: (item[0][0], item[1][0])):
            text.append(f"| {loss} | {method} | {seconds:.2f} ({seconds / floor:.2f}x) | {peak:,.0f} |")
    path.write_text("\n".join(text) + "\n")


def plot(cells: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [(t, h) for t, h in CLAIMED if (t, CLAIMED_VOCABULARY, h) in cells]
    methods = [
        ("forward_kl", OURS), ("jsd", OURS), ("neg_log_acceptance", OURS), ("forward_kl", SPARSE), ("forward_kl", TRL),
        ("jsd", TRL), ("jsd", "Liger fused linear JSD"),
    ]  # fmt: skip
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.6), sharey=True, layout="constrained")
    height = 0.8 / len(shown)
    for i, (tokens, hidden) in enumerate(shown):
        cell = cells[tokens, CLAIMED_VOCABULARY, hidden]
        places = [row - (i - (len(shown) - 1) / 2) * height for row in range(len(methods))]
        for axis, values in (
            (axes[0], [cell[key][0] / cell["-", FLOOR][0] if key in cell else 0 for key in methods]),
            (axes[1], [cell[key][1] if key in cell else 0 for key in methods]),
        ):
            axis.barh(places, values, height, label=f"{tokens:,} tokens, {hidden.replace(':', ' <- ')}")
    axes[0].axvline(1.0, color="black", linewidth=1, linestyle="--")
    axes[0].set_xlabel("time over that of the four bare matrix products (dashed)")
    axes[1].set_xlabel("peak extra memory, MiB (head gradient included)")
    axes[0].set_yticks(range(len(methods)), [f"{loss}\n{method}" for loss, method in methods], fontsize=8)
    axes[0].invert_yaxis()
    axes[1].legend(fontsize=8, loc="center right", bbox_to_anchor=(1.0, 0.62))
    figure.suptitle(f"Loss forward + backward, vocabulary {CLAIMED_VOCABULARY:,}, float32, two CPU threads")
    figure.savefig(path, dpi=130)


def write_report(path: Path, threads: int = 2) -> None:
    """`losses.md`, `losses.png` and the machine beside the CSV."""
    about = path.with_name("losses_machine.json")
    if not about.exists():
        from importlib.metadata import version

        from machine import describe_machine

        about.write_text(json.dumps({**describe_machine(), "liger": version("liger-kernel")}, indent=2) + "\n")
    cells = read(path)
    write_tables(cells, path.with_suffix(".md"), threads, json.loads(about.read_text()))
    plot(cells, path.with_suffix(".png"))


if __name__ == "__main__":
    write_report(RESULTS / "losses.csv")
