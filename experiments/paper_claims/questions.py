"""The questions of an experiment, and the cells that answer them."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from .cells import BLACK_BOX, STEPS, WALL_CLOCK, WHITE_BOX, Cell, apply_changes, describe_changes, make_base
from .profile import Profile

TUNING_SEEDS = [0]  # of everything that is chosen on validation prompts
TUNING, HEADLINE, ABLATION, SEARCH, FINAL = range(5)


@dataclass(frozen=True)
class Comparison:
    """A cell against a baseline, seed by seed; the seeds of both cells are set by the question."""

    label: str
    cell: Cell
    baseline: Cell


@dataclass(frozen=True)
class Question:
    """A table of the report.

    Args:
        name (`str`): For the command line.
        title (`str`): For the report.
        rank (`int`): Lower ones run first.
        seeds (`list[int]`): Of every comparison.
        comparisons (`list[Comparison]`): Its rows.
    """

    name: str
    title: str
    rank: int
    seeds: list[int]
    comparisons: list[Comparison]

    def list_cells(self) -> Iterator[Cell]:
        """All cells: every comparison of a seed before those of the next."""
        for seed in self.seeds:
            for comparison in self.comparisons:
                yield replace(comparison.baseline, seed=seed)
                yield replace(comparison.cell, seed=seed)


@dataclass(frozen=True)
class SearchOutcome:
    """How far the search of a recipe is; all are changes of the base cell. See `recipe_search`.

    Args:
        finalists (`list[dict]`): The best of each axis in the ablation's domain, for the other domains to try.
        combined (`dict`, *optional*): Those of them that beat the base cell over all domains, put together.
        winner (`dict`, *optional*): What the search ended with.
    """

    finalists: list[dict[str, Any]] = field(default_factory=list)
    combined: dict[str, Any] | None = None
    winner: dict[str, Any] | None = None


def list_questions(profile: Profile, outcome: SearchOutcome | None = None) -> list[Question]:
    """All questions that the profile asks, the search's as far as its outcome is known."""
    return [
        *_list_tuning(profile),
        *_list_headlines(profile),
        *_list_ablations(profile),
        *_list_search(profile, outcome or SearchOutcome()),
    ]


def _list_tuning(profile: Profile) -> list[Question]:
    plan, comparisons = profile.plan, []
    for domain, rates in plan.learning_rates.items():
        base = replace(make_base(profile, domain), split="validation")
        for method in (WHITE_BOX, BLACK_BOX, *plan.headline_online):
            chosen = replace(base, method=method)
            own_rate = profile.training.find_options(domain, method, {})["learning_rate"]
            for rate in rates:
                if rate == own_rate:
                    continue
                cell = replace(chosen, options={"learning_rate": rate})
                comparisons.append(Comparison(f"{domain}: {method} at {rate:g} over {own_rate:g}", cell, chosen))
    title = "Learning rates, on validation prompts"
    return [Question("learning_rate", title, TUNING, TUNING_SEEDS, comparisons)] if comparisons else []


def _list_headlines(profile: Profile) -> list[Question]:
    plan, sizes, scenarios = profile.plan, [], []
    online: dict[str, list[Comparison]] = {STEPS: [], WALL_CLOCK: []}
    black: dict[str, list[Comparison]] = {STEPS: [], WALL_CLOCK: []}
    for domain in profile.domains:
        base = make_base(profile, domain)
        for budget in online:
            for method in plan.headline_online:
                cell = replace(base, method=method, budget=budget)
                online[budget].append(Comparison(f"{domain}: offline over {method}, equal {budget}", base, cell))
            cell = replace(base, method=BLACK_BOX, budget=budget)
            black[budget].append(Comparison(f"{domain}: white box over black box, equal {budget}", base, cell))
        for small, large in zip(plan.sizes, plan.sizes[1:], strict=False):
            sizes.append(_compare_sizes(base, small, large))
        same_size = replace(base, num_prompts=plan.scenario_prompts)
        for name in ("synthetic", "curated"):
            cell = replace(same_size, scenario=name)
            scenarios.append(Comparison(f"{domain}: {name} over historical", cell, same_size))
    questions = [
        ("offline_online", "Offline against online, equal steps", online[STEPS]),
        ("white_black", "White box against black box, equal steps", black[STEPS]),
        ("data_size", "More data", sizes),
        ("scenarios", "Synthetic and curated queries against historical ones", scenarios),
        ("offline_online_time", "Offline against online, equal wall-clock", online[WALL_CLOCK]),
        ("white_black_time", "White box against black box, equal wall-clock", black[WALL_CLOCK]),
    ]
    return [Question(name, title, HEADLINE, plan.seeds, comparisons) for name, title, comparisons in questions]


def _compare_sizes(base: Cell, small: int, large: int) -> Comparison:
    label = f"{base.domain}: {large:,} {base.scenario} queries over {small:,}"
    return Comparison(label, replace(base, num_prompts=large), replace(base, num_prompts=small))


def _list_ablations(profile: Profile) -> list[Question]:
    plan, training = profile.plan, profile.training
    base = make_base(profile, plan.ablation_domain)
    same_size = replace(base, num_prompts=plan.scenario_prompts)
    synthetic = replace(base, scenario="synthetic")

    def vary(name: str, title: str, changes: dict[str, dict[str, Any]], baseline: Cell, against: str) -> Question:
        comparisons = [
            Comparison(f"{label} over {against}", replace(baseline, **change), baseline)
            for label, change in changes.items()
        ]
        return Question(name, f"{title} ({plan.ablation_domain})", ABLATION, plan.ablation_seeds, comparisons)

    def name_all(option: str, values: list[str]) -> dict[str, dict[str, Any]]:
        return {value: {option: value} for value in values}

    adapters = {
        name: {"adapter": name, "options": {"learning_rate": adapter["learning_rate"]}}
        for name, adapter in training.adapters.items()
    }
    pairs = zip(plan.synthetic_sizes, plan.synthetic_sizes[1:], strict=False)
    sizes = [_compare_sizes(synthetic, small, large) for small, large in pairs]
    questions = [
        vary("divergences", "Divergences", name_all("divergence", plan.divergences), base, "forward KL"),
        vary("selections", "Token selection", name_all("token_selection", plan.token_selections), base, "all tokens"),
        vary("cached", "Cached teacher against a live one", name_all("signal", list(training.signals)), base, "live"),
        vary("mixes", "Mixed scenarios", name_all("scenario", list(plan.mixes)), same_size, "historical"),
        vary("adapters", "LoRA against full fine-tuning", adapters, base, "full"),
        vary("answers", "Greedy answers", {"greedy answers": {"completion_temperature": 0.0}}, base, "sampled ones"),
        vary("online", "Other online methods", name_all("method", plan.more_online), base, "offline"),
        Question(
            "synthetic_size", f"More synthetic queries ({plan.ablation_domain})", ABLATION, plan.ablation_seeds, sizes
        ),
    ]
    return [question for question in questions if question.comparisons]


def list_search_axes(profile: Profile) -> dict[str, dict[str, dict[str, Any]]]:
    """Of each axis of the search, changes of the base cell by their description."""
    return {
        axis: {describe_changes(changes): changes for changes in options}
        for axis, options in profile.plan.search.items()
    }


def _list_search(profile: Profile, outcome: SearchOutcome) -> list[Question]:
    search, final, tuned, winner = [], [], [], outcome.winner
    for domain in profile.domains:
        base = make_base(profile, domain)
        validated = replace(base, split="validation")
        if domain == profile.plan.ablation_domain:
            tried = [changes for options in list_search_axes(profile).values() for changes in options.values()]
        else:
            tried = list(outcome.finalists)
        for changes in tried + ([outcome.combined] if outcome.combined else []):
            cell = apply_changes(validated, changes)
            search.append(Comparison(f"{domain}: {describe_changes(changes)}", cell, validated))
        if winner:
            recipe = apply_changes(base, winner)
            final.append(Comparison(f"{domain}: {describe_changes(winner)}", recipe, base))
            if winner.get("options"):
                forward_kl = apply_changes(base, {"options": winner["options"]})
                tuned.append(Comparison(f"{domain}: over forward KL with the recipe's options", recipe, forward_kl))
    questions = [Question("search", "Search of a recipe, on validation prompts", SEARCH, TUNING_SEEDS, search)]
    title = "The recipe that was found against offline forward KL, on test prompts"
    questions.append(Question("recipe", title, FINAL, profile.plan.seeds, final))
    title = "What is left of it when forward KL has the recipe's options too"
    questions.append(Question("recipe_tuned", title, FINAL, profile.plan.seeds, tuned))
    return [question for question in questions if question.comparisons]


def list_cells(questions: list[Question]) -> dict[Cell, list[str]]:
    """Cells without repetition, with the names of the questions they answer: by rank, seed and domain."""
    cells: dict[Cell, list[str]] = {}
    ranks: dict[Cell, int] = {}
    for question in questions:
        for cell in question.list_cells():
            names = cells.setdefault(cell, [])
            if question.name not in names:
                names.append(question.name)
            ranks[cell] = min(question.rank, ranks.get(cell, question.rank))
    domains = list(dict.fromkeys(cell.domain for cell in cells))
    return {cell: cells[cell] for cell in sorted(cells, key=lambda c: (ranks[c], c.seed, domains.index(c.domain)))}
