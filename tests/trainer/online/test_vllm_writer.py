"""Completions by TRL's own `VLLMGeneration`, over stand-ins for vLLM, against those of transformers."""

import dataclasses
import inspect
from types import SimpleNamespace

import fake_vllm
import pytest
import torch
from fake_vllm import FakeClient, FakeLLM
from peft import LoraConfig, get_peft_model
from tiny import build_llama
from transformers import AutoModelForCausalLM
from trl import DistillationConfig
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration

from spec_kd.engines.base import Completion
from spec_kd.heads import unwrap_peft
from spec_kd.sampling.options import SamplingOptions
from spec_kd.trainer.online import vllm_writer
from spec_kd.trainer.online.options import VLLMOptions
from spec_kd.trainer.online.vllm_writer import VLLMWriter, check_vllm, import_vllm_generation
from spec_kd.trainer.online.writers import ModelWriter

PROMPTS = [[7, 8, 9, 10, 11], [20], [30, 31], [40, 41, 42, 43, 44, 45, 46]]
COLOCATED, SERVER = {"vllm_mode": "colocate"}, {"vllm_mode": "server"}


@dataclasses.dataclass
class Arguments(VLLMOptions):
    """The part of an `OnlineGKDConfig` that the writer reads."""

    use_vllm: bool = True
    train_batch_size: int = 4
    gradient_accumulation_steps: int = 2
    generation_batch_size: int | None = None
    trust_remote_code: bool = False
    seed: int = 3


class OneProcess:
    """What the writer and TRL ask of an `Accelerator`."""

    device = torch.device("cpu")
    process_index = local_process_index = 0
    num_processes = 1
    is_main_process = True
    state = SimpleNamespace(deepspeed_plugin=None)

    def gather(self, own):
        return own

    def wait_for_everyone(self):
        pass


class SecondProcess(OneProcess):
    """Of two, of which the first has a number of prompts of its own."""

    process_index = local_process_index = 1
    num_processes = 2
    is_main_process = False

    def __init__(self, other_count):
        self.other_count = other_count

    def gather(self, own):
        return torch.cat([torch.tensor([self.other_count]), own])


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A draft with a path, and vLLM's stand-ins for it."""
    path = str(tmp_path / "draft")

    def save(**kwargs):
        build_llama(**{"seed": 0, **kwargs}).save_pretrained(path)
        fake_vllm.install(monkeypatch, path)
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    return save


def make_writer(model, tokenizer, accelerator=None, max_new_tokens=10, temperature=0.0, top_k=0, **args):
    options = SamplingOptions(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k)
    writer = VLLMWriter(model, accelerator or OneProcess(), tokenizer, options, Arguments(**args))
    return writer, ModelWriter(options, tokenizer)


def find_engine(mode):
    return (FakeLLM if mode == COLOCATED else FakeClient).last.engine


def change(model, seed=7):
    torch.manual_seed(seed)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.1 * torch.randn_like(weight)


@pytest.mark.parametrize("mode", [COLOCATED, SERVER])
def test_text_is_that_of_the_weights_as_they_are_now(saved, tokenizer, mode):
    draft = saved()
    writer, reference = make_writer(draft, tokenizer, **mode)
    written = []
    for step in (0, 1):
        completions = writer.write({}, PROMPTS, f"{step}")
        assert completions == reference.write({"draft": draft}, PROMPTS, "")
        written.append(completions)
        change(draft)
        assert find_engine(mode).syncs == step + 1
    assert written[0] != written[1]


@pytest.mark.parametrize("mode", [COLOCATED, SERVER])
def test_adapters_are_merged_on_the_way_and_apart_afterwards(saved, tokenizer, mode):
    model = get_peft_model(saved(), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    base = {name: weight.clone() for name, weight in model.named_parameters() if not weight.requires_grad}
    writer, reference = make_writer(model, tokenizer, **mode)
    plain = writer.write({}, PROMPTS, "")
    change(model)
    completions = writer.write({}, PROMPTS, "")
    assert completions == reference.write({"draft": unwrap_peft(model)}, PROMPTS, "") != plain
    for name, weight in base.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].data, weight)


def test_eos_ids_are_the_models_and_the_tokenizers(saved, tokenizer):
    draft = saved()
    plain = make_writer(draft, tokenizer)[0].write({}, PROMPTS, "")
    end = plain[0].ids[3]
    draft.generation_config.eos_token_id = end
    completions = make_writer(draft, tokenizer)[0].write({}, PROMPTS, "")
    for completion, whole in zip(completions, plain, strict=True):
        ids = whole.ids[: whole.ids.index(end) + 1] if end in whole.ids else whole.ids
        assert completion == Completion(ids, "stop" if {end, 1} & set(ids) else "length")
    assert completions[0].finish_reason == "stop"


@pytest.mark.parametrize("mode", [COLOCATED, SERVER])
def test_ids_beyond_the_vocabulary_are_never_written(saved, tokenizer, mode):
    draft = saved(vocab_size=288, tie=False)
    with torch.no_grad():
        draft.lm_head.weight[261:] *= 5.0
    options = SamplingOptions(10, 0.0)
    free = draft.generate(torch.tensor([PROMPTS[0]]), do_sample=False, max_new_tokens=10)[0]
    assert (free >= 261).any()
    writer = make_writer(draft, tokenizer, **mode)[0]
    completions = writer.write({}, PROMPTS, "")
    assert max(max(completion.ids) for completion in completions) < 261
    assert completions == ModelWriter(options, tokenizer).write({"draft": draft}, PROMPTS, "")


def test_sampling_follows_from_the_seed_and_leaves_the_random_state_alone(saved, tokenizer):
    draft = saved()
    state = torch.get_rng_state()
    writer = make_writer(draft, tokenizer, temperature=1.0)[0]
    assert torch.equal(torch.get_rng_state(), state)
    written = [writer.write({}, PROMPTS, seed) for seed in ("a", "b", "a")]
    assert written[0] == written[2] != written[1]
    assert torch.equal(torch.get_rng_state(), state)
    assert make_writer(draft, tokenizer, temperature=1.0, top_k=1)[0].write({}, PROMPTS, "a") == make_writer(
        draft, tokenizer
    )[0].write({}, PROMPTS, "b")


@pytest.mark.parametrize(("other_count", "asked"), [(6, 6), (2, 4), (0, 4)])
def test_every_process_asks_for_as_many(saved, tokenizer, monkeypatch, other_count, asked):
    monkeypatch.setattr(vllm_writer, "gather_object", lambda own: ["of 0", *own])
    draft = saved()
    writer, reference = make_writer(draft, tokenizer, SecondProcess(other_count))
    assert writer.write({}, PROMPTS, "of 1") == reference.write({"draft": draft}, PROMPTS, "")
    assert [len(request) for request in FakeLLM.last.engine.requests] == [asked]
    assert FakeLLM.last.engine.requests[0][:4] == PROMPTS


@pytest.mark.parametrize("other_count", [0, 3])
def test_a_process_without_prompts_takes_part_if_any_has_some(saved, tokenizer, monkeypatch, other_count):
    monkeypatch.setattr(vllm_writer, "gather_object", lambda own: ["of 0", *own])
    writer = make_writer(saved(), tokenizer, SecondProcess(other_count))[0]
    assert writer.write({}, [], "of 1") == []
    assert FakeLLM.last.engine.syncs == (other_count > 0)
    assert sum(len(request) for request in FakeLLM.last.engine.requests) == other_count


def test_processes_that_share_a_copy_draw_the_same_tokens(saved, tokenizer, monkeypatch):
    seeds = []
    monkeypatch.setattr(vllm_writer, "gather_object", lambda own: ["of 0", *own])
    monkeypatch.setattr(VLLMGeneration, "__init__", lambda self, **_: None)
    monkeypatch.setattr(VLLMGeneration, "sync_weights", lambda self: seeds.append(torch.initial_seed()))
    monkeypatch.setattr(VLLMGeneration, "generate", lambda self, prompts, **_: (None, [[1]] * len(prompts), None, None))
    draft = saved()
    for group_size, accelerator, seed in (
        (2, SecondProcess(4), "of 1"),
        (1, SecondProcess(4), "of 1"),
        (1, OneProcess(), "of 0"),
    ):
        if accelerator.num_processes == 1:
            monkeypatch.setattr(vllm_writer, "gather_object", lambda own: own)
        make_writer(draft, tokenizer, accelerator, vllm_tensor_parallel_size=group_size)[0].write({}, PROMPTS, seed)
    assert seeds[0] == seeds[2] != seeds[1]


def test_running_out_of_positions_is_an_error(saved, tokenizer):
    writer = make_writer(saved(), tokenizer, vllm_max_model_length=12)[0]
    with pytest.raises(RuntimeError, match=r"after 7 of `max_new_tokens=10`.*raise `vllm_max_model_length`"):
        writer.write({}, PROMPTS[:1], "")


def test_options_reach_vllm(saved, tokenizer):
    draft = saved()
    make_writer(
        draft, tokenizer, generation_batch_size=3, vllm_gpu_memory_utilization=0.4, vllm_max_model_length=100,
        vllm_model_impl="transformers",
    )  # fmt: skip
    given = {"gpu_memory_utilization": 0.4, "max_num_seqs": 3, "model_impl": "transformers", "tensor_parallel_size": 1}
    assert given.items() <= FakeLLM.last.kwargs.items()
    assert FakeLLM.last.max_model_len == 100
    make_writer(draft, tokenizer)
    assert FakeLLM.last.kwargs["max_num_seqs"] == 8
    make_writer(draft, tokenizer, **SERVER, vllm_server_base_url="http://a:1", vllm_group_port=2, vllm_server_timeout=3)
    client = FakeClient.last
    assert (client.base_url, client.group_port, client.connection_timeout) == ("http://a:1", 2, 3)
    make_writer(draft, tokenizer, **SERVER, vllm_server_host="b", vllm_server_port=4)
    assert FakeClient.last.base_url == "http://b:4"


def test_training_rows_have_the_loss_on_the_completion(saved, tokenizer):
    writer = make_writer(saved(), tokenizer)[0]
    row = writer.make_row([7, 8], Completion([9, 1], "stop"))
    assert row == {"input_ids": [7, 8, 9, 1], "labels": [-100, -100, 9, 1]}


def test_trls_classes_still_take_and_give_what_is_relied_on():
    generation = inspect.signature(VLLMGeneration.__init__).parameters
    assert list(generation) == [
        "self", "model", "accelerator", "processing_class", "mode", "structured_outputs_regex", "server_base_url",
        "server_host", "server_port", "server_timeout", "group_port", "tensor_parallel_size", "gpu_memory_utilization",
        "max_model_length", "max_num_seqs", "enable_sleep_mode", "model_impl", "trust_remote_code",
        "repetition_penalty", "temperature", "top_p", "top_k", "min_p", "max_completion_length", "logprobs",
        "generation_kwargs",
    ]  # fmt: skip
    assert (generation["repetition_penalty"].default, generation["min_p"].default) == (1.0, 0.0)
    assert generation["structured_outputs_regex"].default is None
    assert list(inspect.signature(VLLMGeneration.generate).parameters) == [
        "self", "prompts", "images", "num_generations", "profiler",
    ]  # fmt: skip
    assert "(prompt_ids, completion_ids, logprobs, logprob_token_ids)" in inspect.getdoc(VLLMGeneration.generate)
    assert list(inspect.signature(VLLMGeneration.sync_weights).parameters) == ["self"]
    # of the stand-in for the client, which TRL's class calls
    for name in ("__init__", "init_communicator", "update_named_params", "reset_prefix_cache", "generate"):
        real = inspect.signature(getattr(VLLMClient, name)).parameters
        fake = inspect.signature(getattr(FakeClient, name)).parameters
        assert {key for key, p in fake.items() if p.kind is not p.VAR_KEYWORD} <= set(real), name


def test_options_are_trls():
    theirs = {field.name: field.default for field in dataclasses.fields(DistillationConfig) if "vllm" in field.name}
    assert theirs.pop("vllm_structured_outputs_regex") is None  # text of the draft alone is what is distilled on
    assert {field.name: field.default for field in dataclasses.fields(VLLMOptions)} == theirs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vllm_mode": "remote"}, "`vllm_mode` is 'remote', but must be one of colocate, server"),
        ({"sample_from": "target"}, "`sample_from='target'` needs the target as a writer"),
        ({"sample_from": "mixed"}, "`sample_from='mixed'` needs the target as a writer"),
        ({"mode": "streaming"}, "`mode='streaming'` serves requests by this package's own"),
        ({"lmbda": 0.0}, "`lmbda=0` generates none"),
    ],
)
def test_what_vllm_cannot_do_is_refused_by_name(settings, message):
    options = {"mode": "on_policy", "lmbda": 0.5, "sample_from": "draft", **settings}
    vllm_mode = options.pop("vllm_mode", "colocate")
    VLLMOptions(use_vllm=False, vllm_mode=vllm_mode).check_vllm(**options)
    with pytest.raises(ValueError, match=message):
        VLLMOptions(use_vllm=True, vllm_mode=vllm_mode).check_vllm(**options)


def test_a_missing_vllm_says_so(draft):
    with pytest.raises(ImportError, match=r"`use_vllm=True` generates with vLLM, which is not there.*spec_kd\[vllm\]"):
        check_vllm(Arguments(), draft, 1)
    with pytest.raises(ImportError, match="set `use_vllm=False`"):
        import_vllm_generation()


def test_a_draft_that_vllm_could_not_load_is_refused(saved, draft):
    check_vllm(Arguments(), saved(), 1)
    check_vllm(Arguments(), "some/draft", 4)
    with pytest.raises(ValueError, match="the `model` given was made in memory"):
        check_vllm(Arguments(), draft, 1)
    check_vllm(Arguments(vllm_mode="server", vllm_tensor_parallel_size=2), draft, 3)
    with pytest.raises(ValueError, match="`vllm_tensor_parallel_size=2` does not divide the 3 processes"):
        check_vllm(Arguments(vllm_tensor_parallel_size=2), "some/draft", 3)
