"""Reads a recipe into the arguments of its steps; `spec_kd.cli.recipe_format` describes recipes."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spec_kd.cli import evaluate, prompts, respond, synthesize, train
from spec_kd.cli.mix import MixArguments
from spec_kd.cli.parsing import Parser
from spec_kd.cli.target import GROUP, TargetArguments
from spec_kd.cli.values import place_paths, read_paths
from spec_kd.cli.yaml_files import check_keys, read_yaml
from spec_kd.open_types import JsonObject, Record
from spec_kd.options import suggest

SECTIONS = ("target", "draft", "output_dir", "seed", "prompts", "respond", "train", "evaluate")
REQUIRED = ("target", "draft", "output_dir", "prompts", "train")
SCENARIOS = ("historical", "curated", "synthetic")
MIX = "mix"
NUM_EVALUATION_PROMPTS = 200
SET_BY_RECIPE = {
    "prompts": ("output_dir", "target"),
    MIX: ("output_dir", "parts"),
    "respond": ("output_dir", "target", "prompts", "split"),
    "train": ("output_dir", "target", "responses", "split", "model_name_or_path"),
    "evaluate": ("output_dir", "target", "drafts", "texts_dir"),
}

Part = prompts.LogArguments | prompts.CuratedArguments | synthesize.SynthesizeCall


@dataclass(frozen=True)
class Recipe:
    """The steps of a recipe, each with all its arguments, in the order they are done.

    Args:
        path (`str`): The file.
        output_dir (`str`): With a folder per step.
        parts (`dict[str, Part]`): How the prompts of each part come to be.
        mix (`MixArguments`): How they become the training and test prompts.
        respond (`RespondCall`, *optional*): How the target answers; `None` where nothing is to be answered.
        train (`TrainCall`): How the draft learns.
        evaluate (`EvaluateCall`): How the draft is measured.
    """

    path: str
    output_dir: str
    parts: dict[str, Part]
    mix: MixArguments
    respond: respond.RespondCall | None
    train: train.TrainCall
    evaluate: evaluate.EvaluateCall


def load_recipe(path: str | Path) -> Recipe:
    """Reads and checks a recipe, without looking at the files and models it names (`check_sources` does).

    Args:
        path (`str` or `Path`): YAML as described at the top of this module.

    Raises:
        ValueError: Names the section, the key or value, and what would be right: unknown or missing keys, values that
            do not fit, options that exclude each other, a divergence that the teacher signal cannot serve.
        OSError: For a file that cannot be read.
    """
    values = read_yaml(path)
    with naming(str(path)):
        _check_names(values, SECTIONS)
        if missing := [name for name in REQUIRED if values.get(name) is None]:
            raise ValueError(f"{' and '.join(f'`{name}`' for name in missing)} missing.")
        for name in ("draft", "output_dir"):
            if not isinstance(values[name], str):
                raise ValueError(f"`{name}` must be text, got {values[name]!r}.")
        values["output_dir"] = read_paths("output_dir", values["output_dir"])
        builder = _Builder(values, os.path.dirname(path))
        recipe = Recipe(
            path=str(path),
            output_dir=builder.output_dir,
            parts=builder.build_parts(),
            mix=builder.build_mix(),
            respond=builder.build_respond(),
            train=builder.build_train(),
            evaluate=builder.build_evaluate(),
        )
        _check_together(recipe)
    return recipe


class _Builder:
    """Sections of YAML into the arguments of commands."""

    def __init__(self, values: JsonObject, folder: str):
        self.values = values
        self.folder = folder
        self.output_dir = values["output_dir"]
        self.seed = {"seed": values["seed"]} if "seed" in values else {}
        with naming("target"):
            target = values["target"]
            target = {"name": target} if isinstance(target, str) else dict(_as_mapping(target))
            _check_names(target, ("name", "engine", "base_url", "served_model_name", "engine_kwargs"))
            if not isinstance(target.get("name"), str):
                raise ValueError("`name` is missing: a folder or a name on the Hub.")
            name = read_paths("name", target.pop("name"))
            self.target = place_paths({"target": name, **target}, folder)
            Parser("run", "", {GROUP: TargetArguments}).parse_values(self.target)
        self.draft = place_paths({"draft": values["draft"]}, folder)["draft"]
        self.prompts = dict(_as_mapping(values["prompts"], "prompts"))
        self.mix = self.prompts.pop(MIX, None) or {}
        if not self.prompts:
            raise ValueError(f"`prompts` has no part: give {', '.join(SCENARIOS[:-1])} or {SCENARIOS[-1]}.")

    def build_parts(self) -> dict[str, Part]:
        return {name: self._build_part(name, part) for name, part in self.prompts.items()}

    def _build_part(self, name: str, part: Any) -> Part:
        with naming(f"prompts: {name}"):
            part = place_paths(_as_mapping(part), self.folder)
            if "/" in name or name.startswith("."):
                raise ValueError("the name of a part is that of a folder: no slash, and no dot at the beginning.")
            scenario = part.pop("scenario", name)
            if scenario not in SCENARIOS:
                raise ValueError(
                    f"`scenario` is {scenario!r}.{suggest(str(scenario), SCENARIOS)} A part with a name of its own "
                    "needs one of them."
                )
            _refuse(part, SET_BY_RECIPE["prompts"])
            given = {**self.seed, **part, "output_dir": self.find_part_folder(name)}
            if scenario == "synthetic":
                given = {"test_sets": self.find_test_sets(), **self.target, **given}
                return synthesize.build_parser().parse_values(given)
            if scenario == "historical":
                (arguments,) = prompts.build_parser("logs").parse_values({"tokenizer": self.target["target"], **given})
            else:
                (arguments,) = prompts.build_parser("curated").parse_values(given)
            return arguments

    def find_test_sets(self) -> list[str]:
        """Test prompts that are there before any are synthesized, so that those need not repeat them."""
        evaluation = self.values.get("evaluate") or {}
        if isinstance(evaluation, Mapping) and "prompts" in evaluation:
            return [place_paths(evaluation, self.folder)["prompts"]]
        others = {n: part.get("scenario", n) for n, part in self.prompts.items() if isinstance(part, Mapping)}
        return [f"{self.find_part_folder(n)}/test.arrow" for n, kind in others.items() if kind != "synthetic"]

    def find_part_folder(self, name: str) -> str:
        return f"{self.output_dir}/parts/{name}"

    def build_mix(self) -> MixArguments:
        with naming("prompts: mix"):
            mix = place_paths(_as_mapping(self.mix), self.folder)
            _refuse(mix, SET_BY_RECIPE[MIX])
            parts = {name: self.find_part_folder(name) for name in self.prompts}
            given = {"tokenizer": self.target["target"], **self.seed, **mix}
            given |= {"parts": parts, "output_dir": f"{self.output_dir}/prompts"}
            (arguments,) = prompts.build_parser("mix").parse_values(given)
            return arguments

    def build_respond(self) -> respond.RespondCall | None:
        section = self.values.get("respond")
        if section is False:
            return None
        with naming("respond"):
            section = place_paths(_as_mapping({} if section is None else section), self.folder)
            _refuse(section, SET_BY_RECIPE["respond"])
            given = {**self.target, **self.seed, **section, "output_dir": f"{self.output_dir}/responses"}
            call = respond.build_parser().parse_values({**given, "prompts": self.find_prompts("train")})
            call[0].build_options()
            return call

    def find_prompts(self, split: str) -> str:
        return f"{self.output_dir}/prompts/{split}.arrow"

    def build_train(self) -> train.TrainCall:
        with naming("train"):
            section = place_paths(_as_mapping(self.values["train"]), self.folder)
            if "method" not in section:
                raise ValueError(f"`method` is missing: {', '.join(train.METHODS)}.")
            method = section.pop("method")
            train.check_method(method)
            _refuse(section, SET_BY_RECIPE["train"])
            is_answered = self.values.get("respond") is not False
            responses = f"{self.output_dir}/responses/{respond.PRODUCTS[0]}"
            given = {
                **self.seed,
                **section,
                "output_dir": f"{self.output_dir}/draft",
                "target": self.target["target"],
                "model_name_or_path": self.draft,
                "responses": responses if is_answered else self.find_prompts("train"),
            }
            parser = train.build_parser(method)
            arguments, draft, config = parser.parse_values(given)
            return train.TrainCall(method, arguments, config, draft, parser.chosen)

    def build_evaluate(self) -> evaluate.EvaluateCall:
        with naming("evaluate"):
            section = place_paths(_as_mapping(self.values.get("evaluate") or {}), self.folder)
            _refuse(section, SET_BY_RECIPE["evaluate"])
            if len(self.prompts) > 1 and "prompts" not in section:
                section.setdefault("group_by", ["scenario"])
            given = {
                "prompts": self.find_prompts("test"),
                "num_prompts": NUM_EVALUATION_PROMPTS,
                **self.target,
                **self.seed,
                **section,
                "drafts": {"before": self.draft, "after": f"{self.output_dir}/draft"},
                "texts_dir": f"{self.output_dir}/texts",
                "output_dir": f"{self.output_dir}/evaluation",
            }
            arguments, target = evaluate.build_parser().parse_values(given)
            arguments.check(target.engine)
            return arguments, target


def _check_together(recipe: Recipe) -> None:
    """Raises `ValueError` for sections that do not fit each other."""
    from spec_kd.losses import SPARSE_METHODS

    method, config = recipe.train.method, recipe.train.config
    if recipe.respond is None:
        for name, part in recipe.parts.items():
            has_answers = isinstance(part, prompts.LogArguments) or getattr(part, "keep_completions", False)
            if not has_answers and not (method == "online_gkd" and config.lmbda == 1):
                raise ValueError(
                    f"respond: false learns from answers that come with the prompts, but `prompts: {name}` has none. "
                    "Let the target answer (a `respond` section), or for a curated set set `keep_completions: true`."
                )
        return
    signal = recipe.respond[0].teacher_signal
    if method != "white_box" or signal is None or config.teacher_model_name_or_path is not None:
        return
    with naming("train: (from `respond: teacher_signal`)"):
        config.build_loss().check_served_by(SPARSE_METHODS[signal])


def _as_mapping(section: Any, name: str = "the section") -> Record:
    if not isinstance(section, Mapping):
        raise ValueError(f"{name} must hold `name: value` pairs, got {section!r}.")
    check_keys(section, name)
    return section


def _check_names(section: Record, known: tuple[str, ...]) -> None:
    for name in section:
        if name not in known:
            raise ValueError(f"there is no `{name}`.{suggest(str(name), known)}")


def _refuse(section: Record, names: tuple[str, ...]) -> None:
    for name in names:
        if name in section:
            raise ValueError(f"`{name}` is set by the recipe. Leave it out.")


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Says in errors where in the recipe they come from."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{where}: {error}") from error
    except (OSError, ImportError) as error:
        raise type(error)(f"{where}: {error}") from error
