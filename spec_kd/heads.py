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

from spec_kd.finite import NonFiniteError, find_nonfinite_parameter
from spec_kd.open_types import Argument, Call
from spec_kd.projection import project

Output = TypeVar("Output")


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
        scale = 1.0
        for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
            if getattr(config, name, None) is not None:
                scale = float(getattr(config, name))
                break
        else:
            scaling = getattr(config, "logits_scaling", None)
            # Granite divides by it and HyperCLOVA X multiplies; MiniCPM3 has divided the head's input already
            if scaling is not None and config.model_type != "minicpm3":
                scale = float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)
        names = ("final_logit_softcapping", "softcap", "logits_soft_cap")  # Gemma, NanoChat, RecurrentGemma
        softcap = next((value for name in names if (value := getattr(config, name, None))), None)
        return cls(scale=scale, softcap=softcap)

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
    for name in ("out_features", "num_embeddings"):
        if isinstance(getattr(module, name, None), int):
            return getattr(module, name)
    return shape[0]


def find_input_device(model: PreTrainedModel) -> torch.device:
    """The device that a model needs its `input_ids` on: that of its embedding, whatever wraps it."""
    return cast(torch.Tensor, unwrap_layer(model.get_input_embeddings()).weight).device


def is_whole(model: nn.Module) -> bool:
    """Whether all parameters are here: none partitioned by ZeRO-3, none a meta tensor of FSDP."""
    return not any(hasattr(parameter, "ds_id") or parameter.is_meta for parameter in model.parameters())


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
    is_linear = type(head) is nn.Linear and type(head.weight) in (torch.Tensor, nn.Parameter)
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


def check_is_causal_lm(model: PreTrainedModel, role: str) -> None:
    """Raises `ValueError` unless `model` has an output head and reads from left to right, without an encoder.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model.
        role (`str`): Name of the model in the error.
    """
    model = unwrap_peft(model)
    get_head = getattr(model, "get_output_embeddings", lambda: None)
    if get_head() is None:
        raise ValueError(f"The {role} ({type(model).__name__}) has no output head. Pass a causal language model.")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"The {role} ({type(model).__name__}) is an encoder-decoder model, whose encoder would read the prompt. "
            "Pass a causal language model."
        )


def check_plain_head(model: PreTrainedModel, role: str) -> None:
    """Raises `ValueError` unless the head of `model` is a plain matrix of floating-point numbers.

    The fused losses read its weight and bias, and do not call it.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model.
        role (`str`): Name of the model in the error.
    """
    head = unwrap_peft(model).get_output_embeddings()
    weight = getattr(head, "weight", None)
    if isinstance(head, BaseTunerLayer):
        raise ValueError(
            f"The head of the {role} has an adapter of its own, which the fused loss would ignore. Merge it "
            "(`model.merge_and_unload()`), or leave `lm_head` out of `target_modules`; `modules_to_save` is supported."
        )
    # torchao's numbers are inside a tensor of floating-point dtype, and FSDP2 shards parameters as DTensors
    is_wrapped = hasattr(weight, "__tensor_flatten__") and not isinstance(weight, DTensor)
    if weight is None or is_wrapped or not weight.is_floating_point():
        kind = f"weights of dtype {weight.dtype}" if weight is not None and not is_wrapped else "no weight"
        kind = f"quantized weights ({type(weight).__name__})" if is_wrapped else kind
        raise ValueError(
            f"The {role}'s head ({type(head).__name__}) has {kind}, so the divergence cannot be computed through it. "
            f"Load the {role} with its head in full precision (bitsandbytes does so by default)."
        )


def check_logits_are_known(model: PreTrainedModel, role: str) -> None:
    """Runs four tokens and compares the model's own logits with those from hidden states and head.

    Architectures scale, cap or shift their logits in different ways. A model with a way that `LogitTransform` does not
    know would silently train towards another distribution than the one that is served; here it is refused by name.
    Models whose parameters are not all present (ZeRO-3, FSDP's meta tensors) are not checked.

    Args:
        model (`PreTrainedModel`): The model, wrapped by nothing but PEFT.
        role (`str`): Name of the model in the error.

    Raises:
        ValueError: If the two differ by more than rounding, or the model is no causal LM.
        NonFiniteError: If they are not finite, except for logits of -inf, which are a mask.
    """
    model = unwrap_peft(model)
    check_is_causal_lm(model, role)
    if not is_whole(model):
        return
    rows = count_rows(model.get_output_embeddings())
    ids = torch.arange(1, 5, device=find_input_device(model))[None] % rows  # (1, 4)
    with evaluation_mode(model):
        expected = model(input_ids=ids, use_cache=False).logits.float()
        hidden = compute_last_hidden_states(model, model.get_output_embeddings(), input_ids=ids)
        logits = LogitHead.of(model, rows)(hidden).to(expected.device)
    is_finite = expected.isfinite()
    if not is_finite.any() or expected.isnan().any() or (expected == float("inf")).any():
        name = find_nonfinite_parameter(model)
        where = f"its weight `{name}` has a NaN or an infinity" if name else f"its numbers overflow in {hidden.dtype}"
        raise NonFiniteError(f"The logits of the {role} are not finite: {where}. Load it again, in another dtype.")
    expected, logits = expected[is_finite], logits[is_finite]  # a logit of -inf is a mask
    if not are_equal_logits(logits, expected, is_exact=model.dtype == hidden.dtype == torch.float32):
        raise ValueError(
            f"{type(model).__name__} ({role}) makes its logits in a way that is not known here: they differ by up to "
            f"{(logits - expected).abs().max().item():.3g} from head and hidden states with "
            f"{LogitTransform.from_config(model.config)}. Training would aim at another distribution than the one it "
            "serves. Please report the architecture; BlackBoxSFTTrainer does not need this."
        )
