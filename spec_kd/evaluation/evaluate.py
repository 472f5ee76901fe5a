"""What will this draft do in my server? All metrics of one draft or several, in one call."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel

from spec_kd._private import get_config_model_id
from spec_kd.data.prompt_rendering import Prompts, prepare_prompts
from spec_kd.data.responses import as_engine, check_target, generate_responses
from spec_kd.engines.base import Engine
from spec_kd.engines.transformers import TransformersEngine
from spec_kd.evaluation.draft_measurement import Draft, DraftMeter
from spec_kd.evaluation.metrics import compare_drafts
from spec_kd.evaluation.options import EvaluationOptions
from spec_kd.evaluation.provenance import describe_responses, describe_surroundings, describe_target
from spec_kd.evaluation.report.content import EvaluationReport
from spec_kd.evaluation.response_rows import list_formats
from spec_kd.evaluation.stored_responses import find_max_new_tokens, split_by_temperature
from spec_kd.open_types import Argument, Arguments
from spec_kd.options import check_text, read_path, resolve_options
from spec_kd.sampling.response_format import ResponseFormat
from spec_kd.serving import find_serving_engine
from spec_kd.vocabulary import ProcessingClass


def evaluate_draft(
    drafts: Draft | Mapping[str, Draft],
    target: PreTrainedModel | str | Engine | None,
    prompts: Prompts,
    options: EvaluationOptions | None = None,
    *,
    processing_class: ProcessingClass | None = None,
    draft_init_kwargs: Arguments | None = None,
    output_dir: str | None = None,
    show_progress: bool = True,
    **given: Argument,
) -> EvaluationReport:
    """Measures drafts for a target: acceptance by replay, costs, the speed-up that follows, and where a draft fails.

    The target writes one response to each prompt at each temperature, unless they are stored. Each draft then reads the
    responses in one pass, from which all metrics follow for every gamma. Nothing is sampled from a draft, so drafts
    differ by their quality and not by chance, and their differences come with paired intervals.

    Args:
        drafts (`PreTrainedModel`, `str`, or `Mapping` of names to them):
            One draft, or several to compare. Paths and Hub ids are loaded one at a time. The first of several is the
            baseline.
        target (`PreTrainedModel`, `str`, `Engine` or `None`):
            The target. `None` if `prompts` are responses with a `teacher_signal`, which are evaluated without it.
        prompts (`list[str]`, `list` of conversations, or `Dataset`):
            Prompts as [`~spec_kd.generate_responses`] takes them, or the responses that it returned. A column
            `response_format` says what each completion is held to, as for [`~spec_kd.replay`].
        options (`EvaluationOptions`, *optional*): What is measured; the defaults of [`EvaluationOptions`] by default.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            The target's. Loaded with the target by default; required without a target.
        draft_init_kwargs (`dict`, *optional*):
            Arguments of `from_pretrained` for drafts given by name, such as `trust_remote_code`; `dtype` defaults to
            the checkpoint's own. For a target given by name, pass a `TransformersEngine(name, init_kwargs=...)`.
        output_dir (`str`, *optional*): Folder or address for the target's responses, with which a killed run continues.
        show_progress (`bool`, *optional*, defaults to `True`): Whether to show progress bars.
        given: Fields of [`EvaluationOptions`] as keywords, which replace those of `options`.

    Returns:
        [`EvaluationReport`]; `save_report` writes it as HTML, Markdown, JSON and PNG.

    Raises:
        ValueError: If an option is out of its range or does not fit the others, before any model runs.
    """
    options = resolve_options(EvaluationOptions, options, given)
    output_dir = read_path("output_dir", output_dir, is_optional=True, takes_address=True)
    named = _name_drafts(drafts)
    dataset = prepare_prompts(prompts)[0]
    options.check_columns(dataset.column_names)
    formats = list_formats(dataset, options.response_format)
    options.check_target(is_here=isinstance(target, str | nn.Module | TransformersEngine))
    if target is None:
        responses = split_by_temperature(prompts)
        options = options.fill_in(tuple(responses), options.max_new_tokens or find_max_new_tokens(responses))
        if set(options.temperatures or ()) - set(responses):
            raise ValueError(
                f"Without a target the prompts must be its responses with a `teacher_signal`, at the temperatures "
                f"{options.temperatures}, but there are responses at {list(responses) or 'none'}. Pass `target`, or "
                "make them with `generate_responses(..., teacher_signal=...)`."
            )
        if processing_class is None:
            raise ValueError("Without a target its tokenizer is unknown. Pass `processing_class`.")
    else:
        check_target(target)
        options = options.fill_in()
        target, processing_class = as_engine(target, processing_class)
        if formats:
            target = _hold_to_formats(target, processing_class, options, formats)
        responses = _write_responses(target, prompts, options, output_dir, processing_class, show_progress)
    responses = {temperature: responses[temperature] for temperature in options.temperatures or ()}
    target_model = target.target if isinstance(target, TransformersEngine) else None
    target_name = None if target is None else target.target_name
    meter = DraftMeter(options, target_model, responses, processing_class, show_progress, target_name)
    measured = {name: meter.measure(name, draft, draft_init_kwargs or {}) for name, draft in named.items()}
    engine = find_serving_engine(options.serving_engine)
    known = {rule.sampling: rule.words for rule in engine.rules}
    rules = [known.get(sampling, f"{sampling} drafts, chosen by the caller") for sampling in options.samplings]
    return EvaluationReport(
        drafts=[one.report for one in measured.values()],
        comparisons=[
            comparison
            for setting in options.list_settings()
            for comparison in compare_drafts({n: m.headlines[setting.name] for n, m in measured.items()}, setting.name)
        ],
        num_assistant_tokens=options.num_assistant_tokens,
        serving_engine=engine.name,
        serving_rule=f"{'; or '.join(rules)} ({engine.source})",
        provenance={
            "target": describe_target(target, responses),
            "drafts": {name: one.provenance for name, one in measured.items()},
            "responses": describe_responses(responses),
            "max_new_tokens": options.max_new_tokens,
            "seed": options.seed,
            **describe_surroundings(),
        },
    )


def _hold_to_formats(
    target: Engine,
    processing_class: ProcessingClass,
    options: EvaluationOptions,
    formats: Sequence[ResponseFormat | None],
) -> TransformersEngine:
    """The target with the formats that it holds the completion of each row to."""
    options.check_structured_output()
    if not isinstance(target, TransformersEngine):
        raise ValueError(
            "Under a JSON schema or a grammar the target must be a transformers model. For a server, ask it with "
            "`observe_serving`, and pass its observation to `compare_observed`."
        )
    return TransformersEngine(target.target, processing_class, response_formats=formats)


def _write_responses(
    target: Engine,
    prompts: Prompts,
    options: EvaluationOptions,
    output_dir: str | None,
    processing_class: ProcessingClass,
    show_progress: bool,
) -> dict[float, Dataset]:
    """The target's responses at each temperature, each set in a folder of its own."""
    is_here = isinstance(target, TransformersEngine)
    return {
        temperature: generate_responses(
            target,
            prompts,
            processing_class=processing_class,
            max_new_tokens=options.max_new_tokens,
            temperature=temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            # an engine elsewhere cannot read the responses again, so it leaves what replay needs
            teacher_signal=None if is_here else "token_only",
            batch_size=options.batch_size if is_here else None,
            seed=options.seed,
            output_dir=output_dir and f"{output_dir}/texts_{options.name_sampling(temperature)}",
            show_progress=show_progress,
        )
        for temperature in options.temperatures or ()
    }


def _name_drafts(drafts: Draft | Mapping[str, Draft]) -> dict[str, Draft]:
    if isinstance(drafts, Mapping):
        if not drafts:
            raise ValueError("`drafts` is empty. Name at least one draft.")
        return dict(drafts)
    if isinstance(drafts, str):
        check_text("drafts", drafts)
    elif not isinstance(drafts, nn.Module):
        raise ValueError(f"`drafts` is {drafts!r:.80}, but must be a model, its path or Hub id, or these by name.")
    name = drafts if isinstance(drafts, str) else get_config_model_id(drafts.config)
    return {Path(name).name if name else "draft": drafts}
