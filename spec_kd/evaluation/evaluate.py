"""What will this draft do in my server? Every figure there is, of one draft or several, in one call."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel

from spec_kd._private import get_config_model_id
from spec_kd.acceptance import check_num_assistant_tokens, check_sampling
from spec_kd.checks import check_int, check_ints, check_numbers, check_text, read_path
from spec_kd.data.prompt_rendering import Prompts, prepare_prompts
from spec_kd.data.responses import as_engine, check_target, generate_responses
from spec_kd.engines.base import Engine
from spec_kd.engines.transformers import TransformersEngine, find_special_ids
from spec_kd.evaluation.assisted_check import cross_check
from spec_kd.evaluation.comparison import compare_drafts
from spec_kd.evaluation.cost_measurement import MEASURE, Costs, describe_costs, find_costs, measure_or_say
from spec_kd.evaluation.metrics import AcceptanceMetrics, name_temperature
from spec_kd.evaluation.provenance import describe_model, describe_surroundings, describe_texts
from spec_kd.evaluation.report.content import DraftReport, EvaluationReport
from spec_kd.evaluation.response_replay import score_responses
from spec_kd.evaluation.setting_report import TextDescription, describe_setting
from spec_kd.evaluation.stored_responses import find_max_new_tokens, split_by_temperature
from spec_kd.heads import find_input_device
from spec_kd.loading import load_model
from spec_kd.open_types import Argument, Arguments
from spec_kd.sampling.options import check_truncation
from spec_kd.serving import find_serving_engine
from spec_kd.vocabulary import ProcessingClass, count_real_ids

DEFAULT_TEMPERATURES = (0.0, 1.0)
DEFAULT_MAX_NEW_TOKENS = 256

Draft = PreTrainedModel | str


@dataclass(frozen=True)
class _Setting:
    temperature: float
    draft_sampling: str
    name: str


def evaluate_draft(
    drafts: Draft | Mapping[str, Draft],
    target: PreTrainedModel | str | Engine | None,
    prompts: Prompts,
    *,
    engine: str = "transformers",
    draft_samplings: Sequence[str] | None = None,
    temperatures: Sequence[float] | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
    num_assistant_tokens: int = 5,
    gammas: Sequence[int] = tuple(range(1, 17)),
    max_new_tokens: int | None = None,
    group_by: str | Sequence[str] = (),
    costs: Costs = MEASURE,
    batch_sizes: Sequence[int] = (1,),
    num_assisted_prompts: int = 0,
    num_shown_prompts: int = 5,
    show_prompt_text: bool = True,
    processing_class: ProcessingClass | None = None,
    draft_init_kwargs: Arguments | None = None,
    batch_size: int = 8,
    seed: int = 0,
    output_dir: str | None = None,
    show_progress: bool = True,
) -> EvaluationReport:
    """Measures drafts for a target: acceptance by replay, costs, the speed-up that follows, and where a draft fails.

    The target writes its texts once per temperature (or they are there already); each draft then reads them in one
    pass, which gives every figure for every gamma. Nothing is sampled from a draft, so two drafts differ by what they
    are and not by luck, and their differences come with paired intervals.

    Args:
        drafts (`PreTrainedModel`, `str`, or `Mapping` of names to them):
            One draft, or several to compare; paths are loaded one at a time. The first of several is the baseline.
        target (`PreTrainedModel`, `str`, `Engine` or `None`):
            `None` where `prompts` is a distilled set, whose texts and log-probabilities then say all there is.
        prompts (`list[str]`, `list` of conversations, or `Dataset`):
            As [`~spec_kd.data.generate_responses`] takes them, or what it returned with a `teacher_signal`.
        engine (`str`):
            Where the draft will serve, which decides how it is sampled: `"transformers"`, `"vllm"`, `"sglang"`,
            `"llama.cpp"` or `"tensorrt-llm"`.
        draft_samplings (`Sequence[str]`, *optional*):
            Instead of the engine's rule: `"stochastic"`, `"greedy"` or both.
        temperatures (`Sequence[float]`, *optional*): 0.0 and 1.0 by default, or those of a distilled set.
        top_k (`int`), top_p (`float`):
            Of the deployment's sampling, applied to both models at every temperature above 0; 0 and 1.0 for none.
            Penalties for repetition depend on the text before and are not covered.
        num_assistant_tokens (`int`): gamma of the headline figures.
        gammas (`Sequence[int]`): Numbers of drafted tokens to report.
        max_new_tokens (`int`, *optional*): Longest text; 256 by default, or the limit of a distilled set.
        group_by (`str` or `Sequence[str]`, *optional*): Columns of the prompts to break the figures down by.
        costs (`Sequence[ServingCosts]`, `"measure"` or `None`):
            What a round costs: a table of your own engine, measured on this machine (if there is a target here), or
            nothing, and then no speed-up is predicted. What cannot be measured is left out, and the report says why.
        batch_sizes (`Sequence[int]`): Batch sizes that costs are measured at.
        num_assisted_prompts (`int`):
            Prompts on which real assisted generation is run as a cross-check, with its speed; up to four others serve
            to time its rounds. It samples the draft as transformers does, so greedy drafts at a temperature above 0 go
            unchecked. Slow, so 0 by default.
        num_shown_prompts (`int`): How many of the worst prompts to show token by token.
        show_prompt_text (`bool`): Whether their prompts are shown too, or only what the target wrote.
        processing_class (*optional*): The target's; found with the target by default.
        draft_init_kwargs (`dict`, *optional*):
            Arguments of `from_pretrained` for drafts given by name, such as `trust_remote_code`; `dtype` defaults to
            the checkpoint's own. A target given by name and options is a `TransformersEngine(name, init_kwargs=...)`.
        batch_size (`int`): Texts at a time.
        seed (`int`): Of the target's sampling.
        output_dir (`str`, *optional*): Where the target's texts are kept, so that a killed run resumes.
        show_progress (`bool`): Whether to show progress bars.

    Returns:
        [`EvaluationReport`]; `save_report` writes it as HTML, Markdown, JSON and PNG.

    Raises:
        ValueError: Before any model runs, for an option out of its range or options that do not fit each other.
    """
    rule = find_serving_engine(engine)
    check_num_assistant_tokens(num_assistant_tokens)
    check_ints("gammas", gammas)
    check_ints("batch_sizes", batch_sizes)
    check_int("max_new_tokens", max_new_tokens, is_optional=True)
    check_int("num_assisted_prompts", num_assisted_prompts, 0)
    check_int("num_shown_prompts", num_shown_prompts, 0)
    check_int("batch_size", batch_size)
    check_int("seed", seed, None)
    output_dir = read_path("output_dir", output_dir, is_optional=True)
    if target is not None:
        check_target(target)
    samplings = tuple(draft_samplings) if draft_samplings is not None else (rule.draft_sampling,)
    gammas = sorted({*gammas, num_assistant_tokens})
    group_by = (group_by,) if isinstance(group_by, str) else tuple(group_by)
    dataset, _ = prepare_prompts(prompts)
    stored = split_by_temperature(prompts) if target is None else {}
    temperatures = tuple(stored) or DEFAULT_TEMPERATURES if temperatures is None else temperatures
    _check_options(
        dataset, target, stored, temperatures, samplings, gammas, group_by, costs, num_assisted_prompts, top_k, top_p
    )
    named = _name_drafts(drafts)
    if max_new_tokens is None:
        max_new_tokens = find_max_new_tokens(stored) or DEFAULT_MAX_NEW_TOKENS

    if target is not None:
        target, processing_class = as_engine(target, processing_class)
    elif processing_class is None:
        raise ValueError("Without a target its tokenizer is unknown: give `processing_class`.")
    target_model = target.target if isinstance(target, TransformersEngine) else None
    texts = stored
    if target is not None:
        texts = _write_texts(
            target, prompts, temperatures, output_dir, processing_class=processing_class, max_new_tokens=max_new_tokens,
            top_k=top_k, top_p=top_p, batch_size=batch_size, seed=seed, show_progress=show_progress,
        )  # fmt: skip
    texts = {temperature: texts[temperature] for temperature in temperatures}
    described = {t: TextDescription.of(rows, processing_class, group_by) for t, rows in texts.items()}
    settings = _list_settings(temperatures, samplings, top_k, top_p)

    vocab_size = count_real_ids(processing_class)
    reports, provenances = [], {}
    figures: dict[str, dict[str, AcceptanceMetrics]] = {setting.name: {} for setting in settings}
    for name, draft in named.items():
        model = draft
        if isinstance(draft, str):
            model = load_model(draft, **{"dtype": "auto", "device_map": None, **(draft_init_kwargs or {})})
        if isinstance(draft, str) and target_model is not None:
            model.to(find_input_device(target_model))
        provenances[name] = describe_model(model, draft if isinstance(draft, str) else None)
        unmeasured: list[str] = []
        known_costs = find_costs(costs, model, target_model, batch_sizes, gammas, unmeasured)
        described_settings = []
        for setting in settings:
            scores = score_responses(
                model,
                target_model,
                texts[setting.temperature],
                temperature=setting.temperature,
                max_new_tokens=max_new_tokens,
                vocab_size=vocab_size,
                draft_sampling=setting.draft_sampling,
                top_k=top_k,
                top_p=top_p,
                batch_size=batch_size,
                measure_entropy=True,
                description=f"{name}, {setting.name}" if show_progress else None,
            )
            by_gamma = {gamma: scores.replay(gamma, max_new_tokens) for gamma in gammas}
            headline = figures[setting.name][name] = by_gamma[num_assistant_tokens]
            check = None
            if num_assisted_prompts and setting.draft_sampling == "stochastic":
                run = partial(
                    cross_check,
                    model,
                    target_model,
                    texts[setting.temperature]["prompt_ids"],
                    headline,
                    unmeasured,
                    num_prompts=num_assisted_prompts,
                    top_k=top_k,
                    top_p=top_p,
                    max_new_tokens=max_new_tokens,
                    vocab_size=vocab_size,
                    eos_token_id=find_special_ids(target_model, processing_class)[0],
                    seed=seed,
                )
                check = measure_or_say(f"Assisted generation ({setting.name})", run, unmeasured)
            described_settings.append(
                describe_setting(
                    setting.name,
                    scores,
                    by_gamma,
                    num_assistant_tokens=num_assistant_tokens,
                    costs=known_costs,
                    text=described[setting.temperature],
                    num_shown_prompts=num_shown_prompts,
                    show_prompt_text=show_prompt_text,
                    assisted=check,
                )
            )
        reports.append(
            DraftReport(
                name=name,
                settings=described_settings,
                costs=[describe_costs(c, gammas) for c in known_costs],
                unmeasured=unmeasured,
            )
        )
    return EvaluationReport(
        drafts=reports,
        comparisons=[c for setting, of_draft in figures.items() for c in compare_drafts(of_draft, setting)],
        num_assistant_tokens=num_assistant_tokens,
        engine=engine if draft_samplings is None else f"draft sampling {', '.join(samplings)}",
        engine_rule=f"{rule.rule} ({rule.source})" if draft_samplings is None else "chosen by the caller",
        provenance={
            "target": _describe_target(target, target_model, texts),
            "drafts": provenances,
            "texts": describe_texts(texts),
            "max_new_tokens": max_new_tokens,
            "seed": seed,
            **describe_surroundings(),
        },
    )


def _write_texts(
    target: Engine,
    prompts: Prompts,
    temperatures: Sequence[float],
    output_dir: str | None,
    *,
    top_k: int,
    top_p: float,
    batch_size: int,
    **options: Argument,
) -> dict[float, Dataset]:
    """The target's texts at each temperature, each in a folder of its own."""
    is_here = isinstance(target, TransformersEngine)
    texts = {}
    for temperature in temperatures:
        folder = None
        if output_dir is not None:
            folder = str(Path(output_dir) / f"texts_{_name_sampling(temperature, top_k, top_p)}")
        texts[temperature] = generate_responses(
            target,
            prompts,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            # an engine elsewhere cannot read the texts again, so it leaves what replay needs
            teacher_signal=None if is_here else "token_only",
            batch_size=batch_size if is_here else None,
            output_dir=folder,
            **options,
        )
    return texts


def _check_options(
    dataset, target, stored, temperatures, samplings, gammas, group_by, costs, num_assisted_prompts, top_k, top_p
) -> None:
    is_here = isinstance(target, str | nn.Module | TransformersEngine)
    check_settings(temperatures, samplings, costs, num_assisted_prompts, top_k, top_p, is_here)
    check_groups(group_by, dataset.column_names)
    if target is None and set(temperatures) - set(stored):
        raise ValueError(
            f"Without a target the prompts must be its answers with a `teacher_signal`, at the temperatures "
            f"{temperatures}; found are answers at {tuple(stored) or 'none'}. Pass `target`, or make them with "
            "`generate_responses(..., teacher_signal=...)`."
        )


def check_groups(group_by: Sequence[str], columns: Sequence[str]) -> None:
    """Raises `ValueError` for names in `group_by` that are not among the columns of the prompts."""
    missing = [name for name in group_by if name not in columns]
    if missing:
        raise ValueError(f"`group_by` names {missing}, but the prompts have the columns {list(columns)}.")


def check_settings(
    temperatures: Sequence[float],
    samplings: Sequence[str],
    costs: Costs,
    num_assisted_prompts: int,
    top_k: int,
    top_p: float,
    is_here: bool,
) -> None:
    """Raises `ValueError` for options of [`evaluate_draft`] that do not fit each other, whatever the models are.

    Args:
        samplings (`Sequence[str]`): How the draft is sampled, one or both of `"stochastic"` and `"greedy"`.
        is_here (`bool`): Whether the target is a transformers model in this process.
        others: As of [`evaluate_draft`].
    """
    check_numbers("temperatures", temperatures, minimum=0)
    check_truncation(top_k, top_p)
    if (top_k or top_p < 1) and not is_here:
        raise ValueError("`top_k` and `top_p` need the target as a transformers model. Leave them out, or pass one.")
    if not samplings:
        raise ValueError("`draft_samplings` is empty: give 'stochastic', 'greedy' or both.")
    for temperature in temperatures:
        for sampling in samplings:
            check_sampling(temperature, sampling)
    if num_assisted_prompts and not is_here:
        raise ValueError("`num_assisted_prompts` needs the target as a transformers model. Set it to 0, or pass one.")
    if num_assisted_prompts and "stochastic" not in samplings and 0.0 not in temperatures:
        raise ValueError(
            "`num_assisted_prompts` runs transformers' assisted generation, which samples the draft where the target "
            "samples: it has nothing to say on greedy drafts. Set it to 0, or add 0.0 to `temperatures` or "
            "'stochastic' to `draft_samplings`."
        )
    if isinstance(costs, str) and costs != MEASURE:
        raise ValueError(f"`costs` is {costs!r}, but must be 'measure', a list of `ServingCosts`, or None.")


def _name_drafts(drafts: Draft | Mapping[str, Draft]) -> dict[str, Draft]:
    if isinstance(drafts, Mapping):
        if not drafts:
            raise ValueError("`drafts` is empty: name at least one draft.")
        return dict(drafts)
    if isinstance(drafts, str):
        check_text("drafts", drafts)
    elif not isinstance(drafts, nn.Module):
        raise ValueError(f"`drafts` is {drafts!r:.80}, but must be a model, its path or Hub id, or these by name.")
    name = drafts if isinstance(drafts, str) else get_config_model_id(drafts.config)
    return {Path(name).name if name else "draft": drafts}


def name_settings(
    temperatures: Sequence[float], samplings: Sequence[str], top_k: int = 0, top_p: float = 1.0
) -> dict[str, str]:
    """How each setting of a report will draft, `"stochastic"` or `"greedy"`, by the name of the setting."""
    return {setting.name: setting.draft_sampling for setting in _list_settings(temperatures, samplings, top_k, top_p)}


def _list_settings(temperatures: Sequence[float], samplings: Sequence[str], top_k: int, top_p: float) -> list[_Setting]:
    settings = []
    for temperature in temperatures:
        # at temperature 0 the two rules are one
        for sampling in samplings if temperature > 0 else ("stochastic",):
            suffix = "_greedy_draft" if sampling == "greedy" else ""
            settings.append(_Setting(temperature, sampling, _name_sampling(temperature, top_k, top_p) + suffix))
    return settings


def _name_sampling(temperature: float, top_k: int, top_p: float) -> str:
    """`"greedy"`, `"t0.7"`, `"t0.7_k20_p0.9"`."""
    truncation = (f"_k{top_k}" if top_k else "") + (f"_p{top_p:g}" if top_p < 1 else "")
    return name_temperature(temperature) + (truncation if temperature > 0 else "")


def _describe_target(target: Engine | None, model: PreTrainedModel | None, texts: dict[float, Dataset]) -> Any:
    if model is not None:
        return describe_model(model, target.target_name)
    if target is not None:
        return {"engine": target.name, **target.describe()}
    return {"from the distilled set": sorted({text for rows in texts.values() for text in rows.unique("teacher_info")})}
