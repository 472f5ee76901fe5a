import dataclasses
import json
import re
import shlex

import pytest
from hostile import HOSTILE
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from trl.trainer.utils import generate_model_card

from spec_kd.escaping import is_hub_id, make_public_name
from spec_kd.hub import CardFacts, carry_model_card, extend_model_card, recommend_in_card
from spec_kd.serving.configuration import EngineConfiguration

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
    extend_model_card(card_path, CardFacts(metrics=AFTER, **OPTIONS))
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
    extend_model_card(
        card_path.parent, CardFacts(metrics=AFTER, metrics_before=BEFORE, num_assistant_tokens=7, **OPTIONS)
    )
    text = ModelCard.load(card_path).text
    assert "| `alpha_greedy` | 0.25 | 0.5 |" in text and "| `speedup` | – | 1.3 |" in text
    assert "assistant_model=draft" in text and '"num_speculative_tokens": 7' in text and "not run" in text
    assert "`forward_kl` divergence at temperature 1" in text
    assert text.index("Draft model for speculative decoding") < text.index("## Training procedure")
    assert "# Model Card for my-draft" in text and "### Framework versions" in text


def test_repeated_calls_replace(card_path):
    extend_model_card(card_path, CardFacts(metrics=BEFORE, **OPTIONS))
    extend_model_card(card_path, CardFacts(metrics=AFTER, **OPTIONS))
    once = card_path.read_text()
    assert once.count("## Draft model for speculative decoding") == 1 and "0.25" not in once
    extend_model_card(card_path, CardFacts(metrics=AFTER, **OPTIONS))
    assert card_path.read_text() == once


def test_a_card_without_metrics_or_without_a_start(tmp_path):
    extend_model_card(tmp_path, CardFacts(method="black-box SFT"))
    assert "drafts for its target" in (tmp_path / "README.md").read_text()
    extend_model_card(
        tmp_path, CardFacts(method="black-box SFT", target_name="org/target", metrics={"alpha_t1": float("nan")})
    )
    card = ModelCard.load(tmp_path / "README.md")
    assert "black-box SFT" in card.text and not card.data.eval_results
    assert "divergence" not in card.text


def test_expected_numbers_that_are_not_known_are_dashes():
    interval = {"value": 0.5, "low": None, "high": None}
    expected = {"vllm": {"greedy": {"acceptance_rate": interval, "block_efficiency": {**interval, "value": None}}}}
    facts = CardFacts(expected=expected, gguf_files=["gguf/draft-Q8_0.gguf"])
    assert CardFacts.read(facts.write()) == facts
    text = facts.render(is_adapter=False)
    assert "| vllm | greedy | 0.500 [–, –] | – |" in text and "GGUF files: `gguf/draft-Q8_0.gguf`." in text
    del expected["vllm"]["greedy"]["acceptance_rate"]  # by anybody who edits the card
    assert CardFacts.read(facts.write()) is None


def write_card(folder, **options):
    folder.mkdir(parents=True, exist_ok=True)
    extend_model_card(folder, CardFacts(**{**OPTIONS, **options}))
    return (folder / "README.md").read_text(encoding="utf-8")


def test_trls_chat_model_makes_room_for_a_draft(card_path):
    extend_model_card(card_path, CardFacts(metrics=AFTER, **OPTIONS))
    text = card_path.read_text()
    for of_trl in ("fine-tuned version of", "Quick start", "time machine", "pipeline("):
        assert of_trl not in text
    assert "This model drafts for `org/target` in speculative decoding." in text
    assert "trained from [org/base](https://huggingface.co/org/base) on [org/conversations](" in text
    assert "vonwerra2020trl" in text  # TRL is still cited


def test_paths_appear_by_their_last_name(tmp_path):
    (tmp_path / "data" / "responses").mkdir(parents=True)
    text = write_card(
        tmp_path / "runs" / "draft",
        target_name=str(tmp_path / "models" / "target"),
        dataset_name=str(tmp_path / "data" / "responses"),
        base_name="/home/someone/.cache/huggingface/hub/models--org--base/snapshots/0123abcd",
        metrics=AFTER,
    )
    assert str(tmp_path) not in text and "/home" not in text
    assert "drafts for `target`" in text and "`responses`" in text and "[org/base](" in text
    data = ModelCard.load(tmp_path / "runs" / "draft" / "README.md").data
    assert data.base_model == "org/base" and data.datasets is None and data.model_name == "draft"


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("org/name", "org/name"),
        ("gpt2", "gpt2"),
        ("/home/me/models/draft/", "draft"),
        ("./draft", "draft"),
        ("~/models/draft", "draft"),
        ("a/b/c", "c"),
        (r"C:\Users\me\draft", "draft"),
        ("/cache/hub/models--org--my-name/snapshots/0a1b", "org/my-name"),
        ("http://me:secret@host:8000/v1/model?api_key=k", "model"),
        ("http://me:secret@host:8000", "unnamed"),
        ("/", "unnamed"),
        ("", "unnamed"),
    ],
)
def test_public_names(name, public):
    assert make_public_name(name) == public


def test_a_folder_here_is_no_id_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "models" / "target").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert make_public_name("models/target") == make_public_name(tmp_path / "models" / "target") == "target"
    monkeypatch.chdir(tmp_path / "models")
    assert make_public_name(".") == "models" and make_public_name("..") == tmp_path.name


def render(markdown):
    """As GitHub and the Hub do."""
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown)


def show(name):
    """What a reader sees of a name."""
    return make_public_name(name) or "unnamed"


@pytest.mark.parametrize("name", HOSTILE)
def test_names_from_data_stay_text(tmp_path, name):
    plain = write_card(tmp_path / "plain", divergence="kl", metrics={"alpha": 0.5})
    text = write_card(
        tmp_path / "draft",
        target_name=name,
        dataset_name=name,
        draft_name=name or "x",
        base_name=name,
        divergence=name or "kl",
        metrics={name: 0.5},
    )
    again = write_card(
        tmp_path / "draft",
        target_name=name,
        dataset_name=name,
        draft_name=name or "x",
        base_name=name,
        divergence=name or "kl",
        metrics={name: 0.5},
    )
    assert again == text  # no name ends the section
    card = ModelCard.load(tmp_path / "draft" / "README.md")
    assert set(card.data.to_dict()) <= {"model-index", "tags", "library_name", "pipeline_tag", "base_model", "datasets"}
    pattern = re.compile(r"</?([a-z0-9]+)")
    shape, wanted = (pattern.findall(render(ModelCard(part).text)) for part in (text, plain))
    if not is_hub_id(name) or "/" not in name:
        wanted = [tag for tag in wanted if tag != "a"]
        shape = [tag for tag in shape if tag != "a" or "href" not in tag]
    ignored = {"code", "p"}  # names stand in more places than in the plain card
    assert [tag for tag in shape if tag not in ignored] == [tag for tag in wanted if tag not in ignored]
    assert not any(ord(character) < 32 and character != "\n" for character in text) and "\x9b" not in text
    # commands are blocks of their own, each with the name as one word
    blocks = re.findall(r"^(`{3,})bash\n(.*?)\n\1$", text, re.M | re.S)
    assert len(blocks) == 4
    words = shlex.split(blocks[0][1])
    assert words[:2] == ["vllm", "serve"] and len(words) == 5
    assert json.loads(words[4])["model"] == (show(name) if name else "x")


def test_a_card_of_anybody_cannot_break_an_export(tmp_path):
    for number, facts in enumerate(
        ["{", "[]", '{"num_assistant_tokens": "x"}', '{"metrics": 3}', '{"temperature": "x"}']
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "README.md").write_text(f"---\ntags: [a]\n---\n# Mine\n<!-- spec_kd: facts {facts} -->\n")
        carry_model_card(None, folder)
        assert "This model drafts for its target" in (folder / "README.md").read_text()


def test_an_export_carries_the_card_and_its_name(tmp_path):
    text = write_card(tmp_path / "run", metrics=AFTER, metrics_before=BEFORE)
    assert '"model": "run"' in text
    (tmp_path / "exported").mkdir()
    carry_model_card(tmp_path / "run", tmp_path / "exported")
    exported = (tmp_path / "exported" / "README.md").read_text()
    assert "# Model Card for exported" in exported and '"model": "exported"' in exported
    assert "| `alpha_greedy` | 0.25 | 0.5 |" in exported and "drafts for `org/target`" in exported
    assert exported.count("## Draft model for speculative decoding") == 1
    write_card(tmp_path / "hub", draft_name="me/draft")
    (tmp_path / "other").mkdir()
    carry_model_card(tmp_path / "hub", tmp_path / "other")
    assert '"model": "me/draft"' in (tmp_path / "other" / "README.md").read_text()


def test_the_card_of_an_adapter_says_how_to_serve_it(tmp_path):
    folder = tmp_path / "draft"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    text = write_card(folder)
    assert "holds a LoRA adapter" in text and ModelCard.load(folder / "README.md").data.library_name == "peft"
    (folder / "adapter_config.json").unlink()
    carry_model_card(None, folder)
    text = (folder / "README.md").read_text()
    assert "LoRA" not in text and ModelCard.load(folder / "README.md").data.library_name == "transformers"


def test_pefts_card_names_no_folder_of_this_machine(tmp_path):
    peft = (
        f"---\nbase_model: {tmp_path}/base\nlibrary_name: peft\ntags:\n- base_model:adapter:{tmp_path}/base\n- lora\n"
        "- mine\n---\n\n# Model Card for Model ID\n\n- **Developed by:** [More Information Needed]\n"
    )
    (tmp_path / "README.md").write_text(peft)
    carry_model_card(None, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert str(tmp_path) not in text and "More Information" not in text and "Model ID" not in text


def test_recommended_settings_are_commands_of_the_cards_own_names(card_path):
    early = EngineConfiguration(
        title="greedy decoding, batch size 1",
        serving_engine="llama.cpp",
        num_assistant_tokens=6,
        flags=["--spec-draft-p-min 0.4"],
        command="of another machine: /home/me/draft",
        language="bash",
    )
    with pytest.raises(ValueError, match=r"is no card of a draft\. Save the draft"):
        recommend_in_card(card_path, [early])
    extend_model_card(card_path, CardFacts(draft_name="me/my-draft", **OPTIONS))
    for number in (5, 6):  # the second replaces the first
        recommend_in_card(card_path.parent, [dataclasses.replace(early, num_assistant_tokens=number)])
    text = card_path.read_text()
    section = text[text.index("### Recommended configuration") :]
    assert "llama.cpp, greedy decoding, batch size 1:" in section and "/home/me" not in section
    commands = section.partition("```bash\n")[2].partition("\n```")[0]
    assert commands.endswith("--spec-draft-n-max 6 --spec-draft-p-min 0.4")
    assert "me/my-draft" in commands and "org/target" in commands
    assert text.count("### Recommended configuration") == 1
    assert CardFacts.read(text).configurations[0]["flags"] == ["--spec-draft-p-min 0.4"]
    extend_model_card(card_path, CardFacts(draft_name="me/my-draft", **OPTIONS))
    assert "Recommended" not in card_path.read_text()


@pytest.mark.parametrize("damage", [{"serving_engine": "x"}, {"num_assistant_tokens": "many"}, {"flags": None}, None])
def test_damaged_settings_are_no_facts(damage):
    good = {"title": "t", "serving_engine": "vllm", "num_assistant_tokens": 2, "flags": []}
    assert CardFacts.read(CardFacts(configurations=[good]).write()).configurations == [good]
    bad = "x" if damage is None else {**good, **damage}
    assert CardFacts.read(CardFacts(configurations=[bad]).write()) is None
