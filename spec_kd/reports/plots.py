"""Pictures by matplotlib, each on a figure of its own (no backend or global state is touched), and a report's files."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spec_kd.addresses import name_place
from spec_kd.copies import open_folder
from spec_kd.escaping import escape_label
from spec_kd.files import remove, replacing, write_text
from spec_kd.options import read_path
from spec_kd.reports.numbers import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# tried in this order, each for the characters that those before it do not have
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "PingFang SC", "Microsoft YaHei", "Arial Unicode MS")
PICTURE_DPI = 130

logger = logging.getLogger(__name__)


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, size in inches; raises `ImportError` if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Pictures need matplotlib, which cannot be imported. Install it with `pip install spec_kd[report]`."
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def draw_intervals(
    axis: "Axes",
    x_values: Sequence[int],
    intervals: Sequence[Interval],
    color: str,
    linestyle: str = "-",
    label: str = "",
) -> None:
    """A line over whole numbers with its intervals as a band and as bars; bounds that are NaN are left out."""
    value, low, high = np.array(intervals, dtype=float).reshape(-1, 3).T
    axis.plot(x_values, value, linestyle, marker="o", markersize=3, color=color, label=label)
    axis.fill_between(x_values, low, high, alpha=0.15, color=color, linewidth=0)
    axis.vlines(x_values, low, high, color=color, alpha=0.5, linewidth=1)


def finish_axis(axis: "Axes", title: str, x_label: str, y_label: str, bottom: float, top: float | None = None) -> None:
    """Titles, limits, whole numbers at the x axis and a grid."""
    axis.set(title="\n".join(map(escape_label, title.splitlines())), xlabel=x_label, ylabel=y_label)
    axis.set_ylim(bottom, top)
    axis.locator_params(axis="x", integer=True)
    axis.grid(alpha=0.3)


def set_fonts(figure: "Figure") -> None:
    """Lets names in other scripts appear, where a font for them is installed."""
    from matplotlib.font_manager import get_font_names
    from matplotlib.text import Text

    families = sorted({*FONTS} & {*get_font_names()}, key=FONTS.index)
    for text in figure.findobj(Text):
        text.set_fontfamily(families)


def save_files(
    output_dir: str | os.PathLike[str], stem: str, texts: Mapping[str, str], plot: Callable[[], "Figure"] | None = None
) -> dict[str, Path]:
    """Writes `STEM.KIND` for each kind of text and, with matplotlib, `STEM.png`, over those that are there.

    Args:
        output_dir (`str` or `os.PathLike`): Folder or address for the files; created if needed.
        stem (`str`): Name of the files.
        texts (`Mapping[str, str]`): Texts by kind, such as `"json"`.
        plot (`Callable`, *optional*):
            Makes the picture, or raises `ImportError` without matplotlib; by default there is none.

    Returns:
        `dict[str, Path]`: The files by kind, with `"png"` only if it was written; at an address their copies here.
    """
    folder = open_folder(read_path("output_dir", output_dir, takes_address=True))
    folder.mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / f"{stem}.{kind}" for kind in texts}
    for kind, text in texts.items():
        write_text(paths[kind], text)
    if plot is None:
        return paths
    picture = folder / f"{stem}.png"
    remove(picture)  # the picture of an older report would mislead
    try:
        figure = plot()
    except ImportError as error:
        logger.warning(f"`{name_place(picture)}` is not written. {error}")
        return paths
    with replacing(picture) as file:
        figure.savefig(file, format="png", dpi=PICTURE_DPI)
    return {**paths, "png": picture}
