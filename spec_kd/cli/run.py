"""`spec-kd run recipe.yaml`: from raw input to an evaluated draft, and to one that an engine serves."""

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from spec_kd.cli import evaluate, init_draft, mix, plan_draft, respond, train
from spec_kd.cli.arguments import RunArguments
from spec_kd.cli.preflight import check_sources
from spec_kd.cli.recipe import Recipe, load_recipe
from spec_kd.cli.recipe_choices import follow_evaluation, follow_plan
from spec_kd.cli.recipe_serving import run_serving
from spec_kd.cli.recipe_times import Pace, list_times, tell_times
from spec_kd.cli.steps import Workspace, check_formats, tell
from spec_kd.cli.yaml_files import read_yaml
from spec_kd.evaluation import read_costs
from spec_kd.files import COSTS_FILE, write_text
from spec_kd.open_types import JsonObject
from spec_kd.secrets import hide_secrets

SHOWN = ("plan", "export", "check", "costs", "observation")  # steps whose results are part of the run's


def run(arguments: RunArguments) -> JsonObject:
    """Checks a recipe, and runs it.

    Raises:
        ValueError: The recipe is wrong, its `output_dir` is of an earlier version, or several processes were started.
        OSError: A file or a model does not exist.
        ImportError: A package is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a recipe runs in one process. Use `accelerate launch` with `respond` and `train`.")
    recipe = load_recipe(arguments.recipe, is_quick=arguments.quick)
    check_formats(recipe.output_dir)
    check_sources(recipe)
    tell_times("the steps and their times, without those that are finished", list_times(recipe))
    if arguments.only_check:
        return {"recipe": recipe.path, "output_dir": recipe.output_dir, "is_valid": True}
    return run_recipe(recipe)


def run_recipe(recipe: Recipe) -> JsonObject:
    """Runs all steps of a recipe, one after the other, without those that are finished.

    Args:
        recipe (`Recipe`): Recipe of `load_recipe`.

    Returns:
        `dict`: Which steps ran and which were reused, and the minutes of those that ran; of the evaluation the metrics
        and the gates; the results of the steps in `SHOWN`. A run ends early after a plan in which no shape can pay, a
        gate that is not reached, and a check that finds an error; `has_passed` is then `False`.

    Raises:
        ValueError: No part has test prompts; also what a step raises.
    """
    workspace = Workspace(recipe.output_dir)
    results: dict[str, JsonObject] = {}
    minutes: dict[str, float] = {}
    started = time.monotonic()
    for name, result in _run_steps(recipe, workspace):
        results[name] = result
        if not result["is_reused"]:
            minutes[name] = round((time.monotonic() - started) / 60, 2)
            tell(f"run: {name} took {minutes[name]:.1f} minutes")
        started = time.monotonic()
    # a copy, with `[hidden]` for the tokens and passwords in it
    text = Path(recipe.path).read_text(encoding="utf-8")
    write_text(Path(recipe.output_dir, "recipe.yaml"), hide_secrets(text, read_yaml(recipe.path)))
    tell(f"run: {recipe.output_dir}")
    evaluated = results.get("evaluation", {})
    verdicts = [result["has_passed"] for result in results.values() if "has_passed" in result]
    return {
        "output_dir": recipe.output_dir,
        "steps": {name: "reused" if result["is_reused"] else "done" for name, result in results.items()},
        "minutes": minutes,
        **{name: evaluated[name] for name in ("metrics", "report", "gates") if name in evaluated},
        **{name: results[name] for name in SHOWN if name in results},
        **({"has_passed": all(verdicts)} if verdicts else {}),
    }


def _run_steps(recipe: Recipe, workspace: Workspace) -> Iterator[tuple[str, JsonObject]]:
    """Runs each step and yields its name and its result; ends after one that says that the others have no use."""
    # synthetic parts last: they do not repeat the test prompts of the others
    for name, part in sorted(recipe.parts.items(), key=lambda item: item[1].scenario == "synthetic"):
        yield f"parts/{name}", part.module.run(*part.call, workspace)
    mixed = mix.run(*recipe.mix, workspace)
    if mixed["num_test"] == 0 and recipe.evaluate[0].prompts.startswith(f"{recipe.output_dir}/"):
        raise ValueError(
            "No part has test prompts to evaluate on. Raise a part's `test_fraction`, or give `evaluate: prompts`."
        )
    yield "prompts", mixed
    pace = Pace()
    if recipe.respond is not None:
        is_whole, started = not Path(recipe.respond[0].output_dir).exists(), time.monotonic()
        responded = respond.run(*recipe.respond, workspace)
        if is_whole and responded["num_responses"]:
            pace = replace(pace, response_seconds=(time.monotonic() - started) / responded["num_responses"])
        yield "responses", responded
    if recipe.plan is not None:
        planned = plan_draft.run(*recipe.plan, workspace)
        has_passed = planned["recommended"] is not None
        yield "plan", {**planned, "has_passed": has_passed}
        if not has_passed:
            return
        if planned["is_reused"]:
            tell(f"run: what to expect: {planned['headline']}")
        if recipe.plan[1].llama_cpp_dir is not None:
            [costs] = read_costs(Path(recipe.plan[0].output_dir, COSTS_FILE))
            pace = replace(pace, step_seconds=costs.target_step_seconds)
        recipe = follow_plan(recipe, planned)
    if recipe.init is not None:
        yield "initial_draft", init_draft.run(*recipe.init, workspace)
    left = list_times(recipe, pace)
    first = "draft" if recipe.pretrain is None else "pretrained" if recipe.pretrain.score is None else "corpus"
    tell_times("what is left", left[[one.step for one in left].index(first) :])
    if recipe.pretrain is not None:
        yield from recipe.pretrain.run(workspace)
    yield "draft", train.run(recipe.train, workspace)
    evaluated = evaluate.run(*recipe.evaluate, workspace)
    yield "evaluation", evaluated
    if evaluated.get("has_passed", True):
        yield from run_serving(follow_evaluation(recipe), workspace)
