"""Syntheses that are killed, repeated and changed, and real targets that learned to write queries."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from scripted_engine import TOOLS, WORDS, ScriptedEngine, drawn, get_queries, synthesize
from tiny import build_llama, build_tokenizer

from spec_kd.engines import TransformersEngine
from spec_kd.prompts.filters import TextFilter
from spec_kd.prompts.synthesis.synthesis import synthesize_queries

LONG_RUN = dict(num_turns=[1, 2], temperature=[0.8, 1.0], tool_catalog=TOOLS, round_size=6, batch_size=2, seed=3)


def test_a_run_killed_at_any_moment_ends_with_the_same_set(tmp_path):
    whole = synthesize(drawn, 14, **LONG_RUN)
    engine = ScriptedEngine(drawn)
    stored = synthesize(engine, 14, output_dir=str(tmp_path / "whole"), **LONG_RUN)
    assert stored.dataset.to_list() == whole.dataset.to_list() and stored.report == whole.report
    num_calls = len(engine.calls)
    for moment in range(2, num_calls, 5):
        folder = str(tmp_path / f"killed-{moment}")
        child = os.fork()
        if child == 0:  # no clean-up of any kind: the process is gone in the middle of a batch
            signal.alarm(60)  # so that nothing hangs if the process cannot work after a fork
            try:
                synthesize(KilledEngine(moment), 14, output_dir=folder, **LONG_RUN)
            finally:
                os._exit(1)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        resumed = ScriptedEngine(drawn)
        result = synthesize(resumed, 14, output_dir=folder, **LONG_RUN)
        assert result.dataset.to_list() == whole.dataset.to_list() and result.report == whole.report
        # Of what was done at most one shard, of eight batches, is done again; two batches here.
        assert num_calls - moment <= len(resumed.calls) < num_calls - moment + 8
        assert load_dataset(folder, cache_dir=str(tmp_path / "cache"))["train"].to_list() == whole.dataset.to_list()


class KilledEngine(ScriptedEngine):
    """Kills its process at a certain call."""

    def __init__(self, moment):
        super().__init__(drawn)
        self.moment = moment

    def generate(self, *arguments, **options):
        if len(self.calls) == self.moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().generate(*arguments, **options)


def test_a_finished_folder_asks_nothing_and_refuses_other_settings(tmp_path):
    first = synthesize(drawn, 8, output_dir=str(tmp_path), **LONG_RUN)
    engine = ScriptedEngine(drawn)
    again = synthesize(engine, 8, output_dir=str(tmp_path), **LONG_RUN)
    assert not engine.calls
    assert again.dataset.to_list() == first.dataset.to_list() and again.report == first.report
    more = synthesize(engine, 9, output_dir=str(tmp_path), **LONG_RUN)
    assert more.dataset.to_list() == synthesize(drawn, 9, **LONG_RUN).dataset.to_list()
    for options, name in (
        ({"seed": 4}, "seed"),
        ({"system_prompts": "Steer."}, "system_prompts"),
        ({"tool_catalog": TOOLS[:3]}, "tools"),
        ({"text_filter": TextFilter(min_tokens=5)}, "text_filter"),
        ({"test_set": ["x"]}, "test_set"),
    ):
        with pytest.raises(ValueError, match=f"holds responses of another run.*{name}"):
            synthesize(engine, 8, output_dir=str(tmp_path), **{**LONG_RUN, **options})


def test_the_folder_of_an_earlier_version_is_continued(tmp_path):
    shutil.copytree(Path(__file__).parents[1] / "old/synthesis", tmp_path, dirs_exist_ok=True)
    engine = ScriptedEngine(drawn)
    options = {"num_turns": 2, "temperature": [0.8, 1.0], "system_prompts": "Steer.", "seed": 3}
    result = synthesize(engine, 1, output_dir=str(tmp_path), **options)
    assert not engine.calls and result.report.kept == 1
    assert get_queries(result) == ["Is the paper dark dark lamp dark summer?"]


@pytest.fixture(scope="module")
def learned():
    """A target that learned a few conversations by heart, both sides; its own EOS does not end the user's turn."""
    tokenizer = build_tokenizer()
    tokenizer.eos_token = "<|system|>"
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
        "{{ '<|end|>' if m['role'] == 'user' else '<|system|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    queries = [f"Is a {a} {b} {c}?" for a, b, c in zip(WORDS, WORDS[5:], WORDS[9:], strict=False)]
    rows = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}, {"role": "assistant", "content": "It is."}] * 2)
        for q in queries
    ]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
    model = build_llama(seed=0, hidden_size=64, tie=False, initializer_range=0.05)
    model.generation_config.eos_token_id = None
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        loss = model(input_ids=ids, labels=ids.masked_fill(ids == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), tokenizer, queries


def test_a_real_target_writes_what_it_learned_and_stops_at_the_end_of_the_turn(learned, tmp_path, monkeypatch):
    model, tokenizer, queries = learned
    completions = []

    def generate(*arguments, **options):
        completions.extend(written := plain_generate(*arguments, **options))
        return written

    plain_generate = TransformersEngine.generate
    monkeypatch.setattr(TransformersEngine, "generate", generate)
    options = dict(
        processing_class=tokenizer, temperature=[0.5, 0.7], top_p=[1.0, 0.95], max_new_tokens=100, batch_size=16,
        max_asked=32, seed=1, show_progress=False,
    )  # fmt: skip
    result = synthesize_queries(model, num_queries=32, output_dir=str(tmp_path), **options)
    ends = {c.ids[-1] for c in completions if c.finish_reason == "stop"}
    assert len(completions) == 32 and tokenizer.convert_ids_to_tokens(list(ends)) == ["<|end|>"]
    written = get_queries(result)
    assert len(written) >= 5 and len(set(written) & set(queries)) >= 0.8 * len(written)
    assert synthesize_queries(model, num_queries=32, **options).dataset.to_list() == result.dataset.to_list()


def test_a_real_target_goes_on_after_its_own_answer(learned):
    model, tokenizer, queries = learned
    result = synthesize_queries(
        model, num_queries=3, processing_class=tokenizer, temperature=0.3, num_turns=2, max_new_tokens=60,
        max_completion_tokens=20, near_duplicate_threshold=None, max_asked=12, show_progress=False,
    )  # fmt: skip
    for row in result.dataset:
        user, answer, again = (message["content"] for message in row["prompt"])
        assert answer == "It is."
        assert {user, again} <= set(queries)
    assert len(result.dataset) >= 1
