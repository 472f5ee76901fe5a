"""What each architecture does to its logits, against the model's own forward; products with a head."""

import pytest
import torch
import transformers
from tiny import build_llama

from spec_kd import heads
from spec_kd.heads import LogitHead, LogitTransform, are_exact_logits, compute_last_hidden_states
from spec_kd.probes import check_logits_are_known

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.3,
}  # fmt: skip
ARCHITECTURES = [
    ("Llama", {}, LogitTransform()),
    ("Qwen2", {}, LogitTransform()),
    ("Qwen3", {}, LogitTransform()),
    ("Gemma2", {"final_logit_softcapping": 1.5}, LogitTransform(softcap=1.5)),
    ("VaultGemma", {"final_logit_softcapping": 1.5}, LogitTransform(softcap=1.5)),
    ("Cohere", {"logit_scale": 0.25}, LogitTransform(scale=0.25)),
    ("Cohere2", {"logit_scale": 0.25, "sliding_window_pattern": 2}, LogitTransform(scale=0.25)),
    ("Granite", {"logits_scaling": 4.0}, LogitTransform(scale=0.25)),
    ("GraniteMoe", {"logits_scaling": 4.0, "num_local_experts": 4}, LogitTransform(scale=0.25)),
    ("HyperCLOVAX", {"logits_scaling": 4.0}, LogitTransform(scale=4.0)),
    ("RecurrentGemma", {"lru_width": 32, "num_hidden_layers": 3}, LogitTransform(softcap=30.0)),
    ("NanoChat", {"final_logit_softcapping": 1.5}, LogitTransform(softcap=1.5)),
]


def build(name, options):
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **options})
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize(("name", "options", "transform"), ARCHITECTURES)
def test_head_and_hidden_states_give_the_models_own_logits(name, options, transform):
    model = build(name, options)
    assert LogitTransform.from_config(model.config) == transform
    ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=ids).logits.float()
        hidden = compute_last_hidden_states(model, model.get_output_embeddings(), input_ids=ids)
        logits = LogitHead.of(model, 64)(hidden)
    assert expected.abs().max() > 0.1  # else a scale could not be seen
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    model.train()
    check_logits_are_known(model, "draft")
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unknown_way_to_logits_is_refused_by_name(dtype):
    model = build_llama(seed=0).to(dtype)
    check_logits_are_known(model, "teacher")
    forward = model.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = 1.3 * output.logits
        return output

    model.forward = scaled
    with pytest.raises(ValueError, match=r"LlamaForCausalLM \(teacher\) computes its logits in a way"):
        check_logits_are_known(model, "teacher")


def test_a_buffer_is_used_where_the_head_is_a_plain_matrix():
    model = build_llama(seed=0)
    head = LogitHead.of(model, 261)
    hidden = torch.randn(3, model.config.hidden_size)
    buffer = torch.empty(3, 261)
    with torch.no_grad():
        logits = head(hidden, out=buffer)
    assert logits.data_ptr() == buffer.data_ptr()
    torch.testing.assert_close(logits, hidden @ model.lm_head.weight.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (0,), (1,)])
@pytest.mark.parametrize("bias", [False, True])
def test_blocks_give_the_product(shape, bias, monkeypatch):
    monkeypatch.setattr(heads, "BLOCK_ROWS", 4)
    monkeypatch.setattr(heads, "MIN_BLOCK_WIDTH", 6)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(*shape, 6, generator=generator), torch.randn(11, 6, generator=generator)
    added = torch.randn(11, generator=generator) if bias else None
    expected = torch.nn.functional.linear(hidden, weight, added)
    torch.testing.assert_close(heads.project(hidden, weight, added), expected)
    buffer = torch.empty(*shape, 11)
    assert heads.project(hidden, weight, added, out=buffer) is buffer
    torch.testing.assert_close(buffer, expected)


def test_gradients_flow_where_they_are_asked_for():
    hidden = torch.randn(3, 6, requires_grad=True)
    heads.project(hidden, torch.randn(11, 6)).sum().backward()
    assert hidden.grad is not None


def test_accumulated_products():
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(5, 11, generator=generator)
    hidden, total = torch.randn(5, 6, generator=generator), torch.ones(11, 6)
    heads.accumulate_product(total, gradient.T, hidden)
    torch.testing.assert_close(total, 1 + gradient.T @ hidden)
    half = torch.ones(11, 6)
    heads.accumulate_product(half, gradient.T.bfloat16(), hidden.bfloat16())
    exact = 1 + gradient.T.bfloat16().double() @ hidden.bfloat16().double()
    torch.testing.assert_close(half.double(), exact, rtol=1e-5, atol=1e-5)  # the product itself is not rounded
    many = torch.randn(600, 11, generator=generator).bfloat16(), torch.randn(600, 6, generator=generator).bfloat16()
    total = torch.full((11, 6), 1e3)
    heads.accumulate_product(total, many[0].T, many[1])
    exact = many[0].double().T @ many[1].double()
    assert (total.double() - 1e3 - exact).norm() < 2**-8 * exact.norm()  # the sum is float32 at any number of tokens


def test_logits_of_mixed_precision_are_told_by_their_values():
    model = build_llama(seed=0)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert are_exact_logits(model, model(input_ids=ids).logits)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(input_ids=ids).logits
    assert not are_exact_logits(model, mixed)
    assert not are_exact_logits(model, mixed.float())  # as accelerate returns them
    assert not are_exact_logits(build_llama(seed=0).bfloat16(), mixed)
