"""`spec-kd run recipe.yaml`: from raw input to an evaluated draft."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spec_kd.cli import recipe_format
from spec_kd.cli.parsing import Parser
from spec_kd.cli.steps import Workspace, check_formats, tell
from spec_kd.cli.yaml_files import read_yaml
from spec_kd.files import write_text
from spec_kd.open_types import JsonObject
from spec_kd.options import document_options, option
from spec_kd.secrets import hide_secrets

if TYPE_CHECKING:
    from spec_kd.cli.recipe import Recipe

DESCRIPTION = (
    "Runs a recipe: prompts, the target's completions, training, evaluation. All of it is checked before the first "
    "step. A step whose inputs have not changed is not repeated, and one that was killed continues. `spec-kd init` "
    "writes a recipe."
)


@document_options
@dataclass(frozen=True)
class RunArguments:
    """The recipe to run."""

    recipe: str = option("Recipe, a YAML file; also as the first argument, without `--recipe`.")
    only_check: bool = option("Check the recipe, its files and its models, and do nothing else.", default=False)


def build_parser() -> Parser:
    """The options of the command, and the format of recipes."""
    groups = {"recipe": RunArguments}
    return Parser("run", DESCRIPTION, groups, ("recipe", "only_check"), recipe_format.__doc__, first="recipe")


def run(arguments: RunArguments) -> JsonObject:
    """Checks a recipe, and runs it.

    Raises:
        ValueError: The recipe is wrong, its `output_dir` is of an earlier version, or several processes were started.
        OSError: A file or a model does not exist.
        ImportError: A package is not installed.
    """
    from spec_kd.cli.preflight import check_sources
    from spec_kd.cli.recipe import load_recipe

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a recipe runs in one process. Use `accelerate launch` with `respond` and `train`.")
    recipe = load_recipe(arguments.recipe)
    check_formats(recipe.output_dir)
    check_sources(recipe)
    if arguments.only_check:
        return {"recipe": recipe.path, "output_dir": recipe.output_dir, "is_valid": True}
    return run_recipe(recipe)


def copy_recipe(path: str, output_dir: str) -> None:
    """Copies a recipe to `recipe.yaml` in a folder, with `[hidden]` for the tokens and passwords in it."""
    text = Path(path).read_text(encoding="utf-8")
    write_text(Path(output_dir, "recipe.yaml"), hide_secrets(text, read_yaml(path)))


def run_recipe(recipe: "Recipe") -> JsonObject:
    """Runs all steps of a recipe, one after the other, without those that are finished.

    Args:
        recipe (`Recipe`): Recipe of `load_recipe`.

    Returns:
        `dict`: Which steps ran and which were reused, and of the evaluation the metrics and the gates.

    Raises:
        ValueError: No part has test prompts; also what a step raises.
    """
    from spec_kd.cli import evaluate, mix, respond, train

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
    results["draft"] = train.run(recipe.train, workspace)
    results["evaluation"] = evaluated = evaluate.run(*recipe.evaluate, workspace)
    copy_recipe(recipe.path, recipe.output_dir)
    tell(f"run: {recipe.output_dir}")
    return {
        "output_dir": recipe.output_dir,
        "steps": {name: "reused" if result["is_reused"] else "done" for name, result in results.items()},
        **{name: evaluated[name] for name in ("metrics", "report", "gates", "has_passed") if name in evaluated},
    }
