"""Gives a donor with another tokenizer the target's vocabulary."""

import json
from typing import cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

ROLES = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


def read_token_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes]:
    """The bytes that each token stands for; of a special token, those of its name."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.dumps(json.loads(backend.to_str())["decoder"]) if backend is not None else ""
    numbers = {character: byte for byte, character in bytes_to_unicode().items()}
    special = set(tokenizer.all_special_tokens) | {str(token) for token in tokenizer.added_tokens_decoder.values()}
    found = {}
    for token, number in tokenizer.get_vocab().items():
        if token in special:
            found[number] = token.encode()
        elif '"ByteLevel"' in decoder:
            found[number] = bytes(numbers[one] for one in token) if numbers.keys() >= set(token) else token.encode()
        elif len(token) == 6 and token.startswith("<0x"):
            found[number] = bytes([int(token[3:5], 16)])
        else:
            found[number] = token.replace("\u2581", " ").encode()
    return found


def match_tokens(donor: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase) -> dict[int, list[int]]:
    """Ids of the donor that stand for each id of the target: one with the same bytes, else those of its pieces.

    transplant-vocab (https://github.com/jukofyork/transplant-vocab) does the same. Special tokens of one role belong
    together, whatever they are called. A token whose bytes are no text is made of the donor's tokens for single bytes,
    and is missing where there are none.
    """
    own = {text: number for number, text in sorted(read_token_bytes(donor).items(), reverse=True)}
    matched = {}
    for number, text in read_token_bytes(target).items():
        if text in own:
            matched[number] = [own[text]]
        else:
            try:
                pieces = donor(text.decode(), add_special_tokens=False)["input_ids"]
            except UnicodeDecodeError:
                pieces = [own[bytes([byte])] for byte in text if bytes([byte]) in own]
            matched[number] = [piece for piece in pieces if piece != donor.unk_token_id]
    for role in ROLES:
        if getattr(target, role) is not None and getattr(donor, role) is not None:
            matched[getattr(target, role)] = [getattr(donor, role)]
    return {number: pieces for number, pieces in matched.items() if pieces}


@torch.no_grad()
def transplant_vocabulary(
    model: PreTrainedModel, donor: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase
) -> float:
    """Gives a model an embedding and a head for the target's ids, in place: means of the rows that stand for each id.

    Ids that nothing stands for get the mean of all rows.

    Args:
        model (`PreTrainedModel`): The donor.
        donor (`PreTrainedTokenizerBase`): Its tokenizer.
        target (`PreTrainedTokenizerBase`): The target's tokenizer.

    Returns:
        `float`: Share of the target's ids that one token of the donor stands for.
    """
    matched = match_tokens(donor, target)
    num_ids = max(target.get_vocab().values()) + 1
    matrices = {}
    for name, module in (("embedding", model.get_input_embeddings()), ("head", model.get_output_embeddings())):
        weight = cast(torch.Tensor, module.weight).detach()
        rows = weight.float().mean(0, keepdim=True).repeat(num_ids, 1)
        for number, pieces in matched.items():
            rows[number] = weight[pieces].float().mean(0)
        matrices[name] = rows
    model.resize_token_embeddings(num_ids, mean_resizing=False)
    for name, module in (("embedding", model.get_input_embeddings()), ("head", model.get_output_embeddings())):
        cast(torch.Tensor, module.weight).copy_(matrices[name])  # the same rows where they are tied
    return sum(len(pieces) == 1 for pieces in matched.values()) / num_ids
