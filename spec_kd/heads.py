"""From a causal LM to its last hidden states and its logits, in two separate steps and with public APIs only.

Losses and replayed evaluation need logits of *some* positions: materialising `(B, T, V)` for all of them is what runs
out of memory first. So the backbone runs once, and whoever needs logits calls the head on the positions it wants.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from spec_kd.finite import NonFiniteError, find_nonfinite_parameter
from spec_kd.projection import project


@dataclass(frozen=True)
class LogitTransform:
    """What an architecture does to `hidden @ W.T + b` before the softmax: a scale, then a soft cap.

    Args:
        scale (`float`): Multiplier of the raw logits (Cohere, Granite, Falcon-H1, ...).
        softcap (`float`, *optional*): `softcap * tanh(logits / softcap)` after the scale (Gemma).
    """

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> "LogitTransform":
        """Reads the transform off a model config (the text part of a multimodal one)."""
        config = config.get_text_config()
        scale = 1.0
        for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
            if getattr(config, name, None) is not None:
                scale = float(getattr(config, name))
                break
        else:
            scaling = getattr(config, "logits_scaling", None)
            if scaling is not None:  # Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies
                scale = float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)
        softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "softcap", None)
        return cls(scale=scale, softcap=softcap)

    @property
    def is_identity(self) -> bool:
        """Whether logits stay what they are."""
        return self.scale == 1.0 and self.softcap is None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def unwrap_peft(model: nn.Module) -> PreTrainedModel:
    """The transformers model under a `PeftModel` (its LoRA layers stay active), or `model` itself."""
    return model.get_base_model() if is_peft_model(model) else model


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


@dataclass(frozen=True)
class LogitHead:
    """A model's output head as a function of hidden states, restricted to the real vocabulary.

    Args:
        module (`torch.nn.Module`):
            The output embeddings. Its `forward` is called, so quantised, LoRA and offloaded heads compute what they
            should. `forward` and not `__call__`: ZeRO-3's hooks on the module would gather and release the weight at
            every call, which deadlocks when ranks make different numbers of calls; gather around the calls instead.
        transform (`LogitTransform`): Scale and soft cap.
        vocab_size (`int`): Number of real ids; columns beyond it are padding and cut.
    """

    module: nn.Module
    transform: LogitTransform
    vocab_size: int

    @classmethod
    def of(cls, model: PreTrainedModel, vocab_size: int) -> "LogitHead":
        """The head of `model` (a `PeftModel` is looked through)."""
        model = unwrap_peft(model)
        return cls(model.get_output_embeddings(), LogitTransform.from_config(model.config), vocab_size)

    def __call__(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of `hidden` `(..., H)` as float32 `(..., vocab_size)`.

        `out` is a buffer for the products, see `project`.
        """
        return self.transform(self.project(hidden, out).float())

    def project(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The products `(..., vocab_size)` of `hidden` `(..., H)` in the head's dtype, before scale and soft cap.

        `out`, a buffer `(..., rows)` of the head's dtype, spares an allocation where the head is a plain matrix; the
        result is then valid until the buffer's next use.
        """
        weight = self.module.weight
        hidden = hidden.to(weight.device)
        is_plain = type(self.module) is nn.Linear and hidden.dtype == weight.dtype
        if is_plain and not torch.is_autocast_enabled(hidden.device.type):
            logits = project(hidden, weight, self.module.bias, out)
        else:
            logits = self.module.forward(hidden)
        return logits[..., : self.vocab_size]


def run_backbone(model: Callable[..., object], backbone: nn.Module, **inputs) -> tuple[torch.Tensor, object]:
    """Runs `model` and returns what its backbone hands to the head, `(B, T, H)`, and the model's own output.

    The head itself sees one position only (`logits_to_keep=1`). Going through `model` and not through the backbone
    keeps every wrapper in charge of its parameters (ZeRO-3, FSDP, accelerate's hooks).

    Args:
        model: The model to call, wrapped or not.
        backbone (`torch.nn.Module`): `unwrapped_model.base_model`.
        inputs: `input_ids`, `attention_mask`, `position_ids`, ... of the call.
    """
    captured = []
    hook = backbone.register_forward_hook(lambda _module, _args, output: captured.append(output[0]))
    try:
        outputs = model(**{**inputs, "use_cache": False, "logits_to_keep": 1})
    finally:
        hook.remove()
    return captured[-1], outputs


def compute_last_hidden_states(model: Callable[..., object], backbone: nn.Module, **inputs) -> torch.Tensor:
    """The hidden states of `run_backbone` alone, `(B, T, H)`."""
    return run_backbone(model, backbone, **inputs)[0]


def check_logits_are_known(model: PreTrainedModel, role: str) -> None:
    """Runs four tokens and compares the model's own logits with those made from hidden states and head.

    Architectures scale, cap or shift their logits in ways of their own. One that `LogitTransform` does not know would
    train towards another distribution than the one that is served, without a word: here it is refused by name.
    Models whose parameters are not all there (ZeRO-3, FSDP's meta tensors) are taken on trust.

    Args:
        model (`PreTrainedModel`): Not wrapped, other than by PEFT.
        role (`str`): What it is called in the error.

    Raises:
        ValueError: If the two differ by more than rounding.
        NonFiniteError: If they are no finite numbers, but for logits of -inf, which are a mask.
    """
    model = unwrap_peft(model)
    if any(hasattr(parameter, "ds_id") or parameter.is_meta for parameter in model.parameters()):
        return
    rows = model.get_output_embeddings().weight.shape[0]
    ids = torch.arange(1, 5, device=model.get_input_embeddings().weight.device)[None] % rows  # (1, 4)
    with evaluation_mode(model):
        expected = model(input_ids=ids, use_cache=False).logits.float()
        hidden = compute_last_hidden_states(model, model.base_model, input_ids=ids)
        logits = LogitHead.of(model, rows)(hidden).to(expected.device)
    is_finite = expected.isfinite()
    if not is_finite.any() or expected.isnan().any() or (expected == float("inf")).any():
        name = find_nonfinite_parameter(model)
        where = f"its weight `{name}` has a NaN or an infinity" if name else f"its numbers overflow in {hidden.dtype}"
        raise NonFiniteError(f"The logits of the {role} are not finite: {where}. Load it again, in another dtype.")
    expected, logits = expected[is_finite], logits[is_finite]  # a logit of -inf is a mask
    tolerance = 1e-3 if expected.dtype == hidden.dtype == torch.float32 else 0.05
    if not torch.allclose(logits, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item() + 1e-6):
        raise ValueError(
            f"{type(model).__name__} ({role}) makes its logits in a way that is not known here: they differ by up to "
            f"{(logits - expected).abs().max().item():.3g} from head and hidden states with "
            f"{LogitTransform.from_config(model.config)}. Training would aim at another distribution than the one it "
            "serves. Please report the architecture; BlackBoxSFTTrainer does not need this."
        )
