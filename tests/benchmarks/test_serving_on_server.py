"""A real llama-server with a tiny pair, where SPEC_KD_LLAMA_SERVER gives the path to its program.

`benchmarks/serving/build_llama_cpp.sh` builds it, with the converter that is needed beside it.
"""

import os
import random
from pathlib import Path
from urllib.error import HTTPError

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.serving import compare
from benchmarks.serving.break_llama_cpp import convert
from benchmarks.serving.broken_pairs import NUM_IDS, build_tokenizer, write_model
from benchmarks.serving.llama_cpp import run_llama_server
from benchmarks.serving.prompts import Prompt
from benchmarks.serving.record_llama_cpp import DRAFT_FLAGS, FLAGS, GREEDY, NGRAM, ask
from spec_kd import measure_server_costs, measure_synthetic_speed

PATH = os.environ.get("SPEC_KD_LLAMA_SERVER")
LIMIT = 24
pytestmark = pytest.mark.skipif(PATH is None, reason="SPEC_KD_LLAMA_SERVER gives no path to a llama-server")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A random target and a draft with some noise on its weights, as models and as GGUF files."""
    folder = tmp_path_factory.mktemp("pair")
    write_model(folder / "target", {}, {}, {}, seed=1, with_weights=True, is_trained=True)
    target, draft = (AutoModelForCausalLM.from_pretrained(folder / "target").eval() for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in draft.model.layers.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
    draft.save_pretrained(folder / "draft")
    build_tokenizer().save_pretrained(folder / "draft")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_CPP", str(Path(PATH).parents[1]))
        errors = convert([(folder / name, folder / f"{name}.gguf") for name in ("target", "draft")])
    assert set(errors.values()) == {None}
    return compare.Pair(draft, target, build_tokenizer(), folder / "scores"), folder


@pytest.mark.parametrize("setting", ["greedy-4", "ngram-4"])
def test_replay_counts_what_the_server_counts(pair, setting, monkeypatch):
    models, folder = pair
    monkeypatch.setenv("LLAMA_CPP", str(Path(PATH).parents[1]))
    generator = random.Random(0)
    prompts = [
        Prompt("tiny", "test", i, [], [generator.randrange(5, NUM_IDS) for _ in range(8 + i)]) for i in range(24)
    ]
    draft, flags = (folder / "draft.gguf", DRAFT_FLAGS) if setting == "greedy-4" else (None, NGRAM)
    records = []
    with run_llama_server(
        folder / "target.gguf",
        folder / f"{setting}.log",
        draft=draft,
        context_length=256,
        flags=[*FLAGS, *flags],
        environment={"LLAMA_TRACE": "1"},
    ) as server:
        for prompt in prompts:
            request = {**GREEDY, "n_predict": LIMIT}
            try:
                records.append({**ask(server, prompt, 0, request), "prompt": prompt.describe(), "request": request})
            except HTTPError as error:
                assert error.code == 400  # random bytes that are no text
    asked = {prompt.describe()["sha256"]: prompt for prompt in prompts}
    result = compare.compare_setting("llama.cpp", setting, records, asked, models)
    assert result["prompts"] >= 8 and result["different"] == []
    assert 0 < result["accepted"]["observed"] < result["drafted"]["observed"]


def test_rounds_are_timed(pair, tmp_path):
    """Times of a tiny pair say nothing; that the server takes the flags, drafts and tells its times does."""
    models = [pair[1] / f"{name}.gguf" for name in ("draft", "target")]
    options = {"server": PATH, "server_flags": "--threads 1", "num_rounds": 64, "repeats": 1, "show_progress": False}
    one, two = measure_server_costs(*models, gammas=(2, 6), batch_sizes=[1, 2], output_dir=tmp_path, **options)
    assert 1 < one.round_cost[2] < one.round_cost[6]
    assert two.batch_size == 2 and two.target_step_seconds > 0 and set(two.round_cost) == {2, 6}
    [speed] = measure_synthetic_speed(*models, [0.9, 0.8], **options)
    assert speed.tokens_per_second > 0 and speed.speedup == pytest.approx(one.predict_speedup(2.7, 2), rel=0.5)
