"""The report of one draft at one setting, from what was scored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from datasets import Dataset

from spec_kd.evaluation.breakdowns import (
    break_down_by_class,
    break_down_by_column,
    break_down_by_entropy,
    break_down_by_position,
)
from spec_kd.evaluation.cost import ServingCosts
from spec_kd.evaluation.metrics import AcceptanceMetrics, Interval
from spec_kd.evaluation.options import EvaluationOptions
from spec_kd.evaluation.report.content import AssistedReport, GammaReport, SettingReport, ShownPrompt
from spec_kd.evaluation.response_replay import ResponseScores
from spec_kd.evaluation.token_classes import classify_tokens, split_into_pieces
from spec_kd.vocabulary import ProcessingClass, get_tokenizer


@dataclass(frozen=True)
class ResponseDescription:
    """What the responses at one temperature are made of, whichever draft reads them.

    Args:
        prompt_ids (`list[list[int]]`): Ids of each prompt.
        pieces (`list[list[str]]`): Text of every completion token.
        classes (`list[list[str]]`): Class of every completion token.
        columns (`dict[str, list]`): Values of the prompts to group by, by column.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): The target's.
    """

    prompt_ids: list[list[int]]
    pieces: list[list[str]]
    classes: list[list[str]]
    columns: dict[str, list[object]]
    processing_class: ProcessingClass

    @classmethod
    def of(cls, rows: Dataset, processing_class: ProcessingClass, group_by: Sequence[str]) -> "ResponseDescription":
        """Reads it from a set of responses."""
        specials = get_tokenizer(processing_class).all_special_tokens
        pieces = [split_into_pieces(ids, processing_class) for ids in rows["completion_ids"]]
        classes = [classify_tokens(row, specials) for row in pieces]
        columns = {name: rows[name][:] for name in group_by}
        return cls(rows["prompt_ids"][:], pieces, classes, columns, processing_class)

    def show(self, row: int, scores: ResponseScores, metrics: AcceptanceMetrics, show_prompt_text: bool) -> ShownPrompt:
        """One prompt and its completion, token by token."""
        prompt = "(not shown)"
        if show_prompt_text:
            tokenizer = get_tokenizer(self.processing_class)
            prompt = cast(str, tokenizer.decode(self.prompt_ids[row], skip_special_tokens=False))
        return ShownPrompt(
            row=row,
            prompt=prompt,
            tokens=self.pieces[row],
            acceptance=[round(a, 4) for a in scores.acceptance[row, : len(self.pieces[row])].tolist()],
            block_efficiency=float(metrics.tokens[row] / metrics.target_calls[row]),
        )


def describe_setting(
    name: str,
    scores: ResponseScores,
    by_gamma: Mapping[int, AcceptanceMetrics],
    options: EvaluationOptions,
    costs: Sequence[ServingCosts],
    responses: ResponseDescription,
    assisted: AssistedReport | None,
) -> SettingReport:
    """Puts together what [`SettingReport`] holds.

    Args:
        name (`str`): Name of the setting.
        scores (`ResponseScores`): Scores of the draft on the responses.
        by_gamma (`Mapping[int, AcceptanceMetrics]`): Their replay, by number of drafted tokens.
        options (`EvaluationOptions`): What is reported.
        costs (`Sequence[ServingCosts]`): Known costs; a prediction is made for each, as far as its gammas go.
        responses (`ResponseDescription`): What the same responses are made of.
        assisted (`AssistedReport`, *optional*): The cross-check.
    """
    headline = by_gamma[options.num_assistant_tokens]
    gamma_reports = [_describe_gamma(gamma, metrics, costs) for gamma, metrics in by_gamma.items()]
    best: dict[str, int] = {}
    for cost in costs:
        key = str(cost.batch_size)
        known = [report for report in gamma_reports if key in report.predicted_speedup]
        if known:
            best[key] = max(known, key=lambda report: report.predicted_speedup[key].value).num_assistant_tokens
    breakdowns = [
        break_down_by_class(scores, responses.classes),
        break_down_by_position(scores),
        break_down_by_entropy(scores),
        *(break_down_by_column(scores, headline, values, column) for column, values in responses.columns.items()),
    ]
    worst = np.argsort(headline.tokens / headline.target_calls, kind="stable")[: options.num_shown_prompts]
    return SettingReport(
        name=name,
        temperature=scores.temperature,
        draft_sampling=scores.draft_sampling,
        prompts=len(scores.lengths),
        tokens=int(scores.lengths.sum()),
        alpha=cast(Interval, headline.alpha),
        alpha_kind="exact" if scores.has_exact_alpha else "estimate",
        alpha_bounds=scores.alpha_bounds,
        by_gamma=gamma_reports,
        acceptance_rate_per_position=headline.acceptance_rate_per_position,
        best_gamma=best,
        break_even_alpha={str(cost.batch_size): cost.find_break_even_alpha(max(by_gamma)) for cost in costs},
        breakdowns=[breakdown for breakdown in breakdowns if breakdown is not None],
        worst=[responses.show(int(row), scores, headline, options.show_prompt_text) for row in worst],
        assisted=assisted,
    )


def _describe_gamma(gamma: int, metrics: AcceptanceMetrics, costs: Sequence[ServingCosts]) -> GammaReport:
    efficiency = metrics.block_efficiency
    return GammaReport(
        num_assistant_tokens=gamma,
        block_efficiency=efficiency,
        acceptance_rate=metrics.acceptance_rate,
        predicted_speedup={
            str(cost.batch_size): Interval(*(cost.predict_speedup(value, gamma) for value in efficiency))
            for cost in costs
            if gamma <= cost.max_gamma
        },
    )
