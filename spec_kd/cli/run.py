"""`spec-kd run recipe.yaml`: from raw input to an evaluated draft."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spec_kd.cli import recipe_format
from spec_kd.cli.parsing import Parser
from spec_kd.cli.steps import Workspace, tell
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
    common = ("recipe", "only_check")
    return Parser("run", DESCRIPTION, {"run": RunArguments}, common, recipe_format.__doc__, "Another name of `recipe`.")


def parse(argv: Sequence[str]) -> RunArguments:
    """The command line."""
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        argv.insert(0, "--recipe")
    # a recipe is a YAML file, as `--config` of the other commands is
    argv = [f"--recipe{text.removeprefix('--config')}" if text.split("=")[0] == "--config" else text for text in argv]
    return build_parser().parse(argv)[0]


def run(arguments: RunArguments) -> JsonObject:
    """The command."""
    from spec_kd.cli.preflight import check_sources
    from spec_kd.cli.recipe import load_recipe

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a recipe runs in one process. Use `accelerate launch` with `respond` and `train`.")
    recipe = load_recipe(arguments.recipe)
    check_sources(recipe)
    if arguments.only_check:
        return {"recipe": recipe.path, "output_dir": recipe.output_dir, "is_valid": True}
    return run_recipe(recipe)


def copy_recipe(path: str, output_dir: str) -> None:
    """Copies a recipe to `recipe.yaml` in a folder, with `[hidden]` for the tokens and passwords in it."""
    text = Path(path).read_text(encoding="utf-8")
    write_text(Path(output_dir, "recipe.yaml"), hide_secrets(text, read_yaml(path)))


def run_recipe(recipe: "Recipe") -> JsonObject:
    """All steps of a recipe, one after the other; those that are finished are left as they are.

    Args:
        recipe (`Recipe`): From `load_recipe`.

    Returns:
        `dict`: Which steps were done and which were there, and of the evaluation the figures and the gates.
    """
    from spec_kd.cli import evaluate, mix, prompts, respond, synthesize, train

    workspace = Workspace(recipe.output_dir)
    results = {}
    # synthetic ones last: they keep away from the test prompts of the others
    for name, part in sorted(recipe.parts.items(), key=lambda item: isinstance(item[1], tuple)):
        if isinstance(part, prompts.LogArguments):
            results[f"parts/{name}"] = prompts.read_logs(part, workspace)
        elif isinstance(part, prompts.CuratedArguments):
            results[f"parts/{name}"] = prompts.read_curated(part, workspace)
        else:
            results[f"parts/{name}"] = synthesize.synthesize(*part, workspace)
    results["prompts"] = mix.mix(recipe.mix, workspace)
    if results["prompts"]["num_test"] == 0 and recipe.evaluate[0].prompts.startswith(f"{recipe.output_dir}/"):
        raise ValueError(
            "No part has test prompts to evaluate on. Raise a part's `test_fraction`, or give `evaluate: prompts`."
        )
    if recipe.respond is not None:
        results["responses"] = respond.respond(*recipe.respond, workspace)
    results["draft"] = train.train(recipe.train, workspace)
    results["evaluation"] = evaluated = evaluate.evaluate(*recipe.evaluate, workspace)
    copy_recipe(recipe.path, recipe.output_dir)
    tell(f"run: {recipe.output_dir}")
    return {
        "output_dir": recipe.output_dir,
        "steps": {name: "reused" if result["is_reused"] else "done" for name, result in results.items()},
        **{name: evaluated[name] for name in ("figures", "report", "gates", "has_passed") if name in evaluated},
    }
