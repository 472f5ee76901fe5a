"""`VLLMEngine` on what vLLM 0.32.0 answered (recorded_vllm.py); test_vllm_engine_real.py runs vLLM itself."""

import inspect
import json
import math
import sys

import numpy as np
import pytest
import recorded_vllm as recorded
from recorded_vllm import LLM, OTHER, PLAIN, STOPPED, Logprob

from spec_kd.engines.base import Engine, UnsupportedByEngineError
from spec_kd.engines.vllm import VLLMEngine
from spec_kd.losses import SignalSpec
from spec_kd.sampling.options import SamplingOptions
from spec_kd.sampling.prompts import UnusablePromptError

PROMPTS = [PLAIN, STOPPED, OTHER]
SAMPLING = SamplingOptions(max_new_tokens=4, temperature=0.7, seed=21)
TOP_2 = SignalSpec("top_k_tail", top_k=2)
TOKEN_ONLY = SignalSpec("token_only")


@pytest.fixture
def vllm(monkeypatch):
    module = recorded.build_module()
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


@pytest.fixture
def llm():
    return LLM(logprobs_mode="processed_logprobs")


@pytest.fixture
def engine(vllm, llm):
    return VLLMEngine.from_llm(llm)


class TestConstruction:
    def test_passes_everything_on_to_vllm(self, vllm):
        engine = VLLMEngine("some/model", revision="abc", tensor_parallel_size=2, max_logprobs=50, hf_token="hf_secret")
        assert vllm.made[0].kwargs == {
            "model": "some/model",
            "revision": "abc",
            "logprobs_mode": "processed_logprobs",
            "tensor_parallel_size": 2,
            "max_logprobs": 50,
            "hf_token": "hf_secret",
        }
        assert (engine.name, engine.is_reproducible, engine.logprobs_mode) == ("vllm", False, "processed")
        assert engine.target_name == "some/model"

    def test_describes_itself_as_json_without_secrets(self, vllm):
        engine = VLLMEngine("some/model", revision="abc", tensor_parallel_size=2, hf_token="hf_secret")
        expected = {
            "model": "some/model",
            "revision": "abc",
            "vllm_version": "0.32.0",
            "dtype": "float32",
            "quantization": None,
            "logprobs_mode": "processed_logprobs",
            "tensor_parallel_size": 2,
            "eos_token_ids": [1, 7],
        }
        assert json.loads(json.dumps(engine.describe())) == expected

    @pytest.mark.parametrize(
        ("mode", "said"), [("processed_logprobs", "processed"), ("raw_logprobs", "raw")], ids=["processed", "raw"]
    )
    def test_says_which_distribution_the_log_probabilities_are_of(self, vllm, mode, said):
        assert VLLMEngine("m", logprobs_mode=mode).logprobs_mode == said
        assert VLLMEngine.from_llm(LLM(logprobs_mode=mode)).logprobs_mode == said

    def test_refuses_logits_before_anything_is_loaded(self, vllm):
        with pytest.raises(ValueError, match=r"processed_logits.*processed_logprobs"):
            VLLMEngine("m", logprobs_mode="processed_logits")
        assert vllm.made == []
        with pytest.raises(ValueError, match="raw_logits"):
            VLLMEngine.from_llm(LLM(logprobs_mode="raw_logits"))

    def test_says_how_to_install_vllm(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "vllm", None)
        with pytest.raises(ImportError, match=r"pip install spec_kd\[vllm\]"):
            VLLMEngine("m")

    @pytest.mark.parametrize(
        ("shipped", "of_tokenizer", "expected"),
        [([7, 5], 1, [1, 5, 7]), (7, 1, [1, 7]), (None, 1, [1]), ([7], None, [7])],
        ids=["list", "one", "tokenizer only", "config only"],
    )
    def test_ends_at_the_eos_of_config_and_tokenizer(self, vllm, shipped, of_tokenizer, expected):
        config = {} if shipped is None else {"eos_token_id": shipped}
        assert VLLMEngine("m", shipped_config=config, tokenizer_eos=of_tokenizer).eos_token_ids == expected

    def test_ends_at_the_given_eos_ids_only(self, vllm):
        assert VLLMEngine("m", eos_token_ids=(9, 3, 9)).eos_token_ids == [3, 9]

    def test_needs_no_tokenizer(self, vllm):
        assert VLLMEngine("m", skip_tokenizer_init=True).eos_token_ids == [1, 7]

    @pytest.mark.parametrize(
        "kwargs", [{"shipped_config": {}, "tokenizer_eos": None}, {"eos_token_ids": []}], ids=["none", "empty"]
    )
    def test_refuses_a_target_without_eos(self, vllm, kwargs):
        with pytest.raises(ValueError, match="eos_token_ids"):
            VLLMEngine("m", **kwargs)

    @pytest.mark.parametrize("method", ["describe", "generate", "score"])
    def test_has_the_signatures_of_the_protocol(self, method):
        assert inspect.signature(getattr(VLLMEngine, method)) == inspect.signature(getattr(Engine, method))


class TestGenerate:
    def test_keeps_exactly_the_top_k(self, engine):
        plain = engine.generate(PROMPTS, SAMPLING, TOP_2, "s")[0]
        assert (plain.ids, plain.finish_reason) == ([90, 96, 105, 10], "length")
        # The first, third and fourth token lie beyond the top 2 and came in addition to them.
        assert plain.token_logprobs == [
            -3.0979552268981934,
            -1.0508301258087158,
            -7.371650218963623,
            -4.588343620300293,
        ]
        assert [ids.tolist() for ids in plain.sparse.ids] == [[183, 64], [96, 167], [96, 181], [154, 156]]
        np.testing.assert_array_equal(plain.sparse.log_p[2], np.float32([-1.6224169731140137, -2.4960670471191406]))
        assert {ids.dtype for ids in plain.sparse.ids} == {np.dtype(np.int32)}
        assert {log_p.dtype for log_p in plain.sparse.log_p} == {np.dtype(np.float32)}
        assert plain.sparse.counts is None

    def test_keeps_the_eos_and_orders_by_rank(self, engine):
        stopped = engine.generate(PROMPTS, SAMPLING, TOP_2, "s")[1]
        assert (stopped.ids, stopped.finish_reason) == ([54, 98, 1], "stop")
        assert len(stopped.token_logprobs) == len(stopped.sparse.ids) == 3
        # The second token is of rank 2: vLLM names it first.
        assert stopped.sparse.ids[1].tolist() == [164, 98]
        assert stopped.token_logprobs[1] == -2.9736387729644775

    def test_token_only_asks_for_the_token_alone(self, engine, llm):
        stopped = engine.generate(PROMPTS, SAMPLING, TOKEN_ONLY, "s")[1]
        assert stopped.token_logprobs == [-3.472170829772949, -2.9736387729644775, -4.4602580070495605]
        assert stopped.sparse is None
        assert [params.logprobs for params in llm.calls[0][1]] == [0, 0, 0]

    def test_without_a_signal_asks_for_no_log_probabilities(self, engine, llm):
        completions = engine.generate(PROMPTS, SAMPLING)
        assert [c.ids for c in completions] == [[90, 96, 105, 10], [54, 98, 1], [20, 164, 47, 257]]
        assert all(c.token_logprobs is None and c.sparse is None for c in completions)
        assert [params.logprobs for params in llm.calls[0][1]] == [None] * 3

    def test_asks_for_the_plain_softmax_at_the_temperature(self, engine, llm):
        engine.generate(PROMPTS, SAMPLING, TOP_2, "s")
        prompts, params, use_tqdm = llm.calls[0]
        assert prompts == [{"prompt_token_ids": ids} for ids in PROMPTS]
        assert use_tqdm is False
        expected = recorded.SamplingParams(
            temperature=0.7,
            seed=recorded.SAMPLED_SEED,
            stop_token_ids=[1, 7],
            ignore_eos=True,
            max_tokens=4,
            logprobs=2,
            detokenize=False,
        )
        assert params[0] == expected  # and so everything else at its neutral default

    def test_greedy_is_temperature_0_without_a_seed(self, engine, llm):
        completion = engine.generate([OTHER], SamplingOptions(4, 0.0), TOP_2)[0]
        assert completion.ids == [ids[0] for ids in completion.sparse.ids] == [130, 187, 42, 79]
        assert [float(log_p[0]) for log_p in completion.sparse.log_p] == pytest.approx(completion.token_logprobs)
        params = llm.calls[0][1][0]
        assert (params.temperature, params.seed) == (0.0, None)

    def test_every_request_has_its_own_stable_seed(self, engine, llm):
        for options, seed in [
            (SAMPLING, "s"),
            (SAMPLING, "t"),
            (SamplingOptions(4, 0.7, seed=22), "s"),
            (SAMPLING, "s"),
        ]:
            engine.generate([PLAIN, PLAIN, PLAIN], options, None, seed)
        seeds = [[params.seed for params in call[1]] for call in llm.calls]
        assert len({*seeds[0], *seeds[1], *seeds[2]}) == 9
        assert seeds[3] == seeds[0]
        assert all(0 <= seed < 2**63 for call in seeds for seed in call)

    def test_an_empty_batch_has_no_answers(self, engine, llm):
        assert engine.generate([], SAMPLING, TOP_2) == []
        assert engine.score([], [], TOP_2) == []
        assert llm.calls == []


class TestScore:
    def test_reads_the_completions_positions(self, engine, llm):
        plain, stopped = engine.score([PLAIN, STOPPED], [[90, 96, 105, 10], [54, 98, 1]], TOP_2)
        assert (plain.ids, plain.finish_reason) == ([90, 96, 105, 10], "length")
        assert (stopped.ids, stopped.finish_reason) == ([54, 98, 1], "stop")
        assert plain.token_logprobs == [-3.4134726524353027, -1.779565691947937, -6.417697906494141, -4.554165840148926]
        assert stopped.token_logprobs == [-3.6889116764068604, -3.4735939502716064, -4.466851234436035]
        assert [ids.tolist() for ids in plain.sparse.ids] == [[183, 64], [96, 167], [96, 181], [154, 156]]
        assert [ids.tolist() for ids in stopped.sparse.ids] == [[85, 156], [164, 98], [88, 193]]
        prompts, params, _ = llm.calls[0]
        assert [p["prompt_token_ids"] for p in prompts] == [[*PLAIN, 90, 96, 105, 10], [*STOPPED, 54, 98, 1]]
        expected = recorded.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=2, detokenize=False)
        assert params == [expected, expected]

    def test_token_only(self, engine, llm):
        stopped = engine.score([STOPPED], [[54, 98, 1]], TOKEN_ONLY)[0]
        assert stopped.token_logprobs == [-3.6889116764068604, -3.4735939502716064, -4.466851234436035]
        assert stopped.sparse is None
        assert llm.calls[0][1][0].prompt_logprobs == 0

    def test_split_elsewhere_gives_the_same_values(self, engine):
        whole = engine.score([[STOPPED[0]]], [[*STOPPED[1:], 54, 98, 1]], TOKEN_ONLY)[0]
        assert (len(whole.token_logprobs), whole.finish_reason) == (5, "stop")
        assert whole.token_logprobs[2:] == engine.score([STOPPED], [[54, 98, 1]], TOKEN_ONLY)[0].token_logprobs


class TestRefusals:
    """Nothing is generated where something cannot be given."""

    @pytest.fixture(autouse=True)
    def nothing_generated(self, llm):
        yield
        assert llm.calls == []

    @pytest.mark.parametrize("method", ["sampled_counts", "sampled_logprobs"])
    def test_draws(self, engine, method):
        signal = SignalSpec(method, num_draws=8)
        for call in (
            lambda: engine.generate(PROMPTS, SAMPLING, signal),
            lambda: engine.score([PLAIN], [[90]], signal),
        ):
            with pytest.raises(UnsupportedByEngineError, match=rf"{method}.*top_k_tail.*token_only.*transformers"):
                call()

    def test_more_ids_than_vllm_was_made_for(self, engine):
        with pytest.raises(UnsupportedByEngineError, match=r"top_k=21.*20 ids.*max_logprobs=21"):
            engine.generate(PROMPTS, SAMPLING, SignalSpec("top_k_tail", top_k=21))
        with pytest.raises(UnsupportedByEngineError, match=r"max_logprobs=21"):
            engine.score([PLAIN], [[90]], SignalSpec("top_k_tail", top_k=21))

    @pytest.mark.parametrize("max_logprobs", [-1, 1000], ids=["no limit", "a high limit"])
    def test_more_ids_than_the_target_has(self, vllm, max_logprobs):
        engine = VLLMEngine("m", max_logprobs=max_logprobs)
        with pytest.raises(UnsupportedByEngineError, match="261 ids"):
            engine.generate(PROMPTS, SAMPLING, SignalSpec("top_k_tail", top_k=262))
        assert engine.generate([PLAIN], SAMPLING, TOP_2)[0].sparse is not None

    @pytest.mark.parametrize("top_k", [None, 0])
    def test_top_k_tail_without_top_k(self, engine, top_k):
        with pytest.raises(ValueError, match="at least 1"):
            engine.generate(PROMPTS, SAMPLING, SignalSpec("top_k_tail", top_k=top_k))

    def test_prompts_without_room(self, engine):
        with pytest.raises(UnusablePromptError, match=r"Prompt 1 has 62 tokens.*`max_new_tokens=4`.*64.*max_model_len"):
            engine.generate([[5] * 60, [5] * 62], SAMPLING)
        with pytest.raises(ValueError, match=r"Prompt 0 has 64 tokens.*=1`.*64"):
            engine.score([[5] * 60], [[6] * 4], TOKEN_ONLY)

    def test_check_knows_it_all_in_advance(self, engine):
        engine.check([[5] * 60], SAMPLING, TOP_2)
        engine.check([[5] * 63], None, TOP_2)  # as before scoring
        for prompts, options, signal in (
            ([[5] * 61], SAMPLING, TOP_2),
            ([[5] * 64], None, TOP_2),
            ([[]], SAMPLING, TOP_2),
            ([PLAIN], SamplingOptions(4, temperature=0.001), TOP_2),
            ([PLAIN], SAMPLING, SignalSpec("top_k_tail", top_k=21)),
        ):
            with pytest.raises(ValueError):
                engine.check(prompts, options, signal)

    def test_empty_prompts_and_completions(self, engine):
        with pytest.raises(ValueError, match="Prompt 1 has no tokens"):
            engine.generate([PLAIN, []], SAMPLING)
        with pytest.raises(ValueError, match="Row 0 has an empty"):
            engine.score([[]], [[90]], TOKEN_ONLY)
        with pytest.raises(ValueError, match="Row 1 has an empty"):
            engine.score([PLAIN, PLAIN], [[90], []], TOKEN_ONLY)

    def test_unequal_numbers(self, engine):
        with pytest.raises(ValueError, match="2 prompts and 1 completions"):
            engine.score([PLAIN, OTHER], [[90]], TOKEN_ONLY)

    def test_a_temperature_that_vllm_would_change(self, engine):
        with pytest.raises(ValueError, match=r"temperature=0\.001.*0\.01"):
            engine.generate(PROMPTS, SamplingOptions(4, temperature=0.001))


def spoil_completion(**changes):
    def spoil(outputs):
        for name, value in changes.items():
            setattr(outputs[1].outputs[0], name, value)

    return spoil


def spoil_position(change):
    def spoil(outputs):
        logprobs = outputs[1].outputs[0].logprobs or outputs[1].prompt_logprobs
        change(logprobs, len(logprobs) - 1)

    return spoil


POSITIONS = {
    "token missing": lambda positions, i: positions[i].pop(1),
    "nothing": lambda positions, i: positions.__setitem__(i, None),
    "not a number": lambda positions, i: positions[i].__setitem__(1, Logprob(math.nan, 24)),
    "fewer than top_k": lambda positions, i: positions[i].pop(193),
    "no rank": lambda positions, i: setattr(positions[i][193], "rank", None),
    "one position less": lambda positions, i: positions.pop(),
}


class TestAnswersThatAreNotWhatWasAskedFor:
    @pytest.mark.parametrize(
        "changes",
        [
            {"finish_reason": "abort"},
            {"finish_reason": "error"},
            {"finish_reason": "repetition", "stop_reason": "repetition_detected"},
            {"finish_reason": None},
            {"token_ids": [54, 98]},  # "stop" without an EOS
            {"token_ids": []},
            {"finish_reason": "length"},  # after 3 of 4
        ],
        ids=["abort", "error", "repetition", "unfinished", "no EOS", "no tokens", "early"],
    )
    def test_endings(self, engine, llm, changes):
        llm.spoil = spoil_completion(**changes)
        with pytest.raises(RuntimeError, match=r"ended completion 1 .*finish_reason"):
            engine.generate(PROMPTS, SAMPLING, None, "s")

    @pytest.mark.parametrize("change", POSITIONS.values(), ids=POSITIONS)
    def test_positions(self, engine, llm, change):
        llm.spoil = spoil_position(change)
        with pytest.raises(RuntimeError, match="completion 1"):
            engine.generate(PROMPTS, SAMPLING, TOP_2, "s")
        with pytest.raises(RuntimeError, match="completion 1"):
            engine.score([PLAIN, STOPPED], [[90, 96, 105, 10], [54, 98, 1]], TOP_2)

    def test_no_log_probabilities_at_all(self, engine, llm):
        llm.spoil = spoil_completion(logprobs=None)
        with pytest.raises(RuntimeError, match="of 0 of 3 tokens of completion 1"):
            engine.generate(PROMPTS, SAMPLING, TOKEN_ONLY, "s")
        llm.spoil = lambda outputs: setattr(outputs[0], "prompt_logprobs", None)
        with pytest.raises(RuntimeError, match="of 0 of 3 tokens of completion 0"):
            engine.score([STOPPED], [[54, 98, 1]], TOKEN_ONLY)

    def test_log_probabilities_of_other_ids(self, engine, llm):
        llm.spoil = spoil_completion(token_ids=[54, 99, 1])
        with pytest.raises(RuntimeError, match="id 99, token 1 of completion 1"):
            engine.generate(PROMPTS, SAMPLING, TOKEN_ONLY, "s")

    def test_lost_or_misplaced_answers(self, engine, llm):
        llm.spoil = lambda outputs: outputs.pop()
        with pytest.raises(RuntimeError, match="2 completions of 3 prompts"):
            engine.generate(PROMPTS, SAMPLING)
        llm.spoil = lambda outputs: outputs.reverse()
        with pytest.raises(RuntimeError, match="completion 0 with other prompt ids"):
            engine.generate(PROMPTS, SAMPLING)
