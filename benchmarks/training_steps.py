"""What a step of each trainer costs at the size of real models: seconds, where they go, and peak memory.

    python -m benchmarks.training_steps                    # Qwen2.5-0.5B <- 7B, a GPU with 80 GB, about 4 minutes
    python -m benchmarks.training_steps --pair tiny        # a look, on any machine; writes nothing

The models have the shapes of real ones and random weights, so nothing is fetched and nothing is learnt that anyone
would want: a step costs what it costs. Their heads are scaled until the target's distribution is as sharp as a trained
one's. Bf16, rows of 1,024 tokens of which three quarters are the answer, trainer options at their defaults.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Trainer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from benchmarks.harness import describe_machine
from benchmarks.training_steps_report import write_report
from spec_kd import (
    BlackBoxSFTConfig,
    BlackBoxSFTTrainer,
    OnlineGKDConfig,
    OnlineGKDTrainer,
    WhiteBoxDistillConfig,
    WhiteBoxDistillTrainer,
    generate_responses,
)
from spec_kd.data.responses import score_completions

RESULTS = Path(__file__).parent / "results"
SHARPER = 3.0  # logits have this standard deviation, and the distribution an entropy of some nats less than ln V
WARM_UPS = 4  # compiling is in them
PARALLEL = 4  # tokens that one pass of a parallel draft drafts


def describe_qwen(
    hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, rows: int, tied: bool
) -> dict[str, Any]:
    """Arguments of a `Qwen2Config`."""
    return {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": mlp, "vocab_size": rows, "tie_word_embeddings": tied,
        "max_position_embeddings": 4096, "rope_theta": 1e6,
    }  # fmt: skip


# (draft, target, real ids, tokens of a row, rows of a batch, steps measured, steps of on-policy trainers). The real 7B
# has 128 more padding rows than the 0.5B, for which TRL's trainers refuse the pair; here it has as many.
PAIRS = {
    "Qwen2.5-0.5B <- 7B": (
        describe_qwen(896, 24, 14, 2, 4864, 151936, tied=True),
        describe_qwen(3584, 28, 28, 4, 18944, 151936, tied=False),
        151665, 1024, 8, 8, 2,
    ),
    "tiny": (
        describe_qwen(16, 1, 2, 1, 32, 512, tied=True), describe_qwen(32, 1, 2, 1, 64, 512, tied=False),
        500, 64, 2, 3, 2,
    ),
}  # fmt: skip


class StepTimes(TrainerCallback):
    """Seconds from the end of a step to the end of the next, whatever is done between them, and the peak of memory."""

    def __init__(self):
        self.seconds: list[float] = []
        self.peak_bytes = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self._ended = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self._ended)
        self._ended = now
        if torch.cuda.is_available():
            self.peak_bytes = torch.cuda.max_memory_allocated()
            if state.global_step == count_warm_ups(state.max_steps):
                torch.cuda.reset_peak_memory_stats()


def count_warm_ups(num_steps: int) -> int:
    return WARM_UPS if num_steps > WARM_UPS else 1


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def build_tokenizer(num_ids: int) -> PreTrainedTokenizerFast:
    """A word for each id, so that text of n words has n tokens."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(num_ids)}, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="w0", eos_token="w1", unk_token="w2",
        chat_template="{% for m in messages %}{{ m['content'] }} w1 {% endfor %}",
    )  # fmt: skip


def build_model(shape: dict[str, Any], dtype: torch.dtype, seed: int):
    """Random weights on the device, with a head that is sharper than a new one."""
    torch.manual_seed(seed)
    config = Qwen2Config(**shape, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(SHARPER / (config.initializer_range * config.hidden_size**0.5))
        for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            weight[:3].zero_()  # neither EOS nor padding is likely
    return model


def run(trainer_class: type[Trainer], args, draft_shape, rows, tokenizer, **named) -> dict:
    """A new draft trained for the steps of `args`; median seconds, shares, MiB."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    torch.compiler.reset()
    times = StepTimes()
    trainer = trainer_class(
        model=build_model(draft_shape, torch.float32, 1), args=args, train_dataset=rows, processing_class=tokenizer,
        callbacks=[times], **named,
    )  # fmt: skip
    trainer.train()
    kept = times.seconds[count_warm_ups(len(times.seconds)) :]
    log = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    return {
        "seconds": sorted(kept)[len(kept) // 2],
        "peak_mib": times.peak_bytes / 2**20,
        "steps": len(kept),
        "shares": {name: value for name, value in log.items() if name.startswith("time/") and name.endswith("_share")},
    }


def measure_seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    synchronize()
    started = time.perf_counter()
    result = function()
    synchronize()
    return time.perf_counter() - started, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=list(PAIRS), default=next(iter(PAIRS)))
    parser.add_argument("--output", type=Path, default=RESULTS / "training_steps.json")
    args = parser.parse_args()
    draft_shape, target_shape, num_ids, length, batch, steps, online_steps = PAIRS[args.pair]
    tokenizer = build_tokenizer(num_ids)
    target = build_model(target_shape, torch.bfloat16, 2).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, num_ids, ((WARM_UPS + steps) * batch, length), generator=generator)
    prompt = length // 4
    rows = Dataset.from_list([
        {"prompt_ids": row[:prompt].tolist(), "completion_ids": row[prompt:].tolist()} for row in ids
    ])  # fmt: skip
    record: dict[str, Any] = {
        "pair": args.pair, "batch": batch, "length": length, "machine": describe_machine(), "steps": {}, "target": {},
    }  # fmt: skip

    def keep(kind: str, name: str, value: dict) -> None:
        record[kind][name] = value
        print(name, json.dumps(value), file=sys.stderr, flush=True)
        if args.pair != "tiny":
            args.output.write_text(json.dumps(record, indent=2) + "\n")
            write_report(args.output)

    def measure_all(folder: str) -> None:
        common = {
            "output_dir": folder, "per_device_train_batch_size": batch, "max_steps": WARM_UPS + steps,
            "logging_steps": WARM_UPS, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
            "learning_rate": 1e-5, "bf16": True, "use_cpu": not torch.cuda.is_available(),
        }  # fmt: skip
        offline = {**common, "max_length": length}
        online = {**common, "max_steps": 1 + online_steps, "logging_steps": 1}
        text = [{"messages": [{"role": role, "content": " ".join(f"w{i}" for i in part)} for role, part in (
            ("user", row[: prompt - 1].tolist()), ("assistant", row[prompt : -1].tolist())
        )]} for row in ids]  # fmt: skip
        prompts = Dataset.from_list([{"prompt": row["messages"][:1]} for row in text])
        new_tokens, teacher = length // 8, {"teacher_model": target}
        signal = {"teacher_signal": "sampled_logprobs", "num_draws": 50}

        few = rows.select(range(4 * batch))
        score(target, few.select(range(batch)), tokenizer, signal, batch)  # what the first call loads does not count
        for name, kept in (("log p of the token", {"teacher_signal": "token_only"}), ("50 draws", signal)):
            seconds, _ = measure_seconds(lambda kept=kept: score(target, few, tokenizer, kept, batch))
            keep("target", f"scoring, {name} kept", {"tokens_per_second": len(few) * (length - prompt) / seconds})
        cached = score(target, rows, tokenizer, signal, batch)
        for name, kept in (("", signal), ("nothing", {}), ("50 draws", signal)):
            seconds, written = measure_seconds(lambda kept=kept: generate_responses(
                target, few.select_columns(["prompt_ids"]), processing_class=tokenizer, max_new_tokens=new_tokens,
                temperature=1.0, batch_size=len(few), show_progress=False, **kept,
            ))  # fmt: skip
            if name:  # nor does the first text
                tokens = sum(map(len, written["completion_ids"]))
                keep("target", f"writing, {name} kept", {"tokens_per_second": tokens / seconds})

        keep("steps", "BlackBoxSFTTrainer", run(
            BlackBoxSFTTrainer, BlackBoxSFTConfig(**offline), draft_shape, rows, tokenizer
        ))  # fmt: skip
        keep("steps", "WhiteBoxDistillTrainer, cached (50 draws)", run(
            WhiteBoxDistillTrainer, WhiteBoxDistillConfig(**offline), draft_shape, cached, tokenizer
        ))  # fmt: skip
        parallel = WhiteBoxDistillConfig(**offline, num_parallel_tokens=PARALLEL, parallel_mask_token="w2")
        keep("steps", f"WhiteBoxDistillTrainer, cached (50 draws), {PARALLEL} tokens in one pass", run(
            WhiteBoxDistillTrainer, parallel, draft_shape, cached, tokenizer
        ))  # fmt: skip
        keep("steps", "WhiteBoxDistillTrainer, live", run(
            WhiteBoxDistillTrainer, WhiteBoxDistillConfig(**offline), draft_shape, rows, tokenizer, **teacher
        ))  # fmt: skip
        parts = {"per_device_train_batch_size": batch // 4 or 1, "gradient_accumulation_steps": min(batch, 4)}
        keep("steps", "TRL GKDTrainer, offline (lmbda=0)", run(
            GKDTrainer, GKDConfig(**{**common, **parts, "max_length": 2 * length}, lmbda=0.0, beta=0.0), draft_shape,
            Dataset.from_list(text), tokenizer, **teacher,
        ))  # fmt: skip
        keep("steps", f"OnlineGKDTrainer, on policy, {new_tokens} tokens", run(
            OnlineGKDTrainer, OnlineGKDConfig(**online, lmbda=1.0, max_new_tokens=new_tokens), draft_shape, rows,
            tokenizer, **teacher,
        ))  # fmt: skip
        keep("steps", f"TRL DistillationTrainer, on policy, {new_tokens} tokens", run(
            DistillationTrainer, DistillationConfig(**online, beta=0.0, max_completion_length=new_tokens),
            draft_shape, prompts, tokenizer, **teacher,
        ))  # fmt: skip

    with tempfile.TemporaryDirectory() as folder:
        measure_all(folder)


def score(target, rows, tokenizer, signal, batch) -> Dataset:
    return score_completions(
        target, rows, processing_class=tokenizer, sampling_temperature=1.0, batch_size=batch, show_progress=False,
        **signal,
    )  # fmt: skip


if __name__ == "__main__":
    main()
