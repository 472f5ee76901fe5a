"""A draft's model card: for which target it drafts, how well, and how to serve it, in place of TRL's chat model."""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from spec_kd.escaping import escape_markdown, is_hub_id, make_public_name
from spec_kd.hub.card_facts import FACTS_BEGIN, CardFacts, find_finite
from spec_kd.model_folders import ADAPTER_CONFIG
from spec_kd.open_types import JsonValue

TAGS = ("speculative-decoding", "draft-model", "spec_kd")
BEGIN, END = "<!-- spec_kd: begin -->", "<!-- spec_kd: end -->"
# What TRL's card says of a chat model, and what PEFT's says of nothing.
TRL_OPENING = re.compile(
    r"^This model is a fine-tuned version of .*?\nIt has been trained using \[TRL\][^\n]*\n", re.M | re.S
)
TRL_USAGE = re.compile(r"^## Quick start\n.*?(?=^## |\Z)", re.M | re.S)
PEFT_BLANK = "[More Information Needed]"
ADAPTER_TAGS = ("lora", "peft")


def extend_model_card(
    path: str | os.PathLike[str],
    *,
    method: str | None = None,
    target_name: str | None = None,
    divergence: str | None = None,
    temperature: float | None = None,
    metrics: dict[str, float] | None = None,
    metrics_before: dict[str, float] | None = None,
    dataset_name: str | None = None,
    draft_name: str | None = None,
    base_name: str | None = None,
    num_assistant_tokens: int = 5,
) -> None:
    """Makes a draft's card of the one that `Trainer.create_model_card` wrote.

    Metadata (`base_model`, datasets, ...) is kept where it names what is on the Hub, tags and a model-index are added,
    TRL's opening and its quick start of a chat model make room for a section between two markers, which the next call
    replaces: cards are rewritten at every checkpoint. Paths appear by their last name.

    Args:
        path (`str` or `os.PathLike`): The `README.md` or its folder; a card is started where there is none.
        method (`str`, *optional*): How the draft was trained, for instance `"white-box distillation"`.
        target_name (`str`, *optional*): Folder or Hub id of the target, where known.
        divergence (`str`, *optional*): Loss of the distillation.
        temperature (`float`, *optional*): Temperature in the loss.
        metrics (`dict[str, float]`, *optional*): Measured after training; an `eval_` before a name is dropped.
        metrics_before (`dict[str, float]`, *optional*): The same before training; makes the table before/after.
        dataset_name (`str`, *optional*): What it was trained and measured on.
        draft_name (`str`, *optional*): Hub id of the draft. Defaults to the model name in the card, or the folder's.
        base_name (`str`, *optional*): Folder or Hub id of the model that training began with.
        num_assistant_tokens (`int`, *optional*, defaults to `5`): Tokens drafted in a round, in the commands.
    """
    path = Path(path)
    path = path / "README.md" if path.is_dir() else path
    card = _load(path)
    base = _get_data(card).base_model
    facts = CardFacts(
        method=method,
        target_name=target_name,
        divergence=divergence,
        temperature=temperature,
        metrics=metrics,
        metrics_before=metrics_before,
        dataset_name=dataset_name,
        draft_name=draft_name or _get_data(card).model_name or path.resolve().parent.name,
        base_name=base_name or (base if isinstance(base, str) else None),
        num_assistant_tokens=num_assistant_tokens,
    )
    _save(card, path, facts)


def carry_model_card(
    source: str | os.PathLike[str] | None, output_dir: str | os.PathLike[str], *, keep_name: bool = False
) -> None:
    """Gives an exported draft the card that it had, or one of its own, for the form in which it is there.

    A card in `output_dir` that somebody wrote stays, without the paths that PEFT adds to it.

    Args:
        source (`str` or `os.PathLike`, *optional*): The folder that the draft is from, if it is from one.
        output_dir (`str` or `os.PathLike`): The folder that it was exported to.
        keep_name (`bool`, *optional*, defaults to `False`):
            Whether a draft that has no id on the Hub keeps its name, instead of being called by `output_dir`.
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
            card = found if facts is not None else card
    facts = facts or CardFacts(draft_name=_get_data(card).model_name)
    if not keep_name and not _is_id(facts.draft_name):
        facts = replace(facts, draft_name=path.resolve().parent.name)
        _get_data(card).model_name = facts.draft_name
    _save(card, path, facts)


def is_generated(path: Path) -> bool:
    """Whether a card is one of ours, TRL's or PEFT's, and no person's."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return any(part in text for part in (BEGIN, FACTS_BEGIN, PEFT_BLANK)) or TRL_OPENING.search(text) is not None


def remove_paths(path: Path) -> None:
    """Takes folders of this machine out of the metadata of a card that somebody wrote."""
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
    """The card of a file; a new one where there is none, or only PEFT's empty form."""
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
    results = [_make_result(*item, facts.dataset_name) for item in find_finite(facts.metrics or {}).items()]
    others = [old for old in data.eval_results or [] if not any(old.is_equal_except_value(r) for r in results)]
    data.eval_results = others + results or None


def _is_id(name: str | None) -> bool:
    return name is not None and is_hub_id(name) and "/" in name


def _keep_public(names: JsonValue) -> JsonValue:
    """Of one name or a list what is, or can be, on the Hub: a path here says nothing elsewhere."""
    if isinstance(names, list):
        return [name for name in names if _keep_public(name)] or None
    return names if isinstance(names, str) and is_hub_id(names) else None


def _is_public_tag(tag: str, is_adapter: bool) -> bool:
    kind, _, name = tag.rpartition(":")
    return not kind.startswith("base_model") or (is_adapter and is_hub_id(name))


def _make_result(name: str, value: float, dataset_name: str | None) -> EvalResult:
    dataset_name = dataset_name or "evaluation prompts of the training run"
    return EvalResult(
        task_type="text-generation",
        task_name="Speculative decoding",
        dataset_type=dataset_name,
        dataset_name=dataset_name,
        metric_type=name,
        metric_name=name,
        metric_value=value,
    )


def _replace_section(text: str, section: str) -> str:
    if BEGIN in text and END in text:
        head, rest = text.split(BEGIN, 1)
        return head + section + rest.rsplit(END, 1)[1]
    # before TRL's account of the training procedure, or at the end
    head, heading, rest = text.partition("## Training procedure")
    return f"{head.rstrip()}\n\n{section}\n" + (f"\n{heading}{rest}" if heading else "")
