"""Completions of the draft from vLLM, through TRL's own `VLLMGeneration`.

The API is that of TRL 1.16 and of the vLLM versions it supports. It was not run with vLLM itself, which needs a GPU:
the tests run TRL's real class over stand-ins for `vllm.LLM` and for TRL's client of a server.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import PreTrainedModel

from spec_kd._private import get_config_model_id
from spec_kd.engines.base import Completion
from spec_kd.heads import count_rows, unwrap_peft
from spec_kd.open_types import Argument, Call, JsonObject
from spec_kd.options import refuse
from spec_kd.sampling.generation import cut_after_eos, find_special_ids
from spec_kd.sampling.options import SamplingOptions
from spec_kd.trainer.online.online_gkd_config import OnlineGKDConfig
from spec_kd.trainer.online.writers import CompletionWriter, seeded
from spec_kd.vocabulary import ProcessingClass, count_real_ids

RULED_OUT = -100.0
"""The lowest logit bias that vLLM's servers accept: a factor of 4e-44 on the probability."""


class VLLMWriter(CompletionWriter):
    """Writes completions with a copy of the draft in vLLM, which is given the draft's weights at each call.

    EOS ids, ids beyond the tokenizer's vocabulary and the draft's own generation config are treated as in
    [`~spec_kd.trainer.online.writers.ModelWriter`]. Sampling in a colocated vLLM starts from the given seed; a
    server has its own, so that the same run need not give the same completions. With both, the batch may change a
    token, since the last bits of the logits depend on it.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The draft, not wrapped. Adapters are merged on the way to vLLM.
        accelerator (`Accelerator`): The training's; every process makes its own writer, all at the same time.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): Gives the vocabulary and an EOS.
        options (`SamplingOptions`): Temperature, top-k, top-p, length.
        args ([`OnlineGKDConfig`]): Its `vllm_*` options, its batch sizes and `seed`.

    Raises:
        ImportError: Without vLLM.
        ConnectionError: If no server answers within `vllm_server_timeout`.
    """

    roles = ()  # vLLM has its own copy of the draft

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        accelerator: Accelerator,
        processing_class: ProcessingClass,
        options: SamplingOptions,
        args: OnlineGKDConfig,
    ):
        draft = unwrap_peft(model)
        self._accelerator, self._options = accelerator, options
        self._group_size = args.vllm_tensor_parallel_size
        self._eos_ids, _ = find_special_ids(draft, processing_class)
        padded_rows = range(count_real_ids(processing_class), count_rows(draft.get_output_embeddings()))
        prompts_at_a_time = args.generation_batch_size or args.train_batch_size * args.gradient_accumulation_steps
        with seeded(f"{args.seed}:vllm", accelerator.device):  # vLLM sets torch's global random state when it starts
            self._vllm = import_vllm_generation()(
                model=model,
                accelerator=accelerator,
                processing_class=processing_class,
                mode=args.vllm_mode,
                server_base_url=args.vllm_server_base_url,
                server_host=args.vllm_server_host,
                server_port=args.vllm_server_port,
                server_timeout=args.vllm_server_timeout,
                group_port=args.vllm_group_port,
                tensor_parallel_size=args.vllm_tensor_parallel_size,
                gpu_memory_utilization=args.vllm_gpu_memory_utilization,
                max_model_length=args.vllm_max_model_length,
                max_num_seqs=prompts_at_a_time * args.vllm_tensor_parallel_size,
                enable_sleep_mode=args.vllm_enable_sleep_mode,
                model_impl=args.vllm_model_impl,
                trust_remote_code=args.trust_remote_code,
                temperature=options.temperature,
                top_p=options.top_p,
                top_k=options.top_k,
                max_completion_length=options.max_new_tokens,
                logprobs=None,
                generation_kwargs={
                    "ignore_eos": True,  # those that vLLM knows of, by the tokenizer saved with the draft
                    "stop_token_ids": self._eos_ids,
                    "logit_bias": dict.fromkeys(padded_rows, RULED_OUT),
                },
            )

        if args.vllm_mode == "server" and accelerator.is_main_process:  # which alone has a client
            _send_copies(self._vllm.vllm_client)

    def write(
        self,
        models: Mapping[str, PreTrainedModel],
        prompts: Sequence[list[int]],
        seed: str,
        numbers: Sequence[int] | None = None,
    ) -> list[Completion]:
        """As [`CompletionWriter.write`], once an optimizer step; vLLM samples all prompts from one generator.

        vLLM is given the weights each time. (TRL compares the step's number with the last one's, which a second
        `train()` sets back to 0.)

        Raises:
            RuntimeError: If vLLM stops before an EOS and before `max_new_tokens`.
        """
        device, index = self._accelerator.device, self._accelerator.process_index
        most = int(self._accelerator.gather(torch.tensor([len(prompts)], device=device)).max())
        if most == 0:
            return []
        # TRL distributes the completions as if every process had sent the same number of prompts
        asked = [*prompts, *[self._eos_ids[:1]] * (most - len(prompts))]
        own_seed = seed if numbers is None else f"{seed}:{numbers}"
        # processes that share a copy of the draft must draw the same tokens
        shared_seed = gather_object([own_seed])[index - index % self._group_size]
        with seeded(shared_seed, device):
            self._vllm.sync_weights()
            _, written, _, _ = self._vllm.generate(prompts=asked, images=None, num_generations=1)
        if len(written) != len(asked):
            raise RuntimeError(f"vLLM returned {len(written)} completions of {len(asked)} prompts.")
        return [self._read(ids, i) for i, ids in enumerate(written[: len(prompts)])]

    def _read(self, ids: Sequence[int], number: int) -> Completion:
        completion = Completion(*cut_after_eos(list(ids), self._eos_ids))
        if completion.finish_reason == "length" and len(completion.ids) < self._options.max_new_tokens:
            raise RuntimeError(
                f"vLLM ended completion {number} after {len(completion.ids)} of `max_new_tokens="
                f"{self._options.max_new_tokens}` and not at one of the EOS ids {self._eos_ids}. If it ran out of "
                "positions, raise `vllm_max_model_length` (or the server's `--max-model-len`)."
            )
        return completion


def _send_copies(client: Argument) -> None:
    """Lets TRL's client send copies of the weights.

    vLLM collects up to 1 GiB of weights from TRL's iterator before it sends them. By then TRL has unmerged the adapters
    in place, and ZeRO-3 has sharded what was gathered, so the server would get other weights.
    """
    send = client.update_named_params

    def update_named_params(metadata: list[JsonObject], named_params: Iterator[tuple[str, torch.Tensor]]) -> None:
        send(metadata, ((name, weight.clone()) for name, weight in named_params))

    client.update_named_params = update_named_params


def import_vllm_generation() -> Call[Argument]:
    """TRL's `VLLMGeneration`, which TRL exports if vLLM is installed; importing it loads vLLM.

    Raises:
        ImportError: Without vLLM.
    """
    try:
        from trl.generation import VLLMGeneration
    except ImportError as error:
        raise ImportError(
            f"`use_vllm=True` generates with vLLM, which is not there ({error}). Install it on a machine with a GPU "
            "(`pip install spec_kd[vllm]`), or set `use_vllm=False`."
        ) from error
    return VLLMGeneration


def check_vllm(args: OnlineGKDConfig, model: str | PreTrainedModel | PeftModel, num_processes: int) -> None:
    """Checks, before anything is loaded, that a [`VLLMWriter`] of the draft can be made.

    Args:
        args ([`OnlineGKDConfig`]): Configuration with `use_vllm=True`.
        model (`str`, `PreTrainedModel` or `PeftModel`): The draft.
        num_processes (`int`): Number of training processes.

    Raises:
        ImportError: Without vLLM.
        ValueError: For a draft that vLLM could not load, or a number of processes that is no multiple of
            `vllm_tensor_parallel_size`.
    """
    import_vllm_generation()
    if args.vllm_mode == "server":
        return
    refuse(
        (
            not isinstance(model, str) and not get_config_model_id(model.config),
            "`vllm_mode='colocate'` loads the draft from its path, but the `model` given was made in memory. Save it "
            "and pass the path, or set `use_vllm=False`.",
        ),
        (
            num_processes % args.vllm_tensor_parallel_size,
            f"`vllm_tensor_parallel_size={args.vllm_tensor_parallel_size}` does not divide the {num_processes} "
            "processes of this training. Set it to a divisor.",
        ),
    )
