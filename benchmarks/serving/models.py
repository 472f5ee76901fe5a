"""The pair that every serving engine is asked with: SmolLM2-135M-Instruct, and a draft cut from it.

    python -m benchmarks.serving.models --work_dir outputs/serving

The draft is the target without three of its 30 layers. It is no draft that anyone should serve, for it costs nearly as
much as the target; but it agrees with the target on most tokens, and every rule of acceptance is met on real text.
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.serving.llama_cpp import find_tools
from experiments.smollm2.get_target import convert, download_gguf
from spec_kd import export_gguf
from spec_kd.parallel import ParallelDrafting, write_parallel_drafting

DROPPED_LAYERS = (7, 14, 21)


def cut_layers(model_dir: Path, output_dir: Path, dropped: tuple[int, ...] = DROPPED_LAYERS) -> None:
    """Saves the model of `model_dir`, with its tokenizer, without the layers `dropped`."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    kept = [layer for index, layer in enumerate(model.model.layers) if index not in dropped]
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    model.save_pretrained(output_dir)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(output_dir)


def make_pair(work_dir: Path) -> tuple[Path, Path]:
    """Folders of target and draft in `work_dir`, in float32; those that are whole are left as they are."""
    target, draft = work_dir / "target", work_dir / "draft"
    if not target.exists():
        with tempfile.TemporaryDirectory() as folder:
            save_whole(target, lambda partial: convert(download_gguf(Path(folder)), partial))
    if not draft.exists():
        save_whole(draft, lambda partial: cut_layers(target, partial))
    return target, draft


def make_parallel_draft(work_dir: Path) -> Path:
    """Folder of the cut draft as one that drafts in parallel, with a comma for each token that is not known yet.

    It was not trained for that: what it drafts after a comma is accepted by chance.
    """
    draft, folder = make_pair(work_dir)[1], work_dir / "parallel"

    def build(partial: Path) -> None:
        for file in draft.iterdir():
            (partial / file.name).symlink_to(file.resolve())
        (partial / "config.json").unlink()
        config = AutoConfig.from_pretrained(draft)
        comma = AutoTokenizer.from_pretrained(draft).convert_tokens_to_ids(",")
        write_parallel_drafting(config, ParallelDrafting(comma, num_tokens=4))
        config.save_pretrained(partial)

    if not folder.exists():
        save_whole(folder, build)
    return folder


def save_whole(folder: Path, save) -> None:
    """Lets `save` write a folder beside `folder` and renames it, so that a killed run leaves no half of a model."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save(partial)
    os.replace(partial, folder)


def make_gguf_pair(work_dir: Path, dtype: str = "f32") -> tuple[Path, Path]:
    """GGUF files of target and draft in `work_dir`, in a type of `export_gguf`."""
    tools = find_tools()
    target, draft = (
        export_gguf(model, model.with_name(f"{model.name}-{dtype}.gguf"), llama_cpp_dir=tools, quantization=dtype)
        for model in make_pair(work_dir)
    )
    return target, draft


def make_narrow_draft(work_dir: Path, dtype: str = "f32") -> Path:
    """GGUF file of a draft with random weights that is a third as wide as the target, with four layers.

    It proposes nothing that is accepted, and costs what a trained draft of its shape costs.
    """
    folder = work_dir / "narrow"

    def build(partial: Path) -> None:
        sizes = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "head_dim": 64}
        config = AutoConfig.from_pretrained(work_dir / "target")
        config.update({**sizes, "num_attention_heads": 3, "num_key_value_heads": 1})
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(partial)
        AutoTokenizer.from_pretrained(work_dir / "target").save_pretrained(partial)

    if not folder.exists():
        save_whole(folder, build)
    output = work_dir / f"narrow-{dtype}.gguf"
    return export_gguf(folder, output, llama_cpp_dir=find_tools(), quantization=dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/serving"))
    for path in make_gguf_pair(parser.parse_args().work_dir):
        print(path)


if __name__ == "__main__":
    main()
