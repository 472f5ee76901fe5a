"""The pictures of the report."""

import itertools
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from .cells import BLACK_BOX, make_base
from .claims import FAILED, HELD, Judgement
from .compare import BLOCK_EFFICIENCY, SETTING_NAMES, Lines, find_lines
from .models import list_model_lines
from .profile import Profile
from .questions import Question
from .record import Record

COLORS = {HELD: "tab:green", FAILED: "tab:red"}


def plot_summary(profile: Profile, record: Record, path: Path) -> None:
    """Tokens a target pass of the generic draft and of what each way of training makes of it, domain by domain."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axis, (setting, name) in zip(figure.subplots(1, 2, sharey=True), SETTING_NAMES.items(), strict=True):
        bars = defaultdict(dict)
        for line in record.list("drift"):
            if (line["draft"], line["target"]) == ("default", "domain"):
                measured = Lines({0: line}).measure(setting, BLOCK_EFFICIENCY)
                bars["not trained"].setdefault(line["domain"], measured)  # of several builds the first one
        for domain in profile.domains:
            base = make_base(profile, domain)
            for label, changes in _list_ways(profile).items():
                lines = find_lines(profile, record, replace(base, **changes), profile.plan.seeds)
                if lines.by_seed:
                    bars[label][domain] = lines.measure(setting, BLOCK_EFFICIENCY)
        width = 0.8 / max(1, len(bars))
        for number, (label, by_domain) in enumerate(bars.items()):
            places = [list(profile.domains).index(domain) + width * number for domain in by_domain]
            value, low, high = zip(*by_domain.values(), strict=True)
            errors = [
                [v - low for v, low in zip(value, low, strict=True)],
                [h - v for v, h in zip(value, high, strict=True)],
            ]
            axis.bar(places, value, width, yerr=errors, label=label, error_kw={"linewidth": 0.8})
        axis.set_xticks(
            [i + 0.4 - width / 2 for i in range(len(profile.domains))],
            [domain.replace("_", " ") for domain in profile.domains],
        )
        axis.set(title=name, ylim=(1, None))
        axis.grid(axis="y", alpha=0.3)
    figure.axes[0].set_ylabel("tokens a target pass")
    if figure.axes[0].patches:
        figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def _list_ways(profile: Profile) -> dict[str, dict[str, str]]:
    """Changes of the base cell by what a picture calls them, in an equal number of steps."""
    online = {method.replace("_", "-"): {"method": method} for method in profile.plan.headline_online}
    return {"black box": {"method": BLACK_BOX}, **online, "offline white box": {}}


def plot_claims(judgements: list[Judgement], path: Path) -> None:
    """Every relative difference with its interval."""
    from matplotlib.figure import Figure

    measured = [j for j in judgements if j.interval is not None and j.is_relative]
    figure = Figure(figsize=(9, 1.5 + 0.22 * len(measured)), layout="constrained")
    axis = figure.subplots()
    for place, judgement in enumerate(measured):
        value, low, high = (100 * number for number in judgement.interval)
        axis.plot([low, high], [place, place], color=COLORS.get(judgement.verdict, "tab:gray"))
        axis.plot([value], [place], "o", markersize=4, color=COLORS.get(judgement.verdict, "tab:gray"))
    axis.set_yticks(range(len(measured)), [judgement.where for judgement in measured], fontsize=7)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(xlabel="tokens a target pass, % over the baseline\n(green: the claim held, red: it did not)")
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=130)


def plot_curves(profile: Profile, record: Record, path: Path) -> None:
    """Held-out loss of every model that was built."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axis = figure.subplots()
    colors: dict[str, str] = {}  # every build of a model has its color, later ones are dashed
    for line in list_model_lines(profile, record):
        steps, losses, _ = zip(*line["curve"], strict=True)
        name, is_later, _ = line["name"].partition(", build")
        color = colors.setdefault(name, f"C{len(colors)}")
        style = {"color": color, "linestyle": "--" if is_later else "-", "marker": "o", "markersize": 2}
        axis.plot(steps, losses, label=line["name"], **style)
    axis.set(xlabel="optimizer step", ylabel="held-out loss, nats a completion token")
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=130)


def plot_sizes(profile: Profile, record: Record, questions: list[Question], path: Path) -> None:
    """Tokens a target pass over the number of queries, a line for each domain and scenario."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axis, (setting, name) in zip(figure.subplots(1, 2), SETTING_NAMES.items(), strict=True):
        points = defaultdict(dict)
        for question in questions:
            if question.name not in ("data_size", "synthetic_size"):
                continue
            compared = [(comparison.baseline, comparison.cell) for comparison in question.comparisons]
            for cell in dict.fromkeys(itertools.chain(*compared)):
                lines = find_lines(profile, record, cell, question.seeds)
                if lines.by_seed:
                    measured = lines.measure(setting, BLOCK_EFFICIENCY)
                    points[f"{cell.domain}, {cell.scenario}"][cell.num_prompts] = measured
        for label, by_size in points.items():
            sizes = sorted(by_size)
            value, low, high = zip(*(by_size[size] for size in sizes), strict=True)
            axis.plot(sizes, value, marker="o", markersize=3, label=label)
            axis.fill_between(sizes, low, high, alpha=0.2)
        axis.set(xlabel="queries", ylabel=f"tokens a target pass, {name}", xscale="log")
        axis.set_xticks(sorted({size for by_size in points.values() for size in by_size}), minor=False)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.xaxis.set_minor_formatter("")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
