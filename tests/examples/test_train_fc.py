"""The example with arguments: models and data from disk, both methods, LoRA, a YAML file."""

import json

import pyarrow.parquet
import pytest
import train_fc
import yaml
from tiny import build_llama, build_tokenizer

from spec_kd import BlackBoxSFTTrainer, WhiteBoxDistillTrainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A draft, a target with more padding rows, and a data folder with train.jsonl and test.jsonl."""
    folder = tmp_path_factory.mktemp("fc")
    for name, model in (("draft", build_llama(seed=0)), ("target", build_llama(seed=1, vocab_size=288))):
        model.save_pretrained(folder / name)
        build_tokenizer().save_pretrained(folder / name)
    (folder / "data").mkdir()
    for split, count in (("train", 12), ("test", 3)):
        rows = [
            {
                "prompt": [{"role": "user", "content": f"{split} {i}"}],
                "completion": [{"role": "assistant", "content": '[{"name": "f"}]'}],
            }
            for i in range(count)
        ]
        (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_options(folder, output_dir) -> dict:
    return {
        "model_name_or_path": str(folder / "draft"),
        "teacher_model_name_or_path": str(folder / "target"),
        "dataset_name": str(folder / "data"),
        "output_dir": str(output_dir),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "max_new_tokens": 6,
        "num_eval_prompts": 3,
        "gradient_checkpointing": False,
        "report_to": "none",
        "use_cpu": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "align_vocabulary": True,
    }


def as_flags(options: dict) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


@pytest.mark.parametrize(
    ("method", "teacher_signal"), [("white_box", "live"), ("white_box", "top_k_tail"), ("black_box", "top_k_tail")]
)
def test_real_recipe_leaves_a_servable_draft_and_its_record(folder, tmp_path, method, teacher_signal):
    changes = {"method": method, "teacher_signal": teacher_signal}
    result = train_fc.main(as_flags({**make_options(folder, tmp_path), **changes}))
    assert type(result.trainer) is (WhiteBoxDistillTrainer if method == "white_box" else BlackBoxSFTTrainer)
    assert [step for step, _ in result.history] == [0, 2]
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 288
    record = json.loads((tmp_path / "acceptance.json").read_text())
    assert record["method"] == method and record["steps"] == 2
    is_stored = changes == {"method": "white_box", "teacher_signal": "top_k_tail"}
    assert record["teacher_signal"] == (teacher_signal if is_stored else None)
    columns = pyarrow.parquet.read_schema(tmp_path / "responses" / "responses.parquet").names
    assert ("teacher_info" in columns) == is_stored
    if method == "white_box":
        assert (result.trainer.teacher_model is None) == is_stored
    assert set(record["metrics"]) == {"before", "after"}
    assert len(record["metrics"]["after"]["T=1"]["alpha"]) == 3
    for name in ("acceptance.png", "acceptance.md", "README.md", "responses/responses.parquet"):
        assert (tmp_path / name).stat().st_size > 0, name


def test_yaml_with_lora_flags(folder, tmp_path):
    options = {
        **make_options(folder, tmp_path / "run"),
        "use_peft": True,
        "lora_r": 4,
        "lora_target_modules": ["q_proj", "v_proj"],
        "merge_adapter": True,
        "generate_responses": False,
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(options))
    result = train_fc.main(["--config", str(config), "--divergence", "jsd", "--beta", "0.3"])
    assert result.trainer.token_loss.divergence.beta == 0.3
    assert {type(m).__name__ for m in result.trainer.model.modules()} >= {"LoraModel"}
    assert not (tmp_path / "run" / "adapter_config.json").exists()  # merged
    assert not (tmp_path / "run" / "responses").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "grey_box"}, "white_box, black_box"),
        ({"dataset_test_split": "validation"}, "validation"),
        ({"num_assistant_tokens": 0}, "at least 1"),
        ({"divergence": "kl"}, "forward_kl"),
        ({"teacher_signal": "draws"}, "'live', 'token_only'"),
        ({"teacher_signal": "sampled_counts", "divergence": "jsd"}, "'sampled_counts' cannot serve"),
    ],
)
def test_wrong_arguments_are_refused(folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train_fc.main(as_flags({**make_options(folder, tmp_path), **changes}))


def test_a_model_without_a_teacher_is_refused(tmp_path):
    with pytest.raises(ValueError, match="teacher_model_name_or_path"):
        train_fc.main(["--model_name_or_path", "draft", "--output_dir", str(tmp_path)])
