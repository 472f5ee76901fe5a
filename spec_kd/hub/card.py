"""A draft's model card: which target it drafts for, how well, and how to serve it."""

import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from spec_kd.escaping import escape_markdown, is_hub_id, make_public_name
from spec_kd.hub.card_facts import FACTS_BEGIN, CardFacts
from spec_kd.model_folders import ADAPTER_CONFIG
from spec_kd.open_types import JsonValue

TAGS = ("speculative-decoding", "draft-model", "spec_kd")
BEGIN, END = "<!-- spec_kd: begin -->", "<!-- spec_kd: end -->"
# Parts of TRL's card that are about a chat model, and the placeholder in PEFT's empty card.
TRL_OPENING = re.compile(
    r"^This model is a fine-tuned version of .*?\nIt has been trained using \[TRL\][^\n]*\n", re.M | re.S
)
TRL_USAGE = re.compile(r"^## Quick start\n.*?(?=^## |\Z)", re.M | re.S)
PEFT_BLANK = "[More Information Needed]"
ADAPTER_TAGS = ("lora", "peft")


def extend_model_card(path: str | os.PathLike[str], facts: CardFacts) -> None:
    """Turns the card that `Trainer.create_model_card` wrote into the card of a draft.

    A section about the draft replaces TRL's opening and its quick start for chat models. It stands between two markers,
    and the next call replaces it, because trainers write the card at every checkpoint. Tags and a model index are added
    to the metadata, and names that are no Hub ids (such as a local `base_model`) are removed from it.

    Args:
        path (`str` or `os.PathLike`): The `README.md` or its folder; a card is created if there is none.
        facts ([`CardFacts`]):
            What the card says. By default `draft_name` is the model name in the card or the name of the folder, and
            `base_name` is the `base_model` of the card.
    """
    path = Path(path)
    path = path / "README.md" if path.is_dir() else path
    card = _load(path)
    data = _get_data(card)
    base = data.base_model if isinstance(data.base_model, str) else None
    name = facts.draft_name or data.model_name or path.resolve().parent.name
    _save(card, path, replace(facts, draft_name=name, base_name=facts.base_name or base))


def carry_model_card(
    source: str | os.PathLike[str] | None, output_dir: str | os.PathLike[str], *, keep_name: bool = False
) -> None:
    """Writes the card of an exported draft, from the facts in its earlier card if there is one.

    A card in `output_dir` that a person wrote is kept; only paths that PEFT adds to its metadata are removed.

    Args:
        source (`str` or `os.PathLike`, *optional*): Folder from which the draft was loaded; `None` if it was not.
        output_dir (`str` or `os.PathLike`): Folder to which the draft was exported.
        keep_name (`bool`, *optional*, defaults to `False`):
            Whether a draft without a Hub id keeps its name. By default it gets the name of `output_dir`.
    """
    path = Path(output_dir) / "README.md"
    if path.is_file() and not is_generated(path):
        remove_paths(path)
        return
    card, facts = _load(path), None
    for folder in (output_dir, source):
        if facts is None and folder is not None and (Path(folder) / "README.md").is_file():
            found = _load(Path(folder) / "README.md")
            facts = CardFacts.read(found.text)
            card = card if facts is None else found
    facts = facts or CardFacts(draft_name=_get_data(card).model_name)
    if not keep_name and not _is_id(facts.draft_name):
        facts = replace(facts, draft_name=path.resolve().parent.name)
        _get_data(card).model_name = facts.draft_name
    _save(card, path, facts)


def is_generated(path: Path) -> bool:
    """Whether a card was written by this package, TRL or PEFT, and not by a person."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return any(part in text for part in (BEGIN, FACTS_BEGIN, PEFT_BLANK)) or TRL_OPENING.search(text) is not None


def remove_paths(path: Path) -> None:
    """Removes local paths from the metadata of a card that a person wrote."""
    if not path.read_text(encoding="utf-8", errors="replace").startswith("---"):
        return
    card = ModelCard.load(path, ignore_metadata_errors=True)
    before = (card.data.base_model, card.data.tags)
    card.data.base_model = _keep_public(card.data.base_model)
    card.data.tags = [tag for tag in card.data.tags or [] if _is_public_tag(tag, is_adapter=True)] or None
    if before != (card.data.base_model, card.data.tags):
        card.save(path)


def _get_data(card: ModelCard) -> ModelCardData:
    return cast(ModelCardData, card.data)


def _load(path: Path) -> ModelCard:
    """The card in a file; a new one if there is none, or only PEFT's empty one."""
    if path.is_file():
        card = ModelCard.load(path, ignore_metadata_errors=True)
        if PEFT_BLANK not in card.text:
            return card
    name = make_public_name(path.resolve().parent)
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", model_name=name)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n# Model Card for {escape_markdown(name)}\n")


def _save(card: ModelCard, path: Path, facts: CardFacts) -> None:
    is_adapter = (path.parent / ADAPTER_CONFIG).exists()
    _set_metadata(_get_data(card), facts, is_adapter)
    section = f"{BEGIN}\n\n{facts.write()}\n\n{facts.render(is_adapter)}\n\n{END}"
    text = TRL_USAGE.sub("", TRL_OPENING.sub("", card.text))
    title = escape_markdown(_get_data(card).model_name or facts.draft_name or "")
    text = re.sub(r"^# Model Card for [^\n]*$", lambda _: f"# Model Card for {title}", text, count=1, flags=re.M)
    card.text = _replace_section(text, section)
    card.save(path)


def _set_metadata(data: ModelCardData, facts: CardFacts, is_adapter: bool) -> None:
    data.model_name = make_public_name(data.model_name or facts.draft_name or "")
    data.library_name = "peft" if is_adapter else "transformers"
    data.base_model = _keep_public(data.base_model) or (facts.base_name if _is_id(facts.base_name) else None)
    data.datasets = _keep_public(data.datasets)
    tags = [tag for tag in data.tags or [] if is_adapter or tag not in ADAPTER_TAGS]
    data.tags = list(dict.fromkeys([*(tag for tag in tags if _is_public_tag(tag, is_adapter)), *TAGS]))
    dataset = facts.dataset_name or "evaluation prompts of the training run"
    results = [
        EvalResult(
            task_type="text-generation",
            task_name="Speculative decoding",
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=name,
            metric_name=name,
            metric_value=value,
        )
        for name, value in (facts.metrics or {}).items()
        if math.isfinite(value)
    ]
    others = [old for old in data.eval_results or [] if not any(old.is_equal_except_value(r) for r in results)]
    data.eval_results = others + results or None


def _is_id(name: str | None) -> bool:
    return name is not None and is_hub_id(name) and "/" in name


def _keep_public(names: JsonValue) -> JsonValue:
    """A name, or the names of a list, that can be on the Hub; `None` in place of local paths."""
    if isinstance(names, list):
        return [name for name in names if _keep_public(name)] or None
    return names if isinstance(names, str) and is_hub_id(names) else None


def _is_public_tag(tag: str, is_adapter: bool) -> bool:
    kind, _, name = tag.rpartition(":")
    return not kind.startswith("base_model") or (is_adapter and is_hub_id(name))


def _replace_section(text: str, section: str) -> str:
    if BEGIN in text and END in text:
        head, rest = text.split(BEGIN, 1)
        return head + section + rest.rsplit(END, 1)[1]
    # Before TRL's section on the training procedure, or at the end.
    head, heading, rest = text.partition("## Training procedure")
    return f"{head.rstrip()}\n\n{section}\n" + (f"\n{heading}{rest}" if heading else "")
