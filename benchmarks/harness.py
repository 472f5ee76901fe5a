"""What a record says about where it was made."""

import os
import platform
from importlib.metadata import version

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
