"""A draft and its target as an engine sees them before it reads a weight: configurations and tokenizers."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from spec_kd.open_types import JsonValue

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from spec_kd.parallel import ParallelDrafting
    from spec_kd.vocabulary import ProcessingClass

# Types of layers, as `layer_types` in a configuration names them, whose state cannot be cut back to an earlier token.
RECURRENT_LAYERS = frozenset(("linear_attention", "mamba", "recurrent", "conv", "hybrid", "hybrid_sliding"))
SCALED_ROPE = ("linear", "dynamic", "yarn")  # `max_position_embeddings` is the length before these are applied

Consequence = Literal["refuses", "corrupts", "does not draft", "drafts one by one", "drafts less", "slower"]
ERRORS: tuple[Consequence, ...] = ("refuses", "corrupts", "does not draft", "drafts one by one")
"""Consequences with which a pair is of no use in an engine."""


@dataclass(frozen=True)
class ServedModel:
    """A draft or a target without its weights.

    Args:
        role (`str`): `"draft"` or `"target"`.
        name (`str`): Its folder or Hub id, or its class if it is loaded.
        config (`PreTrainedConfig`): Its configuration.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): Its tokenizer or processor.
        generation_config (`GenerationConfig`, *optional*): Its defaults of generation.
        is_adapter (`bool`, *optional*, defaults to `False`): Whether it is a LoRA adapter on a base model.
    """

    role: str
    name: str
    config: "PreTrainedConfig"
    processing_class: "ProcessingClass"
    generation_config: "GenerationConfig | None" = None
    is_adapter: bool = False

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer, also where it sits inside a processor."""
        from spec_kd.vocabulary import get_tokenizer

        return get_tokenizer(self.processing_class)

    @cached_property
    def tokens(self) -> dict[str, int]:
        """Ids by token, added tokens included."""
        return self.tokenizer.get_vocab()

    def read(self, name: str) -> JsonValue:
        """A value of the configuration of the text model; `None` if it has none."""
        return getattr(self.config.get_text_config(), name, None)

    @property
    def parallel(self) -> "ParallelDrafting | None":
        """How it drafts in parallel; `None` if it is autoregressive."""
        from spec_kd.parallel import read_parallel_drafting

        return read_parallel_drafting(self.config)

    @property
    def rows(self) -> int:
        """Rows of the head, as `config.vocab_size` states them."""
        return self.read("vocab_size")

    @property
    def layer_types(self) -> frozenset[str]:
        """Types of its layers; empty if its configuration does not list them."""
        return frozenset(self.read("layer_types") or self.read("layers_block_type") or ())

    @property
    def is_recurrent(self) -> bool:
        """Whether a layer keeps a state that cannot be cut back to an earlier token."""
        return self.is_stateful or bool(self.layer_types & RECURRENT_LAYERS)

    @property
    def is_stateful(self) -> bool:
        """Whether transformers calls its class stateful."""
        from spec_kd._private import is_stateful

        return is_stateful(self.config)

    @property
    def window(self) -> int | None:
        """Tokens that its sliding-window layers see; `None` without such layers."""
        return self.read("sliding_window") if "sliding_attention" in self.layer_types else None

    @property
    def rope(self) -> dict[str, JsonValue]:
        """Settings of its rotary positions; empty without them."""
        return dict(self.read("rope_parameters") or self.read("rope_scaling") or {})

    @property
    def max_length(self) -> int | None:
        """Tokens that it can read, scaling of its positions included; `None` if nothing limits them."""
        length = self.read("max_position_embeddings")
        if length is None or self.rope.get("rope_type") not in SCALED_ROPE:
            return length
        return int((self.rope.get("original_max_position_embeddings") or length) * self.rope.get("factor", 1.0))

    @property
    def dtype(self) -> str | None:
        """Data type of its weights, such as `"bfloat16"`; `None` if its configuration does not say."""
        dtype = self.config.dtype or self.read("dtype")
        return None if dtype is None else str(dtype).removeprefix("torch.")

    @property
    def quantization(self) -> str | None:
        """Method that its weights are quantized with; `None` if they are not."""
        options = self.config.to_dict().get("quantization_config") or {}
        return options.get("quant_method")

    def read_default(self, name: str) -> JsonValue:
        """A default of generation; `None` if there is none."""
        return getattr(self.generation_config, name, None)


@dataclass(frozen=True)
class ServedPair:
    """A draft and its target, and how they are to be served.

    Args:
        draft, target (`ServedModel`): The models.
        tensor_parallel_size (`int`, *optional*, defaults to `1`): Cards that share each layer.
        max_length (`int`, *optional*): Tokens of the longest sequence; by default all that the target can read.
        num_assistant_tokens (`int`, *optional*): Tokens drafted in a round, where known.
    """

    draft: ServedModel
    target: ServedModel
    tensor_parallel_size: int = 1
    max_length: int | None = None
    num_assistant_tokens: int | None = None

    @property
    def models(self) -> tuple[ServedModel, ServedModel]:
        """Both models."""
        return self.draft, self.target

    @property
    def served_length(self) -> int | None:
        """Tokens of the longest sequence that is served; `None` if nothing limits it."""
        return min((length for length in (self.max_length, self.target.max_length) if length), default=None)


Problem = tuple[str, str]
"""What is wrong with a pair, and how to mend it."""


@dataclass(frozen=True)
class PairCheck:
    """A condition that a pair must meet in an engine, and what the engine does with a pair that does not.

    Args:
        find (`Callable`): Lists what is wrong. Its name, without `find_`, is the name of the check.
        consequence (`str`):
            `"refuses"`, `"corrupts"`, `"does not draft"`, `"drafts one by one"`, `"drafts less"` or `"slower"`.
        effect (`str`): The same in a sentence, with what the engine prints.
    """

    find: Callable[[ServedPair], Iterator[Problem]]
    consequence: Consequence
    effect: str

    @property
    def name(self) -> str:
        """The name of the check, such as `"unequal_rows"`."""
        return self.find.__name__.removeprefix("find_")


@dataclass(frozen=True)
class ServingFinding:
    """Something that makes an engine refuse a pair, write wrong text, or draft less than it could.

    Args:
        engine (`str`): The engine.
        check (`str`): Name of the check, such as `"unequal_rows"`.
        what (`str`): What is wrong, in a sentence.
        consequence (`str`):
            `"refuses"`, `"corrupts"`, `"does not draft"`, `"drafts one by one"`, `"drafts less"` or `"slower"`.
        effect (`str`): The same in a sentence, with what the engine prints.
        fix (`str`): How to mend it.
    """

    engine: str
    check: str
    what: str
    consequence: Consequence
    effect: str
    fix: str

    @property
    def severity(self) -> Literal["error", "warning"]:
        """`"error"` if the pair is refused, its text is wrong, or it does not draft as it should; else `"warning"`."""
        return "error" if self.consequence in ERRORS else "warning"

    def __str__(self) -> str:
        return f"{self.engine} {self.consequence}: {self.what} {self.effect} {self.fix}"


def read_model(
    role: str,
    model: "PreTrainedModel | PeftModel | str | os.PathLike[str]",
    processing_class: "ProcessingClass | None" = None,
) -> ServedModel:
    """Reads what an engine reads of a model before its weights.

    Args:
        role (`str`): `"draft"` or `"target"`.
        model (`PreTrainedModel` or path): A model, its folder or its Hub id.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            Its tokenizer or processor; by default the one that is stored with it.

    Raises:
        `ValueError`: If there is no tokenizer.
        `OSError`: If there is no such model.
    """
    from accelerate.utils import is_peft_model
    from transformers import GenerationConfig

    from spec_kd.heads import unwrap_peft
    from spec_kd.loading import find_adapter, find_processing_class, load_config

    found = processing_class or find_processing_class(model)
    if found is None:
        raise ValueError(f"The {role} has no tokenizer. Save it beside the model, or pass `{role}_processing_class`.")
    if not isinstance(model, str | os.PathLike):
        plain = unwrap_peft(model)
        return ServedModel(
            role, type(plain).__name__, plain.config, found, plain.generation_config, is_peft_model(model)
        )
    name = os.fspath(model)
    try:
        generation_config = GenerationConfig.from_pretrained(name)
    except OSError:
        generation_config = None
    return ServedModel(role, name, load_config(name), found, generation_config, find_adapter(name) is not None)
