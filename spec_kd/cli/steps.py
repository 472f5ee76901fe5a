"""Steps: work that is done once, in a folder with a note of what it was made from.

`.step.json` in the folder of a step holds what its result depends on (`inputs`: options, and the hashes of files and
models), their hash, and the `result` once it exists. A step with the same inputs does not run again. If the inputs have
changed, a single command refuses the folder; the run of a recipe moves it to `replaced/` and begins the step again, so
that no work is ever deleted. A later step depends on the *content* that an earlier one wrote: it does not run again if
the earlier one writes the same content again. Secrets (tokens, passwords) are not written to notes and do not count as
inputs.
"""

import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import cast

from spec_kd.addresses import is_address
from spec_kd.cli.fingerprints import Fingerprints, hash_json
from spec_kd.copies import open_folder
from spec_kd.files import compute_sum, explain_full_disk, read_json_object, sweep, write_text
from spec_kd.open_types import Argument, JsonObject, JsonValue
from spec_kd.secrets import strip_secrets

STEP_FILE = ".step.json"  # hidden, so that `load_dataset` takes it for no data
HASHES_FILE = ".hashes.json"
REPLACED = "replaced"
FORMAT = 2  # of `.step.json`; `spec-kd convert` brings earlier ones to it


class Workspace:
    """The place where steps run.

    Args:
        output_dir (`str`, *optional*):
            Folder of the run of a recipe, with a folder for each step. A step's folder that was made from other inputs
            is moved to `replaced/STEP-N` in there, and the step begins again. Without it, a single command works in
            the folder that the user names, and refuses one that was made from other inputs.

    Raises:
        ValueError: The folder is of an earlier version.
    """

    def __init__(self, output_dir: str | None = None):
        self.output_dir = output_dir
        if output_dir is not None:
            check_formats(output_dir)
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            sweep(Path(output_dir))  # a killed run may have been writing the hashes
        self.fingerprints = Fingerprints(Path(output_dir, HASHES_FILE) if output_dir is not None else None)

    def do(
        self,
        folder: str,
        command: str,
        inputs: JsonObject,
        products: Sequence[str],
        work: Callable[[], JsonObject],
        continues: Sequence[str] = (),
    ) -> JsonObject:
        """Returns the result of a step: what its folder has if it is finished, otherwise what `work` returns.

        Args:
            folder (`str`): Folder of the step, or its address.
            command (`str`): Name of the command, for messages.
            inputs (`dict`): Everything that the result depends on, with the options under `options`.
            products (`Sequence[str]`): Files or patterns that `work` writes in the folder.
            work (`Callable`): Function that starts or continues the work, and returns JSON values.
            continues (`Sequence[str]`, *optional*, defaults to `()`):
                Options that may change between two calls: the step then continues in its folder.

        Returns:
            `dict`: What `work` returned, and `is_reused`.

        Raises:
            ValueError: The folder has the result of other inputs (the message names them), files of another command,
                or a note that is damaged or of an earlier version.
        """
        inputs = strip_secrets(inputs, replacement=None)
        if self.is_finished(folder, inputs):
            tell(f"{command}: finished before in {folder}")
            return {**cast(JsonObject, _read_note(folder))["result"], "is_reused": True}
        self.open(folder, inputs, products, continues)
        tell(f"{command}: {folder}")
        with explain_full_disk(folder, "what is finished is kept"):
            result = to_json(work())
        place = open_folder(folder)
        written = sorted({path for pattern in products for path in place.glob(pattern) if path.is_file()})
        sums = {str(path.relative_to(place)): compute_sum(path) for path in written}
        _write_note(folder, inputs, result=result, files=sums)
        return {**result, "is_reused": False}

    def is_finished(self, folder: str, inputs: JsonObject) -> bool:
        """Whether the folder has the result of these inputs, with its files unchanged to the bit."""
        inputs, note = strip_secrets(inputs, None), _read_note(folder)
        if note is None or note["result"] is None or note["hash"] != hash_json(inputs):
            return False
        place = open_folder(folder, *note["files"])
        changed = [name for name, digest in note["files"].items() if not _is_as_written(place / name, digest)]
        if changed:
            tell(f"{folder}: {', '.join(changed)} has changed since it was written, so the step runs again")
        return not changed

    def open(self, folder: str, inputs: JsonObject, products: Sequence[str], continues: Sequence[str] = ()) -> None:
        """Begins or continues the step with these inputs; arguments and errors are those of `do`."""
        inputs = strip_secrets(inputs, replacement=None)
        note: JsonValue = _read_note(folder)
        place = open_folder(folder, *products)
        found = [path.name for pattern in products for path in place.glob(pattern)]
        is_other = note is not None and _hash_without(note["inputs"], continues) != _hash_without(inputs, continues)
        if is_other and self.output_dir is not None and not is_address(folder):
            old = self._move_aside(folder)
            tell(
                f"{folder}: begun again ({_describe_changes(note['inputs'], inputs)})"
                + (f"; the old results are in {old}: delete them if you do not need them" if old else "")
            )
        elif is_other and found:  # a folder without products is of a command that failed early
            raise ValueError(
                f"`{folder}` was made from other inputs ({_describe_changes(note['inputs'], inputs)}). Choose another "
                "folder, delete this one, or repeat the command as it was to continue it."
            )
        elif note is None and found:
            raise ValueError(f"`{folder}` has a {found[0]} that this command did not write. Choose another folder.")
        place.mkdir(parents=True, exist_ok=True)
        _write_note(folder, inputs)

    def _move_aside(self, folder: str) -> Path | None:
        """Moves the folder of a step to `replaced/`, and returns its new place; `None` if it has only its note."""
        if all(path.name == STEP_FILE for path in Path(folder).iterdir()):
            return None
        root = cast(str, self.output_dir)
        name = Path(root, REPLACED, os.path.relpath(folder, root))
        place = next(place for n in itertools.count(1) if not (place := name.with_name(f"{name.name}-{n}")).exists())
        place.parent.mkdir(parents=True, exist_ok=True)
        Path(folder).rename(place)
        return place


def list_options(options: Argument, leave_out: Sequence[str] = ()) -> JsonObject:
    """The fields of a dataclass whose values are not the defaults."""
    default_of = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(options)}
    values = {name: getattr(options, name) for name in default_of if name not in leave_out}
    return {name: value for name, value in values.items() if value != default_of[name]}


def is_main_process() -> bool:
    """Whether this is the only process, or the first of those that `accelerate launch` started."""
    return int(os.environ.get("RANK", "0")) == 0


def tell(message: str) -> None:
    """Prints a line on stderr, in the main process only."""
    if is_main_process():
        print(message, file=sys.stderr, flush=True)


def to_json(value: JsonValue) -> JsonValue:
    """The value with `None` for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_formats(folder: str) -> None:
    """Raises `ValueError` for a folder with a step of an earlier version."""
    for path in list_notes(Path(folder)):
        _read_note(str(path.parent), converted=folder)


def list_notes(folder: Path) -> list[Path]:
    """Finds the notes in a folder: of a step, of the steps inside it, or of all steps of a recipe's run."""
    paths = [path for depth in ("", "*/", "*/*/") for path in folder.glob(f"{depth}{STEP_FILE}")]
    return sorted(path for path in paths if path.relative_to(folder).parts[0] != REPLACED)


def _read_note(folder: str, converted: str | None = None) -> JsonObject | None:
    path = open_folder(folder, STEP_FILE) / STEP_FILE
    if not path.exists():
        return None
    fix = f"So it is not known what `{folder}` was made from: restore the file, or move the folder away and run again."
    note = read_json_object(path, fix, ("hash", "inputs", "result", "files"))
    if note.get("format") != FORMAT:
        raise ValueError(
            f"`{folder}` was made by another version of spec_kd (format {note.get('format', 1)}, not {FORMAT}). "
            f"Convert it: `spec-kd convert {converted or folder}`."
        )
    is_whole = (
        isinstance(note["hash"], str)
        and isinstance(note["inputs"], dict)
        and isinstance(note["inputs"].get("options"), dict)
        and all(note[name] is None or isinstance(note[name], dict) for name in ("result", "files"))
        and (note["result"] is None) == (note["files"] is None)
        and all(isinstance(noted, str | int) for noted in (note["files"] or {}).values())
    )
    if not is_whole:
        raise ValueError(f"`{folder}/{STEP_FILE}` is damaged. {fix}")
    return note


def _is_as_written(path: Path, noted: str | int) -> bool:
    """Whether a file has the SHA-256 that was noted; a note that was converted may have its size instead."""
    if not path.is_file():
        return False
    return compute_sum(path) == noted if isinstance(noted, str) else path.stat().st_size == noted


def _hash_without(inputs: JsonObject, names: Sequence[str]) -> str:
    options = {name: value for name, value in inputs["options"].items() if name not in names}
    return hash_json(json.loads(json.dumps({**inputs, "options": options}, default=str)))


def _write_note(
    folder: str, inputs: JsonObject, result: JsonObject | None = None, files: dict[str, str] | None = None
) -> None:
    if not is_main_process():
        return
    note = {"format": FORMAT, "hash": hash_json(inputs), "inputs": inputs, "result": result, "files": files}
    place = open_folder(folder)
    sweep(place)
    write_text(place / STEP_FILE, json.dumps(note, indent=1, ensure_ascii=False, default=str) + "\n")


def _describe_changes(old: JsonObject, new: JsonObject) -> str:
    """The names of what differs, with the values where they are short."""
    old, new = (dict(_flatten(json.loads(json.dumps(inputs, default=str)))) for inputs in (old, new))
    changes = []
    for name in {**old, **new}:
        before, after = (repr(values[name]) if name in values else "not set" for values in (old, new))
        if before != after:
            is_short = max(len(before), len(after)) <= 40
            changes.append(f"{name}: {before} before, {after} now" if is_short else f"another {name}")
    return "; ".join(changes)


def _flatten(values: JsonObject, prefix: str = "") -> list[tuple[str, JsonValue]]:
    return [
        pair
        for name, value in values.items()
        for pair in (
            _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [(f"{prefix}{name}", value)]
        )
    ]
