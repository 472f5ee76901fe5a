"""`spec-kd evaluate`: measures drafts for a target, writes a report, and holds it against thresholds."""

import math
from dataclasses import asdict

import spec_kd
from spec_kd.addresses import name_place
from spec_kd.cli.arguments import EvaluationFiles, TargetArguments
from spec_kd.cli.model_checks import check_model, naming_model
from spec_kd.cli.paths import check_exists
from spec_kd.cli.rows import load_rows, take_first
from spec_kd.cli.steps import Workspace, list_options, tell
from spec_kd.cli.target import check_target, list_inputs, load_target
from spec_kd.evaluation import load_report
from spec_kd.evaluation.gates import check_measured, collect_metrics
from spec_kd.evaluation.report.left_out import WORDS
from spec_kd.loading import load_tokenizer
from spec_kd.open_types import JsonObject
from spec_kd.vocabulary import ProcessingClass

PRODUCTS = ("report.json", "report.md", "report.html", "report.png")
NOT_INPUTS = ("drafts", "prompts", "output_dir", "responses_dir", "fail_under")
OF_RESPONSES = (
    "temperatures", "top_k", "top_p", "max_new_tokens", "batch_size", "num_prompts", "split", "seed", "json_schema",
    "grammar",
)  # fmt: skip

EvaluationCall = tuple[EvaluationFiles, spec_kd.EvaluationOptions, TargetArguments]


def check(files: EvaluationFiles, options: spec_kd.EvaluationOptions, target: TargetArguments) -> None:
    """Raises `ValueError` for an option that the target cannot serve or a threshold on a missing metric."""
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
    files: EvaluationFiles, options: spec_kd.EvaluationOptions, target: TargetArguments, workspace: Workspace
) -> JsonObject:
    """Writes a report to `output_dir`; returns the metrics of the last draft and whether it reaches the thresholds.

    The target's responses are a step of their own, because they do not depend on the drafts.

    Raises:
        ValueError: As [`check`], or a model or the prompts cannot be read.
        OSError: A model or the prompts do not exist.
        ImportError: The engine is not installed.
    """
    check(files, options, target)
    for name, path in files.drafts.items():
        check_exists(f"draft {name}", path)
    check_exists("prompts", files.prompts)
    if target.target is not None:
        check_target(target)
    chosen = list_options(files, NOT_INPUTS) | list_options(options)
    for name in ("costs", "json_schema", "grammar"):
        if name in chosen:  # a file counts by its content
            chosen[name] = workspace.fingerprints.of_data(chosen[name])
    common = {
        "target": list_inputs(target, workspace.fingerprints),
        "prompts": workspace.fingerprints.of_data(files.prompts),
    }
    drafts = {name: workspace.fingerprints.of_model(path) for name, path in files.drafts.items()}
    inputs = {"drafts": drafts, **common, "options": chosen}

    if not workspace.is_finished(files.output_dir, inputs):
        for name, path in files.drafts.items():
            check_model(f"draft {name!r}", path)

    def work() -> JsonObject:
        responses_dir, model = None, None
        if target.target is None:
            draft = list(files.drafts.values())[-1]
            with naming_model("tokenizer of the draft", draft):
                processing_class: ProcessingClass = load_tokenizer(draft)
        else:
            responses_dir = files.responses_dir or f"{files.output_dir}/responses"
            of_responses = {name: value for name, value in chosen.items() if name in OF_RESPONSES}
            workspace.open(responses_dir, {**common, "options": of_responses}, ("texts_*",))
            model, processing_class = load_target(target)
        report = spec_kd.evaluate_draft(
            files.drafts,
            model,
            take_first(load_rows(files.prompts, files.split, option="prompts"), files.num_prompts),
            options,
            processing_class=processing_class,
            output_dir=responses_dir,
        )
        paths = spec_kd.save_report(report, files.output_dir)
        advice = report.draft.recommendations
        return {
            "draft": report.draft.name,
            "metrics": collect_metrics(report, report.draft),
            "left_out": {
                setting.name: {one.kind: one.share for one in setting.left_out} for setting in report.draft.settings
            },
            "configurations": [] if advice is None else list(map(asdict, advice.configurations)),
            "report": {kind: name_place(path) for kind, path in paths.items()},
        }

    result = workspace.do(files.output_dir, "evaluate", inputs, PRODUCTS, work)
    for setting, shares in result.get("left_out", {}).items():
        for kind, share in shares.items():
            if share:
                tell(f"evaluate: {setting}: {share:.1%} {WORDS[kind]}; the report also has the metrics without them")
    for one in result.get("configurations", ()):
        tell(f"evaluate: recommended for {one['title']}:\n{one['command']}")
    return {**result, **hold_against(files.gates, files.output_dir)}


def hold_against(gates: list[str], report_dir: str) -> JsonObject:
    """Compares a report with thresholds; returns each result and whether all have passed, or nothing without any."""
    if not gates:
        return {}
    results = spec_kd.check_gates(load_report(report_dir), gates)
    for gate in results:
        number, threshold = gate.value.value, f"{gate.threshold:g}"
        verdict = f"{number:.4g} {'reaches' if gate.has_passed else 'lies below'} {threshold}"
        is_nan = f"is NaN, which reaches no threshold ({threshold})"
        tell(f"evaluate: {gate.name} {is_nan if math.isnan(number) else verdict}")
    return {"gates": [asdict(gate) for gate in results], "has_passed": all(gate.has_passed for gate in results)}
