"""The parts of the recordings of serving engines that need no server."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.serving import mlx_worker, record_llama_cpp, record_mlx, record_openvino, record_vllm, worker
from benchmarks.serving import prompts as prompt_selection
from benchmarks.serving.compare import get_limit
from benchmarks.serving.models import cut_layers
from benchmarks.serving.prompts import build_call_schema, find_prompt, read_prompts, read_tools, select_prompts
from benchmarks.serving.recordings import FOLDER, Recording, pack, read_recording, summarize
from tests.tiny import build_llama, build_tokenizer

TOOLS = [{"name": "add", "parameters": {"type": "object"}}, {"name": "sub", "parameters": {"type": "object"}}]
SYSTEM = f"You call functions. The tools [of this user], listed as JSON:\n{json.dumps(TOOLS)}\nReply with a list."


@pytest.fixture
def data_dir(tmp_path):
    """24 prompts in each domain; every fifth is too long."""
    for domain in ("function_calling", "biology", "general"):
        (tmp_path / domain).mkdir()
        with (tmp_path / domain / "test.jsonl").open("w") as file:
            for number in range(24):
                content = f"{domain} {number}" + (" long" * 200 if number % 5 == 0 else "")
                prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
                file.write(json.dumps({"prompt": prompt, "completion": []}) + "\n")
    return tmp_path


def test_prompts_keep_their_line_and_long_ones_are_left_out(data_dir, monkeypatch):
    monkeypatch.setattr(prompt_selection, "MAX_SHORT_TOKENS", 512)  # a token for a byte in the tiny tokenizer
    tokenizer = build_tokenizer()
    prompts = list(read_prompts(data_dir, "biology", tokenizer, max_tokens=512))
    assert [prompt.line for prompt in prompts] == [number for number in range(24) if number % 5]
    assert tokenizer.decode(prompts[0].ids).endswith("biology 1<|end|><|assistant|>")
    selected = select_prompts(data_dir, tokenizer)
    domains = [prompt.domain for prompt in selected.get("greedy-4")]
    assert domains == ["function_calling"] * 16 + ["biology"] * 16 + ["general"] * 16
    assert selected.get("schema-0") == selected.calls and selected.calls[:16] == selected.mixed[:16]
    short = [(prompt.domain, prompt.line) for prompt in selected.get("probabilistic-4")]
    assert short == [(domain, line) for domain in ("biology", "general") for line in range(24) if line % 5]


def test_a_recorded_prompt_is_found_again_and_another_one_is_refused(data_dir):
    tokenizer = build_tokenizer()
    prompt = next(read_prompts(data_dir, "general", tokenizer, max_tokens=512))
    assert find_prompt(data_dir, prompt.describe(), tokenizer) == prompt
    with pytest.raises(ValueError, match=r"Line 1 of general/test\.jsonl gives other token ids"):
        find_prompt(data_dir, {**prompt.describe(), "sha256": "0"}, tokenizer)
    with pytest.raises(ValueError, match="has no line 24"):
        find_prompt(data_dir, {**prompt.describe(), "line": 24}, tokenizer)


def test_the_schema_of_calls_names_the_tools_of_the_prompt(data_dir):
    prompt = next(read_prompts(data_dir, "function_calling", build_tokenizer()))
    assert read_tools(prompt.messages) == TOOLS
    schema = build_call_schema(TOOLS)
    assert schema["items"]["properties"]["name"] == {"enum": ["add", "sub"]}
    assert schema["items"]["required"] == ["name", "arguments"]


LOG = """1.40.466.696 I slot   operator(): id  3 | task 5 | accepted  1/ 4 draft tokens
1.40.467.102 I slot   operator(): id  4 | task 4 | accepted  0/ 4 draft tokens
1.41.467.102 I slot print_timing: id  3 | task 5 | draft acceptance = 0.5 (    3 accepted /     6 generated)
1.41.467.102 I slot   operator(): id  3 | task 5 | accepted  2/ 2 draft tokens
"""


def test_the_rounds_of_a_slot_are_read_from_the_log(tmp_path, monkeypatch):
    assert record_llama_cpp.read_rounds(LOG, 3) == ([4, 2], [1, 2])
    log = tmp_path / "server.log"
    log.write_text("id  3 | task 1 | accepted  9/ 9 draft tokens\n" + LOG)
    start = log.read_text().index(LOG)
    assert record_llama_cpp.wait_for_rounds(log, start, 4, num_drafted=4) == ([4], [0])
    monkeypatch.setattr(record_llama_cpp.time, "sleep", lambda seconds: None)
    with pytest.raises(RuntimeError, match="tells of 4 drafted tokens, the answer of 8"):
        record_llama_cpp.wait_for_rounds(log, start, 4, num_drafted=8)


def make_record(setting: str, sha256: str, **values) -> dict:
    record = {"setting": setting, "prompt": {"sha256": sha256}, "completion_ids": [1, 2], "drafted": 4, "accepted": 1}
    return {**record, **values}


def test_a_recording_continues_after_its_last_whole_line(tmp_path):
    path = tmp_path / "engine.jsonl"
    Recording(path).append(make_record("greedy-4", "a"))
    path.write_text(path.read_text() + '{"setting": "greedy-4", "pro')
    recording = Recording(path)
    assert recording.has("greedy-4", {"sha256": "a"})
    assert not recording.has("greedy-4", {"sha256": "b"}) and not recording.has("greedy-2", {"sha256": "a"})
    recording.append(make_record("greedy-4", "b", accepted=3))
    assert [record["prompt"]["sha256"] for record in read_recording(path)] == ["a", "b"]
    assert summarize(path) == {"greedy-4": {"requests": 2, "tokens": 4, "drafted": 8, "accepted": 4}}
    packed = pack(path, tmp_path / "packed")
    content = packed.read_bytes()
    assert list(read_recording(packed)) == list(read_recording(path))
    assert pack(path, tmp_path / "packed").read_bytes() == content


def test_the_draft_is_the_target_without_some_layers(tmp_path):
    target = build_llama(layers=4)
    target.save_pretrained(tmp_path / "target")
    build_tokenizer().save_pretrained(tmp_path / "target")
    cut_layers(tmp_path / "target", tmp_path / "draft", dropped=(1, 2))
    draft = AutoModelForCausalLM.from_pretrained(tmp_path / "draft").eval()
    target.model.layers = torch.nn.ModuleList([target.model.layers[0], target.model.layers[3]])
    ids = torch.tensor([[7, 8, 9, 10]])
    with torch.no_grad():
        assert torch.equal(draft(ids, use_cache=False).logits, target(ids, use_cache=False).logits)
        together = draft.generate(ids, max_new_tokens=4, do_sample=False)[0]
        assert together.tolist() == target.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)[0].tolist()


def test_answers_of_vllm_get_the_names_of_a_recording():
    metrics = {
        "num_draft_tokens": 8,
        "num_accepted_draft_tokens": 3,
        "per_step_accepted": [1, 2],
        "per_step_drafted": [4, 4],
    }
    answer = {"completion_ids": [5, 6, 7, 8, 9, 2], "finish_reason": "stop", "stop_reason": None, "counters": {}}
    record = record_vllm.describe({**answer, "speculative_decoding": metrics})
    assert (record["drafted"], record["accepted"], record["accepted_per_round"]) == (8, 3, [1, 2])
    assert record["ended_by_eos"]
    plain = record_vllm.describe({**answer, "finish_reason": "length", "speculative_decoding": None})
    assert plain["drafted"] == 0 and plain["drafted_per_round"] == [] and not plain["ended_by_eos"]


def test_a_missing_vllm_is_named_with_the_script_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"build_vllm_cpu\.sh"):
        record_vllm.WORKER.find_python()


def install_script(folder, script: str) -> None:
    """A shell script where the benchmark looks for vLLM's Python."""
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)


def test_answers_are_taken_as_they_come_and_a_failed_engine_shows_its_log(tmp_path, monkeypatch):
    install_script(
        tmp_path, """printf '{"n": 1}\\n{"n"' > "$3"; sleep 0.2; printf ': 2}\\n' >> "$3"; echo no memory; exit 3"""
    )
    monkeypatch.setenv("VLLM_CPU", str(tmp_path))
    monkeypatch.setattr(worker, "POLL_INTERVAL", 0.02)
    answers = record_vllm.WORKER.run({}, tmp_path / "work", cores=None)
    assert next(answers) == {"n": 1} and next(answers) == {"n": 2}
    with pytest.raises(RuntimeError, match="status 3:\nno memory"):
        next(answers)


def test_rounds_of_mlx_end_with_the_token_of_the_target():
    assert mlx_worker.count_rounds([False, True, True, False, False, True]) == [0, 2, 0, 1]
    assert mlx_worker.count_rounds([True, True]) == [2] and mlx_worker.count_rounds([False]) == [0]
    calls = ["draft", "target", *["draft"] * 4, "target", *["draft"] * 2, "target", "target", "draft"]
    assert mlx_worker.count_drafted(calls) == [4, 2, 0]


def test_a_watched_model_notes_its_calls():
    calls = []
    model = mlx_worker.Watched(len, "draft", calls)
    assert model([1, 2]) == 2 and calls == ["draft"] and model.__name__ == "len"


def test_answers_of_mlx_and_openvino_get_the_names_of_a_recording():
    told = {"completion_ids": [5, 6, 2], "version": "v", "accepted": 1}
    rounds = {"accepted_per_round": [1, 0], "drafted_per_round": [4, 4], "dtypes": ["float32"], "finish_reason": "stop"}
    record = record_mlx.describe({**told, **rounds})
    assert record["drafted"] == 8 and record["ended_by_eos"] and record["dtypes"] == ["float32"]
    record = record_openvino.describe({**told, "drafted": 4, "eos_token_id": 2})
    assert (record["drafted"], record["accepted"], record["stop_type"]) == (4, 1, "eos")
    assert not record_openvino.describe({**told, "drafted": 4, "eos_token_id": 7})["ended_by_eos"]


def read_speculative(name: str, without: tuple[str, ...] = ()) -> list[dict]:
    """The records of all settings with drafts, without some kinds of them."""
    kept = [record for record in read_recording(FOLDER / name) if not record["setting"].endswith("-0")]
    return [record for record in kept if record["setting"].split("-")[0] not in without]


def get_num_draft_tokens(record: dict) -> int:
    return int(record["setting"].split("-")[1])


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.gz")))
def test_the_rounds_of_a_committed_recording_add_up_to_its_totals(name):
    records = read_speculative(name)
    assert len({(record["setting"], record["prompt"]["sha256"]) for record in records}) == len(records) > 0
    for record in records:
        assert 0 <= record["accepted"] <= record["drafted"]
        if not name.startswith("openvino"):  # which tells totals alone
            assert sum(record["drafted_per_round"]) == record["drafted"]
            assert sum(record["accepted_per_round"]) == record["accepted"]
        assert len(record["completion_ids"]) <= get_limit(record)
        assert max(record.get("drafted_per_round", ()), default=0) <= get_num_draft_tokens(record)


def test_llama_server_drafts_what_the_token_limit_leaves():
    for record in read_speculative("llama_cpp.jsonl.gz", without=("ngram", "probabilistic")):
        limit, written = record["request"]["n_predict"], 1  # the first token comes from the prompt's pass
        for drafted, accepted in zip(record["drafted_per_round"], record["accepted_per_round"], strict=True):
            assert drafted == min(get_num_draft_tokens(record), limit - written - 1) > 0
            written += accepted + 1
        # With one token left the server drafts nothing
        written += written == limit - 1 and record["stop_type"] == "limit"
        # An accepted EOS in the draft's last place is followed by one more token that is not put out
        length = len(record["completion_ids"])
        assert written == length or (record["ended_by_eos"] and written in (length - 1, length + 1))


def test_vllm_drafts_the_full_number_past_the_end():
    for record in read_speculative("vllm.jsonl.gz", without=("ngram", "schema")):
        assert set(record["drafted_per_round"]) <= {get_num_draft_tokens(record)}
        written = 1 + sum(accepted + 1 for accepted in record["accepted_per_round"])
        last = record["accepted_per_round"][-1] + 1 if record["accepted_per_round"] else 0
        assert written - last < len(record["completion_ids"]) <= written or len(record["completion_ids"]) == 1


def test_greedy_text_is_the_same_with_every_number_of_drafted_tokens_and_in_both_engines():
    texts: dict[str, set] = {}
    for name in ("llama_cpp.jsonl.gz", "vllm.jsonl.gz"):
        for record in read_recording(FOLDER / name):
            if record["setting"].startswith("greedy"):
                texts.setdefault(record["prompt"]["sha256"], set()).add(tuple(record["completion_ids"]))
    assert len(texts) == 48
    assert sum(len(variants) == 1 for variants in texts.values()) >= 46  # float rounding may flip an argmax
