"""The target reads text once and leaves its distribution at every token: of whole conversations, or of its completions.

    python -m experiments.smollm2.score_text --domain function_calling

Completions that were written here have their signal already; those that were kept get it. A killed run continues after
its last whole shard. `<work_dir>/<domain>/scored/<text>` holds the rows.
"""

import argparse
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer

from experiments.smollm2.conversations import DOMAINS, MAX_NEW_TOKENS, find_fast_dtype, find_target
from spec_kd import TransformersEngine, score_completions, tokenize_corpus

# Name -> part of the domain, and whether every token is scored, also those that users and tools wrote
TEXTS = {
    "validation": ("validation", False),
    "conversations": ("draft", True),
    "completions": ("draft", False),
    "sampled": ("sampled", False),
}


def load_responses(folder: Path, part: str) -> Dataset:
    """What the target wrote to the prompts of a part."""
    return Dataset.from_parquet(str(folder / "completions" / part / "responses.parquet"))


def load_scored(folder: Path, text: str) -> Dataset:
    """Rows with the target's signal, from this script or from the engine that wrote them."""
    scored, (part, is_whole) = folder / "scored" / text / "responses.parquet", TEXTS[text]
    if scored.exists():
        return Dataset.from_parquet(str(scored))
    rows = load_responses(folder, part)
    if is_whole or "teacher_signal" not in rows.column_names:
        raise ValueError(f"{scored} is missing. Run `python -m experiments.smollm2.score_text --texts {text}`.")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", choices=DOMAINS, required=True)
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS))
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/smollm2"))
    parser.add_argument("--num_rows", type=int, help="Score only the first rows of each text (default: all).")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1).")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    folder = arguments.work_dir / arguments.domain
    target = find_target(arguments.work_dir, arguments.domain)
    tokenizer = AutoTokenizer.from_pretrained(target)
    engine = TransformersEngine(str(target), tokenizer, init_kwargs={"dtype": find_fast_dtype()})
    for text in arguments.texts:
        part, is_whole = TEXTS[text]
        rows = load_responses(folder, part)
        rows = rows.select(range(min(arguments.num_rows or len(rows), len(rows))))
        temperature = 1.0 if text == "sampled" else 0.0
        known = {"sampling_temperature": temperature, "max_new_tokens": MAX_NEW_TOKENS[arguments.domain]}
        if is_whole:
            rows, known = tokenize_corpus(rows.select_columns(["prompt_ids", "completion_ids"]), tokenizer), {}
        elif "teacher_signal" in rows.column_names:
            print(f"{arguments.domain} ({text}): the signal came with the completions.", flush=True)
            continue
        num_tokens = sum(len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows)
        started = time.monotonic()
        output_dir = str(folder / "scored" / text)
        score_completions(
            engine,
            rows,
            teacher_signal="top_k_tail",
            batch_size=1,  # rows of unequal length would be padded, and one fills a core
            shard_size=128,
            output_dir=output_dir,
            **known,
        )
        seconds = time.monotonic() - started
        print(f"{arguments.domain} ({text}): {len(rows)} rows, {num_tokens} tokens, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
