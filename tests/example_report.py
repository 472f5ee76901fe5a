"""An evaluation report as it could come out of a run, built by formula: two drafts, two settings, sixteen gammas."""

from dataclasses import replace

from spec_kd.evaluation.metrics import Interval
from spec_kd.evaluation.report.content import (
    AssistedReport,
    Breakdown,
    BreakdownRow,
    Comparison,
    CostReport,
    DraftReport,
    EvaluationReport,
    GammaReport,
    SettingReport,
    ShownPrompt,
)
from spec_kd.evaluation.report.left_out import LeftOut, LeftOutMetric

NAN = float("nan")
BEFORE, AFTER = "org/draft-generic", "outputs/draft_<script>alert('name')</script>"
COST_RATIO, OVERHEAD = {1: 0.12, 8: 0.15}, 0.05
GAMMAS = range(1, 17)
PROMPT = (
    "<|user|>\n把下面这句话翻译成英文:\n<script>alert('prompt')</script>\n"
    "\t如果 x < 3 && y > 5,那么 `f(x)` | g(y)?\n<|assistant|>\n"
)
LONG_PROMPT = "<|system|>\n" + "You may call these tools. " * 40 + PROMPT
TOKENS = ["If", " x", " <", " ", "3", " &&", " y", " >", " 5", ",", " then", "\n\n", "```", "\n", "f", "(x)"]
TOKENS += ["\t", "</", "div", ">", "\n", "好", "的", "。", "  ", "<|end|>"]


def around(value: float, width: float) -> Interval:
    return Interval(value, value - width, value + width)


def expect_block_efficiency(alpha: float, gamma: int) -> float:
    """Tokens a round where every token is accepted with the same probability (arXiv 2211.17192, eq. 1)."""
    return (1 - alpha ** (gamma + 1)) / (1 - alpha)


def verify_cost(gamma: int, batch_size: int) -> float:
    return 1 + 0.004 * batch_size * gamma


def build_gamma(alpha: float, gamma: int, batch_sizes: tuple[int, ...]) -> GammaReport:
    block_efficiency = expect_block_efficiency(alpha, gamma)
    speedups = {b: block_efficiency / (gamma * COST_RATIO[b] + verify_cost(gamma, b) + OVERHEAD) for b in batch_sizes}
    return GammaReport(
        num_assistant_tokens=gamma,
        block_efficiency=around(block_efficiency, 0.08 * alpha * block_efficiency),
        acceptance_rate=around((block_efficiency - 1) / gamma, 0.02),
        predicted_speedup={str(b): around(speedup, 0.05 * speedup) for b, speedup in speedups.items()},
    )


def build_breakdowns(alpha: float, tokens: int) -> list[Breakdown]:
    positions = {"1 to 16": 0.3, "17 to 64": 0.55, "65 to 128": 0.15}
    classes = {
        "word": 0.5,
        "digit": 0.1,
        "JSON | punctuation": 0.25,
        "CJK 汉字": 0.1,
        "whitespace": 0.048,
        "rare": 0.002,
    }
    scales = {"digit": 0.6, "CJK 汉字": 0.35, "JSON | punctuation": 1.25, "rare": 0.1}
    return [
        Breakdown(
            title="position",
            rows=[
                BreakdownRow(
                    label=label, prompts=128, tokens=int(share * tokens), alpha=around(alpha * (1 + 0.1 * i), 0.02)
                )
                for i, (label, share) in enumerate(positions.items())
            ],
        ),
        Breakdown(
            title="token class",
            rows=[
                BreakdownRow(
                    label=label,
                    prompts=int(128 * share**0.2),
                    tokens=int(share * tokens),
                    alpha=around(alpha * scales.get(label, 1), 0.005 / share**0.5),
                )
                for label, share in classes.items()
            ],
        ),
        Breakdown(
            title="tool <b>name</b>",
            rows=[
                BreakdownRow(
                    label=label,
                    prompts=prompts,
                    tokens=prompts * 40,
                    alpha=around(alpha, 0.03) if prompts > 1 else Interval(alpha, NAN, NAN),
                    block_efficiency=around(expect_block_efficiency(alpha, 5), 0.1),
                )
                for label, prompts in {"get_weather": 80, "<img src=x onerror=alert(1)>": 47, "$sum_{i}": 1}.items()
            ],
        ),
    ]


def build_worst(is_greedy: bool) -> list[ShownPrompt]:
    graded = [(0.07 + 0.37 * i * i) % 1 for i in range(len(TOKENS))]
    acceptance = [float(a > 0.5) for a in graded] if is_greedy else graded
    return [
        ShownPrompt(row=17, prompt=PROMPT, tokens=TOKENS, acceptance=acceptance, block_efficiency=1.13),
        ShownPrompt(row=4, prompt=LONG_PROMPT, tokens=TOKENS * 6, acceptance=acceptance * 6, block_efficiency=1.21),
    ]


def build_left_out(alpha: float) -> list[LeftOut]:
    return [
        LeftOut(
            kind="looping",
            responses=16,
            share=0.125,
            metrics=[
                LeftOutMetric(name="alpha", of_all=around(alpha, 0.012), without=around(alpha - 0.05, 0.02)),
                LeftOutMetric(name="block_efficiency", of_all=around(2.48, 0.1), without=around(2.2, 0.1)),
            ],
        )
    ]


def build_setting(name: str, temperature: float, alpha: float, full: bool) -> SettingReport:
    batch_sizes = (1, 8) if full else ()
    by_gamma = [build_gamma(alpha, gamma, batch_sizes) for gamma in GAMMAS]
    if full:
        fewer = [build_gamma(alpha - 0.05, gamma, batch_sizes) for gamma in GAMMAS]
        by_gamma = [replace(one, without={"looping": other}) for one, other in zip(by_gamma, fewer, strict=True)]
    best = {
        str(b): max(by_gamma, key=lambda g, b=b: g.predicted_speedup[str(b)].value).num_assistant_tokens
        for b in batch_sizes
    }
    is_t1 = temperature > 0
    return SettingReport(
        name=name,
        temperature=temperature,
        draft_sampling="stochastic",
        prompts=128,
        tokens=5432,
        alpha=around(alpha, 0.012),
        alpha_kind="estimate" if full and is_t1 else "exact",
        alpha_bounds=(alpha - 0.01, alpha + 0.015) if full and is_t1 else None,
        by_gamma=by_gamma,
        acceptance_rate_per_position=[around(alpha**k, 0.02) for k in range(1, 6)],
        best_gamma=best,
        break_even_alpha={"1": 0.1612, "8": 0.2034} if full else {},
        breakdowns=build_breakdowns(alpha, 5432) if full else [],
        worst=build_worst(not is_t1) if full else [],
        assisted=AssistedReport(
            prompts=16,
            num_assistant_tokens=5,
            block_efficiency=around(expect_block_efficiency(alpha, 5) + 0.03, 0.2),
            acceptance_rate=around(alpha * 0.7, 0.05),
            speedup=around(1.3717, 0.11),
            tokens_per_second=1234.56,
            plain_tokens_per_second=900.01,
            replayed_block_efficiency=around(expect_block_efficiency(alpha, 5), 0.19),
            predicted_speedup=1.42,
        )
        if full and is_t1
        else None,
        left_out=build_left_out(alpha) if full else [],
    )


def build_draft(name: str, alphas: dict[float, float], full: bool = True) -> DraftReport:
    costs = [
        CostReport(
            batch_size=b,
            cost_ratio=COST_RATIO[b],
            verify_cost={str(gamma): verify_cost(gamma, b) for gamma in GAMMAS},
            round_overhead=OVERHEAD,
            source="measured on this machine: 2 CPU cores, float32, 20 repeats, after 3 warm-ups; not a GPU's",
            target_step_seconds=0.0213 if b == 1 else None,
        )
        for b in COST_RATIO
    ]
    settings = [build_setting(f"t{t:g}" if t else "greedy", t, alpha, full) for t, alpha in alphas.items()]
    return DraftReport(name=name, settings=settings, costs=costs if full else [])


def build_report() -> EvaluationReport:
    """Two drafts, the second better; every section has something to show, and names and texts contain markup."""
    drafts = [build_draft(BEFORE, {1.0: 0.23, 0.0: 0.08}), build_draft(AFTER, {1.0: 0.62, 0.0: 0.634})]
    differences = {
        ("t1", "alpha"): (0.39, 0.02),
        ("t1", "block_efficiency"): (1.18, 0.1),
        ("greedy", "alpha"): (0.554, 0.6),
        ("greedy", "block_efficiency"): (1.46, 0.2),
    }
    comparisons = [
        Comparison(setting=setting, metric=metric, draft=AFTER, baseline=BEFORE, difference=around(*difference))
        for (setting, metric), difference in differences.items()
    ]
    return EvaluationReport(
        drafts=drafts,
        comparisons=comparisons,
        num_assistant_tokens=5,
        serving_engine="vllm",
        serving_rule="The draft samples at the request's temperature; rejection keeps the target's distribution.",
        provenance={
            "target": {"name": "org/target", "revision": "0123abc", "dtype": "float32"},
            "data": {"name": "org/conversations", "split": "test", "prompts": 128, "temperatures": [1.0, 0.0]},
            "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
            "machine": "2 CPU cores <unknown>",
            "command": "spec-kd evaluate --draft outputs/draft --target org/target --gamma 5 --gate block_efficiency=2 "
            "--data https://example.org/data.jsonl | tee log",
            "seconds": 61.5,
            "revision_of_the_data": None,
        },
    )


def build_small_report() -> EvaluationReport:
    """One draft on one prompt: no costs, no assisted generation, no breakdowns, no intervals, one gamma."""
    alpha = Interval(0.5, NAN, NAN)
    setting = SettingReport(
        name="t0.7_greedy_draft",
        temperature=0.7,
        draft_sampling="greedy",
        prompts=1,
        tokens=40,
        alpha=alpha,
        alpha_kind="exact",
        by_gamma=[GammaReport(num_assistant_tokens=1, block_efficiency=Interval(1.5, NAN, NAN), acceptance_rate=alpha)],
        acceptance_rate_per_position=[alpha],
    )
    return EvaluationReport(
        drafts=[DraftReport(name="draft", settings=[setting])],
        comparisons=[],
        num_assistant_tokens=1,
        serving_engine="transformers",
        serving_rule="The draft is greedy.",
        provenance={},
    )
