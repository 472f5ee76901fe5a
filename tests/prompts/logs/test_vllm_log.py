"""Lines in the words of vllm/entrypoints/logger.py, read back to the messages they were rendered from."""

import pytest

from spec_kd.prompts.logs.query_logs import load_query_logs
from spec_kd.prompts.logs.vllm import VLLMLogReader

OLD = (
    "INFO 09-10 19:10:43 [logger.py:41] Received request chatcmpl-{n}: prompt: {text!r}, params: SamplingParams(n=1), "
)
NEW = "DEBUG 11-02 08:00:00 [logger.py:60] Request chatcmpl-{n} details: prompt: {text!r}, prompt_token_ids: None, "
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nDefault.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set s = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}<s>[INST] {{ (s if loop.first else '') + m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
CONVERSATIONS = [
    [{"role": "user", "content": 'It\'s "quoted"\nand\ttabbed: 东京'}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two?"},
    ],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
]


@pytest.fixture(params=[None, CHATML, LLAMA2], ids=["test", "chatml", "llama2"])
def chat_tokenizer(request, tokenizer):
    before = tokenizer.chat_template
    tokenizer.chat_template = request.param or before
    yield tokenizer
    tokenizer.chat_template = before


def render(tokenizer, messages) -> str:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


@pytest.mark.parametrize("line", [OLD, NEW])
def test_messages_come_back(chat_tokenizer, line):
    read = VLLMLogReader(chat_tokenizer)
    for messages in CONVERSATIONS:
        text = render(chat_tokenizer, messages)
        found = read(line.format(n=1, text=text))["messages"]
        assert render(chat_tokenizer, found) == text
        # a default system prompt is no different from the same one given
        assert [m for m in found if m != {"role": "system", "content": "Default."}] == messages


def test_other_lines_and_other_templates(tokenizer):
    read = VLLMLogReader(tokenizer)
    assert read("INFO 09-10 19:10:43 [loggers.py:1] Engine 000: Avg prompt throughput: 1.0 tokens/s") is None
    assert read({"messages": []}) == {"messages": []}
    with pytest.raises(ValueError, match="not rendered with the chat template"):
        read(OLD.format(n=1, text="[INST] Hello [/INST]"))
    with pytest.raises(ValueError, match="processing_class"):
        VLLMLogReader()(OLD.format(n=1, text="x"))


def test_a_server_log_as_a_file(tmp_path, tokenizer):
    lines = [OLD.format(n=n, text=render(tokenizer, messages)) for n, messages in enumerate(CONVERSATIONS)]
    (tmp_path / "server.log").write_text("INFO: started\n" + "\n".join(lines) + "\nWARNING: bye\n", encoding="utf-8")
    result = load_query_logs(
        tmp_path / "server.log", tmp_path / "out", format="vllm", processing_class=tokenizer, test_fraction=0,
        show_progress=False,
    )  # fmt: skip
    assert result.train["prompt"][:] == CONVERSATIONS
    assert (result.report.left_out, result.report.malformed) == (2, 0)
