"""The origin of a report: its models, responses, machine, versions and command."""

import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from spec_kd._private import get_config_model_id
from spec_kd.engines.base import Engine
from spec_kd.engines.transformers import TransformersEngine, hash_model
from spec_kd.heads import unwrap_peft
from spec_kd.open_types import JsonObject
from spec_kd.version import __version__

IN_MEMORY = "(in memory)"  # the name of a model that was not loaded from anywhere
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")


def describe_model(model: PreTrainedModel, name: str | None = None) -> JsonObject:
    """Name, size, dtype and a hash of the weights.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model.
        name (`str`, *optional*): Path or Hub id that it was loaded from. By default that in its config, which for an
            adapter names the base model.
    """
    model = unwrap_peft(model)
    return {
        "name": name or get_config_model_id(model.config) or IN_MEMORY,
        "architecture": type(model).__name__,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": hash_model(model)[:16],
    }


def describe_target(target: Engine | None, responses: Mapping[float, Dataset]) -> JsonObject:
    """Description of the target: its model, its engine, or what stored responses say about it."""
    if isinstance(target, TransformersEngine):
        return describe_model(target.target, target.target_name)
    if target is not None:
        return {"engine": target.name, **target.describe()}
    infos = {text for rows in responses.values() for text in rows.unique("teacher_info")}
    return {"from stored responses": sorted(infos)}


def describe_responses(responses: Mapping[float, Dataset]) -> JsonObject:
    """Number of prompts and of completion tokens at each temperature."""
    return {
        f"temperature {temperature:g}": {
            "prompts": len(rows),
            "completion_tokens": sum(map(len, rows["completion_ids"])),
        }
        for temperature, rows in responses.items()
    }


def describe_surroundings() -> JsonObject:
    """Machine, versions, command and time (UTC)."""
    return {
        "machine": {
            "processor": find_processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "accelerator": find_accelerator(),
        },
        "versions": {
            "spec_kd": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def find_processor() -> str:
    """The processor's name if the system states it, else the kind of the machine."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:(.*)$", cpuinfo.read_text("utf-8") if cpuinfo.exists() else "", re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def find_accelerator() -> str | None:
    """The name of the CUDA device, else the kind of the accelerator; `None` without one."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return None
    return torch.cuda.get_device_name() if device.type == "cuda" else device.type
