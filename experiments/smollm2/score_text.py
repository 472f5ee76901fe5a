"""The target reads text once and leaves its distribution at every token: people's conversations, or its completions.

    python -m experiments.smollm2.score_text --domain function_calling --texts conversations --data_dir DATA
    python -m experiments.smollm2.score_text --domain function_calling --texts completions validation

A killed run continues after its last whole shard. `<work_dir>/<domain>/scored/<text>` holds the rows.
"""

import argparse
import time
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from transformers import AutoTokenizer

from experiments.smollm2.conversations import MAX_NEW_TOKENS, load_part
from spec_kd import TransformersEngine, score_completions, tokenize_corpus

TEXTS = {"conversations": None, "completions": "draft", "validation": "validation"}  # and the part it answers


def load_responses(folder: Path, part: str) -> Dataset:
    """What the target wrote to the prompts of a part."""
    return Dataset.from_parquet(str(folder / "completions" / part / "responses.parquet"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", choices=("function_calling", "biology", "general"), required=True)
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS))
    parser.add_argument("--data_dir", type=Path, help="Folder with <domain>/train.jsonl, for conversations.")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/smollm2"))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1).")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    folder = arguments.work_dir / arguments.domain
    target = arguments.work_dir / "target" if arguments.domain == "general" else folder / "target"
    tokenizer = AutoTokenizer.from_pretrained(target)
    engine = TransformersEngine(str(target), tokenizer, init_kwargs={"dtype": "bfloat16"})
    for text in arguments.texts:
        known = {}
        if part := TEXTS[text]:
            rows = load_responses(folder, part)
            known = {"sampling_temperature": 0.0, "max_new_tokens": MAX_NEW_TOKENS}
        else:
            parts = [load_part(arguments.data_dir, arguments.domain, part, tokenizer) for part in ("target", "draft")]
            rows = tokenize_corpus(concatenate_datasets(parts), tokenizer)
        num_tokens = sum(len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows)
        started = time.monotonic()
        output_dir = str(folder / "scored" / text)
        score_completions(engine, rows, batch_size=4, shard_size=256, output_dir=output_dir, **known)
        seconds = time.monotonic() - started
        print(f"{arguments.domain} ({text}): {len(rows)} rows, {num_tokens} tokens, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
