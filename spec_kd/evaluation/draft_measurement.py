"""One draft, measured on the responses of the target: replay, costs, and real assisted generation beside them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeVar, cast

import numpy as np
from accelerate.logging import get_logger
from datasets import Dataset
from transformers import PreTrainedModel

from spec_kd.evaluation.assisted import generate_assisted
from spec_kd.evaluation.assisted_costs import measure_assisted_costs
from spec_kd.evaluation.cost import DEFAULT_CONTEXT, ServingCosts, fit_context, measure_costs
from spec_kd.evaluation.metrics import AcceptanceMetrics, Interval, bootstrap_ratio
from spec_kd.evaluation.options import EvaluationOptions, Setting
from spec_kd.evaluation.provenance import IN_MEMORY, describe_model
from spec_kd.evaluation.recommendations import Candidate, find_candidates, list_ways, recommend
from spec_kd.evaluation.report.content import AssistedReport, CostReport, DraftReport
from spec_kd.evaluation.response_replay import score_responses
from spec_kd.evaluation.setting_report import ResponseDescription, describe_setting
from spec_kd.heads import find_input_device
from spec_kd.loading import load_model
from spec_kd.open_types import Arguments, JsonObject
from spec_kd.parallel import read_parallel_drafting
from spec_kd.sampling.generation import find_special_ids
from spec_kd.sampling.options import SamplingOptions
from spec_kd.vocabulary import ProcessingClass, count_real_ids

logger = get_logger(__name__)

MAX_TIMED_PROMPTS = 6
Draft = PreTrainedModel | str
Result = TypeVar("Result")


class MeasuredDraft(NamedTuple):
    """What is known of a draft after it was measured.

    Args:
        report (`DraftReport`): Its part of the report.
        provenance (`dict[str, Any]`): Description of the model.
        headlines (`dict[str, AcceptanceMetrics]`): Its metrics at the report's gamma, by name of the setting.
    """

    report: DraftReport
    provenance: JsonObject
    headlines: dict[str, AcceptanceMetrics]


class DraftMeter:
    """Measures the drafts of an evaluation, all on the same responses.

    Args:
        options (`EvaluationOptions`): What is measured, with temperatures and limit filled in.
        target (`PreTrainedModel`, *optional*): The target, if it is a model in this process.
        responses (`Mapping[float, Dataset]`): Responses of the target by temperature.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): The target's.
        show_progress (`bool`): Whether to show progress bars.
        target_name (`str`, *optional*): Folder or Hub id of the target, for the engine's command.
    """

    def __init__(
        self,
        options: EvaluationOptions,
        target: PreTrainedModel | None,
        responses: Mapping[float, Dataset],
        processing_class: ProcessingClass,
        show_progress: bool,
        target_name: str | None = None,
    ):
        self.options, self.target, self.responses = options, target, responses
        self.processing_class, self.show_progress = processing_class, show_progress
        self.target_name = target_name
        self.described = {
            temperature: ResponseDescription(rows, processing_class, options.columns)
            for temperature, rows in responses.items()
        }

    def measure(self, name: str, draft: Draft, init_kwargs: Arguments) -> MeasuredDraft:
        """Measures a draft at every setting.

        Args:
            name (`str`): Name of the draft in the report.
            draft (`PreTrainedModel` or `str`): The draft, or the path or Hub id to load it from.
            init_kwargs (`dict`): Arguments of `from_pretrained` for a draft that is loaded.
        """
        path = draft if isinstance(draft, str) else None
        if isinstance(draft, str):
            draft = cast(PreTrainedModel, load_model(draft, **{"dtype": "auto", "device_map": None, **init_kwargs}))
            if self.target is not None:
                draft.to(find_input_device(self.target))  # type: ignore[arg-type]  # a decorator hides the method
        unmeasured: list[str] = []
        costs = find_costs(self.options, draft, self.target, unmeasured)
        settings, headlines = [], {}
        candidates: list[Candidate] = []
        limit = cast(int, self.options.max_new_tokens)
        if self.target is None and self.options.engine.counting.end == "passed":
            unmeasured.append(
                f"{self.options.engine.title} also counts tokens that are accepted after the end of a response. They "
                "are left out, since only the target could tell them."
            )
        is_parallel = read_parallel_drafting(draft.config) is not None
        if is_parallel:
            unmeasured += self._say_what_is_not_parallel()
        for setting in self.options.list_settings():
            scores = score_responses(
                draft,
                self.target,
                self.responses[setting.temperature],
                temperature=setting.temperature,
                max_new_tokens=self.options.max_new_tokens,
                vocab_size=count_real_ids(self.processing_class),
                serving_engine=self.options.serving_engine,
                draft_sampling=setting.draft_sampling,
                top_k=self.options.top_k,
                top_p=self.options.top_p,
                batch_size=self.options.batch_size,
                json_schema=self.options.json_schema,
                grammar=self.options.grammar,
                processing_class=self.processing_class,
                measure_entropy=True,
                num_past_end_tokens=max(self.options.all_gammas),
                description=f"{name}, {setting.name}" if self.show_progress else None,
            )
            by_gamma = {gamma: scores.replay(gamma, limit) for gamma in self.options.all_gammas}
            headline = headlines[setting.name] = by_gamma[self.options.num_assistant_tokens]
            assisted = None
            # transformers samples the draft as it samples the target
            is_assisted = self.options.num_assisted_prompts > 0 and setting.draft_sampling == "stochastic"
            if self.target is not None and is_assisted and not is_parallel:
                run = partial(self._run_assisted, draft, self.target, setting, headline, unmeasured)
                assisted = measure_or_say(f"Assisted generation ({setting.name})", run, unmeasured)
            described = self.described[setting.temperature]
            settings.append(describe_setting(setting.name, scores, by_gamma, self.options, costs, described, assisted))
            if costs:
                ways = list_ways(scores, by_gamma, self.options.engine, limit)
                candidates += find_candidates(setting.name, scores, ways, headline.tokens, costs)
        known = [describe_costs(one, self.options.all_gammas) for one in costs]
        provenance = describe_model(draft, path)
        draft_name = "DRAFT" if provenance["name"] == IN_MEMORY else provenance["name"]
        report = DraftReport(
            name=name,
            settings=settings,
            costs=known,
            unmeasured=unmeasured,
            recommendations=recommend(
                candidates, self.options.engine, draft_name, self.target_name or "TARGET", is_parallel
            ),
        )
        return MeasuredDraft(report, provenance, headlines)

    def _say_what_is_not_parallel(self) -> list[str]:
        """Sentences of the report on what is not measured of a parallel draft."""
        engine, said = self.options.engine, []
        if engine.write_parallel_command is None:
            said.append(
                f"{engine.title} takes no parallel drafts. The metrics are those of `generate_speculatively` with the "
                "counting of that engine, and no settings are recommended."
            )
        if self.options.num_assisted_prompts:
            said.append("Assisted generation was not run: transformers runs a parallel draft once for each token.")
        return said

    def _run_assisted(
        self,
        draft: PreTrainedModel,
        target: PreTrainedModel,
        setting: Setting,
        replayed: AcceptanceMetrics,
        unmeasured: list[str],
    ) -> AssistedReport:
        """Runs real assisted generation on the first prompts, and compares it with their replay.

        Rounds are timed on up to six prompts after them, so that a predicted speed-up is not fitted to the run that it
        is compared with. Nothing is predicted if there are none.
        """
        options, gamma = self.options, replayed.num_assistant_tokens
        prompt_ids = self.responses[setting.temperature]["prompt_ids"]
        chosen = list(prompt_ids[: options.num_assisted_prompts])
        timed = list(prompt_ids[len(chosen) : len(chosen) + MAX_TIMED_PROMPTS])
        sampling = SamplingOptions(
            max_new_tokens=cast(int, options.max_new_tokens),
            temperature=setting.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
        )
        common: Arguments = {
            "vocab_size": count_real_ids(self.processing_class),
            "eos_token_id": find_special_ids(target, self.processing_class)[0],
        }
        measured = generate_assisted(
            target, draft, chosen, sampling, num_assistant_tokens=gamma, measure_speed=True, **common
        )
        tokens, target_calls = replayed.tokens[: len(chosen)], replayed.target_calls[: len(chosen)]

        def predict() -> float:
            gammas = sorted({max(1, gamma // 2), gamma, 2 * gamma})
            costs = measure_assisted_costs(draft, target, timed, sampling, gammas=gammas, **common)
            return float(costs.predict_speedup(np.array(list(map(len, chosen))), tokens, target_calls, gamma))

        what = "The costs of assisted generation, and the speed-up that they predict,"
        assisted, plain = cast(tuple[float, float], measured.tokens_per_second)
        return AssistedReport(
            prompts=len(chosen),
            num_assistant_tokens=gamma,
            block_efficiency=measured.block_efficiency,
            acceptance_rate=measured.acceptance_rate,
            speedup=cast(Interval, measured.speedup),
            tokens_per_second=assisted,
            plain_tokens_per_second=plain,
            replayed_block_efficiency=bootstrap_ratio(tokens, target_calls),
            predicted_speedup=measure_or_say(what, predict, unmeasured) if timed else None,
        )


def measure_or_say(what: str, measure: Callable[[], Result], unmeasured: list[str]) -> Result | None:
    """The result of `measure`, or `None` and a sentence in `unmeasured` that says why there is none.

    No error is raised: the target's responses are written by then, and a failed timing must not lose their metrics.

    Args:
        what (`str`): Subject of the sentence.
        measure (`Callable`): Function of no argument.
        unmeasured (`list[str]`): Sentences of the report, to which one is added if `measure` fails.
    """
    try:
        return measure()
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        unmeasured.append(f"{what} could not be measured: {reason}")
        logger.warning(unmeasured[-1])
        return None


def find_costs(
    options: EvaluationOptions, draft: PreTrainedModel, target: PreTrainedModel | None, unmeasured: list[str]
) -> list[ServingCosts]:
    """The costs that are given for a draft of its kind, or those measured if the target is a model in this process.

    Args:
        options (`EvaluationOptions`): `costs`, and the batch sizes and gammas to measure.
        draft (`PreTrainedModel`): The draft.
        target (`PreTrainedModel`, *optional*): The target.
        unmeasured (`list[str]`): Sentences of the report, to which one is added if costs are not those of this draft.
    """
    given = options.read_costs()
    if given is not None or target is None:
        is_parallel = read_parallel_drafting(draft.config) is not None
        known = [one.for_parallel_draft() if is_parallel else one for one in given or []]
        known = [one for one in known if (one.draft_cost is not None) is is_parallel]
        if len(known) < len(given or []):
            kind, other = ("parallel", "autoregressive") if is_parallel else ("autoregressive", "parallel")
            unmeasured.append(f"Given costs are those of {other} drafts, and predict no speed-up of this {kind} one.")
        return known
    most = max(options.all_gammas)
    measure = partial(
        measure_costs,
        draft,
        target,
        batch_sizes=options.batch_sizes,
        gammas=sorted({1, *(gamma for gamma in (2, 4, 8) if gamma < most), most}),
        context_length=fit_context(draft, target, DEFAULT_CONTEXT, most),
    )
    return measure_or_say("The costs of a round, and the speed-up that follows,", measure, unmeasured) or []


def describe_costs(costs: ServingCosts, gammas: Sequence[int]) -> CostReport:
    """The costs as the report has them, for those of the gammas whose cost is known."""
    known = [gamma for gamma in gammas if gamma <= costs.max_gamma]
    return CostReport(
        batch_size=costs.batch_size,
        cost_ratio=costs.cost_ratio,
        verify_cost={str(gamma): cost for gamma in known if (cost := costs.verify(gamma)) is not None},
        round_overhead=costs.round_overhead,
        round_cost={str(gamma): costs.find_round_cost(gamma) for gamma in known},
        target_step_seconds=costs.target_step_seconds,
        source=costs.source,
    )
