"""A narrower model of a wide one: fewer layers, and weights along the principal directions of the hidden states."""

import copy
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from spec_kd.drafts.importance import Activity, find_layers
from spec_kd.drafts.options import WIDTHS
from spec_kd.open_types import Argument

# Families with one norm before attention, one before the feed-forward layer, and nothing else beside their products.
# Gemma scales its embeddings and adds 1 to the scales of its norms; others have more norms or experts.
SLICED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
NORMS = ("input_layernorm", "post_attention_layernorm")


def check_can_be_sliced(model: PreTrainedModel) -> None:
    """Raises `ValueError` for a model of a family that [`slice_widths`] does not know."""
    if model.config.model_type not in SLICED_FAMILIES:
        raise ValueError(
            f"The widths of a {model.config.model_type!r} donor cannot be cut, only those of {SLICED_FAMILIES}. Cut "
            "layers alone, or set `fresh_layers=True`."
        )


def choose_layers(influence: torch.Tensor, num_layers: int) -> list[int]:
    """The layers with the largest influence, in their order."""
    return sorted(influence.topk(num_layers).indices.tolist())


def cut_layers(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """Takes all layers but `kept` out of a model, in place."""
    layers, config = find_layers(model), model.config.get_text_config()
    for index, layer in enumerate(layers[kept_index] for kept_index in kept):
        modules: Iterable[Argument] = layer.modules()
        for module in modules:
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    model.get_decoder().layers = nn.ModuleList(layers[index] for index in kept)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[index] for index in kept]
    config.num_hidden_layers = len(kept)


def find_principal_directions(states: Sequence[torch.Tensor], num_directions: int) -> torch.Tensor:
    """Orthonormal directions that hold most of the mean square of states, float64 `(D, num_directions)`.

    SliceGPT (arXiv 2401.15024) rotates each block for itself and adds matrices between them. One rotation for all
    places needs none, so that the draft stays a plain model; each place counts equally.
    """
    width = states[0].shape[-1]
    moment = torch.zeros(width, width, dtype=torch.float64)
    for one in states:
        moment += one.T @ one / len(one)
    return torch.linalg.eigh(moment).eigenvectors.flip(-1)[:, :num_directions]


@torch.no_grad()
def slice_widths(model: PreTrainedModel, activity: Activity, widths: dict[str, int], is_tied: bool) -> PreTrainedModel:
    """A model with smaller widths, whose weights are parts of a model's, or their projections.

    The scales of a norm move into the products after it, which lets the norm commute with a rotation (SliceGPT, arXiv
    2401.15024, section 3.2). What is left of them is a number that makes up for the directions that are gone.

    Args:
        model (`PreTrainedModel`): A model of one of `SLICED_FAMILIES`.
        activity (`Activity`): What its parts do on sample text, heads and neurons included.
        widths (`dict[str, int]`): The new widths, by the names in `WIDTHS`.
        is_tied (`bool`):
            Whether embedding and head share a matrix. The scales of the last norm are then kept as far as one scale for
            each direction can.

    Returns:
        `PreTrainedModel`: A new model of the same class, in float32.
    """
    config = copy.deepcopy(model.config)
    old_heads, old_shared = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // old_heads
    for name in WIDTHS:
        setattr(config, name, widths[name])
    config.head_dim, config.tie_word_embeddings = head_dim, is_tied
    draft = cast(PreTrainedModel, type(model)(config).float())
    width, shrunk = model.config.hidden_size, widths["hidden_size"]
    rotation = find_principal_directions(activity.states, shrunk) if shrunk < width else torch.eye(width).double()
    # RMSNorm divides by the length of what is left, so the share of the length that is gone is put back
    scales = [
        (width / shrunk) ** 0.5 * ((one @ rotation).square().sum(-1) / width).sqrt().mean() for one in activity.states
    ]

    def read(module: Argument, norm: Argument = None) -> torch.Tensor:
        """A weight in float64, with the scales of the norm before it."""
        weight = module.weight.detach().cpu().double()
        return weight if norm is None else weight * norm.weight.detach().cpu().double()

    def write(module: Argument, weight: torch.Tensor, name: str = "weight") -> None:
        getattr(module, name).copy_(weight)

    pairs: list[tuple[Argument, Argument]] = list(zip(find_layers(draft), find_layers(model), strict=True))
    for index, (new, old) in enumerate(pairs):
        shared, heads = choose_heads(
            activity.heads[index], old_shared, widths["num_key_value_heads"], widths["num_attention_heads"]
        )
        neurons = activity.neurons[index].topk(widths["intermediate_size"]).indices.sort().values
        queries, keys = (pick_rows(one, head_dim) for one in (heads, shared))
        for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            before, after = getattr(old.self_attn, name), getattr(new.self_attn, name)
            write(after, read(before, old.input_layernorm)[rows] @ rotation)
            if before.bias is not None:
                write(after, before.bias.detach()[rows.to(before.bias.device)], "bias")
        for name in ("q_norm", "k_norm"):
            if hasattr(old.self_attn, name):
                write(getattr(new.self_attn, name), read(getattr(old.self_attn, name)))
        for name in ("gate_proj", "up_proj"):
            write(
                getattr(new.mlp, name), read(getattr(old.mlp, name), old.post_attention_layernorm)[neurons] @ rotation
            )
        write(new.self_attn.o_proj, rotation.T @ read(old.self_attn.o_proj)[:, queries])
        write(new.mlp.down_proj, rotation.T @ read(old.mlp.down_proj)[:, neurons])
        for name in NORMS:
            getattr(new, name).weight.fill_(scales[index])
    place_embeddings(draft, model, rotation, float(scales[-1]))
    return draft


@torch.no_grad()
def place_embeddings(
    draft: PreTrainedModel, model: PreTrainedModel, rotation: torch.Tensor, scale: float = 1.0
) -> None:
    """Writes embedding, last norm and head of `model` to a narrower draft, in place.

    Args:
        draft (`PreTrainedModel`): The draft, with hidden states of width d.
        model (`PreTrainedModel`): The model, with hidden states of width D.
        rotation (`torch.Tensor`): Orthonormal directions, float64 `(D, d)`.
        scale (`float`, *optional*, defaults to `1.0`): Factor of the last norm, as [`slice_widths`] explains it.
    """
    norm = cast(torch.Tensor, model.get_decoder().norm.weight).detach().cpu().double()
    embedding, head = (
        cast(torch.Tensor, module.weight).detach().cpu().double()
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    parts: Argument = draft
    parts.get_input_embeddings().weight.copy_(embedding @ rotation)
    if draft.config.get_text_config().tie_word_embeddings:
        parts.get_decoder().norm.weight.copy_(scale * torch.einsum("di,d,di->i", rotation, norm, rotation))
    else:
        parts.get_decoder().norm.weight.fill_(scale)
        parts.get_output_embeddings().weight.copy_(head * norm @ rotation)


def choose_heads(
    weights: torch.Tensor, num_shared: int, kept_shared: int, kept_heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value heads, and the attention heads that read them, by the largest weights.

    Args:
        weights (`torch.Tensor`): Weight of each attention head, `(H,)`; those of a key and value head stand together.
        num_shared (`int`): Number of key and value heads that there are.
        kept_shared (`int`), kept_heads (`int`): Numbers of key and value heads, and of attention heads, to keep.

    Returns:
        Two `torch.Tensor` of numbers of heads, int64, in their order.
    """
    groups = weights.unflatten(0, (num_shared, -1))  # (G, H / G)
    best = groups.topk(kept_heads // kept_shared, dim=-1)
    shared = best.values.sum(-1).topk(kept_shared).indices.sort().values
    heads = (shared[:, None] * groups.shape[1] + best.indices[shared].sort(-1).values).flatten()
    return shared, heads


def pick_rows(heads: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of a projection that belong to heads, int64."""
    return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()


def count_widths(config: PretrainedConfig) -> dict[str, int]:
    """The widths of a config, by the names in `WIDTHS`."""
    return {name: getattr(config, name) for name in WIDTHS}
