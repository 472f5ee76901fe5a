"""`spec-kd convert`: recipes, files of options and run folders of an earlier version become today's."""

import json
import os
import re
from glob import glob
from pathlib import Path

import yaml

from spec_kd.cli.arguments import ConvertArguments
from spec_kd.cli.fingerprints import hash_json
from spec_kd.cli.paths import PATH_OPTIONS, relate
from spec_kd.cli.steps import FORMAT, list_notes, tell
from spec_kd.cli.yaml_files import load_old_names, read_yaml, rename
from spec_kd.data.response_options import ResponseOptions
from spec_kd.files import read_json_object, write_text
from spec_kd.open_types import JsonObject, JsonValue


def run(arguments: ConvertArguments) -> JsonObject:
    """Converts a file or a folder.

    Raises:
        ValueError: Nothing there is of an earlier version, or a file is damaged.
        OSError: The path does not exist, or the new file exists already.
    """
    path = Path(arguments.path)
    return convert_folder(path) if path.is_dir() else convert_file(path)


def convert_file(path: Path) -> JsonObject:
    """Writes a recipe or a file of options with today's names beside it, with its comments if that is possible."""
    values, text = rename(read_yaml(path)), path.read_text(encoding="utf-8")
    if values == read_yaml(path):
        raise ValueError(f"`{path}` has no name of an earlier version, so there is nothing to convert.")
    output = path.with_suffix(f".new{path.suffix}")
    if output.exists():
        raise FileExistsError(f"`{output}` exists already. Delete it, or move it away.")
    names = load_old_names()
    for key, new in names["keys"].items():
        text = re.sub(rf"(?<![\w-]){key}(?=\s*:(\s|$))", new, text, flags=re.MULTILINE)
    for key, replacements in names["values"].items():
        for old, new in replacements.items():
            text = re.sub(rf"(?<![\w-])({key}\s*:\s*['\"]?){old}(?![\w-])", rf"\1{new}", text)
    if "train" in values:  # a recipe
        values, moved = _place_paths(values, os.path.dirname(path))
        for old, new in moved.items():
            text = text.replace(old, new)
        for section, defaults in names["defaults"].items():
            values, text = _set_defaults(values, text, section, defaults)
    if yaml.safe_load(text) != values:
        tell(f"convert: the comments of {path} are not kept")
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    write_text(output, text)
    tell(f"convert: {output}")
    return {"path": str(output)}


def convert_folder(folder: Path) -> JsonObject:
    """Gives the folders and the notes of a run, or of a step, today's names; a converted step is not repeated."""
    fix = "Move the folder of this step away, and convert again."
    notes = {path: read_json_object(path, fix, ("inputs", "result")) for path in list_notes(folder)}
    if not any("format" not in note for note in notes.values()):
        raise ValueError(f"`{folder}` has no step of an earlier version, so there is nothing to convert.")
    names = load_old_names()
    moves = names["folders"]["evaluation" if (folder / "report.json").exists() else "run"]
    for path, note in notes.items():
        if "format" not in note:
            write_text(path, json.dumps(_convert_note(note, path.parent, moves), indent=1, ensure_ascii=False) + "\n")
    for old, new in moves.items():  # at the end: a conversion that was killed before finds the notes where they were
        if any(path.is_relative_to(folder / old) for path in notes):
            (folder / old).rename(folder / new)
    tell(f"convert: {folder}")
    return {"path": str(folder), "num_steps": len(notes)}


def _convert_note(note: JsonObject, folder: Path, moves: dict[str, str]) -> JsonObject:
    inputs, result = rename(note["inputs"]), note["result"]
    if {"target", "prompts"} <= inputs.keys() and "drafts" not in inputs and folder.name not in moves:  # of `respond`
        for name, value in load_old_names()["defaults"]["respond"].items():
            inputs["options"].setdefault(name, value)
            if inputs["options"][name] == getattr(ResponseOptions, name):
                del inputs["options"][name]
    if result is not None:
        result = rename(result)
        if folder.parent.name in moves and "path" in result:  # of a part of the prompts
            result["path"] = str(Path(result["path"]).parent.with_name(moves[folder.parent.name]) / folder.name)
    return {**note, "format": FORMAT, "hash": hash_json(inputs), "inputs": inputs, "result": result}


def _place_paths(values: JsonObject, folder: str) -> tuple[JsonObject, dict[str, str]]:
    """A recipe with paths that are relative to its folder in place of the working directory, and those that changed."""
    moved = {}

    def place(key: str, value: JsonValue) -> JsonValue:
        if isinstance(value, dict):
            return {name: place(name, item) for name, item in value.items()}
        if isinstance(value, list):
            return [place(key, item) for item in value]
        is_path = key in PATH_OPTIONS and key != "output_dir" and isinstance(value, str)
        if is_path and glob(value) and (placed := relate(value, folder)) != value:
            moved[value] = placed
            return placed
        return value

    return {key: place(key, value) for key, value in values.items()}, moved


def _set_defaults(values: JsonObject, text: str, section: str, defaults: JsonObject) -> tuple[JsonObject, str]:
    """A recipe, as values and as text, with the values that options of a section had by default."""
    given = values.get(section)
    missing = {name: value for name, value in defaults.items() if name not in (given or {})}
    if given is False or not missing:
        return values, text
    lines = [f"{name}: {value}  # the default of before" for name, value in missing.items()]
    if given is None:
        text += "".join([f"\n{section}:\n", *(f"  {line}\n" for line in lines)])
    else:
        text = re.sub(
            rf"^({section}:[ \t]*(?:#.*)?\n)([ \t]+)",
            lambda match: match[1] + "".join(f"{match[2]}{line}\n" for line in lines) + match[2],
            text,
            flags=re.MULTILINE,
        )
    return {**values, section: {**missing, **(given or {})}}, text
