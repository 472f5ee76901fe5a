"""`spec-kd evaluate`: what drafts do for a target, as a report, and whether that is enough."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from spec_kd.checks import check_int
from spec_kd.cli.model_checks import check_model, naming_model
from spec_kd.cli.parsing import Parser
from spec_kd.cli.respond import take_first
from spec_kd.cli.rows import check_exists, load_rows
from spec_kd.cli.steps import Workspace, list_options, tell
from spec_kd.cli.target import GROUP, TargetArguments
from spec_kd.open_types import JsonObject

if TYPE_CHECKING:
    from spec_kd.evaluation.options import EvaluationOptions

DESCRIPTION = (
    "Measures drafts: acceptance and tokens per target pass by replay on what the target writes, costs on this "
    "machine, the speed-up that follows, and where a draft fails. Writes report.html, .md, .json and .png. Without "
    "--target the prompts must be responses with a teacher signal."
)
PRODUCTS = ("report.json", "report.md", "report.html", "report.png")
COSTS = ("measure", "none")
COMMON = ("drafts", "target", "prompts", "output_dir", "serving_engine", "fail_under", "num_prompts", "engine")
NOT_INPUTS = ("drafts", "prompts", "output_dir", "texts_dir", "fail_under")
OF_TEXTS = ("temperatures", "top_k", "top_p", "max_new_tokens", "batch_size", "num_prompts", "split", "seed")


@dataclass
class EvaluateArguments:
    r"""
    Options of [`~spec_kd.evaluate_draft`] and [`~spec_kd.check_gates`].

    Args:
        drafts (`dict[str, str]`): Folders or Hub names by the name of the draft; the first of several is the baseline.
        prompts (`str`): Test prompts, or without a target responses with a teacher signal.
        output_dir (`str`): For the report.
        texts_dir (`str`, *optional*): Where the target's texts are kept; `output_dir/texts` by default.
        fail_under (`dict[str, float]`, *optional*): Thresholds by name, held against the last draft.
        others: As of [`~spec_kd.evaluate_draft`].
    """

    _argument_group_name = "evaluation"

    drafts: dict[str, str] = field(
        metadata={"help": "Drafts as PATH or NAME=PATH; the first of several is the baseline.", "aliases": ["--draft"]}
    )
    prompts: str = field(metadata={"help": "Test prompts: a file, a folder or a name on the Hub, with `prompt`."})
    output_dir: str = field(metadata={"help": "Folder for the report."})
    fail_under: dict[str, float] | None = field(
        default=None,
        metadata={"help": "Thresholds such as block_efficiency=2.5 alpha_t1=0.6; exit status 3 below one of them."},
    )
    serving_engine: str = field(
        default="transformers",
        metadata={"help": "Where the draft will serve: transformers, vllm, sglang, llama.cpp or tensorrt-llm."},
    )
    split: str = field(default="test", metadata={"help": "Split of the prompts, for a folder or a Hub name."})
    num_prompts: int | None = field(default=None, metadata={"help": "Measure on so many prompts, the first ones."})
    temperatures: list[float] | None = field(
        default=None, metadata={"help": "Of the target's texts: 0 and 1 by default, or those of the responses."}
    )
    top_k: int = field(default=0, metadata={"help": "Of the deployment's sampling, for both models; 0 for all ids."})
    top_p: float = field(default=1.0, metadata={"help": "Of the deployment's sampling, for both models."})
    num_assistant_tokens: int = field(default=5, metadata={"help": "Tokens drafted in a round, in headline figures."})
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Longest text: 256 by default, or the limit of the responses."}
    )
    group_by: list[str] | None = field(
        default=None, metadata={"help": "Columns of the prompts to break figures down by, such as scenario."}
    )
    costs: str = field(
        default="measure",
        metadata={"help": "'measure' what a round costs here, 'none', or a JSON file with the costs of your engine."},
    )
    batch_sizes: list[int] | None = field(default=None, metadata={"help": "Batch sizes to measure costs at (1)."})
    num_assisted_prompts: int = field(
        default=0, metadata={"help": "Prompts on which real assisted generation is run as a cross-check; slow."}
    )
    num_shown_prompts: int = field(default=5, metadata={"help": "Worst prompts to show token by token."})
    show_prompt_text: bool = field(default=True, metadata={"help": "Whether their prompts are shown too."})
    batch_size: int = field(default=8, metadata={"help": "Texts at a time."})
    seed: int = field(default=0, metadata={"help": "Of the target's sampling."})
    texts_dir: str | None = field(
        default=None, metadata={"help": "Folder for the target's texts: `texts` in output_dir by default."}
    )

    def __post_init__(self) -> None:
        if self.costs not in COSTS and not Path(self.costs).is_file():
            raise ValueError(
                f"`costs` is {self.costs!r}, but must be {', '.join(map(repr, COSTS))} or a JSON file with the "
                "arguments of `ServingCosts`."
            )

    def check(self, engine: str | None = None) -> None:
        """Raises `ValueError` for what is wrong whatever the drafts and the prompts are.

        Args:
            engine (`str`, *optional*): Who runs the target; `None` without a target.
        """
        from spec_kd.evaluation.gates import check_measured

        check_int("num_prompts", self.num_prompts, is_optional=True)
        options, is_here = self.make_options(), engine == "transformers"
        options.check_target(is_here)
        # without a target the temperatures are those of the responses
        is_known = self.temperatures is not None or engine is not None
        settings = {one.name: one.draft_sampling for one in options.list_settings()} if is_known else None
        costs = options.read_costs()
        batch_sizes = [table.batch_size for table in costs] if costs is not None else options.batch_sizes
        has_costs = 1 in batch_sizes and (costs is not None or is_here)
        check_measured(self.list_gates(), settings, has_costs=has_costs, has_assisted=options.num_assisted_prompts > 0)

    def make_options(self) -> "EvaluationOptions":
        """As [`~spec_kd.evaluate_draft`] takes them; raises `ValueError` for a value out of its range."""
        from spec_kd.evaluation.options import EvaluationOptions

        names = {one.name for one in fields(EvaluationOptions)}
        given = {one.name: getattr(self, one.name) for one in fields(self) if one.name in names}
        return EvaluationOptions(**{name: value for name, value in given.items() if value is not None})

    def list_gates(self) -> list[str]:
        """The thresholds as [`~spec_kd.check_gates`] takes them."""
        return [f"{name}={threshold}" for name, threshold in (self.fail_under or {}).items()]


EvaluateCall = tuple[EvaluateArguments, TargetArguments]


def build_parser() -> Parser:
    """The options of the command."""
    return Parser("evaluate", DESCRIPTION, {"evaluation": EvaluateArguments, GROUP: TargetArguments}, COMMON)


def parse(argv: Sequence[str]) -> EvaluateCall:
    """The command line."""
    return build_parser().parse(argv)


def run(call: EvaluateCall) -> JsonObject:
    """The command."""
    return evaluate(*call, Workspace())


def evaluate(arguments: EvaluateArguments, target: TargetArguments, workspace: Workspace) -> JsonObject:
    """The step: a report in `output_dir`, its figures for the last draft, and what became of the gates.

    The target's texts are a step of their own: they do not depend on the drafts.
    """
    arguments.check(None if target.target is None else target.engine)
    drafts = arguments.drafts
    for name, path in drafts.items():
        check_exists(f"draft {name}", path)
    check_exists("prompts", arguments.prompts)
    if target.target is not None:
        target.check()
    options = list_options(arguments, NOT_INPUTS)
    if "costs" in options:  # a file counts by what is in it
        options["costs"] = workspace.fingerprints.of_data(arguments.costs)
    of_target = target.list_inputs(workspace.fingerprints)
    of_prompts = workspace.fingerprints.of_data(arguments.prompts)
    inputs = {
        "drafts": {name: workspace.fingerprints.of_model(path) for name, path in drafts.items()},
        "target": of_target,
        "prompts": of_prompts,
        "options": options,
    }

    if not workspace.is_finished(arguments.output_dir, inputs):
        for name, path in drafts.items():
            check_model(f"draft {name!r}", path)

    def work() -> JsonObject:
        from spec_kd import evaluate_draft, save_report
        from spec_kd.evaluation.gates import collect_metrics
        from spec_kd.loading import load_tokenizer

        texts_dir, model = None, None
        if target.target is None:
            draft = list(drafts.values())[-1]
            with naming_model("tokenizer of the draft", draft):
                processing_class = load_tokenizer(draft)
        else:
            texts_dir = arguments.texts_dir or str(Path(arguments.output_dir, "texts"))
            of_texts = {name: value for name, value in options.items() if name in OF_TEXTS}
            text_inputs = {"target": of_target, "prompts": of_prompts, "options": of_texts}
            workspace.open(texts_dir, text_inputs, ("texts_*",))
            model, processing_class = target.load()
        report = evaluate_draft(
            drafts,
            model,
            take_first(load_rows(arguments.prompts, arguments.split, option="prompts"), arguments.num_prompts),
            arguments.make_options(),
            processing_class=processing_class,
            output_dir=texts_dir,
        )
        paths = save_report(report, arguments.output_dir)
        return {
            "draft": report.draft.name,
            "figures": collect_metrics(report, report.draft),
            "report": {kind: str(path) for kind, path in paths.items()},
        }

    result = workspace.do(arguments.output_dir, "evaluate", inputs, PRODUCTS, work)
    return {**result, **hold_against(arguments.list_gates(), arguments.output_dir)}


def hold_against(gates: Sequence[str], report_dir: str) -> JsonObject:
    """What became of the gates, and whether all have passed; nothing without any."""
    if not gates:
        return {}
    from spec_kd import check_gates
    from spec_kd.evaluation import load_report

    results = check_gates(load_report(report_dir), gates)
    for gate in results:
        if math.isnan(gate.value.value):
            tell(f"evaluate: {gate.name} is NaN, which reaches no threshold ({gate.threshold:g})")
            continue
        verb = "reaches" if gate.has_passed else "lies below"
        tell(f"evaluate: {gate.name} {gate.value.value:.4g} {verb} {gate.threshold:g}")
    return {"gates": [asdict(gate) for gate in results], "has_passed": all(gate.has_passed for gate in results)}
