"""What there is to do: cells by rank, with estimated minutes, from measured speeds as soon as there are any."""

import itertools
import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .cells import BLACK_BOX, RESULT, WALL_CLOCK, WHITE_BOX, Cell, find_outcomes, make_base
from .compare import number_builds
from .data import SCENARIOS
from .profile import Profile
from .questions import ABLATION, FINAL, HEADLINE, SEARCH, TUNING, Question, list_cells, list_questions
from .recipe_search import find_search_outcome
from .record import Record

STAGE_LINES = {"targets": "model", "answers": "queries"}  # what a stage leaves in the record
RANKS = {TUNING: "tuning", HEADLINE: "headline", ABLATION: "ablation", SEARCH: "search", FINAL: "recipe"}


def find_questions(profile: Profile, record: Record) -> list[Question]:
    """All questions that are known by now: what is searched for last depends on what was found before."""
    return list_questions(profile, find_search_outcome(profile, record))


def find_cells_left(
    profile: Profile, record: Record, questions: list[Question], builds: Mapping[str, str]
) -> dict[Cell, list[str]]:
    """Cells that are still to be run, in their order, with the names of the questions they answer.

    A comparison wants both of its cells from the same models. What earlier builds answered stays answered; of the rest,
    both cells are run with the present build.

    Args:
        profile (`Profile`), record (`Record`): What is planned and what is known.
        questions (`list[Question]`): To answer.
        builds (`Mapping[str, str]`): The present build of each domain to work in.
    """
    wanted = set()
    for question in questions:
        for seed, comparison in itertools.product(question.seeds, question.comparisons):
            domain = comparison.cell.domain
            cells = [replace(cell, seed=seed) for cell in (comparison.baseline, comparison.cell)]
            outcomes = [find_outcomes(profile, record, cell) for cell in cells]
            if domain in builds and not outcomes[0].keys() & outcomes[1].keys():
                wanted |= {cell for cell, own in zip(cells, outcomes, strict=True) if builds[domain] not in own}
    return {cell: names for cell, names in list_cells(questions).items() if cell in wanted}


def estimate_seconds(profile: Profile, record: Record, cell: Cell) -> float:
    """Of training and measuring a cell: the median of measured cells of its kind, else from `profile.estimates`."""
    if cell.budget == WALL_CLOCK:  # as long as the base cell, and a few steps of both to tell how many fit
        base = estimate_seconds(profile, record, make_base(profile, cell.domain))
        return base * (1 + (1 + len(cell.phases)) * profile.training.probe_steps / profile.training.steps)
    kind = _find_kind(vars(cell))
    measured = [
        line["train_seconds"] / line["steps"] * profile.training.steps + line["evaluation_seconds"]
        for line in record.list(RESULT)
        if _find_kind(line["cell"]) == kind
    ]
    if measured:
        return statistics.median(measured)
    steps = sum(share * _estimate_step(profile, cell.domain, method) for method, share in cell.phases)
    passes = 2 if cell.token_selection == "adaspec" else 1
    return steps * passes * profile.training.steps + 60 * profile.estimates.evaluation_minutes


def _find_kind(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    """What decides how long a step takes."""
    names = ("domain", "method", "signal", "adapter", "draft", "polish")
    return (*(cell[name] for name in names), cell["token_selection"] == "adaspec")


def _estimate_step(profile: Profile, domain: str, method: str) -> float:
    estimates, options = profile.estimates, profile.training.options
    rows = options["per_device_train_batch_size"] * options.get("gradient_accumulation_steps", 1)
    answer = rows * estimates.completion_tokens[domain]
    tokens = rows * estimates.prompt_tokens[domain] + answer
    seconds = tokens / estimates.draft_training
    if method == BLACK_BOX:
        return seconds
    if method == WHITE_BOX:
        return seconds + tokens / estimates.target_reading
    if profile.training.online[method].get("mode") == "streaming":
        return seconds + answer / estimates.serving  # the target's passes while serving are its only ones
    return seconds + tokens / estimates.target_reading + answer / estimates.draft_writing


def estimate_stages(profile: Profile) -> dict[str, float]:
    """Hours of what comes before the cells; targets and drafts at most, since they stop when their curves are flat."""
    estimates, build, hours = profile.estimates, profile.build, {}
    if build is not None:
        trainings = [(build.generic_target, estimates.target_training)]
        trainings += [(build.domain_target, estimates.target_training)] * len(profile.domains)
        trainings += [(build.generic_draft, estimates.draft_training)] * len(build.drafts)
        hours["targets"] = sum(b.max_steps * b.tokens_per_step / speed for b, speed in trainings) / 3600
    answers = 0.0
    for name, domain in profile.domains.items():
        queries = domain.num_synthetic / estimates.synthesis_yield
        asked = len(SCENARIOS) * max(profile.plan.num_prompts, domain.num_synthetic)
        answers += (queries * 60 + asked * estimates.completion_tokens[name]) / estimates.target_writing
    hours["answers"] = answers / 3600
    return hours


def format_plan(profile: Profile, record: Record) -> str:
    """The plan as text."""
    questions = find_questions(profile, record)
    cells = list_cells(questions)
    builds = {domain: next(reversed(number_builds(record, domain)), "") for domain in profile.domains}
    left = find_cells_left(profile, record, questions, builds)
    ranks = {question.name: question.rank for question in questions}
    lines, total = [f"Profile {profile.name}: {len(cells)} cells", ""], 0.0
    for name, hours in estimate_stages(profile).items():
        is_begun = any(record.list(STAGE_LINES[name]))
        lines.append(f"  stage {name:<10} {'begun' if is_begun else f'{hours:5.1f} h at most'}")
        total += 0.0 if is_begun else hours
    lines += ["", "  rank      question              cells  done  hours to do"]
    for question in questions:
        own = [cell for cell, names in cells.items() if names[0] == question.name]
        own_left = [cell for cell in own if cell in left]
        hours = _sum_hours(profile, record, own_left)
        done = len(own) - len(own_left)
        lines.append(f"  {RANKS[question.rank]:<9} {question.name:<20} {len(own):>6} {done:>5} {hours:>8.1f}")
        total += hours
    lines.append("  (a cell that answers several questions counts with the first)")
    if FINAL not in ranks.values() and profile.plan.search:
        bases = [make_base(profile, domain) for domain in profile.domains]
        pending = bases * (1 + 2 * len(profile.plan.seeds))  # the recipe, and forward KL with its options
        if not find_search_outcome(profile, record).finalists:
            others = [base for base in bases if base.domain != profile.plan.ablation_domain]
            pending += others * len(profile.plan.search)
        hours = _sum_hours(profile, record, pending)
        lines.append(
            "  the search in the other domains, the combined recipe and its test follow: "
            f"at most {len(pending)} cells, {hours:.1f} h"
        )
        total += hours
    minutes = [f"{d} {estimate_seconds(profile, record, make_base(profile, d)) / 60:.1f} min" for d in profile.domains]
    return "\n".join(
        [
            *lines,
            "",
            f"  equal budgets: {profile.training.steps} optimizer steps, or the wall-clock of the base cell and "
            "its answers:",
            f"  {', '.join(minutes)}, measuring included",
            "",
            f"  total to do: {total:.1f} h",
        ]
    )


def _sum_hours(profile: Profile, record: Record, cells: list[Cell]) -> float:
    return sum(estimate_seconds(profile, record, cell) for cell in cells) / 3600
