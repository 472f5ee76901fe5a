"""The sentences of an evaluation report: its headline and its glossary."""

from typing import cast

from spec_kd.evaluation.report.content import Comparison, EvaluationReport, GammaReport, SettingReport
from spec_kd.reports.numbers import format_bounds, format_interval, format_number, is_apart_from_zero

INTERVALS = "In brackets: 95 % bootstrap intervals over prompts."

GLOSSARY = {
    "alpha": "Expected acceptance of one drafted token, mean over the tokens of the target's completions.",
    "acceptance rate": "Accepted over drafted tokens, over all rounds.",
    "block efficiency": "Tokens emitted per target pass, the target's own token included; 1 is plain decoding.",
    "gamma": "Number of tokens drafted in a round (num_assistant_tokens).",
    "greedy, t1, t0.7, ...": "How the target samples: the most likely token, or temperature 1, 0.7, ...",
    "draft sampling": "Whether the draft samples too (stochastic) or always proposes its most likely token (greedy).",
    "cost ratio": "Time of a draft step over that of a target step.",
    "verify cost": "Time of a target pass over gamma + 1 tokens over that of a pass over one.",
    "predicted speed-up": "block efficiency / (gamma x cost ratio + verify cost + overhead of a round).",
    "break-even alpha": "Acceptance below which even the best gamma is no faster than plain decoding.",
    "replay": "Acceptance computed from one pass over the target's completions; nothing is generated.",
    "interval": "In brackets: 95 % bootstrap interval over prompts; that of a difference is paired.",
}


def describe_sampling(setting: SettingReport) -> str:
    """How the target and the draft are sampled there, in words that end a sentence."""
    if setting.temperature == 0:
        return "with greedy decoding"
    draft = " with a greedy draft" if setting.draft_sampling == "greedy" else ""
    draft = " with a sample that has to match" if setting.draft_sampling == "matching" else draft
    return f"at temperature {setting.temperature:g}{draft}"


def build_headline(report: EvaluationReport) -> str:
    """What a server gains, in a sentence or two, at the first setting of the draft that the report is about."""
    draft, gamma = report.draft, report.num_assistant_tokens
    setting = draft.settings[0]
    block_efficiency = setting.at_gamma(gamma).block_efficiency
    parts = [
        f"With “{draft.name}” a server drafting {gamma} token{'s' if gamma > 1 else ''} a round emits "
        f"{format_number(block_efficiency.value)} tokens per target pass {describe_sampling(setting)} "
        f"{format_bounds(block_efficiency)}"
    ]
    if setting.best_gamma:
        batch_size = "1" if "1" in setting.best_gamma else next(iter(setting.best_gamma))
        best = cast(GammaReport, setting.at_best_gamma(batch_size))
        speedup = best.predicted_speedup[batch_size].value
        parts.append(
            f"best gamma {best.num_assistant_tokens}, predicted speed-up {format_number(speedup)}x (batch {batch_size})"
            + (", slower than plain decoding" if speedup < 1 else "")
        )
    if setting.assisted is not None:
        parts.append(f"measured in assisted generation: {format_number(setting.assisted.speedup.value)}x")
    sentence = "; ".join(parts) + "."
    comparison = _find_headline_comparison(report, setting)
    if comparison is None:
        return sentence
    difference = comparison.difference
    verdict = {True: ", an interval that excludes 0", False: ", an interval that includes 0", None: ""}
    return (
        f"{sentence} Tokens per target pass against “{comparison.baseline}”: "
        f"{format_interval(difference, sign='+')}{verdict[is_apart_from_zero(difference)]}."
    )


def _find_headline_comparison(report: EvaluationReport, setting: SettingReport) -> Comparison | None:
    wanted = (setting.name, "block_efficiency", report.draft.name, report.drafts[0].name)
    for comparison in report.comparisons:
        if (comparison.setting, comparison.metric, comparison.draft, comparison.baseline) == wanted:
            return comparison
    return None
