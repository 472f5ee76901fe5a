"""GGUF files, which llama.cpp reads, of drafts and targets: its own converter and quantizer write them."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download

from spec_kd.escaping import is_hub_id
from spec_kd.files import (
    ADAPTER_CONFIG,
    compute_sum,
    finish_replacement,
    list_model_files,
    read_json_object,
    replacing,
    scratch_file,
    sweep,
    write_text,
)
from spec_kd.open_types import JsonObject
from spec_kd.options import check_choice, read_path

logger = logging.getLogger(__name__)

CONVERTER = "convert_hf_to_gguf.py"
# Types that the converter writes, and types that the quantizer makes from its file
FLOATS, QUANTIZED = ("f32", "f16", "bf16"), ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0")
QUANTIZATIONS = (*FLOATS, *QUANTIZED)
# The smallest type that a quantized file can be made from without rounding twice
FULL_TYPES = {"float16": "f16", "bfloat16": "bf16"}
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
MAGIC = b"GGUF"
FORMAT = 1  # of the note beside a GGUF file
MAX_LINES = 8  # of what a failed tool printed
HINTS = (
    (
        re.compile(r"Model (\S+) is not supported"),
        "This llama.cpp does not know the architecture {0}: update it, or serve the model with another engine.",
    ),
    (
        re.compile(r"pre-tokenizer was not recognized"),
        "This llama.cpp does not know the tokenizer: save the unchanged one of a model that it knows with the weights.",
    ),
    (
        re.compile(r"No module named '([\w.]+)'"),
        "Its Python (`{python}`) has no {0}: install llama.cpp's requirements/requirements-convert_hf_to_gguf.txt into "
        "it, or into a `.venv` in the folder of llama.cpp.",
    ),
)


class Tools(NamedTuple):
    """Files of a llama.cpp that export a model: a Python for the converter, the converter, the quantizer."""

    python: Path
    converter: Path
    quantizer: Path


class GGUFError(RuntimeError):
    """A tool of llama.cpp failed; the message has the last lines that it printed."""


def export_gguf(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    llama_cpp_dir: str | os.PathLike[str],
    quantization: str = "f16",
) -> Path:
    """Writes a model as one GGUF file, with the tools of a llama.cpp that is on this machine.

    The file takes its place when it is whole. A small note beside it (`.NAME.json`) says what it was made from: a call
    that finds a whole file of the same model and type leaves it as it is, and any other file is replaced.

    The converter runs with the Python of a `.venv` in the folder of llama.cpp, or with this one if there is none.

    Args:
        model (`str` or `os.PathLike`):
            Folder of a model with its tokenizer, such as [`export_draft`] writes, or its Hub id.
        output (`str` or `os.PathLike`): The file to write, such as `draft-Q8_0.gguf`.
        llama_cpp_dir (`str` or `os.PathLike`):
            Folder with `convert_hf_to_gguf.py` and, for quantized types, `llama-quantize` in it, in `bin` or in
            `build/bin`.
        quantization (`str`, *optional*, defaults to `"f16"`):
            `"f32"`, `"f16"`, `"bf16"`, `"Q8_0"`, `"Q6_K"`, `"Q5_K_M"`, `"Q4_K_M"` or `"Q4_0"`. The types with a K need
            rows of a multiple of 256 numbers; llama-quantize stores others in a larger type, which is logged.

    Returns:
        `Path`: `output`.

    Raises:
        ValueError: The type is unknown, or the folder of the model or of llama.cpp is not what it must be.
        GGUFError: The converter or the quantizer failed.
        OSError: There is no room for the file, or no such model.
    """
    check_choice("quantization", quantization, QUANTIZATIONS)
    tools = find_tools(llama_cpp_dir, quantization)
    output, folder = Path(read_path("output", output)), _find_model(model)
    sources = {path.name: compute_sum(path) for path in list_model_files(folder) if path.suffix != ".gguf"}
    made_from = {"format": FORMAT, "quantization": quantization, "model": sources}
    note = output.with_name(f".{output.name}.json")
    if _is_made_from(made_from, output, note):
        logger.info("`%s` is there already, of the same model", output)
        return output
    output.parent.mkdir(parents=True, exist_ok=True)
    sweep(output.parent)
    with replacing(output, kept="an earlier file is as it was") as file:
        if quantization in FLOATS:
            _convert(tools, folder, Path(file.name), quantization)
        else:
            with scratch_file(output) as full:
                _convert(tools, folder, Path(full.name), _find_full_type(folder))
                printed = _run([str(tools.quantizer), full.name, file.name, quantization], Path(file.name))
            if fallback := re.search(r"WARNING: (\d+ of \d+) tensor\(s\) required fallback", printed):
                logger.warning(
                    "%s tensors of `%s` have rows that %s does not fit, and were stored in a larger type.",
                    fallback[1], output.name, quantization,
                )  # fmt: skip
    write_text(note, json.dumps({**made_from, "sha256": compute_sum(output)}, indent=1) + "\n")
    return output


def find_tools(llama_cpp_dir: str | os.PathLike[str], quantization: str) -> Tools:
    """The tools of a folder of llama.cpp.

    Args:
        llama_cpp_dir (`str` or `os.PathLike`): The folder.
        quantization (`str`): What they are wanted for.

    Raises:
        ValueError: One that is needed is not there.
    """
    folder = Path(read_path("llama_cpp_dir", llama_cpp_dir))
    if not (folder / CONVERTER).is_file():
        raise ValueError(f"`llama_cpp_dir={str(folder)!r}` has no {CONVERTER}. Give the folder of llama.cpp's source.")
    quantizer = find_program(folder, "llama-quantize")
    if quantization in QUANTIZED and not quantizer.is_file():
        raise ValueError(
            f"`quantization={quantization!r}` needs {quantizer.name}, which is neither in `{folder}` nor in its `bin` "
            "or `build/bin`. Build it: `cmake -B build && cmake --build build --target llama-quantize`."
        )
    pythons = (folder / ".venv/bin/python", folder / ".venv/Scripts/python.exe", Path(sys.executable))
    python = next(python for python in pythons if python.exists())
    # The converter looks for its own packages beside itself, so a link to it is followed
    return Tools(python, (folder / CONVERTER).resolve(), quantizer)


def find_program(llama_cpp_dir: str | os.PathLike[str], name: str) -> Path:
    """A program in a folder of llama.cpp, such as `"llama-server"`, or where a build would have it."""
    folder, name = Path(read_path("llama_cpp_dir", llama_cpp_dir)), f"{name}.exe" if os.name == "nt" else name
    places = [folder / place / name for place in ("bin", "build/bin", "build/bin/Release", ".")]
    return next((place for place in places if place.is_file()), places[1])


def _find_model(model: str | os.PathLike[str]) -> Path:
    name = read_path("model", model)
    if not Path(name).is_dir() and not is_hub_id(name):
        raise ValueError(f"`model={name!r}` is neither a folder nor a name on the Hub.")
    folder = Path(name) if Path(name).is_dir() else Path(snapshot_download(name, allow_patterns=HUB_FILES))
    finish_replacement(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(f"`{name}` is a LoRA adapter. Merge it first: `export_draft({name!r}, output_dir)`.")
    if not (folder / "config.json").is_file():
        raise ValueError(f"`{name}` has no config.json. Give the folder of a model.")
    return folder


def _find_full_type(folder: Path) -> str:
    config = read_json_object(folder / "config.json", "Copy or download the file again.")
    return FULL_TYPES.get(config.get("dtype") or config.get("torch_dtype") or "", "f32")


def _is_made_from(made_from: JsonObject, output: Path, note: Path) -> bool:
    """Whether a GGUF file is whole and was made from these sources."""
    try:
        noted = read_json_object(note, "", ("sha256",))
    except (OSError, ValueError):
        return False
    digest = noted.pop("sha256")
    return noted == made_from and output.is_file() and compute_sum(output) == digest


def _convert(tools: Tools, folder: Path, output: Path, dtype: str) -> None:
    _run([str(tools.python), str(tools.converter), str(folder), "--outtype", dtype, "--outfile", str(output)], output)


def _run(command: Sequence[str], output: Path) -> str:
    """Runs a tool that writes `output`; returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
        stdin=subprocess.DEVNULL, env=environment, check=False,
    )  # fmt: skip
    with output.open("rb") as file:
        is_written = file.read(len(MAGIC)) == MAGIC
    if done.returncode == 0 and is_written:
        return done.stdout
    tool = Path(command[1] if command[1].endswith(".py") else command[0]).name
    if done.returncode < 0:
        what = f"was killed by {signal.Signals(-done.returncode).name}, maybe for its memory"
    else:
        what = f"failed with status {done.returncode}" if done.returncode else "wrote no GGUF file"
    hints = (
        hint.format(*found.groups(), python=command[0]) for line, hint in HINTS if (found := line.search(done.stdout))
    )
    lines = [line for line in done.stdout.splitlines() if line.strip()][-MAX_LINES:]
    raise GGUFError("\n".join([f"{tool} {what}. {next(hints, '')}".strip(), *lines]))
