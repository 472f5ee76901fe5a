"""How the engines that serve a draft let it draft, which decides what acceptance means there."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ServingEngine:
    """An engine's rule where the target samples; where it is greedy they are all the same.

    Args:
        name (`str`): The engine.
        draft_sampling (`str`): `"stochastic"` or `"greedy"`, see [`~spec_kd.evaluation.replay`].
        rule (`str`): The rule in words.
        source (`str`): Where that is said.
    """

    name: str
    draft_sampling: str
    rule: str
    source: str


SERVING_ENGINES: dict[str, ServingEngine] = {
    engine.name: engine
    for engine in (
        ServingEngine(
            "transformers",
            "stochastic",
            "the draft samples, and its token is accepted with probability min(1, p/q)",
            "`_speculative_sampling` in transformers/generation/utils.py (5.23), after arXiv 2211.17192",
        ),
        ServingEngine(
            "vllm",
            "greedy",
            "the draft proposes its most likely token, which is accepted with the target's probability for it",
            "default of vLLM's draft models, as named in review of TensorRT-LLM pull request 15775",
        ),
        ServingEngine(
            "sglang",
            "greedy",
            "the draft proposes its most likely token, which is accepted with the target's probability for it",
            "sgl-project/sglang issue 10308, for topk = 1",
        ),
        ServingEngine(
            "llama.cpp",
            "greedy",
            "the draft proposes its most likely token, which is accepted if the target samples the same",
            "`common_sampler_sample_and_accept_n` in llama.cpp/common/sampling.cpp; drafts that are less sure than "
            "`--draft-p-min` end early there, which is not modelled",
        ),
        ServingEngine(
            "tensorrt-llm",
            "greedy",
            "the draft proposes its most likely token, which is accepted if the target samples the same",
            "default without `use_rejection_sampling`, TensorRT-LLM pull request 15775",
        ),
    )
}


def find_serving_engine(name: str) -> ServingEngine:
    """The engine of that name; raises `ValueError` that lists them."""
    if name not in SERVING_ENGINES:
        raise ValueError(f"`engine` is {name!r}, but must be one of {', '.join(SERVING_ENGINES)}.")
    return SERVING_ENGINES[name]
