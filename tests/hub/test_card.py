import pytest
from huggingface_hub import ModelCard
from trl.trainer.utils import generate_model_card

from spec_kd.hub import extend_model_card

BEFORE = {"eval_alpha_greedy": 0.25, "eval_block_efficiency": 1.5}
AFTER = {"eval_alpha_greedy": 0.5, "eval_block_efficiency": 2.25, "eval_speedup": 1.3}
OPTIONS = {
    "method": "white-box distillation",
    "target_name": "org/target",
    "divergence": "forward_kl",
    "temperature": 1.0,
    "dataset_name": "org/conversations",
}


@pytest.fixture
def card_path(tmp_path):
    card = generate_model_card(
        base_model="org/base",
        model_name="my-draft",
        hub_model_id="me/my-draft",
        dataset_name="org/conversations",
        tags=["trl", "sft"],
        wandb_url=None,
        trackio_url=None,
        trainer_name="WhiteBoxDistill",
    )
    card.save(tmp_path / "README.md")
    return tmp_path / "README.md"


def test_metadata_is_kept_and_extended(card_path):
    extend_model_card(card_path, metrics=AFTER, **OPTIONS)
    data = ModelCard.load(card_path).data
    assert data.base_model == "org/base" and data.datasets == "org/conversations"
    assert {"trl", "sft", "speculative-decoding", "draft-model", "spec_kd"} <= set(data.tags)
    assert {r.metric_type: r.metric_value for r in data.eval_results} == {
        "alpha_greedy": 0.5,
        "block_efficiency": 2.25,
        "speedup": 1.3,
    }
    assert {r.dataset_name for r in data.eval_results} == {"org/conversations"}
    assert data.to_dict()["model-index"][0]["name"] == "my-draft"


def test_text_has_the_table_and_the_commands(card_path):
    extend_model_card(card_path.parent, metrics=AFTER, metrics_before=BEFORE, num_assistant_tokens=7, **OPTIONS)
    text = ModelCard.load(card_path).text
    assert "| `alpha_greedy` | 0.25 | 0.5 |" in text and "| `speedup` | – | 1.3 |" in text
    assert "assistant_model=draft" in text and '"num_speculative_tokens": 7' in text and "not run" in text
    assert "`forward_kl` divergence at temperature 1" in text
    assert text.index("Draft model for speculative decoding") < text.index("## Training procedure")
    assert "# Model Card for my-draft" in text and "### Framework versions" in text


def test_repeated_calls_replace(card_path):
    extend_model_card(card_path, metrics=BEFORE, **OPTIONS)
    extend_model_card(card_path, metrics=AFTER, **OPTIONS)
    once = card_path.read_text()
    assert once.count("## Draft model for speculative decoding") == 1 and "0.25" not in once
    extend_model_card(card_path, metrics=AFTER, **OPTIONS)
    assert card_path.read_text() == once


def test_a_card_without_metrics_or_without_a_start(tmp_path):
    extend_model_card(tmp_path, method="black-box SFT")
    assert "drafts for its target" in (tmp_path / "README.md").read_text()
    extend_model_card(tmp_path, method="black-box SFT", target_name="org/target", metrics={"alpha_t1": float("nan")})
    card = ModelCard.load(tmp_path / "README.md")
    assert "black-box SFT" in card.text and not card.data.eval_results
    assert "divergence" not in card.text
