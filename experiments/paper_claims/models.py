"""The models of an experiment: built once from the conversations and cached, or those that a profile names.

tokenizer (all conversations that train a target) -> generic target (general set)
    -> a domain target each: full fine-tuning until its held-out loss has flattened
generic drafts: the general set alone
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.build_models import read_rows
from examples.made_up.language_model_training import Budget, encode_rows, train_language_model
from examples.made_up.models import build_llama, build_stage, build_tokenizer

from .data import read_domain
from .profile import Build, Names, Profile
from .record import Record, Workspace, compute_hash

TRAINING = "training.json"


def find_models(workspace: Workspace, domain: str) -> Names:
    """Paths of a domain's models; raises `FileNotFoundError` where they are still to be built."""
    profile = workspace.profile
    if profile.build is None:
        return profile.domains[domain].models
    folder, names = find_build_folder(workspace), name_models(profile)
    models = Names(
        generic_target=str(folder / names["generic_target"]),
        domain_target=str(folder / names[f"{domain}_target"]),
        drafts={name: str(folder / names[f"draft_{name}"]) for name in profile.build.drafts},
    )
    missing = [path for path in (models.generic_target, models.domain_target, *models.drafts.values())
               if not Path(path).exists()]  # fmt: skip
    if missing:
        raise FileNotFoundError(f"{missing[0]} is not built yet. Run the stage `targets` first.")
    return models


def find_build_folder(workspace: Workspace) -> Path:
    """Where built models are: a folder for what all of them share."""
    return workspace.folder / "models" / _compute_build_key(workspace.profile)


def _compute_build_key(profile: Profile) -> str:
    build, data = profile.build, profile.data
    shared = (build.vocab_size, build.max_length, build.num_held_out, build.seed)
    return compute_hash(*shared, data.folder, data.share_for_target, sorted(profile.domains))


def name_models(profile: Profile) -> dict[str, str]:
    """Folders of the models that are built, by name: other shapes or budgets are other folders."""
    build = profile.build
    generic = (build.target, build.generic_target)
    parts = {"generic_target": generic}
    parts |= {f"{d}_target": (*generic, build.domain_target, build.general_share) for d in profile.domains}
    parts |= {f"draft_{name}": (size, build.generic_draft) for name, size in build.drafts.items()}
    return {name: f"{name}_{compute_hash(*own)[:6]}" for name, own in parts.items()}


def list_model_lines(profile: Profile, record: Record) -> list[dict[str, Any]]:
    """Of the models that the profile builds, those that were built, each as often as it was."""
    if profile.build is None:
        return []
    keys = [f"{_compute_build_key(profile)}/{folder}" for folder in name_models(profile).values()]
    return [
        {**line, "name": line["name"] + describe_build(number)}
        for key in keys
        for number, line in enumerate(record.find_builds("model", key).values())
    ]


def describe_build(number: int) -> str:
    """The words after the name of a result whose models were built before, `number` times."""
    return f", build {number + 1}" if number else ""


def hash_weights(path: str) -> str:
    """16 hexadecimal digits of the weights in a folder; empty for a model of the Hub, which its name tells apart."""
    files = sorted(Path(path).glob("*.safetensors"))
    if not files:
        return ""
    digests = []
    for path_of_file in files:
        with path_of_file.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return compute_hash(*digests)


def build_all(workspace: Workspace, domains: list[str]) -> None:
    """Builds what is missing: the generic models and the targets of `domains`; puts each curve into the record."""
    profile, build = workspace.profile, workspace.profile.build
    if build is None:
        return
    folder, names = find_build_folder(workspace), name_models(profile)
    general = {split: read_rows(Path(profile.data.folder) / profile.data.general, split) for split in ("train", "test")}
    rows_of = {name: read_domain(profile, name) for name in profile.domains}
    everything = [*general["train"], *(row for rows in rows_of.values() for row in rows.target)]
    tokenizer_dir = build_stage(
        folder / "tokenizer", lambda path: build_tokenizer(everything, build.vocab_size).save_pretrained(path)
    )
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)

    def train(
        name: str, make: Callable[[], PreTrainedModel], rows: list[dict], held_out: list[dict], budget: Budget
    ) -> Path:
        def fill(path: Path) -> None:
            encoded, dropped = encode_rows(tokenizer, rows, build.max_length)
            tested, _ = encode_rows(tokenizer, held_out, build.max_length)
            model = make()
            record = train_language_model(
                model,
                encoded,
                tested[: build.num_held_out],
                budget,
                seed=build.seed,
                description=f"building {name}",
                checkpoint=folder / f".{names[name]}.pt",
            )
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
            record |= {"rows": len(encoded), "rows_too_long": dropped}
            (path / TRAINING).write_text(json.dumps(record, indent=1), encoding="utf-8")

        path = build_stage(folder / names[name], fill)
        key = f"{folder.name}/{path.name}"
        weights = hash_weights(str(path))
        if workspace.record.find("model", key, weights) is None:
            record = json.loads((path / TRAINING).read_text(encoding="utf-8"))
            workspace.record.append("model", key, build=weights, name=name, budget=asdict(budget), **record)
        return path

    def make_llama(size: Any, seed: int) -> Callable[[], PreTrainedModel]:
        return lambda: build_llama(size, tokenizer, build.max_length, seed)

    generic = train(
        "generic_target", make_llama(build.target, build.seed), general["train"], general["test"], build.generic_target
    )
    for name in domains:
        rows = rows_of[name]
        added = _count_general_rows(build, len(rows.target))
        train(
            f"{name}_target",
            lambda: AutoModelForCausalLM.from_pretrained(generic, dtype=torch.float32),
            rows.target + general["train"][:added],
            rows.held_out,
            build.domain_target,
        )
    for number, (name, size) in enumerate(build.drafts.items(), start=1):
        make = make_llama(size, build.seed + number)
        train(f"draft_{name}", make, general["train"], general["test"], build.generic_draft)


def load_model(path: str, dtype: str = "float32") -> PreTrainedModel:
    """A model in eval mode, on the accelerator where there is one."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    return model.to(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else model


def _count_general_rows(build: Build, domain_rows: int) -> int:
    return int(domain_rows * build.general_share / (1 - build.general_share))


def count_parameters(profile: Profile, models: Names) -> dict[str, int]:
    """Parameters of the domain target and of every draft."""
    paths = {"target": models.domain_target, **models.drafts}
    return {
        name: AutoModelForCausalLM.from_pretrained(path, dtype="auto").num_parameters() for name, path in paths.items()
    }
