"""Recipes are checked as a whole before anything is done."""

import copy

import pytest
import yaml

from spec_kd.cli.preflight import check_sources, describe_signal
from spec_kd.cli.recipe import load_recipe

RECIPE = {
    "target": "my-org/target",
    "draft": "my-org/draft",
    "output_dir": "runs/test",
    "seed": 7,
    "prompts": {
        "historical": {"paths": "logs/*.jsonl", "redact": ["email"]},
        "leaflets": {"scenario": "curated", "dataset": "data/leaflets.jsonl", "seed": 1},
        "synthetic": {"num_queries": 5, "temperature": [0.8, 1.2]},
        "mix": {"weights": {"historical": 2, "leaflets": 1, "synthetic": 1}},
    },
    "respond": {"temperature": 1.0, "teacher_signal": "sampled_logprobs"},
    "train": {"method": "white_box", "learning_rate": "2e-5", "max_steps": 10, "lora_r": 8},
    "evaluate": {"fail_under": {"block_efficiency": 2.5}},
}
MISSING = object()
SERVER = {"engine": "server", "base_url": "http://localhost/v1"}


@pytest.fixture
def load(tmp_path):
    """Loads the recipe with changes, given as `{"section.key": value}`."""

    def load_changed(changes=None):
        recipe = copy.deepcopy(RECIPE)
        for path, value in (changes or {}).items():
            *sections, name = path.split(".")
            section = recipe
            for key in sections:
                section = section[key]
            if value is MISSING:
                del section[name]
            else:
                section[name] = value
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe, sort_keys=False))
        return load_recipe(file)

    return load_changed


def test_sections_become_the_arguments_of_commands(load, tmp_path):
    recipe = load()
    (logs, log_options, _), (leaflets, options), (synthetic, synthesis, _, target) = (
        part.call for part in recipe.parts.values()
    )
    assert logs.paths == [f"{tmp_path}/logs/*.jsonl"] and logs.tokenizer == "my-org/target"
    assert logs.output_dir == "runs/test/parts/historical" and log_options.seed == 7
    assert leaflets.dataset == f"{tmp_path}/data/leaflets.jsonl" and options.seed == 1
    assert synthesis.temperature == [0.8, 1.2] and target.target == "my-org/target"
    assert synthetic.test_sets == ["runs/test/parts/historical/test.arrow", "runs/test/parts/leaflets/test.arrow"]
    assert recipe.mix[0].parts["leaflets"] == "runs/test/parts/leaflets"
    respond, options, _, target = recipe.respond
    assert (respond.prompts, options.seed, target.engine) == ("runs/test/prompts/train.arrow", 7, "transformers")
    arguments, config, draft = recipe.train.arguments, recipe.train.config, recipe.train.draft
    assert recipe.train.method == "white_box" and config.learning_rate == 2e-5 and config.seed == 7
    assert draft.model_name_or_path == "my-org/draft" and draft.lora_r == 8
    assert arguments.responses == "runs/test/responses/responses.parquet"
    evaluate, options, _ = recipe.evaluate
    assert evaluate.drafts == {"before": "my-org/draft", "after": "runs/test/draft"}
    assert evaluate.fail_under == {"block_efficiency": 2.5} and evaluate.num_prompts == 200
    assert options.group_by == ["scenario"]


def test_the_engine_of_the_target_is_that_of_every_step_that_asks_it(load):
    server = {"name": "my-org/target", "engine": "server", "base_url": "http://localhost/v1"}
    recipe = load({"target": server, "evaluate.engine": "vllm", "evaluate.base_url": None})
    assert recipe.respond[-1].engine == recipe.parts["synthetic"].call[-1].engine == "server"
    assert recipe.evaluate[-1].engine == "vllm"


def test_training_can_use_the_answers_of_the_logs(load):
    changes = {"respond": False, "prompts": {"historical": {"paths": "a"}}, "train.method": "black_box"}
    recipe = load(changes)
    assert recipe.respond is None and recipe.train.arguments.responses == "runs/test/prompts/train.arrow"
    assert load(
        {**changes, "prompts": {"synthetic": {"num_queries": 1}}, "train": {"method": "online_gkd", "lmbda": 1}}
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trian": {}}, "there is no `trian`. Did you mean train?"),
        ({"draft": MISSING}, "`draft` missing"),
        ({"draft": 5}, "`draft` must be text"),
        ({"target": {"nam": "x"}}, "target: there is no `nam`. Did you mean name?"),
        ({"target": {"name": "x", "engine": "server"}}, "target: `engine=server` needs `base_url`"),
        ({"prompts": {}}, "`prompts` has no part"),
        ({"prompts": {"mix": {}}}, "`prompts` has no part"),
        (
            {"prompts.histrical": {"paths": "a"}},
            "prompts: histrical: `scenario` is 'histrical'. Did you mean historical?",
        ),
        ({"prompts.historical.path": "a"}, "prompts: historical: there is no option `path`. Did you mean paths?"),
        ({"prompts.historical": {}}, "prompts: historical: the following arguments are required: --paths"),
        ({"prompts.historical.output_dir": "a"}, "`output_dir` is set by the recipe"),
        ({"prompts.mix.weights": {"historical": 1}}, "prompts: mix: `weights` names historical, but the parts are"),
        ({"respond.temprature": 1}, "respond: there is no option `temprature`. Did you mean temperature?"),
        ({"respond.prompts": "a"}, "respond: `prompts` is set by the recipe"),
        ({"respond.teacher_signal": "top_k"}, "respond: Unknown method 'top_k'"),
        ({"respond.top_p": 0.9}, "respond: `teacher_signal='sampled_logprobs'` is of the whole distribution"),
        ({"respond.on_unidentified_token": "keep"}, "respond: `on_unidentified_token` is 'keep', but must be"),
        ({"evaluate.temperatures": [-1]}, "evaluate: "),
        ({"respond": 3}, "must hold `name: value` pairs"),
        ({"train.method": MISSING}, "train: `method` is missing: white_box, black_box, online_gkd"),
        ({"train.method": "gkd"}, "train: there is no method 'gkd'"),
        ({"train.max_steps": 1.5}, "train: `max_steps` is 1.5, but must be a whole number"),
        ({"train.use_peft": "perhaps"}, "train: argument --use_peft"),
        ({"train.divergence": "kl"}, "train: Unknown `divergence` 'kl'"),
        ({"train.divergence": "reverse_kl"}, "cannot serve the divergence 'reverse_kl'"),
        ({"train.token_selection": "target_entropy", "respond.teacher_signal": "sampled_counts"}, "cannot serve"),
        ({"evaluate.fail_under": {"speed": 1}}, "evaluate: The gate 'speed=1' names no metric"),
        ({"evaluate.serving_engine": "triton"}, "evaluate: `serving_engine` is 'triton'"),
        ({"respond": False}, "`prompts: leaflets` has none"),
    ],
)
def test_mistakes_are_named_with_their_section(load, changes, message):
    with pytest.raises(ValueError) as caught:
        load(changes)
    assert message in str(caught.value) and "recipe.yaml" in str(caught.value)


def test_a_live_teacher_serves_what_the_signal_cannot(load):
    recipe = load({"train.divergence": "reverse_kl", "train.teacher_model_name_or_path": "my-org/target"})
    assert recipe.train.config.divergence == "reverse_kl"


@pytest.fixture
def local(models, tmp_path):
    """The changes that make the recipe one of files that are there."""
    for name in ("log.jsonl", "leaflets.jsonl"):
        (tmp_path / name).write_text('{"prompt": "a"}\n')
    return {
        "target": str(models / "target"), "draft": str(models / "draft"), "output_dir": str(tmp_path / "run"),
        "prompts.historical.paths": str(tmp_path / "log.jsonl"),
        "prompts.leaflets.dataset": str(tmp_path / "leaflets.jsonl"),
    }  # fmt: skip


def test_sources_that_are_there(load, local, tmp_path):
    check_sources(load(local))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft": "./none"}, "draft: `./none` does not exist"),
        ({"target": "./none"}, "target: `./none` does not exist"),
        ({"prompts.historical.paths": "none/*.jsonl"}, "prompts: historical: `none/*.jsonl`"),
        ({"prompts.leaflets.dataset": "none.jsonl"}, "prompts: leaflets: dataset: `none.jsonl` does not exist"),
        (
            {"prompts.synthetic.tool_catalog": "none.json"},
            "prompts: synthetic: The tool catalog `none.json` does not exist",
        ),
        ({"evaluate.prompts": "none.jsonl"}, "evaluate: prompts: `none.jsonl` does not exist"),
        (
            {"train.temperature": 2.0},
            "train: The teacher's log-probabilities are of its distribution at temperature 1.0",
        ),
        ({"respond.teacher_signal": "token_only", "respond.temperature": 0.0}, "train: The only signal"),
    ],
)
def test_sources_that_do_not_fit(load, local, tmp_path, changes, message):
    with pytest.raises((ValueError, OSError)) as caught:
        check_sources(load({**local, **changes}))
    assert message in str(caught.value).replace(f"{tmp_path}/", "")  # relative paths are relative to the recipe


def test_models_of_two_tokenizers(load, local, models):
    stranger = {**local, "draft": str(models / "stranger")}
    with pytest.raises(ValueError, match="do not share a tokenizer"):
        check_sources(load(stranger))
    check_sources(load({**stranger, "train": {"method": "black_box"}}))


@pytest.mark.parametrize(
    ("temperature", "target", "expected"),
    [
        (0.7, {}, ("processed", 0.7)),
        (0.0, {}, ("raw", 1.0)),
        (0.7, {"engine": "server", "base_url": "x"}, ("raw", 1.0)),
        (
            0.7,
            {"engine": "server", "base_url": "x", "engine_kwargs": {"logprobs_mode": "processed"}},
            ("processed", 0.7),
        ),
        (0.7, {"engine": "vllm"}, ("processed", 0.7)),
        (0.7, {"engine": "vllm", "engine_kwargs": {"logprobs_mode": "raw_logprobs"}}, ("raw", 1.0)),
    ],
)
def test_the_signal_is_foreseen(load, tokenizer, temperature, target, expected):
    changes = {"respond.temperature": temperature, "target": {"name": "my-org/target", **target}}
    info = describe_signal(load(changes).respond, tokenizer)
    assert (info.logprobs_mode, info.logprobs_temperature) == expected


def test_the_signal_is_foreseen_as_it_will_be(load, responses, read_rows, tokenizer):
    """Against what `respond` wrote."""
    from spec_kd.data.teacher_signal import TeacherInfo

    written = TeacherInfo.from_json(read_rows(responses)[0]["teacher_info"])
    foreseen = describe_signal(load({"respond.max_new_tokens": 6}).respond, tokenizer)
    for name in set(vars(written)) - {"target", "target_name"}:
        assert getattr(written, name) == getattr(foreseen, name), name
