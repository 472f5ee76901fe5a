"""What a dataset contributes to the model card of a draft that is trained on it."""

from datasets import Dataset

from spec_kd.trainer.teachers.stored import read_teacher_info
from spec_kd.trainer.training_data import AnyDataset


def find_dataset_name(dataset: AnyDataset | None) -> str | None:
    """The name that a dataset was loaded by; `None` for others, such as those made of files or lists."""
    info = getattr(dataset, "info", None)
    name = getattr(info, "dataset_name", None)
    return name if name != getattr(info, "builder_name", None) else None


def find_target_name(dataset: AnyDataset | None) -> str | None:
    """The target that wrote a dataset, if its rows say so."""
    if not isinstance(dataset, Dataset):
        return None
    try:
        info = read_teacher_info(dataset)
    except ValueError:  # of several targets, or damaged, which the reader of the signal reports
        return None
    return info.target_name if info is not None else None
