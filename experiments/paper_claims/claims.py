"""Every claim of arXiv 2503.07807, and our own goal, with what was measured and whether it held."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from spec_kd.evaluation import Interval

from .compare import BLOCK_EFFICIENCY, SETTING_NAMES, compare, measure_drift_of
from .profile import Profile
from .questions import Comparison, Question
from .record import Record

HELD, FAILED, UNKNOWN = "held", "did not hold", "could not be told"
MISSING, PARTIAL = "not measured yet", "not all seeds run yet"


@dataclass(frozen=True)
class Claim:
    """A claim about the comparisons of a question.

    Args:
        text (`str`): In a sentence.
        stated (`str`): The paper's figure.
        question (`str`): Name of the question.
        threshold (`float`): What the relative difference of tokens a target pass must be above.
        mentions (`str`): Of the question's comparisons, those whose label has this in it.
    """

    text: str
    stated: str
    question: str
    threshold: float = 0.0
    mentions: str = ""


CLAIMS = [
    Claim("Offline beats online distillation in as many steps", "+11 to +25 %", "offline_online"),
    Claim("Offline beats online distillation in the same time", "+11 to +25 %", "offline_online_time"),
    Claim("White box beats black box in as many steps", "+2 to +10 %", "white_black"),
    Claim("White box beats black box in the same time", "+2 to +10 %", "white_black_time"),
    Claim("More data keeps helping", "rises throughout", "data_size"),
    Claim("More data keeps helping (synthetic queries)", "rises throughout", "synthetic_size"),
    Claim("Synthetic queries reach 80 % of historical ones", "80 to 93 %", "scenarios", -0.2, "synthetic"),
    Claim("Our goal: the recipe beats offline forward KL by 5 % at equal cost", "(ours)", "recipe", 0.05),
]
DRIFT = "A generic draft loses acceptance when the target is specialized"


@dataclass(frozen=True)
class Judgement:
    """A claim in one comparison and setting.

    Args:
        claim (`str`), stated (`str`): The claim and the paper's figure.
        where (`str`): Comparison and setting.
        interval (`Interval`, *optional*): What was measured.
        verdict (`str`): One of the five words of this module.
        is_relative (`bool`): Whether the interval is a share, else a difference of alpha.
    """

    claim: str
    stated: str
    where: str
    interval: Interval | None
    verdict: str
    is_relative: bool = True


def judge(interval: Interval, threshold: float, by_seed: Sequence[float] = ()) -> str:
    """Held if the whole interval and every seed alone are above the threshold, not held if they are below.

    The interval is over prompts and knows nothing of how runs differ, which the seeds show. What is neither could not
    be told.
    """
    if math.isnan(interval.low):
        return UNKNOWN
    if min([interval.low, *by_seed]) > threshold:
        return HELD
    return FAILED if max([interval.high, *by_seed]) < threshold else UNKNOWN


def judge_claims(profile: Profile, record: Record, questions: list[Question]) -> list[Judgement]:
    """All claims in all their comparisons, greedy and at temperature 1."""
    judgements = []
    for domain in profile.domains:
        for setting, name in SETTING_NAMES.items():
            drift = measure_drift_of(record, domain, setting)
            fall = None if drift is None else Interval(-drift.value, -drift.high, -drift.low)
            where = f"{domain}, {name}: fall of alpha"
            verdict = MISSING if fall is None else judge(fall, 0.0)
            judgements.append(Judgement(DRIFT, "falls", where, fall, verdict, is_relative=False))
    by_name = {question.name: question for question in questions}
    for claim in CLAIMS:
        question = by_name.get(claim.question)
        comparisons: list[Comparison] = [] if question is None else question.comparisons
        chosen = [comparison for comparison in comparisons if claim.mentions in comparison.label]
        if not chosen:
            judgements.append(Judgement(claim.text, claim.stated, "", None, MISSING))
        for comparison in chosen:
            for setting, name in SETTING_NAMES.items():
                found = compare(profile, record, comparison, question.seeds, setting, BLOCK_EFFICIENCY)
                interval = None if found is None else found.interval
                if found is None:
                    verdict = MISSING
                elif len(found.by_seed) < len(question.seeds):
                    verdict = PARTIAL
                else:
                    verdict = judge(found.interval, claim.threshold, found.by_seed)
                judgements.append(Judgement(claim.text, claim.stated, f"{comparison.label}, {name}", interval, verdict))
    return judgements
