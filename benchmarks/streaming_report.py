"""Table and plot of `benchmarks/streaming.py`, from its JSON and nothing else.

python -m benchmarks.streaming_report
"""

from pathlib import Path

from benchmarks import harness

RESULTS = Path(__file__).parent / "results"
SMOOTHED = 5  # updates that a point of the plot is a mean of


def write_tables(record: dict, path: Path) -> None:
    arguments, parameters = record["arguments"], record["parameters"]
    runs = list(record["runs"])
    lines = [
        "# Acceptance over a stream of requests whose domain shifts",
        "",
        f"`{record['command']}`: {arguments['requests_per_domain']} requests of each domain, one domain after the "
        f"other, an update every {arguments['update_interval']}; served by speculative decoding with "
        f"{arguments['num_assistant_tokens']} drafted tokens at temperature 1; target of "
        f"{parameters['target'] / 1e6:.1f} M parameters (trained on all three domains), draft of "
        f"{parameters['draft'] / 1e6:.1f} M (general only), "
        f"learning rate {arguments['learning_rate']}, one seed. {record['machine']['cpu']}.",
        "",
        "Tokens a target pass: over the first 5 updates of a domain, and over its last 15. Intervals are 95 % over "
        "updates.",
        "",
        "| domain | " + " | ".join(f"{run}: first | last" for run in runs) + " |",
        "|---" * (1 + 2 * len(runs)) + "|",
    ]
    for domain in record["domains"]:
        cells = [domain]
        for run in runs:
            for part in ("first", "last"):
                value, low, high = record["summary"][domain][run][part]
                cells.append(f"{value:.2f} [{low:.2f}, {high:.2f}]")
        lines.append("| " + " | ".join(cells) + " |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def plot(record: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axis = figure.subplots()
    interval, per_domain = record["arguments"]["update_interval"], record["arguments"]["requests_per_domain"]
    for (name, logs), color in zip(record["runs"].items(), ("tab:blue", "tab:orange", "tab:gray"), strict=True):
        values = [log["block_efficiency"] for log in logs]
        requests = [interval * (i + 1) for i in range(len(values))]
        means = [
            sum(values[max(0, i + 1 - SMOOTHED) : i + 1]) / len(values[max(0, i + 1 - SMOOTHED) : i + 1])
            for i in range(len(values))
        ]
        axis.plot(requests, values, color=color, alpha=0.2, linewidth=1)
        axis.plot(requests, means, color=color, label=name)
    top = axis.get_ylim()[1]
    for i, domain in enumerate(record["domains"]):
        if i:
            axis.axvline(i * per_domain, color="black", linewidth=0.8, linestyle="--")
        axis.text((i + 0.5) * per_domain, top, domain, ha="center", va="top")
    axis.set(xlabel="requests served", ylabel="tokens per target pass", xlim=(0, per_domain * len(record["domains"])))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="lower left")
    figure.savefig(path, dpi=130)


def write_report(path: Path) -> None:
    """`streaming.md` and `streaming.png` beside the JSON."""
    harness.write_report(path, write_tables, plot)


if __name__ == "__main__":
    write_report(RESULTS / "streaming.json")
