"""What a run leaves beside its draft: a table, a plot and a JSON record of acceptance."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from spec_kd import AcceptanceMetrics, WhiteBoxDistillConfig
from spec_kd.trainer.draft_trainer import DraftTrainer

from .arguments import ExampleArguments

History = list[tuple[int, dict[float, AcceptanceMetrics]]]  # step, and metrics by temperature


@dataclass(frozen=True)
class ExampleResult:
    """What a run leaves in memory: the trainer, the target and the metrics of every evaluation."""

    trainer: DraftTrainer
    target: PreTrainedModel
    history: History

    @property
    def before(self) -> dict[float, AcceptanceMetrics]:
        return self.history[0][1]

    @property
    def after(self) -> dict[float, AcceptanceMetrics]:
        return self.history[-1][1]


Described = dict[str, dict[str, list[float]]]  # by temperature ("T=0") and metric: value and 95 % interval


def save_run(
    result: ExampleResult,
    rows: dict[str, dict[float, AcceptanceMetrics]],
    options: ExampleArguments,
    training: WhiteBoxDistillConfig,
    **facts: Any,
) -> None:
    """Writes `acceptance.md`, `.png` and `.json` (with `facts`) beside the draft, and prints the table."""
    folder = Path(training.output_dir)
    metrics, history = {label: describe(row) for label, row in rows.items()}, describe_history(result.history)
    table = format_table(metrics)
    (folder / "acceptance.md").write_text(table + "\n", encoding="utf-8")
    plot_histories({options.method: history}, folder / "acceptance.png", "Acceptance over training")
    record = {
        "method": options.method,
        "divergence": training.divergence if options.method == "white_box" else None,
        "teacher_signal": options.stored_signal,
        "seed": training.seed,
        "steps": result.trainer.state.global_step,
        "num_assistant_tokens": options.num_assistant_tokens,
        "metrics": metrics,
        "history": history,
        **facts,
    }
    save_record(record, folder / "acceptance.json")
    print(
        f"\nExpected acceptance at {options.num_assistant_tokens} drafted tokens, with 95 % intervals over prompts\n\n"
        f"{table}\n\nDraft, model card, plot and table are in {folder}/"
    )


def describe(by_temperature: dict[float, AcceptanceMetrics]) -> Described:
    """Metrics as JSON: `[value, low, high]` of each."""
    described = {}
    for temperature, metrics in by_temperature.items():
        named = {name: getattr(metrics, name) for name in ("alpha", "block_efficiency", "acceptance_rate")}
        described[f"T={temperature:g}"] = {
            name: [round(x, 4) for x in interval] for name, interval in named.items() if interval is not None
        }
    return described


def describe_history(history: History) -> list[dict[str, Any]]:
    """Step and metrics of every evaluation, as JSON."""
    return [{"step": step, **describe(metrics)} for step, metrics in history]


def format_table(rows: dict[str, Described]) -> str:
    """A Markdown table, one line for each label: alpha, block efficiency and acceptance with 95 % intervals."""
    lines = [
        "| | alpha_greedy | alpha_t1 | block efficiency (greedy) | acceptance rate (greedy) |",
        "|---|---|---|---|---|",
    ]
    for label, row in rows.items():
        greedy, sampled = row["T=0"], row["T=1"]
        shown = (greedy["alpha"], sampled["alpha"], greedy["block_efficiency"], greedy["acceptance_rate"])
        lines.append(
            f"| {label} | " + " | ".join("{:.3f} [{:.3f}, {:.3f}]".format(*interval) for interval in shown) + " |"
        )
    return "\n".join(lines)


def plot_histories(histories: dict[str, list[dict[str, Any]]], path: Path, title: str) -> None:
    """Greedy acceptance over training steps with 95 % bands, one line for each label, from `describe_history`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, name, ylabel in (
        (axes[0], "alpha", "alpha_greedy"),
        (axes[1], "block_efficiency", "tokens per target pass (greedy)"),
    ):
        for label, history in histories.items():
            steps = [entry["step"] for entry in history]
            value, low, high = zip(*(entry["T=0"][name] for entry in history), strict=True)
            axis.plot(steps, value, marker="o", markersize=3, label=label)
            axis.fill_between(steps, low, high, alpha=0.2)
        axis.set(xlabel="training step", ylabel=ylabel)
        axis.set_ylim(bottom=0 if name == "alpha" else 1)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def save_record(record: dict[str, Any], path: Path) -> None:
    """Writes JSON for people and scripts."""
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
