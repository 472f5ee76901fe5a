import pytest

from spec_kd.cli.rows import load_prompts


@pytest.fixture
def options(models, tmp_path):
    return [
        "synthesize", "--target", models / "target", "--output_dir", tmp_path / "out", "--max_new_tokens", 32,
        "--near_duplicate_threshold", "none", "--test_fraction", 0.3,
    ]  # fmt: skip


def test_queries_of_the_target(call, options):
    status, result, errors = call(*options, "--num_queries", 12)
    assert status == 0, errors
    train, test = (load_prompts(result["path"], split) for split in ("train", "test"))
    assert (len(train), len(test)) == (result["num_train"], result["num_test"])
    assert len(train) + len(test) == 12 and len(test) > 0 and result["yield"]["kept"] == 12
    assert {*train["scenario"], *test["scenario"]} == {"synthetic"}
    assert all(row["prompt"][-1]["content"].startswith("Is a ") for row in train)
    assert call(*options, "--num_queries", 12)[1]["is_reused"]


def test_more_queries_continue_the_folder(call, options):
    asked = call(*options, "--num_queries", 4, "--round_size", 4)[1]["yield"]["asked"]
    status, result, errors = call(*options, "--num_queries", 9, "--round_size", 4)
    assert status == 0 and not result["is_reused"], errors
    assert result["yield"]["kept"] == 9 and result["yield"]["asked"] > asked
    status, _, errors = call(*options, "--num_queries", 9, "--round_size", 4, "--seed", 1)
    assert status == 2 and "options.seed" in errors


def test_yaml_with_single_values_for_lists(call, options, tmp_path):
    config = tmp_path / "synthesis.yaml"
    config.write_text("num_queries: 2\ntemperature: 1.1\nlanguages: xx\nmax_asked: 3\n")
    status, _, errors = call(*options, "--config", config)
    assert status == 2 and "None of 3 queries was kept (language: 3)" in errors


def test_a_test_prompt_is_not_written_again(call, options, tmp_path):
    written = call(*options, "--num_queries", 3)[1]["path"]
    options[options.index("--output_dir") + 1] = tmp_path / "second"
    status, result, errors = call(
        *options, "--num_queries", 3, "--test_sets", *(f"{written}/{split}.arrow" for split in ("train", "test"))
    )
    assert status == 0 and result["yield"]["dropped"]["test_overlap"] > 0, errors
