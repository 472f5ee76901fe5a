"""Options of generation with vLLM, named as in TRL."""

from dataclasses import dataclass

from spec_kd.checks import check_choice
from spec_kd.options import document_options, option

VLLM_MODES = ("colocate", "server")


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
