"""Rows of the table of bad inputs: what is called, and the words that its one sentence must have.

Rows of `PYTHON` are calls on a [`World`]; those of `COMMANDS` are command lines, in which `{name}` stands for an
attribute of the world; those of `RECIPES` are changes to a recipe that is right, which `--only_check` must refuse.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import spec_kd
from spec_kd.data.teacher_signal import TeacherInfo
from spec_kd.evaluation import load_report, read_costs
from spec_kd.evaluation.gates import parse_gate
from spec_kd.prompts.deduplication import NearDuplicateIndex
from spec_kd.prompts.filters import TextFilter

NAN, INFINITY = float("nan"), float("inf")


@dataclass(frozen=True)
class World:
    """What is right: models, files and rows that the rows of the table put one wrong thing beside.

    Args:
        folder (`Path`): Where files may be written.
        model (`PreTrainedModel`), tokenizer (`PreTrainedTokenizerBase`): A tiny model, also in `folder / "model"`.
        rows (`Dataset`): Prompts with completions, as ids.
    """

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rows: Dataset

    def generate(self, **options: Any) -> Any:
        return spec_kd.generate_responses(
            self.model, ["a"], **{"processing_class": self.tokenizer, "max_new_tokens": 4, **options}
        )

    def score(self, dataset: Any = None, **options: Any) -> Any:
        dataset = self.rows if dataset is None else dataset
        return spec_kd.score_completions(self.model, dataset, processing_class=self.tokenizer, **options)

    def synthesize(self, num_queries: Any = 1, **options: Any) -> Any:
        return spec_kd.synthesize_queries(
            self.model, num_queries=num_queries, processing_class=self.tokenizer, **options
        )

    def evaluate(self, drafts: Any = None, **options: Any) -> Any:
        drafts = self.model if drafts is None else drafts
        return spec_kd.evaluate_draft(drafts, self.model, ["a"], processing_class=self.tokenizer, **options)

    def replay(self, **options: Any) -> Any:
        return spec_kd.replay(self.model, self.model, self.rows, **{"temperature": 0.0, "max_new_tokens": 4, **options})

    def serve(self, **options: Any) -> Any:
        options = {"base_url": "http://localhost:8000/v1", **options}
        return spec_kd.ServerEngine("model", self.tokenizer, **options)

    def write(self, name: str, data: bytes) -> str:
        (self.folder / name).write_bytes(data)
        return str(self.folder / name)

    def read_logs(self, paths: Any = None, **options: Any) -> Any:
        paths = self.write("log.jsonl", b'{"prompt": "a"}\n') if paths is None else paths
        return spec_kd.load_query_logs(paths, **{"output_dir": self.folder / "logs", **options})

    def configure(self, kind: str, **options: Any) -> Any:
        options = {"output_dir": str(self.folder / "out"), "use_cpu": True, **options}
        return getattr(spec_kd, f"{kind}Config")(**options)

    def train(self, dataset: Any, **options: Any) -> Any:
        config = self.configure("BlackBoxSFT", report_to="none", **options)
        return spec_kd.BlackBoxSFTTrainer(self.model, config, train_dataset=dataset, processing_class=self.tokenizer)


def is_number(name: str, value: Any) -> str:
    return f"`{name}` is {value!r}, but must be a finite number"


def is_whole(name: str, value: Any) -> str:
    return f"`{name}` is {value!r}, but must be a whole number"


PYTHON = {
    "max_new_tokens as text": (lambda w: w.generate(max_new_tokens="5"), is_whole("max_new_tokens", "5")),
    "max_new_tokens of 2.5": (lambda w: w.generate(max_new_tokens=2.5), is_whole("max_new_tokens", 2.5)),
    "batch_size of True": (lambda w: w.generate(batch_size=True), is_whole("batch_size", True)),
    "temperature of nan": (lambda w: w.generate(temperature=NAN), is_number("temperature", NAN)),
    "temperature as text": (lambda w: w.generate(temperature="0.5"), is_number("temperature", "0.5")),
    "top_p of nan": (lambda w: w.generate(top_p=NAN), is_number("top_p", NAN)),
    "top_k of 2.5": (lambda w: w.generate(top_k=2.5), is_whole("top_k", 2.5)),
    "seed as text": (lambda w: w.generate(seed="a"), is_whole("seed", "a")),
    "shard_size of 0": (lambda w: w.generate(shard_size=0), "`shard_size` is 0"),
    "empty output_dir": (lambda w: w.generate(output_dir=""), "`output_dir` is '', which names no file or folder"),
    "target of None": (lambda w: spec_kd.generate_responses(None, ["a"]), "`target` is None"),
    "empty target": (lambda w: spec_kd.generate_responses("", ["a"]), "`target` is ''"),
    "target as number": (lambda w: spec_kd.generate_responses(5, ["a"]), "`target` is 5"),
    "prompts as text": (lambda w: spec_kd.generate_responses(w.model, "a"), "`prompts` must be"),
    "no prompts": (lambda w: spec_kd.generate_responses(w.model, []), "`prompts` is empty"),
    "prompts of numbers": (lambda w: spec_kd.generate_responses(w.model, [1]), "`prompts` must be"),
    "unknown signal": (lambda w: w.generate(teacher_signal="top_k"), "Unknown method 'top_k'"),
    "signal of 2.5 draws": (
        lambda w: w.generate(teacher_signal="sampled_counts", num_draws=2.5),
        is_whole("num_draws", 2.5),
    ),
    "score a list": (lambda w: w.score([{"prompt_ids": [5]}]), "`dataset` is a list"),
    "score no rows": (lambda w: w.score(w.rows.select([])), "`dataset` has no rows"),
    "score at nan": (lambda w: w.score(sampling_temperature=NAN), is_number("sampling_temperature", NAN)),
    "score into nowhere": (lambda w: w.score(output_dir=" "), "`output_dir` is ' '"),
    "no queries": (lambda w: w.synthesize(0), "`num_queries` is 0"),
    "True queries": (lambda w: w.synthesize(True), is_whole("num_queries", True)),
    "queries at nan": (lambda w: w.synthesize(temperature=NAN), is_number("temperature", NAN)),
    "queries in rounds of 2.5": (lambda w: w.synthesize(round_size=2.5), is_whole("round_size", 2.5)),
    "queries alike by nan": (
        lambda w: w.synthesize(near_duplicate_threshold=NAN),
        is_number("near_duplicate_threshold", NAN),
    ),
    "queries into nowhere": (lambda w: w.synthesize(output_dir=""), "`output_dir` is ''"),
    "empty log path": (lambda w: w.read_logs(""), "`paths` is ''"),
    "no log paths": (lambda w: w.read_logs([]), "`paths` must be a path or a list of them"),
    "log paths as number": (lambda w: w.read_logs(5), "`paths` must be a path or a list of them"),
    "logs that are not there": (lambda w: w.read_logs("none/*.jsonl"), "none/*.jsonl"),
    "logs into nowhere": (lambda w: w.read_logs(output_dir=""), "`output_dir` is ''"),
    "logs split at nan": (lambda w: w.read_logs(test_fraction=NAN), is_number("test_fraction", NAN)),
    "logs of 2.5 tokens": (
        lambda w: w.read_logs(max_tokens=2.5, processing_class=w.tokenizer),
        is_whole("max_tokens", 2.5),
    ),
    "logs of -5 users": (lambda w: w.read_logs(max_per_user=-5), "`max_per_user` is -5"),
    "logs without a format": (lambda w: w.read_logs(format="csv"), "`format` must be one of"),
    "logs without a redaction": (lambda w: w.read_logs(redact=["emial"]), "emial"),
    "curated list": (lambda w: spec_kd.load_curated_prompts([{"prompt": "a"}]), "`dataset` must be"),
    "curated file, empty": (lambda w: spec_kd.load_curated_prompts(w.write("e.jsonl", b"")), "e.jsonl"),
    "curated file, broken": (lambda w: spec_kd.load_curated_prompts(w.write("b.jsonl", b'{"a"')), "b.jsonl"),
    "curated file, corrupt": (lambda w: spec_kd.load_curated_prompts(w.write("c.parquet", b"PAR1x")), "c.parquet"),
    "mix of a list": (lambda w: spec_kd.mix_prompts([w.rows]), "`datasets` must be prompt sets by name"),
    "mix of lists": (lambda w: spec_kd.mix_prompts({"a": [1]}), "`datasets['a']` must be"),
    "mix by nan": (lambda w: spec_kd.mix_prompts({"a": w.prompts}, weights={"a": NAN}), is_number("weights['a']", NAN)),
    "mix of 2.5": (lambda w: spec_kd.mix_prompts({"a": w.prompts}, num_prompts=2.5), is_whole("num_prompts", 2.5)),
    "no drafts": (lambda w: w.evaluate({}), "`drafts` is empty"),
    "drafts as number": (lambda w: w.evaluate(5), "`drafts` is 5"),
    "gamma as text": (lambda w: w.evaluate(num_assistant_tokens="5"), is_whole("num_assistant_tokens", "5")),
    "gammas of 0": (lambda w: w.evaluate(gammas=(0,)), "`gammas` is 0"),
    "evaluate at nan": (lambda w: w.evaluate(temperatures=[NAN]), is_number("temperatures", NAN)),
    "evaluate at one number": (lambda w: w.evaluate(temperatures=0.5), "`temperatures` is 0.5, but must be a list"),
    "evaluate with guesses": (lambda w: w.evaluate(costs="guess"), "`costs` is 'guess'"),
    "evaluate into nowhere": (lambda w: w.evaluate(output_dir=""), "`output_dir` is ''"),
    "evaluate by topic": (lambda w: w.evaluate(group_by="topic"), "`group_by` names ['topic']"),
    "evaluate True at a time": (lambda w: w.evaluate(batch_size=True), is_whole("batch_size", True)),
    "replay at nan": (lambda w: w.replay(temperature=NAN), is_number("temperature", NAN)),
    "replay of 0 tokens": (lambda w: w.replay(max_new_tokens=0), "`max_new_tokens` is 0"),
    "draft 2.5 tokens": (
        lambda w: spec_kd.generate_speculatively(w.model, w.model, [[5]], max_new_tokens=2.5),
        is_whole("max_new_tokens", 2.5),
    ),
    "assist at nan": (
        lambda w: spec_kd.generate_assisted(w.model, w.model, [[5]], temperature=NAN, max_new_tokens=4),
        is_number("temperature", NAN),
    ),
    "callback at nan": (
        lambda w: spec_kd.SpeculativeEvalCallback(["a"], temperatures=[NAN]),
        is_number("temperatures", NAN),
    ),
    "concurrency as text": (lambda w: w.serve(max_concurrency="4"), is_whole("max_concurrency", "4")),
    "port 99999": (lambda w: w.serve(base_url="http://localhost:99999/v1"), "not the address of a server"),
    "timeout of nan": (lambda w: w.serve(timeout=NAN), is_number("timeout", NAN)),
    "inf requests": (lambda w: w.serve(requests_per_minute=INFINITY), is_number("requests_per_minute", INFINITY)),
    "costs of nan": (
        lambda w: spec_kd.ServingCosts(cost_ratio=NAN, verify_cost={1: 1.0}),
        is_number("cost_ratio", NAN),
    ),
    "costs as text": (lambda w: spec_kd.ServingCosts(cost_ratio=0.1, verify_cost="a"), "`verify_cost` is 'a'"),
    "costs file, broken": (lambda w: read_costs(w.write("costs.json", b"{")), "costs.json` is not JSON"),
    "gate of nan": (lambda w: parse_gate("block_efficiency=nan"), "no finite number"),
    "report that is broken": (lambda w: load_report(w.write("report.json", b"[]")), "report.json"),
    "export of None": (lambda w: spec_kd.export_draft(None, w.folder / "x"), "`draft` is None"),
    "export into nowhere": (lambda w: spec_kd.export_draft(w.model, ""), "`output_dir` is ''"),
    "export of 2.5 rows": (
        lambda w: spec_kd.export_draft(w.model, w.folder / "x", processing_class=w.tokenizer, target_vocab_size=2.5),
        is_whole("target_vocab_size", 2.5),
    ),
    "filter by nan": (lambda w: TextFilter(max_repetition=NAN), is_number("max_repetition", NAN)),
    "alike by nan": (lambda w: NearDuplicateIndex(NAN), is_number("threshold", NAN)),
    "signal of another version": (lambda w: TeacherInfo.from_json("[]"), "`teacher_info`"),
    "train at nan": (lambda w: w.configure("WhiteBoxDistill", temperature=NAN), is_number("temperature", NAN)),
    "train with ce_weight nan": (lambda w: w.configure("WhiteBoxDistill", ce_weight=NAN), is_number("ce_weight", NAN)),
    "learning rate as text": (
        lambda w: w.configure("BlackBoxSFT", learning_rate="2e-5"),
        is_number("learning_rate", "2e-5"),
    ),
    "max_length of -5": (lambda w: w.configure("BlackBoxSFT", max_length=-5), "`max_length` is -5"),
    "batches of 0": (
        lambda w: w.configure("BlackBoxSFT", per_device_train_batch_size=0),
        "`per_device_train_batch_size` is 0",
    ),
    "eta of nan": (
        lambda w: w.configure("WhiteBoxDistill", divergence="lk_hybrid", divergence_kwargs={"eta": NAN}),
        "is nan, but must be a finite number",
    ),
    "vLLM's port 99999": (lambda w: w.configure("OnlineGKD", vllm_server_port=99999), "`vllm_server_port` is 99999"),
    "vLLM's share of 2": (
        lambda w: w.configure("OnlineGKD", vllm_gpu_memory_utilization=2),
        "`vllm_gpu_memory_utilization` is 2",
    ),
    "reference scores of a list": (
        lambda w: spec_kd.add_reference_scores([1], w.model, w.model, vocab_size=261),
        "`dataset` is a list",
    ),
    "reference scores at nan": (
        lambda w: spec_kd.add_reference_scores(w.rows, w.model, w.model, vocab_size=261, temperature=NAN),
        is_number("temperature", NAN),
    ),
    "completion ids of a list": (lambda w: spec_kd.add_completion_ids([1], w.tokenizer), "`dataset` is a list"),
    "describe by nan": (
        lambda w: spec_kd.describe_prompts(["a"], near_duplicate_threshold=NAN),
        is_number("near_duplicate_threshold", NAN),
    ),
    "save a report into nowhere": (lambda w: spec_kd.save_report(None, ""), "`output_dir` is ''"),
    "lmbda of nan": (lambda w: w.configure("OnlineGKD", lmbda=NAN), is_number("lmbda", NAN)),
    "online max_new_tokens as text": (
        lambda w: w.configure("OnlineGKD", max_new_tokens="5"),
        is_whole("max_new_tokens", "5"),
    ),
    "config into nowhere": (lambda w: w.configure("BlackBoxSFT", output_dir=""), "`output_dir` is ''"),
    "train on a list": (lambda w: w.train([{"prompt": "a", "completion": "b"}]), "`train_dataset`"),
    "train on nothing": (lambda w: w.train(None), "`train_dataset` is required"),
    "train on no rows": (lambda w: w.train(w.rows.select([])), "training dataset is empty"),
}

COMMANDS = {
    "log path, empty": ("prompts logs --paths= --output_dir {out}", "`paths` is ''"),
    "log path, mistyped option": ("prompts logs --path {log} --output_dir {out}", "Did you mean --paths?"),
    "kind, mistyped": ("prompts lgos --paths {log}", "Did you mean logs?"),
    "log split at nan": ("prompts logs --paths {log} --output_dir {out} --test_fraction nan", "`test_fraction` is nan"),
    "log tokens without tokenizer": (
        "prompts logs --paths {log} --output_dir {out} --max_tokens 5",
        "count the target",
    ),
    "curated column": ("prompts curated --dataset {log} --output_dir {out} --prompt_column q", "names 'q'"),
    "curated file, empty": ("prompts curated --dataset {empty} --output_dir {out}", "empty.jsonl"),
    "mix weight of nan": (
        "prompts mix --parts a={folder} --weights a=nan --output_dir {out}",
        "`weights['a']` is 'nan', but",
    ),
    "mix part without a path": ("prompts mix --parts a= --output_dir {out}", "`parts` is ''"),
    "respond to an empty file": (
        "respond --target {model} --prompts {empty} --output_dir {out}",
        "empty.jsonl` is empty",
    ),
    "respond to a broken file": ("respond --target {model} --prompts {broken} --output_dir {out}", "broken.jsonl"),
    "respond to a corrupt file": ("respond --target {model} --prompts {corrupt} --output_dir {out}", "corrupt.parquet"),
    "respond without a target": ("respond --prompts {log} --output_dir {out}", "`target` is missing"),
    "respond at inf": (
        "respond --target {model} --prompts {log} --output_dir {out} --temperature inf",
        "`temperature` is inf",
    ),
    "respond with half a target": ("respond --target {truncated} --prompts {log} --output_dir {out}", "are damaged"),
    "respond with a mistyped engine option": (
        "respond --target {model} --prompts {log} --output_dir {out} --engine_kwargs dtipe=float32",
        "`engine_kwargs` has `dtipe`",
    ),
    "respond on port 99999": (
        "respond --target {model} --prompts {log} --output_dir {out} --engine server --base_url http://localhost:99999/v1",
        "not the address of a server",
    ),
    "respond with an unknown target": ("respond --target org/none --prompts {log} --output_dir {out}", "`org/none`"),
    "synthesize with a nan": (
        "synthesize --target {model} --num_queries 1 --output_dir {out} --temperature nan",
        "`temperature` is nan",
    ),
    "synthesize nothing": ("synthesize --target {model} --num_queries 0 --output_dir {out}", "`num_queries` is 0"),
    "train without a method": ("train --draft {model} --responses {log} --output_dir {out}", "no method '--draft'"),
    "train at nan": (
        "train black_box --draft {model} --responses {log} --output_dir {out} --learning_rate nan",
        "`learning_rate` is nan",
    ),
    "train without an optimizer's package": (
        "train black_box --draft {model} --responses {log} --output_dir {out} --optim adamw_bnb_8bit --use_cpu",
        "bitsandbytes",
    ),
    "train half a draft": ("train black_box --draft {truncated} --responses {log} --output_dir {out}", "are damaged"),
    "train with -1 held out": (
        "train black_box --draft {model} --responses {log} --output_dir {out} --num_held_out -1",
        "`num_held_out` is -1",
    ),
    "train an unknown draft": ("train black_box --draft org/none --responses {log} --output_dir {out}", "`org/none`"),
    "evaluate by a gate of nan": (
        "evaluate --draft {model} --target {model} --prompts {log} --output_dir {out} "
        "--fail_under block_efficiency=nan",
        "no finite number",
    ),
    "evaluate by a gate without costs": (
        "evaluate --draft {model} --target {model} --prompts {log} --output_dir {out} --costs none "
        "--fail_under predicted_speedup=2",
        "needs costs",
    ),
    "evaluate half a draft": (
        "evaluate --draft {truncated} --target {model} --prompts {log} --output_dir {out}",
        "are damaged",
    ),
    "evaluate with seed as text": ("evaluate --draft {model} --prompts {log} --output_dir {out} --seed a", "seed"),
    "run a recipe that is not there": ("run {folder}/none.yaml", "none.yaml"),
    "run a folder": ("run {folder}", "there is no file"),
}

RECIPES = {
    "learning rate -1": ({"train.learning_rate": -1}, "`learning_rate` is -1"),
    "batch of 0": ({"train.per_device_train_batch_size": 0}, "`per_device_train_batch_size` is 0"),
    "optimizer without its package": ({"train.optim": "galore_adamw"}, "galore_torch"),
    "tracker without its package": ({"train.report_to": "comet_ml"}, "comet_ml"),
    "dtype": ({"train.dtype": "float17"}, "`dtype` is 'float17'"),
    "LoRA modules": ({"train.use_peft": True, "train.lora_target_modules": ["a", "b"]}, "LoRA options do not fit"),
    "max_length 1": ({"train.max_length": 1}, "`max_length` is 1"),
    "group_by": ({"evaluate.group_by": ["topic"]}, "`group_by` names ['topic']"),
    "gate without costs": ({"evaluate.fail_under": {"predicted_speedup": 2}}, "needs costs"),
    "gate without a setting": ({"evaluate.fail_under": {"alpha_t0.3": 0.5}}, "names the setting 't0.3'"),
    "gate as number": ({"evaluate.fail_under": 1.0}, "`fail_under` is 1.0"),
    "format": ({"prompts.historical.format": "csv"}, "`format` must be one of"),
    "redaction": ({"prompts.historical.redact": ["emial"]}, "emial"),
    "numeric key": ({5: "a"}, "the key 5"),
    "numeric part": ({"prompts": {5: {"paths": "log.jsonl"}}}, "the key 5"),
    "engine option": ({"respond.engine_kwargs": {"dtipe": "a"}}, "`engine_kwargs` has `dtipe`"),
    "engine that is not there": ({"respond.engine": "vllm"}, "not installed"),
    "empty output_dir": ({"output_dir": ""}, "`output_dir` is ''"),
    "empty path": ({"prompts.historical.paths": ""}, "`paths` is ''"),
    "temperature inf": ({"respond.temperature": INFINITY}, "`temperature` is inf"),
    "test_fraction nan": ({"prompts.historical.test_fraction": NAN}, "`test_fraction` is nan"),
    "half a draft": ({"draft": "{truncated}"}, "are damaged"),
    "half a target": ({"target": "{truncated}"}, "are damaged"),
    "reference draft": ({"train.token_selection": "adaspec"}, "reference draft"),
    "flash attention": ({"train.attn_implementation": "flash_attention_2"}, "train: "),
}
