"""`spec-kd evaluate`: measures drafts for a target, writes a report, and holds it against thresholds."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from spec_kd.checks import check_int
from spec_kd.cli.model_checks import check_model, naming_model
from spec_kd.cli.parsing import Parser
from spec_kd.cli.rows import check_exists, load_rows, take_first
from spec_kd.cli.steps import Workspace, list_options, tell
from spec_kd.cli.target import GROUP, TargetArguments
from spec_kd.evaluation.options import EvaluationOptions
from spec_kd.open_types import JsonObject
from spec_kd.options import document_options, option

if TYPE_CHECKING:
    from spec_kd.vocabulary import ProcessingClass

DESCRIPTION = (
    "Measures drafts: acceptance and tokens per target pass on the target's responses, the costs on this machine, the "
    "speed-up that follows, and where a draft fails. Writes report.html, .md, .json and .png. Without --target the "
    "prompts must be responses with a teacher signal."
)
PRODUCTS = ("report.json", "report.md", "report.html", "report.png")
COMMON = ("drafts", "target", "prompts", "output_dir", "serving_engine", "fail_under", "num_prompts", "engine")
NOT_INPUTS = ("drafts", "prompts", "output_dir", "responses_dir", "fail_under")
OF_RESPONSES = ("temperatures", "top_k", "top_p", "max_new_tokens", "batch_size", "num_prompts", "split", "seed")


@document_options
@dataclass(frozen=True)
class EvaluationFiles:
    """What `spec-kd evaluate` reads and writes."""

    drafts: dict[str, str] = option(
        "Drafts as NAME=PATH, or as PATH, whose last folder is then the name. The first of several is the baseline.",
        aliases=("--draft",),
    )
    prompts: str = option("Test prompts: a file, a folder or a name on the Hub, with the column `prompt`.")
    output_dir: str = option("Folder for the report.")
    split: str = option("Split of the prompts, for a folder or a name on the Hub.", "test")
    num_prompts: int | None = option("Number of prompts to measure on, the first ones; all by default.", None)
    responses_dir: str | None = option(
        "Folder for the target's responses, which evaluations of other drafts can share; by default "
        "`output_dir/responses`.",
        None,
    )
    fail_under: dict[str, float] | None = option(
        "Thresholds such as block_efficiency=2.5 alpha_t1=0.6. The exit status is 3 if a metric of the last draft lies "
        "below one; no thresholds by default.",
        None,
    )

    def __post_init__(self) -> None:
        check_int("num_prompts", self.num_prompts, is_optional=True)

    @property
    def gates(self) -> list[str]:
        """The thresholds as [`~spec_kd.check_gates`] takes them."""
        return [f"{name}={threshold}" for name, threshold in (self.fail_under or {}).items()]


EvaluationCall = tuple[EvaluationFiles, EvaluationOptions, TargetArguments]


def build_parser() -> Parser:
    """The options of the command."""
    groups = {"files": EvaluationFiles, "evaluation": EvaluationOptions, GROUP: TargetArguments}
    return Parser("evaluate", DESCRIPTION, groups, COMMON)


def check(files: EvaluationFiles, options: EvaluationOptions, target: TargetArguments) -> None:
    """Raises `ValueError` for an option that the target cannot serve or a threshold on a missing metric."""
    from spec_kd.evaluation.gates import check_measured

    has_target = target.target is not None
    is_here = has_target and target.engine == "transformers"
    options.check_target(is_here)
    # without a target the temperatures are those of the responses
    is_known = options.temperatures is not None or has_target
    settings = {one.name: one.draft_sampling for one in options.list_settings()} if is_known else None
    costs = options.read_costs()
    batch_sizes = [table.batch_size for table in costs] if costs is not None else options.batch_sizes
    has_costs = 1 in batch_sizes and (costs is not None or is_here)
    check_measured(files.gates, settings, has_costs=has_costs, has_assisted=options.num_assisted_prompts > 0)


def run(
    files: EvaluationFiles, options: EvaluationOptions, target: TargetArguments, workspace: Workspace | None = None
) -> JsonObject:
    """Writes a report to `output_dir`; returns the metrics of the last draft and whether it reaches the thresholds.

    The target's responses are a step of their own, because they do not depend on the drafts.

    Raises:
        ValueError: As [`check`], or a model or the prompts cannot be read.
        OSError: A model or the prompts do not exist.
        ImportError: The engine is not installed.
    """
    workspace = workspace or Workspace()
    check(files, options, target)
    for name, path in files.drafts.items():
        check_exists(f"draft {name}", path)
    check_exists("prompts", files.prompts)
    if target.target is not None:
        target.check()
    chosen = list_options(files, NOT_INPUTS) | list_options(options)
    if "costs" in chosen:  # a file counts by its content
        chosen["costs"] = workspace.fingerprints.of_data(cast(str, options.costs))
    common = {
        "target": target.list_inputs(workspace.fingerprints),
        "prompts": workspace.fingerprints.of_data(files.prompts),
    }
    drafts = {name: workspace.fingerprints.of_model(path) for name, path in files.drafts.items()}
    inputs = {"drafts": drafts, **common, "options": chosen}

    if not workspace.is_finished(files.output_dir, inputs):
        for name, path in files.drafts.items():
            check_model(f"draft {name!r}", path)

    def work() -> JsonObject:
        from spec_kd import evaluate_draft, save_report
        from spec_kd.evaluation.gates import collect_metrics
        from spec_kd.loading import load_tokenizer

        responses_dir, model = None, None
        if target.target is None:
            draft = list(files.drafts.values())[-1]
            with naming_model("tokenizer of the draft", draft):
                processing_class: ProcessingClass = load_tokenizer(draft)
        else:
            responses_dir = files.responses_dir or str(Path(files.output_dir, "responses"))
            of_responses = {name: value for name, value in chosen.items() if name in OF_RESPONSES}
            workspace.open(responses_dir, {**common, "options": of_responses}, ("texts_*",))
            model, processing_class = target.load()
        report = evaluate_draft(
            files.drafts,
            model,
            take_first(load_rows(files.prompts, files.split, option="prompts"), files.num_prompts),
            options,
            processing_class=processing_class,
            output_dir=responses_dir,
        )
        paths = save_report(report, files.output_dir)
        return {
            "draft": report.draft.name,
            "metrics": collect_metrics(report, report.draft),
            "report": {kind: str(path) for kind, path in paths.items()},
        }

    result = workspace.do(files.output_dir, "evaluate", inputs, PRODUCTS, work)
    return {**result, **hold_against(files.gates, files.output_dir)}


def hold_against(gates: list[str], report_dir: str) -> JsonObject:
    """Compares a report with thresholds; returns each result and whether all have passed, or nothing without any."""
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
