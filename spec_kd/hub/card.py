"""A draft's model card: which target it drafts for, how well, and how to serve it."""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import EllipsisType
from typing import cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from spec_kd.escaping import escape_markdown, is_hub_id, make_code_block, make_code_span, make_public_name, make_table
from spec_kd.files import ADAPTER_CONFIG
from spec_kd.hub.serving_file import ServingFile, describe_serving, read_interval
from spec_kd.open_types import JsonObject, JsonValue
from spec_kd.reports.numbers import RATE_DIGITS, format_interval
from spec_kd.serving import SERVING_ENGINES, find_serving_engine, serving_commands

TAGS = ("speculative-decoding", "draft-model", "spec_kd")
BEGIN, END = "<!-- spec_kd: begin -->", "<!-- spec_kd: end -->"
FACTS_BEGIN, FACTS_END = "<!-- spec_kd: facts ", " -->"
# Expected metrics that a card shows, with what they are called there
EXPECTED = {"acceptance_rate": "acceptance rate", "block_efficiency": "tokens per target pass"}
NAMES = ("target_name", "dataset_name", "draft_name", "base_name")
# Parts of TRL's card that are about a chat model, and the placeholder in PEFT's empty card.
TRL_OPENING = re.compile(
    r"^This model is a fine-tuned version of .*?\nIt has been trained using \[TRL\][^\n]*\n", re.M | re.S
)
TRL_USAGE = re.compile(r"^## Quick start\n.*?(?=^## |\Z)", re.M | re.S)
PEFT_BLANK = "[More Information Needed]"
ADAPTER_TAGS = ("lora", "peft")


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a model card states about a draft. Facts that are `None`, their default, are left out of the card.

    Names that are paths are replaced by their last part, because a card is public.

    Args:
        method (`str`, *optional*): How the draft was trained, for instance `"white-box distillation"`.
        target_name (`str`, *optional*): Folder or Hub id of the target.
        divergence (`str`, *optional*): Name of the divergence that was minimized.
        temperature (`float`, *optional*): Temperature in the loss.
        metrics (`dict[str, float]`, *optional*): Metrics after training; a prefix `eval_` is removed from their names.
        metrics_before (`dict[str, float]`, *optional*): The same metrics before training, for a second column.
        dataset_name (`str`, *optional*): Folder or Hub id of the dataset for training and evaluation.
        draft_name (`str`, *optional*): Folder or Hub id of the draft.
        base_name (`str`, *optional*): Folder or Hub id of the model that training began with.
        num_assistant_tokens (`int`, *optional*, defaults to `5`):
            Number of tokens drafted in a round, for the commands in the card.
        serving_engines (`Sequence[str]`, *optional*, defaults to `()`): Engines that the draft was checked for.
        findings (`Sequence[dict]`, *optional*, defaults to `()`): What was found, as fields of [`ServingFinding`].
        expected (`Mapping`, *optional*, defaults to `{}`):
            Expected metrics by engine and setting, as in [`ServedDraft`][spec_kd.hub.serving_file.ServedDraft].
        gguf_files (`Sequence[str]`, *optional*, defaults to `()`): GGUF files of the repository.
        configurations (`Sequence[dict]`, *optional*, defaults to `()`):
            Recommended settings of an engine, as fields of [`~spec_kd.serving.configuration.EngineConfiguration`].
    """

    method: str | None = None
    target_name: str | None = None
    divergence: str | None = None
    temperature: float | None = None
    metrics: Mapping[str, float] | None = None
    metrics_before: Mapping[str, float] | None = None
    dataset_name: str | None = None
    draft_name: str | None = None
    base_name: str | None = None
    num_assistant_tokens: int = 5
    serving_engines: Sequence[str] = ()
    findings: Sequence[JsonObject] = ()
    expected: Mapping[str, Mapping[str, JsonObject]] = field(default_factory=dict)
    gguf_files: Sequence[str] = ()
    configurations: Sequence[JsonObject] = ()

    def __post_init__(self) -> None:
        for name in NAMES:
            value = getattr(self, name)
            object.__setattr__(self, name, make_public_name(str(value)) if value else None)
        for name in ("metrics", "metrics_before"):
            found = getattr(self, name) or {}
            object.__setattr__(self, name, {key.removeprefix("eval_"): float(value) for key, value in found.items()})

    def write(self) -> str:
        """The facts as JSON in an HTML comment, which [`read`] reads back from a card."""
        values = {name: value for name, value in asdict(self).items() if value not in (None, {}, (), [])}
        # Escaped, so that no name ends the comment or begins another one.
        escapes = {ord(character): f"\\u{ord(character):04x}" for character in "-<>"}
        return FACTS_BEGIN + json.dumps(values).translate(escapes) + FACTS_END

    @classmethod
    def read(cls, text: str) -> "CardFacts | None":
        """The facts that [`write`] wrote into the text of a card; `None` if there are none or they are damaged."""
        known = {field.name for field in fields(cls)}
        try:
            values = json.loads(text.partition(FACTS_BEGIN)[2].partition(FACTS_END)[0])
            facts = cls(**{name: value for name, value in values.items() if name in known})
            facts.render()  # fails for values of other types, because anybody can edit a card
            return facts
        except (ValueError, TypeError, AttributeError, KeyError):
            return None

    def render(self, is_adapter: bool = False, is_parallel: bool = False) -> str:
        """The section of the card, in Markdown.

        Args:
            is_adapter (`bool`, *optional*, defaults to `False`): Whether the draft is saved as a LoRA adapter.
            is_parallel (`bool`, *optional*, defaults to `False`): Whether it drafts several tokens in one pass.
        """
        at = "" if self.temperature is None else f" at temperature {self.temperature:g}"
        parts = (
            self._describe(),
            "## Draft model for speculative decoding",
            "The draft proposes tokens that the target then checks. This changes the speed of the target, and not its "
            "output.",
            f"The loss is the {make_code_span(self.divergence)} divergence{at}." if self.divergence else "",
            self._tabulate(),
            self._show_usage(is_adapter, is_parallel),
            self._show_expected(),
            self._show_configurations(is_parallel),
            self._show_findings(),
        )
        return "\n\n".join(part for part in parts if part)

    def _describe(self) -> str:
        target = make_code_span(self.target_name) if self.target_name else "its target"
        base = f" from {_link(self.base_name, 'https://huggingface.co/')}" if self.base_name else ""
        data = f" on {_link(self.dataset_name, 'https://huggingface.co/datasets/')}" if self.dataset_name else ""
        method = f" by {escape_markdown(self.method)}" if self.method else ""
        trained = f" It was trained{base}{data}{method}." if base or data or method else ""
        return f"This model drafts for {target} in speculative decoding.{trained}"

    def _tabulate(self) -> str:
        if not self.metrics:
            return ""
        data = make_code_span(self.dataset_name) if self.dataset_name else "the evaluation prompts of the training run"
        before, header = self.metrics_before, ["metric", "before", "after"]
        rows = [
            [
                make_code_span(name, in_table=True),
                *([f"{before[name]:.4g}" if name in before else "–"] if before else []),
                f"{value:.4g}",
            ]
            for name, value in self.metrics.items()
        ]
        return "\n".join([f"Measured on {data}.", "", *make_table(header if before else ["metric", "value"], rows)])

    def _show_usage(self, is_adapter: bool, is_parallel: bool) -> str:
        names = (self.draft_name or "DRAFT", self.target_name or "TARGET")
        commands = serving_commands(*names, self.num_assistant_tokens, is_parallel=is_parallel)
        snippet = commands.pop("transformers", None)
        note = (
            "This repository holds a LoRA adapter. Servers need a model without an adapter: merge the adapter with "
            "`spec_kd.export_draft(draft, output_dir)`."
        )
        parts = (
            "### Usage",
            *([note] if is_adapter else []),
            *(["With transformers, in assisted generation:", make_code_block(snippet, "python")] if snippet else []),
            "### Serving",
            "These commands follow the documentation of each engine, and were not run for this card. How many draft "
            "tokens are accepted depends on the sampling settings of the server.",
            *(
                f"{engine}:\n\n{make_code_block(command, SERVING_ENGINES[engine].command_language)}"
                for engine, command in commands.items()
            ),
        )
        return "\n\n".join(parts)

    def _show_expected(self) -> str:
        """Expected acceptance by engine, and the GGUF files; empty without either."""
        rows = [
            [
                escape_markdown(engine),
                escape_markdown(setting),
                *(format_interval(read_interval(metrics[name]), RATE_DIGITS) for name in EXPECTED),
            ]
            for engine, settings in self.expected.items()
            for name, expected in settings.items()
            for setting, metrics in {name: expected, **_name_left_out(name, expected)}.items()
        ]
        header = ["engine", "setting", *EXPECTED.values()]
        gguf = ", ".join(map(make_code_span, self.gguf_files))
        parts = (
            f"With {self.num_assistant_tokens} drafted tokens a round:" if rows else "",
            "\n".join(make_table(header, rows)) if rows else "",
            f"GGUF files: {gguf}." if gguf else "",
        )
        shown = [part for part in parts if part]
        return "\n\n".join(["### Expected when served", *shown]) if shown else ""

    def _show_configurations(self, is_parallel: bool) -> str:
        if not self.configurations:
            return ""
        parts = [
            "### Recommended configuration",
            "Chosen by the predicted speed-up of this draft at the costs of one machine, and not run for this card.",
        ]
        for one in self.configurations:
            engine = find_serving_engine(one["serving_engine"])
            names = (self.draft_name or "DRAFT", self.target_name or "TARGET")
            write = engine.find_writer(is_parallel) or engine.write_command
            command = write(*names, int(one["num_assistant_tokens"]), list(map(str, one["flags"])))
            parts += [
                f"{engine.title}, {escape_markdown(one['title'])}:",
                make_code_block(command, engine.command_language),
            ]
        return "\n\n".join(parts)

    def _show_findings(self) -> str:
        if not self.serving_engines:
            return ""
        engines = ", ".join(map(escape_markdown, self.serving_engines))
        lines = ["### Checks for serving", ""]
        if not self.findings:
            return "\n".join([*lines, f"`check_serving` found nothing against this draft in {engines}."])
        rows = [
            [
                escape_markdown(f"{found['engine']} {found['consequence']}"),
                escape_markdown(f"{found['what']} {found['effect']}"),
                escape_markdown(found["fix"]),
            ]
            for found in self.findings
        ]
        lines += [f"Of the pair with its target, by `check_serving` for {engines}:", ""]
        return "\n".join([*lines, *make_table(["engine", "finding", "fix"], rows)])


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
    path = Path(path) / "README.md" if Path(path).is_dir() else Path(path)
    card = _load(path)
    data = _get_data(card)
    base = data.base_model if isinstance(data.base_model, str) else None
    name = facts.draft_name or data.model_name or path.resolve().parent.name
    _save(card, path, replace(facts, draft_name=name, base_name=facts.base_name or base))


def carry_model_card(
    source: str | os.PathLike[str] | None,
    output_dir: str | os.PathLike[str],
    *,
    keep_name: bool = False,
    serving: ServingFile | EllipsisType | None = ...,
) -> None:
    """Writes the card of an exported draft, from the facts in its earlier card if there is one.

    A card in `output_dir` that a person wrote is kept; only paths that PEFT adds to its metadata are removed.

    Args:
        source (`str` or `os.PathLike`, *optional*): Folder from which the draft was loaded; `None` if it was not.
        output_dir (`str` or `os.PathLike`): Folder to which the draft was exported.
        keep_name (`bool`, *optional*, defaults to `False`):
            Whether a draft without a Hub id keeps its name. By default it gets the name of `output_dir`.
        serving (`ServingFile`, *optional*):
            What is known of serving this form of the draft, or `None` for nothing; by default what its card says.
    """
    path = Path(output_dir) / "README.md"
    if path.is_file() and not is_generated(path):
        remove_paths(path)
        return
    cards = [_load(Path(folder) / "README.md") for folder in (output_dir, source) if folder is not None]
    card = next((card for card in cards if CardFacts.read(card.text) is not None), cards[0])
    facts = CardFacts.read(card.text) or CardFacts(draft_name=_get_data(card).model_name)
    if serving is not ...:
        facts = replace(facts, **describe_serving(serving))
    if not keep_name and not _is_id(facts.draft_name):
        facts = replace(facts, draft_name=path.resolve().parent.name)
        _get_data(card).model_name = facts.draft_name
    _save(card, path, facts)


def _name_left_out(setting: str, expected: JsonObject) -> JsonObject:
    """Expected metrics without some responses, by the setting with the kind and its share."""
    shares = expected.get("left_out", {})
    return {
        f"{setting}, without {kind.replace('_', ' ')} responses ({shares[kind]:.1%})": metrics
        for kind, metrics in expected.get("without", {}).items()
    }


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
    from spec_kd.parallel import is_parallel_draft

    is_adapter = (path.parent / ADAPTER_CONFIG).exists()
    _set_metadata(_get_data(card), facts, is_adapter)
    section = facts.render(is_adapter, is_parallel_draft(path.parent))
    section = f"{BEGIN}\n\n{facts.write()}\n\n{section}\n\n{END}"
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


def _link(name: str, address: str) -> str:
    return f"[{name}]({address}{name})" if "/" in name and is_hub_id(name) else make_code_span(name)
