"""`spec-kd run recipe.yaml`: from raw input to an evaluated draft, and to one that an engine serves."""

import os
from pathlib import Path

from spec_kd.cli import evaluate, init_draft, mix, respond, train
from spec_kd.cli.arguments import RunArguments
from spec_kd.cli.preflight import check_sources
from spec_kd.cli.recipe import Recipe, load_recipe
from spec_kd.cli.recipe_serving import run_serving
from spec_kd.cli.steps import Workspace, check_formats, tell
from spec_kd.cli.yaml_files import read_yaml
from spec_kd.files import write_text
from spec_kd.open_types import JsonObject
from spec_kd.secrets import hide_secrets


def run(arguments: RunArguments) -> JsonObject:
    """Checks a recipe, and runs it.

    Raises:
        ValueError: The recipe is wrong, its `output_dir` is of an earlier version, or several processes were started.
        OSError: A file or a model does not exist.
        ImportError: A package is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a recipe runs in one process. Use `accelerate launch` with `respond` and `train`.")
    recipe = load_recipe(arguments.recipe)
    check_formats(recipe.output_dir)
    check_sources(recipe)
    if arguments.only_check:
        return {"recipe": recipe.path, "output_dir": recipe.output_dir, "is_valid": True}
    return run_recipe(recipe)


def run_recipe(recipe: Recipe) -> JsonObject:
    """Runs all steps of a recipe, one after the other, without those that are finished.

    Args:
        recipe (`Recipe`): Recipe of `load_recipe`.

    Returns:
        `dict`: Which steps ran and which were reused; of the evaluation the metrics and the gates; of the export, the
        check and the observation what they found. Steps after a gate that is not reached do not run.

    Raises:
        ValueError: No part has test prompts; also what a step raises.
    """
    workspace = Workspace(recipe.output_dir)
    results = {}
    # synthetic parts last: they do not repeat the test prompts of the others
    for name, part in sorted(recipe.parts.items(), key=lambda item: item[1].scenario == "synthetic"):
        results[f"parts/{name}"] = part.module.run(*part.call, workspace)
    results["prompts"] = mix.run(*recipe.mix, workspace)
    if results["prompts"]["num_test"] == 0 and recipe.evaluate[0].prompts.startswith(f"{recipe.output_dir}/"):
        raise ValueError(
            "No part has test prompts to evaluate on. Raise a part's `test_fraction`, or give `evaluate: prompts`."
        )
    if recipe.respond is not None:
        results["responses"] = respond.run(*recipe.respond, workspace)
    if recipe.init is not None:
        results["initial_draft"] = init_draft.run(*recipe.init, workspace)
    results["draft"] = train.run(recipe.train, workspace)
    results["evaluation"] = evaluated = evaluate.run(*recipe.evaluate, workspace)
    served = run_serving(recipe.serving, workspace) if evaluated.get("has_passed", True) else {}
    results |= served
    # a copy, with `[hidden]` for the tokens and passwords in it
    text = Path(recipe.path).read_text(encoding="utf-8")
    write_text(Path(recipe.output_dir, "recipe.yaml"), hide_secrets(text, read_yaml(recipe.path)))
    tell(f"run: {recipe.output_dir}")
    return {
        "output_dir": recipe.output_dir,
        "steps": {name: "reused" if result["is_reused"] else "done" for name, result in results.items()},
        **{name: evaluated[name] for name in ("metrics", "report", "gates", "has_passed") if name in evaluated},
        **served,
        **({"has_passed": False} if not served.get("check", {}).get("has_passed", True) else {}),
    }
