import pytest
import torch
from chat_templates import FORMS
from local_server import GREEDY, TOKEN_ONLY, generate_alone
from tiny import build_llama, build_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from spec_kd.engines.base import UnsupportedByEngineError
from spec_kd.engines.server.client import ServerRequestError
from spec_kd.engines.server.completion_reader import CompletionReader
from spec_kd.engines.server.logprobs import TokenNames, UnidentifiedTokensError


def test_parts_of_characters_are_counted_and_the_other_rows_are_kept(serve, half_writer, prompts):
    model, broken = half_writer
    alone = [generate_alone(model, prompt) for prompt in prompts]
    assert any(broken) and not all(broken)
    for dialect, example in (("strings", "\ufffd"), ("llama.cpp", "(left out of the answer)")):
        _, engine = serve(dialect, model=model)
        with pytest.raises(UnidentifiedTokensError, match="not exactly one id of the tokenizer") as raised:
            engine.generate(prompts, GREEDY, TOKEN_ONLY)
        error = raised.value
        assert example in error.examples and error.count == sum(map(len, error.names)) >= sum(broken)
        assert [bool(names) for names in error.names] == broken
        assert [c is None for c in error.completions] == broken
        assert [c.ids for c in error.completions if c] == [a for a, b in zip(alone, broken, strict=True) if not b]
    _, engine = serve("vllm", model=model)
    assert [c.ids for c in engine.generate(prompts, GREEDY, TOKEN_ONLY)] == alone


def test_ids_beyond_the_tokenizer_are_counted(serve, prompts):
    padded = build_llama(seed=2, vocab_size=320, tie=False)
    with torch.no_grad():
        padded.lm_head.weight[261:] = 50 * padded.lm_head.weight[261:].sign()
    _, engine = serve(model=padded)
    with pytest.raises(UnidentifiedTokensError):
        engine.generate(prompts, GREEDY)


def test_tokens_that_do_not_spell_the_text_are_an_error(serve, prompts):
    def change_text(answer):
        answer["choices"][0]["text"] = "something else"
        return answer

    _, engine = serve("strings", edit=change_text)
    with pytest.raises(ServerRequestError, match="the tokenizer is not the server's"):
        engine.generate(prompts, GREEDY)


def test_ids_and_logprobs_that_disagree_are_an_error(serve, prompts):
    def change_id(answer):
        answer["choices"][0]["token_ids"][0] += 1
        return answer

    def drop_last(answer):
        answer["choices"][0]["token_ids"].pop()
        return answer

    for edit, message in ((change_id, "its token 0 has the id"), (drop_last, "ids and log-probabilities of")):
        _, engine = serve(edit=edit)
        with pytest.raises(ServerRequestError, match=message):
            engine.generate(prompts, GREEDY)


@pytest.mark.parametrize("value", [0.5, float("nan"), "-0.1", True])
def test_values_that_are_no_logprobs_are_an_error(serve, prompts, value):
    def change_value(answer):
        answer["choices"][0]["logprobs"]["token_logprobs"][0] = value
        return answer

    _, engine = serve(edit=change_value)
    with pytest.raises(ServerRequestError, match="is not a log-probability"):
        engine.generate(prompts, GREEDY, TOKEN_ONLY)


def build_sentencepiece_like():
    vocab = {"<unk>": 0, "</s>": 1, "▁Hello": 2, "Hello": 3, "▁only": 4, "<0xC3>": 5, "<0xA9>": 6, "é": 7, "▁": 8}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def test_names_of_tokens():
    byte_level = build_tokenizer()
    names = TokenNames(byte_level)

    def find(names, tokens):
        return names.find_ids(tokens, names.pick_spelling(tokens))

    ids = byte_level.get_vocab()
    e_acute = byte_level("é")["input_ids"]  # two bytes, c3 a9
    assert find(names, ["token_id:70", 71, "a", " ", "<|end|>"]) == [70, 71, ids["a"], ids["Ġ"], 1]
    assert find(names, ["bytes:\\xc3", "bytes:\\xA9"]) == e_acute
    assert (
        find(names, [" ", "é", "\ufffd", "", "ab", "token_id:261", 261, "bytes:\\xc3\\xa9"]) == [ids["Ġ"]] + [None] * 7
    )
    assert find(names, ["Ġ", "Ã", "ĉ"]) == [ids["Ġ"], e_acute[0], ids["ĉ"]]  # as in the vocabulary
    assert names.means("\ufffd", e_acute[0]) and names.means("\ufffd", e_acute[1])
    assert (
        not names.means("a", ids["b"]) and not names.means("token_id:5", 6) and names.means("bytes:\\xc3", e_acute[0])
    )

    words = TokenNames(build_sentencepiece_like())
    assert find(words, [" Hello", "only", " only", "</s>"]) == [2, 4, 4, 1]
    assert find(words, ["Hello"]) == [None]  # with or without its space
    assert find(words, ["▁Hello", "▁only"]) == [2, 4]
    assert find(words, ["bytes:\\xc3"]) == [5] and words.means("Hello", 2) and words.means("Hello", 3)


def test_parts_of_characters_in_text_alone(serve, prompts, tokenizer):
    def write(text, reason):
        def edit(answer):
            answer["choices"][0] |= {"text": text, "finish_reason": reason}
            return answer

        return serve("text", engine_options={"is_text_only": True}, edit=edit)[1].generate(prompts[:2], GREEDY)

    ab = tokenizer("ab")["input_ids"]
    assert [(c.ids, c.finish_reason) for c in write("ab\ufffd\ufffd", "length")] == [(ab, "length")] * 2
    assert [(c.ids, c.finish_reason) for c in write("ab", "stop")] == [([*ab, 1], "stop")] * 2
    assert [c.ids for c in write("", "stop")] == [[1], [1]]
    for text, reason, count in (("a\ufffdb", "length", 2), ("ab\ufffd\ufffd", "stop", 4), ("", "length", 2)):
        with pytest.raises(UnidentifiedTokensError) as raised:
            write(text, reason)
        assert raised.value.count == count and raised.value.completions == [None, None]


@pytest.mark.parametrize("dialect", ["vllm", "strings"])
def test_a_dropped_eos_is_appended_or_the_signal_refused(serve, writer, prompts, dialect):
    _, engine = serve(dialect, drops_eos=True)
    assert [c.ids for c in engine.generate(prompts, GREEDY)] == [generate_alone(writer, prompt) for prompt in prompts]
    with pytest.raises(UnsupportedByEngineError, match="EOS that it does not return"):
        engine.generate(prompts, GREEDY, TOKEN_ONLY)


def test_other_eos_ids(serve, writer, prompts):
    first = generate_alone(writer, prompts[0])
    eos = next(id for id in first if id != 1)
    server, engine = serve(engine_options={"eos_token_ids": [1, eos]})
    completion = engine.generate(prompts[:1], GREEDY, TOKEN_ONLY)[0]
    assert completion.ids == first[: first.index(eos) + 1] and completion.finish_reason == "stop"
    assert len(completion.token_logprobs) == len(completion.ids) and server.requests[0]["stop_token_ids"] == [1, eos]

    def stop_at(id, reason):
        def edit(answer):
            choice = answer["choices"][0]
            choice |= {"finish_reason": "stop", "token_ids": [70, id], "logprobs": None, **reason}
            answer["usage"]["completion_tokens"] = 2
            return answer

        return edit

    def generate(edit):
        return serve(edit=edit)[1].generate(prompts[:1], GREEDY)[0]

    for reason in ({"stop_reason": 4}, {"matched_stop": 4, "stop_reason": None}):  # vLLM, SGLang
        assert generate(stop_at(4, reason)).ids == [70, 4]
        assert generate(stop_at(71, reason)).ids == [70, 71, 4]  # named, but dropped
    with pytest.raises(ServerRequestError, match=r"stopped at id 4 \('<\|assistant\|>'\), .*`eos_token_ids` \[1\]"):
        generate(stop_at(4, {}))
    with pytest.raises(ServerRequestError, match="stopped at '###', a stop string"):
        generate(stop_at(71, {"stop_reason": "###"}))


def test_text_behind_an_eos_is_not_kept(serve, prompts):
    def ignore_eos(answer):
        answer["choices"][0] |= {"finish_reason": "length", "token_ids": [70, 1, 70, 1] + [70] * 8, "logprobs": None}
        answer["usage"]["completion_tokens"] = 12
        return answer

    _, engine = serve(edit=ignore_eos)
    completion = engine.generate(prompts[:1], GREEDY)[0]
    assert completion.ids == [70, 1] and completion.finish_reason == "stop"


def test_ends_that_were_not_asked_for_are_errors(serve, prompts):
    def answer_with(**changes):
        return lambda answer: {**answer, "choices": [answer["choices"][0] | changes]}

    for traits, message in (
        ({"edit": answer_with(finish_reason="content_filter")}, "finish_reason is 'content_filter'"),
        ({"edit": answer_with(finish_reason=None)}, "finish_reason is None"),
        (
            {"context": 15},
            "ends with finish_reason 'length' after 4 of 12 tokens, because the server's context is full",
        ),
        ({"edit": answer_with(token_ids=[70] * 13, logprobs=None)}, "13 tokens, more than the limit of 12"),
    ):
        _, engine = serve(**traits)
        with pytest.raises(ServerRequestError, match=message) as raised:
            engine.generate(prompts[1:2], GREEDY)
        assert raised.value.index == 0


def test_a_dropped_end_is_the_one_that_the_target_wrote():
    """Gemma ends its turns with `<end_of_turn>`, and its tokenizer's EOS is another token."""
    for name in ("gemma", "phi3", "llama3", "command-r"):
        form, tokenizer = FORMS[name], FORMS[name].build()
        end = tokenizer(form.end, add_special_tokens=False)["input_ids"][-1]
        known = [tokenizer.eos_token_id, end]
        for eos_token_ids in (None, known):
            reader = CompletionReader(tokenizer, eos_token_ids, is_text_only=True)
            answer = {"choices": [{"text": "Fine.", "finish_reason": "stop"}]}
            assert reader.read_completion(answer, None, 9, [1]).ids[-1] == end and end in reader.eos_token_ids
    assert CompletionReader(build_tokenizer(), [1, 3], is_text_only=True).eos_token_ids == [1, 3]
