import pytest
from speculating_server import SpeculatingServer
from transformers import AutoModelForCausalLM, AutoTokenizer

LIMIT = ("--max_new_tokens", 6)


@pytest.fixture(scope="module")
def servers(models):
    target, draft = (AutoModelForCausalLM.from_pretrained(models / name) for name in ("target", "draft"))
    tokenizer = AutoTokenizer.from_pretrained(models / "target")
    with (
        SpeculatingServer("llama.cpp", target, draft, tokenizer) as server,
        SpeculatingServer("llama.cpp", target, None, tokenizer) as plain,
    ):
        yield server, plain


@pytest.fixture
def options(models, prompts, servers, tmp_path):
    return [
        "observe", "--url", servers[0].base_url, "--serving_engine", "llama.cpp", "--target", models / "target",
        "--prompts", prompts, "--output_dir", tmp_path / "observed", "--num_prompts", 4, *LIMIT,
    ]  # fmt: skip


def test_predicted_and_observed(call, options, servers, models, tmp_path):
    status, result, errors = call(*options, "--draft", models / "draft", "--plain_url", servers[1].base_url)
    assert status == 0, errors
    assert result["num_prompts"] == result["num_equal"] == 4
    assert result["metrics"]["acceptance rate"][0] == pytest.approx(result["predicted"]["acceptance rate"][0])
    assert result["speedup"][0] == pytest.approx(1)
    assert "counts as replay predicts on 4 of 4 prompts" in errors
    for kind in ("json", "md", "html"):
        assert (tmp_path / "observed" / f"observed.{kind}").stat().st_size > 0
    num_asked = len(servers[0].requests)
    again = call(*options, "--draft", models / "draft", "--plain_url", servers[1].base_url)[1]
    assert again["is_reused"] and len(servers[0].requests) == num_asked


def test_an_evaluation_gets_the_section(call, options, models, prompts, tmp_path):
    evaluation = [
        "evaluate", "--draft", models / "draft", "--target", models / "target", "--prompts", prompts, "--num_prompts",
        4, "--output_dir", tmp_path / "report", "--serving_engine", "llama.cpp", "--temperatures", "0", "--gammas", "3",
        "--costs", "none", *LIMIT,
    ]  # fmt: skip
    assert call(*evaluation)[0] == 0
    status, _, errors = call(*options, "--draft", models / "draft", "--report", tmp_path / "report")
    assert status == 0, errors
    page = (tmp_path / "observed" / "report.html").read_text()
    assert "<h2>Predicted and observed</h2>" in page and "predicted on other responses" in page
    # the target wrote the same texts: nothing comes from other tokens
    assert "+0.000" in page


def test_wrong_input(call, options, servers, tmp_path):
    options[options.index("--url") + 1] = servers[1].base_url
    status, _, errors = call(*options)
    assert status == 2 and "The counters did not move" in errors and "--spec-type draft-simple" in errors
    status, _, errors = call(*options, "--responses", tmp_path)
    assert status == 2 and "`responses` is for a comparison with replay, which needs `draft`" in errors
