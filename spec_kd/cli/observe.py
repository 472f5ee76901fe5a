"""`spec-kd observe`: asks a running server the test prompts, and sets what it did beside what replay predicts."""

from contextlib import nullcontext
from pathlib import Path

import spec_kd
from spec_kd.cli.model_checks import check_model, naming_model
from spec_kd.cli.own_servers import OwnServers
from spec_kd.cli.paths import check_exists
from spec_kd.cli.rows import load_rows, take_first
from spec_kd.cli.serving_arguments import ObservationFiles
from spec_kd.cli.steps import Workspace, list_options, tell
from spec_kd.evaluation import load_report, read_costs
from spec_kd.loading import load_tokenizer
from spec_kd.open_types import JsonObject
from spec_kd.vocabulary import ProcessingClass

PRODUCTS = ("observed.json", "observed.md", "observed.html", "report.json", "report.md", "report.html", "report.png")
NOT_INPUTS = ("url", "plain_url", "target", "draft", "prompts", "responses", "report", "costs", "output_dir")


def run(
    files: ObservationFiles,
    options: spec_kd.ObservationOptions,
    workspace: Workspace | None = None,
    servers: OwnServers | None = None,
) -> JsonObject:
    """Writes what the server did to `output_dir`; returns its metrics.

    Args:
        files (`ObservationFiles`), options (`ObservationOptions`): What is asked.
        workspace (`Workspace`, *optional*): Where the step runs; the folder that `files` names by default.
        servers (`OwnServers`, *optional*): Servers that are started for it, in place of those that `files` names.

    Raises:
        ValueError: The server is not what it should be, or a model, the prompts or the report cannot be read.
        OSError: A model, the prompts or the report do not exist.
        ImportError: The package of the client is not installed.
    """
    workspace = workspace or Workspace()
    for name in ("target", "draft", "prompts", "responses", "report", "costs"):
        check_exists(name, getattr(files, name))
    needs_target = files.draft is not None and (options.temperature > 0 or options.engine.counting.end == "passed")
    inputs: JsonObject = {
        "target": workspace.fingerprints.of_model(files.target),
        "prompts": workspace.fingerprints.of_data(files.prompts),
        "draft": None if files.draft is None else workspace.fingerprints.of_model(files.draft),
        **{
            name: workspace.fingerprints.of_data(source)
            for name, source in (("responses", files.responses), ("report", files.report), ("costs", files.costs))
            if source is not None
        },
        "options": list_options(files, NOT_INPUTS) | list_options(options),
        **({} if servers is None else {"servers": servers.describe(workspace.fingerprints)}),
    }
    for name in ("json_schema", "grammar"):  # a file counts by its content
        if name in inputs["options"]:
            inputs["options"][name] = workspace.fingerprints.of_data(inputs["options"][name])
    if not workspace.is_finished(files.output_dir, inputs):
        for name, path in (("draft", files.draft), ("target", files.target if needs_target else None)):
            if path is not None:
                check_model(name, path)

    def work() -> JsonObject:
        earlier = None if files.report is None else load_report(files.report)
        with naming_model("tokenizer of the target", files.target):
            processing_class: ProcessingClass = load_tokenizer(files.target)
        addresses = nullcontext((files.url, files.plain_url))
        with addresses if servers is None else servers.run(Path(files.output_dir, "servers")) as (url, plain_url):
            observation = spec_kd.observe_serving(
                url,
                take_first(load_rows(files.prompts, files.split, option="prompts"), files.num_prompts),
                options,
                processing_class=processing_class,
                plain_url=plain_url,
                output_dir=Path(files.output_dir, "requests"),
            )
        if files.draft is None:
            observed = spec_kd.describe_observation(observation, processing_class)
        else:
            own = None if files.responses is None else load_rows(files.responses, option="responses")
            observed = spec_kd.compare_observed(
                observation,
                files.draft,
                files.target if needs_target else None,
                responses=own and take_first(own, files.num_prompts),
                report=earlier,
                processing_class=processing_class,
                costs=() if files.costs is None else read_costs(files.costs),
            )
        paths = {"observed": spec_kd.save_observed(observed, files.output_dir)["html"]}
        if earlier is not None:
            paths["report"] = spec_kd.save_report(earlier.with_observed(observed), files.output_dir)["html"]
        tell(observed.headline)
        return {
            "metrics": {one.name: list(one.observed) for one in observed.metrics},
            "predicted": {one.name: list(one.predicted) for one in observed.metrics if one.predicted is not None},
            "num_prompts": len(observed.prompts),
            "num_equal": observed.num_equal if observed.num_compared else None,
            "tokens_per_second": observed.tokens_per_second,
            "plain_tokens_per_second": observed.plain_tokens_per_second,
            "speedup": list(observed.speedup),
            "predicted_speedup": None if observed.predicted_speedup is None else list(observed.predicted_speedup),
            "paths": {name: str(path) for name, path in paths.items()},
        }

    return workspace.do(files.output_dir, "observe", inputs, PRODUCTS, work)
