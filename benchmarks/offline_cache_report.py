"""Table, plot and verdict of `benchmarks/offline_cache.py`, from its JSON and nothing else.

python -m benchmarks.offline_cache_report
"""

import statistics
from pathlib import Path

from benchmarks import harness

RESULTS = Path(__file__).parent / "results"
LIVE, PLAIN, UNSIGNED = "live teacher", "plain fine-tuning", "no signal"
# Published elsewhere or plain arithmetic, bytes a token: not measured here.
DISTILLKIT = "114 to 300 (published)"
SIZE_LIMITS = {"sampled_counts": 40, "sampled_logprobs": 64}  # by method


def judge(record: dict) -> list[tuple[str, str, str, bool]]:
    """What was asked for: figure, value, limit, held."""
    rows = []
    limits = {f"{method}, {record['num_draws']} draws": limit for method, limit in SIZE_LIMITS.items()}
    for signal, limit in limits.items():
        size = record["sizes"][signal]
        value = f"{size['bytes_per_token']:.1f} ({size['ids_per_token']:.1f} distinct ids a token)"
        rows.append((f"bytes a token on disk, {signal}", value, f"<= {limit}", size["bytes_per_token"] <= limit))
    for setting, differences in record["alpha_minus_live"].items():
        for signal in limits:
            value, low, high = differences[signal]
            is_held = abs(value) < 0.01 and (high - low) / 2 <= 0.01
            text = f"{value:+.4f} [{low:+.4f}, {high:+.4f}]"
            limit = "within 0.01, half-width <= 0.01"
            rows.append((f"alpha minus the live teacher's, {signal}, {setting}", text, limit, is_held))
    plain = record["seconds_per_step"][PLAIN]
    for signal in limits:
        ratio = plain / record["seconds_per_step"][signal]
        rows.append((f"training speed over plain fine-tuning's, {signal}", f"{ratio:.2f}", ">= 0.9", ratio >= 0.9))
    for signal in limits:
        overhead = find_overhead(record, signal)
        rows.append((f"generation time for the signal, {signal}", f"{overhead:+.1%}", "<= 10 %", overhead <= 0.1))
    for setting, figures in record["without_target"].items():
        pair = (figures["block_efficiency"][0], figures["block_efficiency_without_target"][0])
        text = f"{pair[1]:.4f} and {pair[0]:.4f} tokens a target pass"
        name = f"replay without and with the target, {setting}"
        rows.append((name, text, "equal to 0.1 %", abs(pair[0] - pair[1]) < 1e-3 * pair[0]))
    return rows


def find_overhead(record: dict, signal: str) -> float:
    """Median over rounds of the time with a signal over the time without one in the same round, minus 1."""
    seconds = record["generation_seconds"]
    return statistics.median(a / b for a, b in zip(seconds[signal], seconds[UNSIGNED], strict=True)) - 1


def format_interval(interval: list[float]) -> str:
    value, low, high = interval
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def write_tables(record: dict, path: Path) -> None:
    machine = record["machine"]
    vocab, parameters = record["vocab_size"], record["parameters"]
    lines = [
        "# The target answers once: size, quality and speed of what it leaves",
        "",
        f"`{record['command']}`: {record['what']}; {record['train_prompts']} training and "
        f"{record['test_prompts']} test prompts, {record['steps']} steps of 8 rows, forward KL, vocabulary {vocab:,}, "
        f"target of {parameters['target'] / 1e6:.1f} M and draft of {parameters['draft'] / 1e6:.1f} M parameters, one "
        f"seed. {machine['cpu']}, {machine['threads']} threads, float32. Intervals are 95 % over prompts.",
        "",
        "## What was asked for",
        "",
        "| figure | value | limit | |",
        "|---|---|---|---|",
    ]
    lines += [f"| {a} | {b} | {c} | {'held' if held else 'missed'} |" for a, b, c, held in judge(record)]
    lines += [
        "",
        "## Bytes a completion token on disk",
        "",
        "Parquet's compressed size of the columns `teacher_*`, everything of the signal counted.",
        "",
        "| signal | bytes | of them token log p | of them packed signal | ids a token |",
        "|---|---|---|---|---|",
    ]
    for signal, size in record["sizes"].items():
        columns, ids = size["by_column"], size["ids_per_token"]
        lines.append(
            f"| {signal} | {size['bytes_per_token']:.1f} | {columns['teacher_token_logprobs']:.1f} "
            f"| {columns.get('teacher_signal', 0):.1f} | {'1' if ids is None else f'{ids:.1f}'} |"
        )
    lines += [
        f"| DistillKit, top-k logits | {DISTILLKIT} | | | |",
        f"| all logits in float16 | {2 * vocab:,} (by arithmetic) | | | {vocab:,} |",
        "| hidden states of 4,096 in bfloat16 | 8,192 (by arithmetic) | | | |",
        "",
        "## alpha after training, and training speed",
        "",
        "| trained from | alpha_greedy | alpha_t1 | tokens a target pass (greedy, T = 1) | steps/s of plain SFT |",
        "|---|---|---|---|---|",
    ]
    plain = record["seconds_per_step"][PLAIN]
    for method in record["alpha"]["T=0"]:
        cells = [format_interval(record["alpha"][setting][method]) for setting in ("T=0", "T=1")]
        efficiency = ", ".join(f"{record['block_efficiency'][setting][method][0]:.2f}" for setting in ("T=0", "T=1"))
        seconds = record["seconds_per_step"].get(method)
        speed = "" if seconds is None else f"{plain / seconds:.2f}"
        lines.append(f"| {method} | {cells[0]} | {cells[1]} | {efficiency} | {speed} |")
    lines += [
        "",
        "Counts and log-probabilities of the same draws give the same gradient of forward KL; here the draws differ, "
        "since the counts were kept while the target wrote and the log-probabilities added to its text. "
        "Plain SFT is `BlackBoxSFTTrainer`, whose loss is TRL's; it was timed over a few steps and not trained to the "
        "end.",
        *(line for note in record.get("notes", []) for line in ("", note)),
    ]
    lines += ["", "## Generation with the signal", "", "| signal | time, of generation without |", "|---|---|"]
    timed = [name for name in record["generation_seconds"] if name != UNSIGNED]
    lines += [f"| {signal} | {1 + find_overhead(record, signal):.3f} |" for signal in timed]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def plot(record: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    sizes, quality = figure.subplots(1, 2)
    names = list(record["sizes"])
    values = [record["sizes"][name]["bytes_per_token"] for name in names]
    sizes.barh(names, values, color="tab:blue")
    for i, value in enumerate(values):
        sizes.text(value, i, f" {value:.1f}", va="center", fontsize=9)
    sizes.axvspan(114, 300, color="tab:gray", alpha=0.3)
    sizes.text(118, len(names) - 0.6, "DistillKit, published", fontsize=8)
    sizes.set(xlabel="bytes a token on disk", xlim=(0, 310))
    sizes.invert_yaxis()
    methods = list(record["alpha"]["T=0"])
    for offset, (setting, label) in enumerate((("T=0", "alpha_greedy"), ("T=1", "alpha_t1"))):
        intervals = [record["alpha"][setting][method] for method in methods]
        places = [i + 0.2 * offset - 0.1 for i in range(len(methods))]
        errors = [[v - low for v, low, _ in intervals], [high - v for v, _, high in intervals]]
        quality.errorbar([v for v, _, _ in intervals], places, xerr=errors, fmt="o", label=label, capsize=3)
    quality.set_yticks(range(len(methods)), methods)
    quality.set(xlabel="alpha on test prompts, 95 % intervals")
    quality.invert_yaxis()
    quality.grid(alpha=0.3)
    quality.legend(frameon=False)
    figure.savefig(path, dpi=130)


def write_report(path: Path) -> None:
    """The Markdown and the picture beside the JSON."""
    harness.write_report(path, write_tables, plot)


if __name__ == "__main__":
    for record_path in RESULTS.glob("offline_cache_*.json"):
        write_report(record_path)
