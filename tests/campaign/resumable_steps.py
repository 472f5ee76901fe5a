"""Steps that go on from what is there (`test_kills.py`): each does its work in a folder, in a process of its own.

A process is killed at the n-th operation on files below its folder: a place that comes again, and all places can be
visited.
"""

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from forked import start
from peft import LoraConfig, get_peft_model
from tiny import build_llama, build_tokenizer

from spec_kd import export_draft, score_completions
from spec_kd.cli.main import main
from spec_kd.cli.rows import load_rows

QUESTIONS = (
    "how do I bake bread", "what is the capital of France", "explain photosynthesis to a child",
    "write a poem about the sea", "fix this python loop for me", "translate good morning to Dutch",
    "why is the sky blue at noon", "plan a week of dinners", "name three prime numbers",
    "who painted the night watch", "convert 10 miles to km", "what does HTTP 404 mean",
)  # fmt: skip
TRAINING = {
    "per_device_train_batch_size": 2, "max_steps": 3, "learning_rate": 1e-2, "use_cpu": True, "report_to": "none",
    "gradient_checkpointing": False, "logging_steps": 1, "save_steps": 1, "max_length": "none",
}  # fmt: skip
ANSWERS = ("--max_new_tokens", 5, "--batch_size", 2, "--shard_size", 2, "--num_prompts", 6)


def prepare(folder: Path) -> None:
    """Models, a log, a curated set, prompts and responses that the steps start from."""
    tokenizer = build_tokenizer()
    for name, model in (
        ("target", build_target()),
        ("draft", build_llama(seed=0)),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    adapted = get_peft_model(
        build_llama(seed=0),
        LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False),
    )
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "draft")
    adapted.save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": f"answer {i}"}]}
        for i, text in enumerate(QUESTIONS)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curated = [{"question": f"{text}, please", "answer": "no"} for text in QUESTIONS]
    (folder / "curated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in curated))
    prompts = [{"prompt": row["messages"][:1]} for row in rows]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    for name in ("logs", "curated"):
        STEPS[name](folder, folder / name)
    for name in ("plain", "sampled_logprobs"):
        STEPS[f"respond, {name}"](folder, folder / name)


def build_target():
    """A target that ends its turns, so that some of the queries that it writes are kept."""
    model = build_llama(seed=1, vocab_size=288, hidden_size=48, tie=False)
    letters = build_tokenizer()("abcdefghijklmnopqrstuvwxyz ")["input_ids"]
    with torch.no_grad():
        mean = model.lm_head.weight[letters].mean(0)
        model.lm_head.weight.copy_(mean.expand_as(model.lm_head.weight) - 3 * mean.sign())
        noise = torch.randn(len(letters), 48, generator=torch.Generator().manual_seed(0))
        model.lm_head.weight[letters] = mean + 0.05 * noise
        model.lm_head.weight[1] = mean
    return model


def call(*arguments: object) -> None:
    """A command; what it says on its last line is the error."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = main([str(argument) for argument in arguments])
    if status:
        raise StepError(said.getvalue().strip().splitlines()[-1])


class StepError(Exception):
    """A command ended with one line on stderr."""


def as_flags(options: dict[str, object]) -> list[object]:
    return [part for name, value in options.items() for part in (f"--{name}", value)]


def build_respond(signal: str | None) -> Callable[[Path, Path], None]:
    def step(given: Path, folder: Path) -> None:
        flags = ["--temperature", 1.0] + (["--teacher_signal", signal] if signal else [])
        call("respond", "--target", given / "target", "--prompts", given / "prompts.jsonl", "--output_dir", folder,
             *ANSWERS, *flags)  # fmt: skip

    return step


def build_train(method: str, responses: str, *flags: object) -> Callable[[Path, Path], None]:
    def step(given: Path, folder: Path) -> None:
        source = given / "prompts.jsonl" if responses == "prompts" else given / responses / "responses.parquet"
        call("train", method, "--draft", given / "draft", "--responses", source, "--target", given / "target",
             "--output_dir", folder, *as_flags(TRAINING), *flags)  # fmt: skip

    return step


def score(given: Path, folder: Path) -> None:
    rows = load_rows(str(given / "plain" / "responses.parquet"))
    score_completions(
        str(given / "target"), rows, teacher_signal="top_k_tail", batch_size=2, shard_size=2, output_dir=str(folder),
        show_progress=False,
    )  # fmt: skip


def export_in_place(given: Path, folder: Path) -> None:
    export_draft(folder, folder, target_vocab_size=288)


def export_over(given: Path, folder: Path) -> None:
    """Over a model whose weights would not fit the new configuration."""
    export_draft(given / "adapter", folder, target_vocab_size=320)


def run_recipe(given: Path, folder: Path) -> None:
    recipe = {
        "target": str(given / "target"), "draft": str(given / "draft"), "output_dir": str(folder), "seed": 3,
        "prompts": {
            "historical": {"paths": str(given / "log.jsonl"), "test_fraction": 0.3},
            "curated": {"dataset": str(given / "curated.jsonl"), "prompt_column": "question", "test_fraction": 0.3},
        },
        "respond": {"temperature": 1.0, "max_new_tokens": 5, "teacher_signal": "token_only", "batch_size": 4,
                    "shard_size": 8},
        "train": {"method": "white_box", "divergence": "forward_kl", **TRAINING, "max_length": None, "max_steps": 2},
        "evaluate": {"costs": "none", "max_new_tokens": 5, "num_prompts": 3, "num_shown_prompts": 1},
    }  # fmt: skip
    path = folder.with_name("recipe.yaml")
    path.write_text(yaml.safe_dump(recipe))
    call("run", path)


STEPS: dict[str, Callable[[Path, Path], None]] = {
    "logs": lambda given, folder: call(
        "prompts", "logs", "--paths", given / "log.jsonl", "--output_dir", folder, "--test_fraction", 0.3
    ),
    "curated": lambda given, folder: call(
        "prompts", "curated", "--dataset", given / "curated.jsonl", "--prompt_column", "question", "--test_fraction",
        0.3, "--output_dir", folder,
    ),
    "mix": lambda given, folder: call(
        "prompts", "mix", "--parts", f"a={given / 'logs'}", f"b={given / 'curated'}", "--output_dir", folder
    ),
    "synthesize": lambda given, folder: call(
        "synthesize", "--target", given / "target", "--output_dir", folder, "--max_new_tokens", 40, "--num_queries", 3,
        "--max_asked", 40, "--round_size", 8, "--near_duplicate_threshold", "none", "--test_fraction", 0.3,
    ),
    "respond, plain": build_respond(None),
    "respond, token_only": build_respond("token_only"),
    "respond, sampled_counts": build_respond("sampled_counts"),
    "respond, sampled_logprobs": build_respond("sampled_logprobs"),
    "respond, top_k_tail": build_respond("top_k_tail"),
    "score": score,
    "train, white-box live": build_train("white_box", "plain"),
    "train, white-box stored": build_train("white_box", "sampled_logprobs"),
    "train, black-box": build_train("black_box", "plain"),
    "train, online on-policy": build_train("online_gkd", "plain", "--max_new_tokens", 4, "--num_iterations", 2),
    "train, online streaming": build_train(
        "online_gkd", "prompts", "--mode", "streaming", "--max_new_tokens", 4, "--num_assistant_tokens", 2
    ),
    "export in place": export_in_place,
    "export over a model": export_over,
    "export to a folder": lambda given, folder: export_draft(given / "adapter", folder, target_vocab_size=288),
    "evaluate": lambda given, folder: call(
        "evaluate", "--draft", given / "draft", "--target", given / "target", "--prompts", given / "prompts.jsonl",
        "--split", "train", "--output_dir", folder, "--costs", "none", "--max_new_tokens", 5, "--num_prompts", 3,
        "--num_shown_prompts", 1,
    ),
    "run": run_recipe,
}  # fmt: skip
# What lies in the folder of a step before it, by its name among what is given.
BEFORE = {"export in place": "adapter", "export over a model": "target"}
OPERATIONS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate")


def run_in_process(step: str, given: Path, folder: Path, *, stop_at: int = 0, file_limit: int = 0) -> tuple[int, dict]:
    """Runs a step in a process of its own.

    Args:
        step (`str`): One of `STEPS`, or `"prepare"`.
        given (`Path`): What it starts from.
        folder (`Path`): Where it works.
        stop_at (`int`, *optional*): The operation on files at which it is killed, from 1; 0 lets it live.
        file_limit (`int`, *optional*): Most bytes of a file, as on a full disk; 0 for no limit.

    Returns:
        The exit code of the process, and what it said: `num_operations`, and `error` with its type where it failed.
    """
    said = folder.with_name("said.json")
    said.unlink(missing_ok=True)
    process = start(_work, step, given, folder, stop_at, file_limit, said)
    process.join()
    return process.exitcode, json.loads(said.read_text()) if said.exists() else {}


def _work(step: str, given: Path, folder: Path, stop_at: int, file_limit: int, said: Path) -> None:
    # What libraries print is kept from the report of the tests
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        torch.set_num_threads(1)
        if step in BEFORE and not folder.exists():
            shutil.copytree(given / BEFORE[step], folder)
        counter = _watch(folder, stop_at)
        if file_limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
        error = None
        try:
            prepare(folder) if step == "prepare" else STEPS[step](given, folder)
        except Exception as raised:
            error = {"type": type(raised).__name__, "text": str(raised), "trace": traceback.format_exc()}
        if file_limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        said.write_text(json.dumps({"num_operations": counter[0], "error": error}))


def _watch(folder: Path, stop_at: int) -> list[int]:
    """Counts the operations that change files below a folder, and kills the process at one of them."""
    counter, below = [0], f"{folder}"

    def hook(event: str, arguments: tuple) -> None:
        if event not in OPERATIONS or not isinstance(arguments[0], str | os.PathLike):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        if os.fspath(arguments[0]).startswith(below):
            counter[0] += 1
            if counter[0] == stop_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return counter
