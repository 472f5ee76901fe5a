"""Sharded models without a second process: what is refused, and that a model made whole is sharded again."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from tiny import build_llama, build_tokenizer
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from spec_kd import WhiteBoxDistillConfig, WhiteBoxDistillTrainer
from spec_kd._private import list_fsdp_groups
from spec_kd.heads import is_whole
from spec_kd.sharding import check_fsdp, check_placement, whole_model


@pytest.fixture
def sharded():
    """A model whose parameters are `DTensor`s of one process: a group for each layer, and the root's."""
    if torch.distributed.is_initialized():  # left by what stands in for vLLM
        torch.distributed.destroy_process_group()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    model = build_llama(seed=0)
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=True)
    yield fully_shard(model)
    torch.distributed.destroy_process_group()


def test_groups_are_found_before_the_first_pass_and_after_it(sharded):
    groups = list_fsdp_groups(sharded)
    assert [group.post_forward_mesh_info is not None for group in groups] == [False, True, True]  # the root stays
    sharded(input_ids=torch.tensor([[5, 6]]))
    assert list_fsdp_groups(sharded) == groups


def test_a_model_is_whole_inside_and_sharded_as_before_outside(sharded):
    ids, accelerator = torch.tensor([[5, 6, 7]]), Accelerator(cpu=True)
    expected = build_llama(seed=0)(input_ids=ids).logits
    resharded = [group.post_forward_mesh_info for group in list_fsdp_groups(sharded)]
    assert not is_whole(sharded)
    with whole_model(sharded, accelerator) as model, torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(input_ids=ids).logits, expected)
            assert is_whole(model)  # no pass shards it
    assert not is_whole(sharded)
    assert [group.post_forward_mesh_info for group in list_fsdp_groups(sharded)] == resharded
    sharded(input_ids=ids).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in sharded.parameters())


def test_fsdp1_is_refused_and_losses_of_fsdp2_keep_their_dtype():
    check_fsdp(SimpleNamespace(state=SimpleNamespace()))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    plugin = SimpleNamespace(fsdp_version=2, mixed_precision_policy=policy)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    check_fsdp(accelerator)
    assert plugin.mixed_precision_policy == MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    plugin.fsdp_version = 1
    with pytest.raises(ValueError, match=r"fsdp_version: 2"):
        check_fsdp(accelerator)


def test_placements_that_several_processes_cannot_share_are_refused(sharded):
    model = build_llama(seed=0)
    model.hf_device_map = {"model": 0, "lm_head": 1}
    for teacher, init_kwargs in ((None, {"device_map": "auto"}), (None, {"device_map": {"a": 0, "b": 1}}), (model, {})):
        check_placement(teacher, init_kwargs, False)
        with pytest.raises(ValueError, match=r"`device_map` \(.*FSDP2 or ZeRO-3"):
            check_placement(teacher, init_kwargs, True)
    for teacher, init_kwargs in ((None, {"tp_plan": "auto"}), (sharded, {})):
        with pytest.raises(ValueError, match=r"`tp_plan`.*FSDP2 and ZeRO-3"):
            check_placement(teacher, init_kwargs, False)
    model.hf_device_map = {"": 1}
    check_placement(model, {"device_map": {"": 1}}, True)


def test_a_teacher_on_several_devices_gives_the_loss_of_one(tmp_path):
    """In one process: accelerate takes each layer from its device, here the disk."""
    build_llama(seed=1, layers=3).save_pretrained(tmp_path / "target")
    parts = ("embed_tokens", "rotary_emb", "norm", "layers.0", "layers.2")
    device_map = {"lm_head": "cpu", "model.layers.1": "disk", **{f"model.{part}": "cpu" for part in parts}}
    losses = []
    for init_kwargs in ({}, {"device_map": device_map, "offload_folder": str(tmp_path / "offloaded")}):
        args = WhiteBoxDistillConfig(
            output_dir=str(tmp_path / "run"), max_steps=2, use_cpu=True, bf16=False, report_to=[], save_strategy="no",
            logging_steps=1, disable_tqdm=True, gradient_checkpointing=False, teacher_model_init_kwargs=init_kwargs,
        )  # fmt: skip
        trainer = WhiteBoxDistillTrainer(
            build_llama(seed=0), args, teacher_model=str(tmp_path / "target"), processing_class=build_tokenizer(),
            train_dataset=Dataset.from_list([{"prompt_ids": [7], "completion_ids": [i, 9, 1]} for i in range(16, 32)]),
        )  # fmt: skip
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        is_spread = len(set(getattr(trainer.teacher_model, "hf_device_map", {}).values())) > 1
        assert is_spread == bool(init_kwargs)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
