"""A grammar small enough to check by hand: one to three words of one to three letters in brackets."""

import re

import torch

GRAMMAR = 'root ::= "[" word ( | "," word | "," word "," word) "]"\nword ::= [a-z]{1,3}\n'
WHOLE = re.compile(r"\[[a-z]{1,3}(,[a-z]{1,3}){0,2}\]")
PREFIX = re.compile(r"|\[([a-z]{1,3},){0,2}[a-z]{0,3}|" + WHOLE.pattern)
NUM_IDS, EOS = 261, 1


def list_texts(tokenizer):
    """The text of each id."""
    return [tokenizer.decode([i]) if i >= 5 else None for i in range(NUM_IDS)]


def make_allow(tokenizer):
    """A function that says which ids may follow other ids; `None` for a text that is over or not allowed."""
    texts = list_texts(tokenizer)

    def allow(ids):
        if EOS in ids or any(texts[i] is None for i in ids):
            return None
        text = "".join(texts[i] for i in ids)
        if not PREFIX.fullmatch(text):
            return None
        allowed = [one is not None and PREFIX.fullmatch(text + one) is not None for one in texts]
        allowed[EOS] = WHOLE.fullmatch(text) is not None
        return torch.tensor(allowed)

    return allow


def write_under(model, prompt, limit, temperature, allow, seed=0):
    """What a model writes under the grammar, one token at a time."""
    random = torch.Generator().manual_seed(seed)
    text = []
    while len(text) < limit and EOS not in text:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + text])).logits[0, -1, :NUM_IDS].double()
        logits[~allow(text)] = -torch.inf
        p = (logits / (temperature or 1.0)).softmax(-1)
        text.append(int(p.argmax() if temperature == 0 else torch.multinomial(p, 1, generator=random)))
    return text
