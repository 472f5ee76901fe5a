"""Generated completions against `generate` and plain loops over one text at a time."""

import copy

import pytest
import torch
from datasets import Dataset, IterableDataset
from tiny import build_llama
from transformers import GenerationConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from spec_kd.sampling.options import SamplingOptions
from spec_kd.sampling.prompts import get_max_length
from spec_kd.trainer.online.rows import (
    RepeatedWindows,
    Window,
    add_placeholders,
    check_row_room,
    draw_rows,
    find_prompt,
    is_prompts_only,
    join_row,
    number_rows,
    read_rows,
)
from spec_kd.trainer.online.writers import ModelWriter

PROMPTS = [[7, 8, 9, 10, 11], [20], [30, 31], [40, 41, 42, 43, 44, 45, 46], [50, 51, 52]]


@pytest.fixture
def models(draft, target):
    return {"draft": draft, "target": target}


def build_writer(tokenizer, temperature=0.0, max_new_tokens=10, top_k=0, top_p=1.0, **kwargs):
    options = SamplingOptions(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    return ModelWriter(options, tokenizer, **kwargs)


def generate_alone(model, prompt, max_new_tokens=10):
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=1,
        pad_token_id=0,
    )  # fmt: skip
    return output[0, len(prompt) :].tolist()


def write(writer, models, prompts=PROMPTS, seed="s"):
    return [completion.ids for completion in writer.write(models, prompts, seed)]


@pytest.mark.parametrize(
    ("sample_from", "mix", "name"),
    [("draft", 0.5, "draft"), ("target", 0.5, "target"), ("mixed", 1.0, "draft"), ("mixed", 0.0, "target")],
)
@pytest.mark.parametrize("batch_size", [None, 2])
def test_greedy_text_is_the_writers_own(models, tokenizer, sample_from, mix, name, batch_size):
    written = write(build_writer(tokenizer, sample_from=sample_from, mix=mix, batch_size=batch_size), models)
    assert written == [generate_alone(models[name], prompt) for prompt in PROMPTS]
    other = {"draft": "target", "target": "draft"}[name]
    assert written != [generate_alone(models[other], prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("mix", [1.0, 0.0])
def test_mixed_at_its_ends_samples_as_one_writer(models, tokenizer, mix):
    mixed = write(build_writer(tokenizer, 1.0, sample_from="mixed", mix=mix), models)
    alone = write(build_writer(tokenizer, 1.0, sample_from="draft" if mix else "target"), models)
    assert mixed == alone


def test_every_token_of_mixed_text_is_one_writers_choice(models, tokenizer):
    written = write(build_writer(tokenizer, sample_from="mixed", mix=0.3), models, PROMPTS * 8)
    by_draft, distinct = 0, 0
    for prompt, completion in zip(PROMPTS * 8, written, strict=True):
        for i, token in enumerate(completion):
            ids = torch.tensor([prompt + completion[:i]])
            with torch.no_grad():
                choices = {name: int(model(ids).logits[0, -1].argmax()) for name, model in models.items()}
            assert token in choices.values()
            distinct += choices["draft"] != choices["target"]
            by_draft += token == choices["draft"] != choices["target"]
    assert distinct > 200
    assert by_draft / distinct == pytest.approx(0.3, abs=0.1)


def test_sampled_tokens_have_the_drafts_distribution(models, tokenizer):
    writer = build_writer(tokenizer, 0.7, max_new_tokens=1)
    written = torch.tensor(write(writer, models, [[7, 8, 9]] * 4000)).flatten()
    frequencies = torch.bincount(written, minlength=261) / len(written)
    with torch.no_grad():
        expected = (models["draft"](torch.tensor([[7, 8, 9]])).logits[0, -1] / 0.7).softmax(-1)
    assert (frequencies - expected).abs().max() < 0.03
    assert (frequencies - expected).abs().sum() < 0.25  # of 2; 261 ids from 4,000 draws
    plain = (models["draft"](torch.tensor([[7, 8, 9]])).logits[0, -1].detach()).softmax(-1)
    assert (frequencies - plain).abs().sum() > (frequencies - expected).abs().sum()


def test_top_k_of_one_is_greedy_and_the_seed_decides_the_rest(models, tokenizer):
    assert write(build_writer(tokenizer, 1.0, top_k=1), models) == write(build_writer(tokenizer), models)
    writer = build_writer(tokenizer, 1.0)
    assert write(writer, models) == write(writer, models) != write(writer, models, seed="other")


def test_the_models_eos_ends_a_completion_and_shipped_sampling_does_not_count(models, tokenizer):
    draft = models["draft"]
    plain = write(build_writer(tokenizer), models)
    end = plain[0][3]
    draft.generation_config = GenerationConfig(
        eos_token_id=[end], do_sample=True, temperature=5.0, repetition_penalty=3.0, max_length=3, use_cache=False
    )
    completions = build_writer(tokenizer).write(models, PROMPTS, "s")
    for completion, whole in zip(completions, plain, strict=True):
        assert completion.ids == (whole[: whole.index(end) + 1] if end in whole else whole)
        assert completion.finish_reason == ("stop" if end in whole or whole[-1] == 1 else "length")
    assert {completion.finish_reason for completion in completions} >= {"stop"}


def test_ids_beyond_the_vocabulary_are_never_written(tokenizer):
    padded = {}
    for name, seed in (("draft", 0), ("target", 1)):
        padded[name] = build_llama(seed=seed, vocab_size=288, tie=False)
        with torch.no_grad():
            padded[name].lm_head.weight[261:] *= 50  # would win every argmax
    for temperature in (0.0, 1.0):
        for sample_from in ("draft", "target", "mixed"):
            written = write(build_writer(tokenizer, temperature, sample_from=sample_from), padded)
            assert max(map(max, written)) < 261


def test_modes_configs_and_random_state_are_left_alone(models, tokenizer):
    draft = models["draft"].train()
    draft.model.layers[0].eval()
    modes = [module.training for module in draft.modules()]
    configs = {name: copy.deepcopy(model.generation_config.to_dict()) for name, model in models.items()}
    state = torch.get_rng_state()
    write(build_writer(tokenizer, 1.0, sample_from="mixed"), models)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in draft.modules()] == modes
    assert {name: model.generation_config.to_dict() for name, model in models.items()} == configs
    assert all(parameter.grad is None for parameter in draft.parameters())


def test_no_prompts_are_no_work(models, tokenizer):
    assert build_writer(tokenizer).write(models, [], "s") == []


def test_rows_are_drawn_with_probability_lmbda():
    numbers = range(4000)
    assert all(draw_rows(numbers, 1.0, "a")) and not any(draw_rows(numbers, 0.0, "a"))
    drawn = draw_rows(numbers, 0.3, "a")
    assert sum(drawn) / 4000 == pytest.approx(0.3, abs=0.03)
    assert drawn == draw_rows(numbers, 0.3, "a") != draw_rows(numbers, 0.3, "b")


@pytest.mark.parametrize("sample_from", ["draft", "mixed"])
def test_two_processes_write_what_one_does(models, tokenizer, sample_from):
    """Two batches of two rows on each of two processes are two batches of four."""
    own = [number_rows([2, 2], 2, process, 2) for process in (0, 1)]
    assert own == [[0, 1, 4, 5], [2, 3, 6, 7]]
    writer, prompts = build_writer(tokenizer, 1.0, sample_from=sample_from), [*PROMPTS, [50, 51, 52], [60], [20]]
    together = writer.write(models, prompts, "s")
    for numbers in own:
        assert writer.write(models, [prompts[i] for i in numbers], "s", numbers) == [together[i] for i in numbers]
    assert together != writer.write(models, prompts, "t")
    assert together[4] != together[5] and together[1] != together[7]  # the same prompt, other numbers


def test_rows_survive_the_collator():
    rows = [join_row([5, 6], [7, 0, 1]), join_row([0, 8, 9, 10], [11])]  # id 0 is the padding too
    assert rows[0]["labels"] == [-100, -100, 7, 0, 1]
    batch = DataCollatorForLanguageModeling(pad_token_id=0, pad_to_multiple_of=8)(rows)
    assert batch["input_ids"].shape == (2, 8)
    assert read_rows(batch) == rows
    assert [find_prompt(row, "Row") for row in rows] == [[5, 6], [0, 8, 9, 10]]


@pytest.mark.parametrize(
    ("labels", "message"),
    [([1, 2, 3], "no prompt"), ([-100] * 3, "no completion"), ([-100, 2, -100], "after its first completion token")],
)
def test_rows_without_one_completion_are_refused(labels, message):
    with pytest.raises(ValueError, match=f"Row 7 .*{message}"):
        find_prompt({"input_ids": [1, 2, 3], "labels": labels}, "Row 7")


def test_prompts_without_room_are_named(models):
    rows = [join_row([5] * 3, [1]), join_row([5] * 500, [1]), join_row([5] * 4, [1])]
    limits = {role: get_max_length(model) for role, model in models.items()}
    check_row_room(rows, limits, 12, "the set")
    with pytest.raises(ValueError, match=r"row 1 of the set has 500 tokens.*`max_new_tokens=13` in the draft's 512"):
        check_row_room(rows, limits, 13, "the set")


def test_prompts_become_rows(tokenizer):
    prompts = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "bc"}]]
    dataset = Dataset.from_dict({"prompt": prompts})
    expected = [tokenizer.apply_chat_template(p, add_generation_prompt=True)["input_ids"] for p in prompts]
    assert is_prompts_only(dataset)
    for made in (dataset, IterableDataset.from_generator(lambda: iter(dataset))):
        assert [row["prompt_ids"] for row in add_placeholders(made, tokenizer)] == expected
    assert not is_prompts_only(Dataset.from_dict({"prompt_ids": [[1]], "completion_ids": [[1]]}))
    assert not is_prompts_only(Dataset.from_dict({"text": ["a"]}))


def test_windows_are_repeated_and_the_rest_comes_once():
    sampler = RepeatedWindows(range(7), window=3, repeats=2, seed=0)
    assert list(sampler) == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5, 6]
    assert len(sampler) == 13


def test_random_windows_follow_from_seed_and_epoch():
    def draw(seed, epoch):
        sampler = RepeatedWindows(torch.utils.data.RandomSampler(range(12)), window=4, repeats=2, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert draw(0, 0) == draw(0, 0) != draw(0, 1)
    assert draw(0, 0) != draw(5, 0)
    assert sorted(draw(0, 1)) == sorted([*range(12)] * 2)


def test_a_window_is_read_again_and_so_is_one_of_an_earlier_version(tmp_path):
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[-100, 6, 7]])}
    window = Window(source=[batch], batches=[batch], generated=[[[5], [6, 7]]], uses=2)
    window.save(tmp_path / "new.pt")
    torch.save({"source": [batch], "batches": [batch], "texts": [[[5], [6, 7]]], "uses": 2}, tmp_path / "old.pt")
    for name in ("new.pt", "old.pt"):
        loaded = Window.load(tmp_path / name)
        assert loaded.holds([batch]) and not loaded.holds([{**batch, "input_ids": torch.tensor([[5, 6, 8]])}])
        assert (loaded.generated, loaded.uses) == (window.generated, 2)
