"""The target completes its domain's prompts, greedily, in llama-server; float16, so that two cores are enough.

    python -m experiments.smollm2.complete_prompts --domain function_calling --data_dir DATA

A killed run continues after its last whole shard. `<work_dir>/<domain>/completions/<part>` holds the responses.
"""

import argparse
from pathlib import Path

from transformers import AutoTokenizer

from benchmarks.serving.llama_cpp import find_tools, run_llama_server
from experiments.smollm2.conversations import MAX_NEW_TOKENS, load_part
from spec_kd import ServerEngine, export_gguf, generate_responses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", choices=("function_calling", "biology", "general"), required=True)
    parser.add_argument("--part", choices=("draft", "validation", "test"), default="draft")
    parser.add_argument("--data_dir", type=Path, required=True, help="Folder with <domain>/train.jsonl.")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/smollm2"))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the server (default: 1).")
    arguments = parser.parse_args()

    folder = arguments.work_dir / arguments.domain
    # The general set belongs to the target that nobody moved
    target = arguments.work_dir / "target" if arguments.domain == "general" else folder / "target"
    tokenizer = AutoTokenizer.from_pretrained(target)
    prompts = load_part(arguments.data_dir, arguments.domain, arguments.part, tokenizer).remove_columns("completion")
    gguf = export_gguf(target, target.parent / f"{target.name}-f16.gguf", llama_cpp_dir=find_tools())
    with run_llama_server(gguf, folder / "server.log", threads=arguments.threads, parallel=4) as server:
        engine = ServerEngine("target", tokenizer, f"{server.url}/v1", max_concurrency=4)
        responses = generate_responses(
            engine,
            prompts,
            max_new_tokens=MAX_NEW_TOKENS,
            temperature=0.0,
            shard_size=32,
            output_dir=str(folder / "completions" / arguments.part),
        )
    num_tokens = sum(map(len, responses["completion_ids"]))
    print(f"{len(responses)} completions of {arguments.domain} ({arguments.part}), {num_tokens} tokens")


if __name__ == "__main__":
    main()
