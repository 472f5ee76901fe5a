"""Acceptance of a draft, as sums per prompt that a record can keep, and what a round costs."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from spec_kd.evaluation import generate_assisted, measure_costs, score_responses

from .answers import Lab
from .models import count_parameters, load_model


def measure_draft(
    lab: Lab, draft: PreTrainedModel, target: PreTrainedModel, texts: Mapping[str, tuple[float, Dataset]]
) -> dict[str, dict[str, Any]]:
    """For each setting: sums per prompt at the profile's gamma, tokens a target pass at every gamma, and real speed.

    Args:
        lab (`Lab`): Options of the measurement.
        draft, target (`PreTrainedModel`): Models.
        texts (`Mapping`): Temperature and texts that the target wrote, by setting.
    """
    training, limit, figures = lab.profile.training, lab.profile.data.max_new_tokens, {}
    for setting, (temperature, rows) in texts.items():
        scores = score_responses(
            draft,
            target,
            rows,
            temperature=temperature,
            max_new_tokens=limit,
            vocab_size=lab.vocab_size,
            batch_size=training.batch_size,
        )
        main = scores.replay(training.num_assistant_tokens, limit)
        by_gamma = {gamma: scores.replay(gamma, limit) for gamma in training.gammas}
        assisted = generate_assisted(
            target,
            draft,
            rows["prompt_ids"][: training.num_timed_prompts],
            temperature=temperature,
            num_assistant_tokens=training.num_assistant_tokens,
            max_new_tokens=limit,
            vocab_size=lab.vocab_size,
            measure_speed=True,
        )
        figures[setting] = {
            "speedup": list(assisted.speedup),
            "texts": hashlib.sha256(repr(rows["completion_ids"][:]).encode()).hexdigest()[:12],
            "tokens": main.tokens.tolist(),
            "target_calls": [round(calls, 3) for calls in main.target_calls.tolist()],
            "alpha_sum": [round(alpha, 4) for alpha in main.alpha_sum.tolist()],
            "block_efficiency": {g: float(f.tokens.sum() / f.target_calls.sum()) for g, f in by_gamma.items()},
        }
    return figures


def measure_drift(lab: Lab) -> None:
    """The generic drafts with the domain target, and the default one with the generic target; costs of a round."""
    record, profile = lab.workspace.record, lab.profile
    key, own = lab.folder.name, {"build": lab.build, "domain": lab.domain}
    if record.find("costs", key, lab.build) is None:
        target = lab.target
        context = profile.data.max_prompt_tokens // 2
        costs = {
            name: asdict(
                measure_costs(load_model(path), target, gammas=profile.training.gammas, context_length=context)[0]
            )
            for name, path in lab.models.drafts.items()
        }
        record.append("costs", key, **own, costs=costs, parameters=count_parameters(profile, lab.models))
    texts = lab.list_texts("test")
    for name, path in lab.models.drafts.items():
        if record.find("drift", f"{key}/{name}/domain", lab.build) is None:
            figures = measure_draft(lab, load_model(path), lab.target, texts)
            record.append("drift", f"{key}/{name}/domain", **own, draft=name, target="domain", figures=figures)
    if record.find("drift", f"{key}/default/generic", lab.build) is None:
        generic = load_model(lab.models.generic_target, profile.training.dtype)
        texts = {
            setting: (temperature, lab.answer(generic, lab.queries.test, temperature, "test-generic"))
            for setting, (temperature, _) in texts.items()
        }
        figures = measure_draft(lab, load_model(lab.models.drafts["default"]), generic, texts)
        record.append("drift", f"{key}/default/generic", **own, draft="default", target="generic", figures=figures)
