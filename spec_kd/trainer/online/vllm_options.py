"""Options of generation with vLLM, named as in TRL."""

from dataclasses import dataclass, field

VLLM_MODES = ("colocate", "server")


@dataclass
class VLLMOptions:
    r"""
    Generation with vLLM instead of transformers. Names and defaults are those of [`~trl.DistillationConfig`].

    Args:
        use_vllm (`bool`, *optional*, defaults to `False`):
            Whether vLLM writes the draft's completions.
        vllm_mode (`str`, *optional*, defaults to `"colocate"`):
            `"colocate"`: vLLM runs in the training processes and shares their devices. `"server"`: in a server of its
            own, started before with `VLLM_SERVER_DEV_MODE=1 vllm serve DRAFT --weight-transfer-config '{"backend":
            "nccl"}'`.
        vllm_model_impl (`str`, *optional*, defaults to `"vllm"`):
            Implementation of the model in a colocated vLLM, `"vllm"` or `"transformers"`.
        vllm_enable_sleep_mode (`bool`, *optional*, defaults to `False`):
            Whether a colocated vLLM gives its memory back between generations.
        vllm_server_base_url (`str`, *optional*): Of the server; replaces host and port.
        vllm_server_host (`str`, *optional*, defaults to `"0.0.0.0"`): Of the server.
        vllm_server_port (`int`, *optional*, defaults to `8000`): Of the server.
        vllm_server_timeout (`float`, *optional*, defaults to `240.0`): Seconds to wait for the server to be up.
        vllm_group_port (`int`, *optional*, defaults to `51216`): Over which a server is sent new weights.
        vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.3`):
            Share of each device's memory for a colocated vLLM.
        vllm_max_model_length (`int`, *optional*):
            Tokens of prompt and completion for which a colocated vLLM has room; the draft's positions by default.
        vllm_tensor_parallel_size (`int`, *optional*, defaults to `1`):
            Processes that share one colocated copy of the draft. It must divide their number.
    """

    use_vllm: bool = field(default=False, metadata={"help": "Whether vLLM writes the draft's completions."})
    vllm_mode: str = field(
        default="colocate", metadata={"help": "'colocate': in the training processes; 'server': in a running server."}
    )
    vllm_model_impl: str = field(
        default="vllm", metadata={"help": "Model implementation of a colocated vLLM: 'vllm' or 'transformers'."}
    )
    vllm_enable_sleep_mode: bool = field(
        default=False, metadata={"help": "Whether a colocated vLLM gives its memory back between generations."}
    )
    vllm_server_base_url: str | None = field(
        default=None, metadata={"help": "URL of the vLLM server, in place of host and port."}
    )
    vllm_server_host: str = field(default="0.0.0.0", metadata={"help": "Host of the vLLM server."})
    vllm_server_port: int = field(default=8000, metadata={"help": "Port of the vLLM server."})
    vllm_server_timeout: float = field(
        default=240.0, metadata={"help": "Seconds to wait for the vLLM server to be up."}
    )
    vllm_group_port: int = field(
        default=51216, metadata={"help": "Port over which the vLLM server is sent new weights."}
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.3, metadata={"help": "Share of each device's memory for a colocated vLLM."}
    )
    vllm_max_model_length: int | None = field(
        default=None, metadata={"help": "Tokens of prompt and completion in a colocated vLLM; the draft's by default."}
    )
    vllm_tensor_parallel_size: int = field(
        default=1, metadata={"help": "Processes that share one colocated copy of the draft."}
    )

    def check_vllm(self, mode: str, lmbda: float, sample_from: str) -> None:
        """Raises `ValueError` for `use_vllm=True` with a mode that it does not have, or where it would not write.

        Args:
            mode (`str`), lmbda (`float`), sample_from (`str`): Of the [`OnlineGKDConfig`].
        """
        if not self.use_vllm:
            return
        if self.vllm_mode not in VLLM_MODES:
            raise ValueError(f"`vllm_mode` is {self.vllm_mode!r}, but must be one of {', '.join(VLLM_MODES)}.")
        if mode != "on_policy":
            raise ValueError(
                f"`mode={mode!r}` serves requests by this package's own speculative decoding, whose rounds vLLM does "
                "not show. Set `use_vllm=False`."
            )
        if sample_from != "draft":
            raise ValueError(
                f"`sample_from={sample_from!r}` needs the target as a writer, but with `use_vllm=True` vLLM holds the "
                "draft alone. Set `sample_from='draft'`, or `use_vllm=False`."
            )
        if lmbda == 0:
            raise ValueError("`use_vllm=True` is for generated completions, but `lmbda=0` generates none. Drop it.")
