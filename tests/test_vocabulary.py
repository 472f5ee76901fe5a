import copy

import pytest
import torch
from tiny import build_llama, build_tokenizer
from tokenizers import normalizers, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PhiConfig, PhiForCausalLM

from spec_kd.vocabulary import (
    VocabularyMismatchError,
    align_vocabulary,
    check_head_covers,
    check_same_tokenizer,
    count_real_ids,
    describe_served_differences,
)

REAL = 261
IDS = torch.arange(5, 25)[None]  # (1, 20)


def logits_of(model):
    with torch.no_grad():
        return model(IDS).logits


def test_real_ids_count_added_tokens_and_holes(tokenizer):
    assert count_real_ids(tokenizer) == REAL == len(tokenizer)
    larger = build_tokenizer()
    larger.add_tokens(["<|extra|>"])
    assert count_real_ids(larger) == REAL + 1


def test_the_same_tokenizer_passes(tokenizer):
    check_same_tokenizer(tokenizer, tokenizer)
    check_same_tokenizer(tokenizer, build_tokenizer())


def test_missing_tokens_are_named(tokenizer):
    larger = build_tokenizer()
    larger.add_tokens([f"<|extra_{i}|>" for i in range(8)])
    with pytest.raises(VocabularyMismatchError) as error:
        check_same_tokenizer(tokenizer, larger)
    message = str(error.value)
    assert "the draft has 261 tokens with ids up to 260, the target 269 with ids up to 268" in message
    assert "only in the target: '<|extra_0|>'" in message and "and 3 more" in message
    assert "only in the draft" not in message and "BlackBoxSFTTrainer" in message
    with pytest.raises(VocabularyMismatchError, match=r"only in the draft: '<\|extra_0\|>'"):
        check_same_tokenizer(larger, tokenizer)


def test_moved_ids_are_named(tokenizer):
    one, two = build_tokenizer(), build_tokenizer()
    one.add_tokens(["<|x|>", "<|y|>"])
    two.add_tokens(["<|y|>", "<|x|>"])
    with pytest.raises(
        VocabularyMismatchError, match=r"other ids: '<\|x\|>' is 261 in the draft and 262 in the target"
    ):
        check_same_tokenizer(one, two)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("normalizer", normalizers.NFKC()),
        ("normalizer", normalizers.Lowercase()),
        ("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
    ],
)
def test_same_ids_but_other_cuts_are_found(tokenizer, part, value):
    other = build_tokenizer()
    setattr(other.backend_tokenizer, part, value)
    assert other.get_vocab() == tokenizer.get_vocab()
    with pytest.raises(VocabularyMismatchError, match="text is cut differently"):
        check_same_tokenizer(tokenizer, other)


def test_head_must_hold_all_ids(draft):
    check_head_covers(draft, REAL, "draft")
    with pytest.raises(VocabularyMismatchError, match=r"output head of the target has 261 rows but .* 262 real ids"):
        check_head_covers(draft, REAL + 1, "target")


def test_served_differences(tokenizer):
    assert describe_served_differences(tokenizer, build_tokenizer()) == []
    other = build_tokenizer()
    other.chat_template = "{{ messages }}"
    other.eos_token, other.bos_token = "<|user|>", "<|system|>"
    differences = describe_served_differences(tokenizer, other)
    assert len(differences) == 3
    assert "chat template" in differences[0] and "BOS" in differences[1]
    assert differences[2] == "the EOS token is '<|end|>' in the draft and '<|user|>' in the target"


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(("rows", "target_rows"), [(261, 320), (320, 288), (320, 261), (320, 320)])
def test_alignment_keeps_the_real_distribution(tie, rows, target_rows):
    model = build_llama(vocab_size=rows, tie=tie)
    real_rows = model.lm_head.weight[:REAL].clone()
    before = logits_of(model)[..., :REAL].log_softmax(-1)
    align_vocabulary(model, target_rows, REAL)
    logits = logits_of(model)
    assert logits.shape[-1] == target_rows == model.config.vocab_size
    assert model.get_input_embeddings().num_embeddings == model.lm_head.out_features == target_rows
    assert torch.equal(model.lm_head.weight[:REAL], real_rows)
    torch.testing.assert_close(logits[..., :REAL].log_softmax(-1), before, atol=1e-6, rtol=0)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    if target_rows > REAL:
        p = logits.softmax(-1)
        assert (p[..., REAL:] <= p[..., :REAL].mean(-1, keepdim=True)).all()


def test_alignment_survives_saving_and_serves_with_the_target(tmp_path):
    draft, target = build_llama(vocab_size=261), build_llama(seed=1, vocab_size=320)
    with pytest.raises(ValueError):
        target.generate(IDS, assistant_model=draft, max_new_tokens=3)
    align_vocabulary(draft, 320, REAL)
    draft.save_pretrained(tmp_path)
    reloaded = type(draft).from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(reloaded), logits_of(draft))
    assert target.generate(IDS, assistant_model=reloaded, max_new_tokens=3).shape[1] > IDS.shape[1]


def test_alignment_with_a_head_bias():
    torch.manual_seed(0)
    model = PhiForCausalLM(
        PhiConfig(
            vocab_size=REAL, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            initializer_range=0.2, bos_token_id=None, eos_token_id=1, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    torch.nn.init.normal_(model.lm_head.bias, std=3.0)  # without the bias rule, Jensen's bound would not hold
    before = logits_of(model)
    align_vocabulary(model, 300, REAL)
    after = logits_of(model)
    torch.testing.assert_close(after[..., :REAL], before)
    assert after.softmax(-1)[..., REAL:].max() == 0


def test_alignment_of_another_architecture_and_dtype():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=REAL, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=1)
    model = GPT2LMHeadModel(config).eval().to(torch.bfloat16)
    real_rows = model.lm_head.weight[:REAL].clone()
    align_vocabulary(model, 272, REAL)
    assert model.lm_head.weight.dtype == torch.bfloat16 and torch.equal(model.lm_head.weight[:REAL], real_rows)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_alignment_leaves_the_random_state(draft):
    state = torch.get_rng_state()
    align_vocabulary(draft, 320, REAL)
    assert torch.equal(state, torch.get_rng_state())


def test_what_cannot_be_aligned_is_refused(draft):
    from peft import LoraConfig, get_peft_model

    with pytest.raises(VocabularyMismatchError, match="260 rows: the tokenizer has 261 real ids"):
        align_vocabulary(draft, 260, REAL)
    with pytest.raises(VocabularyMismatchError, match="has 261 rows but"):
        align_vocabulary(draft, 320, 300)
    with pytest.raises(TypeError, match="merge it first"):
        align_vocabulary(get_peft_model(copy.deepcopy(draft), LoraConfig(task_type="CAUSAL_LM")), 320, REAL)
    draft.lm_head.weight = torch.nn.Parameter(torch.zeros(REAL, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="quantized"):
        align_vocabulary(draft, 320, REAL)
