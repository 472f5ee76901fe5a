"""What a dataset says for the model card of a draft that is trained on it."""

from typing import Any

from datasets import Dataset

from spec_kd.trainer.teachers.stored import read_teacher_info


def find_dataset_name(dataset: Any) -> str | None:
    """The name of a dataset that was loaded by one; `None` for others, such as those of files or of lists."""
    info = getattr(dataset, "info", None)
    name = getattr(info, "dataset_name", None)
    return name if name != getattr(info, "builder_name", None) else None


def find_target_name(dataset: Any) -> str | None:
    """The target that wrote a dataset, where its rows say so."""
    if not isinstance(dataset, Dataset):
        return None
    try:
        info = read_teacher_info(dataset)
    except ValueError:  # of several targets, or damaged: who reads the signal says so
        return None
    return info.target_name if info is not None else None
