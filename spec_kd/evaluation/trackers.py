"""Pictures in the trackers of a `Trainer`: TensorBoard, Weights & Biases and Trackio."""

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from spec_kd.evaluation.metrics import AcceptanceMetrics, name_temperature
from spec_kd.open_types import Array, Call
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
    if not trainer.is_world_process_zero():
        return []
    senders: dict[type[TrainerCallback], tuple[str, Call[bool]]] = {
        TensorBoardCallback: ("tensorboard", _send_to_tensorboard),
        WandbCallback: ("wandb", _send_to_wandb),
        TrackioCallback: ("trackio", _send_to_trackio),
    }
    found = [
        (callback, *senders[kind])
        for callback in trainer.callback_handler.callbacks
        for kind in senders
        if isinstance(callback, kind)
    ]
    if not found:
        return []
    pixels = render_pixels(figure)
    return [name for callback, name, send in found if send(callback, tag, pixels, step)]


def plot_acceptance(metrics_by_temperature: Mapping[float, AcceptanceMetrics]) -> "Figure":
    """Acceptance by drafted position with 95 % intervals, a line for each temperature; block efficiencies in the title.

    Args:
        metrics_by_temperature (`Mapping[float, AcceptanceMetrics]`): As in `SpeculativeEvalCallback.history`.

    Raises:
        `ImportError`: If matplotlib is not installed.
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


def _send_to_tensorboard(callback: TensorBoardCallback, tag: str, pixels: Array, step: int) -> bool:
    if callback.tb_writer is None:
        return False
    callback.tb_writer.add_image(tag, pixels, step, dataformats="HWC")
    callback.tb_writer.flush()
    return True


def _send_to_wandb(_callback: WandbCallback, tag: str, pixels: Array, step: int) -> bool:
    import wandb

    if wandb.run is None:
        return False
    wandb.log({tag: wandb.Image(pixels), STEP_NAME: step})
    return True


def _send_to_trackio(_callback: TrackioCallback, tag: str, pixels: Array, step: int) -> bool:
    import trackio

    if trackio.context_vars.current_run.get() is None:
        return False
    trackio.log({tag: trackio.Image(pixels), STEP_NAME: step})
    return True
