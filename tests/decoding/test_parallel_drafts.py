"""Parallel drafts: one pass a round, against a loop that reads text and masks again from the start in every round."""

import copy

import pytest
import torch

from spec_kd.decoding import Round, generate_speculatively
from spec_kd.decoding.ragged_model import find_layout
from spec_kd.parallel import ParallelDrafting, write_parallel_drafting

MASK, NUM_IDS = 6, 7  # few ids, so that untrained masks are accepted by chance


@pytest.fixture
def small_prompts():
    generator = torch.Generator().manual_seed(1)
    lengths = [1, 2, 11, *torch.randint(1, 12, (9,), generator=generator).tolist()]
    return [torch.randint(2, NUM_IDS, (length,), generator=generator).tolist() for length in lengths]


def make_pair(tools, architecture):
    target = tools.build_model(architecture)
    target.resize_token_embeddings(NUM_IDS)
    draft = tools.add_noise(target, 0.05)
    write_parallel_drafting(draft.config, ParallelDrafting(MASK, 4))
    return target, draft


def serve(tools, target, draft, prompt, gamma, limit, eos=1):
    """Completion and rounds of one prompt, without a cache."""
    ids, rounds, rejected = list(prompt), [], []
    while (left := limit - (len(ids) - len(prompt))) and ids[len(prompt) :][-1:] != [eos]:
        masked = [*ids, *[MASK] * (gamma - 1)]
        drafted = tools.compute_logits(draft, masked)[len(ids) - 1 :].argmax(-1).tolist()[: left - 1]
        drafted = drafted[: drafted.index(eos) + 1] if eos in drafted else drafted
        choices = tools.compute_logits(target, ids + drafted)[len(ids) - 1 :].argmax(-1).tolist()
        accepted = 0
        while accepted < len(drafted) and drafted[accepted] == choices[accepted]:
            accepted += 1
        if accepted < len(drafted):
            rejected.append(len(ids) - len(prompt) + accepted)
        emitted = choices[:accepted] if eos in choices[:accepted] else choices[: accepted + 1]
        ids += emitted
        rounds.append((len(ids), len(drafted), accepted, len(emitted)))
    # tokens drafted for positions after the end do not count
    counted = [Round(min(n, len(ids) - end + emitted), accepted, emitted) for end, n, accepted, emitted in rounds]
    return ids[len(prompt) :], counted, rejected


@pytest.mark.parametrize("gamma", [1, 2, 5])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_rounds_are_those_of_text_and_masks_read_from_the_start(tools, architecture, small_prompts, gamma, batch_size):
    target, draft = make_pair(tools, architecture)
    for eos in (1, 3):
        text = generate_speculatively(
            target, draft, small_prompts, num_assistant_tokens=gamma, max_new_tokens=20, batch_size=batch_size,
            eos_token_id=eos,
        )  # fmt: skip
        served = [serve(tools, target, draft, prompt, gamma, 20, eos) for prompt in small_prompts]
        assert text.completion_ids == [one[0] for one in served]
        assert text.rounds == [one[1] for one in served]
        assert text.rejected_positions == [one[2] for one in served]
        if gamma > 1 and eos == 1:
            accepted = {record.accepted for one in text.rounds for record in one}
            assert 0 in accepted and max(accepted) > 1


def test_the_draft_is_called_once_a_round(tools, small_prompts):
    target, draft = make_pair(tools, "llama")
    find_layout(draft)
    widths = []
    draft.register_forward_pre_hook(lambda _, args, kwargs: widths.append(kwargs["input_ids"]), with_kwargs=True)
    text = generate_speculatively(target, draft, small_prompts[2:3], num_assistant_tokens=3, max_new_tokens=16)
    rounds = text.rounds[0]
    assert [ids.shape[1] for ids in widths[1:-1]] == [4 + 2] * (len(rounds) - 2)
    assert all((ids[:, -2:] == MASK).all() for ids in widths[1:-1])
    assert widths[-1].shape[1] <= 4 + 2


def test_a_draft_that_does_not_say_so_drafts_token_by_token(tools, small_prompts):
    target, draft = make_pair(tools, "llama")
    plain = copy.deepcopy(draft)
    del plain.config.pard_token, plain.config.num_parallel_tokens
    options = {"num_assistant_tokens": 3, "max_new_tokens": 16}
    parallel, stepwise = (generate_speculatively(target, one, small_prompts, **options) for one in (draft, plain))
    assert parallel.completion_ids == stepwise.completion_ids
    assert parallel.rounds != stepwise.rounds
