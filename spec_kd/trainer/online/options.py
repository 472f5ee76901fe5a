"""Groups of options of `OnlineGKDConfig`: those of serving requests, of vLLM, and TRL's names for them."""

from dataclasses import dataclass

from spec_kd.acceptance import check_num_assistant_tokens, check_sampling
from spec_kd.decoding.options import DRAFT_SAMPLING_HELP, NUM_ASSISTANT_TOKENS_HELP
from spec_kd.losses import SignalSpec
from spec_kd.open_types import Arguments
from spec_kd.options import check_choice, check_int, document_options, option, refuse
from spec_kd.trainer.configs import to_dict

TRAINED_POSITIONS = ("rejected", "all")
VLLM_MODES = ("colocate", "server")
# Options of TRL's two configurations that mean something else here, or nothing: what to use instead.
INSTEAD = {
    "seq_kd": "Set `sample_from='target'` with `lmbda=1.0`: the target then writes every completion.",
    "min_p": "Completions are sampled with `top_k` and `top_p` alone.",
    "repetition_penalty": "Completions are sampled from the plain softmax, cut by `top_k` and `top_p` alone.",
    "generation_kwargs": "Completions are sampled with `generation_temperature`, `top_k` and `top_p` alone.",
    "chat_template_kwargs": "Add a `chat_template_kwargs` column to the dataset.",
    "cache_implementation": "Use `use_transformers_continuous_batching=True` or `use_vllm=True` to generate faster.",
    "max_tool_calling_iterations": "Tools are not called; put their results into the prompts.",
}


@document_options
@dataclass
class StreamingOptions:
    """Options of learning from served requests (Online Speculative Decoding, arXiv 2310.07177)."""

    update_interval: int | None = option(
        "Requests that each process serves between two updates: a multiple of `per_device_train_batch_size`, which "
        "sets `gradient_accumulation_steps`. By default these two decide.",
        default=None,
    )
    num_assistant_tokens: int = option(NUM_ASSISTANT_TOKENS_HELP, default=5)
    draft_sampling: str = option(DRAFT_SAMPLING_HELP, default="stochastic")
    trained_positions: str = option(
        "Tokens that the loss is over: 'rejected', where the target corrected the draft, or 'all'.",
        default="rejected",
    )
    served_signal: str = option(
        "Part of the target's distribution that is kept at each token: a method of `generate_responses(..., "
        "teacher_signal=...)` that serves the divergence.",
        default="sampled_logprobs",
    )
    served_signal_size: int | None = option(
        "Number of draws or of most likely ids that `served_signal` keeps; the method's own number by default.",
        default=None,
    )

    def build_signal_spec(self) -> SignalSpec:
        """What `served_signal` and `served_signal_size` ask for; raises `ValueError` if they do not go together."""
        return SignalSpec(self.served_signal).sparse_method.build_spec(self.served_signal_size)

    def check_streaming(self, temperature: float, batch_size: int) -> None:
        """Raises `ValueError` for an option out of its range.

        Args:
            temperature (`float`): Sampling temperature.
            batch_size (`int`): Requests of a batch, which `update_interval` must be a multiple of.
        """
        check_num_assistant_tokens(self.num_assistant_tokens)
        check_sampling(temperature, self.draft_sampling)
        check_choice("trained_positions", self.trained_positions, TRAINED_POSITIONS)
        for name in ("update_interval", "served_signal_size"):
            check_int(name, getattr(self, name), is_optional=True)
        self.build_signal_spec()
        if self.update_interval is not None and self.update_interval % batch_size:
            raise ValueError(
                f"`update_interval={self.update_interval}` is not a multiple of `per_device_train_batch_size="
                f"{batch_size}`, and requests are learned in such batches. Change one of them."
            )


@document_options
@dataclass
class VLLMOptions:
    """Options of generation with vLLM instead of transformers; names and defaults are those of TRL.

    See [`~trl.DistillationConfig`]. A server is started before the training, with `VLLM_SERVER_DEV_MODE=1 vllm serve
    DRAFT --weight-transfer-config '{"backend": "nccl"}'`.
    """

    use_vllm: bool = option("Whether vLLM writes the draft's completions.", default=False)
    vllm_mode: str = option(
        "Place of vLLM: 'colocate', in the training processes, whose devices it shares; or 'server', a server that "
        "runs already.",
        default="colocate",
    )
    vllm_model_impl: str = option(
        "Implementation of the model in a colocated vLLM: 'vllm' or 'transformers'.", default="vllm"
    )
    vllm_enable_sleep_mode: bool = option(
        "Whether a colocated vLLM gives its memory back between generations.", default=False
    )
    vllm_server_base_url: str | None = option(
        "URL of the vLLM server; by default, it is made of host and port.", default=None
    )
    vllm_server_host: str = option("Host of the vLLM server.", default="0.0.0.0")
    vllm_server_port: int = option("Port of the vLLM server.", default=8000)
    vllm_server_timeout: float = option("Seconds to wait until the vLLM server is up.", default=240.0)
    vllm_group_port: int = option("Port over which the vLLM server is sent new weights.", default=51216)
    vllm_gpu_memory_utilization: float = option("Share of each device's memory for a colocated vLLM.", default=0.3)
    vllm_max_model_length: int | None = option(
        "Number of tokens of prompt and completion for which a colocated vLLM has room; the draft's positions by "
        "default.",
        default=None,
    )
    vllm_tensor_parallel_size: int = option(
        "Number of processes that share one colocated copy of the draft; it must divide the number of processes.",
        default=1,
    )

    def check_vllm(self, mode: str, lmbda: float, sample_from: str) -> None:
        """Raises `ValueError` for `use_vllm=True` with an unknown `vllm_mode`, or in a run that vLLM cannot write for.

        Args:
            mode (`str`), lmbda (`float`), sample_from (`str`): Options of the [`OnlineGKDConfig`].
        """
        if not self.use_vllm:
            return
        check_choice("vllm_mode", self.vllm_mode, VLLM_MODES)
        refuse(
            (
                mode != "on_policy",
                f"`mode={mode!r}` serves requests by this package's own speculative decoding, whose rounds vLLM does "
                "not show. Set `use_vllm=False`.",
            ),
            (
                sample_from != "draft",
                f"`sample_from={sample_from!r}` needs the target as a writer, but with `use_vllm=True` vLLM holds the "
                "draft alone. Set `sample_from='draft'`, or `use_vllm=False`.",
            ),
            (lmbda == 0, "`use_vllm=True` is for generated completions, but `lmbda=0` generates none. Drop it."),
        )


@document_options
@dataclass
class TRLDistillationOptions:
    """Options by the names that TRL's `GKDConfig` and `DistillationConfig` have for them."""

    max_completion_length: int | None = option(
        "TRL's name of `max_new_tokens`, which is used by default.", default=None
    )
    teacher_model_revision: str | None = option(
        "Revision of the teacher, as in `teacher_model_init_kwargs={'revision': ...}`; its main one by default.",
        default=None,
    )
    disable_dropout: bool = option("Whether the draft is trained without its dropout.", default=False)
    seq_kd: bool = option(
        "Option of TRL's GKD, which is refused: set `sample_from='target'` with `lmbda=1.0`.", default=False
    )

    def resolve_length(self, max_new_tokens: int, default: int) -> int:
        """`max_new_tokens`, or `max_completion_length` if that is set.

        Args:
            max_new_tokens (`int`): Value of the option `max_new_tokens`.
            default (`int`): Default of that option.

        Raises:
            ValueError: If both are set and differ, and for `seq_kd=True`.
        """
        length = self.max_completion_length
        refuse(
            (self.seq_kd, f"`seq_kd=True` is an option of TRL's GKD. {INSTEAD['seq_kd']}"),
            (
                length is not None and max_new_tokens not in (default, length),
                f"`max_completion_length={length}` and `max_new_tokens={max_new_tokens}` are the same option. Set one "
                "of them.",
            ),
        )
        return max_new_tokens if length is None else length

    def resolve_init_kwargs(self, init_kwargs: Arguments | str | None) -> Arguments | str | None:
        """`teacher_model_init_kwargs` with `teacher_model_revision`; raises `ValueError` if they name two revisions."""
        if self.teacher_model_revision is None:
            return init_kwargs
        options = to_dict(init_kwargs)
        if options.setdefault("revision", self.teacher_model_revision) != self.teacher_model_revision:
            raise ValueError(
                f"`teacher_model_revision={self.teacher_model_revision!r}` and the revision "
                f"{options['revision']!r} in `teacher_model_init_kwargs` differ. Set one of them."
            )
        return options
