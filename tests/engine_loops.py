"""Loops that decode as the sources of serving engines do, one forward pass for every token."""

import functools

import torch


def pick(model, ids, is_allowed=None):
    """The most likely id after `ids`, of those that are allowed."""
    return int(_mask(_score(model, tuple(ids)), is_allowed).argmax())


def sample(model, ids, is_allowed=None):
    """An id drawn at temperature 1, always the same one after the same ids."""
    random = torch.Generator().manual_seed(hash(tuple(ids)) % 2**31)
    return int(torch.multinomial(_mask(_score(model, tuple(ids)), is_allowed).softmax(-1), 1, generator=random))


@functools.lru_cache(maxsize=20_000)
def _score(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, -1, :261]


def _mask(scores, is_allowed):
    return scores if is_allowed is None else scores.masked_fill(~is_allowed, -torch.inf)


def draft_tokens(draft, ids, count):
    drafted = []
    for _ in range(count):
        drafted.append(pick(draft, ids + drafted))
    return drafted


def draft_in_parallel(mask, draft, ids, count):
    """The most likely ids of one pass over the text and masks."""
    with torch.no_grad():
        logits = draft(input_ids=torch.tensor([[*ids, *[mask] * (count - 1)]])).logits[0, len(ids) - 1 :, :261]
    return logits.argmax(-1).tolist()


def serve(engine, draft, target, prompt, gamma, eos, limit, choose=pick, allow=None, propose=draft_tokens):
    """Decoding by the loop of an engine, with greedy drafts: the text, and (drafted, accepted) of each round.

    `allow` tells which ids may follow a text, as a mask of the ids or `None` for a text that is over or not allowed.
    """

    def write(tokens):
        is_allowed = allow(tokens) if allow else None
        return choose(target, prompt + tokens, is_allowed)

    text, rounds = [], []
    if engine != "mlx-lm":
        text.append(write([]))  # the prompt's pass
    while len(text) < limit and (not text or text[-1] != eos):
        left = limit - len(text)
        count = {"mlx-lm": min(gamma, left), "vllm": gamma, "sglang": gamma}.get(engine, min(gamma, left - 1))
        drafted = propose(draft, prompt + text, count)
        if engine == "openvino" and eos in drafted:
            drafted = drafted[: drafted.index(eos) + 1]
            count = len(drafted)
        if engine == "vllm" and allow:  # the scheduler cuts what the grammar refuses
            allowed = [allow(text + drafted[:k]) for k in range(count)]
            refused = [k for k in range(count) if allowed[k] is None or not allowed[k][drafted[k]]]
            drafted = drafted[: refused[0] if refused else count]
            count = len(drafted)
        chosen = [write(text + drafted[:k]) for k in range(count + 1)]
        accepted = 0
        while accepted < count and drafted[accepted] == chosen[accepted]:
            if engine == "llama.cpp" and chosen[accepted] == eos and accepted + 1 < count:
                break
            accepted += 1
            if engine in ("mlx-lm", "sglang") and (chosen[accepted - 1] == eos or accepted == left):
                break  # the request is over
        new = chosen[: accepted + 1]
        if eos in new:
            new = new[: new.index(eos) + 1]
        text = (text + new)[:limit]
        is_counted = engine != "openvino" or (len(text) < limit and text[-1] != eos)
        if is_counted and (count or (engine == "vllm" and allow)):  # which counts a step whose draft is refused whole
            rounds.append((count, accepted))
    return text, rounds
