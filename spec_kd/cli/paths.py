"""Paths among options: which options name files, what a name stands for, and whether it is there."""

import os
from collections.abc import Mapping
from pathlib import Path

from spec_kd.addresses import exists, is_address
from spec_kd.files import BUILDERS
from spec_kd.open_types import Argument, JsonObject, Record
from spec_kd.options import read_path

# Options that name a file, a folder or something on the Hub: `~` is the home folder, and empty text is refused.
PATH_OPTIONS = frozenset(
    ("accelerator_config", "chat_template_path", "corpus", "costs", "dataset", "deepspeed", "donor", "draft", "drafts",
     "fsdp_config", "grammar", "json_schema", "llama_cpp_dir", "model_name_or_path", "output", "output_dir", "parts",
     "path", "paths", "prompts", "recipe", "ref_model_name_or_path", "report", "responses", "responses_dir",
     "resume_from_checkpoint", "serving_target", "target", "target_gguf", "teacher_model_name_or_path", "test_sets",
     "tokenizer", "tool_catalog")
)  # fmt: skip
FILES_ONLY = ("paths", "tool_catalog", "deepspeed")  # never a name on the Hub


def read_paths(name: str, value: Argument, takes_address: bool = False) -> Argument:
    """The value of a path option, also in a list or in pairs, with the home folder in place of `~`.

    Raises:
        ValueError: A path is empty, no text, or an address where the option takes none.
    """
    if isinstance(value, list):
        return [read_paths(name, item, takes_address) for item in value]
    if isinstance(value, Mapping):
        return {key: read_paths(name, item, takes_address) for key, item in value.items()}
    if isinstance(value, bool):  # `resume_from_checkpoint: true`
        return value
    return read_path(name, value, takes_address=takes_address)


def place_paths(values: Record, folder: str) -> JsonObject:
    """The options of a section of a recipe, with its relative paths placed in the folder of the recipe.

    A name that may be one on the Hub is a path if the folder has a file or folder of that name.

    Args:
        values (`Mapping`): Options by name.
        folder (`str`): Folder of the recipe; `""` for the working directory.
    """

    def place(name: str, value: Argument) -> Argument:
        if isinstance(value, list):
            return [place(name, item) for item in value]
        if not isinstance(value, str) or _is_placed(value) or not value.strip():
            return value
        path = os.path.join(folder, value)
        return path if name in FILES_ONLY or looks_like_path(value) or os.path.exists(path) else value

    return {name: place(name, value) if name in PATH_OPTIONS else value for name, value in values.items()}


def relate(path: str, folder: str) -> str:
    """A path that is relative to the working directory as one that is relative to a folder; other names as they are."""
    path = os.path.expanduser(path)
    if _is_placed(path) or not (looks_like_path(path) or os.path.exists(path) or "*" in path):
        return path
    related = os.path.relpath(path, folder or ".")
    return related if looks_like_path(related) or os.path.exists(path) else os.path.join(".", related)


def _is_placed(path: str) -> bool:
    return is_address(path) or os.path.isabs(os.path.expanduser(path))


def looks_like_path(source: str) -> bool:
    """Whether it cannot be a name on the Hub, which has at most one slash and none at its ends."""
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or Path(source).suffix in (*BUILDERS, ".arrow")


def check_exists(option: str, source: str | None) -> None:
    """Raises `FileNotFoundError` for a path to nothing; a name that may be one on the Hub, and `None`, are accepted.

    Raises:
        OSError: An address cannot be reached.
        ImportError: The package of its store is not installed.
    """
    if source is None or not looks_like_path(source):
        return
    if not (exists(source) if is_address(source) else os.path.exists(source)):
        raise FileNotFoundError(f"{option}: `{source}` does not exist.")


def list_files(path: Path) -> list[Path]:
    """A file itself, or all visible ones below a folder, sorted."""
    if path.is_file():
        return [path]
    files = (file for file in path.rglob("*") if file.is_file())
    return sorted(f for f in files if not any(part.startswith(".") for part in f.relative_to(path).parts))
