"""`spec-kd measure-costs`: what a round costs in llama-server, or its speed at given acceptance rates."""

import json
from dataclasses import asdict
from pathlib import Path

import spec_kd
from spec_kd.cli.paths import check_exists
from spec_kd.cli.serving_arguments import ServerCostFiles
from spec_kd.cli.steps import Workspace, list_options, tell
from spec_kd.evaluation import write_costs
from spec_kd.files import COSTS_FILE, write_text
from spec_kd.open_types import JsonObject

SPEED = "speed.json"
NOT_INPUTS = ("draft", "target", "output_dir")


def run(files: ServerCostFiles, options: spec_kd.ServerTimingOptions, workspace: Workspace | None = None) -> JsonObject:
    """Writes costs or speeds to `output_dir`, and returns them.

    Raises:
        ValueError: A value is wrong, or the server accepts nothing by chance.
        OSError: The program or a model does not exist.
        LlamaServerError: The server does not start, or ends.
        MeasurementError: The times contradict each other.
    """
    workspace = workspace or Workspace()
    for name in ("draft", "target"):
        check_exists(name, getattr(files, name))
    inputs: JsonObject = {
        "draft": workspace.fingerprints.of_data(files.draft),
        "target": workspace.fingerprints.of_data(files.target),
        "options": list_options(files, NOT_INPUTS) | list_options(options),
    }

    def work() -> JsonObject:
        folder = Path(files.output_dir)
        pair = files.draft, files.target
        if files.acceptance_rates is not None:
            speeds = spec_kd.measure_synthetic_speed(*pair, files.acceptance_rates, options, output_dir=folder)
            write_text(folder / SPEED, json.dumps([asdict(one) for one in speeds], indent=1) + "\n")
            for one in speeds:
                low, high = one.speedup_range
                tell(
                    f"{one.batch_size} at a time: {one.tokens_per_second:.3g} tokens/s, {one.speedup:.2f} times plain "
                    f"decoding ({low:.2f} to {high:.2f})"
                )
            return {"speeds": [asdict(one) for one in speeds], "path": str(folder / SPEED)}
        costs = spec_kd.measure_server_costs(*pair, options, gammas=files.gammas, output_dir=folder)
        write_costs(costs, folder / COSTS_FILE)
        for table in costs:
            for gamma, (low, high) in (table.round_cost_range or {}).items():
                tell(
                    f"{table.batch_size} at a time, {gamma} drafted: a round takes {table.find_round_cost(gamma):.2f} "
                    f"steps ({low:.2f} to {high:.2f})"
                )
        return {"costs": [vars(table) for table in costs], "path": str(folder / COSTS_FILE)}

    return workspace.do(files.output_dir, "measure-costs", inputs, (COSTS_FILE, SPEED), work, ("repeats",))
