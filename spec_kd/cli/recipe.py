"""Reads a recipe into the arguments of its steps; `spec_kd.cli.recipe_format` describes recipes."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import spec_kd
from spec_kd.cli import evaluate, mix, respond, train
from spec_kd.cli.arguments import InitDraftFiles, MixFiles, PlanDraftFiles, TargetArguments
from spec_kd.cli.commands import build_parser, check_kind, find_module, list_kinds
from spec_kd.cli.parsing import Parser
from spec_kd.cli.paths import place_paths, read_paths
from spec_kd.cli.recipe_pretrain import PRETRAINED, PretrainSteps, build_pretrain
from spec_kd.cli.recipe_sections import (
    SECTIONS,
    as_mapping,
    check_names,
    is_given,
    make_quick,
    naming,
    read_section,
)
from spec_kd.cli.recipe_serving import ServingBuilder, ServingSteps
from spec_kd.cli.yaml_files import read_yaml, refuse_old_names
from spec_kd.drafts.options import WIDTHS
from spec_kd.losses import SPARSE_METHODS
from spec_kd.open_types import Argument, JsonObject, JsonValue, Record
from spec_kd.options import refuse, suggest

REQUIRED = ("target", "output_dir", "prompts", "train")
SCENARIOS = {"historical": "prompts logs", "curated": "prompts curated", "synthetic": "synthesize"}
MIX = "mix"
NUM_EVALUATION_PROMPTS = 200
PLANNED = ("num_hidden_layers", "layers", "fresh_layers", *WIDTHS)


PlanCall = tuple[PlanDraftFiles, spec_kd.DraftPlanOptions, spec_kd.ServerTimingOptions]


@dataclass(frozen=True)
class Part:
    """A part of the prompts.

    Args:
        scenario (`str`): Name in `SCENARIOS`.
        call (`tuple`): Arguments of the scenario's command.
    """

    scenario: str
    call: tuple[Argument, ...]

    @property
    def module(self) -> ModuleType:
        """The command that makes the prompts."""
        return find_module(SCENARIOS[self.scenario])


@dataclass(frozen=True)
class Recipe:
    """The steps of a recipe with all their arguments, in the order in which they run.

    Args:
        path (`str`): File of the recipe.
        output_dir (`str`): Folder that gets a folder for each step.
        parts (`dict[str, Part]`): The parts of the prompts by name.
        mix (`tuple[MixFiles, MixOptions]`): How the parts become training and test prompts.
        respond (`ResponseCall`, *optional*): How the target completes the prompts; `None` if it does not.
        plan (`PlanCall`, *optional*): How the shape of the draft is chosen; `None` if the recipe says it.
        init (`tuple[InitDraftFiles, DraftShapeOptions]`, *optional*): How a draft is made; `None` if one is given.
        pretrain (`PretrainSteps`, *optional*): How the draft learns from text of others first; `None` if it does not.
        train (`TrainCall`): How the draft learns.
        evaluate (`EvaluationCall`): How the draft is measured.
        serving (`ServingSteps`): How it is brought into an engine.
        serving_builder (`ServingBuilder`): Builds `serving`, also for another evaluation.
    """

    path: str
    output_dir: str
    parts: dict[str, Part]
    mix: tuple[MixFiles, spec_kd.MixOptions]
    respond: respond.ResponseCall | None
    plan: PlanCall | None
    init: tuple[InitDraftFiles, spec_kd.DraftShapeOptions] | None
    pretrain: PretrainSteps | None
    train: train.TrainCall
    evaluate: evaluate.EvaluationCall
    serving: ServingSteps
    serving_builder: ServingBuilder


def load_recipe(path: str | Path, is_quick: bool = False) -> Recipe:
    """Reads and checks a recipe; `check_sources` checks the files and models that it names.

    Args:
        path (`str` or `Path`): YAML file as `spec_kd.cli.recipe_format` describes it.
        is_quick (`bool`, *optional*, defaults to `False`): Whether its section `quick` holds.

    Raises:
        ValueError: A key is unknown or missing, a value does not fit, options exclude each other, or the teacher
            signal cannot serve the divergence; names the section.
        OSError: A file cannot be read.
    """
    values = read_yaml(path)
    refuse_old_names(path, values)
    with naming(str(path)):
        check_names(values, SECTIONS)
        with naming("quick"):
            quick = as_mapping(values.get("quick") or {})
            check_names(quick, tuple(name for name in SECTIONS if name != "quick"))
            values = make_quick(values) if is_quick else values
        if missing := [name for name in REQUIRED if values.get(name) is None]:
            raise ValueError(f"{' and '.join(f'`{name}`' for name in missing)} missing.")
        has_init, has_draft = makes_draft(values), values.get("draft") is not None
        refuse(
            (
                not has_init and not has_draft,
                "`draft` missing. Give one, or let a section `init` or `plan` make one.",
            ),
            (has_init and has_draft, "`draft` names a draft, and `init` or `plan` makes one. Leave one of them out."),
        )
        given = {name: values[name] for name in ("draft", "output_dir") if values.get(name) is not None}
        refuse(*((not isinstance(v, str), f"`{name}` must be text, got {v!r}.") for name, v in given.items()))
        values["output_dir"] = read_paths("output_dir", values["output_dir"])
        builder = _Builder(values, os.path.dirname(path))
        evaluation = builder.build_evaluate()
        names = (builder.folder, builder.output_dir, builder.target["target"])
        serving_builder = ServingBuilder(values, *names, evaluation)
        serving = serving_builder.build()
        recipe = Recipe(
            path=str(path),
            output_dir=builder.output_dir,
            parts={name: builder.build_part(name, part) for name, part in builder.prompts.items()},
            mix=builder.build_mix(),
            respond=(responses := builder.build_respond()),
            plan=builder.build_plan(responses, serving),
            init=builder.build_init(responses),
            pretrain=build_pretrain(values, builder.folder, builder.target, builder.seed, builder.initial_draft),
            train=builder.build_train(),
            evaluate=evaluation,
            serving=serving,
            serving_builder=serving_builder,
        )
        _check_together(recipe)
    return recipe


class _Builder:
    """Turns the sections of a recipe into the arguments of commands."""

    def __init__(self, values: JsonObject, folder: str):
        self.values = values
        self.folder = folder
        self.output_dir = values["output_dir"]
        self.seed = {"seed": values["seed"]} if "seed" in values else {}
        with naming("target"):
            target = values["target"]
            target = {"name": target} if isinstance(target, str) else dict(as_mapping(target))
            check_names(target, ("name", "engine", "base_url", "served_model_name", "engine_kwargs"))
            if not isinstance(target.get("name"), str):
                raise ValueError("`name` is missing: a folder or a name on the Hub.")
            name = read_paths("name", target.pop("name"))
            self.target = place_paths({"target": name, **target}, folder)
            Parser("run", "", {"target": TargetArguments}).parse_values(self.target)
        self.has_init, self.has_responses = makes_draft(values), values.get("respond") is not False
        self.initial_draft = f"{self.output_dir}/initial_draft"
        if not self.has_init:
            self.initial_draft = place_paths({"draft": values["draft"]}, folder)["draft"]
        self.responses = f"{self.output_dir}/responses/{respond.PRODUCTS[0]}" if self.has_responses else None
        self.prompts = dict(as_mapping(values["prompts"], "prompts"))
        self.mix = self.prompts.pop(MIX, None) or {}
        if not self.prompts:
            raise ValueError(f"`prompts` has no part. Give one or several of {', '.join(SCENARIOS)}.")

    def read(self, section: JsonValue, kind: str) -> JsonObject:
        """A section with its paths placed; raises `ValueError` for an option that the recipe sets."""
        return read_section(section, kind, self.folder)

    def build_part(self, name: str, part: JsonValue) -> Part:
        with naming(f"prompts: {name}"):
            part = self.read(part, "prompts")
            scenario = part.pop("scenario", name)
            refuse(
                (
                    "/" in name or name.startswith("."),
                    "the name of a part is that of a folder: no slash, and no dot at the beginning.",
                ),
                (
                    scenario not in SCENARIOS,
                    f"`scenario` is {scenario!r}.{suggest(str(scenario), SCENARIOS)} A part with a name of its own "
                    "needs one of them.",
                ),
            )
            of_scenario = {
                "historical": {"tokenizer": self.target["target"]},
                "synthetic": {"test_sets": self.find_test_sets(), **self.target},
            }
            given = {**of_scenario.get(scenario, {}), **self.seed, **part, "output_dir": self.find_part_folder(name)}
            return Part(scenario, build_parser(SCENARIOS[scenario]).parse_values(given))

    def find_test_sets(self) -> list[str]:
        """The test prompts that exist before any prompt is synthesized, and that no synthetic prompt may repeat."""
        evaluation = self.values.get("evaluate") or {}
        if isinstance(evaluation, Mapping) and "prompts" in evaluation:
            return [place_paths(evaluation, self.folder)["prompts"]]
        others = {n: part.get("scenario", n) for n, part in self.prompts.items() if isinstance(part, Mapping)}
        return [f"{self.find_part_folder(n)}/test.arrow" for n, kind in others.items() if kind != "synthetic"]

    def find_part_folder(self, name: str) -> str:
        return f"{self.output_dir}/parts/{name}"

    def build_mix(self) -> tuple[MixFiles, spec_kd.MixOptions]:
        with naming("prompts: mix"):
            given = {"tokenizer": self.target["target"], **self.seed, **self.read(self.mix, MIX)}
            parts = {name: self.find_part_folder(name) for name in self.prompts}
            given |= {"parts": parts, "output_dir": f"{self.output_dir}/prompts"}
            call = build_parser("prompts mix").parse_values(given)
            mix.check(*call)
            return call

    def build_respond(self) -> respond.ResponseCall | None:
        if not self.has_responses:
            return None
        with naming("respond"):
            given = {**self.target, **self.seed, **self.read(self.values.get("respond"), "respond")}
            given |= {"output_dir": f"{self.output_dir}/responses", "prompts": self.find_prompts("train")}
            return build_parser("respond").parse_values(given)

    def find_prompts(self, split: str) -> str:
        return f"{self.output_dir}/prompts/{split}.arrow"

    def find_sample(self, call: respond.ResponseCall | None) -> JsonObject:
        """The responses that a draft is planned and made on."""
        return {} if call is None else {"responses": self.responses, "temperature": call[1].temperature}

    def build_plan(self, call: respond.ResponseCall | None, serving: ServingSteps) -> PlanCall | None:
        if not is_given(self.values, "plan"):
            return None
        with naming("plan"):
            section = self.read(self.values["plan"], "plan")
            given = {
                **self.find_sample(call),
                **({} if "costs" in section else serving.list_timing_options()),
                **section,
            }
            given |= {"target": self.target["target"], "output_dir": f"{self.output_dir}/plan"}
            return build_parser("plan-draft").parse_values(given)

    def build_init(self, call: respond.ResponseCall | None) -> tuple[InitDraftFiles, spec_kd.DraftShapeOptions] | None:
        if not self.has_init:
            return None
        with naming("init"):
            section = self.read(self.values.get("init"), "init")
            if is_given(self.values, "plan") and (said := [name for name in PLANNED if name in section]):
                raise ValueError(f"`{said[0]}` is chosen by `plan`. Leave one of the two out.")
            given = {**self.seed, **self.find_sample(call), **section}
            given |= {"target": self.target["target"], "output_dir": self.initial_draft}
            return build_parser("init-draft").parse_values(given)

    def build_train(self) -> train.TrainCall:
        with naming("train"):
            section = self.read(self.values["train"], "train")
            if "method" not in section:
                raise ValueError(f"`method` is missing: {', '.join(list_kinds('train'))}.")
            method = section.pop("method")
            check_kind("train", method)
            given = {
                **self.seed,
                **section,
                "output_dir": f"{self.output_dir}/draft",
                "target": self.target["target"],
                "model_name_or_path": (
                    f"{self.output_dir}/{PRETRAINED}" if is_given(self.values, "pretrain") else self.initial_draft
                ),
                "responses": self.responses or self.find_prompts("train"),
            }
            parser = build_parser(f"train {method}")
            arguments, draft, config = parser.parse_values(given)
            return train.TrainCall(method, arguments, draft, config, parser.chosen)

    def build_evaluate(self) -> evaluate.EvaluationCall:
        with naming("evaluate"):
            section = self.read(self.values.get("evaluate") or None, "evaluate")
            if len(self.prompts) > 1 and "prompts" not in section:
                section.setdefault("group_by", ["scenario"])
            given = {
                "prompts": self.find_prompts("test"),
                "num_prompts": NUM_EVALUATION_PROMPTS,
                **self.target,
                **self.seed,
                **section,
                "drafts": {"before": self.initial_draft, "after": f"{self.output_dir}/draft"},
                "responses_dir": f"{self.output_dir}/test_responses",
                "output_dir": f"{self.output_dir}/evaluation",
            }
            call = build_parser("evaluate").parse_values(given)
            evaluate.check(*call)
            return call


def makes_draft(values: Record) -> bool:
    """Whether a recipe makes the draft that training begins with."""
    return is_given(values, "init") or is_given(values, "plan")


def _check_together(recipe: Recipe) -> None:
    """Raises `ValueError` for sections that do not fit each other."""
    method, config = recipe.train.method, recipe.train.config
    if recipe.respond is None:
        for name, part in recipe.parts.items():
            has_completions = part.scenario == "historical" or (
                part.scenario == "curated" and part.call[1].keep_completions
            )
            if not has_completions and not (method == "online_gkd" and getattr(config, "lmbda", None) == 1):
                raise ValueError(
                    f"respond: false trains on completions that come with the prompts, but `prompts: {name}` has none. "
                    "Let the target write them (a `respond` section), or set `keep_completions: true` for a curated "
                    "dataset."
                )
        return
    signal = recipe.respond[1].teacher_signal
    if (
        signal is not None
        and method == "white_box"
        and isinstance(config, spec_kd.WhiteBoxDistillConfig)
        and config.teacher_model_name_or_path is None
    ):
        with naming("train: (from `respond: teacher_signal`)"):
            config.build_loss().check_served_by(SPARSE_METHODS[signal])
