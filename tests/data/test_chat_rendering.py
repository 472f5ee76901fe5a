"""Prompt and completion are what a server of the target reads and what the target writes."""

import string

import pytest
from chat_templates import FORMS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from spec_kd.data.chat_rendering import ChatRenderer
from spec_kd.data.prompt_rendering import render_prompt_ids
from spec_kd.data.rendered_completion import TurnNotRenderedError

HISTORY = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "How are you?"},
]
REPLIES = ("Fine.", "1.\n\n2.", "{\"a\": 'b'} <b>ü 漢字 🙂</b>", "</s", "-")


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


@pytest.fixture(params=[name for name, form in FORMS.items() if form.think])
def reasoning_form(request):
    return FORMS[request.param]


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def render(form, answer, history=HISTORY, **arguments):
    """A turn, its prompt compared with the one for generation, and the text that was written."""
    tokenizer = form.build()
    turn = ChatRenderer(tokenizer).render_turn(history, answer, **arguments)
    row = {"prompt": history, "chat_template_kwargs": arguments}
    assert turn.prompt_ids == next(render_prompt_ids([row], tokenizer))
    return turn, tokenizer.decode(turn.completion_ids)


@pytest.mark.parametrize("reply", REPLIES)
def test_what_was_read_and_written(form, reply):
    if form is FORMS["deepseek-r1"]:  # a target that always reasons
        reply = form.think + reply
    turn, _ = render(form, {"role": "assistant", "content": reply})
    assert turn.completion_ids == encode(form.build(), form.opening + reply + form.end)


def test_reasoning_is_part_of_what_was_written(reasoning_form):
    form = reasoning_form
    expected = form.think + "Fine." + form.end
    answers = [{"content": "Fine.", key: "Hm."} for key in ("reasoning_content", "reasoning", "thinking")]
    if form is not FORMS["gpt-oss"]:
        answers += [{"content": "<think>\nHm.\n</think>\n\nFine."}]
    if form is FORMS["deepseek-r1"]:
        answers += [{"content": "Hm.\n</think>\n\nFine."}]
    for answer in answers:
        turn, text = render(form, {"role": "assistant", **answer})
        assert text == expected
        assert turn.completion_ids == encode(form.build(), expected)


def test_text_of_the_generation_prompt_that_history_lacks():
    for name, arguments in (("qwen3", {"enable_thinking": False}), ("gemma4", {})):
        _, text = render(FORMS[name], {"role": "assistant", "content": "Fine."}, **arguments)
        assert text == "Fine." + FORMS[name].end


def test_reasoning_that_is_missing_is_said():
    with pytest.raises(TurnNotRenderedError, match="opens a reasoning"):
        render(FORMS["deepseek-r1"], {"role": "assistant", "content": "Fine."})
    with pytest.raises(TurnNotRenderedError, match="does not print the reasoning"):
        render(FORMS["llama3"], {"role": "assistant", "content": "Fine.", "reasoning_content": "Hm."})


def test_text_that_looks_like_an_end_of_turn_does_not_end_it(form):
    reply = f"A turn ends with {form.eos}, I say, {form.end}."
    if form is FORMS["deepseek-r1"]:
        reply = "</think>" + reply
    turn, text = render(form, {"role": "assistant", "content": reply})
    assert text == form.opening + reply + form.end
    renderer = ChatRenderer(form.build())
    assert [i for i, id in enumerate(turn.completion_ids) if id in renderer.end_ids] == [len(turn.completion_ids) - 1]


def test_white_space_that_templates_strip_was_written():
    for name in ("gemma", "llama3"):
        _, text = render(FORMS[name], {"role": "assistant", "content": " Fine.\n"})
        assert text == " Fine.\n" + FORMS[name].end


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": None, "b": "<|im_end|>"}}}


def test_tool_calls():
    answer = {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}
    call = '<tool_call>\n{"name": "add", "arguments": {"a": null, "b": "<|im_end|>"}}\n</tool_call>'
    _, text = render(FORMS["qwen2.5"], answer)
    assert text == f"{call}\n{call}<|im_end|>"
    _, text = render(FORMS["qwen3"], answer)
    assert text == f"<think>\n\n</think>\n\n{call}\n{call}<|im_end|>"
    _, text = render(FORMS["gpt-oss"], {**answer, "tool_calls": [CALL], "reasoning": "Hm."})
    assert (
        text.endswith('<|message|>{"a": null, "b": "<|im_end|>"}<|call|>') and "analysis<|message|>Hm.<|end|>" in text
    )


@pytest.mark.parametrize("name", ["chatml", "gemma", "llama3"])
def test_calls_that_a_template_does_not_print(name):
    with pytest.raises(TurnNotRenderedError, match="does not print"):
        render(FORMS[name], {"role": "assistant", "content": "I call.", "tool_calls": [CALL]})


def train_tokenizer(kind):
    """A tokenizer with merges: of bytes, or of words that begin with `▁`."""
    form = FORMS["deepseek-r1"]
    texts = ["<think>\n\n Hm.\n</think>\n\nFine. I am fine.\n\n" * 9, "A turn ends with <|eos|>, I say."] * 9
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>") if kind == "words" else models.BPE())
    if kind == "words":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else sorted({*string.printable, "▁"})
    special = [*form.tokens, "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=form.eos, unk_token="<unk>", chat_template=form.template
    )


@pytest.mark.parametrize("kind", ["bytes", "words"])
@pytest.mark.parametrize("start", ["", "\n", "\n\n", " "])
def test_tokens_that_merge_across_the_boundary(kind, start):
    """What the server reads is the same for every answer, and what is written spells the answer."""
    tokenizer = train_tokenizer(kind)
    answer = {"role": "assistant", "content": start + "Hm.\n</think>\n\nI say <|eos|>, I am fine."}
    turn = ChatRenderer(tokenizer).render_turn(HISTORY[:1], answer)
    assert turn.prompt_ids == next(render_prompt_ids([{"prompt": HISTORY[:1]}], tokenizer))
    prompt = "<|bos|><|User|>Hi<|Assistant|><think>\n"
    ids = encode(tokenizer, prompt + answer["content"])
    assert tokenizer.decode(turn.prompt_ids + turn.completion_ids) == tokenizer.decode(ids) + "<|eos|>"
    eos_id = tokenizer.eos_token_id
    assert turn.completion_ids[-1] == eos_id and eos_id not in turn.completion_ids[:-1]
