"""Real conversations of a domain, cut into the parts of this experiment by their place in the file."""

import json
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

DOMAINS = ("function_calling", "biology", "general")
KEPT = Path(__file__).parent / "kept"
# Longer prompts take more time on two cores than they teach: six in ten function-calling prompts are shorter.
MAX_PROMPT_TOKENS = 640
# Calls end by themselves; answers in prose are measured on their first 128 tokens
MAX_NEW_TOKENS = {"function_calling": 256, "biology": 128, "general": 128}
NUM_PROMPTS = 2_500  # for the draft, at most
# Completions at temperature 1, beside the greedy ones: a draft learns little new from a text that it reads six times
NUM_SAMPLED = {"function_calling": 5_000, "biology": 4_000, "general": 2_000}
NUM_VALIDATION = 50  # prompts on which shape, drafted tokens and threads are chosen


def find_target(work_dir: Path, domain: str) -> Path:
    """Folder of the target; the general set belongs to the one that nobody moved."""
    return work_dir / "target" if domain == "general" else work_dir / domain / "target"


def find_fast_dtype() -> str:
    """`"bfloat16"` where the processor multiplies its matrices faster than float32 ones (AMX), else `"float32"`."""
    cpuinfo = Path("/proc/cpuinfo")
    return "bfloat16" if cpuinfo.exists() and "amx_bf16" in cpuinfo.read_text() else "float32"


def read_rows(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def count_prompt_tokens(row: dict, tokenizer: PreTrainedTokenizerBase) -> int:
    text = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def load_part(data_dir: Path, domain: str, part: str, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Conversations with `prompt` and `completion` whose prompt fits.

    Args:
        data_dir (`Path`): Folder with `<domain>/train.jsonl` and `<domain>/test.jsonl`.
        domain (`str`): Name of the domain.
        part (`str`):
            `"target"` (even rows of the training file: what the target is tuned on), `"draft"` (odd rows: prompts that
            the target completes), `"sampled"` (the same prompts, as often as it takes), `"validation"` (the first odd
            rows, which `"draft"` leaves out) or `"test"`.
        tokenizer (`PreTrainedTokenizerBase`): The target's.
    """
    rows = read_rows(data_dir / domain / ("test.jsonl" if part == "test" else "train.jsonl"))
    if part != "test":
        rows = rows[0 if part == "target" else 1 :: 2]
    rows = [row for row in rows if count_prompt_tokens(row, tokenizer) <= MAX_PROMPT_TOKENS]
    if part == "validation":
        rows = rows[:NUM_VALIDATION]
    elif part in ("draft", "sampled"):
        rows = rows[NUM_VALIDATION : NUM_VALIDATION + NUM_PROMPTS]
    if part == "sampled":  # equal prompts side by side, so that a server reads them once
        rows = [rows[i] for i in sorted(number % len(rows) for number in range(NUM_SAMPLED[domain]))]
    return Dataset.from_list(rows)
