"""Thresholds of confidence: replay against a loop of llama.cpp's rule, and against transformers' `generate`."""

import pytest
import torch
from transformers import set_seed
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from spec_kd.acceptance import EarlyEnds, expect_rounds
from spec_kd.evaluation import ObservationOptions
from spec_kd.evaluation.recommendations import list_thresholds
from spec_kd.evaluation.response_replay import replay, score_responses
from spec_kd.serving import find_serving_engine

LIMIT, GAMMA = 14, 4


@pytest.fixture
def sharp_pair(tools, target):
    """Models that are sure of some tokens only; their heads are scaled, so that the argmax stays."""
    draft = tools.add_noise(target, 0.025)
    for model in (draft, target):
        with torch.no_grad():
            model.get_output_embeddings().weight *= 5
    return draft, target


def compute_logits(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, -1, :261].double()


def serve_like_llama_cpp(draft, target, prompt, p_min):
    """Text, and (drafted, accepted) of each round with `--spec-draft-p-min`, by `common/speculative.cpp`."""
    text, rounds = [int(compute_logits(target, prompt).argmax())], []
    while len(text) < LIMIT:
        ids, drafted = prompt + text, []
        while len(drafted) < min(GAMMA, LIMIT - len(text) - 1):
            top = compute_logits(draft, ids + drafted).topk(10)
            if top.values.softmax(-1)[0] < p_min:
                break
            drafted.append(int(top.indices[0]))
        accepted = 0
        chosen = [int(compute_logits(target, ids + drafted[:k]).argmax()) for k in range(len(drafted) + 1)]
        while accepted < len(drafted) and drafted[accepted] == chosen[accepted]:
            accepted += 1
        rounds.append((len(drafted), accepted))
        text = (text + chosen[: accepted + 1])[:LIMIT]
    return text, rounds


def replay_with_threshold(draft, target, rows, engine, threshold, temperature=0.0):
    options = {"temperature": temperature, "serving_engine": engine, "vocab_size": 261}
    scores = score_responses(draft, target, rows, max_new_tokens=LIMIT, **options)
    early_end = find_early_end(engine)
    ends = EarlyEnds(scores.values["confidence"] >= threshold, early_end.keeps_token, temperature == 0)
    rounds = expect_rounds(scores.acceptance, GAMMA, LIMIT, scores.lengths, scores.counting, early_ends=ends)
    (way,) = list_thresholds(scores, GAMMA, early_end, LIMIT, [threshold])
    assert way.calls.tolist() == rounds.target_calls.tolist() and way.threshold == threshold
    metrics = replay(
        draft, target, rows, max_new_tokens=LIMIT, num_assistant_tokens=GAMMA, assistant_confidence_threshold=threshold,
        show_progress=False, **options,
    )  # fmt: skip
    for name in ("target_calls", "accepted", "drafted", "drafting_rounds", "known_drafts", "open_drafts"):
        assert getattr(metrics, name).tolist() == getattr(rounds, name).tolist()
    return rounds, way


def find_early_end(name):
    return find_serving_engine(name).early_end


@pytest.mark.parametrize("p_min", [0.35, 0.6])
def test_llama_cpp_greedy(sharp_pair, prompts, p_min):
    draft, target = sharp_pair
    served = [serve_like_llama_cpp(draft, target, prompt, p_min) for prompt in prompts]
    rows = [{"prompt_ids": p, "completion_ids": text} for p, (text, _) in zip(prompts, served, strict=True)]
    rounds, way = replay_with_threshold(draft, target, rows, "llama.cpp", p_min)
    assert rounds.target_calls.tolist() == [len(counts) for _, counts in served]
    assert rounds.accepted.tolist() == [sum(accepted for _, accepted in counts) for _, counts in served]
    assert rounds.drafting_rounds.tolist() == [sum(drafted > 0 for drafted, _ in counts) for _, counts in served]
    drafted = [sum(drafted for drafted, _ in counts) for _, counts in served]
    assert all(least <= found for least, found in zip(rounds.drafted.tolist(), drafted, strict=True))
    assert sum(drafted) <= way.count_drafted()[1] * sum(len(counts) for _, counts in served)
    lengths = [drafted for _, counts in served for drafted, _ in counts]
    assert {0, GAMMA} <= set(lengths) and len(set(lengths)) > 2  # the threshold decides, and not always alike
    assert 0 < rounds.accepted.sum() < sum(lengths)


@pytest.mark.parametrize(("temperature", "threshold"), [(0.0, 0.4), (0.0, 0.7), (0.8, 0.7)])
def test_transformers(sharp_pair, prompts, threshold, temperature, monkeypatch):
    draft, target = sharp_pair
    counts, original = [], AssistedCandidateGenerator.update_candidate_strategy

    def count(self, input_ids, scores, num_matches):
        counts[-1].append((scores.shape[1] - 1, int(num_matches)))
        original(self, input_ids, scores, num_matches)

    monkeypatch.setattr(AssistedCandidateGenerator, "update_candidate_strategy", count)
    for name, value in {
        "num_assistant_tokens": GAMMA,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": threshold,
    }.items():
        setattr(draft.generation_config, name, value)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    target.generation_config.eos_token_id = draft.generation_config.eos_token_id = None
    rows, repeats = [], 1 if temperature == 0 else 4
    set_seed(0)
    for prompt in prompts * repeats:
        counts.append([])
        ids = target.generate(
            torch.tensor([prompt]), assistant_model=draft, max_new_tokens=LIMIT, pad_token_id=0, **sampling
        )
        rows.append({"prompt_ids": prompt, "completion_ids": ids[0, len(prompt) :].tolist()})
    rounds, way = replay_with_threshold(draft, target, rows, "transformers", threshold, temperature)
    calls = torch.tensor([len(one) for one in counts], dtype=torch.float64)
    accepted = torch.tensor([sum(matches for _, matches in one) for one in counts], dtype=torch.float64)
    lengths = [drafted for one in counts for drafted, _ in one]
    least, most = rounds.drafted.sum(), way.count_drafted()[1] * rounds.target_calls.sum()
    assert {1, GAMMA} <= set(lengths)
    if temperature == 0:
        torch.testing.assert_close(rounds.target_calls, calls)
        torch.testing.assert_close(rounds.accepted, accepted)
        assert least <= sum(lengths) <= most
    else:  # chance decides: means over 48 texts, within four standard errors
        for expected, found in ((rounds.target_calls, calls), (rounds.accepted, accepted)):
            difference = found - expected
            assert abs(difference.mean()) < 4 * difference.std() / len(difference) ** 0.5
        assert 0.97 * least < sum(lengths) < 1.03 * most


def test_an_engine_whose_drafts_do_not_end_early(sharp_pair):
    draft, target = sharp_pair
    with pytest.raises(ValueError, match=r"vLLM does not end drafts early.*Leave it out"):
        replay(draft, target, [], temperature=0.0, serving_engine="vllm", assistant_confidence_threshold=0.5)
    with pytest.raises(ValueError, match="assistant_confidence_threshold"):
        replay(draft, target, [], temperature=0.0, serving_engine="llama.cpp", assistant_confidence_threshold=1.5)
    with pytest.raises(ValueError, match="vLLM does not end drafts early"):  # before any server is asked
        ObservationOptions(serving_engine="vllm", assistant_confidence_threshold=0.5)
