"""The report of one draft at one setting, with alpha by position, by the target's entropy, by class and by column."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import cast

import numpy as np
from datasets import Dataset

from spec_kd.evaluation.cost import ServingCosts
from spec_kd.evaluation.metrics import AcceptanceMetrics, Interval, bootstrap_ratio
from spec_kd.evaluation.options import EvaluationOptions
from spec_kd.evaluation.report.content import (
    AssistedReport,
    Breakdown,
    BreakdownRow,
    GammaReport,
    SettingReport,
    ShownPrompt,
)
from spec_kd.evaluation.response_replay import ResponseScores
from spec_kd.evaluation.token_classes import classify_tokens, split_into_pieces
from spec_kd.open_types import Array
from spec_kd.vocabulary import ProcessingClass, get_tokenizer

POSITION_EDGES = (0, 1, 4, 16, 64, 256, 1024)
ENTROPY_EDGES = (0.0, 0.01, 0.1, 0.5, 1.0, 2.0)


class ResponseDescription:
    """Tokens, classes and columns of the responses at one temperature, the same for every draft.

    Args:
        rows (`Dataset`): The responses.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): The target's.
        group_by (`Sequence[str]`): Columns of the prompts to group by.

    Attributes:
        pieces (`list[list[str]]`): Text of every completion token.
        classes (`list[list[str]]`): Class of every completion token.
        columns (`dict[str, list]`): Values of the prompts to group by, by column.
    """

    def __init__(self, rows: Dataset, processing_class: ProcessingClass, group_by: Sequence[str]):
        self._prompt_ids, self._tokenizer = rows["prompt_ids"][:], get_tokenizer(processing_class)
        specials = self._tokenizer.all_special_tokens
        self.pieces = [split_into_pieces(ids, processing_class) for ids in rows["completion_ids"]]
        self.classes = [classify_tokens(row, specials) for row in self.pieces]
        self.columns: dict[str, list[object]] = {name: rows[name][:] for name in group_by}

    def show(self, row: int, scores: ResponseScores, metrics: AcceptanceMetrics, show_prompt_text: bool) -> ShownPrompt:
        """One prompt and its completion, token by token."""
        text = cast(str, self._tokenizer.decode(self._prompt_ids[row], skip_special_tokens=False))
        return ShownPrompt(
            row=row,
            prompt=text if show_prompt_text else "(not shown)",
            tokens=self.pieces[row],
            acceptance=[round(a, 4) for a in scores.acceptance[row, : len(self.pieces[row])].tolist()],
            block_efficiency=float(metrics.block_efficiency_by_prompt[row]),
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
    """Fills a [`SettingReport`].

    Args:
        name (`str`): Name of the setting.
        scores (`ResponseScores`): Scores of the draft on the responses.
        by_gamma (`Mapping[int, AcceptanceMetrics]`): Their replay, by number of drafted tokens.
        options (`EvaluationOptions`): Options of the report.
        costs (`Sequence[ServingCosts]`): Known costs, each of which predicts a speed-up up to its highest gamma.
        responses (`ResponseDescription`): Description of the same responses.
        assisted (`AssistedReport`, *optional*): Real assisted generation, if it was run.
    """
    headline = by_gamma[options.num_assistant_tokens]
    gamma_reports = [_describe_gamma(gamma, metrics, costs) for gamma, metrics in by_gamma.items()]
    speedups = {
        size: {
            one.num_assistant_tokens: one.predicted_speedup[size].value
            for one in gamma_reports
            if size in one.predicted_speedup
        }
        for size in (str(cost.batch_size) for cost in costs)
    }
    breakdowns = [
        break_down_by_class(scores, responses.classes),
        break_down_by_position(scores),
        break_down_by_drafted_token(by_gamma[max(by_gamma)]),
        break_down_by_entropy(scores),
        *(break_down_by_column(scores, headline, values, column) for column, values in responses.columns.items()),
    ]
    worst = np.argsort(headline.block_efficiency_by_prompt, kind="stable")[: options.num_shown_prompts]
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
        best_gamma={size: max(known, key=known.__getitem__) for size, known in speedups.items() if known},
        break_even_alpha={str(cost.batch_size): cost.find_break_even_alpha(max(by_gamma)) for cost in costs},
        breakdowns=[breakdown for breakdown in breakdowns if breakdown is not None],
        worst=[responses.show(int(row), scores, headline, options.show_prompt_text) for row in worst],
        assisted=assisted,
        left_out=headline.left_out,
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
        without={
            kind: _describe_gamma(gamma, replace(metrics.select(~mask), kinds={}), costs)
            for kind, mask in metrics.kinds.items()
            if mask.any() and not mask.all()
        },
    )


def break_down_by_position(scores: ResponseScores) -> Breakdown:
    """Alpha by how far into the completion a token stands."""
    positions = np.broadcast_to(np.arange(scores.acceptance.shape[1]), scores.acceptance.shape)
    groups = np.digitize(positions, POSITION_EDGES) - 1
    ends = [*POSITION_EDGES[1:], None]
    labels = [_name_range(start, end) for start, end in zip(POSITION_EDGES, ends, strict=True)]
    return Breakdown(title="token of the completion", rows=_make_rows(scores, groups, labels))


def break_down_by_drafted_token(metrics: AcceptanceMetrics) -> Breakdown | None:
    """Alpha of each token of a round of a parallel draft; `None` for another draft."""
    if metrics.alpha_tokens_by_position is None:
        return None
    columns = zip(metrics.alpha_per_position, metrics.alpha_tokens_by_position.T, strict=True)
    rows = [
        BreakdownRow(
            label=str(k),
            prompts=int((counts > 0).sum()),
            tokens=int(counts.sum()),
            alpha=alpha,
            block_efficiency=None,
        )
        for k, (alpha, counts) in enumerate(columns, start=1)
        if counts.any()
    ]
    return Breakdown(title="token of the round", rows=rows)


def _name_range(start: int, end: int | None) -> str:
    """Name of positions that count from 0, in numbers that count from 1."""
    if end is None:
        return f"{start + 1} and later"
    return "first" if end == 1 else f"{start + 1} to {end}"


def break_down_by_entropy(scores: ResponseScores) -> Breakdown | None:
    """Alpha by the entropy of the target's distribution, in nats; `None` where it was not measured."""
    if "target_entropy" not in scores.values:
        return None
    groups = np.digitize(scores.values["target_entropy"].numpy(), ENTROPY_EDGES[1:])
    labels = [f"{low:g} to {high:g} nats" for low, high in pairwise(ENTROPY_EDGES)]
    rows = _make_rows(scores, groups, [*labels, f"over {ENTROPY_EDGES[-1]:g} nats"])
    return Breakdown(title="entropy of the target", rows=rows)


def break_down_by_class(scores: ResponseScores, classes: Sequence[Sequence[str]]) -> Breakdown:
    """Alpha by the class of the token (`token_classes.classify_tokens`), most frequent first."""
    counts = Counter(name for row in classes for name in row)
    labels = sorted(counts, key=lambda name: (-counts[name], name))
    groups = np.full(scores.acceptance.shape, -1)
    for target, row in zip(groups, classes, strict=True):
        target[: len(row)] = [labels.index(name) for name in row]
    return Breakdown(title="class of the token", rows=_make_rows(scores, groups, labels))


def break_down_by_column(
    scores: ResponseScores, metrics: AcceptanceMetrics, values: Sequence[object], name: str
) -> Breakdown:
    """Alpha and block efficiency by a value of the prompts, such as their domain."""
    labels = sorted({str(value) for value in values})
    of_prompt = np.array([labels.index(str(value)) for value in values])
    groups = np.broadcast_to(of_prompt[:, None], scores.acceptance.shape)
    return Breakdown(title=name, rows=_make_rows(scores, groups, labels, metrics))


def _make_rows(
    scores: ResponseScores,
    groups: Array,
    labels: Sequence[str],
    metrics: AcceptanceMetrics | None = None,
) -> list[BreakdownRow]:
    """A row for each group that has tokens, with its block efficiency if there are `metrics`.

    `groups` is `(P, N)` and counts where a completion has a token. With `metrics` it is the same for all tokens of a
    prompt.
    """
    is_text = np.arange(groups.shape[1]) < scores.lengths.numpy()[:, None]  # (P, N)
    alpha = scores.values["alpha"].numpy()
    rows = []
    for index, label in enumerate(labels):
        is_in = is_text & (groups == index)
        tokens = is_in.sum(-1)  # (P,)
        has_any = tokens > 0
        if has_any.any():
            row = BreakdownRow(
                label=label,
                prompts=int(has_any.sum()),
                tokens=int(tokens.sum()),
                alpha=bootstrap_ratio((alpha * is_in).sum(-1)[has_any], tokens[has_any]),
                block_efficiency=None
                if metrics is None
                else bootstrap_ratio(metrics.tokens[has_any], metrics.target_calls[has_any]),
            )
            rows.append(row)
    return rows
