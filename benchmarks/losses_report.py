"""Tables, plots and verdict of `benchmarks/losses.py`, from its CSVs and nothing else.

python -m benchmarks.losses_report
"""

import csv
import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
FLOOR, SPEC_KD, SPARSE = "four matrix products", "spec_kd", "spec_kd, sparse top-64"
TRL, LIGER, DENSE = "TRL chunked divergence", "Liger fused linear JSD", "dense autograd"
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
        losses = [loss for loss, method in cell if method == SPEC_KD]
        peers = [loss for loss in losses if (loss, TRL) in cell]
        limit = 1.3 if hidden == "896:3584" else 2.0
        figures = [
            ("time, of TRL's chunked divergence", max((cell[p, SPEC_KD][0] / cell[p, TRL][0], p) for p in peers), 0.5),
            ("peak memory, of TRL's", max((cell[p, SPEC_KD][1] / cell[p, TRL][1], p) for p in peers), 0.6),
            ("time, of the four products", max((cell[loss, SPEC_KD][0] / floor, loss) for loss in losses), limit),
            (
                "time of a sparse top-64 teacher, of the live one",
                (cell["forward_kl", SPARSE][0] / cell["forward_kl", SPEC_KD][0], "forward_kl"),
                0.8,
            ),
        ]
        if ("tvd", DENSE) in cell:
            worst = max((cell[loss, SPEC_KD][0] / cell[loss, DENSE][0], loss) for loss in losses)
            figures.append(("time, of its own dense loss", worst, 1.0))
        for what, (value, loss), most in figures:
            verdict = "held" if value <= most else "missed"
            lines.append(f"| {tokens} | {hidden} | {what} | {value:.2f} ({loss}) | {most} | {verdict} |")
    return lines


def describe_cpu(machine: dict, versions: str) -> str:
    return (
        f"`python -m benchmarks.losses` on {machine['cpu']}, {machine['threads']} threads, float32; {versions}. "
        "Forward and backward, with gradients of hidden states and head. Hidden sizes are draft:teacher. Seconds "
        "are medians; MiB the peak of the resident set over its state before the call, head gradient included; in "
        "brackets seconds over those of the four bare matrix products, each one call over all tokens. All methods "
        "of a cell took turns in one process, two or three rounds (in the CSV; TRL at 8,192 tokens once, whose two "
        "minutes other processes kept disturbing). The cells of 512 tokens were measured before the sparse losses "
        "took one softmax, which made those faster. A GPU's figures are in [losses_gpu.md](losses_gpu.md)."
    )


def describe_gpu(machine: dict, versions: str) -> str:
    return (
        f"`python -m benchmarks.losses --device cuda` on one {machine['accelerator']}, bfloat16; {versions}. Forward "
        "and backward, with gradients of hidden states and head. Hidden sizes are draft:teacher. Milliseconds are "
        "medians between CUDA events after three calls that do not count (compiling is in those); MiB the allocator's "
        "peak over its state before the call, head gradient included; in brackets the time over that of the four bare "
        "matrix products, each one call over all tokens. Liger's is its Triton kernel. "
        "Of the cells in losses.py, those without a table here were not measured."
    )


def write_tables(cells: dict, path: Path, machine: dict) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    on_gpu = machine["accelerator"] is not None
    unit, scale, digits = ("ms", 1000, 1) if on_gpu else ("seconds", 1, 2)
    text = [
        f"# Losses: time and memory{' on a GPU' if on_gpu else ''}",
        "",
        (describe_gpu if on_gpu else describe_cpu)(machine, f"{versions}, Liger {machine['liger']}"),
    ]
    if not on_gpu:
        text += list_claims(cells)
    for (tokens, vocab, hidden), cell in sorted(cells.items()):
        floor = cell["-", FLOOR][0]
        text += [
            "",
            f"## {tokens:,} tokens, vocabulary {vocab:,}, hidden {hidden}",
            "",
            f"| loss | method | {unit} | MiB |",
            "|---|---|---|---|",
        ]
        for (loss, method), (seconds, peak) in sorted(cell.items(), key=lambda item: (item[0][0], item[1][0])):
            time = f"{scale * seconds:.{digits}f}"
            text.append(f"| {loss} | {method} | {time} ({seconds / floor:.2f}x) | {peak:,.0f} |")
    path.write_text("\n".join(text) + "\n")


def list_claims(cells: dict) -> list[str]:
    return [
        "",
        "## What was asked for",
        "",
        f"Vocabulary {CLAIMED_VOCABULARY:,}. The worst divergence of each line stands beside its limit.",
        "",
        "| tokens | hidden | figure | worst | limit | |",
        "|---|---|---|---|---|---|",
        *judge(cells),
    ]


def plot(cells: dict, path: Path, machine: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    on_gpu = machine["accelerator"] is not None
    shown = sorted(cells) if on_gpu else [cell for t, h in CLAIMED if (cell := (t, CLAIMED_VOCABULARY, h)) in cells]
    methods = [
        ("forward_kl", SPEC_KD), ("jsd", SPEC_KD), ("neg_log_acceptance", SPEC_KD), ("forward_kl", SPARSE),
        ("forward_kl", TRL), ("jsd", TRL), ("jsd", LIGER),
    ]  # fmt: skip
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.6), sharey=True, layout="constrained")
    height = 0.8 / len(shown)
    for i, (tokens, vocab, hidden) in enumerate(shown):
        cell = cells[tokens, vocab, hidden]
        places = [row - (i - (len(shown) - 1) / 2) * height for row in range(len(methods))]
        for axis, values in (
            (axes[0], [cell[key][0] / cell["-", FLOOR][0] if key in cell else 0 for key in methods]),
            (axes[1], [cell[key][1] if key in cell else 0 for key in methods]),
        ):
            axis.barh(places, values, height, label=f"{tokens:,} x {vocab:,}, {hidden.replace(':', ' <- ')}")
    axes[0].axvline(1.0, color="black", linewidth=1, linestyle="--")
    axes[0].set_xlabel("time over that of the four bare matrix products (dashed)")
    axes[1].set_xlabel("peak extra memory, MiB (head gradient included)")
    axes[0].set_yticks(range(len(methods)), [f"{loss}\n{method}" for loss, method in methods], fontsize=8)
    axes[0].invert_yaxis()
    axes[1].legend(
        fontsize=8, loc="lower right" if on_gpu else "center right", bbox_to_anchor=None if on_gpu else (1.0, 0.62)
    )
    where = f"bfloat16, {machine['accelerator']}" if on_gpu else f"float32, {machine['threads']} CPU threads"
    figure.suptitle(f"Loss forward + backward; tokens x vocabulary, hidden sizes draft <- teacher; {where}")
    figure.savefig(path, dpi=130)


def write_report(path: Path) -> None:
    """Table, plot and the machine beside the CSV."""
    about = path.with_name(f"{path.stem}_machine.json")
    if not about.exists():
        from importlib.metadata import version

        from benchmarks.harness import describe_machine

        machine = {**describe_machine(), "liger": version("liger-kernel")}
        about.write_text(json.dumps(machine, indent=2) + "\n")
    cells, machine = read(path), json.loads(about.read_text())
    write_tables(cells, path.with_suffix(".md"), machine)
    plot(cells, path.with_suffix(".png"), machine)


if __name__ == "__main__":
    for name in ("losses.csv", "losses_gpu.csv"):
        if (RESULTS / name).exists():
            write_report(RESULTS / name)
