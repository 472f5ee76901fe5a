"""Tables, plot and verdict of `benchmarks/online.py`, from its JSON and nothing else.

python -m benchmarks.online_report
"""

from pathlib import Path
from typing import Any

from benchmarks import harness

RESULTS = Path(__file__).parent / "results"
OURS = "OnlineGKDTrainer"
SPEED_LIMITS = {"TRL GKDTrainer": 1.2, "TRL DistillationTrainer": 1.0}
DIVERGENCES = {0.0: "forward KL", 1.0: "reverse KL"}
COLORS = {OURS: "tab:blue", "TRL DistillationTrainer": "tab:orange", "TRL GKDTrainer": "tab:green"}


def judge(record: dict) -> list[tuple[str, str, str, bool]]:
    """What was asked for: figure, value, limit, held."""
    rows = []
    for peer, limit in SPEED_LIMITS.items():
        for batch, speed in record["throughput"].items():
            value, low, high = speed["ours_over"][peer]
            text = f"{value:.2f} [{low:.2f}, {high:.2f}]"
            rows.append((f"tokens/s over {peer}'s, {batch}", text, f">= {limit}", value >= limit))
    return rows


def format_interval(interval: list[float], digits: int = 3) -> str:
    value, low, high = interval
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def describe_throughput(record: dict) -> list[str]:
    """Speed and parts of a step, by batch."""
    lines = [
        "",
        "## Tokens per second",
        "",
        "Completion tokens generated and trained on, per second of wall-clock, everything between the ends of two "
        "optimizer steps counted. The trainers take turns, a step each, on the same prompts; the first step of each is "
        "left out. Intervals are over steps.",
    ]
    for batch, speed in record["throughput"].items():
        parts = list(next(iter(speed["seconds_per_part"].values())))
        lines += [
            "",
            f"{batch} a step:",
            "",
            f"| trainer | tokens/s | ours over it | tokens a step | seconds a step | {' | '.join(parts)} |",
            "|---|---|---|---|---|" + "---|" * len(parts),
        ]
        for name, seconds in speed["seconds_per_part"].items():
            ratio = "" if name == OURS else format_interval(speed["ours_over"][name], 2)
            shares = " | ".join(f"{seconds[part]:.2f}" for part in parts)
            lines.append(
                f"| {name} | {format_interval(speed['tokens_per_second'][name], 0)} | {ratio} "
                f"| {speed['tokens_per_step'][name]:.0f} | {speed['seconds_per_step'][name]:.2f} | {shares} |"
            )
    lines += [
        "",
        "The last columns are seconds of a step by what they went into. The teacher's head belongs to `teacher` with "
        "GKD, which makes all of its logits, and to the loss with the other two.",
    ]
    return lines


def describe_time_to_alpha(record: dict) -> list[str]:
    """When each trainer reached the alpha that all reached."""
    race = record["time_to_alpha"]
    first = next(iter(race["curves"].values()))[0]["alpha"]
    lines = [
        "",
        "## Time to a given alpha",
        "",
        f"alpha_t1 on texts that the target wrote for {race['test_prompts']} held-out prompts, by replay, with the "
        f"clock stopped; {race['batch']} a step, one seed. The given alpha, {race['goal']:.3f}, is the highest that "
        f"all three reached; the draft starts at {format_interval(first)}. Between two measurements alpha is taken as "
        "linear.",
        "",
        "| trainer | seconds to it | steps to it | tokens to it | alpha_t1 at the end |",
        "|---|---|---|---|---|",
    ]
    for name, point in race["to_goal"].items():
        last = race["curves"][name][-1]["alpha"]
        lines.append(
            f"| {name} | {point['seconds']:.1f} | {point['step']:.1f} | {point['tokens']:,.0f} "
            f"| {format_interval(last)} |"
        )
    return lines


def describe_settings(record: dict) -> list[str]:
    """Every argument that was not left at its default."""
    lines = ["", "## Settings", "", "| argument | " + " | ".join(COLORS) + " |", "|---|" + "---|" * len(COLORS)]
    by_batch = record["settings"]
    first = next(iter(by_batch.values()))
    for key in dict.fromkeys(key for options in first.values() for key in options):
        cells = []
        for name in COLORS:
            values = dict.fromkeys(str(options[name][key]) for options in by_batch.values() if key in options[name])
            cells.append(", ".join(values))
        lines.append(f"| `{key}` | " + " | ".join(cells) + " |")
    return [
        *lines,
        "",
        "Where two values stand, they are of the two batches; everything else is at its default, which all three share "
        "where they have it. TRL's documentation advises vLLM for speed, which needs a GPU. On a CPU "
        "DistillationTrainer projects padded completion positions too; GKD projects prompts too, and generates for "
        "each micro batch by itself. GKD divides its loss by the number of tokens of the dataset's completions.",
    ]


def write_tables(record: dict, path: Path) -> None:
    machine, prompts = record["machine"], record["prompt_tokens"]
    versions = machine["versions"]
    divergence = DIVERGENCES.get(record["beta"], f"JSD with beta {record['beta']}")
    sizes = {name: own["num_parameters"] / 1e6 for name, own in record["models"].items()}
    lines = [
        "# On-policy distillation against TRL's",
        "",
        f"`{record['command']}`: {record['what']}; prompts of {prompts['median']:.0f} tokens in the median, at most "
        f"{prompts['most']}; {divergence}, vocabulary {record['vocab_size']:,}, target of "
        f"{sizes['domain_target']:.1f} M and draft of {sizes['generic_draft']:.1f} M parameters. {machine['cpu']}, "
        f"{machine['threads']} threads, float32, trl {versions['trl']}, transformers {versions['transformers']}, "
        f"torch {versions['torch']}.",
        "",
        "## What was asked for",
        "",
        "| figure | value | limit | |",
        "|---|---|---|---|",
    ]
    lines += [f"| {a} | {b} | {c} | {'held' if held else 'missed'} |" for a, b, c, held in judge(record)]
    lines += [*describe_throughput(record), *describe_time_to_alpha(record), *describe_settings(record)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def plot_throughput(record: dict, axes: Any) -> None:
    batches = record["throughput"]
    for offset, (name, color) in enumerate(COLORS.items()):
        figures = [speed["tokens_per_second"][name] for speed in batches.values()]
        places = [i + 0.27 * (offset - 1) for i in range(len(batches))]
        errors = [[v - low for v, low, _ in figures], [high - v for v, _, high in figures]]
        axes.bar(places, [v for v, _, _ in figures], width=0.25, yerr=errors, color=color, label=name, capsize=3)
    axes.set_xticks(range(len(batches)), batches)
    axes.set(ylabel="completion tokens a second, 95 % intervals", title="equal settings")
    axes.legend(frameon=False)


def plot_time_to_alpha(record: dict, axes: Any) -> None:
    race = record["time_to_alpha"]
    for name, curve in race["curves"].items():
        axes.plot(
            [point["seconds"] for point in curve], [point["alpha"][0] for point in curve],
            marker=".", color=COLORS[name], label=name,
        )  # fmt: skip
    axes.axhline(race["goal"], color="tab:gray", linestyle="--", linewidth=1)
    axes.set(xlabel="seconds of training", ylabel="alpha_t1 on held-out prompts", title=f"{race['batch']} a step")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def plot(record: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    throughput, race = figure.subplots(1, 2)
    plot_throughput(record, throughput)
    plot_time_to_alpha(record, race)
    figure.savefig(path, dpi=130)


def write_report(path: Path) -> None:
    """`online.md` and `online.png` beside the JSON."""
    harness.write_report(path, write_tables, plot)


if __name__ == "__main__":
    write_report(RESULTS / "online.json")
