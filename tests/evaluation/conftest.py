import copy

import pytest
import torch
from transformers import GenerationConfig


def add_noise(model, scale=0.02, seed=0):
    """A copy of `model` that mostly agrees with it: a usable draft."""
    generator = torch.Generator().manual_seed(seed)
    noisy = copy.deepcopy(model)
    with torch.no_grad():
        for weight in noisy.parameters():
            weight += scale * torch.randn(weight.shape, generator=generator)
    return noisy


def write_texts(target, prompts, max_new_tokens, temperature=0.0, eos_token_id=1, vocab_size=None):
    """What `target` writes, by its own full softmax one token at a time: no `generate`, no cache."""
    rows = []
    generator = torch.Generator().manual_seed(7)
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + max_new_tokens:
            with torch.no_grad():
                logits = target(input_ids=torch.tensor([ids])).logits[0, -1, :vocab_size]
            if temperature == 0:
                ids.append(int(logits.argmax()))
            else:
                ids.append(int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)))
            if ids[-1] == eos_token_id:
                break
        rows.append({"prompt_ids": list(prompt), "completion_ids": ids[len(prompt) :]})
    return rows


def with_padding_rows(model, rows):
    """A copy with more head rows than there are ids; they would win every argmax if they counted."""
    padded = copy.deepcopy(model)
    old = padded.get_output_embeddings().weight.shape[0]
    padded.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        weight = padded.get_output_embeddings().weight
        weight[old:] = 30 * torch.randn(rows - old, weight.shape[1], generator=torch.Generator().manual_seed(3))
    return padded


def snapshot(*models):
    """Everything that evaluation must leave as it was."""
    return [
        (
            [module.training for module in model.modules()],
            model.generation_config,
            GenerationConfig.to_dict(model.generation_config),
            model.config.to_dict(),
            len(model._forward_pre_hooks),
            [weight.detach().clone().sum().item() for weight in model.parameters()],
        )
        for model in models
    ]


@pytest.fixture
def pair(target):
    """(draft, target): the draft is the target with noise."""
    return add_noise(target), target


@pytest.fixture
def prompts():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 9, (12,), generator=generator).tolist()
    return [torch.randint(5, 261, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture
def tools():
    """The helpers above, for tests (conftest modules cannot be imported by name)."""

    class Tools:
        pass

    for function in (add_noise, write_texts, with_padding_rows, snapshot):
        setattr(Tools, function.__name__, staticmethod(function))
    return Tools
