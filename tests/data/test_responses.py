import json
import signal

import forked
import pytest
import torch
from datasets import Dataset, List, Value, load_dataset
from tiny import build_llama, build_tokenizer
from transformers import GenerationConfig

from spec_kd.data.responses import generate_responses
from spec_kd.engines.transformers import TransformersEngine

TEXTS = ["a", "hello there", "f(x) = 2x", "ünïcödé 🙂", "the quick brown fox", "b", "1 + 1 =", "once upon a time"]


@pytest.fixture
def generate(target, tokenizer):
    """`generate_responses` with this target and small, quiet defaults."""

    def call(prompts=TEXTS, model=target, **options):
        options = {
            "processing_class": tokenizer,
            "max_new_tokens": 12,
            "temperature": 0.0,
            "batch_size": 3,
            "show_progress": False,
            **options,
        }
        return generate_responses(model, prompts, **options)

    return call


@pytest.fixture
def talkative():
    """A target that writes EOS about every twentieth token, so that responses end at different places."""
    model = build_llama(seed=1, hidden_size=48, tie=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)
        model.lm_head.weight[1] = 0.0
        model.lm_head.weight[200:] = 0.0
    return model


def test_greedy_equals_the_target_alone(generate, target, tokenizer):
    dataset = generate()
    assert [tokenizer.decode(ids) for ids in dataset["prompt_ids"]] == TEXTS == dataset["prompt"][:]
    for row in dataset:
        ids = torch.tensor([row["prompt_ids"]])
        alone = target.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        assert row["completion_ids"] == alone[0, ids.shape[1] :].tolist()
        assert row["completion"] == tokenizer.decode(row["completion_ids"], skip_special_tokens=True)
    assert dataset.features["completion_ids"] == dataset.features["prompt_ids"] == List(Value("int32"))


def test_eos_ends_a_response_and_is_kept(generate, talkative):
    talkative.generation_config.eos_token_id = [70, 71, 72]  # beside the tokenizer's own, 1
    dataset = generate(TEXTS * 4, talkative, temperature=1.0, max_new_tokens=40)
    ends = set()
    for row in dataset:
        *body, last = row["completion_ids"]
        assert not {1, 70, 71, 72} & set(body)
        if row["finish_reason"] == "stop":
            ends.add(last)
            assert last in {1, 70, 71, 72}
        else:
            assert len(row["completion_ids"]) == 40
    assert 1 in ends and ends & {70, 71, 72}
    assert set(dataset["finish_reason"]) == {"stop", "length"}


def test_the_shipped_generation_config_does_not_leak(generate, target):
    expected = generate(max_new_tokens=8)["completion_ids"][:]
    sampled = generate(max_new_tokens=8, temperature=1.0)["completion_ids"][:]
    shipped = GenerationConfig(
        do_sample=True,
        top_k=3,
        top_p=0.5,
        temperature=0.3,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        min_new_tokens=8,
        suppress_tokens=list(range(40, 250)),
        eos_token_id=1,
        pad_token_id=0,
    )
    target.generation_config = shipped
    before = shipped.to_dict()
    assert generate(max_new_tokens=8)["completion_ids"][:] == expected
    assert generate(max_new_tokens=8, temperature=1.0)["completion_ids"][:] == sampled
    assert target.generation_config is shipped and shipped.to_dict() == before


def test_sampling_follows_the_softmax_at_its_temperature(generate, talkative):
    n, temperature = 3000, 0.7
    first = torch.tensor(
        [
            ids[0]
            for ids in generate(["a"] * n, talkative, temperature=temperature, max_new_tokens=1, batch_size=500)[
                "completion_ids"
            ]
        ]
    )
    with torch.no_grad():
        p = (talkative(torch.tensor([[5 + sorted_index("a")]])).logits[0, -1, :261] / temperature).softmax(-1)
    frequency = torch.bincount(first, minlength=261) / n
    expected_distance = (2 * p * (1 - p) / (torch.pi * n)).sqrt().sum() / 2
    assert (frequency - p).abs().sum() / 2 < 1.3 * expected_distance
    assert (frequency - p.softmax(-1)).abs().sum() / 2 > (frequency - p).abs().sum() / 2


def sorted_index(character):
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet()).index(character)


def test_sampling_is_reproducible_and_leaves_the_random_state(generate):
    state = torch.get_rng_state()
    one, two, other = (generate(temperature=1.0, seed=s)["completion_ids"][:] for s in (3, 3, 4))
    assert one == two != other
    assert torch.equal(state, torch.get_rng_state())


def test_ids_beyond_the_tokenizer_are_never_written(generate):
    padded = build_llama(seed=2, vocab_size=320, tie=False)
    with torch.no_grad():
        padded.lm_head.weight[261:] = 50 * padded.lm_head.weight[261:].sign()
    for temperature in (0.0, 1.0):
        written = generate(model=padded, temperature=temperature)["completion_ids"]
        assert max(map(max, written)) < 261


def test_modes_are_restored_even_after_an_error(generate, target, monkeypatch):
    target.train()
    target.model.layers[0].eval()
    target.config.use_cache = False
    target.gradient_checkpointing_enable()
    modes = [module.training for module in target.modules()]
    shipped = target.generation_config
    monkeypatch.setattr(target, "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate()
    monkeypatch.undo()
    in_train_mode = generate()["completion_ids"][:]
    assert [module.training for module in target.modules()] == modes
    assert target.generation_config is shipped and target.config.use_cache is False and target.is_gradient_checkpointing
    assert in_train_mode == generate(model=build_llama(seed=1, hidden_size=48, layers=3))["completion_ids"][:]


def test_conversations_with_tools_and_other_columns(generate, tokenizer):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    chats = [[{"role": "user", "content": text}] for text in TEXTS[:3]]
    rows = {
        "prompt": chats,
        "tools": [json.dumps(tools)] * 3,
        "completion": [[{"role": "assistant", "content": "old"}]] * 3,
    }
    dataset = generate(Dataset.from_dict({**rows, "id": [7, 8, 9], "completion_ids": [[1]] * 3}))
    for chat, row in zip(chats, dataset, strict=True):
        rendered = tokenizer.apply_chat_template(chat, tools=tools, add_generation_prompt=True, return_dict=True)
        assert row["prompt_ids"] == rendered["input_ids"]
        assert row["completion"][0]["role"] == "assistant" and row["completion"][0]["content"] != "old"
        assert row["prompt"] == chat
    assert dataset["id"][:] == [7, 8, 9] and dataset["tools"][0] == rows["tools"][0]
    as_list = generate(Dataset.from_list([{"prompt": c, "tools": tools} for c in chats], on_mixed_types="use_json"))
    assert as_list["completion_ids"][:] == dataset["completion_ids"][:]


def test_template_arguments_reach_the_template(generate, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template + "{% if think %}<think>{% endif %}")
    chat = [{"role": "user", "content": "hi"}]
    dataset = generate(Dataset.from_list([{"prompt": chat, "chat_template_kwargs": {"think": True}}]))
    assert tokenizer.decode(dataset[0]["prompt_ids"]).endswith("<|assistant|><think>")


def test_tool_calls_are_rendered_with_the_keys_they_have(generate, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ m | tojson }}{% endfor %}")
    chats = [
        [{"role": "user", "content": "x"}, {"role": "tool", "arguments": {"b": 1, "a": 2}}],
        [{"role": "user", "content": "x"}, {"role": "tool", "arguments": {"c": "text"}}],
    ]
    for prompt_ids, chat in zip(generate(chats)["prompt_ids"], chats, strict=True):
        assert tokenizer.decode(prompt_ids) == "".join(map(json.dumps, chat))


def test_ids_as_prompts(generate):
    from_text = generate()
    from_ids = generate(Dataset.from_dict({"prompt_ids": from_text["prompt_ids"][:]}))
    assert from_ids["completion_ids"][:] == from_text["completion_ids"][:]
    assert from_ids["prompt"][:] == TEXTS
    again = generate(from_text)  # both columns, which agree
    assert again.to_list() == from_text.to_list()


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "empty"),
        ("one text", {}, "list of texts"),
        (["text", [{"role": "user", "content": "x"}]], {}, "list of texts"),
        (Dataset.from_dict({"question": ["a"]}), {}, "question.*neither `prompt`"),
        (["a", ""], {}, "row 1 has no tokens"),
        ([[{"role": "assistant", "content": "x"}]], {}, "row 0 ends with an assistant turn"),
        (Dataset.from_dict({"prompt": ["a"], "prompt_ids": [[9]]}), {}, "Row 0 has 1 `prompt_ids`"),
        (Dataset.from_dict({"prompt_ids": [[9, 261]]}), {}, "id 261, but the target has 261"),
        (["a"], {"temperature": -0.1}, "`temperature` is -0.1, but must be at least 0"),
        (["a"], {"max_new_tokens": 0}, "`max_new_tokens` is 0, but must be at least 1"),
        (["a"], {"batch_size": 0}, "`batch_size` is 0, but must be at least 1"),
        (["a", "bb" * 100], {"max_new_tokens": 400}, "Prompt 1 has 200 tokens.* 512 positions. 1 of 2 prompts"),
    ],
)
def test_bad_input_is_refused_before_generating(generate, target, monkeypatch, prompts, options, message):
    monkeypatch.setattr(target, "generate", lambda **_: pytest.fail("it generated"))
    with pytest.raises((ValueError, TypeError), match=message):
        generate(prompts, **options)


def test_missing_tokens_and_folders_are_refused(generate, target, tmp_path, monkeypatch):
    bare = build_tokenizer()
    bare.eos_token = bare.pad_token = bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        generate([[{"role": "user", "content": "x"}]], processing_class=bare)
    assert generate(["a"], processing_class=bare).num_rows == 1  # EOS from the generation config, which also pads
    target.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="EOS"):
        generate(["a"], processing_class=bare)
    with pytest.raises(ValueError, match="Give `processing_class`"):
        generate(["a"], processing_class=None)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot be written to"):
        generate(["a"], output_dir=tmp_path / "file" / "out")


def test_target_from_a_path(generate, target, tokenizer, tmp_path):
    target.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    loaded = generate(model=str(tmp_path / "target"), processing_class=None)
    assert loaded.to_list() == generate().to_list()


def test_an_interrupted_run_ends_with_the_same_data_set(generate, target, tmp_path, monkeypatch):
    options = {"temperature": 1.0, "batch_size": 2, "shard_size": 2}
    expected = generate(**options)
    answer, calls = TransformersEngine.generate, []

    def fail_in_third_batch(self, prompts, options, signal, seed):
        calls.append(seed)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer(self, prompts, options, signal, seed)

    monkeypatch.setattr(TransformersEngine, "generate", fail_in_third_batch)
    with pytest.raises(KeyboardInterrupt):
        generate(output_dir=tmp_path, **options)
    assert not (tmp_path / "responses.parquet").exists()
    resumed = generate(output_dir=tmp_path, **options)
    assert len(calls) == 5  # two shards were kept, the third and fourth written
    assert resumed.to_list() == expected.to_list() and resumed.features == expected.features

    monkeypatch.setattr(target, "generate", lambda **_: pytest.fail("it generated"))
    assert generate(output_dir=tmp_path, **options).to_list() == expected.to_list()
    on_disk = load_dataset(str(tmp_path), split="train", cache_dir=tmp_path / "cache")
    assert on_disk.to_list() == expected.to_list() and on_disk.features == expected.features


def test_damaged_shards_are_done_again(generate, tmp_path):
    expected = generate(output_dir=tmp_path, batch_size=2, shard_size=2).to_list()
    shards = sorted((tmp_path / ".shards").glob("*.arrow"))
    assert len(shards) == 4
    shards[0].write_bytes(shards[0].read_bytes()[:-20])
    shards[1].write_bytes(shards[1].read_bytes().replace(b"length", b"LENGTH"))
    shards[2].with_name(shards[2].name + ".sha256").unlink()
    (tmp_path / "responses.parquet").write_bytes(b"")
    assert generate(output_dir=tmp_path, batch_size=2, shard_size=2).to_list() == expected
    assert load_dataset(str(tmp_path), split="train", cache_dir=tmp_path / "cache").to_list() == expected


def test_other_columns_of_a_finished_run_are_brought_up_to_date(generate, tmp_path):
    generate(output_dir=tmp_path)
    renamed = generate(Dataset.from_dict({"prompt": TEXTS, "id": range(len(TEXTS))}), output_dir=tmp_path)
    on_disk = load_dataset(str(tmp_path), split="train", cache_dir=tmp_path / "cache")
    assert on_disk.to_list() == renamed.to_list() and "id" in on_disk.column_names


def test_another_run_in_the_folder_is_refused(generate, target, tmp_path):
    generate(output_dir=tmp_path)
    with pytest.raises(ValueError, match=r"temperature: 0.0 in the folder, 1.0 now.*Choose another"):
        generate(output_dir=tmp_path, temperature=1.0)
    with pytest.raises(ValueError, match=r"\(prompts: "):
        generate(TEXTS[:2], output_dir=tmp_path)
    with torch.no_grad():
        target.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(ValueError, match=r"\(target: "):
        generate(output_dir=tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "responses.parquet").touch()
    with pytest.raises(ValueError, match="no run of this kind"):
        generate(output_dir=tmp_path / "other")


KILLED_RUN = """
import os, signal, sys
from spec_kd.data import shards
from spec_kd.data.responses import generate_responses
from tiny import build_llama, build_tokenizer
replace, count = os.replace, 0
def replace_then_die(source, place):
    global count
    count += 1
    if count == 4:  # manifest, shard 0 and its sum, then shard 1 without its sum
        replace(source, place)
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, place)
shards.os.replace = replace_then_die
generate_responses(build_llama(seed=1, hidden_size=48, layers=3), sys.argv[2:], processing_class=build_tokenizer(),
    max_new_tokens=12, batch_size=3, shard_size=3, temperature=1.0, output_dir=sys.argv[1], show_progress=False)
"""


def test_a_killed_process_leaves_a_run_that_resumes(generate, tmp_path):
    killed = forked.run(KILLED_RUN, tmp_path, *TEXTS)
    assert killed.returncode == -signal.SIGKILL
    assert sorted(p.name for p in (tmp_path / ".shards").glob("0*")) == [
        "00000.arrow",
        "00000.arrow.sha256",
        "00001.arrow",
    ]
    options = {"temperature": 1.0, "shard_size": 3}
    assert generate(output_dir=tmp_path, **options).to_list() == generate(**options).to_list()
