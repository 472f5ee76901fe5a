"""Options of the training on completions that are written while it runs."""

from dataclasses import dataclass, field, fields

from spec_kd.acceptance import check_num_assistant_tokens, check_sampling
from spec_kd.checks import check_int, check_number
from spec_kd.engines.base import SignalSpec
from spec_kd.engines.sparse_recorder import complete_request
from spec_kd.losses import SPARSE_METHODS
from spec_kd.open_types import JsonObject
from spec_kd.sampling.options import check_truncation
from spec_kd.trainer.online.on_policy import SOURCES
from spec_kd.trainer.online.streaming import TRAINED_POSITIONS
from spec_kd.trainer.online.vllm_options import VLLMOptions
from spec_kd.trainer.trl_distillation import DEFAULTS_OF_TRL, TRLDistillationOptions, translate_options
from spec_kd.trainer.white_box_distill_config import WhiteBoxDistillConfig

MODES = ("on_policy", "streaming")


@dataclass
class OnlineGKDConfig(WhiteBoxDistillConfig, VLLMOptions, TRLDistillationOptions):
    r"""
    Configuration of [`OnlineGKDTrainer`]: everything of [`WhiteBoxDistillConfig`], [`VLLMOptions`] and
    [`TRLDistillationOptions`], and:

    Args:
        mode (`str`, *optional*, defaults to `"on_policy"`):
            `"on_policy"`: completions are generated while the draft trains (GKD, arXiv 2306.13649). `"streaming"`:
            requests are served by speculative decoding, and the draft learns from serving (Online Speculative Decoding,
            arXiv 2310.07177).
        lmbda (`float`, *optional*, defaults to `0.5`):
            Probability, for each example at each visit, that its completion is generated. 0: the dataset's
            completions only, as [`WhiteBoxDistillTrainer`]; 1: generated ones only, for which prompts are enough, and
            always so when streaming.
        sample_from (`str`, *optional*, defaults to `"draft"`):
            Who writes on policy: `"draft"`, `"target"`, or `"mixed"`: each token from the draft with probability `mix`,
            else from the target (arXiv 2310.07177). Streamed text is the target's, with the draft's help.
        mix (`float`, *optional*, defaults to `0.5`):
            Probability of a token of the draft with `sample_from="mixed"`.
        generation_temperature (`float`, *optional*, defaults to `1.0`):
            Of the sampling, 0.0 for greedy. TRL's GKD calls it `temperature`, which here is the loss temperature.
        top_k (`int`, *optional*, defaults to `0`): Most likely ids to sample from on policy; 0 for all.
        top_p (`float`, *optional*, defaults to `1.0`): Mass of the most likely ids to sample from on policy.
        max_new_tokens (`int`, *optional*, defaults to `128`):
            Most tokens of a generated completion. `max_length` limits rows of the dataset only.
        generation_batch_size (`int`, *optional*):
            Prompts generated at a time, of similar lengths; all of an optimizer step's on this process by default.
        num_iterations (`int`, *optional*, defaults to `1`):
            Optimizer steps in a row on the same completions. An epoch grows as many times; its last rows, fewer than an
            optimizer step takes, are visited once.
        use_transformers_continuous_batching (`bool`, *optional*, defaults to `False`):
            Whether one model's text on policy comes from transformers' continuous batching over a paged cache, made for
            GPUs. Named as in TRL's GRPO.
        transformers_continuous_batching_config (`dict`, *optional*):
            Arguments of [`~transformers.generation.ContinuousBatchingConfig`].
        update_interval (`int`, *optional*):
            When streaming, requests that each process serves between two updates: a multiple of
            `per_device_train_batch_size`, which sets `gradient_accumulation_steps`. As those two say by default.
        num_assistant_tokens (`int`, *optional*, defaults to `5`): When streaming, tokens drafted in a round.
        draft_sampling (`str`, *optional*, defaults to `"stochastic"`):
            When streaming, the rule of the papers, or `"greedy"`, as most servers draft at any temperature.
        trained_positions (`str`, *optional*, defaults to `"rejected"`):
            When streaming, `"rejected"`: the loss is over the tokens where the target corrected the draft; or `"all"`.
        served_signal (`str`, *optional*, defaults to `"sampled_logprobs"`):
            When streaming, what is kept of the target's distribution at each token: a method of
            `generate_responses(..., teacher_signal=...)`, which must serve the divergence.
        served_signal_size (`int`, *optional*): Draws, or the most likely ids, that it keeps; the method's default.
        log_completions (`bool`, *optional*, defaults to `False`):
            Whether to write the latest generated texts of process 0 to `completions/step-N.jsonl` in `output_dir`, at
            every logging step.
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012 (TRL's name)
        *WhiteBoxDistillConfig._VALID_DICT_FIELDS,
        "transformers_continuous_batching_config",
    ]

    mode: str = field(
        default="on_policy",
        metadata={"help": "'on_policy': text is generated while training; 'streaming': served requests are learnt."},
    )
    lmbda: float | None = field(
        default=None,
        metadata={"help": "Probability, per example, that its completion is generated: 0.5, and 1 when streaming."},
    )
    sample_from: str = field(
        default="draft", metadata={"help": "Who writes: 'draft', 'target' or 'mixed' (token by token, see `mix`)."}
    )
    mix: float = field(
        default=0.5, metadata={"help": "Probability that a token is the draft's with `sample_from='mixed'`."}
    )
    generation_temperature: float = field(
        default=1.0, metadata={"help": "Temperature of the sampling, 0 for greedy; `temperature` is that of the loss."}
    )
    top_k: int = field(default=0, metadata={"help": "Most likely ids to sample from; 0 for all."})
    top_p: float = field(default=1.0, metadata={"help": "Mass of the most likely ids to sample from."})
    max_new_tokens: int = field(default=128, metadata={"help": "Most tokens of a generated completion."})
    generation_batch_size: int | None = field(
        default=None, metadata={"help": "Prompts generated at a time; all of an optimizer step's by default."}
    )
    num_iterations: int = field(
        default=1, metadata={"help": "Optimizer steps in a row on the same generated completions."}
    )
    use_transformers_continuous_batching: bool = field(
        default=False, metadata={"help": "Whether text on policy comes from transformers' continuous batching."}
    )
    transformers_continuous_batching_config: dict | str | None = field(
        default=None, metadata={"help": "Arguments of transformers' ContinuousBatchingConfig."}
    )
    update_interval: int | None = field(
        default=None, metadata={"help": "Streaming: requests that each process serves between two updates."}
    )
    num_assistant_tokens: int = field(default=5, metadata={"help": "Streaming: tokens drafted in a round (gamma)."})
    draft_sampling: str = field(
        default="stochastic", metadata={"help": "Streaming: 'stochastic', or 'greedy' as most servers draft."}
    )
    trained_positions: str = field(
        default="rejected", metadata={"help": "Streaming: loss where the target corrected the draft, or 'all' tokens."}
    )
    served_signal: str = field(
        default="sampled_logprobs", metadata={"help": "Streaming: what is kept of the target at each token."}
    )
    served_signal_size: int | None = field(
        default=None, metadata={"help": "Streaming: draws or most likely ids that `served_signal` keeps."}
    )
    log_completions: bool = field(
        default=False, metadata={"help": "Whether to write generated texts to `completions/` at every logging step."}
    )

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"`mode` is {self.mode!r}, but must be one of {', '.join(MODES)}.")
        if self.lmbda is None:
            self.lmbda = 1.0 if self.mode == "streaming" else 0.5
        for name in ("lmbda", "mix"):
            check_number(name, getattr(self, name), 0, 1, reason="It is a probability.")
        if self.sample_from not in SOURCES:
            raise ValueError(f"`sample_from` is {self.sample_from!r}, but must be one of {', '.join(SOURCES)}.")
        check_number("generation_temperature", self.generation_temperature, 0, reason="0 is greedy.")
        check_truncation(self.top_k, self.top_p)
        self.read_lengths(type(self).max_new_tokens)
        for name in ("max_new_tokens", "num_iterations", "num_assistant_tokens"):
            check_int(name, getattr(self, name))
        for name in ("generation_batch_size", "update_interval", "served_signal_size"):
            check_int(name, getattr(self, name), is_optional=True)
        self.check_vllm(self.mode, self.lmbda, self.sample_from)
        if self.use_transformers_continuous_batching and (
            self.mode != "on_policy" or self.sample_from == "mixed" or self.use_vllm
        ):
            raise ValueError(
                "`use_transformers_continuous_batching=True` is for text that one model writes on policy, without "
                "`mode='streaming'`, `sample_from='mixed'` and `use_vllm`. Set it to False."
            )
        if self.mode == "streaming":
            self._set_up_streaming()
        elif self.update_interval is not None:
            raise ValueError(
                f"`update_interval={self.update_interval}` counts served requests, which only `mode='streaming'` has. "
                "Set `gradient_accumulation_steps`."
            )
        if self.lmbda > 0:
            self._check_rows()
        elif self.num_iterations > 1:
            raise ValueError(
                f"`num_iterations={self.num_iterations}` repeats generated completions, but `lmbda=0` generates none. "
                "Raise `num_train_epochs` to repeat those of the dataset."
            )
        super().__post_init__()
        self.read_revision()
        if self.mode == "streaming":
            SPARSE_METHODS[self.served_signal].check_serves(self.build_loss().divergence)

    @classmethod
    def translate(cls, values: JsonObject, source: type) -> JsonObject:
        """As [`DraftConfig.translate`], of TRL's `GKDConfig` and `DistillationConfig`."""
        return translate_options(values, source, {option.name for option in fields(cls) if option.init})

    def describe(self) -> str:
        """What a script of TRL may expect to be otherwise, in one sentence."""
        return (
            f"Divergence {self.divergence}{'' if self.beta is None else f' (beta={self.beta})'} at temperature "
            f"{self.temperature}, learning rate {self.learning_rate}; {self.lmbda:.0%} of the completions are "
            f"generated, at temperature {self.generation_temperature} and with at most {self.max_new_tokens} tokens "
            f"(in TRL, {DEFAULTS_OF_TRL})."
        )

    def build_signal_spec(self) -> SignalSpec:
        """What `served_signal` and `served_signal_size` ask for; raises `ValueError` if they do not go together."""
        size = self.served_signal_size
        is_top_k = self.served_signal == "top_k_tail"
        return complete_request(SignalSpec(self.served_signal, None if is_top_k else size, size if is_top_k else None))

    def _set_up_streaming(self) -> None:
        has_no_use = {"lmbda": 1.0, "sample_from": "draft", "num_iterations": 1, "top_k": 0, "top_p": 1.0}
        for name, value in has_no_use.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` has no use with `mode='streaming'`: every request is served "
                    "once, by speculative decoding from the plain softmax. Leave it out."
                )
        check_num_assistant_tokens(self.num_assistant_tokens)
        check_sampling(self.generation_temperature, self.draft_sampling)
        if self.trained_positions not in TRAINED_POSITIONS:
            raise ValueError(
                f"`trained_positions` is {self.trained_positions!r}, but must be one of {', '.join(TRAINED_POSITIONS)}."
            )
        self.build_signal_spec()
        self.train_sampling_strategy = "sequential"
        if self.update_interval is None:
            return
        steps, rest = divmod(self.update_interval, self.per_device_train_batch_size)
        if rest:
            raise ValueError(
                f"`update_interval={self.update_interval}` is not a multiple of `per_device_train_batch_size="
                f"{self.per_device_train_batch_size}`, which the requests are learnt in. Change one of them."
            )
        self.gradient_accumulation_steps = steps

    def _check_rows(self) -> None:
        for name in ("packing", "padding_free"):
            if getattr(self, name):
                raise ValueError(
                    f"`{name}=True` strings examples together, but `lmbda={self.lmbda}` gives single ones another "
                    f"completion. Set `{name}=False`, or `lmbda=0` to train on the dataset's completions."
                )
        if self.assistant_only_loss:
            raise ValueError(
                f"`assistant_only_loss=True` trains on several turns of a row, but `lmbda={self.lmbda}` generates one "
                "completion behind a prompt. Make a row with `prompt` and `completion` of each turn."
            )
        if self.completion_only_loss is False:
            raise ValueError(
                f"`completion_only_loss=False` leaves no mark where the prompt ends, which `lmbda={self.lmbda}` needs "
                "to generate from there. Drop it."
            )
