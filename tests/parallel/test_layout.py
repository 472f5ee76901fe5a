"""Masks, positions and attention against plain loops in which each block stands alone."""

import copy

import pytest
import torch
from tiny import build_llama
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

from spec_kd.parallel.attention import build_attention, check_masks
from spec_kd.parallel.layout import build_layout, compute_shares, keep_starts

MASK = 261


def make_batch(lengths=((3, 9), (1, 5), (6, 2)), seed=0):
    """Ids, labels and attention mask of padded rows, each with a prompt and a completion."""
    generator = torch.Generator().manual_seed(seed)
    width = max(map(sum, lengths))
    ids, labels = torch.zeros(len(lengths), width, dtype=torch.long), torch.full((len(lengths), width), -100)
    for row, (prompt, completion) in enumerate(lengths):
        ids[row, : prompt + completion] = torch.randint(5, 261, (prompt + completion,), generator=generator)
        labels[row, prompt : prompt + completion] = ids[row, prompt : prompt + completion]
    is_text = torch.arange(width) < torch.tensor([sum(pair) for pair in lengths])[:, None]
    return ids, labels, is_text.long()


def pack(ids, labels, mask):
    """The rows of a batch as one, without padding."""
    lengths = mask.sum(1).tolist()
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    parts = zip(ids, labels, lengths, strict=True)
    ids, labels = (torch.cat(part)[None] for part in zip(*((i[:n], label[:n]) for i, label, n in parts), strict=True))
    return ids, labels, positions


def list_blocks(layout):
    """For each scored distribution: the token of the loss it is of, that its block begins with, and its position."""
    return set(zip(layout.scored.tolist(), layout.blocks.block.tolist(), layout.blocks.position.tolist(), strict=True))


def test_all_starts_have_all_masks_up_to_the_end_of_the_completion():
    _, labels, mask = make_batch()
    layout = build_layout(labels, [1.0] * 4, attention_mask=mask)
    first_of_row, expected = 0, set()
    for length in (9, 5, 2):
        expected |= {
            (first_of_row + start + k, first_of_row + start, k)
            for start in range(length)
            for k in range(min(4, length - start))
        }
        first_of_row += length
    assert list_blocks(layout) == expected
    assert layout.blocks.num_blocks == 16
    assert layout.blocks.num_available.tolist() == [16, 13, 10, 8]


@pytest.mark.parametrize(("num_tokens", "total"), [(2, 1.7), (4, 2.533), (8, 3.3731)])
def test_scored_positions_are_the_sum_of_the_shares_and_nested(num_tokens, total):
    shares = compute_shares(num_tokens, 0.7, 0.2)
    assert sum(shares) == pytest.approx(total)
    labels = torch.full((2, 5001), 7)
    layout = build_layout(labels, shares, generator=torch.Generator().manual_seed(0))
    assert len(layout.scored) == pytest.approx(10_000 * total, abs=num_tokens / 2)
    grid = layout.blocks.arrange(torch.ones(len(layout.scored)))
    assert torch.equal(grid, grid.cummin(-1).values)  # no position without those before it
    assert grid.sum(0).tolist() == [pytest.approx(10_000 * share, abs=0.51) for share in shares]


def test_any_start_is_as_likely_as_another_to_keep_a_position():
    available = torch.ones(10, 3, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    kept = torch.stack([keep_starts(available, [1, 0.5, 0.2], generator) for _ in range(4000)]).float().mean(0)
    torch.testing.assert_close(kept, torch.tensor([1, 0.5, 0.2]).expand(10, 3), atol=0.04, rtol=0)


def test_blocks_end_at_the_next_turn_of_a_user_and_at_the_next_packed_text():
    labels = torch.tensor([[-100, 5, 6, -100, 7, 8, 9, 10]])
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1]])
    layout = build_layout(labels, [1.0] * 3, position_ids=positions)
    # tokens of the loss: 5 6 | 7 8 | 9 | 10, of which 9 begins a text
    pairs = {(scored, position) for scored, _, position in list_blocks(layout)}
    assert pairs == {(0, 0), (1, 1), (1, 0), (2, 0), (3, 1), (3, 0), (4, 0), (5, 1), (5, 0)}


def test_no_start_gives_no_masks():
    layout = build_layout(torch.full((2, 6), -100), [1.0, 1.0])
    assert layout.positions.shape == (2, 6)
    assert len(layout.scored) == 0 == layout.blocks.num_blocks


def naive_logits(model, ids, labels, mask, num_tokens):
    """Logits of each block, run alone on its text: `{(token of the loss, position): (V,)}`, and their blocks."""
    found, number = {}, 0
    for row, row_labels, length in zip(ids, labels, mask.sum(1).tolist(), strict=True):
        of_loss = [i for i in range(1, length) if row_labels[i] != -100]
        for order, token in enumerate(of_loss):
            count = min(num_tokens, len(of_loss) - order)
            text = torch.cat([row[:token], torch.full((num_tokens - 1,), MASK)])[None]
            logits = model(input_ids=text).logits[0, token - 1 :]
            found |= {(number + order, number + order + k): logits[k] for k in range(count)}
        number += len(of_loss)
    return found


def build_gpt2(attention):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=262, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    config._attn_implementation = attention
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("build", "tolerance"),
    # Llama's norms are float32 in any model, and so is its softmax with eager attention
    [(build_gpt2, 1e-9), (lambda name: build_llama(vocab_size=262, attn_implementation=name), 1e-4)],
    ids=["gpt2", "llama"],
)
def test_logits_and_gradients_equal_blocks_that_run_alone(build, tolerance, is_packed, attention):
    model = build(attention).double()
    reference = copy.deepcopy(model)
    ids, labels, mask = make_batch()
    expected = naive_logits(reference, ids, labels, mask, 4)
    if is_packed:
        ids, labels, positions = pack(ids, labels, mask)
        layout = build_layout(labels, [1.0] * 4, position_ids=positions)
    else:
        layout = build_layout(labels, [1.0] * 4, attention_mask=mask)
    logits = model(
        input_ids=layout.append_masks(ids, MASK),
        attention_mask=build_attention(layout, model),
        position_ids=layout.positions,
    ).logits.flatten(0, 1)[layout.slots]
    pairs = list(zip(layout.blocks.block.tolist(), layout.scored.tolist(), strict=True))
    assert set(pairs) == set(expected)
    wanted = torch.stack([expected[pair] for pair in pairs])
    assert (logits - wanted).norm() <= tolerance * wanted.norm()
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    (logits * direction).sum().backward()
    (wanted * direction).sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= tolerance * theirs.grad.norm(), name


def test_positions_go_on_after_the_text():
    _, labels, mask = make_batch(((2, 3),))
    layout = build_layout(labels, [1.0] * 3, attention_mask=mask)
    assert layout.positions.tolist() == [[0, 1, 2, 3, 4, 2, 3, 3]]  # after tokens 1, 1, 2: the last start has no masks


def test_flex_attention_gets_the_same_mask():
    model = build_llama(seed=0, vocab_size=262, attn_implementation="flex_attention")
    _, labels, mask = make_batch()
    layout = build_layout(labels, [1.0] * 4, attention_mask=mask)
    block_mask = build_attention(layout, model)
    rows, width = layout.positions.shape
    index = torch.arange(width)
    dense = block_mask.mask_mod(torch.arange(rows)[:, None, None], torch.tensor(0), index[:, None], index)
    assert torch.equal(dense, layout.build_attention_mask()[:, 0])


def test_drafts_that_mix_blocks_are_refused():
    check_masks(build_llama(seed=0, vocab_size=262), MASK, None)
    sizes = {"vocab_size": 262, "hidden_size": 32, "num_hidden_layers": 2}
    with pytest.raises(ValueError, match=r"MambaForCausalLM\).*(takes no mask|mixes masks)"):
        check_masks(MambaForCausalLM(MambaConfig(**sizes)), MASK, None)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    mistral = MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=16))
    check_masks(mistral, MASK, 16)
    with pytest.raises(ValueError, match=r"see 16 tokens.*`max_length=17`"):
        check_masks(mistral, MASK, 17)
    flex = build_llama(seed=0, vocab_size=262, attn_implementation="flex_attention")
    with pytest.raises(ValueError, match=r"'flex_attention' and is on the CPU.*no backward"):
        check_masks(flex, MASK, None)
    flash = build_llama(seed=0, vocab_size=262)
    flash.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2', which takes no mask"):
        check_masks(flash, MASK, None)
