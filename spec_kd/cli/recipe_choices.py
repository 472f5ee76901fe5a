"""What one step of a recipe chooses for those after it: the shape, the costs of a round, and the drafted tokens."""

from dataclasses import dataclass, replace

from spec_kd.cli.recipe import Recipe
from spec_kd.cli.recipe_serving import ServingSteps
from spec_kd.cli.steps import tell
from spec_kd.evaluation import load_report
from spec_kd.evaluation.report.recommended import THRESHOLD
from spec_kd.files import COSTS_FILE
from spec_kd.open_types import Argument, JsonObject
from spec_kd.reports.numbers import Interval, format_interval
from spec_kd.serving import find_serving_engine


def follow_plan(recipe: Recipe, planned: JsonObject) -> Recipe:
    """The recipe with the shape of a plan and, where `evaluate` says nothing, its costs and drafted tokens.

    Args:
        recipe (`Recipe`): A recipe with a plan.
        planned (`dict`): Result of `spec-kd plan-draft` that recommends a shape.
    """
    if recipe.plan is None or recipe.init is None:
        raise ValueError("The recipe has no section `plan`.")
    plan_files, _, timing = recipe.plan
    costs = f"{plan_files.output_dir}/{COSTS_FILE}"
    files, shape = recipe.init
    chosen = {name: value for name, value in planned["recommended"].items() if name != "name"}
    evaluation_files, options, target = recipe.evaluate
    found: dict[str, Argument] = {"num_assistant_tokens": planned["num_assistant_tokens"]}
    if list(timing.batch_sizes) == list(options.batch_sizes):
        found["costs"] = costs
    given = recipe.serving_builder.evaluation_section
    options = replace(options, **{name: value for name, value in found.items() if name not in given})
    return replace(
        recipe,
        init=(replace(files, costs=files.costs or costs), replace(shape, **chosen)),
        evaluate=(evaluation_files, options, target),
    )


@dataclass(frozen=True)
class ChosenTokens:
    """A number of drafted tokens that an evaluation recommends.

    Args:
        value (`int`): The number, the highest one where drafts end early.
        threshold (`float`): Probability below which a draft ends; 0.0 for none.
        predicted_speedup (`Interval`): What it is predicted to give.
        where (`str`): For which sampling and how many requests at a time, in words.
    """

    value: int
    threshold: float
    predicted_speedup: Interval
    where: str


def follow_evaluation(recipe: Recipe) -> ServingSteps:
    """The last steps with the number of drafted tokens that the evaluation recommends, where the recipe says none.

    It is the fastest one for the sampling and the requests at a time of `observe`, at the costs of the report, with the
    probability below which a draft ends, if the evaluation recommends one. Without costs it is that of the plan, or the
    default of `evaluate`.

    Args:
        recipe (`Recipe`): A recipe whose evaluation is finished.
    """
    if "num_assistant_tokens" in recipe.serving_builder.evaluation_section or recipe.serving.is_empty:
        return recipe.serving
    files, options, target = recipe.evaluate
    chosen = find_best_tokens(recipe)
    if chosen is not None:
        options = replace(options, num_assistant_tokens=chosen.value)
    threshold = 0.0 if chosen is None else chosen.threshold
    serving = replace(recipe.serving_builder, evaluation=(files, options, target), threshold=threshold).build()
    if chosen is not None and chosen.value in serving.all_tokens:
        early = f", ended below a probability of {threshold:g}" if threshold else ""
        tell(
            f"run: {chosen.value} drafted token{'s' if chosen.value > 1 else ''} a round{early}, predicted to give "
            f"{format_interval(chosen.predicted_speedup)} times plain decoding ({chosen.where})"
            + ("" if chosen.predicted_speedup.value > 1 else "; the target alone is as fast or faster")
        )
    return serving


def find_best_tokens(recipe: Recipe) -> ChosenTokens | None:
    """The number of drafted tokens that the evaluation predicts to be the fastest; `None` without costs."""
    report = load_report(recipe.evaluate[0].output_dir)
    settings, size = report.draft.settings, 1
    if recipe.serving.observe is not None:
        asked = recipe.serving.observe[1]
        rule = find_serving_engine(report.serving_engine).draft_sampling
        same = [one for one in settings if one.temperature == asked.temperature]
        settings = sorted(same, key=lambda one: one.draft_sampling != rule) or settings
        size = asked.concurrency
    setting, by_size = settings[0], settings[0].best_gamma
    if not by_size:
        return None
    at = str(size) if str(size) in by_size else min(by_size, key=lambda one: abs(int(one) - size))
    where, advice = f"{setting.name}, batch size {at}", report.draft.recommendations
    for plan in () if advice is None else advice.plans:
        is_here = (plan.setting, str(plan.batch_size)) == (setting.name, at)
        if is_here and plan.is_recommended and plan.method == THRESHOLD:
            return ChosenTokens(plan.num_assistant_tokens, plan.threshold, plan.predicted_speedup, where)
    return ChosenTokens(by_size[at], 0.0, setting.get_speedups(at)[by_size[at]], where)
