"""Near-duplicates of a log that both ways of reading it find, against all pairs compared exactly."""

import json
import random
from functools import lru_cache

import numpy as np
import pytest

from spec_kd.prompts.deduplication import normalize_text
from spec_kd.prompts.logs.query_logs import load_query_logs
from spec_kd.prompts.logs.scale.options import ScaleOptions
from spec_kd.prompts.similarity import END, LONG, WINDOW

THRESHOLD = 0.8
SYSTEMS = ["You are a kind assistant who answers in a sentence.", "Translate the text into French, please."]


@lru_cache(maxsize=10_000)
def list_windows(text: str) -> set[str]:
    padded = text + "\0" * (WINDOW - 1)
    return {padded[start : start + WINDOW] for start in range(len(text))}


def is_alike(one: str, other: str) -> bool:
    a, b = list_windows(one), list_windows(other)
    return a == b or len(a & b) / len(a | b) >= THRESHOLD


def are_near(one: list[dict], other: list[dict]) -> bool:
    """The rule of `PromptFilter`, written down again."""
    turns, systems = (
        [[m["content"] for m in messages if m["role"] in roles] for messages in (one, other)]
        for roles in (("user",), ("system",))
    )
    if len(turns[0]) != len(turns[1]) or not is_alike(*(normalize_text("\n".join(texts)) for texts in systems)):
        return False
    texts = [normalize_text(messages) for messages in (one, other)]
    if min(map(len, texts)) < THRESHOLD * max(map(len, texts)) - 100 or not is_alike(*texts):
        return False
    if min(map(len, texts)) <= LONG:
        return True
    return is_alike(texts[0][:END], texts[1][:END]) and is_alike(texts[0][-END:], texts[1][-END:])


def make_prompts(num_prompts: int) -> list[list[dict]]:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(3, 8))) for _ in range(3000)]
    prompts: list[list[dict]] = []
    for _ in range(num_prompts):
        if prompts and rng.random() < 0.5:
            messages = [dict(message) for message in rng.choice(prompts[-60:])]
            text = messages[-1]["content"].split()
            for place in rng.sample(range(len(text)), min(len(text) - 1, rng.choice([0, 1, 1, 2, 4]))):
                text[place] = rng.choice(words)
            messages[-1]["content"] = " ".join(text) + rng.choice(["", "!"])
            if messages[0]["role"] == "system" and rng.random() < 0.3:
                messages[0]["content"] = rng.choice([*SYSTEMS, SYSTEMS[0] + " Thanks."])
        else:
            messages = [{"role": "user", "content": " ".join(rng.choices(words, k=rng.choice([8, 20, 60])))}]
            if rng.random() < 0.3:
                messages.insert(0, {"role": "system", "content": rng.choice(SYSTEMS)})
            elif rng.random() < 0.2:
                messages += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": rng.choice(words)}]
        prompts.append(messages)
    unique = {json.dumps(messages): messages for messages in prompts}
    return list(unique.values())


@pytest.mark.parametrize("scale", [None, ScaleOptions(executor="local", num_tasks=5)], ids=["one", "shared"])
def test_nearly_all_are_found_and_no_others(tmp_path, scale):
    prompts = make_prompts(600)
    kept: list[list[dict]] = []
    for messages in prompts:
        if not any(are_near(one, messages) for one in kept):
            kept.append(messages)
    (tmp_path / "log.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in prompts))
    result = load_query_logs(
        tmp_path / "log.jsonl", tmp_path / "out", scale=scale, test_fraction=0, show_progress=False
    )
    wanted = {json.dumps(messages) for messages in prompts} - {json.dumps(messages) for messages in kept}
    found = {json.dumps(messages) for messages in prompts} - {json.dumps(row) for row in result.train["prompt"]}
    assert len(wanted) > 80
    assert len(found & wanted) >= 0.95 * len(wanted)
    assert len(found & wanted) >= 0.99 * len(found)
    assert result.report.dropped == {"near_duplicate": len(found)}


@pytest.mark.parametrize("texts", [("", "  "), ("Why?", "WHY?")])
def test_texts_that_are_equal_when_normalized(tmp_path, texts):
    lines = [json.dumps({"messages": [{"role": "user", "content": text}]}) for text in (*texts, "How so?")]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    kept = [
        load_query_logs(
            tmp_path / "log.jsonl", tmp_path / str(scale), scale=scale and ScaleOptions(executor="local", num_tasks=2),
            test_fraction=0, show_progress=False,
        ).train["prompt"]
        for scale in (False, True)
    ]  # fmt: skip
    assert list(kept[0]) == list(kept[1])


def test_pairs_of_a_band():
    from spec_kd.prompts.logs.scale.near_duplicates import NUM_BEFORE, _pair_equals

    bands = np.array([3, 5, 5, *[7] * 9], dtype=np.uint64)
    pairs = {tuple(pair) for pair in _pair_equals(bands, np.arange(12, dtype=np.uint64)).tolist()}
    expected = {(1, 2)} | {(one, other) for other in range(4, 12) for one in range(3, other)}
    assert pairs == {(one, other) for one, other in expected if one == 3 or other - one <= NUM_BEFORE or one == 1}
