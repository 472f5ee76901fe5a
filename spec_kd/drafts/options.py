"""The shape of a new draft: the options of [`~spec_kd.init_draft`] and of its command."""

from dataclasses import dataclass

from spec_kd.options import check_flag, check_int, check_ints, document_options, option, refuse

WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


@document_options
@dataclass(frozen=True)
class DraftShapeOptions:
    """Shape of a new draft, in the words of a Hugging Face config.

    Raises:
        ValueError: If a value is out of its range, or two of them contradict each other.
    """

    num_hidden_layers: int | None = option(
        "Number of layers, the donor's by default. Those that change the hidden states most on sample text are kept.",
        default=None,
    )
    layers: list[int] | None = option(
        "Layers of the donor to keep, counted from 0, in place of `num_hidden_layers`; all by default.", default=None
    )
    hidden_size: int | None = option(
        "Width of the hidden states, the donor's by default. They are projected onto their principal directions on "
        "sample text.",
        default=None,
    )
    intermediate_size: int | None = option(
        "Number of neurons in each feed-forward layer, the donor's by default. Those that write most on sample text "
        "are kept.",
        default=None,
    )
    num_attention_heads: int | None = option(
        "Number of attention heads, the donor's by default. Those that write most on sample text are kept.",
        default=None,
    )
    num_key_value_heads: int | None = option(
        "Number of key and value heads, a divisor of `num_attention_heads`; the donor's by default.", default=None
    )
    tie_word_embeddings: bool | None = option(
        "Whether embedding and head share one matrix. By default they do if the donor's do and `hidden_size` stays: a "
        "matrix of its own lets a narrower head keep the scales of the last norm, and costs memory but no time.",
        default=None,
    )
    fresh_layers: bool = option(
        "Whether layers start from random weights, in a plain Llama, and only embedding and head are the donor's.",
        default=False,
    )
    num_samples: int = option("Number of responses that importance and alpha are measured on, the first ones.", 64)
    seed: int = option("Seed of random weights.", default=0)

    def __post_init__(self) -> None:
        for name in ("num_hidden_layers", *WIDTHS):
            check_int(name, getattr(self, name), is_optional=True)
        if self.layers is not None:
            check_ints("layers", self.layers, 0)
        check_int("num_samples", self.num_samples)
        check_int("seed", self.seed, 0)
        check_flag("fresh_layers", self.fresh_layers)
        heads, shared = self.num_attention_heads, self.num_key_value_heads
        refuse(
            (
                self.layers is not None and (self.num_hidden_layers is not None or self.fresh_layers),
                f"`layers={self.layers}` names layers of the donor, so `num_hidden_layers` and `fresh_layers` have no "
                "use. Leave them out.",
            ),
            (
                self.layers is not None and list(self.layers) != sorted(set(self.layers)),
                f"`layers={self.layers}` must rise from one layer to the next.",
            ),
            (
                heads is not None and shared is not None and heads % shared,
                f"`num_attention_heads={heads}` is no multiple of `num_key_value_heads={shared}`.",
            ),
        )
