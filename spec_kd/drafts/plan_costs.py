"""What rounds with a draft of some shape cost: timed in llama-server, timed in transformers, or given."""

import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Protocol, cast

from transformers import PreTrainedModel

from spec_kd.drafts.init_draft import InitialDraft
from spec_kd.drafts.plan_options import DraftPlanOptions
from spec_kd.evaluation.cost import ServingCosts, fit_context, measure_costs
from spec_kd.evaluation.cost_files import list_costs
from spec_kd.evaluation.server_costs import measure_server_costs
from spec_kd.evaluation.server_options import ServerTimingOptions
from spec_kd.evaluation.server_timing import PLAIN_STEPS, time_settings
from spec_kd.hub.gguf import export_gguf, find_tools
from spec_kd.open_types import JsonObject
from spec_kd.serving.llama_server import find_llama_server

UNTRAINED = "untrained"


class CostMeter(Protocol):
    """Where the costs of a plan come from.

    Attributes:
        serving_engine (`str`): Engine whose rounds they are.
        origin (`dict`): What the costs depend on beside target and shape, as JSON values.
    """

    serving_engine: str
    origin: JsonObject

    def estimate_seconds(self, first: InitialDraft) -> float:
        """Seconds that one shape takes, by a short measurement.

        Args:
            first (`InitialDraft`): An untrained draft of one of the shapes.
        """
        ...

    def measure(self, name: str, draft: InitialDraft) -> ServingCosts:
        """Costs of rounds with an untrained draft of the shape of this name."""
        ...


class GivenCosts:
    """Costs that the caller has.

    Args:
        costs (`Mapping[str, ServingCosts]`): Costs by the name of the shape.
    """

    serving_engine = "transformers"

    def __init__(self, costs: Mapping[str, ServingCosts]):
        self._costs = costs
        self.origin: JsonObject = {name: list_costs(one) for name, one in costs.items()}

    def estimate_seconds(self, first: InitialDraft) -> float:
        """None: nothing is measured."""
        return 0.0

    def measure(self, name: str, draft: InitialDraft) -> ServingCosts:
        """The costs that were given."""
        return self._costs[name]


class PassMeter:
    """Bare passes of both models in transformers, as [`~spec_kd.evaluation.measure_costs`] times them.

    Args:
        options (`DraftPlanOptions`): `gammas`.
        timing (`ServerTimingOptions`): `batch_sizes`, `context_length` and `repeats`.
        target (`PreTrainedModel`): The target.
    """

    serving_engine = "transformers"

    def __init__(self, options: DraftPlanOptions, timing: ServerTimingOptions, target: PreTrainedModel):
        self._gammas, self._timing, self._target = options.gammas, timing, target
        context = {"context_length": timing.context_length, "batch_sizes": timing.batch_sizes}
        self.origin: JsonObject = {"timed in": "transformers", "gammas": list(options.gammas), **context}

    def estimate_seconds(self, first: InitialDraft) -> float:
        """From two passes of each kind."""
        started = time.monotonic()
        self._measure(first, repeats=1)
        return (time.monotonic() - started) * (self._timing.repeats + 1) / 2

    def measure(self, name: str, draft: InitialDraft) -> ServingCosts:
        """Draft step and verification, timed in this process."""
        return self._measure(draft, self._timing.repeats)

    def _measure(self, draft: InitialDraft, repeats: int) -> ServingCosts:
        context = fit_context(draft.draft, self._target, self._timing.context_length, max(self._gammas))
        sizes = self._timing.batch_sizes
        return measure_costs(
            draft.draft, self._target, batch_sizes=sizes, gammas=self._gammas, context_length=context, repeats=repeats
        )[0]


class ServerMeter:
    """Whole rounds in llama-server, as [`~spec_kd.measure_server_costs`] times them, and steps of the draft alone.

    Args:
        options (`DraftPlanOptions`): `gammas`, and what the GGUF files are made with.
        timing (`ServerTimingOptions`): How rounds are timed.
        target (`str`): Folder or Hub id of the target.
        folder (`Path`): Folder for GGUF files, timings and logs.
        show_progress (`bool`): Whether to show a progress bar.

    Raises:
        ValueError: The folder of llama.cpp lacks a tool.
        FileNotFoundError: There is no such program or file.
    """

    serving_engine = "llama.cpp"

    def __init__(
        self,
        options: DraftPlanOptions,
        timing: ServerTimingOptions,
        target: str,
        folder: Path,
        show_progress: bool,
    ):
        self._options, self._timing, self._folder, self._show_progress = options, timing, folder, show_progress
        find_llama_server(timing.server)
        find_tools(self._llama_cpp_dir, options.quantization)
        self._target, self._target_gguf = target, None if options.target_gguf is None else Path(options.target_gguf)
        if self._target_gguf is not None and not self._target_gguf.is_file():
            raise FileNotFoundError(f"`target_gguf` is `{self._target_gguf}`, which is no file.")
        how = {name: value for name, value in asdict(timing).items() if name != "repeats"}
        self.origin: JsonObject = {
            "timed in": "llama-server",
            "gammas": list(options.gammas),
            "quantization": options.quantization,
            **how,
        }

    @property
    def _llama_cpp_dir(self) -> str:
        return cast(str, self._options.llama_cpp_dir)

    def _find_target(self) -> Path:
        if self._target_gguf is None:
            path = self._folder / f"target-{self._options.quantization}.gguf"
            self._target_gguf = self._export(self._target, path)
        return self._target_gguf

    def _export(self, model: str | Path, path: Path) -> Path:
        return export_gguf(model, path, llama_cpp_dir=self._llama_cpp_dir, quantization=self._options.quantization)

    def estimate_seconds(self, first: InitialDraft) -> float:
        """From a server without a draft that is timed once: every setting takes about as long."""
        target, once = self._find_target(), replace(self._timing, repeats=1)
        started = time.monotonic()
        [step] = time_settings(target, target, [()], once, None, False)[(), self._timing.batch_sizes[0]]
        first_time = time.monotonic() - started
        later_times = (self._timing.repeats - 1) * PLAIN_STEPS * self._timing.num_rounds * step
        return 2 * (1 + len(self._options.gammas)) * (first_time + later_times)

    def measure(self, name: str, draft: InitialDraft) -> ServingCosts:
        """Rounds and steps, timed in turn; a measurement that was stopped continues."""
        place = self._folder / name
        gguf = place / UNTRAINED / "draft.gguf"
        if not gguf.is_file():
            draft.save_pretrained(gguf.parent / "model")
            self._export(gguf.parent / "model", gguf)
        [costs] = measure_server_costs(
            gguf,
            self._find_target(),
            self._timing,
            gammas=self._options.gammas,
            measure_draft_step=True,
            output_dir=place,
            show_progress=self._show_progress,
        )
        shutil.rmtree(gguf.parent)
        return costs
