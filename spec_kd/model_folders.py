"""Models that replace others in their folder, so that a kill at any moment leaves one that loads."""

import json
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path

from spec_kd.files import write_text

ADAPTER_CONFIG = "adapter_config.json"
# Hidden folders in that of the model: files that are being written, and whole ones that are moved to their places.
STAGING, SEALED = ".export.part", ".export"
FILE_LIST = ".files.json"
# What an earlier save may have left: engines that load every weight file of a folder would load these too.
WEIGHT_PATTERNS = ("model*.safetensors*", "pytorch_model*.bin*", "adapter_model.*", ADAPTER_CONFIG)


def replace_model(folder: Path) -> None:
    """Moves the files in `folder/.export.part` to their places: a whole model, in place of what is there.

    Weights come first, then what says how to read them; weights of the model before go last, other files stay.
    """
    _seal(folder / STAGING)
    finish_replacement(folder)


def finish_replacement(folder: str | os.PathLike[str]) -> None:
    """Finishes, or removes, what a killed process left of a model in its folder; does nothing anywhere else.

    Args:
        folder (`str` or `os.PathLike`): Folder of a model, or a Hub id, which has no such folder.
    """
    folder = Path(folder)
    if (folder / STAGING).is_dir():
        shutil.rmtree(folder / STAGING)
    if (folder / SEALED).is_dir():
        _move_in(folder / SEALED, folder)


def _seal(staging: Path) -> None:
    """Marks files as whole: they are on the disk, listed, and the folder has its other name."""
    names = sorted(str(path.relative_to(staging)) for path in staging.rglob("*") if path.is_file())
    for name in names:
        with (staging / name).open("rb") as file:
            os.fsync(file.fileno())
    write_text(staging / FILE_LIST, json.dumps(names))
    os.replace(staging, staging.with_name(SEALED))


def _move_in(sealed: Path, output_dir: Path) -> None:
    """Moves whole files to their places, from wherever an earlier call was killed."""
    if not (sealed / FILE_LIST).exists():  # the last that is removed, when all is in its place
        shutil.rmtree(sealed)
        return
    names = set(json.loads((sealed / FILE_LIST).read_text(encoding="utf-8")))
    for file in sorted(sealed.rglob("*"), key=lambda path: (_rank(path.name), str(path))):
        name = str(file.relative_to(sealed))
        # PEFT writes a README of its own; a model card that is there is worth more
        if not file.is_file() or name == FILE_LIST or (name == "README.md" and (output_dir / name).exists()):
            continue
        (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, output_dir / name)
    # The configuration of an adapter makes its folder one: without it, a full model beside it counts.
    stale = {path for pattern in WEIGHT_PATTERNS for path in output_dir.glob(pattern) if path.name not in names}
    for path in sorted(stale, key=lambda path: (path.name != ADAPTER_CONFIG, path.name)):
        path.unlink()
    shutil.rmtree(sealed)


def _rank(name: str) -> int:
    """In which order files take their places: weights, then what says how to read them, then the rest."""
    is_weight = any(fnmatch(name, pattern) for pattern in WEIGHT_PATTERNS) and name != ADAPTER_CONFIG
    return 0 if is_weight else 1 if name in ("config.json", ADAPTER_CONFIG) else 2
