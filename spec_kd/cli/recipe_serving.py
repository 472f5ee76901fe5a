"""The steps of a recipe that bring a trained draft into an engine: export, check, costs, observe."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import spec_kd
from spec_kd.cli import check_serving, evaluate, export, measure_costs, observe
from spec_kd.cli.commands import build_parser
from spec_kd.cli.own_servers import OwnServerOptions, OwnServers
from spec_kd.cli.parsing import Parser
from spec_kd.cli.recipe_sections import is_given, naming, read_section
from spec_kd.cli.serving_arguments import CheckServingArguments, ExportFiles, ObservationFiles, ServerCostFiles
from spec_kd.cli.steps import Workspace, list_options, tell
from spec_kd.files import COSTS_FILE, SERVING_FILE
from spec_kd.hub.export import find_gguf
from spec_kd.hub.gguf import find_program
from spec_kd.open_types import Argument, JsonObject, Record
from spec_kd.reports.numbers import format_number

NUM_OBSERVED_PROMPTS = 100
UNKNOWN_URL = "http://127.0.0.1"  # of a server that is not started yet
EXPORTED = ("*.safetensors", "config.json", "tokenizer*", "gguf/*.gguf", SERVING_FILE)
THRESHOLD_OPTION = "assistant_confidence_threshold"
PLACES = {"draft": "draft", "export": "exported", "check": "check", "costs": "costs", "observe": "observation"}


@dataclass(frozen=True)
class ServingSteps:
    """What is done with the trained draft; `None` for a step that the recipe does not have.

    Args:
        export (`tuple[ExportFiles, ExportOptions]`, *optional*): How the draft is saved.
        check (`CheckServingArguments`, *optional*): Which engines it is checked for.
        costs (`tuple[ServerCostFiles, ServerTimingOptions]`, *optional*): How rounds are timed.
        observe (`tuple[ObservationFiles, ObservationOptions]`, *optional*): How a server is asked.
        servers (`OwnServers`, *optional*): Servers that are started for it; `None` if they run already.
    """

    export: tuple[ExportFiles, spec_kd.ExportOptions] | None = None
    check: CheckServingArguments | None = None
    costs: tuple[ServerCostFiles, spec_kd.ServerTimingOptions] | None = None
    observe: tuple[ObservationFiles, spec_kd.ObservationOptions] | None = None
    servers: OwnServers | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is done with the draft."""
        return self.export is self.check is self.observe is None

    @property
    def all_tokens(self) -> set[int | None]:
        """The numbers of drafted tokens that the steps have."""
        calls = (self.export and self.export[1], self.check, self.observe and self.observe[1])
        return {one.num_assistant_tokens for one in calls if one is not None}

    def list_timing_options(self) -> JsonObject:
        """How rounds are timed in the llama.cpp that the draft is exported for; empty without one."""
        if self.export is None or self.export[1].llama_cpp_dir is None:
            return {}
        folder, own = self.export[1].llama_cpp_dir, None if self.servers is None else self.servers.options
        return {
            "llama_cpp_dir": folder,
            "quantization": self.export[1].quantization,
            "server": str(find_program(folder, "llama-server")) if own is None else own.server,
            "server_flags": None if own is None else own.server_flags,
        }


@dataclass(frozen=True)
class ServingBuilder:
    """Turns the sections after the evaluation into the arguments of commands.

    Args:
        values (`dict`): The recipe.
        folder (`str`): Folder of the recipe.
        output_dir (`str`): Folder of the run.
        target (`str`): The target.
        evaluation (`EvaluationCall`): How the draft is measured, from which its engine and more is taken.
        threshold (`float`, *optional*, defaults to `0.0`):
            Probability below which a draft ends in the engine that it is measured for.
    """

    values: JsonObject
    folder: str
    output_dir: str
    target: str
    evaluation: evaluate.EvaluationCall
    threshold: float = 0.0

    def build(self) -> ServingSteps:
        """Reads the sections that the recipe has.

        Raises:
            ValueError: A section is wrong, or needs another one; names it.
        """
        exported = self._build_export() if is_given(self.values, "export") else None
        checked = self._build_check(exported) if is_given(self.values, "check") else None
        if not is_given(self.values, "observe"):
            if is_given(self.values, "costs"):
                raise ValueError("costs: rounds are timed for the prediction of `observe`. Add that section.")
            return ServingSteps(exported, checked)
        with naming("observe"):
            files, options, own = self._build_observe(exported)
            servers = None if files.url != UNKNOWN_URL else self._choose_servers(exported, own, options)
        costs = None
        if servers is not None and files.costs is None and self.values.get("costs") is not False:
            costs = self._build_costs(servers)
            files = replace(files, costs=f"{self._place('costs')}/{COSTS_FILE}")
        elif is_given(self.values, "costs"):
            raise ValueError("costs: only servers that `observe` starts are timed. Leave out its `url` and `costs`.")
        return ServingSteps(exported, checked, costs, (files, options), servers)

    def _place(self, step: str) -> str:
        return f"{self.output_dir}/{PLACES[step]}"

    def _read(self, step: str) -> JsonObject:
        return read_section(self.values[step], step, self.folder)

    @property
    def evaluation_section(self) -> Record:
        """What the recipe says of the evaluation."""
        return self.values.get("evaluate") or {}

    @property
    def _common(self) -> JsonObject:
        """Options that steps share with the evaluation."""
        return {"num_assistant_tokens": self.evaluation[1].num_assistant_tokens}

    def _build_export(self) -> tuple[ExportFiles, spec_kd.ExportOptions]:
        with naming("export"):
            measured = self.evaluation[1]
            section = self._read("export")
            given = {"serving_engines": [measured.serving_engine], **self._common, **section}
            if measured.serving_engine in given["serving_engines"] and "num_assistant_tokens" not in section:
                given.setdefault(THRESHOLD_OPTION, self.threshold)
            given |= {"draft": self._place("draft"), "output_dir": self._place("export"), "target": self.target}
            files, options = build_parser("export").parse_values(given)
            is_known = options.num_assistant_tokens in measured.all_gammas
            if measured.serving_engine in options.serving_engines and is_known:
                files = replace(files, report=self._report)
            return files, options

    @property
    def _report(self) -> str:
        return str(Path(self.evaluation[0].output_dir, "report.json"))

    def _build_check(self, exported: tuple[ExportFiles, spec_kd.ExportOptions] | None) -> CheckServingArguments:
        with naming("check"):
            engines = [self.evaluation[1].serving_engine] if exported is None else exported[1].serving_engines
            draft = self._place("draft" if exported is None else "export")
            given = {"serving_engine": engines, **self._common, **self._read("check")}
            (arguments,) = build_parser("check-serving").parse_values({**given, "draft": draft, "target": self.target})
            return arguments

    def _build_observe(
        self, exported: tuple[ExportFiles, spec_kd.ExportOptions] | None
    ) -> tuple[ObservationFiles, spec_kd.ObservationOptions, OwnServerOptions]:
        measured_files, measured, _ = self.evaluation
        section = {"url": UNKNOWN_URL, "serving_engine": measured.serving_engine, **self._read("observe")}
        drafting: JsonObject = (
            self._common if exported is None else {"num_assistant_tokens": exported[1].num_assistant_tokens}
        )
        is_own = section["url"] == UNKNOWN_URL and section["serving_engine"] == "llama.cpp"
        if is_own and exported is not None and "num_assistant_tokens" not in section:
            drafting[THRESHOLD_OPTION] = exported[1].assistant_confidence_threshold
        given = {
            "num_prompts": NUM_OBSERVED_PROMPTS,
            **({} if measured.max_new_tokens is None else {"max_new_tokens": measured.max_new_tokens}),
            **drafting,
            **section,
            "target": self.target,
            "draft": self._place("draft" if exported is None else "export"),
            "prompts": measured_files.prompts,
            "split": measured_files.split,
            "output_dir": self._place("observe"),
        }
        groups = {"files": ObservationFiles, "observation": spec_kd.ObservationOptions, "servers": OwnServerOptions}
        files, options, own = Parser("run", "", groups).parse_values(given)
        is_same = (
            options.serving_engine == measured.serving_engine
            and options.temperature in [one.temperature for one in measured.list_settings()]
            and options.num_assistant_tokens in measured.all_gammas
        )
        return (replace(files, report=self._report) if is_same else files), options, own

    def _choose_servers(
        self,
        exported: tuple[ExportFiles, spec_kd.ExportOptions] | None,
        own: OwnServerOptions,
        options: spec_kd.ObservationOptions,
    ) -> OwnServers:
        if exported is None or exported[1].llama_cpp_dir is None or options.serving_engine != "llama.cpp":
            raise ValueError(
                "there is no server to ask. Give its address as `url` and, for the speed-up, that of one without the "
                "draft as `plain_url`; or set `llama_cpp_dir` in `export` and `serving_engine: llama.cpp`, and both "
                "are started."
            )
        program = own.server or str(find_program(exported[1].llama_cpp_dir, "llama-server"))
        files = {role: f"{self._place('export')}/{name}" for role, name in find_gguf(exported[1].quantization).items()}
        gamma = options.num_assistant_tokens or exported[1].num_assistant_tokens
        return OwnServers(
            replace(own, server=program),
            **files,
            num_assistant_tokens=gamma,
            concurrency=options.concurrency,
            threshold=options.assistant_confidence_threshold,
        )

    def _build_costs(self, servers: OwnServers) -> tuple[ServerCostFiles, spec_kd.ServerTimingOptions]:
        most = servers.num_assistant_tokens
        with naming("costs"):
            given = {
                "server": servers.options.server,
                "server_flags": servers.options.server_flags,
                "batch_sizes": [servers.concurrency],
                # drafts that end early have any number
                "gammas": list(range(1 if servers.threshold else most, most + 1)),
                **(self._read("costs") if is_given(self.values, "costs") else {}),
                "draft": servers.draft,
                "target": servers.target,
                "output_dir": self._place("costs"),
            }
            return build_parser("measure-costs").parse_values(given)


def run_serving(serving: ServingSteps, workspace: Workspace) -> Iterator[tuple[str, JsonObject]]:
    """Runs the steps, one after the other, without those that are finished; stops where no engine can use the draft.

    Args:
        serving (`ServingSteps`): The steps.
        workspace (`Workspace`): Where the recipe runs.

    Yields:
        `tuple[str, dict]`: Name and result of each step.
    """
    if serving.export is not None:
        exported = _export(*serving.export, workspace)
        for name, command in exported.get("commands", {}).items():
            tell(f"run: to serve it with {name}, in {serving.export[0].output_dir}:\n{command}")
        yield "export", exported
    if serving.check is not None:
        checked = _check(serving.check, workspace)
        yield "check", checked
        if not checked["has_passed"]:
            return
    if serving.costs is not None:
        yield "costs", measure_costs.run(*serving.costs, workspace)
    if serving.observe is not None:
        observed = observe.run(*serving.observe, workspace, serving.servers)
        if observed["speedup"][0] is not None and observed["predicted_speedup"] is not None:
            numbers = (format_number(observed[name][0]) for name in ("predicted_speedup", "speedup"))
            tell("run: predicted {}x, observed {}x".format(*numbers))
        yield "observation", observed


def _export(files: ExportFiles, options: spec_kd.ExportOptions, workspace: Workspace) -> JsonObject:
    inputs = {
        "draft": workspace.fingerprints.of_model(files.draft),
        "target": workspace.fingerprints.of_model(files.target),
        "report": None if files.report is None else workspace.fingerprints.of_data(files.report),
        "options": list_options(options),
    }

    def work() -> JsonObject:
        return export.run(files, options)

    return workspace.do(files.output_dir, "export", inputs, EXPORTED, work)


def _check(arguments: CheckServingArguments, workspace: Workspace) -> JsonObject:
    models: dict[str, Argument] = {
        name: workspace.fingerprints.of_model(getattr(arguments, name)) for name in ("draft", "target")
    }
    inputs = {**models, "options": list_options(arguments, tuple(models))}
    folder = str(Path(workspace.output_dir or "", PLACES["check"]))
    return workspace.do(folder, "check-serving", inputs, (), lambda: check_serving.run(arguments))
