"""What a draft's model card says, by public names, and its section as Markdown."""

import json
import math
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
    """What is known of a draft. Names become public ones, without folders of a machine.

    Args:
        method (`str`, *optional*): How the draft was trained, for instance `"white-box distillation"`.
        target_name (`str`, *optional*): Folder or Hub id of the target.
        divergence (`str`, *optional*): Loss of the distillation.
        temperature (`float`, *optional*): Temperature in the loss.
        metrics (`dict[str, float]`, *optional*): Measured after training; an `eval_` before a name is dropped.
        metrics_before (`dict[str, float]`, *optional*): The same before training.
        dataset_name (`str`, *optional*): What it was trained and measured on.
        draft_name (`str`, *optional*): Folder or Hub id of the draft.
        base_name (`str`, *optional*): Folder or Hub id of the model that training began with.
        num_assistant_tokens (`int`, *optional*, defaults to `5`): Tokens drafted in a round, in the commands.
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
        """The facts in a comment, from which the section can be written again."""
        values = {name: value for name, value in asdict(self).items() if value not in (None, {})}
        text = json.dumps(values)
        for character in "-<>":  # of what ends the comment, or would begin another one
            text = text.replace(character, f"\\u{ord(character):04x}")
        return FACTS_BEGIN + text + FACTS_END

    @classmethod
    def read(cls, text: str) -> "CardFacts | None":
        """What [`write`] left in a card; `None` where there is nothing that can be read."""
        _, begin, rest = text.partition(FACTS_BEGIN)
        if not begin:
            return None
        known = {field.name for field in fields(cls)}
        try:
            values = json.loads(rest.partition(FACTS_END)[0])
            facts = cls(**{name: value for name, value in values.items() if name in known})
            facts.render(is_adapter=False)  # a card may be anybody's
            return facts
        except (ValueError, TypeError, AttributeError):
            return None

    def render(self, is_adapter: bool) -> str:
        """The section of the card.

        Args:
            is_adapter (`bool`): Whether the folder holds a LoRA adapter.
        """
        parts = (
            self._describe(),
            "## Draft model for speculative decoding",
            "It proposes tokens that the target then checks, which changes the speed of the target and not its output.",
            _describe_loss(self.divergence, self.temperature),
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
                "This folder holds a LoRA adapter. Servers take one model without an adapter: write it with "
                "`spec_kd.export_draft(draft, output_dir)`.",
            )
        parts += [
            make_code_block(commands.pop("transformers"), "python"),
            "### Serving",
            "These commands follow the documentation of each engine. They were not run when this card was written, and "
            "acceptance depends on the sampling settings of the server.",
        ]
        for engine, command in commands.items():
            parts += [f"{engine}:", make_code_block(command, SERVING_ENGINES[engine].command_language)]
        return "\n\n".join(parts)


def find_finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that are numbers, for a model index."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _describe_loss(divergence: str | None, temperature: float | None) -> str:
    if not divergence:
        return ""
    at = f" at temperature {temperature:g}" if temperature is not None else ""
    return f"The loss is the {make_code_span(divergence)} divergence{at}."


def _link(name: str, address: str) -> str:
    return f"[{name}]({address}{name})" if "/" in name and is_hub_id(name) else make_code_span(name)
