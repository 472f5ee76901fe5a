"""Keeps a trained draft in float16 in the project, or makes the GGUF files of the kept ones.

    python -m experiments.smollm2.keep_draft --domain function_calling --run 192x8-seed0
    python -m experiments.smollm2.keep_draft --export

`kept/<domain>/draft` is the draft of a domain. `--export` writes `<work_dir>/<domain>/gguf` for each domain that has
one: target and draft in float16, as llama-server loads them. The target is merged from its kept adapter where it is not
there.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.serving.llama_cpp import find_tools
from experiments.smollm2.conversations import DOMAINS, KEPT, find_target
from experiments.smollm2.tune_target import merge_adapter
from spec_kd import export_gguf


def find_models(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """Folders of the target and the draft, which is the kept one where nothing was trained here."""
    draft = arguments.work_dir / arguments.domain / arguments.run / arguments.phase
    if not draft.exists():
        draft = restore_draft(arguments.work_dir, arguments.domain)
    return find_target(arguments.work_dir, arguments.domain), draft


def make_gguf(model: Path, folder: Path, quantization: str) -> Path:
    """Writes a model as llama-server loads it, below the domain's folder."""
    output = folder / "gguf" / f"{'-'.join(model.parts[-2:])}-{quantization}.gguf"
    return export_gguf(model, output, llama_cpp_dir=find_tools(), quantization=quantization)


def keep(draft: Path, log: Path, output: Path) -> None:
    """Saves the draft in float16 without its tokenizer, which is the target's, and what its last training logged."""
    AutoModelForCausalLM.from_pretrained(draft, dtype=torch.float16).save_pretrained(output)
    shutil.copy(draft / "README.md", output / "README.md")
    record = json.loads(log.read_text())
    lines = [json.dumps(entry) + "\n" for entry in record.pop("log")]
    (output / "log.jsonl").write_text("".join([json.dumps(record) + "\n", *lines]))


def restore_draft(work_dir: Path, domain: str) -> Path:
    """Folder below `work_dir` with the kept draft and its tokenizer."""
    output = work_dir / domain / "draft"
    if not (output / "tokenizer.json").exists():
        shutil.copytree(KEPT / domain / "draft", output, dirs_exist_ok=True)
        AutoTokenizer.from_pretrained(find_target(work_dir, domain)).save_pretrained(output)
    return output


def export(work_dir: Path, domain: str) -> None:
    """Writes the GGUF files of a domain."""
    target = find_target(work_dir, domain)
    if domain != "general":
        merge_adapter(work_dir, domain, KEPT / domain / "adapter")
    for model in (target, restore_draft(work_dir, domain)):
        print(make_gguf(model, work_dir / domain, "f16"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", choices=DOMAINS)
    parser.add_argument("--run", help="Folder of the draft's run, such as 192x8-seed0.")
    parser.add_argument("--phase", default="train", help="Phase after which the draft is kept (default: train).")
    parser.add_argument("--export", action="store_true", help="Make the GGUF files of the kept drafts.")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/smollm2"))
    arguments = parser.parse_args()
    if arguments.domain and arguments.run:
        run = arguments.work_dir / arguments.domain / arguments.run
        keep(run / arguments.phase, run / f"{arguments.phase}.json", KEPT / arguments.domain / "draft")
    elif not arguments.export:
        parser.error("Give --domain and --run, or --export.")
    if arguments.export:
        for domain in DOMAINS:
            if (KEPT / domain / "draft").exists():
                export(arguments.work_dir, domain)


if __name__ == "__main__":
    main()
