"""Pictures in the trackers of a `Trainer`: TensorBoard, Weights & Biases and Trackio."""

import io
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

import numpy as np
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from spec_kd.evaluation.metrics import AcceptanceMetrics, name_temperature
from spec_kd.open_types import Array
from spec_kd.reports.numbers import format_interval
from spec_kd.reports.plots import draw_intervals, finish_axis, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEP_NAME = "train/global_step"  # the axis that transformers logs every metric over


def log_picture(trainer: Trainer, tag: str, figure: "Figure", step: int) -> list[str]:
    """Sends a picture to every tracker that the trainer reports to and whose run is active.

    Only the main process sends; the others return at once. W&B and Trackio get it over `train/global_step`, as all
    metrics of the trainer.

    Args:
        trainer (`Trainer`): Any trainer.
        tag (`str`): Name of the picture, such as `"eval/acceptance"`.
        figure (`matplotlib.figure.Figure`): The picture; not closed, not changed.
        step (`int`): Training step.

    Returns:
        `list[str]`: Names of the trackers that got it, as in `report_to`; empty in other processes.
    """
    kinds = {TensorBoardCallback: "tensorboard", WandbCallback: "wandb", TrackioCallback: "trackio"}
    callbacks: list[TrainerCallback] = trainer.callback_handler.callbacks if trainer.is_world_process_zero() else []
    found = [(name, callback) for callback in callbacks for kind, name in kinds.items() if isinstance(callback, kind)]
    pixels = render_pixels(figure) if found else None
    return [name for name, callback in found if _send(name, callback, tag, pixels, step)]


def plot_acceptance(metrics_by_temperature: Mapping[float, AcceptanceMetrics]) -> "Figure":
    """Acceptance by drafted position with 95 % intervals, a line for each temperature; block efficiencies in the title.

    Args:
        metrics_by_temperature (`Mapping[float, AcceptanceMetrics]`): As in `SpeculativeEvalCallback.history`.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure = new_figure(6.0, 4.0)
    axis = figure.subplots()
    title = ["tokens per target pass:"]
    for i, (temperature, metrics) in enumerate(metrics_by_temperature.items()):
        name = name_temperature(temperature)
        rates = metrics.acceptance_rate_per_position
        draw_intervals(axis, range(1, len(rates) + 1), rates, f"C{i % 10}", label=name)
        title.append(f"{name} {format_interval(metrics.block_efficiency)}")
    finish_axis(axis, "\n".join(title), "drafted token", "share of rounds accepted", bottom=0, top=1)
    axis.legend(frameon=False)
    return figure


def render_pixels(figure: "Figure") -> Array:
    """The picture as uint8 `(height, width, 3)`."""
    from PIL import Image

    png = io.BytesIO()
    figure.savefig(png, format="png")
    return np.asarray(Image.open(png).convert("RGB"))


def _send(name: str, callback: TrainerCallback, tag: str, pixels: Array | None, step: int) -> bool:
    """Sends a picture to a tracker if its run is active; returns whether it is."""
    if isinstance(callback, TensorBoardCallback):
        writer = callback.tb_writer
        if writer is not None:
            writer.add_image(tag, pixels, step, dataformats="HWC")
            writer.flush()
        return writer is not None
    tracker = import_module(name)
    run = tracker.run if name == "wandb" else tracker.context_vars.current_run.get()
    if run is not None:
        tracker.log({tag: tracker.Image(pixels), STEP_NAME: step})
    return run is not None
