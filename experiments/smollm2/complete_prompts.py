"""The target completes its domain's prompts in vLLM on the CPU: greedily, and some once more by chance.

    python -m experiments.smollm2.complete_prompts --domain function_calling --data_dir DATA

A killed run continues after its last whole shard. `<work_dir>/<domain>/completions/<part>` holds the responses, with
what the target thought of each token where a draft learns from them. The project keeps the ids of the completions,
without the prompts, in `kept/<domain>/completions`; where a part is there, the target is not asked.
"""

import argparse
import gzip
import hashlib
import json
import time
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.serving.run_commands import list_places, start, wait_for_server
from experiments.smollm2.conversations import DOMAINS, KEPT, MAX_NEW_TOKENS, find_fast_dtype, find_target, load_part
from spec_kd import ServerEngine, generate_responses

PARTS = ["test", "validation", "draft", "sampled"]
CONCURRENCY = 96
PORT = 8123
# Long prompts are nine tenths of the tokens: vLLM reads them several times faster than llama-server does.
# On a CPU its 0.32 stops in requests with a seed whose prompt is read in parts ("CPU Generator does not use offset")
COMMAND = (
    "taskset -c {cores} vllm serve {folder} --served-model-name {target} --port {port} --dtype {dtype} "
    "--enforce-eager --max-model-len 1024 --max-num-seqs {num_requests} --max-num-batched-tokens 4096 "
    "--no-enable-chunked-prefill --generation-config vllm"
)


def hash_ids(ids: list[int]) -> str:
    """A short name of a prompt, so that a completion is never given to another one."""
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]


def keep(responses: Dataset, path: Path) -> None:
    """Writes the completions, one line each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"prompt": hash_ids(row["prompt_ids"]), "completion_ids": row["completion_ids"]}) + "\n"
        for row in responses
    ]
    with path.open("wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
        packed.write("".join(lines).encode())


def restore(prompts: Dataset, tokenizer: PreTrainedTokenizerBase, path: Path) -> Dataset:
    """The responses to these prompts as they were kept; raises `ValueError` if they are of other prompts."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        kept = [json.loads(line) for line in file]
    rows = [
        {
            "prompt": prompt,
            "prompt_ids": tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False),
        }
        for prompt in prompts["prompt"]
    ]
    if [hash_ids(row["prompt_ids"]) for row in rows] != [one["prompt"] for one in kept]:
        raise ValueError(f"{path} holds completions of other prompts. Ask the target again, or get the same data.")
    return Dataset.from_list(
        [{**row, "completion_ids": one["completion_ids"]} for row, one in zip(rows, kept, strict=True)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", choices=DOMAINS, required=True)
    parser.add_argument("--parts", nargs="+", default=PARTS, help="Parts of the domain.")
    parser.add_argument("--data_dir", type=Path, required=True, help="Folder with <domain>/train.jsonl.")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/smollm2"))
    parser.add_argument("--cores", default="0", help="Cores of the server, such as 0,1 (default: 0).")
    arguments = parser.parse_args()

    folder = arguments.work_dir / arguments.domain
    target = find_target(arguments.work_dir, arguments.domain)
    tokenizer = AutoTokenizer.from_pretrained(target)
    prompts = {
        part: load_part(arguments.data_dir, arguments.domain, part, tokenizer).remove_columns("completion")
        for part in arguments.parts
    }
    kept = {part: KEPT / arguments.domain / "completions" / f"{part}.jsonl.gz" for part in arguments.parts}
    for part in [part for part in arguments.parts if kept[part].exists()]:
        output = folder / "completions" / part / "responses.parquet"
        if not output.exists():
            output.parent.mkdir(parents=True, exist_ok=True)
            restore(prompts[part], tokenizer, kept[part]).to_parquet(str(output))
        del prompts[part]
    if not prompts:
        return
    command = COMMAND.format(
        folder=target.resolve(),
        target=target,
        cores=arguments.cores,
        port=PORT,
        dtype=find_fast_dtype(),
        num_requests=CONCURRENCY,
    )
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "server.log"
    url = f"http://127.0.0.1:{PORT}"
    with start(command, list_places()["vllm"], folder, log) as process:
        wait_for_server(process, url, log)
        engine = ServerEngine(str(target), tokenizer, f"{url}/v1", max_concurrency=CONCURRENCY, timeout=900)
        for part, asked in prompts.items():
            started = time.monotonic()
            responses = generate_responses(
                engine,
                asked,
                max_new_tokens=MAX_NEW_TOKENS[arguments.domain],
                temperature=1.0 if part == "sampled" else 0.0,
                teacher_signal=None if part == "test" else "top_k_tail",
                shard_size=5 * CONCURRENCY,
                output_dir=str(folder / "completions" / part),
            )
            keep(responses, kept[part])
            num_tokens = sum(map(len, responses["completion_ids"]))
            seconds = time.monotonic() - started
            print(f"{arguments.domain} ({part}): {len(responses)} completions, {num_tokens} tokens, {seconds:.0f} s")


if __name__ == "__main__":
    main()
