"""Chat templates in the forms of public model families, each as short as the form allows."""

from dataclasses import dataclass

from tiny import build_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_2_5 = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n"
    "{% elif messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\n' + m.content if m.content else '' }}"
    "{% for c in m.tool_calls or [] %}{% set c = c.function or c %}"
    '{{ "\n" }}<tool_call>\n{"name": "{{ c.name }}", "arguments": {{ c.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
    "{% for m in messages %}{% set content = m.content %}{% set reasoning = m.reasoning_content or '' %}"
    "{% if m.role == 'assistant' and '</think>' in content %}"
    "{% set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or reasoning) %}"
    "<think>\n{{ reasoning.strip('\n') }}\n</think>\n\n{{ content.lstrip('\n') }}{% else %}{{ content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ '\n' if content or not loop.first else '' }}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
GEMMA = (
    "<bos>{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GEMMA_EMPTY_THOUGHT = (
    "<bos>{% for m in messages %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<turn|>\n{% endfor %}{% if add_generation_prompt %}<|turn>model\n<|channel>thought\n<channel|>{% endif %}"
)
LLAMA_3 = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %} {{ m.content | trim }}</s>{% endif %}{% endfor %}"
)
PHI_3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}"
)
DEEPSEEK_R1 = (
    "<|bos|>{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% elif m.role == 'assistant' %}"
    "{% set content = m.content %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}"
    "{% endif %}<|Assistant|>{{ content }}<|eos|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
GPT_OSS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.tool_calls %}"
    "{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant to=functions.{{ m.tool_calls[0].function.name }}<|channel|>commentary json<|message|>"
    "{{ m.tool_calls[0].function.arguments | tojson }}<|call|>"
    "{% elif loop.last and not add_generation_prompt %}"
    "{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
COMMAND_R = (
    "{% for m in messages %}<|START|>{{ m.role }}<|RESPONSE|>{{ m.content }}<|END_RESPONSE|><|END_TURN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START|>assistant<|RESPONSE|>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Form:
    """A template, and how a target of its family writes.

    Attributes:
        template (`str`): The chat template.
        tokens (`tuple[str, ...]`): Its special tokens.
        eos (`str`): The tokenizer's EOS.
        end (`str`): What ends a turn.
        opening (`str`): What the target writes before its reply, after no reasoning.
        think (`str`): What it writes before its reply, after the reasoning `"Hm."`; empty if it does not reason.
        drops_reasoning (`bool`): Whether history lacks what the last turn has.
    """

    template: str
    tokens: tuple[str, ...]
    eos: str
    end: str
    opening: str = ""
    think: str = ""
    drops_reasoning: bool = False

    def build(self):
        tokenizer = build_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": list(self.tokens)})
        tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
        tokenizer.eos_token = self.eos
        tokenizer.chat_template = self.template
        return tokenizer


IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>")
FORMS = {
    "chatml": Form(CHATML, IM, "<|im_end|>", "<|im_end|>"),
    "qwen2.5": Form(QWEN_2_5, IM, "<|im_end|>", "<|im_end|>"),
    "qwen3": Form(
        QWEN_3, IM, "<|im_end|>", "<|im_end|>", "<think>\n\n</think>\n\n", "<think>\nHm.\n</think>\n\n", True
    ),
    "gemma": Form(GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<eos>", "<end_of_turn>"),
    "gemma4": Form(
        GEMMA_EMPTY_THOUGHT, ("<bos>", "<eos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>"), "<eos>", "<turn|>",
        drops_reasoning=True,
    ),
    "llama3": Form(
        LLAMA_3, ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>",
        "<|eot_id|>",
    ),
    "mistral": Form(MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), "</s>", "</s>", " "),
    "phi3": Form(PHI_3, ("<|end|>", "<|user|>", "<|assistant|>", "<|endoftext|>"), "<|endoftext|>", "<|end|>"),
    "deepseek-r1": Form(
        DEEPSEEK_R1, ("<|bos|>", "<|eos|>", "<|User|>", "<|Assistant|>"), "<|eos|>", "<|eos|>",
        think="Hm.\n</think>\n\n", drops_reasoning=True,
    ),
    "gpt-oss": Form(
        GPT_OSS, HARMONY, "<|return|>", "<|return|>", "<|channel|>final<|message|>",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>", True,
    ),
    "command-r": Form(
        COMMAND_R, ("<|START|>", "<|RESPONSE|>", "<|END_RESPONSE|>", "<|END_TURN|>"), "<|END_TURN|>",
        "<|END_RESPONSE|><|END_TURN|>",
    ),
    "marked": Form(MARKED, IM, "<|im_end|>", "<|im_end|>"),
}  # fmt: skip
