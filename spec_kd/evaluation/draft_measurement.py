"""One draft, measured on the responses of the target."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast

from datasets import Dataset
from transformers import PreTrainedModel

from spec_kd.evaluation.assisted_check import AssistedReport, cross_check
from spec_kd.evaluation.cost_measurement import describe_costs, find_costs, measure_or_say
from spec_kd.evaluation.metrics import AcceptanceMetrics
from spec_kd.evaluation.options import EvaluationOptions, Setting
from spec_kd.evaluation.provenance import describe_model
from spec_kd.evaluation.report.content import DraftReport
from spec_kd.evaluation.response_replay import score_responses
from spec_kd.evaluation.setting_report import ResponseDescription, describe_setting
from spec_kd.heads import find_input_device
from spec_kd.loading import load_model
from spec_kd.open_types import Arguments, JsonObject
from spec_kd.sampling.generation import find_special_ids
from spec_kd.vocabulary import ProcessingClass, count_real_ids

Draft = PreTrainedModel | str


class MeasuredDraft(NamedTuple):
    """What is known of a draft after it was measured.

    Args:
        report (`DraftReport`): Its part of the report.
        provenance (`dict[str, Any]`): What the model is.
        headlines (`dict[str, AcceptanceMetrics]`): Its metrics at the report's gamma, by name of the setting.
    """

    report: DraftReport
    provenance: JsonObject
    headlines: dict[str, AcceptanceMetrics]


@dataclass(frozen=True)
class DraftMeter:
    """What all drafts of an evaluation are measured on.

    Args:
        options (`EvaluationOptions`): What is measured, with temperatures and limit filled in.
        target (`PreTrainedModel`, *optional*): The target, if it is a model in this process.
        responses (`Mapping[float, Dataset]`): Responses by temperature.
        described (`Mapping[float, ResponseDescription]`): What they are made of, by temperature.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): The target's.
        show_progress (`bool`): Whether to show progress bars.
    """

    options: EvaluationOptions
    target: PreTrainedModel | None
    responses: Mapping[float, Dataset]
    described: Mapping[float, ResponseDescription]
    processing_class: ProcessingClass
    show_progress: bool

    @classmethod
    def of(
        cls,
        options: EvaluationOptions,
        target: PreTrainedModel | None,
        responses: Mapping[float, Dataset],
        processing_class: ProcessingClass,
        show_progress: bool,
    ) -> "DraftMeter":
        """Describes the responses once, for all drafts."""
        described = {t: ResponseDescription.of(r, processing_class, options.columns) for t, r in responses.items()}
        return cls(options, target, responses, described, processing_class, show_progress)

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
        if self.target is None and self.options.engine.counting.end == "passed":
            unmeasured.append(
                f"{self.options.engine.title} also counts tokens that are accepted after the end of a response. They "
                "are left out, since only the target could tell them."
            )
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
                measure_entropy=True,
                num_past_end_tokens=max(self.options.all_gammas),
                description=f"{name}, {setting.name}" if self.show_progress else None,
            )
            by_gamma = {
                gamma: scores.replay(gamma, cast(int, self.options.max_new_tokens)) for gamma in self.options.all_gammas
            }
            headline = headlines[setting.name] = by_gamma[self.options.num_assistant_tokens]
            assisted = self._cross_check(draft, setting, headline, unmeasured)
            described = self.described[setting.temperature]
            settings.append(describe_setting(setting.name, scores, by_gamma, self.options, costs, described, assisted))
        known = [describe_costs(one, self.options.all_gammas) for one in costs]
        report = DraftReport(name=name, settings=settings, costs=known, unmeasured=unmeasured)
        return MeasuredDraft(report, describe_model(draft, path), headlines)

    def _cross_check(
        self, draft: PreTrainedModel, setting: Setting, headline: AcceptanceMetrics, unmeasured: list[str]
    ) -> AssistedReport | None:
        """Real assisted generation beside the replay; only where it samples the draft as the setting does."""
        target = self.target
        if target is None or not self.options.num_assisted_prompts or setting.draft_sampling != "stochastic":
            return None
        prompt_ids = self.responses[setting.temperature]["prompt_ids"]
        common: Arguments = {
            "vocab_size": count_real_ids(self.processing_class),
            "eos_token_id": find_special_ids(target, self.processing_class)[0],
        }

        def run() -> AssistedReport:
            return cross_check(draft, target, prompt_ids, headline, self.options, unmeasured, **common)

        return measure_or_say(f"Assisted generation ({setting.name})", run, unmeasured)
