import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
)

SHARED = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
ARCHITECTURES = {
    "llama": LlamaConfig(**SHARED),
    "qwen2": Qwen2Config(**SHARED),
    # soft-capped logits and attention; the window is left behind by prompt and text together
    "gemma2": Gemma2Config(**SHARED, head_dim=8, sliding_window=9),
    "mistral": MistralConfig(**SHARED, sliding_window=6),
    "mixtral": MixtralConfig(**SHARED, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    # learned positions, not one more than the longest prompt (11) and 24 new tokens need
    "gpt2": GPT2Config(
        vocab_size=97, n_positions=34, n_embd=32, n_layer=2, n_head=4, initializer_range=0.1, eos_token_id=1
    ),
}


def build_model(name, seed=0):
    """A tiny float32 model whose greedy text is worth comparing."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(copy.deepcopy(ARCHITECTURES[name])).eval()


def add_noise(model, scale=0.02, seed=0):
    """A copy of `model` that mostly agrees with it: a usable draft."""
    generator = torch.Generator().manual_seed(seed)
    noisy = copy.deepcopy(model)
    with torch.no_grad():
        for weight in noisy.parameters():
            weight += scale * torch.randn(weight.shape, generator=generator)
    return noisy


def with_padding_rows(model, rows):
    """A copy with more head rows than there are ids; they would win every argmax if they counted."""
    padded = copy.deepcopy(model)
    old = padded.get_output_embeddings().weight.shape[0]
    padded.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        weight = padded.get_output_embeddings().weight
        weight[old:] = 30 * torch.randn(rows - old, weight.shape[1], generator=torch.Generator().manual_seed(3))
    return padded


def write_plainly(target, prompts, max_new_tokens, eos_token_id=1):
    """What `target.generate` writes greedily to each prompt alone."""
    texts = []
    for prompt in prompts:
        output = target.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_token_id,
            pad_token_id=0,
        )
        texts.append(output[0, len(prompt) :].tolist())
    return texts


def compute_logits(model, ids):
    """Logits at every position of one text, without padding and without a cache `(T, V)`."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture
def target():
    return build_model("llama")


@pytest.fixture
def pair(target):
    """(target, draft): the draft is the target with noise."""
    return target, add_noise(target)


@pytest.fixture
def prompts():
    """Twelve prompts of 1 to 11 tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 11, *torch.randint(1, 12, (10,), generator=generator).tolist()]
    return [torch.randint(2, 97, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture
def tools():
    """The helpers above, for tests (conftest modules cannot be imported by name)."""

    class Tools:
        pass

    for function in (add_noise, build_model, compute_logits, with_padding_rows, write_plainly):
        setattr(Tools, function.__name__, staticmethod(function))
    return Tools
