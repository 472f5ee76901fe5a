"""Finds what a target wrote in a turn, in the text that a chat template makes of the turn."""

import re
from collections.abc import Iterable, Mapping, Sequence

from spec_kd.end_of_turn import find_first
from spec_kd.open_types import JsonObject, JsonValue, Record

REASONING_TAGS = {
    "<think>": "</think>",
    "[THINK]": "[/THINK]",
    "<seed:think>": "</seed:think>",
    "<|START_THINKING|>": "<|END_THINKING|>",
}
"""Tags with which models open and close their reasoning."""
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


class TurnNotRenderedError(ValueError):
    """The completion of a turn cannot be told from its text; the message is the reason."""


def find_rendered_completion(
    prompt: str, rest: str, reply: Record, template: str, ends: Iterable[str]
) -> tuple[str, str]:
    """The completion as text, and the end of turn after it ("" if the template writes none).

    The completion is what the template prints, if that has the whole reply in it. If the template drops the reasoning,
    or lacks text of the generation prompt, the completion is the reply itself, after the generation prompt.

    Args:
        prompt (`str`): The conversation before the turn, with the generation prompt.
        rest (`str`): Rest of the conversation with the reply, after the text that it shares with the prompt.
        reply (`Mapping`): The assistant's message. Nothing in it looks like an end of turn.
        template (`str`): The chat template, which shows how reasoning is written.
        ends (`Iterable[str]`): Ends of a turn.

    Raises:
        TurnNotRenderedError: If the reply is not in `rest`, or its reasoning is missing.
    """
    content, reasoning = get_text(reply.get("content")), get_reasoning(reply)
    found = find_first(rest, ends)
    body, end = (rest, "") if found is None else (rest[: found[0]], found[1])
    if not content.strip() and not reply.get("tool_calls"):
        raise TurnNotRenderedError("the completion is empty")
    tags = find_open_reasoning(prompt)
    names = [(call.get("function") or call).get("name") or "" for call in reply.get("tool_calls") or []]
    if (reasoning.strip() or _has_reasoning(content)) and _closes_reasoning(prompt):
        raise TurnNotRenderedError("the completion has reasoning, and the generation prompt has an empty one already")
    # the template would print a second reasoning before that of the content
    is_doubled = tags is not None and tags[1] in content and not (reasoning or names)
    is_whole = not is_doubled and all(_is_in(part, body) for part in (reasoning, content, *names))
    body = body if end else body.rstrip()  # what follows the reply comes from the template
    if is_whole and (tags is None or tags[1] in body):
        return _keep_margins(body, content) if not (names or reasoning) else body, end
    visible = get_text(remove_reasoning(reply).get("content"))
    if names or not visible.strip() or not _is_in(visible, body):
        raise TurnNotRenderedError("the chat template does not print the completion")
    text = _strip_opening(prompt, content)
    if reasoning:
        known = tags or next((pair for pair in REASONING_TAGS.items() if pair[1] in template), None)
        if known is None:
            raise TurnNotRenderedError("the chat template does not print the reasoning")
        opening = "" if tags else known[0] + "\n"
        text = opening + _join(_join(reasoning, "\n", known[1]), "\n\n", content)
    if tags and tags[1] not in text:
        raise TurnNotRenderedError(
            f"the generation prompt opens a reasoning ({tags[0]}) that the completion does not have"
        )
    return text, end


def get_text(content: JsonValue) -> str:
    """The text of a message's content, which may consist of parts."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.get("text") or "" for part in content if isinstance(part, Mapping))


def get_reasoning(message: Record) -> str:
    """The reasoning of a message, under any of its usual names."""
    return next((message[key] for key in REASONING_KEYS if isinstance(message.get(key), str)), "")


def remove_reasoning(message: Record) -> JsonObject:
    """A message without its reasoning, which stands in a key or between tags."""
    bare = {key: value for key, value in message.items() if key not in REASONING_KEYS}
    if any(close in get_text(bare.get("content")) for close in REASONING_TAGS.values()):
        text = re.split("|".join(map(re.escape, REASONING_TAGS.values())), get_text(bare["content"]))[-1]
        bare["content"] = text if isinstance(bare["content"], str) else [{"type": "text", "text": text}]
    return bare


def find_open_reasoning(prompt: str) -> tuple[str, str] | None:
    """The tags of a reasoning that a prompt opens at its end and leaves to the target to close."""
    return next((pair for pair in REASONING_TAGS.items() if prompt.rstrip().endswith(pair[0])), None)


def _closes_reasoning(prompt: str) -> bool:
    return any(re.search(rf"{re.escape(a)}\s*{re.escape(b)}\s*$", prompt) for a, b in REASONING_TAGS.items())


def _has_reasoning(content: str) -> bool:
    return any(
        match.group(1).strip()
        for opening, close in REASONING_TAGS.items()
        if (match := re.match(rf"\s*{re.escape(opening)}(.*?){re.escape(close)}", content, re.DOTALL))
    )


def adds_empty_reasoning(prompt: str, text: str, reply: Record) -> bool:
    """Whether a template added an empty reasoning to `text`; the target wrote that only if it did not reason."""
    tags = find_open_reasoning(prompt)
    text = (tags[0] if tags else "") + text
    given = get_text(reply.get("content")) + get_reasoning(reply)
    return any(
        close not in given and re.match(rf"\s*{re.escape(opening)}\s*{re.escape(close)}", text)
        for opening, close in REASONING_TAGS.items()
    )


def _is_in(part: str, text: str) -> bool:
    return "".join(part.split()) in "".join(text.split())


def _join(left: str, separator: str, right: str) -> str:
    has_space = left != left.rstrip() or right != right.lstrip()
    return left + ("" if has_space else separator) + right


def _keep_margins(body: str, content: str) -> str:
    """`body` with the white space around `content`, which many templates strip and which the target wrote."""
    if body.strip() != content.strip():
        return body
    lead = content[: len(content) - len(content.lstrip())] or body[: len(body) - len(body.lstrip())]
    return lead + body.strip() + (content[len(content.rstrip()) :] or body[len(body.rstrip()) :])


def _strip_opening(prompt: str, content: str) -> str:
    """`content` without a reasoning block or opening tag that the prompt ends with already."""
    for opening, close in REASONING_TAGS.items():
        match = re.search(rf"{re.escape(opening)}(\s*)({re.escape(close)})?\s*$", prompt)
        if match is None or not content.lstrip().startswith(opening):
            continue
        if content.startswith(match.group()):
            return content[len(match.group()) :]
        if match.group(2) is None:
            return content.lstrip()[len(opening) :].lstrip()
    return content


def hide(value: JsonValue, stand_ins: Mapping[str, str]) -> JsonValue:
    """`value` with each text that is a value of `stand_ins` replaced by its key, in all that it contains."""
    if isinstance(value, str):
        for stand_in in sorted(stand_ins, key=lambda key: len(stand_ins[key]), reverse=True):
            value = value.replace(stand_ins[stand_in], stand_in)
        return value
    if isinstance(value, Mapping):
        return {key: hide(item, stand_ins) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [hide(item, stand_ins) for item in value]
    return value
