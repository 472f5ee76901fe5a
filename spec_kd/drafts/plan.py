"""Which shape a draft should have: costs first, then what each shape learns in equal time."""

import functools
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import cast

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel

from spec_kd.drafts.init_draft import InitialDraft, Model, load_processing_class, load_whole_model
from spec_kd.drafts.options import DraftShapeOptions
from spec_kd.drafts.plan_costs import CostMeter, GivenCosts, PassMeter, ServerMeter
from spec_kd.drafts.plan_options import RUN_OPTIONS, DraftPlanOptions
from spec_kd.drafts.plan_report import DraftPlan, PlannedShape, ShortRun
from spec_kd.drafts.shapes import build_untrained, resolve_widths
from spec_kd.drafts.short_run import run_briefly
from spec_kd.evaluation.cost import ServingCosts
from spec_kd.evaluation.cost_files import list_costs, make_costs
from spec_kd.evaluation.report.content import from_plain, to_plain
from spec_kd.evaluation.response_replay import ResponseRows
from spec_kd.evaluation.server_options import ServerTimingOptions
from spec_kd.files import alone_in, compute_sum, explain_full_disk, list_model_files, write_text
from spec_kd.loading import get_name, load_config
from spec_kd.open_types import Argument, JsonObject
from spec_kd.options import read_path, refuse, resolve_options
from spec_kd.reports.numbers import Interval
from spec_kd.vocabulary import ProcessingClass, get_tokenizer

RECORD = "shapes.jsonl"


def plan_draft(
    target: Model,
    options: DraftPlanOptions | None = None,
    *,
    output_dir: str | os.PathLike[str],
    timing: ServerTimingOptions | None = None,
    responses: ResponseRows | None = None,
    costs: Sequence[ServingCosts] | None = None,
    processing_class: ProcessingClass | None = None,
    show_progress: bool = True,
    **given: Argument,
) -> DraftPlan:
    """Compares shapes of a draft before one is trained: what they cost, and which acceptance they need.

    The time that a draft takes counts more than how well it predicts ("Decoding Speculative Decoding", arXiv
    2402.01528), and it does not depend on the weights. So costs are measured with random weights, as a plain Llama of
    the shape: in llama-server with `llama_cpp_dir`, else in transformers. With `run_minutes` every shape that can pay
    is then made by [`init_draft`] and trained for as long as the others, and its acceptance is measured on responses
    held out.

    Every result is stored in `output_dir` as it is measured. A call with the same target, costs and runs continues
    there; wished speed-up, acceptances and shapes may change.

    Args:
        target (`PreTrainedModel` or path): The target.
        options (`DraftPlanOptions`, *optional*): The candidates, and what is measured; its defaults by default.
        output_dir (`str` or `os.PathLike`): Folder for results, timings, `plan.md`, `plan.json` and `plan.png`.
        timing (`ServerTimingOptions`, *optional*):
            How rounds are timed, at one number of requests at a time. In transformers only `batch_sizes`,
            `context_length` and `repeats` count.
        responses (`Dataset` or iterable of dicts, *optional*):
            Rows with `prompt_ids` and `completion_ids` that the target wrote, for the short runs.
        costs (`Sequence[ServingCosts]`, *optional*):
            Costs of each shape, in the order of the shapes; by default they are measured.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            The target's; loaded from `target` by default.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show progress, and to say before long work how long it takes.
        given: Fields of [`DraftPlanOptions`] as keywords, which replace those of `options`.

    Returns:
        [`DraftPlan`]

    Raises:
        ValueError: An option is out of its range, the target cannot give a shape, there are no responses for short
            runs, or `output_dir` has the results of another plan.
        FileNotFoundError: There is no such program or file.
        GGUFError: A tool of llama.cpp failed.
        LlamaServerError: The server does not start, or ends.
        MeasurementError: The times contradict each other.
    """
    options, timing = resolve_options(DraftPlanOptions, options, given), timing or ServerTimingOptions()
    folder, name = Path(read_path("output_dir", output_dir)), get_name(target)
    refuse(
        (
            len(timing.batch_sizes) > 1,
            f"`batch_sizes` is {timing.batch_sizes}, but a plan is for one number of requests at a time. Give one.",
        ),
        (
            options.run_minutes is not None and responses is None,
            f"`run_minutes={options.run_minutes}` trains on responses of the target. Pass `responses`.",
        ),
        (
            options.llama_cpp_dir is not None and costs is None and not name,
            "llama-server reads the target from its folder. Pass the folder or Hub id as `target`.",
        ),
    )
    processing_class = processing_class or load_processing_class("target", target)
    config = load_config(target).get_text_config()
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    shapes = options.list_shapes(config)
    for shape in shapes.values():
        resolve_widths(skeleton, shape)
    if costs is not None and len(costs) != len(shapes):
        raise ValueError(f"`costs` has {len(costs)} costs for the shapes {', '.join(shapes)}. Give one for each.")
    rows = None if responses is None or options.run_minutes is None else _as_dataset(responses)
    load_target = functools.cache(partial(load_whole_model, "target", target))

    def build(label: str) -> InitialDraft:
        draft = build_untrained(skeleton, shapes[label], get_tokenizer(processing_class))
        return InitialDraft(draft, processing_class, layers=[])

    def tell(text: str) -> None:
        if show_progress:
            print(f"Plan of a draft: {text}", file=sys.stderr, flush=True)

    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder), explain_full_disk(folder, "what is finished is kept"):
        meter: CostMeter
        if costs is not None:
            meter = GivenCosts(dict(zip(shapes, costs, strict=True)))
        elif options.llama_cpp_dir is not None:
            meter = ServerMeter(options, timing, name, folder, show_progress)
        else:
            meter = PassMeter(options, timing, load_target())
        record = _Record(folder / RECORD, _describe(target), meter.origin, _describe_runs(options, rows))
        missing = [label for label in shapes if label not in record]
        if missing and (seconds := meter.estimate_seconds(build(missing[0]))):
            tell(f"timing takes about {len(missing) * seconds / 60:.1f} minutes ({', '.join(missing)}).")
        for label in missing:
            draft = build(label)
            sizes = {size: getattr(draft, size) for size in ("num_parameters", "num_head_parameters", "num_bytes")}
            record.add(label, {**sizes, "costs": list_costs(meter.measure(label, draft))})
        plan = _build_plan(name, shapes, record, options)
        pending = [] if rows is None else [one for one in plan.payable if one.run is None]
        if pending:
            minutes = len(pending) * cast(float, options.run_minutes)
            tell(f"training takes {minutes:g} minutes ({', '.join(one.name for one in pending)}).")
        for one in pending:
            run = run_briefly(
                load_target(),
                one.options,
                cast(Dataset, rows),
                options,
                gammas=range(1, one.costs.max_gamma + 1),
                serving_engine=meter.serving_engine,
                processing_class=processing_class,
                show_progress=show_progress,
            )
            record.add(one.name, {"run": to_plain(run)})
        plan = _build_plan(name, shapes, record, options)
        plan.save(folder)
    tell(plan.headline)
    return plan


class _Record:
    """What was measured of each shape: a JSON line each, after one that says of which plan."""

    def __init__(self, path: Path, target: JsonObject, costs: JsonObject, runs: JsonObject | None):
        self._path, self._plan = path, json.loads(json.dumps({"target": target, "costs": costs, "runs": runs}))
        self._lines: dict[str, JsonObject] = {}
        if not path.exists():
            return
        try:
            before, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            self._lines = {line["shape"]: line for line in lines}
            others = [part for part, value in self._plan.items() if before[part] != value]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"`{path}` is damaged ({error!r}). Choose another folder.") from error
        if None in (before["runs"], runs):  # nothing was trained so far, or nothing shall be now
            others = [part for part in others if part != "runs"]
            self._plan["runs"] = self._plan["runs"] or before["runs"]
        if others:
            raise ValueError(
                f"`{path.parent}` has a plan with other {', '.join(others)}. Choose another folder, or repeat the call "
                "as it was to continue it."
            )

    @property
    def run_minutes(self) -> float | None:
        """Minutes of training of the shapes that were trained, or will be."""
        return self._plan["runs"] and self._plan["runs"]["run_minutes"]

    def __contains__(self, name: str) -> bool:
        return name in self._lines

    def __getitem__(self, name: str) -> JsonObject:
        return self._lines[name]

    def add(self, name: str, values: JsonObject) -> None:
        self._lines[name] = {"shape": name, **self._lines.get(name, {}), **values}
        lines = [json.dumps(line, allow_nan=False) + "\n" for line in (self._plan, *self._lines.values())]
        write_text(self._path, "".join(lines))


def _build_plan(
    target: str, shapes: dict[str, DraftShapeOptions], record: _Record, options: DraftPlanOptions
) -> DraftPlan:
    planned = []
    for name, shape in shapes.items():
        values = record[name]
        costs = make_costs(RECORD, values["costs"])
        wished = costs.find_needed_alpha(options.wished_speedup)
        alpha = wished if wished <= options.reachable_alpha else options.reachable_alpha
        gamma = costs.predict_best_speedup(alpha)[1]
        predicted, run = None, values.get("run") and from_plain(ShortRun, values["run"])
        if run is not None:
            speedups = {
                g: [costs.predict_speedup(value, g) for value in run.block_efficiency[str(g)]]
                for g in range(1, costs.max_gamma + 1)
            }
            gamma = max(speedups, key=lambda g: speedups[g][0])
            predicted = Interval(*speedups[gamma])
        planned.append(
            PlannedShape(
                name=name,
                options=shape,
                num_parameters=values["num_parameters"],
                num_head_parameters=values["num_head_parameters"],
                num_bytes=values["num_bytes"],
                costs=costs,
                break_even_alpha=costs.find_break_even_alpha(),
                wished_alpha=wished,
                speedups={f"{alpha:g}": costs.predict_best_speedup(alpha)[0] for alpha in options.alphas},
                num_assistant_tokens=gamma,
                run=run,
                predicted_speedup=predicted,
            )
        )
    planned.sort(key=lambda one: one.num_parameters)
    return DraftPlan(
        target=target or "the target",
        wished_speedup=options.wished_speedup,
        reachable_alpha=options.reachable_alpha,
        run_minutes=record.run_minutes if any(one.run for one in planned) else None,
        shapes=planned,
    )


def _as_dataset(responses: ResponseRows) -> Dataset:
    return responses if isinstance(responses, Dataset) else Dataset.from_list([dict(row) for row in responses])


def _describe_runs(options: DraftPlanOptions, rows: Dataset | None) -> JsonObject | None:
    """What the short runs depend on, or `None` without them."""
    if rows is None:
        return None
    ids = rows.select_columns(["prompt_ids", "completion_ids"])[:]
    digest = hashlib.sha256(json.dumps([list(ids[name]) for name in sorted(ids)]).encode()).hexdigest()
    return {name: getattr(options, name) for name in RUN_OPTIONS} | {"responses": digest}


def _describe(target: Model) -> JsonObject:
    """What the target is: the config of a model, the sums of the files in a folder, or the name on the Hub."""
    if isinstance(target, PreTrainedModel):
        return {"config": json.loads(target.config.to_json_string(use_diff=False))}
    files = list_model_files(Path(target)) if Path(target).is_dir() else []
    return {path.name: compute_sum(path) for path in files} or {"name": str(target)}
