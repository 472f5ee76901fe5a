"""Pre-queries of real chat templates.

Where the templates in `templates/` are from, unchanged: llama3, llama3_1, llama3_2, qwen2_5, qwen3, gemma (1 and 2),
gemma3, phi3 and phi3_5 from `trl/chat_templates` of TRL 1.16, which has them from the models' repositories;
mistral_nemo (mistralai/Mistral-Nemo-Instruct-2407) from `models/templates` of the llama.cpp in llama-cpp-python 0.3.36;
mistral_7b_v0_1 (mistralai/Mistral-7B-Instruct-v0.1) and chatml (teknium/OpenHermes-2.5-Mistral-7B) from its
`llama_chat_format.py`. What is expected of them was written by hand.
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from spec_kd.prompts.synthesis.pre_query import TurnEnd, cut_user_text, derive_pre_query, derive_turn_end

FOLDER = Path(__file__).parent / "templates"
SYSTEM = "You help chemists."
TOOL = {
    "type": "function",
    "function": {
        "name": "get_melting_point",
        "description": "Of a substance.",
        "parameters": {"type": "object", "properties": {"substance": {"type": "string"}}, "required": ["substance"]},
    },
}
HISTORY = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
SENTENCES = [
    "What is the boiling point of water, and why does it fall with the pressure?",
    " the [INST] of a [/INST] user Hello, how are you doing today? 4 8 15 16 23 42\n\nuser\n\nsystem\nassistant\n",
    "You are a helpful assistant. Today Date: 26 Jul 2024",
] * 3


class Expected(NamedTuple):
    """What a template puts before the user's text, and the token that ends it."""

    special_tokens: list[str]
    bos: str | None
    eos: str
    alone: str
    with_system: str | None
    with_history: str
    end: str


LLAMA = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
LLAMA_USER = "<|start_header_id|>user<|end_header_id|>\n\n"
LLAMA_HISTORY = f"{LLAMA_USER}Hi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>{LLAMA_USER}"
LLAMA_SYSTEM = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
DATE = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
CHATML = ["<|im_start|>", "<|im_end|>"]
CHATML_USER = "<|im_start|>user\n"
CHATML_HISTORY = f"{CHATML_USER}Hi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n{CHATML_USER}"
CHATML_SYSTEM = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n{CHATML_USER}"
QWEN = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
GEMMA = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
GEMMA_USER = "<start_of_turn>user\n"
GEMMA_HISTORY = f"<bos>{GEMMA_USER}Hi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n{GEMMA_USER}"
PHI = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
PHI_USER = "<|user|>\n"
PHI_ALL = (
    PHI, None, "<|endoftext|>", PHI_USER, f"<|system|>\n{SYSTEM}<|end|>\n{PHI_USER}",
    f"{PHI_USER}Hi<|end|>\n<|assistant|>\nHello!<|end|>\n{PHI_USER}", "<|end|>",
)  # fmt: skip

TEMPLATES = {
    "llama3": Expected(
        LLAMA, "<|begin_of_text|>", "<|eot_id|>", f"<|begin_of_text|>{LLAMA_USER}",
        f"{LLAMA_SYSTEM}{SYSTEM}<|eot_id|>{LLAMA_USER}", f"<|begin_of_text|>{LLAMA_HISTORY}", "<|eot_id|>",
    ),
    "llama3_1": Expected(
        LLAMA, "<|begin_of_text|>", "<|eot_id|>", f"{LLAMA_SYSTEM}{DATE}<|eot_id|>{LLAMA_USER}",
        f"{LLAMA_SYSTEM}{DATE}{SYSTEM}<|eot_id|>{LLAMA_USER}", f"{LLAMA_SYSTEM}{DATE}<|eot_id|>{LLAMA_HISTORY}",
        "<|eot_id|>",
    ),
    "qwen2_5": Expected(
        CHATML, None, "<|im_end|>", QWEN + CHATML_USER, CHATML_SYSTEM, QWEN + CHATML_HISTORY, "<|im_end|>"
    ),
    "qwen3": Expected(CHATML, None, "<|im_end|>", CHATML_USER, CHATML_SYSTEM, CHATML_HISTORY, "<|im_end|>"),
    "chatml": Expected(CHATML, None, "<|im_end|>", CHATML_USER, CHATML_SYSTEM, CHATML_HISTORY, "<|im_end|>"),
    "gemma": Expected(GEMMA, "<bos>", "<eos>", f"<bos>{GEMMA_USER}", None, GEMMA_HISTORY, "<end_of_turn>"),
    "gemma3": Expected(
        GEMMA, "<bos>", "<eos>", f"<bos>{GEMMA_USER}", f"<bos>{GEMMA_USER}{SYSTEM}\n\n", GEMMA_HISTORY, "<end_of_turn>"
    ),
    "phi3": Expected(*PHI_ALL),
    "phi3_5": Expected(*PHI_ALL),
    "mistral_nemo": Expected(
        ["<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"], "<s>", "</s>", "<s>[INST]",
        f"<s>[INST]{SYSTEM}\n\n", "<s>[INST]Hi[/INST]Hello!</s>[INST]", "[/INST]",
    ),
    # The space behind it is a part of the first token of the text.
    "mistral_7b_v0_1": Expected(
        ["<s>", "</s>", "[INST]", "[/INST]"], "<s>", "</s>", "<s>[INST]", None,
        "<s>[INST] Hi [/INST]Hello!</s> [INST]", "[/INST]",
    ),
}  # fmt: skip
NAMES = [*TEMPLATES, "mistral_7b_v0_1 in plain text"]


@cache
def load(name):
    """A byte-level tokenizer with merges, the special tokens of the model and its template."""
    file, _, is_plain = name.partition(" ")
    expected = TEMPLATES[file]
    special_tokens = [expected.bos, expected.eos] if is_plain else expected.special_tokens
    return build_tokenizer((FOLDER / f"{file}.jinja").read_text(), special_tokens, expected.bos, expected.eos)


def build_tokenizer(template, special_tokens, bos, eos):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(special_tokens)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, chat_template=template)


def build_word_tokenizer(name, prepend_scheme):
    """Like SentencePiece: a space belongs to the word behind it, and words are whole tokens."""
    expected = TEMPLATES[name]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens(expected.special_tokens)
    template = (FOLDER / f"{name}.jinja").read_text()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=expected.bos, eos_token=expected.eos, chat_template=template
    )


def derive_text(name, **options):
    return load(name).decode(derive_pre_query(load(name), **options))


@pytest.mark.parametrize("name", NAMES)
def test_the_prefix_is_the_template_up_to_the_users_text(name):
    expected = TEMPLATES[name.partition(" ")[0]]
    assert derive_text(name) == expected.alone
    assert derive_text(name, messages=HISTORY) == expected.with_history


@pytest.mark.parametrize("name", NAMES)
def test_a_system_prompt_is_where_the_template_has_it_or_refused(name):
    expected = TEMPLATES[name.partition(" ")[0]]
    if expected.with_system is None:
        with pytest.raises(
            ValueError, match=r"refuses a conversation with a system prompt.*Leave the system prompt out"
        ):
            derive_text(name, system_prompt=SYSTEM)
    else:
        assert derive_text(name, system_prompt=SYSTEM) == expected.with_system


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), min_size=1).map(str.strip).filter(bool))
def test_what_a_user_writes_is_what_stands_between_the_prefix_and_the_end_of_the_turn(name, text):
    """Of the ids that the target reads: the prefix, then what it would have to write, which is cut where it ends."""
    tokenizer = load(name)
    for messages in ([], HISTORY):
        conversation = [*messages, {"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)["input_ids"]
        prefix = derive_pre_query(tokenizer, messages=messages)
        assert ids[: len(prefix)] == prefix
        end = derive_turn_end(tokenizer)
        assert cut_user_text(ids[len(prefix) :], "length", end, tokenizer) == (text, None)


@pytest.mark.parametrize("prepend_scheme", ["always", "first", "never"])
@pytest.mark.parametrize("name", ["mistral_7b_v0_1", "mistral_nemo", "gemma3", "phi3"])
def test_words_that_begin_with_their_space_are_left_to_the_target(name, prepend_scheme):
    tokenizer = build_word_tokenizer(name, prepend_scheme)
    prefix, end = derive_pre_query(tokenizer, messages=HISTORY), derive_turn_end(tokenizer)
    for text in ("Hello, how are you doing today?", "the", "4 8 15 16 23 42", "What is the boiling point of water"):
        conversation = [*HISTORY, {"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ids[: len(prefix)] == prefix
        assert cut_user_text(ids[len(prefix) :], "length", end, tokenizer) == (text, None)
    if name == "mistral_7b_v0_1":
        assert prefix[-1] == tokenizer.convert_tokens_to_ids("[INST]")  # and no lone space


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_end_of_the_turn_is_the_templates_own_token_and_the_eos(name):
    tokenizer, expected = load(name), TEMPLATES[name]
    assert derive_turn_end(tokenizer) == TurnEnd(
        tuple(sorted({tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(expected.end)}))
    )


def test_the_end_of_the_turn_is_text_where_the_template_has_no_token_for_it():
    tokenizer = load("mistral_7b_v0_1 in plain text")
    assert derive_turn_end(tokenizer) == TurnEnd((tokenizer.eos_token_id,), "[/INST]")
    vicuna = "{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'] }}\n{% endfor %}ASSISTANT:"
    tokenizer = build_tokenizer(vicuna, ["<s>", "</s>"], "<s>", "</s>")
    assert tokenizer.decode(derive_pre_query(tokenizer)) == "USER:"
    end = derive_turn_end(tokenizer)
    assert end.text == "ASSISTANT:"
    ids = tokenizer(" How are you?\nASSISTANT: I am well.</s>")["input_ids"]
    assert cut_user_text(ids, "stop", end, tokenizer) == ("How are you?", None)
    assert cut_user_text(tokenizer(" How are")["input_ids"], "length", end, tokenizer) == ("How are", "unfinished")


@pytest.mark.parametrize("name", ["llama3_1", "qwen2_5", "qwen3", "mistral_nemo"])
def test_tools_stand_before_the_users_text(name):
    text = derive_text(name, tools=[TOOL], system_prompt=SYSTEM)
    assert '"name": "get_melting_point"' in text and '"substance"' in text and SYSTEM in text


@pytest.mark.parametrize("name", ["chatml", "phi3"])
def test_a_template_without_tools_is_refused_where_there_are_tools(name):
    with pytest.raises(ValueError, match=r"does not show tools.*get_melting_point.*`\{tools\}` into the system prompt"):
        derive_text(name, tools=[TOOL])


def test_the_date_of_a_template_can_be_fixed():
    expected = Expected(LLAMA, "<|begin_of_text|>", "<|eot_id|>", "", None, "", "")
    tokenizer = build_tokenizer((FOLDER / "llama3_2.jinja").read_text(), *expected[:3])
    text = tokenizer.decode(derive_pre_query(tokenizer, chat_template_kwargs={"date_string": "1 Jan 2020"}))
    assert "Today Date: 1 Jan 2020" in text


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        (None, {}, "no chat template"),
        ("fixed text", {}, "shows the user's text 0 times"),
        ("{% for m in messages * 2 %}<s>{{ m['content'] }}{% endfor %}", {}, "shows the user's text 2 times"),
        ("{{ messages[-1]['content'] }}</s>", {}, "nothing before the user's text"),
        ("<s>{{ messages[-1]['content'] }}", {"system_prompt": SYSTEM}, "does not show the system prompt"),
        ("<s>{{ messages[-1]['content'] }}{{ tools }}", {"tools": [TOOL]}, "does not show tools before"),
    ],
)
def test_templates_that_do_not_serve_are_refused(template, options, message):
    tokenizer = build_tokenizer(template, ["<s>", "</s>"], "<s>", "</s>")
    with pytest.raises(ValueError, match=message):
        derive_pre_query(tokenizer, **options)


def test_nothing_behind_the_text_and_no_eos_is_refused():
    tokenizer = build_tokenizer("<s>{{ messages[-1]['content'] }}", ["<s>"], "<s>", None)
    with pytest.raises(ValueError, match="nothing after the user's text"):
        derive_turn_end(tokenizer)


def test_cutting_reports_special_tokens_and_unfinished_turns():
    tokenizer = load("qwen3")
    end = derive_turn_end(tokenizer)

    def cut(text, finish_reason="length"):
        return cut_user_text(tokenizer(text)["input_ids"], finish_reason, end, tokenizer)

    assert cut(" What is it?\n<|im_end|>\n<|im_start|>assistant\nA stone.<|im_end|>") == ("What is it?", None)
    assert cut("What is") == ("What is", "unfinished")
    assert cut("What<|im_start|>is<|im_end|>")[1] == "special_tokens"
    assert cut("<|im_end|>") == ("", None)
    # An engine may stop at ids that the tokenizer does not name as its EOS.
    assert cut("What is it?!", "stop") == ("What is it?", None)
