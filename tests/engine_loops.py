"""Loops that decode as the sources of serving engines do, one forward pass for every token."""

import functools

import torch


def pick(model, ids):
    """The most likely id after `ids`."""
    return int(_score(model, tuple(ids)).argmax())


def sample(model, ids):
    """An id drawn at temperature 1, always the same one after the same ids."""
    random = torch.Generator().manual_seed(hash(tuple(ids)) % 2**31)
    return int(torch.multinomial(_score(model, tuple(ids)).softmax(-1), 1, generator=random))


@functools.lru_cache(maxsize=20_000)
def _score(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, -1, :261]


def draft_tokens(draft, ids, count):
    drafted = []
    for _ in range(count):
        drafted.append(pick(draft, ids + drafted))
    return drafted


def serve(engine, draft, target, prompt, gamma, eos, limit, choose=pick):
    """Decoding by the loop of an engine, with greedy drafts: the text, and (drafted, accepted) of each round."""
    text, rounds = [], []
    if engine != "mlx-lm":
        text.append(choose(target, prompt))  # the prompt's pass
    while len(text) < limit and (not text or text[-1] != eos):
        left = limit - len(text)
        count = {"llama.cpp": min(gamma, left - 1), "mlx-lm": min(gamma, left)}.get(engine, gamma)
        drafted = draft_tokens(draft, prompt + text, count)
        chosen = [choose(target, prompt + text + drafted[:k]) for k in range(count + 1)]
        accepted = 0
        while accepted < count and drafted[accepted] == chosen[accepted]:
            if engine == "llama.cpp" and chosen[accepted] == eos and accepted + 1 < count:
                break
            accepted += 1
            if engine in ("mlx-lm", "sglang") and (chosen[accepted - 1] == eos or accepted == left):
                break  # the request is over
        if count:
            rounds.append((count, accepted))
        new = chosen[: accepted + 1]
        if eos in new:
            new = new[: new.index(eos) + 1]
        text = (text + new)[:limit]
    return text, rounds
