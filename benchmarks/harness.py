"""What every benchmark does: it keeps parts that are done, says where it ran, and writes tables and pictures."""

import json
import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from spec_kd.evaluation.provenance import PACKAGES, find_accelerator, find_processor


def describe_machine() -> dict:
    """Processor, cores, threads and library versions."""
    return {
        "cpu": find_processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": find_accelerator(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def keep_part(path: Path, compute: Callable[[], Any]) -> Any:
    """The result of a part, which is computed unless its JSON file is there; a killed benchmark continues after it."""
    if not path.exists():
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(compute()), encoding="utf-8")
        os.replace(partial, path)
    return json.loads(path.read_text(encoding="utf-8"))


def write_report(path: Path, write_tables: Callable[[dict, Path], None], plot: Callable[[dict, Path], None]) -> None:
    """Writes the Markdown and the picture of a record beside its JSON."""
    record = json.loads(path.read_text(encoding="utf-8"))
    write_tables(record, path.with_suffix(".md"))
    plot(record, path.with_suffix(".png"))
