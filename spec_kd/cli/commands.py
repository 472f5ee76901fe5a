"""Every command with its options: what `--help` says of it, and which dataclasses it parses."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import ModuleType

import spec_kd
from spec_kd.cli import recipe_format
from spec_kd.cli.arguments import (
    ConvertArguments,
    CorpusFiles,
    CuratedFiles,
    DraftArguments,
    EvaluationFiles,
    InitArguments,
    InitDraftFiles,
    LogFiles,
    MixFiles,
    PlanDraftFiles,
    ResponseFiles,
    RunArguments,
    SynthesisFiles,
    TargetArguments,
    TrainArguments,
)
from spec_kd.cli.parsing import Parser
from spec_kd.cli.serving_arguments import (
    CheckServingArguments,
    ExportFiles,
    ObservationFiles,
    ServerCostFiles,
)
from spec_kd.cli.steps import Workspace
from spec_kd.open_types import Argument, Call, JsonObject
from spec_kd.options import suggest

# Commands whose first argument is one of several: what `--help` and errors call it.
KINDS = {"prompts": ("KIND", "kind of prompts"), "train": ("METHOD", "method")}
TRAINING = (
    " A stopped run continues from its last checkpoint. All options of TRL's SFTConfig and ModelConfig are accepted "
    "too, and come last."
)
OF_TRAINING = (
    "model_name_or_path", "target", "responses", "output_dir", "learning_rate", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "use_peft", "eval_strategy",
    "save_steps", "report_to", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class Command:
    """A command and its options, as [`Parser`] takes them.

    Args:
        description (`str`): What the command does.
        common (`Sequence[str]`): Options that `--help` shows first.
        build_groups (`Callable`): Returns the dataclasses by title. Some of them import heavy libraries.
        epilog (`str`, *optional*), first (`str`, *optional*): As for [`Parser`].
    """

    description: str
    common: Sequence[str]
    build_groups: Callable[[], Mapping[str, type]]
    epilog: str | None = None
    first: str | None = None


COMMANDS = {
    "init": Command(
        "Writes a recipe for `spec-kd run`, with comments, for a target and a draft. It compares their tokenizers and "
        "configurations where they can be read, and chooses the method by that. Without a draft the recipe makes one.",
        ("target", "draft", "prompts", "scenario", "output"),
        lambda: {"recipe": InitArguments},
    ),
    "run": Command(
        "Runs a recipe: prompts, the target's completions, a draft, training, evaluation, export, and what a server "
        "does with the draft. All of it is checked before the first step. A step whose inputs have not changed is not "
        "repeated, and one that was killed continues. `spec-kd init` writes a recipe.",
        ("recipe", "only_check", "quick"),
        lambda: {"recipe": RunArguments},
        recipe_format.__doc__,
        first="recipe",
    ),
    "prompts logs": Command(
        "Makes a prompt set of what users asked the target, from its logs.",
        ("paths", "output_dir", "tokenizer", "redact", "test_fraction"),
        lambda: {"files": LogFiles, "logs": spec_kd.LogOptions, "scale": spec_kd.ScaleOptions},
    ),
    "prompts curated": Command(
        "Makes a prompt set of the questions of a dataset, without its completions.",
        ("dataset", "output_dir", "prompt_column", "question_template", "test_fraction"),
        lambda: {"files": CuratedFiles, "curated": spec_kd.CuratedOptions},
    ),
    "prompts mix": Command(
        "Mixes several prompt sets, and writes a report.",
        ("parts", "output_dir", "weights", "num_prompts"),
        lambda: {"files": MixFiles, "mix": spec_kd.MixOptions},
    ),
    "synthesize": Command(
        "Lets an aligned target write what users might ask it (Magpie, arXiv 2406.08464), filters it, and reports what "
        "was dropped and why. A stopped job continues.",
        ("target", "num_queries", "output_dir", "system_prompts", "languages", "test_fraction", "engine"),
        lambda: {
            "files": SynthesisFiles,
            "synthesis": spec_kd.SynthesisOptions,
            "filter": spec_kd.TextFilter,
            "target": TargetArguments,
        },
    ),
    "respond": Command(
        "Lets the target complete every prompt. With --teacher_signal it stores what distillation needs of the "
        "target's distribution, so that drafts train without the target. A stopped job continues after its last whole "
        "shard. `accelerate launch -m spec_kd.cli respond ...` shares the shards between processes, and --num_workers "
        "between workers of a Ray cluster.",
        ("target", "prompts", "output_dir", "teacher_signal", "max_new_tokens", "temperature", "engine"),
        lambda: {
            "files": ResponseFiles,
            "responses": spec_kd.ResponseOptions,
            "workers": spec_kd.RayOptions,
            "target": TargetArguments,
        },
    ),
    "score": Command(
        "Lets the target read text that it did not write, and stores what distillation needs of its distribution at "
        "every token. `spec-kd train white_box` trains a draft on it without the target. A stopped job continues after "
        "its last whole shard, and `accelerate launch` or --num_workers shares the shards, as with `respond`.",
        ("target", "corpus", "output_dir", "teacher_signal", "max_length", "num_rows", "engine"),
        lambda: {
            "files": CorpusFiles,
            "scores": spec_kd.ScoreOptions,
            "workers": spec_kd.RayOptions,
            "target": TargetArguments,
        },
    ),
    "plan-draft": Command(
        "Compares shapes of a draft before one is trained: what a round costs, which acceptance it needs to break even "
        "and to reach a wished speed-up, and, with --run_minutes, which acceptance it reaches in equal time. Names a "
        "shape, or says that none can pay. Costs are timed in your llama-server with --llama_cpp_dir, else in "
        "transformers. Writes plan.md, .json and .png. A stopped measurement continues.",
        (
            "target",
            "output_dir",
            "shapes",
            "wished_speedup",
            "llama_cpp_dir",
            "server",
            "server_flags",
            "gammas",
            "responses",
            "run_minutes",
        ),
        lambda: {
            "files": PlanDraftFiles,
            "plan": spec_kd.DraftPlanOptions,
            "timing": spec_kd.ServerTimingOptions,
        },
    ),
    "init-draft": Command(
        "Makes a draft for a target that has no small sibling: layers and widths cut from the target or from another "
        "donor, or fresh layers on its embeddings. The draft has to be trained after that.",
        ("target", "output_dir", "responses", "num_hidden_layers", "hidden_size", "fresh_layers", "donor"),
        lambda: {"files": InitDraftFiles, "shape": spec_kd.DraftShapeOptions},
    ),
    "train white_box": Command(
        "Trains a draft on the target's distribution at every token, from a teacher signal or a live target."
        + TRAINING,
        (*OF_TRAINING, "divergence"),
        lambda: group_training("white_box", spec_kd.WhiteBoxDistillConfig),
    ),
    "train black_box": Command(
        "Trains a draft on the tokens of the target's responses." + TRAINING,
        OF_TRAINING,
        lambda: group_training("black_box", spec_kd.BlackBoxSFTConfig),
    ),
    "train online_gkd": Command(
        "Trains a draft on completions that the draft, the target or both write during training." + TRAINING,
        (*OF_TRAINING, "divergence"),
        lambda: group_training("online_gkd", spec_kd.OnlineGKDConfig),
    ),
    "evaluate": Command(
        "Measures drafts: acceptance and tokens per target pass on the target's responses, the costs on this machine, "
        "the speed-up that follows, and where a draft fails. Writes report.html, .md, .json and .png. Without --target "
        "the prompts must be responses with a teacher signal.",
        ("drafts", "target", "prompts", "output_dir", "serving_engine", "fail_under", "num_prompts", "engine"),
        lambda: {"files": EvaluationFiles, "evaluation": spec_kd.EvaluationOptions, "target": TargetArguments},
    ),
    "check-serving": Command(
        "Finds what would make a serving engine refuse a draft, write wrong text with it, never draft, or draft less "
        "than it could. Reads configurations and tokenizers, and no weights. The exit status is 3 if an engine refuses "
        "the draft, writes wrong text or never drafts.",
        ("draft", "target", "serving_engine"),
        lambda: {"serving": CheckServingArguments},
    ),
    "export": Command(
        "Saves a draft as servers load it: without an adapter, with as many vocabulary rows as the target. With "
        "--serving_engines it checks the draft for these engines, and writes serving.json: commands, checks, expected "
        "acceptance, sums of the files. With --llama_cpp_dir it also writes GGUF files of draft and target; whole ones "
        "of the same models are used again.",
        ("draft", "output_dir", "target", "target_vocab_size", "serving_engines", "llama_cpp_dir", "quantization"),
        lambda: {"files": ExportFiles, "export": spec_kd.ExportOptions},
    ),
    "observe": Command(
        "Asks a running server (vLLM, SGLang, llama-server) the test prompts, reads how many tokens it drafted and "
        "accepted, and measures tokens a second; with --plain_url also without the draft. With --draft the report has "
        "what replay predicts on the same tokens. Writes observed.html, .md and .json; with --report also the "
        "evaluation with it.",
        ("url", "target", "prompts", "output_dir", "serving_engine", "plain_url", "draft", "report", "num_prompts"),
        lambda: {"files": ObservationFiles, "observation": spec_kd.ObservationOptions},
    ),
    "measure-costs": Command(
        "Times rounds of your llama-server with a draft, for several numbers of drafted tokens, and its plain steps. "
        "Writes costs.json, which `spec-kd evaluate --costs` reads. With --acceptance_rates it measures the server's "
        "speed at these instead, for a draft that is not trained yet. A stopped measurement continues.",
        ("draft", "target", "output_dir", "server", "server_flags", "gammas", "batch_sizes", "acceptance_rates"),
        lambda: {"files": ServerCostFiles, "timing": spec_kd.ServerTimingOptions},
    ),
    "convert": Command(
        "Converts what an earlier version wrote. A recipe, or a YAML file with options, gets today's names in a new "
        "file beside it. A folder of a run or of a step is converted in place, so that finished steps do not run "
        "again.",
        ("path",),
        lambda: {"source": ConvertArguments},
        first="path",
    ),
}
NO_STEPS = ("init", "run", "check-serving", "export", "convert")


def group_training(method: str, config_class: type) -> dict[str, type]:
    """The options of a training by title: data and target, TRL's of a model, and the trainer's."""
    return {"data": TrainArguments, "draft model": DraftArguments, f"{method} distillation": config_class}


def build_parser(name: str) -> Parser:
    """The parser of a command, such as `"train white_box"`."""
    command = COMMANDS[name]
    return Parser(
        name, command.description, command.build_groups(), command.common, command.epilog, first=command.first
    )


def find_module(name: str) -> ModuleType:
    """Imports the module that runs a command: the last word of its name, or `train` for every method."""
    module = "train" if name.startswith("train") else name.split()[-1].replace("-", "_")
    return import_module(f"spec_kd.cli.{module}")


def list_kinds(command: str) -> list[str]:
    """The words that may come after a command: methods of `train`, kinds of `prompts`."""
    return [name.removeprefix(f"{command} ") for name in COMMANDS if name.startswith(f"{command} ")]


def check_kind(command: str, kind: str) -> None:
    """Raises `ValueError` for a word that may not come after a command."""
    if kind not in list_kinds(command):
        raise ValueError(f"there is no {KINDS[command][1]} {kind!r}.{suggest(kind, list_kinds(command))}")


def parse(command: str, argv: Sequence[str]) -> tuple[Call[JsonObject], tuple[Argument, ...]]:
    """Parses the options of a command; returns the function that runs it, and its arguments.

    Raises:
        ValueError: An option is wrong, or there is no such method or kind of prompts.
        OSError: A file with options cannot be read.
        SystemExit: Help was asked for, or the method or kind is missing.
    """
    if command in KINDS:
        if not argv or argv[0] in ("-h", "--help"):
            print(describe_kinds(command), file=sys.stdout if argv else sys.stderr)
            raise SystemExit(0 if argv else 2)
        check_kind(command, argv[0])
        command, argv = f"{command} {argv[0]}", argv[1:]
    parser = build_parser(command)
    arguments, module = parser.parse(argv), find_module(command)
    if command.startswith("train"):
        arguments = (module.TrainCall(command.split()[1], *arguments, parser.chosen),)
    return module.run if command in NO_STEPS else partial(module.run, workspace=Workspace()), arguments


def describe_kinds(command: str) -> str:
    """The text of `--help` for a command whose first argument is one of several."""
    kind, kinds = KINDS[command][0], list_kinds(command)
    texts = {name: COMMANDS[f"{command} {name}"].description.removesuffix(TRAINING) for name in kinds}
    width = max(map(len, kinds))
    lines = [f"usage: spec-kd {command} {kind} [--config FILE.yaml] [--OPTION VALUE ...]", ""]
    lines += [f"  {name:<{width}}  {text}" for name, text in texts.items()]
    return "\n".join([*lines, "", f"`spec-kd {command} {kind} --help` lists the options of one."])
