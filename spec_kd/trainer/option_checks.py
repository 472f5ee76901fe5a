"""Ranges of training options of TRL and transformers, which accept any number there."""

from transformers import TrainingArguments

from spec_kd.checks import check_int, check_number
from spec_kd.open_types import JsonObject

# By name: the bounds of whole numbers as `check_int` takes them.
INTEGERS: dict[str, JsonObject] = {
    "per_device_train_batch_size": {},
    "per_device_eval_batch_size": {},
    "gradient_accumulation_steps": {},
    "eval_accumulation_steps": {"is_optional": True},
    "max_steps": {"minimum": -1},
    "max_length": {"minimum": 2, "is_optional": True},  # a single token has none before it to be predicted from
    "seed": {"minimum": 0, "maximum": 2**32 - 1},
    "data_seed": {"minimum": 0, "maximum": 2**32 - 1, "is_optional": True},
    "save_total_limit": {"minimum": 0, "is_optional": True},
    "dataset_num_proc": {"is_optional": True},
    "dataloader_num_workers": {"minimum": 0},
    "target_vocab_size": {"is_optional": True},
    "vllm_server_port": {"maximum": 65535},
    "vllm_group_port": {"maximum": 65535},
    "vllm_tensor_parallel_size": {},
    "vllm_max_model_length": {"is_optional": True},
}
# By name: the bounds of numbers as `check_number` takes them.
NUMBERS: dict[str, JsonObject] = {
    "learning_rate": {"minimum": 0},
    "num_train_epochs": {"above": 0},
    "weight_decay": {"minimum": 0},
    "adam_beta1": {"minimum": 0, "below": 1},
    "adam_beta2": {"minimum": 0, "below": 1},
    "adam_epsilon": {"minimum": 0},
    "max_grad_norm": {"minimum": 0, "is_optional": True},
    "warmup_steps": {"minimum": 0, "is_optional": True},
    "warmup_ratio": {"minimum": 0, "maximum": 1, "is_optional": True},
    "logging_steps": {"minimum": 0},
    "eval_steps": {"minimum": 0, "is_optional": True},
    "save_steps": {"minimum": 0},
    "label_smoothing_factor": {"minimum": 0, "maximum": 1},
    "vllm_server_timeout": {"above": 0},
    "vllm_gpu_memory_utilization": {"above": 0, "maximum": 1},
    "neftune_noise_alpha": {"minimum": 0, "is_optional": True},
}


def check_training_options(config: TrainingArguments) -> None:
    """Raises `ValueError` for a training option out of its range, NaN and infinities included.

    Args:
        config (`TrainingArguments`): The options; those that it does not have are not checked.
    """
    for name, bounds in INTEGERS.items():
        if hasattr(config, name):
            check_int(name, getattr(config, name), **bounds)
    for name, bounds in NUMBERS.items():
        if hasattr(config, name):
            check_number(name, getattr(config, name), **bounds)
