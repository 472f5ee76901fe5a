"""The recipes load: those for GPUs with the models, scenario and domain that their names say, and one for a CPU."""

from pathlib import Path

import pytest

from spec_kd.cli.recipe import load_recipe
from spec_kd.prompts.tool_catalog import load_tool_catalog

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PAIRS = {
    "fc": ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
    "bio": ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.2-1B-Instruct"),
    "zh": ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
}


@pytest.mark.parametrize("scenario", ["historical", "curated", "synthetic"])
@pytest.mark.parametrize("domain", list(PAIRS))
def test_recipe_loads(domain, scenario):
    path = EXAMPLES / "recipes" / f"{domain}_{scenario}.yaml"
    recipe = load_recipe(path)
    assert list(recipe.parts) == [scenario] and recipe.output_dir == f"runs/{path.stem}"
    train = recipe.train
    assert (train.arguments.target, train.draft.model_name_or_path) == PAIRS[domain]
    assert recipe.respond[1].max_new_tokens == recipe.evaluate[1].max_new_tokens
    # heads of different length under one tokenizer: what a server wants is said
    assert train.config.align_vocabulary == (domain != "bio")
    assert recipe.parts[scenario].scenario == scenario
    options = recipe.parts[scenario].call[1]
    if scenario == "historical":
        assert options.redact and options.split_by == "time"
        assert options.max_tokens + recipe.respond[1].max_new_tokens <= train.config.max_length
    elif scenario == "curated":
        assert not options.keep_completions
    else:
        assert options.num_queries == 20_000
        assert (options.tool_catalog is None) == (domain != "fc")
    assert "not run by us" in path.read_text(encoding="utf-8")


def test_there_are_no_other_recipes():
    names = {path.name for path in (EXAMPLES / "recipes").iterdir()}
    of_pairs = {f"{d}_{s}.yaml" for d in PAIRS for s in ("historical", "curated", "synthetic")}
    assert names == of_pairs | {"tools.yaml", "target_to_server.yaml"}


@pytest.mark.parametrize("is_quick", [False, True])
def test_from_a_target_to_a_server(is_quick):
    """The server is asked as the plan, the responses and the evaluation are, and chooses its own number of tokens."""
    path = EXAMPLES / "recipes" / "target_to_server.yaml"
    recipe = load_recipe(path, is_quick)
    assert recipe.output_dir == "runs/target_to_server" + ("-quick" if is_quick else "")
    _, plan, timing = recipe.plan
    serving = recipe.serving
    assert "-fa off" in timing.server_flags == serving.servers.options.server_flags == serving.costs[1].server_flags
    assert plan.llama_cpp_dir == serving.export[1].llama_cpp_dir and plan.quantization == serving.export[1].quantization
    temperatures = {plan.temperature, recipe.respond[1].temperature, serving.observe[1].temperature}
    assert temperatures == set(recipe.evaluate[1].temperatures) == {0.0}
    assert "num_assistant_tokens" not in recipe.serving_builder.evaluation_section
    limits = [recipe.respond[1].max_new_tokens, recipe.evaluate[1].max_new_tokens, serving.observe[1].max_new_tokens]
    assert len(set(limits)) == 1
    assert recipe.train.config.max_train_minutes == (5 if is_quick else 240)
    assert (plan.run_minutes is None) == is_quick and serving.observe[0].num_prompts == (16 if is_quick else 100)


def test_tools_are_a_catalog():
    tools = load_tool_catalog(EXAMPLES / "recipes" / "tools.yaml")
    assert len(tools) >= 8
    assert all(set(t["parameters"]["required"]) <= set(t["parameters"]["properties"]) for t in tools)
