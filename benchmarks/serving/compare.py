"""Sets what replay predicts beside what serving engines recorded, prompt by prompt.

    python -m benchmarks.serving.compare --data_dir DATA --work_dir outputs/serving [--engines llama.cpp vllm]

Replay reads the very tokens that the engine wrote, with the counting of that engine. Where a prompt differs, the gaps
between the two largest logits of target and draft, where the engine first decided otherwise, tell whether float
rounding did it. Scores are kept in `<work_dir>/scores`: delete that folder after a change of replay.
"""

import argparse
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.serving import prompts as real
from benchmarks.serving.models import make_parallel_draft
from benchmarks.serving.recordings import FOLDER, read_recording
from spec_kd.acceptance import expect_rounds
from spec_kd.counting import Counting
from spec_kd.evaluation.lookup_replay import replay_lookup
from spec_kd.evaluation.options import ReplayOptions
from spec_kd.evaluation.response_replay import ResponseScores, score_responses
from spec_kd.parallel import read_parallel_drafting
from spec_kd.sampling.generation import generate_batch
from spec_kd.sampling.options import SamplingOptions
from spec_kd.serving import find_serving_engine
from spec_kd.serving.lookup import Propose, propose_after_last, propose_after_longest, propose_before_eos

OUTPUT = Path(__file__).parents[1] / "results" / "serving" / "compared.json"
README = Path(__file__).with_name("README.md")
TABLE = re.compile(r"(?<=<!-- compared -->\n).*?(?=<!-- end -->)", re.S)
FILES = {
    "llama.cpp": "llama_cpp.jsonl",
    "vllm": "vllm.jsonl",
    "transformers": "transformers.jsonl",
    "mlx-lm": "mlx.jsonl",
    "openvino": "openvino.jsonl",
}
GREEDY = ("greedy", "schema", "parallel")  # settings at temperature 0
LIMITS = ("n_predict", "max_tokens", "max_new_tokens")  # names of the token limit in a request
MAX_DRAFT_TOKENS = 6  # of all settings
TOLERANCE = 1e-6  # of a count
ROWS_AT_ONCE = 60  # scored before they are kept
# What `ngram-4` looks up in each engine, as its recording script sets it
LOOKUPS: dict[str, Propose] = {
    "llama.cpp": partial(propose_after_last, size_n=2, size_m=4),
    "vllm": partial(propose_after_longest, min_ngram=2, max_ngram=3),
    "transformers": partial(propose_before_eos, max_ngram=2, eos_ids=(2,)),
}
Records = Sequence[Mapping[str, Any]]


def find_recording(engine: str, work_dir: Path) -> Path:
    """The newest recording of an engine: that of the working folder, else the one that the project keeps."""
    own = work_dir / "recordings" / FILES[engine]
    return own if own.exists() else FOLDER / f"{FILES[engine]}.gz"


def get_limit(record: Mapping[str, Any]) -> int:
    """The token limit of a request."""
    return next(record["request"][name] for name in LIMITS if name in record["request"])


def keep(folder: Path, key: object, build: Callable[[], Any]) -> Any:
    """What `build` returns, kept in a file that is named by `key`."""
    path = folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}.pt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(build(), path)
    return torch.load(path, weights_only=False)


@dataclass(frozen=True)
class Pair:
    """Draft and target, with what they say of texts, kept in a folder.

    Args:
        draft (`PreTrainedModel`), target (`PreTrainedModel`): The models, in float32.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer of both.
        folder (`Path`): Where scores are kept.
    """

    draft: PreTrainedModel
    target: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path

    def score(self, rows: list[dict[str, Any]], options: ReplayOptions) -> list[ResponseScores]:
        """Scores of the rows, some at a time; those of greedy texts are the same for all numbers of drafted tokens."""
        parallel = read_parallel_drafting(self.draft.config)
        past_end = 0 if options.temperature else MAX_DRAFT_TOKENS if parallel is None else parallel.num_tokens
        return [
            keep(
                self.folder,
                (options, options.counting, past_end, part),
                partial(
                    score_responses, self.draft, self.target, part, options, num_past_end_tokens=past_end,
                    processing_class=self.tokenizer, description="scores",
                ),
            )
            for part in (rows[start : start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE))
        ]  # fmt: skip

    def go_on(self, rows: list[dict[str, Any]], num_tokens: int) -> list[list[int]]:
        """What the greedy target writes after each row, through its EOS."""
        texts = [[*row["prompt_ids"], *row["completion_ids"]] for row in rows]
        options = SamplingOptions(temperature=0.0, max_new_tokens=num_tokens)
        size = self.target.config.vocab_size

        def write() -> list[list[int]]:
            batches = [texts[start : start + 8] for start in range(0, len(texts), 8)]
            written = [
                generate_batch(self.target, batch, options, eos_ids=(), pad_id=0, vocab_size=size, seed="")
                for batch in batches
            ]
            return [ids for part in written for ids in part.tolist()]

        return keep(self.folder, ("go on", num_tokens, texts), write)

    def count_drafted(
        self, row: dict[str, Any], chances: Sequence[float], num_tokens: int, limit: int, counting: Counting
    ) -> int:
        """Drafted tokens of a greedy text whose drafts end at their EOS, the draft run again round by round."""
        length, at, total = len(row["completion_ids"]), counting.first_round, 0
        while at < length:
            room = min(num_tokens, limit - at - (counting.reserved_tokens or 0))
            accepted = 0
            while accepted < min(room, length - at) and chances[at + accepted]:
                accepted += 1
            if counting.counts_last_round or at + accepted + 1 < length:
                ids = [*row["prompt_ids"], *row["completion_ids"][:at]]
                options = SamplingOptions(temperature=0.0, max_new_tokens=max(room, 1))
                eos_ids, size = [self.tokenizer.eos_token_id], self.draft.config.vocab_size
                written = generate_batch(
                    self.draft, [ids], options, eos_ids=eos_ids, pad_id=0, vocab_size=size, seed=""
                )
                total += written.shape[1] if room > 0 else 0
            at += accepted + 1
        return total

    def measure_gaps(self, row: dict[str, Any], at: int) -> dict[str, float]:
        """Gaps between the two largest logits of each model before token `at` of a completion or of what follows it."""
        ids = [*row["prompt_ids"], *row["completion_ids"]]
        beyond = at - len(row["completion_ids"])
        if beyond > 0:
            ids += self.go_on([row], beyond)[0]
        ids = torch.tensor([ids[: len(row["prompt_ids"]) + at]])
        gaps = {}
        for role in ("target", "draft"):
            with torch.no_grad():
                first, second = getattr(self, role)(ids, logits_to_keep=1).logits[0, -1].topk(2).values.tolist()
            gaps[role] = round(first - second, 6)
        return gaps


def find_disagreement(record: Mapping[str, Any], chances: Sequence[float], counting: Counting) -> int | None:
    """First token of a completion, or of what follows it, that the engine accepted or rejected against replay.

    `chances` are replay's, 0 or 1 for each token; `None` if the rounds agree with all of them, or are not recorded.
    """
    at, length = counting.first_round, len(record["completion_ids"])
    rounds = zip(record.get("drafted_per_round", ()), record.get("accepted_per_round", ()), strict=True)
    for drafted, accepted in rounds:
        for k in range(min(drafted, accepted + 1)):
            is_uncounted_eos = counting.end == "if_last" and at + k == length - 1 and record["ended_by_eos"]
            if at + k < len(chances) and chances[at + k] != (k < accepted) and not is_uncounted_eos:
                return at + k
        at += accepted + 1
    return None


def count_in_text(record: Mapping[str, Any]) -> int:
    """Accepted tokens of the completion itself, without those that the engine accepted after its end."""
    at, total = 1, 0
    for accepted in record["accepted_per_round"]:
        total += min(accepted, len(record["completion_ids"]) - at)
        at += accepted + 1
    return total


def list_counts(rounds: Any) -> list[list[float]]:
    """Accepted and drafted tokens of each prompt; `rounds` has both as arrays or tensors."""
    return [[float(a), float(d)] for a, d in zip(rounds.accepted, rounds.drafted, strict=True)]


def build_row(record: Mapping[str, Any], prompt: real.Prompt, kind: str) -> dict[str, Any]:
    """What replay reads: the tokens, and the grammar or the JSON schema that they were held to."""
    row: dict[str, Any] = {"prompt_ids": list(prompt.ids), "completion_ids": record["completion_ids"]}
    if kind == "schema":
        schema = {
            "type": "json_schema",
            "json_schema": {"schema": real.build_call_schema(real.read_tools(prompt.messages))},
        }
        grammar = {"type": "grammar", "grammar": record.get("grammar")}
        row["response_format"] = json.dumps(grammar if "grammar" in record else schema)
    return row


def compare_setting(
    engine: str, setting: str, records: Records, prompts: Mapping[str, real.Prompt], pair: Pair
) -> dict[str, Any]:
    """Predicted and observed counts of one setting, and each prompt in which they differ."""
    kind, num_tokens = setting.split("-")[0], int(setting.split("-")[1])
    limit = get_limit(records[0])
    rows = [build_row(record, prompts[record["prompt"]["sha256"]], kind) for record in records]
    observed = [[r["accepted"], r["drafted"]] for r in records]
    result: dict[str, Any] = {"engine": engine, "setting": setting, "prompts": len(records)}
    counting = find_serving_engine(engine).counting
    scores: list[ResponseScores] = []
    rounds: list[Any]
    if kind == "ngram":
        past = pair.go_on(rows, num_tokens) if counting.end == "passed" else None
        lookup = {"propose": LOOKUPS[engine], "num_lookup_tokens": num_tokens, "continuations": past}
        rounds = [replay_lookup(rows, engine, max_new_tokens=limit, temperature=0.0, **lookup)]
    else:
        options = ReplayOptions(
            temperature=0.0 if kind in GREEDY else 1.0,
            max_new_tokens=limit,
            serving_engine=engine,
            draft_sampling="stochastic" if kind == "probabilistic" else None,
        )
        scores, counting = pair.score(rows, options), options.counting
        rounds = [
            expect_rounds(
                one.read_drafted("acceptance"), num_tokens, limit, one.lengths, counting, one.past_end,
                allowed_off_text=one.allowed_off_text,
            )
            for one in scores
        ]  # fmt: skip
        if kind not in GREEDY and counting.end == "passed":  # what is accepted after the end is left to chance
            in_text = [[count_in_text(r), r["drafted"]] for r in records]
            result["accepted_after_the_end"] = sum(r["accepted"] for r in records) - sum(one[0] for one in in_text)
            observed = in_text
    predicted = [counts for one in rounds for counts in list_counts(one)]
    result |= sum_up(predicted, observed)
    if kind == "probabilistic":
        deviation = sum(float(one.accepted_variance.sum()) for one in rounds) ** 0.5
        difference = result["accepted"]["observed"] - sum(accepted for accepted, _ in predicted)
        return {**result, "standard_deviation": round(deviation, 2), "z": round(difference / deviation, 2)}
    different = [i for i, (ours, theirs) in enumerate(zip(predicted, observed, strict=True)) if differ(ours, theirs)]
    listed = []
    for i in different:
        one = {"prompt": records[i]["prompt"], "tokens": len(rows[i]["completion_ids"])}
        one |= {"predicted": predicted[i], "observed": observed[i]}
        if scores and not scores[0].is_parallel:  # there acceptance is not one of tokens
            ours, row = scores[i // ROWS_AT_ONCE], i % ROWS_AT_ONCE
            chances = ours.acceptance[row, : one["tokens"]].tolist()
            chances += [] if ours.past_end is None else ours.past_end[row].tolist()
            at = find_disagreement(records[i], chances, counting)
            if counting.draft_ends_at_eos:
                one["drafted_to_eos"] = pair.count_drafted(rows[i], chances, num_tokens, limit, counting)
            one["first_difference"] = at
            one["logit_gaps"] = None if at is None else pair.measure_gaps(rows[i], at)
        listed.append(one)
    return {**result, "equal": len(records) - len(different), "different": listed}


def differ(predicted: Sequence[float], observed: Sequence[float]) -> bool:
    return any(abs(ours - theirs) > TOLERANCE for ours, theirs in zip(predicted, observed, strict=True))


def sum_up(predicted: list[list[float]], observed: list[list[float]]) -> dict[str, dict[str, float]]:
    """Totals of accepted and drafted tokens."""
    return {
        name: {
            "predicted": round(sum(counts[i] for counts in predicted), 2),
            "observed": round(sum(counts[i] for counts in observed), 2),
        }
        for i, name in enumerate(("accepted", "drafted"))
    }


def tabulate(results: Sequence[Mapping[str, Any]]) -> str:
    """The table of the README: one row for each engine and setting."""
    lines = ["", "| engine | setting | prompts | accepted: predicted | observed | drafted: predicted | observed | |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for one in results:
        counts = [f"{one[name][side]:,g}" for name in ("accepted", "drafted") for side in ("predicted", "observed")]
        if "z" in one:
            verdict = f"z = {one['z']:+.2f}, standard deviation {one['standard_deviation']:g}"
        else:
            verdict = f"equal on {one['equal']} of {one['prompts']} prompts"
            ended = [prompt for prompt in one["different"] if "drafted_to_eos" in prompt]
            if ended:
                known = sum(p["observed"] == [p["predicted"][0], p["drafted_to_eos"]] for p in ended)
                verdict += f", on {one['equal'] + known} where drafts end at their EOS"
        name = find_serving_engine(one["engine"]).title
        lines.append(f"| {name} | `{one['setting']}` | {one['prompts']} | {' | '.join(counts)} | {verdict} |")
    return "\n".join([*lines, "", ""])


def write_results(results: Sequence[Mapping[str, Any]], output: Path) -> None:
    """Writes the comparison as JSON and, where the project keeps it, the table of the README."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if output == OUTPUT:
        page = README.read_text(encoding="utf-8")
        README.write_text(TABLE.sub(lambda _: tabulate(results), page, count=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="Folder with <domain>/test.jsonl.")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/serving"))
    parser.add_argument("--engines", nargs="+", choices=FILES, default=list(FILES))
    parser.add_argument("--settings", nargs="+", help="Settings to compare (default: all that were recorded).")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="File for the comparison, JSON.")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.work_dir / "target")
    selected = real.select_prompts(arguments.data_dir, tokenizer)
    prompts = {one.describe()["sha256"]: one for one in [*selected.mixed, *selected.calls, *selected.many]}
    models = [
        AutoModelForCausalLM.from_pretrained(arguments.work_dir / name, dtype=torch.float32).eval()
        for name in ("draft", "target")
    ]
    pair = Pair(*models, tokenizer, arguments.work_dir / "scores")

    def find_pair(setting: str) -> Pair:
        if not setting.startswith("parallel"):
            return pair
        draft = AutoModelForCausalLM.from_pretrained(make_parallel_draft(arguments.work_dir), dtype=torch.float32)
        return replace(pair, draft=draft.eval(), folder=pair.folder / "parallel")

    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    for engine in arguments.engines:
        by_setting: dict[str, list[dict[str, Any]]] = {}
        for record in read_recording(find_recording(engine, arguments.work_dir)):
            by_setting.setdefault(record["setting"], []).append(record)
        for setting in arguments.settings or by_setting:
            if setting in by_setting and not setting.endswith("-0"):
                new = compare_setting(engine, setting, by_setting[setting], prompts, find_pair(setting))
                print(json.dumps(new), flush=True)
                others = [one for one in results if (one["engine"], one["setting"]) != (engine, setting)]
                results = sorted([*others, new], key=lambda one: (list(FILES).index(one["engine"]), one["setting"]))
                write_results(results, arguments.output)


if __name__ == "__main__":
    main()
