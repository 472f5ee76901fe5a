"""What a draft's model card says beyond TRL's: for which target it drafts, how well, and how to serve it."""

import math
import os
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from spec_kd.hub.serving import serving_commands

TAGS = ("speculative-decoding", "draft-model", "spec_kd")
BEGIN, END = "<!-- spec_kd: begin -->", "<!-- spec_kd: end -->"


def extend_model_card(
    path: str | os.PathLike,
    *,
    method: str,
    target_name: str | None = None,
    divergence: str | None = None,
    temperature: float | None = None,
    metrics: dict[str, float] | None = None,
    metrics_before: dict[str, float] | None = None,
    dataset_name: str | None = None,
    draft_name: str | None = None,
    num_assistant_tokens: int = 5,
) -> None:
    """Adds the speculative-decoding part to the card that `Trainer.create_model_card` wrote.

    Metadata (`base_model`, datasets, ...) is kept, tags and a model-index are added, and one section is written between
    two markers, which the next call replaces: cards are rewritten at every checkpoint.

    Args:
        path (`str` or `os.PathLike`): The `README.md` or its folder; a card is started where there is none.
        method (`str`): How the draft was trained, for instance `"white-box distillation"`.
        target_name (`str`, *optional*): Folder or Hub id of the target, where known.
        divergence (`str`, *optional*): Loss of the distillation.
        temperature (`float`, *optional*): Temperature in the loss.
        metrics (`dict[str, float]`, *optional*): Measured after training; an `eval_` before a name is dropped.
        metrics_before (`dict[str, float]`, *optional*): The same before training; makes the table before/after.
        dataset_name (`str`, *optional*): What the metrics were measured on.
        draft_name (`str`, *optional*): Hub id of the draft. Defaults to the model name in the card, or the folder's.
        num_assistant_tokens (`int`): Tokens drafted in a round, in the commands.
    """
    path = Path(path)
    path = path / "README.md" if path.is_dir() else path
    folder = path.resolve().parent.name
    if path.exists():
        card = ModelCard.load(path)
    else:
        data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", model_name=folder)
        card = ModelCard(f"---\n{data}\n---\n\n# {draft_name or folder}\n")
    after, before = _drop_prefix(metrics), _drop_prefix(metrics_before)
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *TAGS]))
    card.data.model_name = card.data.model_name or folder
    if after:
        results = [_make_result(name, value, dataset_name) for name, value in after.items() if math.isfinite(value)]
        others = [old for old in card.data.eval_results or [] if not any(old.is_equal_except_value(r) for r in results)]
        card.data.eval_results = others + results
    draft_name = draft_name or card.data.model_name
    section = "\n\n".join(
        part
        for part in (
            BEGIN,
            "## Draft model for speculative decoding",
            _describe(method, target_name, divergence, temperature),
            _tabulate(before, after, dataset_name),
            _show_usage(draft_name, target_name, num_assistant_tokens),
            END,
        )
        if part
    )
    card.text = _replace_section(card.text, section)
    card.save(path)


def _drop_prefix(metrics: dict[str, float] | None) -> dict[str, float]:
    return {name.removeprefix("eval_"): float(value) for name, value in (metrics or {}).items()}


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


def _describe(method: str, target_name: str | None, divergence: str | None, temperature: float | None) -> str:
    loss = f" The loss is the `{divergence}` divergence" if divergence else ""
    loss += f" at temperature {temperature:g}" if loss and temperature is not None else ""
    target = f"`{target_name}`" if target_name else "its target"
    return (
        f"This model drafts for {target}: it proposes tokens that the target then checks, which changes the speed of "
        f"the target and not its output. It was trained by {method}." + (f"{loss}." if loss else "")
    )


def _tabulate(before: dict[str, float], after: dict[str, float], dataset_name: str | None) -> str:
    if not after:
        return ""
    where = f"Measured on {f'`{dataset_name}`' if dataset_name else 'the evaluation prompts of the training run'}."
    if before:
        lines = ["| metric | before | after |", "|---|---|---|"]
        lines += [
            f"| `{name}` | {f'{before[name]:.4g}' if name in before else '–'} | {value:.4g} |"
            for name, value in after.items()
        ]
    else:
        lines = ["| metric | value |", "|---|---|", *(f"| `{name}` | {value:.4g} |" for name, value in after.items())]
    return where + "\n\n" + "\n".join(lines)


def _show_usage(draft_name: str, target_name: str | None, num_assistant_tokens: int) -> str:
    commands = serving_commands(draft_name, target_name or "TARGET", num_assistant_tokens)
    parts = ["### Usage", f"```python\n{commands.pop('transformers')}\n```", "### Serving"]
    parts.append(
        "These commands follow the documentation of each engine. They were not run when this card was written, and "
        "acceptance depends on the sampling settings of the server."
    )
    for engine, command in commands.items():
        parts.append(f"{engine}:\n\n```{'python' if engine == 'tensorrt-llm' else 'bash'}\n{command}\n```")
    return "\n\n".join(parts)


def _replace_section(text: str, section: str) -> str:
    if BEGIN in text and END in text:
        head, rest = text.split(BEGIN, 1)
        return head + section + rest.split(END, 1)[1]
    # before TRL's account of the training procedure, or at the end
    head, heading, rest = text.partition("## Training procedure")
    return f"{head.rstrip()}\n\n{section}\n" + (f"\n{heading}{rest}" if heading else "")
