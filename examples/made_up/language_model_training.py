"""The language-model training of the small models: batches of whole rows, one loop, a held-out loss curve.

TRL's trainers distill; this loop only makes the models that there are to distill. Rows are padded to the longest of a
batch of similar lengths, so each row is seen as it is at inference: alone, from position 0.
"""

import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

IGNORED = -100
# A held-out loss that falls by less than this share between two evaluations has stopped falling.
FLAT_SHARE = 0.02


@dataclass(frozen=True)
class EncodedRow:
    """Ids of a conversation and how many of them belong to the prompt."""

    input_ids: list[int]
    prompt_length: int


@dataclass(frozen=True)
class Budget:
    """How long and how fast to train.

    Args:
        max_steps (`int`): Optimizer steps at most.
        until_flat (`bool`):
            `True`: the learning rate is cut to a third whenever the held-out loss stops falling (by `FLAT_SHARE`, twice
            in a row), and training ends when it has stopped at the third rate too. `False`: exactly `max_steps` with a
            linear decay.
        tokens_per_step (`int`): Tokens of a batch, padding included.
        learning_rate (`float`): Peak of AdamW's learning rate.
        prompt_weight (`float`): Weight of a prompt token's loss; a completion token's is 1.
        eval_steps (`int`): Steps between two points of the held-out curve.
        bf16 (`bool`): Whether products are taken in bfloat16, which only pays where the processor has them.
    """

    max_steps: int
    until_flat: bool = False
    tokens_per_step: int = 2048
    learning_rate: float = 3e-3
    prompt_weight: float = 0.0
    eval_steps: int = 50
    bf16: bool = False


def encode_rows(tokenizer: PreTrainedTokenizerBase, rows: list[dict], max_length: int) -> tuple[list[EncodedRow], int]:
    """Rows of `prompt` and `completion` messages as ids.

    Returns:
        `tuple[list[EncodedRow], int]`: The rows of at most `max_length` ids, and the number of longer rows left out.
    """
    encoded = []
    for row in rows:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
        encoded.append(EncodedRow(ids, len(prompt)))
    kept = [row for row in encoded if len(row.input_ids) <= max_length]
    return kept, len(encoded) - len(kept)


def iterate_batches(rows: list[EncodedRow], tokens_per_batch: int, rng: random.Random) -> Iterator[list[EncodedRow]]:
    """One epoch of batches of similar length and at most `tokens_per_batch` ids, padding included, in random order."""
    order = rng.sample(rows, len(rows))
    batches: list[list[EncodedRow]] = []
    for start in range(0, len(order), 1024):
        batch: list[EncodedRow] = []
        for row in sorted(order[start : start + 1024], key=lambda row: len(row.input_ids)):
            if batch and (len(batch) + 1) * len(row.input_ids) > tokens_per_batch:
                batches.append(batch)
                batch = []
            batch.append(row)
        batches.append(batch)
    rng.shuffle(batches)
    yield from batches


def collate(batch: list[EncodedRow], prompt_weight: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`input_ids`, next-token `labels` and their `weights`, each `(B, T)`; right padding weighs nothing."""
    length = max(len(row.input_ids) for row in batch)
    input_ids = torch.zeros(len(batch), length, dtype=torch.long)
    labels = torch.full((len(batch), length), IGNORED)
    weights = torch.zeros(len(batch), length)
    for i, row in enumerate(batch):
        ids = torch.tensor(row.input_ids)
        input_ids[i, : len(ids)] = ids
        labels[i, : len(ids) - 1] = ids[1:]
        weights[i, : row.prompt_length - 1] = prompt_weight
        weights[i, row.prompt_length - 1 : len(ids) - 1] = 1.0
    return input_ids, labels, weights


def sum_loss(
    model: PreTrainedModel, batch: list[EncodedRow], prompt_weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of the cross-entropy (nats) of a batch and the sum of the weights."""
    input_ids, labels, weights = collate(batch, prompt_weight)
    # Right padding under a causal mask: no attention mask is needed for the positions that count.
    hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state  # (B, T, H)
    counted = weights > 0
    logits = model.lm_head(hidden[counted])  # (N, V)
    loss = F.cross_entropy(logits, labels[counted], reduction="none")
    return (loss * weights[counted]).sum(), weights.sum()


@torch.no_grad()
def compute_held_out_loss(model: PreTrainedModel, rows: list[EncodedRow]) -> float:
    """Mean cross-entropy of the completion tokens, in nats per token."""
    model.eval()
    total, count = 0.0, 0.0
    for batch in iterate_batches(rows, 4096, random.Random(0)):
        loss, weight = sum_loss(model, batch, prompt_weight=0.0)
        total, count = total + loss.item(), count + weight.item()
    model.train()
    return total / count


@dataclass
class Progress:
    """Where a training is, besides model, optimizer and schedule.

    Args:
        step (`int`), num_tokens (`int`), seconds (`float`): Done so far.
        epoch_state (`Any`): Of the random generator before the current epoch's batches.
        batches_taken (`int`): Of the current epoch.
        curve (`list`): Points of the held-out curve: step, loss, learning rate.
        best (`float`), cuts (`int`), patience (`int`): What `Budget.until_flat` goes by.
    """

    step: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    epoch_state: Any = None
    batches_taken: int = 0
    curve: list[list[float]] = field(default_factory=list)
    best: float = float("inf")
    cuts: int = 0
    patience: int = 0


def train_language_model(
    model: PreTrainedModel,
    rows: list[EncodedRow],
    held_out: list[EncodedRow],
    budget: Budget,
    *,
    seed: int,
    description: str,
    checkpoint: Path | None = None,
) -> dict:
    """Trains `model` in place with AdamW.

    Args:
        model (`PreTrainedModel`), rows (`list[EncodedRow]`), held_out (`list[EncodedRow]`), budget (`Budget`): What to
            train on what, and for how long.
        seed (`int`): Of the order of the rows.
        description (`str`): For the progress bar.
        checkpoint (`Path`, *optional*):
            File that the state is written to at every point of the held-out curve, and that a killed training goes on
            from, to the same weights; it is removed at the end. Its name must tell one training from another.

    Returns:
        `dict`: `curve` (a list of `[step, held-out loss, learning rate]`), `is_flat` (the loss stopped falling within
        `max_steps`), `num_steps`, `num_tokens`, `num_parameters` and `seconds`.
    """
    rng, state = random.Random(seed), Progress()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=budget.learning_rate, betas=(0.9, 0.98), fused=True)
    warmup = max(1, min(100, budget.max_steps // 20))
    name = "constant_with_warmup" if budget.until_flat else "linear"
    schedule = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=budget.max_steps)
    batches: Iterator[list[EncodedRow]] = iter(())
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=False)  # written by this function
        for part, own in parts.items():
            own.load_state_dict(saved[part])
        state = saved["progress"]
        rng.setstate(state.epoch_state)
        batches = iterate_batches(rows, budget.tokens_per_step, rng)
        for _ in range(state.batches_taken):
            next(batches)
    start = time.monotonic() - state.seconds
    model.train()
    progress = tqdm(initial=state.step, total=budget.max_steps, desc=description, mininterval=2.0)
    while state.step < budget.max_steps and state.cuts < 3:
        batch = next(batches, None)
        if batch is None:
            state.epoch_state, state.batches_taken = rng.getstate(), 0
            batches = iterate_batches(rows, budget.tokens_per_step, rng)
            batch = next(batches)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=budget.bf16):
            loss, weight = sum_loss(model, batch, budget.prompt_weight)
        (loss / weight).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.update()
        state.step += 1
        state.batches_taken += 1
        state.num_tokens += sum(len(row.input_ids) for row in batch)
        if state.step % budget.eval_steps and state.step != budget.max_steps:
            continue
        held_out_loss = compute_held_out_loss(model, held_out)
        state.curve.append([state.step, round(held_out_loss, 4), schedule.get_last_lr()[0]])
        progress.set_postfix(held_out=f"{held_out_loss:.3f}")
        state.patience = 0 if held_out_loss < (1 - FLAT_SHARE) * state.best else state.patience + 1
        state.best = min(state.best, held_out_loss)
        if budget.until_flat and state.patience == 2:
            state.cuts, state.patience = state.cuts + 1, 0
            schedule.base_lrs = [rate / 3 for rate in schedule.base_lrs]
        state.seconds = time.monotonic() - start
        if checkpoint is not None:
            partial = checkpoint.with_name(f"{checkpoint.name}.{os.getpid()}")
            torch.save({**{part: own.state_dict() for part, own in parts.items()}, "progress": state}, partial)
            os.replace(partial, checkpoint)
    progress.close()
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return {
        "curve": state.curve,
        "is_flat": state.cuts == 3,
        "num_steps": state.step,
        "num_tokens": state.num_tokens,
        "num_parameters": model.num_parameters(),
        "seconds": round(state.seconds, 1),
    }
