"""`spec-kd check-serving`: findings as lines and as JSON, and its exit status."""

import pytest


@pytest.mark.parametrize(
    ("engines", "status"), [(["llama.cpp"], 0), (["vllm"], 3), (["llama.cpp", "vllm"], 3), ([], 3)], ids=str
)
def test_the_exit_status_says_whether_the_pair_can_be_served(call, models, engines, status):
    """The draft has 261 rows and the target 288."""
    option = ["--serving_engine", *engines] if engines else []
    found, result, said = call("check-serving", "--draft", models / "draft", "--target", models / "target", *option)
    assert found == status and result["has_passed"] is (status == 0)
    assert [one["check"] for one in result["findings"]] == ["unequal_rows"] * (status == 3)
    assert ("llama.cpp: nothing found" in said) is ("llama.cpp" in engines)
    if status:
        assert "check-serving: error: vllm refuses: The draft has 261 vocabulary rows" in said
        assert result["findings"][0]["severity"] == "error" and "288" in result["findings"][0]["fix"]


def test_warnings_pass(call, models):
    options = ("--max_length", 600, "--num_assistant_tokens", 4, "--serving_engine", "llama.cpp", "tensorrt-llm")
    status, result, said = call(
        "check-serving", "--draft", models / "stranger", "--target", models / "target", *options
    )
    assert status == 3 and {(one["engine"], one["check"], one["severity"]) for one in result["findings"]} == {
        ("llama.cpp", "other_token_text", "error"),
        ("tensorrt-llm", "different_tokens", "warning"),
    }
    assert "check-serving: warning: tensorrt-llm drafts less" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "MODELS/target", "--draft", "MODELS/nowhere"], "nowhere"),
        (["--target", "MODELS/target", "--draft", "MODELS/draft", "--serving_engine", "vlm"], "'vlm'"),
        (
            ["--target", "MODELS/target", "--draft", "MODELS/draft", "--tensor_parallel_size", "0"],
            "tensor_parallel_size",
        ),
        (["--target", "MODELS/target"], "draft"),
    ],
    ids=["no draft", "no engine", "no cards", "missing"],
)
def test_wrong_input_is_refused(call, models, options, message):
    status, _, said = call("check-serving", *(option.replace("MODELS", str(models)) for option in options))
    assert status == 2 and message in said
