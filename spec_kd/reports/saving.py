"""The files of a report: its data, every rendering of them, and a picture where matplotlib is installed."""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from spec_kd.checks import read_path
from spec_kd.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

PICTURE_DPI = 130


def save_files(
    output_dir: str | os.PathLike[str], stem: str, texts: Mapping[str, str], plot: Callable[[], "Figure"]
) -> dict[str, Path]:
    """Writes `STEM.KIND` for each kind of text and, with matplotlib, `STEM.png`, over those that are there.

    Args:
        output_dir (`str` or `os.PathLike`): Folder for the files; created if needed.
        stem (`str`): Name of the files.
        texts (`Mapping[str, str]`): Texts by kind, such as `"json"`.
        plot (`Callable`): Makes the picture, or raises `ImportError` without matplotlib.

    Returns:
        `dict[str, Path]`: The files by kind, with `"png"` only if it was written.
    """
    folder = Path(read_path("output_dir", output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / f"{stem}.{kind}" for kind in texts}
    for kind, text in texts.items():
        write_text(paths[kind], text)
    picture = folder / f"{stem}.png"
    picture.unlink(missing_ok=True)  # the picture of an older report would mislead
    try:
        figure = plot()
    except ImportError as error:
        logger.warning(f"`{picture}` is not written. {error}")
        return paths
    figure.savefig(picture, dpi=PICTURE_DPI)
    return {**paths, "png": picture}
