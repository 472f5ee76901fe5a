"""A profile of `experiments/paper_claims` with models of a few thousand parameters, and the record of its stages."""

import json
import random
from pathlib import Path

import pytest
import yaml

from experiments.paper_claims import __main__ as command

COLORS = ("red", "blue", "green", "white")
THINGS = ("stone", "river", "bird", "tree", "lamp")
BUDGET = {"max_steps": 120, "tokens_per_step": 512, "learning_rate": 0.01, "eval_steps": 60}
SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
PROFILE = {
    "name": "smoke",
    "data": {
        "folder": "", "share_for_target": 0.5, "max_prompt_tokens": 120, "max_new_tokens": 8,
        "validation_fraction": 0.3, "num_validation": 3, "num_test": 4,
        "max_queries": 40,
    },
    "domains": {
        "tools": {
            "historical": {"pattern": "Find"},
            "num_synthetic": 4,
            "synthesis": {
                "tools_pattern": "Tools: ", "system_prompts": "Tools: {tools}", "num_tools": 1, "max_new_tokens": 40,
                "near_duplicate_threshold": None, "text_filter": {"min_tokens": 1, "max_repetition": 1.0},
            },
        }
    },
    "build": {
        "vocab_size": 400, "max_length": 160, "target": {**SIZE, "num_hidden_layers": 2}, "drafts": {"default": SIZE},
        "generic_target": {**BUDGET, "prompt_weight": 1.0}, "domain_target": {**BUDGET, "prompt_weight": 1.0},
        "generic_draft": {**BUDGET, "max_steps": 20}, "general_share": 0.2, "num_held_out": 8,
    },
    "training": {
        "steps": 3, "probe_steps": 2,
        "options": {"per_device_train_batch_size": 2, "learning_rate": 0.001, "bf16": False,
                    "gradient_checkpointing": False, "use_cpu": True},
        "online": {"on_policy": {"lmbda": 1.0}, "streaming": {"mode": "streaming", "trained_positions": "all"}},
        "signals": {"sampled_counts": {"method": "sampled_counts", "num_draws": 4}},
        "adapters": {"lora": {"peft": {"r": 2, "target_modules": "all-linear"}, "learning_rate": 0.002}},
        "num_assistant_tokens": 2, "num_timed_prompts": 2, "gammas": [1, 2, 4], "batch_size": 8,
        "length_ordered": ["tools"],
    },
    "plan": {
        "seeds": [0], "ablation_domain": "tools", "ablation_seeds": [0], "num_prompts": 4, "sizes": [2, 4],
        "scenario_prompts": 4, "synthetic_sizes": [], "headline_online": ["on_policy"], "more_online": ["streaming"],
        "learning_rates": {"tools": [0.002]},
        "divergences": [], "token_selections": ["adaspec"], "mixes": {"both": {"historical": 1, "synthetic": 1}},
        "search": {"divergence": [{"divergence": "tvd"}], "polish": [{"polish": "on_policy", "polish_share": 0.5}]},
    },
    "estimates": {
        "prompt_tokens": {"tools": 40}, "completion_tokens": {"tools": 6}, "draft_training": 1000,
        "target_training": 1000,
        "target_reading": 1000, "draft_writing": 1000, "target_writing": 1000, "serving": 1000,
        "evaluation_minutes": 0.1, "synthesis_yield": 0.5,
    },
}  # fmt: skip


def write_rows(path: Path, kinds: tuple[str, ...], count: int, seed: int, has_tools: bool) -> None:
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        color, thing, kind = rng.choice(COLORS), rng.choice(THINGS), rng.choice(kinds)
        prompt = [{"role": "user", "content": f"{kind} the {color} {thing} number {rng.randrange(1000)}"}]
        if has_tools:
            tools = json.dumps([{"name": f"{thing}_finder", "parameters": {}}])
            prompt.insert(0, {"role": "system", "content": f"Tools: {tools}"})
        answer = f"{thing}_finder {color}" if has_tools else f"It is {color}"
        rows.append({"prompt": prompt, "completion": [{"role": "assistant", "content": answer}]})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def profile_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper_claims")
    for split, count, seed in (("train", 120, 0), ("test", 20, 1)):
        write_rows(folder / "data" / "tools" / f"{split}.jsonl", ("Find", "Name"), count, seed, has_tools=True)
        write_rows(folder / "data" / "general" / f"{split}.jsonl", ("Tell",), count, seed + 2, has_tools=False)
    content = {**PROFILE, "data": {**PROFILE["data"], "folder": str(folder / "data")}}
    (folder / "smoke.yaml").write_text(yaml.safe_dump(content))
    return folder / "smoke.yaml"


@pytest.fixture(scope="session", autouse=True)
def few_cores():
    """Stages keep to the threads of the test session: it has a process for each core."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "use_all_cores", lambda: None)
        yield


@pytest.fixture(scope="session")
def run(profile_path, few_cores):
    """Runs a stage on the profile's own folders."""

    def run(stage: str, *arguments: str) -> None:
        folder = profile_path.parent
        options = ["--profile", str(profile_path), "--work_dir", str(folder / "work"), "--results_dir", str(folder)]
        command.main([stage, *options, *arguments])

    return run


@pytest.fixture(scope="session")
def record_path(profile_path, run):
    """The record after all stages."""
    for stage in ("targets", "drift", "answers", "runs"):
        run(stage)
    return profile_path.parent / "smoke" / "record.jsonl"
