"""The comparison of replay with recordings, on recordings of the engines' loops with a tiny pair."""

import json
import random

import pytest
import torch
from engine_loops import sample, serve
from tiny import build_llama

from benchmarks.serving import compare

LIMIT = 14


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    target, draft = build_llama(3, layers=4), build_llama(3, layers=4)
    with torch.no_grad():
        for p in draft.parameters():
            p.add_(0.035 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return compare.Pair(draft.eval(), target.eval(), tmp_path_factory.mktemp("scores"))


def make_record(number, text, rounds, eos=-1):
    drafted, accepted = map(list, zip(*rounds, strict=True)) if rounds else ([], [])
    return {
        "prompt": {"sha256": str(number)},
        "completion_ids": text,
        "ended_by_eos": text[-1] == eos,
        "drafted": sum(drafted),
        "accepted": sum(accepted),
        "drafted_per_round": drafted,
        "accepted_per_round": accepted,
        "request": {"n_predict": LIMIT},
    }


@pytest.fixture
def ids():
    generator = random.Random(0)
    return {str(number): generator.sample(range(5, 261), 3 + number) for number in range(6)}


def record(engine, pair, ids, gamma):
    eos = serve(engine, pair.draft, pair.target, ids["0"], gamma, -1, LIMIT)[0][6]
    served = [serve(engine, pair.draft, pair.target, prompt, gamma, eos, LIMIT) for prompt in ids.values()]
    return [make_record(number, text, rounds, eos) for number, (text, rounds) in enumerate(served)]


@pytest.mark.parametrize("engine", ["llama.cpp", "vllm"])
def test_what_an_engine_counts_is_equal_and_another_count_is_located(engine, pair, ids):
    records = record(engine, pair, ids, 4)
    result = compare.compare_setting(engine, "greedy-4", records, ids, pair)
    assert (result["equal"], result["different"]) == (6, [])
    assert result["accepted"]["observed"] == result["accepted"]["predicted"] > 0

    row = next(i for i, one in enumerate(records) if one["accepted_per_round"][0] > 0)
    records[row]["accepted_per_round"][0] -= 1  # the last accepted token of the first round
    records[row]["accepted"] -= 1
    result = compare.compare_setting(engine, "greedy-4", records, ids, pair)
    (one,) = result["different"]
    at = 1 + records[row]["accepted_per_round"][0]
    assert result["equal"] == 5 and one["first_difference"] == at
    for role, gap in one["logit_gaps"].items():
        text = torch.tensor([ids[str(row)] + records[row]["completion_ids"][:at]])
        top = getattr(pair, role)(text).logits[0, -1].topk(2).values.tolist()
        assert gap == pytest.approx(top[0] - top[1], abs=1e-5) and gap > 0


def test_the_gap_after_the_end_is_that_of_what_the_target_goes_on_with(pair, ids):
    row = {"prompt_ids": ids["0"], "completion_ids": [5, 6]}
    more = pair.go_on([row], 2)[0]
    gaps = pair.measure_gaps(row, 4)
    text = torch.tensor([[*ids["0"], 5, 6, *more]])
    top = pair.draft(text).logits[0, -1].topk(2).values.tolist()
    assert gaps["draft"] == pytest.approx(top[0] - top[1], abs=1e-5)


def run_by_chance(chances, length, gamma, generator):
    at, rounds = 1, []
    while at < length:
        k = 0
        while k < gamma and at + k < length and generator.random() < chances[at + k]:
            k += 1
        rounds.append((gamma, k))
        at += k + 1
    return rounds


def test_sampled_drafts_are_judged_by_the_spread_of_their_rounds(pair, ids):
    texts = [serve("vllm", pair.draft, pair.target, one, 3, -1, LIMIT, sample)[0] for one in ids.values()]
    rows = [{"prompt_ids": one, "completion_ids": text} for one, text in zip(ids.values(), texts, strict=True)]
    options = compare.ReplayOptions(
        temperature=1.0, max_new_tokens=LIMIT, serving_engine="vllm", draft_sampling="stochastic"
    )
    chances = pair.score(rows, options)
    generator, values = random.Random(0), []
    for _ in range(40):
        records = [
            make_record(i, text, run_by_chance(chances.acceptance[i].tolist(), LIMIT, 3, generator))
            for i, text in enumerate(texts)
        ]
        values.append(compare.compare_setting("vllm", "probabilistic-3", records, ids, pair)["z"])
    spread = torch.tensor(values)
    assert abs(spread.mean()) < 0.5 and 0.7 < spread.std() < 1.3
    for one in records:
        one["accepted_per_round"] = [0] * len(one["accepted_per_round"])
    assert compare.compare_setting("vllm", "probabilistic-3", records, ids, pair)["z"] < -2


def test_tokens_after_the_end_of_a_text_are_not_part_of_it():
    record = make_record(0, [1, 2, 3, 4, 5], [(4, 1), (4, 4)])
    assert compare.count_in_text(record) == 1 + 2


def test_the_table_of_the_readme_is_that_of_the_committed_comparison():
    results = json.loads(compare.OUTPUT.read_text())
    assert compare.TABLE.search(compare.README.read_text())[0] == compare.tabulate(results)
    for one in results:
        if "z" in one:
            assert abs(one["z"]) < 3
        else:
            assert one["equal"] >= 0.95 * one["prompts"]
            for other in one["different"]:
                assert one["setting"].startswith("ngram") or min(other["logit_gaps"].values()) < 1e-3
