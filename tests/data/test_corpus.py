"""Text of others as rows that a target can score."""

import pytest
import torch
from datasets import Dataset

from spec_kd import score_completions, tokenize_corpus

TEXTS = ["A cell divides.", "x", "The leaf of an old tree, and what lives under it."]
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def join(rows):
    return [row["prompt_ids"] + row["completion_ids"] for row in rows]


def test_text_is_tokenized_as_trl_does_and_split_into_rows_of_its_own(tokenizer):
    whole = tokenize_corpus(Dataset.from_dict({"text": [*TEXTS, "ends<|end|>", ""]}), tokenizer)
    expected = [tokenizer(text + "<|end|>")["input_ids"] for text in [*TEXTS, "ends"]]
    assert join(whole) == expected  # the empty text has its EOS alone, which nothing predicts
    assert all(len(row["prompt_ids"]) == 1 for row in whole)
    pieces = tokenize_corpus(Dataset.from_dict({"text": TEXTS}), tokenizer, max_length=7)
    assert join(pieces) == [
        ids[start : start + 7] for ids in expected[:3] for start in range(0, len(ids), 7) if len(ids) - start > 1
    ]


def test_conversations_and_completions_are_whole_rows(tokenizer):
    text = "<|user|>Hi<|assistant|>Hello<|end|>"
    as_user = text.replace("Hi<|", "Hi<|end|><|")
    for rows, expected in (
        ({"messages": [TURNS]}, as_user),
        ({"prompt": [TURNS[:1]], "completion": [TURNS[1:]]}, as_user),
        ({"prompt": ["One and "], "completion": ["two"]}, "One and two<|end|>"),
        ({"input_ids": [tokenizer("abc")["input_ids"]]}, "abc"),
        ({"prompt_ids": [[10, 11]], "completion_ids": [[12, 1]]}, tokenizer.decode([10, 11, 12, 1])),
    ):
        assert [tokenizer.decode(ids) for ids in join(tokenize_corpus(Dataset.from_dict(rows), tokenizer))] == [
            expected
        ]


def test_another_column_holds_the_text(tokenizer):
    rows = Dataset.from_dict({"body": TEXTS[:1], "text": ["other"]})
    assert tokenizer.decode(join(tokenize_corpus(rows, tokenizer, text_field="body"))[0]) == f"{TEXTS[0]}<|end|>"


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ({"body": ["a"]}, {}, r"columns \['body'\]. Needed is one of text \('text'\)"),
        ({"text": [""]}, {}, "No row of the corpus has 2 tokens"),
        ({"text": ["a"]}, {"max_length": 1}, "`max_length` is 1, but must be at least 2"),
        ({"text": []}, {}, "has no rows"),
    ],
)
def test_what_cannot_be_scored_is_refused(rows, options, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        tokenize_corpus(Dataset.from_dict(rows), tokenizer, **options)


def test_a_corpus_is_scored_at_every_token_but_the_first(target, tokenizer):
    rows = tokenize_corpus(Dataset.from_dict({"text": TEXTS}), tokenizer, max_length=10)
    scored = score_completions(target, rows, processing_class=tokenizer, teacher_signal="token_only")
    assert len(scored) == len(rows) and sum(map(len, scored["completion_ids"])) == sum(len(i) - 1 for i in join(rows))
    for row in scored:
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        with torch.no_grad():
            log_p = target(input_ids=ids).logits[0, :-1].double().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(row["teacher_token_logprobs"]).double(), log_p, rtol=1e-4, atol=1e-4)
