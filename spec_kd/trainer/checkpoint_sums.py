"""Checksums of the files of checkpoints, and the newest checkpoint that is whole.

`trainer_state.json` is the last file of a checkpoint that `Trainer` writes, and marks it as complete. Our trainers then
add `checkpoint_sums.json` with a checksum of every file, so that a later change on disk is noticed before a training
resumes from it. The files of another trainer's checkpoint, which has no checksums, are checked by their formats.
"""

import hashlib
import json
import os
import re
import zipfile
from pathlib import Path

import xxhash
from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

SUMS_FILE = "checkpoint_sums.json"


def is_checkpoint_name(folder: str | Path) -> bool:
    """Whether a folder has the name that `Trainer` gives to checkpoints."""
    return re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", Path(folder).name) is not None


def has_sums(checkpoint: Path) -> bool:
    """Whether a checkpoint has the checksums of its files."""
    return (checkpoint / SUMS_FILE).is_file()


def write_sums(checkpoint: Path) -> None:
    """Writes the checksums of all files of a finished checkpoint beside them."""
    sums = {name: [path.stat().st_size, _compute_sum(path)] for name, path in _list_files(checkpoint).items()}
    part = checkpoint / f"{SUMS_FILE}.part"
    part.write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")
    os.replace(part, checkpoint / SUMS_FILE)


def remove_marks(checkpoint: Path) -> None:
    """Marks a checkpoint that will be overwritten as incomplete."""
    for name in (TRAINER_STATE_NAME, SUMS_FILE):
        (checkpoint / name).unlink(missing_ok=True)


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, as a clause that names the file; `None` if it is whole.

    Args:
        checkpoint (`Path`): Its folder. Every file with a checksum is read once.
    """
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        return f"`{TRAINER_STATE_NAME}` is missing, which is written last: the save was interrupted"
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]
    except (ValueError, KeyError, TypeError):
        return f"`{TRAINER_STATE_NAME}` cannot be read"
    if not has_sums(checkpoint):
        return _find_malformed(checkpoint)
    try:
        sums = json.loads((checkpoint / SUMS_FILE).read_text(encoding="utf-8"))
        expected = {name: (int(size), str(value)) for name, (size, value) in sums.items()}
    except (ValueError, TypeError, AttributeError):
        return f"`{SUMS_FILE}` cannot be read"
    found = _list_files(checkpoint)
    for name, (size, value) in expected.items():
        if name not in found:
            return f"`{name}` is missing"
        if found[name].stat().st_size != size:
            return f"`{name}` has {found[name].stat().st_size} bytes instead of {size}"
        if _compute_sum(found[name]) != value:
            return f"`{name}` is not what was saved (its checksum differs)"
    return None


def find_whole_checkpoint(output_dir: str | Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest whole checkpoint of a run, or `None`; and what is wrong with each newer one.

    Args:
        output_dir (`str` or `Path`): Output folder of the run.
    """
    damages: dict[Path, str] = {}
    folders = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if is_checkpoint_name(path)]
    for folder in sorted(folders, key=lambda path: -int(path.name.rpartition("-")[2])):
        if (damage := find_damage(folder)) is None:
            return folder, damages
        damages[folder] = damage
    return None, damages


def _list_files(checkpoint: Path) -> dict[str, Path]:
    """All files of a checkpoint by their relative names, except its checksums and the card, which people may edit."""
    named = {path.relative_to(checkpoint).as_posix(): path for path in sorted(checkpoint.rglob("*")) if path.is_file()}
    return {name: path for name, path in named.items() if name not in (SUMS_FILE, f"{SUMS_FILE}.part", "README.md")}


def _compute_sum(path: Path) -> str:
    # XXH3, since nobody forges a checkpoint: 8 GB/s on one core, where SHA-256 has 1 GB/s. With Adam's state a
    # checkpoint of a 1B draft has about 10 GB, and the training waits for the checksums.
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def _find_malformed(checkpoint: Path) -> str | None:
    """A file of a checkpoint without checksums that is cut or missing, judged by the formats of its files."""
    files = _list_files(checkpoint)
    for name, path in files.items():
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):  # compares the header with the size of the file
                    continue
            if path.suffix in (".pt", ".pth") and zipfile.ZipFile(path).testzip() is not None:
                return f"`{name}` is damaged"
        except (SafetensorError, zipfile.BadZipFile, OSError) as error:
            return f"`{name}` cannot be read ({error})"
    is_plain = not any(path.is_dir() for path in checkpoint.iterdir())  # FSDP and DeepSpeed have folders
    has_random_state = any(name.startswith("rng_state") for name in files)  # written after the optimizer
    is_cut_short = is_plain and has_random_state and "optimizer.pt" not in files
    return "`optimizer.pt` is missing" if is_cut_short else None
