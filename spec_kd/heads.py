"""Last hidden states and logits of a causal LM, in two separate steps and with public APIs only.

Losses and replayed evaluation need logits of *some* positions, and `(B, T, V)` for all of them is what runs out of
memory first. So the backbone runs once, and the head is called for the positions that are needed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TypeGuard, TypeVar, cast

import torch
from accelerate.utils import is_compiled_module
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel

from spec_kd.open_types import Argument, Call

Output = TypeVar("Output")

# Rows of a wide float32 head per product on a CPU. With few tokens its matrix library spends its time repacking the
# long, transposed head; taken in blocks that stay in the cache, as the left factor, it does not. Measured on 2 cores,
# 128 tokens x 3,584 -> 151,936: 1.2 s as hidden @ weight.T, 0.8 s in blocks of 2,048 to 4,096 rows. Narrow heads, and
# bfloat16 on a CPU with AMX, are faster as they are: 426 tokens x 192 -> 49,152 take 87 instead of 150 ms, and 20
# instead of 53 ms in bfloat16.
BLOCK_ROWS = 4096
MIN_BLOCK_WIDTH = 1024
# Tokens from which a product of 16-bit numbers on a CPU is rounded to them before it is added: converting its factors
# to float32 costs more with every token, reading and writing the sum does not. Measured on a core with AMX, 49,152 x
# 192: 77 instead of 153 ms with 426 tokens; 151,936 x 896: 0.86 instead of 0.44 s with 128.
MIN_ROUNDED_TOKENS = 256


@dataclass(frozen=True)
class LogitTransform:
    """Transform that an architecture applies to `hidden @ W.T + b` before the softmax: a scale, then a soft cap.

    Args:
        scale (`float`): Multiplier of the raw logits (Cohere, Granite, Falcon-H1, ...).
        softcap (`float`, *optional*): `softcap * tanh(logits / softcap)` after the scale (Gemma).
    """

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> "LogitTransform":
        """Reads the transform from a model config (from the text part of a multimodal one)."""
        config = config.get_text_config()
        names = ("logit_scale", "output_multiplier", "lm_head_multiplier")
        scale = next((value for name in names if (value := getattr(config, name, None)) is not None), None)
        scaling = getattr(config, "logits_scaling", None)
        # Granite divides by it and HyperCLOVA X multiplies; MiniCPM3 has divided the head's input already
        if scale is None and scaling is not None and config.model_type != "minicpm3":
            scale = scaling if config.model_type == "hyperclovax" else 1.0 / float(scaling)
        names = ("final_logit_softcapping", "softcap", "logits_soft_cap")  # Gemma, NanoChat, RecurrentGemma
        softcap = next((value for name in names if (value := getattr(config, name, None))), None)
        return cls(scale=1.0 if scale is None else float(scale), softcap=softcap)

    @property
    def is_identity(self) -> bool:
        """Whether logits stay as they are."""
        return self.scale == 1.0 and self.softcap is None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """The model's logits, of any shape, from the raw ones: scaled, then capped."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def unwrap_peft(model: nn.Module) -> PreTrainedModel:
    """The transformers model under `torch.compile` and a `PeftModel` (LoRA layers stay active), or `model` itself."""
    # Generation uses a growing cache and hooks, which take Dynamo minutes to trace.
    inner = model._orig_mod if is_compiled_module(model) else model
    # Accelerate's `is_peft_model` parses the metadata of installed packages at every call, which takes milliseconds.
    return cast(PreTrainedModel, inner.get_base_model() if isinstance(inner, PeftModel) else inner)


def unwrap_layer(module: nn.Module) -> nn.Module:
    """The embedding or head inside a PEFT wrapper: a LoRA layer's base layer, or the trained copy of a whole module."""
    if isinstance(module, ModulesToSaveWrapper):
        names = [name for name in module.active_adapters if name in module.modules_to_save]
        module = module.modules_to_save[names[0]] if names else cast(nn.Module, module.original_module)
    elif isinstance(module, TrainableTokensWrapper):
        module = cast(nn.Module, module.original_module)
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def count_rows(module: nn.Module) -> int:
    """Rows of an embedding or head, also if PEFT wraps it, or its weight is quantized or partitioned."""
    module = unwrap_layer(module)
    weight = getattr(module, "weight", None)
    shape: Sequence[int] = getattr(weight, "ds_shape", getattr(weight, "shape", ()))
    # The weight comes first: the numbers in PEFT's tied copies are swapped.
    if weight is not None and len(shape) == 2 and weight.is_floating_point():
        return shape[0]
    counts = (getattr(module, name, None) for name in ("out_features", "num_embeddings"))
    return next(count for count in (*counts, *shape) if isinstance(count, int))


def find_input_device(model: PreTrainedModel) -> torch.device:
    """The device that a model needs its `input_ids` on: that of its embedding, whatever wraps it."""
    return cast(torch.Tensor, unwrap_layer(model.get_input_embeddings()).weight).device


def is_whole(model: nn.Module) -> bool:
    """Whether all parameters are here: none partitioned by ZeRO-3 or FSDP2, none a meta tensor of FSDP2."""
    return not any(
        hasattr(parameter, "ds_id") or parameter.is_meta or isinstance(parameter, DTensor)
        for parameter in model.parameters()
    )


def are_equal_logits(logits: torch.Tensor, expected: torch.Tensor, is_exact: bool) -> bool:
    """Whether two computations of the same logits differ by rounding alone; `is_exact` says that all is float32."""
    # an unknown cap moves small logits by no more than a thousandth
    has_full_products = torch.get_float32_matmul_precision() == "highest"
    tolerance = (1e-4 if has_full_products else 0.01) if is_exact else 0.05
    logits, expected = logits.float().to(expected.device), expected.float()
    is_finite = expected.isfinite()  # a logit of -inf is a mask
    if not torch.equal(is_finite, logits.isfinite()):
        return False
    if not is_finite.any():
        return True  # nothing to compare; weights that are NaN are refused by name elsewhere
    logits, expected = logits[is_finite], expected[is_finite]
    return torch.allclose(logits, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item() + 1e-6)


def are_exact_logits(model: PreTrainedModel, logits: torch.Tensor) -> bool:
    """Whether a model computed these logits in float32, and not in mixed precision.

    accelerate turns logits of mixed precision into float32; their values are those of the shorter type.
    """
    is_float32 = model.dtype == logits.dtype == torch.float32
    return (
        is_float32
        and not torch.is_autocast_enabled(model.device.type)
        and not any(torch.equal(logits, logits.to(short).float()) for short in (torch.bfloat16, torch.float16))
    )


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; every submodule's own mode is restored, whatever happens."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, is_training in modes:
            module.training = is_training


def is_plain_matrix(head: nn.Module, dtype: torch.dtype) -> TypeGuard[nn.Linear]:
    """Whether `head` is a matrix of that dtype alone: quantized weights can sit inside a plain `nn.Linear` as well."""
    # FSDP2 makes a class of its own of each module's
    is_linear = type(head).forward is nn.Linear.forward and type(head.weight) in (torch.Tensor, nn.Parameter)
    return is_linear and head.weight.dtype == dtype


@dataclass(frozen=True)
class LogitHead:
    """A model's output head as a function of hidden states, restricted to the real vocabulary.

    Args:
        module (`torch.nn.Module`):
            The output embeddings. Their `forward` is called, so that quantized, LoRA and offloaded heads compute what
            they should. It is not `__call__`: ZeRO-3's hooks on the module would gather and release the weight at every
            call, which deadlocks if ranks make different numbers of calls. Gather around the calls instead.
        transform (`LogitTransform`): Scale and soft cap.
        vocab_size (`int`): Number of real ids; columns beyond them are padding and are cut.
    """

    module: nn.Module
    transform: LogitTransform
    vocab_size: int

    @classmethod
    def of(cls, model: PreTrainedModel, vocab_size: int) -> "LogitHead":
        """The head of `model`, also inside a `PeftModel`."""
        model = unwrap_peft(model)
        return cls(model.get_output_embeddings(), LogitTransform.from_config(model.config), vocab_size)

    def __call__(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of `hidden` `(..., H)` as float32 `(..., vocab_size)`.

        `out` is a buffer for the products, as in `project`.
        """
        return self.transform(self.project(hidden, out).float())

    def project(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The products `(..., vocab_size)` of `hidden` `(..., H)` in the head's dtype, before scale and soft cap.

        `out`, a buffer `(..., rows)` of the head's dtype, saves an allocation if the head is a plain matrix. The result
        is then valid until the next use of the buffer.
        """
        hidden = hidden.to(next(chain(self.module.parameters(), self.module.buffers())).device)
        if is_plain_matrix(self.module, hidden.dtype) and not torch.is_autocast_enabled(hidden.device.type):
            logits = project(hidden, self.module.weight, self.module.bias, out)
        else:
            logits = self.module.forward(hidden)
        return logits[..., : self.vocab_size]


def project(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes hidden @ weight.T + bias; without an `out` and with gradients it is `torch.nn.functional.linear`.

    Args:
        hidden (`torch.Tensor`): `(..., H)`.
        weight (`torch.Tensor`): `(V, H)` of the same dtype.
        bias (`torch.Tensor`, *optional*): `(V,)`.
        out (`torch.Tensor`, *optional*): Buffer for the result, `(..., V)`, contiguous, of the same dtype.

    Returns:
        `torch.Tensor`: `(..., V)`.
    """
    if out is None:
        if hidden.device.type != "cpu" or (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
            return torch.nn.functional.linear(hidden, weight, bias)
        out = hidden.new_empty(*hidden.shape[:-1], weight.shape[0])
    flat, flat_out = hidden.reshape(-1, hidden.shape[-1]), out.view(-1, weight.shape[0])
    if hidden.device.type == "cpu" and hidden.dtype == torch.float32 and hidden.shape[-1] >= MIN_BLOCK_WIDTH:
        columns = flat.T.contiguous()  # (H, N)
        for start in range(0, weight.shape[0], BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            flat_out[:, rows] = (weight[rows] @ columns).T
    else:
        torch.mm(flat, weight.T, out=flat_out)
    if bias is not None:
        flat_out += bias
    return out


def accumulate_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Adds a @ b to a float32 `total` `(M, N)`.

    The product is not rounded to the dtype of a and b first, except that of many bfloat16 tokens on a CPU, as in any
    layer there.
    """
    if total.device.type == "cuda" and a.dtype in (torch.float16, torch.bfloat16):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    elif a.dtype == torch.bfloat16 and a.shape[1] >= MIN_ROUNDED_TOKENS:
        total.add_(a @ b)
    else:
        total.addmm_(a.float(), b.float())


def run_up_to_head(model: Call[Output], head: nn.Module, **inputs: Argument) -> tuple[torch.Tensor, Output]:
    """Runs `model` and returns what its output head reads, `(B, T, H)`, and the model's own output.

    The input of the head is captured, since the backbone of some models returns something else (OPT, BERT-like
    decoders, models with an encoder). The head itself computes one position only. Calling `model` and not its parts
    keeps every wrapper in charge of its parameters (ZeRO-3, FSDP, accelerate's hooks).

    Args:
        model: The model to call, wrapped or not.
        head (`torch.nn.Module`): `unwrapped_model.get_output_embeddings()`.
        inputs: Arguments of the call, such as `input_ids`, `attention_mask` and `position_ids`.

    Raises:
        ValueError: If the model does not call its head.
    """
    captured = []

    def keep_last_position(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        captured.append(args[0])
        return (args[0][:, -1:], *args[1:])

    hook = head.register_forward_pre_hook(keep_last_position)
    try:
        outputs = model(**{**inputs, "use_cache": False})
    finally:
        hook.remove()
    if not captured:
        raise ValueError(f"{type(head).__name__}, the output head, is not called by its model.")
    return captured[-1], outputs


def compute_last_hidden_states(model: Call[object], head: nn.Module, **inputs: Argument) -> torch.Tensor:
    """The hidden states of `run_up_to_head` alone, `(B, T, H)`."""
    return run_up_to_head(model, head, **inputs)[0]
