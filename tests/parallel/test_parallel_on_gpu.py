"""Parallel drafts with an attention that only a GPU trains with: `pytest -m gpu`."""

import copy

import pytest
from test_layout import MASK, make_batch
from tiny import build_llama

from spec_kd.parallel.attention import build_attention, check_masks
from spec_kd.parallel.layout import build_layout

pytestmark = pytest.mark.gpu


def test_flex_attention_gives_the_logits_and_gradients_of_sdpa():
    sdpa = build_llama(seed=0, vocab_size=262, hidden_size=64).cuda()
    flex = copy.deepcopy(sdpa)
    flex.set_attn_implementation("flex_attention")
    check_masks(flex, MASK, None)
    ids, labels, mask = (value.cuda() for value in make_batch())
    layout = build_layout(labels, [1.0] * 4, attention_mask=mask)
    logits = []
    for model in (sdpa, flex):
        output = model(
            input_ids=layout.append_masks(ids, MASK),
            attention_mask=build_attention(layout, model),
            position_ids=layout.positions,
        )
        logits.append(output.logits.flatten(0, 1)[layout.slots])
        logits[-1].square().sum().backward()
    assert (logits[1] - logits[0]).norm() <= 1e-3 * logits[0].norm()
    for (name, theirs), ours in zip(sdpa.named_parameters(), flex.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-2 * theirs.grad.norm(), name
