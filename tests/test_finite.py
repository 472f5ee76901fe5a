"""A model whose weights are not finite is neither evaluated nor exported, and the error says which weight."""

import math

import pytest
import torch
from tiny import build_llama

from spec_kd import NonFiniteError, evaluate_draft, export_draft, generate_responses


@pytest.fixture
def broken():
    model = build_llama(seed=2)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    return model


def test_evaluation_and_generation_name_the_model(broken, target, tokenizer):
    for draft, of, role in ((broken, target, "draft"), (target, broken, "target")):
        with pytest.raises(NonFiniteError, match=rf"The {role}'s weight `model\.norm\.weight`"):
            evaluate_draft(draft, of, ["a b", "c d"], processing_class=tokenizer, max_new_tokens=4)
    with pytest.raises(NonFiniteError, match="The target's weight"):
        generate_responses(broken, ["a b"], processing_class=tokenizer, max_new_tokens=4, show_progress=False)


def test_an_export_leaves_nothing(broken, tokenizer, tmp_path):
    with pytest.raises(NonFiniteError, match="The draft's weight"):
        export_draft(broken, tmp_path / "out", processing_class=tokenizer)
    assert not list(tmp_path.rglob("*.safetensors"))
