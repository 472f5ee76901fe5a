"""Tables and plots of an experiment, from its JSON lines and nothing else.

python -m experiments.paper_claims report --profile cpu
"""

from collections import Counter
from pathlib import Path
from typing import Any

from spec_kd.evaluation import Interval

from .cells import DIVERGED, Cell
from .claims import Judgement, judge_claims
from .compare import (
    ALPHA,
    BLOCK_EFFICIENCY,
    SETTING_NAMES,
    Lines,
    compare,
    find_common_lines,
    number_builds,
    predict_best,
    read_costs,
)
from .models import describe_build, list_model_lines
from .plan import find_questions
from .plots import plot_claims, plot_curves, plot_sizes, plot_summary
from .profile import Profile, make
from .questions import Question
from .record import Record


def write_report(path: Path) -> Path:
    """`report.md` and its pictures beside the record at `path`.

    Raises:
        `ValueError`: There is nothing in the record.
    """
    record = Record(path)
    line = record.find("profile", "profile")
    if line is None:
        raise ValueError(f"{path} has no profile, so nothing was run. Run the stages `targets` to `runs` first.")
    profile = make(Profile, line["profile"], str(path))
    questions = find_questions(profile, record)
    judgements = judge_claims(profile, record, questions)
    lines = [
        f"# The paper's claims, measured again: profile {profile.name}",
        "",
        f"`python -m experiments.paper_claims report --profile {profile.name}` makes this from "
        f"`{path.name}`. Made on: {'; '.join(line['key'] for line in record.list('machine'))}. gamma = "
        f"{profile.training.num_assistant_tokens}. Intervals are 95 % over test prompts, which both sides of a "
        "comparison share, with all seeds added up; what single seeds say is beside them. A claim held, or did not, "
        "where the interval and every seed alone say so. Models that were built again, on another machine, are marked: "
        "a comparison never mixes builds.",
        "",
        "![Tokens a target pass](summary.png)",
        *_write_claims(judgements),
        *_write_models(profile, record),
        *_write_drift(profile, record),
        *_write_queries(record),
    ]
    for question in questions:
        lines += _write_question(profile, record, question)
    if diverged := [describe_cell(Cell(**line["cell"])) for line in record.list(DIVERGED)]:
        lines += ["", "## Cells whose loss diverged", "", *(f"- {cell}" for cell in diverged)]
    report = path.with_name("report.md")
    report.write_text("\n".join(lines) + "\n", encoding="utf-8")
    plot_summary(profile, record, path.with_name("summary.png"))
    plot_claims(judgements, path.with_name("claims.png"))
    plot_curves(profile, record, path.with_name("curves.png"))
    plot_sizes(profile, record, questions, path.with_name("sizes.png"))
    return report


def format_interval(interval: Interval | None, is_relative: bool = False) -> str:
    """Value and interval; shares in percent."""
    if interval is None:
        return ""
    if is_relative:
        return "{:+.1%} [{:+.1%}, {:+.1%}]".format(*interval)
    return "{:.3f} [{:.3f}, {:.3f}]".format(*interval)


def _make_table(columns: list[str], rows: list[list[str]]) -> list[str]:
    return ["", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"] + [
        "| " + " | ".join(row) + " |" for row in rows
    ]


def _write_claims(judgements: list[Judgement]) -> list[str]:
    lines = ["", "## Claims", "", "![Claims](claims.png)"]
    for claim in dict.fromkeys(judgement.claim for judgement in judgements):
        own = [judgement for judgement in judgements if judgement.claim == claim]
        counts = Counter(judgement.verdict for judgement in own)
        lines += ["", f"**{claim}** (paper: {own[0].stated}): " + ", ".join(f"{v} {n}" for v, n in counts.items())]
        rows = [[j.where, format_interval(j.interval, j.is_relative), j.verdict] for j in own]
        lines += _make_table(["where", "measured", ""], rows)
    return lines


def _write_models(profile: Profile, record: Record) -> list[str]:
    rows = [
        [
            line["name"],
            f"{line['num_parameters'] / 1e6:.2f} M",
            str(line["num_steps"]),
            f"{line['num_tokens'] / 1e6:.2f} M",
            f"{line['seconds'] / 60:.0f}",
            f"{line['curve'][0][1]:.3f} to {line['curve'][-1][1]:.3f}",
            "yes" if line["is_flat"] else "no",
            str(line["rows_too_long"]),
        ]
        for line in list_model_lines(profile, record)
    ]
    if not rows:
        return []
    columns = ["model", "parameters", "steps", "tokens", "minutes", "held-out loss", "flat", "rows left out"]
    return ["", "## Models", "", "![Curves](curves.png)", *_make_table(columns, rows)]


def _write_drift(profile: Profile, record: Record) -> list[str]:
    rows = []
    for line in record.list("drift"):
        lines = Lines({0: line})
        label = f"{line['domain']}, {line['draft']} draft, {line['target']} target"
        label += _describe_build_of(record, line["domain"], line)
        rows.append([label, *_describe_metrics(lines, record, line["domain"], line["draft"])])
    return ["", "## The drift: generic drafts, untrained", *_make_table(["", *FIGURES], rows)]


FIGURES = [
    "alpha greedy", "alpha T = 1", "tokens a pass, greedy", "tokens a pass, T = 1", "measured speed-up", "c",
    "best gamma: predicted speed-up",
]  # fmt: skip


def _describe_build_of(record: Record, domain: str, line: dict[str, Any]) -> str:
    return describe_build(number_builds(record, domain).get(line.get("build", ""), 0))


def _describe_metrics(lines: Lines, record: Record, domain: str, draft: str) -> list[str]:
    cells = [format_interval(lines.measure(s, ratio)) for ratio in (ALPHA, BLOCK_EFFICIENCY) for s in SETTING_NAMES]
    by_setting = {s: [line["figures"][s] for line in lines.by_seed.values()] for s in SETTING_NAMES}
    measured = [
        f"{name} {sum(figure['speedup'][0] for figure in by_setting[s]) / len(by_setting[s]):.2f}"
        for s, name in SETTING_NAMES.items()
    ]
    cells.append(", ".join(measured))
    (build,) = {line.get("build", "") for line in lines.by_seed.values()}
    costs = read_costs(record, domain, build).get(draft)
    if costs is None:
        return [*cells, "", ""]
    best = []
    for setting, name in SETTING_NAMES.items():
        gamma, speedup = predict_best(by_setting[setting], costs)
        best.append(f"{name} {gamma}: {speedup:.2f}")
    return [*cells, f"{costs.cost_ratio:.2f}", ", ".join(best)]


def _write_queries(record: Record) -> list[str]:
    rows, samples = [], []
    for line in record.list("queries"):
        report = line["report"]
        rows.append(
            [
                f"{line['domain']}, {line['scenario']}" + _describe_build_of(record, line["domain"], line),
                f"{report['num_prompts']:,}",
                f"{report['tokens']['mean']:.0f}",
                f"{line['mean_completion_tokens']:.0f}",
                f"{report['num_near_duplicates']:,}",
                f"{report['overlap']['near']:,}",
                f"{line['perplexity']:.1f}",
                ", ".join(f"{name} {count}" for name, count in list(report["languages"].items())[:3]),
            ]
        )
        samples += ["", f"{line['domain']}, {line['scenario']}:", ""]
        samples += [f"- {_shorten(s['query'])} -> {_shorten(s['answer'])}" for s in line["samples"][:3]]
    columns = ["queries", "number", "tokens", "answer tokens", "near duplicates", "near a test prompt", "perplexity",
               "languages"]  # fmt: skip
    text = "Perplexity is of the last user message under the domain target."
    return ["", "## Queries", "", text, *_make_table(columns, rows), *samples]


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return f"`{text[:120].replace('`', '')}`"


def _write_question(profile: Profile, record: Record, question: Question) -> list[str]:
    rows: list[list[str]] = []
    cells: dict[str, tuple[Cell, Lines]] = {}
    for comparison in question.comparisons:
        compared = [comparison.cell, comparison.baseline]
        for cell, own in zip(compared, find_common_lines(profile, record, compared, question.seeds), strict=True):
            for seed, line in own.by_seed.items():
                name = describe_cell(cell) + _describe_build_of(record, cell.domain, line)
                cells.setdefault(name, (cell, Lines({})))[1].by_seed[seed] = line
        row = [comparison.label]
        for ratio in (BLOCK_EFFICIENCY, ALPHA):
            for setting in SETTING_NAMES:
                found = compare(profile, record, comparison, question.seeds, setting, ratio)
                seeds = "" if found is None else " ({})".format(", ".join(f"{v:+.3f}" for v in found.by_seed))
                row.append(format_interval(found and found.interval, ratio == BLOCK_EFFICIENCY) + seeds)
        rows.append(row)
    columns = [
        "",
        *(f"{what}, {name}" for what in ("tokens a pass", "alpha difference") for name in SETTING_NAMES.values()),
    ]
    lines = ["", f"## {question.title}", *_make_table(columns, rows)]
    absolute = [
        [
            name,
            str(len(own.by_seed)),
            f"{own.mean('steps'):.0f}",
            f"{own.mean('train_seconds') / 60:.1f} + {own.mean('completion_seconds') / 60:.1f}",
            *_describe_metrics(own, record, cell.domain, cell.draft),
        ]
        for name, (cell, own) in cells.items()
    ]
    return [*lines, *_make_table(["cell", "seeds", "steps", "minutes: training + answers", *FIGURES], absolute)]


def describe_cell(cell: Cell) -> str:
    """What is special about a cell, in words."""
    plain = vars(Cell(cell.domain, cell.num_prompts))
    parts = [cell.domain, f"{cell.num_prompts:,}"]
    for name, value in vars(cell).items():
        if name not in ("domain", "num_prompts", "seed") and value != plain[name]:
            parts.append(str(value) if isinstance(value, str) else f"{name} {value}")
    return " ".join(parts)
