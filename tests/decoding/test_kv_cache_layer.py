"""Buffers that grow must hold what concatenation would."""

import torch
from transformers.cache_utils import DynamicLayer

from spec_kd.decoding.ragged_model import SPARE_SLOTS, GrowingCacheLayer


def draw_states(rows, slots, seed):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(rows, 2, slots, 4, generator=generator)
    return keys, torch.randn(rows, 2, slots, 6, generator=generator)  # values may be wider


def read(layer, *new):
    for seed, slots in enumerate(new):
        states = layer.update(*draw_states(3, slots, seed))
    return states


def test_new_tokens_are_those_of_a_concatenating_layer():
    growing, plain = GrowingCacheLayer(), DynamicLayer()
    lengths = [5, 1, SPARE_SLOTS - 2, 1, 1, SPARE_SLOTS + 3]  # within the buffer, at its end and beyond
    for states, expected in zip(read(growing, *lengths), read(plain, *lengths), strict=True):
        torch.testing.assert_close(states, expected, atol=0, rtol=0)
    assert growing.get_seq_length() == plain.get_seq_length() == sum(lengths)
    assert growing.get_mask_sizes(3) == plain.get_mask_sizes(3)


def test_a_new_token_copies_nothing_but_itself():
    layer = GrowingCacheLayer()
    read(layer, 5)
    before = layer.keys.data_ptr()
    read(layer, *[1] * SPARE_SLOTS)
    assert layer.keys.data_ptr() == before
    read(layer, 1)
    assert layer.keys.data_ptr() != before


def test_rows_leave_and_join():
    layer, joining = GrowingCacheLayer(), GrowingCacheLayer()
    keys, values = (states.clone() for states in read(layer, 5))
    layer.keep_rows([2, 1])
    torch.testing.assert_close(layer.keys, keys[[2, 1]])
    torch.testing.assert_close(layer.values, values[[2, 1]])
    new_keys, new_values = joining.update(*draw_states(4, 3, seed=9))
    layer.append(joining, first=2)
    assert layer.keys.shape == (6, 2, 5, 4) and layer.values.shape == (6, 2, 5, 6)
    torch.testing.assert_close(layer.keys[:2], keys[[2, 1]])
    torch.testing.assert_close(layer.keys[2:, :, 2:], new_keys)
    torch.testing.assert_close(layer.values[2:, :, 2:], new_values)
    assert layer.values.isfinite().all()


def test_slots_move_all_at_once():
    layer = GrowingCacheLayer()
    keys, values = (states.clone() for states in read(layer, 4))
    source, destination = torch.tensor([[0, 1], [3, 2], [1, 1]]), torch.tensor([[1, 2], [2, 3], [1, 0]])
    layer.move(source, destination)
    for moved, states in ((layer.keys, keys), (layer.values, values)):
        for row, slots in enumerate(([0, 0, 1, 3], [0, 1, 3, 2], [1, 1, 2, 3])):
            torch.testing.assert_close(moved[row], states[row][:, slots], atol=0, rtol=0)
