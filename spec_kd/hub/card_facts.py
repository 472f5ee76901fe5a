"""The facts that a draft's model card states, and the section of the card that is rendered from them."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from spec_kd.escaping import (
    escape_markdown,
    is_hub_id,
    make_code_block,
    make_code_span,
    make_public_name,
    make_table,
)
from spec_kd.serving import SERVING_ENGINES, serving_commands

FACTS_BEGIN, FACTS_END = "<!-- spec_kd: facts ", " -->"
NAMES = ("target_name", "dataset_name", "draft_name", "base_name")


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a model card states about a draft. Facts that are `None` are left out of the card.

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

    def __post_init__(self) -> None:
        for name in NAMES:
            value = getattr(self, name)
            object.__setattr__(self, name, make_public_name(str(value)) if value else None)
        for name in ("metrics", "metrics_before"):
            found = getattr(self, name) or {}
            object.__setattr__(self, name, {key.removeprefix("eval_"): float(value) for key, value in found.items()})

    def write(self) -> str:
        """The facts as JSON in an HTML comment, which [`read`] reads back from a card."""
        values = {name: value for name, value in asdict(self).items() if value not in (None, {})}
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
            facts.render(is_adapter=False)  # fails for values of other types, because anybody can edit a card
            return facts
        except (ValueError, TypeError, AttributeError):
            return None

    def render(self, is_adapter: bool) -> str:
        """The section of the card, in Markdown.

        Args:
            is_adapter (`bool`): Whether the draft is saved as a LoRA adapter.
        """
        at = "" if self.temperature is None else f" at temperature {self.temperature:g}"
        parts = (
            self._describe(),
            "## Draft model for speculative decoding",
            "The draft proposes tokens that the target then checks. This changes the speed of the target, and not its "
            "output.",
            f"The loss is the {make_code_span(self.divergence)} divergence{at}." if self.divergence else "",
            self._tabulate(),
            self._show_usage(is_adapter),
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
        data = make_code_span(self.dataset_name) if self.dataset_name else None
        where = f"Measured on {data or 'the evaluation prompts of the training run'}."
        before, header = self.metrics_before, ["metric", "before", "after"]
        rows = [
            [
                make_code_span(name, in_table=True),
                *([f"{before[name]:.4g}" if name in before else "–"] if before else []),
                f"{value:.4g}",
            ]
            for name, value in self.metrics.items()
        ]
        return "\n".join([where, "", *make_table(header if before else ["metric", "value"], rows)])

    def _show_usage(self, is_adapter: bool) -> str:
        commands = serving_commands(self.draft_name or "DRAFT", self.target_name or "TARGET", self.num_assistant_tokens)
        parts = ["### Usage", "With transformers, in assisted generation:"]
        if is_adapter:
            parts.insert(
                1,
                "This repository holds a LoRA adapter. Servers need a model without an adapter: merge the adapter with "
                "`spec_kd.export_draft(draft, output_dir)`.",
            )
        parts += [
            make_code_block(commands.pop("transformers"), "python"),
            "### Serving",
            "These commands follow the documentation of each engine, and were not run for this card. How many draft "
            "tokens are accepted depends on the sampling settings of the server.",
        ]
        for engine, command in commands.items():
            parts += [f"{engine}:", make_code_block(command, SERVING_ENGINES[engine].command_language)]
        return "\n\n".join(parts)


def _link(name: str, address: str) -> str:
    return f"[{name}]({address}{name})" if "/" in name and is_hub_id(name) else make_code_span(name)
