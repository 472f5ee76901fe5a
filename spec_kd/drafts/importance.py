"""What each part of a model does on sample text: which layers, heads and neurons a smaller draft should keep."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from spec_kd.heads import evaluation_mode, find_input_device
from spec_kd.open_types import Argument, Arguments
from spec_kd.progress import RowProgress

MAX_STATES = 4096  # hidden states that are kept of each place; more would not move the principal directions


class Activity(NamedTuple):
    """What the parts of a model with L layers, H heads and F neurons do on sample text, float64.

    Args:
        influence (`torch.Tensor`): 1 - mean cosine between what enters a layer and what leaves it, `(L,)`.
        heads (`torch.Tensor`): Mean square of what each head writes to the hidden states, `(L, H)`; empty if unknown.
        neurons (`torch.Tensor`): The same of each neuron, `(L, F)`; empty if unknown.
        states (`list[torch.Tensor]`):
            Hidden states before each layer and before the last norm, scaled to a mean square of 1, L + 1 times
            `(n, D)`.
    """

    influence: torch.Tensor
    heads: torch.Tensor
    neurons: torch.Tensor
    states: list[torch.Tensor]


def find_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers; raises `ValueError` for a model whose layers are not one list."""
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != model.config.get_text_config().num_hidden_layers:
        raise ValueError(
            f"The layers of {type(model).__name__} are not a plain list, so none can be taken out. Choose another "
            "donor."
        )
    return layers


@torch.no_grad()
def measure_activity(
    model: PreTrainedModel, texts: Sequence[Sequence[int]], *, reads_parts: bool, description: str | None = None
) -> Activity:
    """Runs a model over texts and measures what its parts do.

    The influence of a layer is the Block Influence of ShortGPT (arXiv 2403.03853). Heads and neurons are weighed by the
    mean square of what they add to the hidden states, each for itself.

    Args:
        model (`PreTrainedModel`): The model.
        texts (`Sequence[Sequence[int]]`): Token ids of texts with two tokens or more.
        reads_parts (`bool`): Whether heads and neurons are measured too, which needs layers like Llama's.
        description (`str`, *optional*): Name of a progress bar; there is none by default.
    """
    layers: Sequence[Argument] = list(find_layers(model))
    states: list[list[torch.Tensor]] = [[] for _ in range(len(layers) + 1)]
    cosines = torch.zeros(len(layers), dtype=torch.float64)
    products: dict[tuple[int, str], torch.Tensor] = {}
    num_tokens = sum(map(len, texts))
    share = max(1, num_tokens // MAX_STATES)

    def add_product(key: tuple[int, str], inputs: torch.Tensor, size: int) -> None:
        parts = inputs.double().unflatten(-1, (-1, size)).flatten(0, -3)  # (T, parts, size)
        product = torch.einsum("tpi,tpj->pij", parts, parts).cpu()
        products[key] = products[key] + product if key in products else product

    @contextmanager
    def watching() -> Iterator[None]:
        handles = []
        for index, layer in enumerate(layers):
            handles.append(layer.register_forward_hook(keep_states(index), with_kwargs=True))
            if reads_parts:
                for name, module, size in (
                    ("heads", layer.self_attn.o_proj, cast(int, layer.self_attn.head_dim)),
                    ("neurons", layer.mlp.down_proj, 1),
                ):
                    handles.append(module.register_forward_pre_hook(keep_product(index, name, size)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def keep_states(index: int) -> Argument:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: Arguments, output: object) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            before, after = (one.double().flatten(0, -2) for one in (before, cast(torch.Tensor, after)))  # (T, D)
            cosines[index] += nn.functional.cosine_similarity(before, after).sum().cpu()
            for place, one in ((index, before), (index + 1, after)):
                if place == index or place == len(layers):
                    states[place].append((one / one.square().mean(-1, keepdim=True).sqrt())[::share].cpu())

        return hook

    def keep_product(index: int, name: str, size: int) -> Argument:
        return lambda _module, args: add_product((index, name), args[0], size)

    with evaluation_mode(model), watching(), RowProgress(len(texts), description or "", bool(description)) as progress:
        for text in texts:
            model.get_decoder()(torch.tensor([list(text)], device=find_input_device(model)), use_cache=False)
            progress.advance(len(text))

    def weigh(name: str) -> torch.Tensor:
        """tr(W C W^T) for each part: W what it writes with, C the second moment of what goes in."""
        rows = []
        for index, layer in enumerate(layers):
            module = layer.self_attn.o_proj if name == "heads" else layer.mlp.down_proj
            product = products[index, name]
            weight = module.weight.detach().cpu().double().unflatten(-1, product.shape[:2])  # (D, parts, size)
            rows.append(torch.einsum("dpi,pij,dpj->p", weight, product, weight) / num_tokens)
        return torch.stack(rows)

    return Activity(
        influence=1 - cosines / num_tokens,
        heads=weigh("heads") if reads_parts else torch.empty(0),
        neurons=weigh("neurons") if reads_parts else torch.empty(0),
        states=[torch.cat(one) for one in states],
    )
