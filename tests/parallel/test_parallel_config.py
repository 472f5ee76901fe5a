import pytest
from tiny import build_tokenizer
from transformers import LlamaConfig

from spec_kd.parallel import ParallelDrafting, find_mask_token, read_parallel_drafting, write_parallel_drafting


def build_config(**kwargs):
    return LlamaConfig(vocab_size=262, **kwargs)


def test_an_autoregressive_draft_has_no_parallel_drafting():
    assert read_parallel_drafting(build_config()) is None


def test_what_is_written_is_read_also_from_a_saved_configuration(tmp_path):
    config, parallel = build_config(), ParallelDrafting(mask_token_id=261, num_tokens=4)
    write_parallel_drafting(config, parallel)
    config.save_pretrained(tmp_path)
    saved = LlamaConfig.from_pretrained(tmp_path)
    assert (saved.pard_token, saved.num_parallel_tokens) == (261, 4)
    assert read_parallel_drafting(saved) == parallel


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pard_token": 3}, r"`pard_token` \(3\) and no `num_parallel_tokens`"),
        ({"num_parallel_tokens": 3}, r"`num_parallel_tokens` \(3\) and no `pard_token`"),
        ({"pard_token": 3, "num_parallel_tokens": 1}, "num_parallel_tokens.*2"),
        ({"pard_token": -1, "num_parallel_tokens": 2}, "mask_token_id"),
        ({"pard_token": 262, "num_parallel_tokens": 2}, "262 rows"),
        ({"pard_token": 3, "num_parallel_tokens": 2, "mask_token_id": 4}, "Remove `mask_token_id`"),
    ],
)
def test_configurations_that_cannot_be_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        read_parallel_drafting(build_config(**keys))


def test_the_mask_token_is_one_that_no_text_has():
    tokenizer = build_tokenizer()
    with pytest.raises(ValueError, match=r"Each of the 261 tokens can stand in a text.*add_special_tokens"):
        find_mask_token(tokenizer)  # `<|user|>` is no literal part of the template, which writes it all the same
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>", "<|fim|>"]})
    assert find_mask_token(tokenizer) == tokenizer.convert_tokens_to_ids("<|fim|>")
    tokenizer.add_tokens(["<unused0>", "<unused1>", "<later>"])
    assert find_mask_token(tokenizer) == tokenizer.convert_tokens_to_ids("<unused1>")
    tokenizer.mask_token = "<|tool|>"
    assert find_mask_token(tokenizer) == tokenizer.convert_tokens_to_ids("<|tool|>")


def test_an_unknown_token_is_the_last_choice():
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"unk_token": "<unk>"})
    assert find_mask_token(tokenizer) == 261
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|fim|>"]})
    assert find_mask_token(tokenizer) == 262


def test_a_named_mask_token_is_checked():
    tokenizer = build_tokenizer()
    assert find_mask_token(tokenizer, "a") == find_mask_token(tokenizer, tokenizer.get_vocab()["a"])
    for used in ("<|end|>", 0, "<|user|>", "<|assistant|>"):
        with pytest.raises(ValueError, match="stands in texts"):
            find_mask_token(tokenizer, used)
    for missing in ("<mask>", 261, -1):
        with pytest.raises(ValueError, match="no token of the tokenizer"):
            find_mask_token(tokenizer, missing)
