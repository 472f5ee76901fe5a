"""Sets what a server did beside what replay predicts on the very tokens that it wrote."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import NamedTuple, cast

import numpy as np
from transformers import PreTrainedModel

from spec_kd.evaluation.cost import ServingCosts
from spec_kd.evaluation.metrics import AcceptanceMetrics, Interval, bootstrap, bootstrap_median, name_temperature
from spec_kd.evaluation.observation.records import Observation
from spec_kd.evaluation.options import ReplayOptions
from spec_kd.evaluation.recommendations import Way
from spec_kd.evaluation.report.content import EvaluationReport
from spec_kd.evaluation.report.observed import HEADLINE, ObservedMetric, ObservedPrompt, ObservedReport
from spec_kd.evaluation.report.recommended import THRESHOLD
from spec_kd.evaluation.response_replay import replay
from spec_kd.loading import load_model
from spec_kd.open_types import Array, Record
from spec_kd.serving import find_serving_engine
from spec_kd.vocabulary import ProcessingClass

NAN = float("nan")
Model = PreTrainedModel | str


class _Metric(NamedTuple):
    """A metric with the sums over prompts whose ratio it is, which give paired intervals; `None` without them."""

    value: Interval
    numerator: Array | None = None
    denominator: Array | None = None


def describe_observation(observation: Observation, processing_class: ProcessingClass | None = None) -> ObservedReport:
    """What a server did, as a report without predictions; see [`compare_observed`].

    Args:
        observation (`Observation`): What the server did.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            The target's, which tells which prompts lack the chat template.
    """
    return _describe(observation, None, {}, [], processing_class)


def compare_observed(
    observation: Observation,
    draft: Model,
    target: Model | None,
    *,
    responses: Iterable[Record] | None = None,
    report: EvaluationReport | None = None,
    num_assistant_tokens: int | None = None,
    draft_sampling: str | None = None,
    processing_class: ProcessingClass | None = None,
    costs: Sequence[ServingCosts] = (),
    batch_size: int = 8,
    show_progress: bool = True,
) -> ObservedReport:
    """Sets what a server did beside what [`~spec_kd.replay`] predicts on the very tokens that it wrote.

    With greedy drafts, and with greedy decoding, the text decides which drafts are accepted, so the two are equal
    prompt by prompt, but for float rounding. (vLLM also counts tokens that are accepted after the end of a text; at
    temperatures above 0 these are known in expectation only.) What is left of a difference is of precision.

    With `responses` or `report`, the difference between the server and an earlier prediction is split: the part that
    comes from other tokens (length, chat template, sampling), and the part on the same tokens.

    Args:
        observation (`Observation`): What the server did.
        draft (`PreTrainedModel` or `str`): The draft that the server has, best in float32, or its path or Hub id.
        target (`PreTrainedModel` or `str`, *optional*):
            The target. `None` is enough for greedy decoding, unless the engine counts tokens after the end of a text.
        responses (`Dataset` or iterable of dicts, *optional*):
            Own responses to the same prompts in the same order, with `prompt_ids` and `completion_ids`.
        report (`EvaluationReport`, *optional*): An earlier evaluation for the same engine.
        num_assistant_tokens (`int`, *optional*): Tokens drafted in a round; by default what the server told.
        draft_sampling (`str`, *optional*): How the server drafts; the rule of its engine by default.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            The target's. It is needed if the server held completions to a JSON schema or a grammar, and tells which
            prompts lack the chat template.
        costs (`Sequence[ServingCosts]`, *optional*, defaults to `()`):
            Costs of a round in this engine, from which replay predicts the speed-up of each prompt.
        batch_size (`int`, *optional*, defaults to `8`): Number of responses that a model reads at a time.
        show_progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        [`ObservedReport`]; `report.with_observed(...)` adds it to an evaluation, [`~spec_kd.save_observed`] writes it.

    Raises:
        ValueError: The number of drafted tokens is unknown, or `report`, `responses` or `costs` do not fit the
            observation.
    """
    gamma = num_assistant_tokens or observation.num_assistant_tokens
    if gamma is None:
        raise ValueError("The server did not tell how many tokens it drafts in a round. Pass `num_assistant_tokens`.")
    priced = _find_costs(observation, costs, gamma)
    own = None if responses is None else list(responses)
    if own is not None and len(own) != len(observation.prompt_ids):
        raise ValueError(
            f"There are {len(own)} `responses` and {len(observation.prompt_ids)} prompts. Pass one for each, in order."
        )
    earlier, notes = _find_earlier(observation, report, gamma)
    options = ReplayOptions(
        temperature=observation.temperature,
        max_new_tokens=observation.max_new_tokens,
        serving_engine=observation.serving_engine,
        draft_sampling=draft_sampling,
        assistant_confidence_threshold=observation.assistant_confidence_threshold,
        batch_size=batch_size,
    )
    models = [cast(PreTrainedModel, load_model(one)) if isinstance(one, str) else one for one in (draft, target)]

    def predict(rows: Sequence[Record]) -> AcceptanceMetrics:
        draft, target = cast(PreTrainedModel, models[0]), models[1]
        return replay(
            draft,
            target,
            rows,
            options,
            num_assistant_tokens=gamma,
            processing_class=processing_class,
            show_progress=show_progress,
        )

    predicted = predict(observation.list_responses())
    if own is not None:
        used = [own[request.row] for request in observation.requests]
        earlier = _list_headline(predict(used))
        notes += _describe_texts(observation, used)
    if observation.assistant_confidence_threshold:
        notes.append(
            "How many tokens a draft has after a refused one is not known where drafts end early. The predicted number "
            "of drafted tokens is the least, and the predicted speed-up lies in the middle of what they can cost."
        )
    speedup = None if priced is None else _predict_speedup(predicted, priced, observation)
    described = _describe(observation, predicted, earlier, notes, processing_class, gamma)
    return replace(described, predicted_speedup=speedup)


def _find_costs(observation: Observation, costs: Sequence[ServingCosts], gamma: int) -> ServingCosts | None:
    """The costs at as many requests at a time; `None` without any."""
    found = [one for one in costs if one.batch_size == observation.concurrency and gamma <= one.max_gamma]
    if costs and not found:
        known = ", ".join(f"{one.batch_size} at a time up to {one.max_gamma} drafted tokens" for one in costs)
        raise ValueError(
            f"`costs` are of {known}, but the server had {observation.concurrency} at a time with {gamma} drafted "
            "tokens. Measure these, or leave `costs` out."
        )
    return found[0] if found else None


def _predict_speedup(predicted: AcceptanceMetrics, costs: ServingCosts, observation: Observation) -> Interval:
    """Median over prompts, as the observed speed-up; prompts that the first pass completes have none."""
    predicted = predicted.select(predicted.target_calls > 0)
    gamma, target_calls = predicted.num_assistant_tokens, predicted.target_calls
    if not len(target_calls):
        return Interval(NAN, NAN, NAN)
    early_end = find_serving_engine(observation.serving_engine).early_end
    if observation.assistant_confidence_threshold and early_end is not None:
        drafts = cast(Array, predicted.known_drafts), cast(Array, predicted.open_drafts)
        way = Way(THRESHOLD, gamma, target_calls, *drafts, keeps_token=early_end.keeps_token)
        price = sum(way.price(costs)) / 2
    else:
        price = target_calls * costs.price_rounds(predicted.drafted, target_calls, gamma)
    return bootstrap_median(predicted.tokens / price)


def _find_earlier(
    observation: Observation, report: EvaluationReport | None, gamma: int
) -> tuple[dict[str, _Metric], list[str]]:
    """The metrics of an earlier report at the same setting, and sentences on it."""
    if report is None:
        return {}, []
    if report.serving_engine != observation.serving_engine:
        raise ValueError(
            f"The report is for {report.serving_engine!r} and the server is {observation.serving_engine!r}, which "
            f"counts otherwise. Evaluate again with `serving_engine={observation.serving_engine!r}`."
        )
    name = name_temperature(observation.temperature)
    found = [one for one in report.draft.settings if one.temperature == observation.temperature]
    gammas = [one.num_assistant_tokens for one in found[0].by_gamma] if found else []
    if gamma not in gammas:
        raise ValueError(
            f"The report has no metrics at the setting {name!r} with {gamma} drafted tokens, which the server had. "
            f"Evaluate again with `temperatures=[{observation.temperature:g}]` and `gammas=[{gamma}]`."
        )
    if observation.assistant_confidence_threshold:
        return {}, ["The drafts of the earlier report end nowhere early, so that its acceptance is another one."]
    setting = found[0]
    tokens, prompts = sum(len(one.completion_ids) for one in observation.requests), len(observation.requests)
    note = (
        f"Responses of the earlier report have {setting.tokens / setting.prompts:.1f} tokens on average "
        f"({setting.prompts} prompts); the server's have {tokens / prompts:.1f}."
    )
    return {HEADLINE[0]: _Metric(setting.at_gamma(gamma).acceptance_rate)}, [note]


def _describe_texts(observation: Observation, own: Sequence[Record]) -> list[str]:
    """Sentences on how other responses differ from the server's."""
    pairs = list(zip(observation.requests, own, strict=True))
    same = sum(list(row["completion_ids"]) == request.completion_ids for request, row in pairs)
    other_prompts = sum(list(row["prompt_ids"]) != observation.prompt_ids[request.row] for request, row in pairs)
    lengths = [
        sum(map(len, texts)) / len(pairs)
        for texts in ([row["completion_ids"] for row in own], [one.completion_ids for one in observation.requests])
    ]
    notes = [
        f"{same} of {len(pairs)} own responses are the server's to the token; on average they have {lengths[0]:.1f} "
        f"tokens and the server's {lengths[1]:.1f}."
    ]
    if other_prompts:
        notes.append(f"{other_prompts} prompts have other ids than the server read: another chat template or text.")
    return notes


def _describe(
    observation: Observation,
    predicted: AcceptanceMetrics | None,
    earlier: Mapping[str, _Metric],
    notes: Sequence[str],
    processing_class: ProcessingClass | None,
    gamma: int | None = None,
) -> ObservedReport:
    engine = find_serving_engine(observation.serving_engine)
    return ObservedReport(
        serving_engine=engine.name,
        title=engine.title,
        model=observation.model,
        temperature=observation.temperature,
        concurrency=observation.concurrency,
        num_assistant_tokens=gamma or observation.num_assistant_tokens,
        metrics=_list_metrics(observation, predicted, earlier, engine.figures),
        prompts=_list_prompts(observation, predicted),
        tokens_per_second=observation.tokens_per_second,
        plain_tokens_per_second=observation.plain_tokens_per_second,
        request_seconds=float(np.mean([one.request_seconds for one in observation.requests])),
        speedup=observation.speedup,
        timing="without the prompt's pass, by the server" if observation.has_decoding_seconds else "whole requests",
        notes=[*_list_notes(observation), *notes],
        left_out=observation.list_left_out(processing_class),
    )


def _list_headline(source: Observation | AcceptanceMetrics) -> dict[str, _Metric]:
    accepted = source.accepted
    values = source.acceptance_rate, source.mean_acceptance_length
    columns = source.drafted, source.drafting_rounds
    return {
        name: _Metric(value, accepted, column) for name, value, column in zip(HEADLINE, values, columns, strict=True)
    }


def _list_metrics(
    observation: Observation,
    predicted: AcceptanceMetrics | None,
    earlier: Mapping[str, _Metric],
    names: Mapping[str, str],
) -> list[ObservedMetric]:
    replayed = {} if predicted is None else _list_headline(predicted)
    if observation.assistant_confidence_threshold:
        replayed.pop(HEADLINE[0], None)  # which divides by the drafted tokens
    engine_names = dict(zip(HEADLINE, ("acceptance_rate", "mean_acceptance_length"), strict=True))
    listed = [
        ObservedMetric(
            name=name,
            engine_name=names.get(engine_names[name], ""),
            observed=own.value,
            predicted=_get_value(replayed.get(name)),
            same_tokens=_subtract(own, replayed.get(name)),
            earlier=_get_value(earlier.get(name)),
            other_tokens=_subtract(replayed.get(name), earlier.get(name)),
        )
        for name, own in _list_headline(observation).items()
    ]
    rates = predicted.acceptance_rate_per_position if predicted is not None else []
    for k, (own, rate) in enumerate(zip_longest(observation.acceptance_rate_per_position, rates), start=1):
        own = own or Interval(NAN, NAN, NAN)
        listed.append(
            ObservedMetric(
                name=f"acceptance rate of drafted token {k}",
                engine_name=names.get("acceptance_rate_per_position", ""),
                observed=own,
                predicted=rate,
                same_tokens=_subtract(_Metric(own), rate and _Metric(rate)),
            )
        )
    return listed


def _get_value(metric: _Metric | None) -> Interval | None:
    return None if metric is None else metric.value


def _subtract(metric: _Metric | None, other: _Metric | None) -> Interval | None:
    """The difference, with its paired interval where both are ratios of sums over the same prompts."""
    if metric is None or other is None:
        return None
    columns = (*metric[1:], *other[1:])
    if any(column is None for column in columns):
        return Interval(metric.value.value - other.value.value, NAN, NAN)
    return bootstrap(lambda a, n, b, m: a / n - b / m, *cast("tuple[Array, ...]", columns))


def _list_prompts(observation: Observation, predicted: AcceptanceMetrics | None) -> list[ObservedPrompt]:
    # Of drafts that end early only the least number of drafted tokens is known
    drafted = None if predicted is None or observation.assistant_confidence_threshold else predicted.drafted
    uses_decoding = observation.has_decoding_seconds
    plain = {one.row: one.count_per_second(uses_decoding) for one in observation.plain_requests}
    is_known = observation.drafted is not None
    told = [one.known_counts if is_known else one.counts for one in observation.requests]
    return [
        ObservedPrompt(
            row=one.row,
            tokens=len(one.completion_ids),
            drafted=getattr(counts, "drafted", None),
            accepted=getattr(counts, "accepted", None),
            predicted_drafted=None if drafted is None else float(drafted[i]),
            predicted_accepted=None if predicted is None else float(predicted.accepted[i]),
            tokens_per_second=_or_none(one.count_per_second(uses_decoding)),
            plain_tokens_per_second=_or_none(plain.get(one.row, NAN)),
        )
        for i, (one, counts) in enumerate(zip(observation.requests, told, strict=True))
    ]


def _or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _list_notes(observation: Observation) -> list[str]:
    notes = []
    if observation.plain_requests:
        notes.append(
            f"{observation.num_equal_completions} of {len(observation.requests)} completions are the same with and "
            "without the draft."
        )
    if observation.counters is not None and observation.totals is None:
        notes.append(
            f"The server's counters are not of these requests alone (they grew by {observation.counters.drafted} "
            f"drafted and {observation.counters.accepted} accepted tokens over {observation.counted_requests} "
            "requests): others were served at the same time, or the observation was stopped."
        )
    if observation.unusable:
        row, reason = next(iter(observation.unusable.items()))
        notes.append(f"{len(observation.unusable)} prompts could not be used, first prompt {row}: {reason}")
    return notes
