"""Every row must see what it would see alone, without padding and without a cache."""

import pytest
import torch
from transformers import (
    BartConfig,
    BartForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    MptForCausalLM,
    Qwen3NextConfig,
    RwkvConfig,
    RwkvForCausalLM,
)

from spec_kd.decoding.ragged_model import RaggedModel, check_reversible, find_layout

VOCAB_SIZE = 90  # of 97 rows


def read_unevenly(model, compare, num_steps=8, seed=0):
    """Reads, takes back, drops and adds rows; `compare(text, logits)` for every row at every step."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    lengths = [1, 7, 3, 5, 7, 2]
    texts = [draw(2, VOCAB_SIZE, length).tolist() for length in lengths]
    ids = torch.tensor([[0] * (7 - len(text)) + text for text in texts])
    ragged = RaggedModel(model, 7 - torch.tensor(lengths), VOCAB_SIZE, torch.device("cpu"))
    widths = []

    def record(_module, _args, kwargs):
        if "attention_mask" in kwargs:  # not the reference, which may be the same model
            widths.append(kwargs["attention_mask"].shape[1])

    hook = model.register_forward_pre_hook(record, with_kwargs=True)
    with torch.no_grad():
        logits = ragged.read(ids)
        for step in range(num_steps):
            assert widths[-1] == max(map(len, texts))  # no gaps, at any time
            for text, row in zip(texts, logits, strict=True):
                compare(text, row)
            rows = [i for i in range(len(texts)) if not (step in (2, 4) and i == 1)]
            counts = torch.stack([draw(0, min(len(text), 4), 1)[0] for text in texts])
            if step == 0:
                counts[0] = len(texts[0])  # a row that forgets everything
            ragged.take_back(counts, rows)
            texts = [texts[i][: len(texts[i]) - counts[i]] for i in rows]
            num_new = (1, 5, 2)[step % 3]
            new = draw(2, VOCAB_SIZE, len(rows), num_new)
            if step in (3, 5):  # longer and shorter than those there are
                added = [draw(2, VOCAB_SIZE, length).tolist() for length in ((25, 4), (2, 1))[step == 5]]
                ragged.add_rows(added, [0, 0])
                texts += added
                new = draw(2, VOCAB_SIZE, len(texts), num_new)
            texts = [text + more for text, more in zip(texts, new.tolist(), strict=True)]
            logits = ragged.read(new, num_logits=num_new)
            assert logits.shape == (len(texts), num_new, VOCAB_SIZE)
    hook.remove()
    assert len(texts) == 8 and max(map(len, texts)) > 25  # beyond the windows


def measure_errors(model, reference, tools):
    """Greatest difference of any logit from those of each text alone."""
    errors = []

    def compare(text, logits):
        expected = tools.compute_logits(reference, text)[-len(logits) :, :VOCAB_SIZE]
        errors.append((logits - expected).abs().max().item())

    read_unevenly(model, compare)
    return max(errors)


def test_logits_equal_those_of_each_text_alone(tools, architecture):
    model = tools.build_model(architecture)
    assert measure_errors(model, model, tools) < 1e-4


@pytest.mark.parametrize("name", ["gemma2", "llama"])  # without and with gaps
def test_eager_attention(tools, name):
    model = tools.build_model(name)
    model.set_attn_implementation("eager")
    assert measure_errors(model, model, tools) < 1e-4
    check_rows_without_a_text(model, tools)


@pytest.mark.parametrize("left_out", ["position_ids", "attention_mask", None])
def test_the_comparison_can_tell(tools, left_out):
    model, reference = tools.build_model("mistral"), tools.build_model("mistral")
    find_layout(model)  # known from here on, so that what follows is not refused
    if left_out is None:
        model.config.sliding_window -= 1  # a gap or a padding slot that counts
    else:
        forward = model.forward
        model.forward = lambda **kwargs: forward(**{**kwargs, left_out: None})
    assert measure_errors(model, reference, tools) > 0.01


def test_rows_that_all_forget_everything(tools):
    model = tools.build_model("llama")
    ragged = RaggedModel(model, torch.zeros(3, dtype=torch.long), VOCAB_SIZE, torch.device("cpu"))
    ids = torch.tensor([[5], [6], [7]])
    with torch.no_grad():
        ragged.read(ids)
        ragged.take_back(torch.ones(3, dtype=torch.long), [0, 2])
        logits = ragged.read(torch.tensor([[8, 9], [10, 11]]))
    for row, text in zip(logits, ([8, 9], [10, 11]), strict=True):
        torch.testing.assert_close(row[0], tools.compute_logits(model, text)[-1, :VOCAB_SIZE], atol=1e-4, rtol=0)


def test_rows_without_a_text(tools, architecture):
    check_rows_without_a_text(tools.build_model(architecture), tools)


def check_rows_without_a_text(model, tools):
    """Two ids are read next; of a row that has nothing, and may have only one of them, the first is padding."""
    ragged = RaggedModel(model, torch.zeros(0, dtype=torch.long), VOCAB_SIZE, torch.device("cpu"))
    with torch.no_grad():
        for _ in range(2):  # again when all rows are gone
            ragged.add_rows([[], []], [1, 0])
            ragged.add_rows([[5, 6, 7]], [0])
            logits = ragged.read(torch.tensor([[0, 8], [9, 10], [11, 12]]))
            for row, text in zip(logits, ([8], [9, 10], [5, 6, 7, 11, 12]), strict=True):
                expected = tools.compute_logits(model, text)[-1, :VOCAB_SIZE]
                torch.testing.assert_close(row[0], expected, atol=1e-4, rtol=0)
            ragged.take_back(torch.tensor([0, 1, 0]), [0, 1, 2])
            logits = ragged.read(torch.tensor([[13], [14], [15]]))
            for row, text in zip(logits, ([8, 13], [9, 14], [5, 6, 7, 11, 12, 15]), strict=True):
                expected = tools.compute_logits(model, text)[-1, :VOCAB_SIZE]
                torch.testing.assert_close(row[0], expected, atol=1e-4, rtol=0)
            ragged.take_back(torch.zeros(3, dtype=torch.long), [])


def test_windows_that_the_cache_does_not_know(tools):
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=97, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=6, max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    model = GPTNeoForCausalLM(config).eval()
    assert measure_errors(model, model, tools) < 1e-4


def test_distances_that_count_slots_get_texts_without_gaps(tools):
    torch.manual_seed(0)
    config = MptConfig(vocab_size=97, d_model=32, n_heads=4, n_layers=2, max_seq_len=64, initializer_range=0.3)
    model = MptForCausalLM(config).eval()  # ALiBi by the slot of a key, whatever `position_ids` say
    assert find_layout(model)
    assert measure_errors(model, model, tools) < 1e-4


@pytest.mark.parametrize("name", ["bart", "rwkv"])
def test_a_model_that_reads_otherwise_in_a_batch_is_refused(name):
    shared = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    torch.manual_seed(0)
    if name == "bart":  # positions count slots
        sizes = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 16}
        model = BartForCausalLM(
            BartConfig(**shared, **sizes, max_position_embeddings=64, is_decoder=True, init_std=0.3)
        )
    else:
        model = RwkvForCausalLM(RwkvConfig(**shared, hidden_size=32, num_hidden_layers=2, context_length=64))
    with pytest.raises(ValueError, match=r"The draft does not fit: \w+ForCausalLM cannot take single tokens back"):
        check_reversible(model.eval(), "draft")


def test_half_precision_gives_float32_logits(tools):
    model = tools.build_model("llama").bfloat16()
    ragged = RaggedModel(model, torch.zeros(1, dtype=torch.long), VOCAB_SIZE, torch.device("cpu"))
    with torch.no_grad():
        assert ragged.read(torch.tensor([[5, 6]])).dtype == torch.float32


def test_states_that_nothing_can_be_taken_out_of_are_refused(tools, architecture):
    check_reversible(tools.build_model(architecture), "target")
    mamba = MambaForCausalLM(MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, state_size=2))
    with pytest.raises(ValueError, match=r"target \(MambaForCausalLM\) keeps LinearAttentionLayer"):
        check_reversible(mamba, "target")
    mamba.config = Qwen3NextConfig(num_hidden_layers=4)
    with pytest.raises(ValueError, match="LinearAttentionLayer"):
        check_reversible(mamba, "draft")


def test_a_model_that_leaves_its_cache_alone_is_refused(tools):
    model = tools.build_model("llama")
    find_layout(model)
    forward = model.forward
    model.forward = lambda past_key_values, **kwargs: forward(**kwargs)
    ragged = RaggedModel(model, torch.zeros(1, dtype=torch.long), VOCAB_SIZE, torch.device("cpu"))
    with torch.no_grad(), pytest.raises(ValueError, match="LlamaForCausalLM does not keep its keys and values"):
        ragged.read(torch.tensor([[5, 6]]))
