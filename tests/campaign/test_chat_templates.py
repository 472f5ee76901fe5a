"""With every chat template that TRL ships, rows are what a server reads and the target writes, or are refused."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import trl
from campaign_table import Table
from chat_templates import FORMS
from datasets import Dataset, Features, Json, List
from jinja2 import TemplateError
from tiny import build_tokenizer

from spec_kd.data.chat_rendering import ChatRenderer
from spec_kd.data.rendered_completion import TurnNotRenderedError, find_open_reasoning
from spec_kd.data.training_rows import to_training_rows

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
IM_END, TURN, EOT = "<|im_end|>", "<turn|>", "<|eot_id|>"


@dataclass(frozen=True)
class Row:
    """A template of TRL (or a form of `chat_templates.py`).

    Attributes:
        end (`str`): What its model writes behind a reply, of which the last token ends the turn.
        has_parts (`bool`): Whether it reads content in parts alone.
        others (`tuple[str, ...]`): Other tokens at which its model stops.
    """

    end: str
    has_parts: bool = False
    others: tuple[str, ...] = ()


ROWS = {
    "cohere": Row("<|END_OF_TURN_TOKEN|>"),
    "cohere2": Row("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    "deepseek_r1_distill": Row("<｜end▁of▁sentence｜>"),
    "deepseekv3": Row("<｜end▁of▁sentence｜>"),
    "diffusion_gemma": Row(TURN),
    "gemma": Row("<end_of_turn>"),
    "gemma3": Row("<end_of_turn>"),
    "gemma4": Row(TURN),
    "gemma4_v2": Row(TURN),
    "gemma4_v3": Row(TURN),
    "gemma4_v4": Row(TURN),
    "gemma4_v5": Row(TURN),
    "glm4moe": Row("<|user|>", others=("<|observation|>",)),
    "gptoss": Row("<|return|>"),
    "idefics3": Row("<end_of_utterance>", has_parts=True),
    "lfm2": Row(IM_END),
    "lfm2_2_5": Row(IM_END),
    "lfm2_2_5_v2": Row(IM_END),
    "lfm2_2_5_vl": Row(IM_END),
    "lfm2_v2": Row(IM_END),
    "llama3": Row(EOT),
    "llama3_1": Row(EOT),
    "llama3_2": Row(EOT),
    "llava_next": Row("</s>", has_parts=True),
    "muse_glimmer": Row("<|eot|>"),
    "nemotron_3_5_lightning": Row(IM_END),
    "nemotron_3_nano": Row(IM_END),
    "nemotron_3_super": Row(IM_END),
    "nemotron_3_ultra": Row(IM_END),
    "phi3": Row("<|end|>"),
    "phi3_5": Row("<|end|>"),
    "qwen2_5": Row(IM_END),
    "qwen2_5_vl": Row(IM_END),
    "qwen3": Row(IM_END),
    "qwen3_5_nothink": Row(IM_END),
    "qwen3_5_think": Row(IM_END),
    "qwen3_6": Row(IM_END),
    "qwen3_8": Row(IM_END),
    "qwen3_instruct_2507": Row(IM_END),
    "qwen3_vl": Row(IM_END),
    "smolvlm": Row("<end_of_utterance>", has_parts=True),
    **{name: Row(form.end) for name, form in FORMS.items()},
}
TABLE = Table("chat_templates", ROWS, columns=("reply", "reasoning", "think", "call", "messages"))

REASONING, REPLY = "Hm, so.", "Fine: ü 漢字."
CALL = {"type": "function", "function": {"name": "add", "arguments": {"first": 1, "second": "two"}}}
ANSWERS = {
    "reply": {"content": REPLY},
    "reasoning": {"content": REPLY, "reasoning_content": REASONING},
    "think": {"content": f"<think>\n{REASONING}\n</think>\n\n{REPLY}"},
    "call": {"content": "", "tool_calls": [CALL]},
}
TOKEN = r"<[|｜][^<>{}' ]+[|｜]>|<\|[a-z_]+>|<[a-z_]+\|>|<(?:start|end)_of_[a-z]+>|<bos>|</?s>|\[/?INST\]"


def build(name):
    row = ROWS[name]
    if name in FORMS:
        return FORMS[name].build()
    template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = build_tokenizer()
    special = sorted({*re.findall(TOKEN, template), "<bos>", *re.findall(TOKEN, row.end)})
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    tokenizer.bos_token, tokenizer.chat_template = "<bos>", template
    tokenizer.eos_token = "<|endoftext|>" if name.startswith("phi") else re.findall(TOKEN, row.end)[-1]
    return tokenizer


def find_ends(tokenizer, row):
    return [tokenizer(end, add_special_tokens=False)["input_ids"][-1] for end in (row.end, *row.others)]


def say(name, role, **keys):
    if ROWS[name].has_parts and "content" in keys:
        keys["content"] = [{"type": "text", "text": keys["content"]}]
    return {"role": role, **keys}


def render(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, tokenize=False)


def show_refusal(error, tokenizer, history, answer, outcome):
    """The reason of a refusal is true."""
    prompt = tokenizer.apply_chat_template(history, add_generation_prompt=True, tokenize=False)
    reason = str(error)
    if "opens a reasoning" in reason:
        assert find_open_reasoning(prompt) and "</think>" not in str(answer)
    elif "empty one already" in reason:
        assert re.search(r"<think>\s*</think>\s*$", prompt) and REASONING in str(answer)
    elif "does not print the reasoning" in reason:
        bare = {key: value for key, value in answer.items() if key != "reasoning_content"}
        assert render(tokenizer, [*history, answer]) == render(tokenizer, [*history, bare])
    else:
        assert "does not print" in reason and "tool_calls" in answer
        assert "two" not in render(tokenizer, [*history, answer])
    outcome.refused(reason)


def check_turn(cell, outcome):
    row, tokenizer = TABLE[cell], build(cell.row)
    history = [say(cell.row, "user", content="Hi"), say(cell.row, "assistant", content="Hello.")]
    history.append(say(cell.row, "user", content="How are you?"))
    answer = say(cell.row, "assistant", **ANSWERS[cell.column])
    renderer = ChatRenderer(tokenizer, find_ends(tokenizer, row))
    try:
        turn = renderer.render_turn(history, answer)
    except TurnNotRenderedError as error:
        show_refusal(error, tokenizer, history, answer, outcome)
        return
    except (TemplateError, TypeError) as error:
        with pytest.raises(type(error)):
            render(tokenizer, [*history, answer])
        outcome.refused(f"The template itself fails: {error}")
        return
    read = tokenizer.apply_chat_template(history, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert turn.prompt_ids == read
    text = tokenizer.decode(turn.completion_ids)
    outcome.note(text)
    if cell.column == "call":
        assert all(part in text for part in ("add", "first", "two"))
    else:
        assert text.endswith(REPLY + row.end)
        assert (REASONING in text) == (cell.column != "reply")
        assert not set(turn.completion_ids[:-1]) & set(renderer.end_ids)


def check_messages(cell, outcome):
    row, tokenizer = TABLE[cell], build(cell.row)
    prompt = tokenizer.apply_chat_template(
        [say(cell.row, "user", content="Hi")], add_generation_prompt=True, tokenize=False
    )
    start = f"<think>\n{REASONING}\n</think>\n\n" if find_open_reasoning(prompt) else ""
    turns = []
    for text in ("one", "two"):
        turns.append(say(cell.row, "user", content=f"Say {text}."))
        turns.append(say(cell.row, "assistant", content=f"{start}I say {text}"))
    dataset = Dataset.from_list([{"messages": turns}], features=Features({"messages": List(Json())}))
    written = []
    for made in to_training_rows(dataset, tokenizer, eos_token_id=find_ends(tokenizer, row)):
        labels = made["labels"]
        for i, label in enumerate(labels):
            if label == -100:
                continue
            if labels[i - 1] == -100:
                history = turns[: 2 * len(written) + 1]
                read = tokenizer.apply_chat_template(history, add_generation_prompt=True, return_dict=True)
                assert made["input_ids"][:i] == read["input_ids"]
                written.append([])
            written[-1].append(label)
        assert labels[-1] != -100
    texts = [tokenizer.decode(ids) for ids in written]
    assert all(text.endswith(f"I say {word}{row.end}") for text, word in zip(texts, ("one", "two"), strict=True))
    outcome.note(" | ".join(texts))


def test_turns_of_the_target(cell, outcome):
    (check_messages if cell.column == "messages" else check_turn)(cell, outcome)


def test_no_template_of_trl_is_missing():
    names = {path.stem for path in TEMPLATES.glob("*.jinja") if not path.stem.endswith("_training")}
    assert names <= set(ROWS)
