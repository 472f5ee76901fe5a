"""Recipes: a whole pipeline, from raw input to an evaluated draft, as one YAML file for `spec-kd run`.

```yaml
target: my-org/Qwen2.5-7B-medical      # folder or Hub name; or a mapping, see below
draft: Qwen/Qwen2.5-0.5B-Instruct      # folder or Hub name
output_dir: runs/medical               # one folder per step; paths are relative to the working directory
seed: 0                                # of every step that has none of its own

prompts:                               # one or several parts; a part's options are those of its command
  historical:                          # `spec-kd prompts logs`
    paths: [logs/2025-*.jsonl.gz]
    redact: [email, phone]
  curated:                             # `spec-kd prompts curated`
    dataset: my-org/medical-questions
    prompt_column: question
  synthetic:                           # `spec-kd synthesize`
    num_queries: 5000
  leaflets:                            # any other name, with its scenario
    scenario: curated
    dataset: data/leaflets.jsonl
  mix:                                 # `spec-kd prompts mix`; may be left out
    weights: {historical: 0.5, curated: 0.2, synthetic: 0.2, leaflets: 0.1}
    num_prompts: 20000

respond:                               # `spec-kd respond`; `false` learns from the answers that the prompts come with
  temperature: 1.0
  max_new_tokens: 512
  teacher_signal: sampled_logprobs     # training then needs no target; without it the target is loaded for training

train:                                 # `spec-kd train METHOD`: `method`, ours, and every argument of the trainer
  method: white_box                    # white_box, black_box or online_gkd
  divergence: forward_kl
  learning_rate: 2e-5
  num_train_epochs: 3
  save_steps: 200                      # a killed training continues from the last checkpoint

evaluate:                              # `spec-kd evaluate`; on the test prompts of the parts unless `prompts` is given
  serving_engine: vllm
  num_prompts: 200                     # the default of a recipe
  fail_under: {block_efficiency: 2.5}  # exit status 3 below it
```

`target` as a mapping has its `name` and the engine that runs it for synthesis, answers and evaluation:
`{name: my-org/target, engine: server, base_url: "http://localhost:8000/v1"}`; see `spec-kd respond --help`. A section
may set another `engine` for itself. Training with a live target always loads it with transformers.

Synthetic prompts that repeat a test prompt, of the other parts or of `evaluate: prompts`, are dropped. So they depend
on those, unless `test_sets` of the part says otherwise.

Set by the recipe, and refused in a section: `output_dir`, `target`, `drafts` and what one step reads of another. Leave
`bf16` out: it is on where there is a GPU, and asking for it is an error where there is none. All steps are done in one
process; to train on several cards, run `accelerate launch -m spec_kd.cli train ...` on what `respond` left. Where vLLM
does not give its memory back and training runs out of it, the same command goes on with the training.

What a step is made from is noted in its folder as `.step.json`: the options that are not defaults, and hashes of the
files it reads (see `spec_kd.cli.fingerprints.Fingerprints`), those that earlier steps wrote among them. A changed input
redoes what depends on it and nothing else; what was there is moved to `replaced/` in `output_dir`. Versions of
libraries and of this package are no inputs: delete a folder to redo its step.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spec_kd.checks import read_path
from spec_kd.cli import evaluate, prompts, respond, synthesize, train
from spec_kd.cli.mix import MixArguments
from spec_kd.cli.parsing import check_keys, read_yaml
from spec_kd.cli.target import TargetArguments
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
            values[name] = read_path(name, values[name])
        builder = _Builder(values)
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

    def __init__(self, values: JsonObject):
        self.values = values
        self.output_dir = values["output_dir"]
        self.seed = {"seed": values["seed"]} if "seed" in values else {}
        with naming("target"):
            target = values["target"]
            target = {"name": target} if isinstance(target, str) else dict(_as_mapping(target))
            _check_names(target, ("name", "engine", "base_url", "served_model_name", "engine_kwargs"))
            if not isinstance(target.get("name"), str):
                raise ValueError("`name` is missing: a folder or a name on the Hub.")
            self.target = {"target": read_path("name", target.pop("name")), **target}
            TargetArguments(**self.target)
        self.prompts = dict(_as_mapping(values["prompts"], "prompts"))
        self.mix = self.prompts.pop(MIX, None) or {}
        if not self.prompts:
            raise ValueError(f"`prompts` has no part: give {', '.join(SCENARIOS[:-1])} or {SCENARIOS[-1]}.")

    def build_parts(self) -> dict[str, Part]:
        return {name: self._build_part(name, part) for name, part in self.prompts.items()}

    def _build_part(self, name: str, part: Any) -> Part:
        with naming(f"prompts: {name}"):
            part = dict(_as_mapping(part))
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
            return [read_path("evaluate: prompts", evaluation["prompts"])]
        others = {n: part.get("scenario", n) for n, part in self.prompts.items() if isinstance(part, Mapping)}
        return [f"{self.find_part_folder(n)}/test.arrow" for n, kind in others.items() if kind != "synthetic"]

    def find_part_folder(self, name: str) -> str:
        return f"{self.output_dir}/parts/{name}"

    def build_mix(self) -> MixArguments:
        with naming("prompts: mix"):
            mix = dict(_as_mapping(self.mix))
            _refuse(mix, SET_BY_RECIPE[MIX])
            parts = [f"{name}={self.find_part_folder(name)}" for name in self.prompts]
            given = {"tokenizer": self.target["target"], **self.seed, **mix}
            given |= {"parts": parts, "output_dir": f"{self.output_dir}/prompts"}
            (arguments,) = prompts.build_parser("mix").parse_values(given)
            arguments.name_parts()
            return arguments

    def build_respond(self) -> respond.RespondCall | None:
        section = self.values.get("respond")
        if section is False:
            return None
        with naming("respond"):
            section = _as_mapping({} if section is None else section)
            _refuse(section, SET_BY_RECIPE["respond"])
            given = {**self.target, **self.seed, **section, "output_dir": f"{self.output_dir}/responses"}
            call = respond.build_parser().parse_values({**given, "prompts": self.find_prompts("train")})
            call[0].check()
            return call

    def find_prompts(self, split: str) -> str:
        return f"{self.output_dir}/prompts/{split}.arrow"

    def build_train(self) -> train.TrainCall:
        with naming("train"):
            section = dict(_as_mapping(self.values["train"]))
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
                "model_name_or_path": self.values["draft"],
                "responses": responses if is_answered else self.find_prompts("train"),
            }
            parser = train.build_parser(method)
            config, draft, arguments = parser.parse_values(given)
            return train.TrainCall(method, arguments, config, draft, parser.chosen)

    def build_evaluate(self) -> evaluate.EvaluateCall:
        with naming("evaluate"):
            section = dict(_as_mapping(self.values.get("evaluate") or {}))
            _refuse(section, SET_BY_RECIPE["evaluate"])
            if len(self.prompts) > 1 and "prompts" not in section:
                section.setdefault("group_by", ["scenario"])
            given = {
                "prompts": self.find_prompts("test"),
                "num_prompts": NUM_EVALUATION_PROMPTS,
                **self.target,
                **self.seed,
                **section,
                "drafts": [f"before={self.values['draft']}", f"after={self.output_dir}/draft"],
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
