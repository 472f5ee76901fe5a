"""The target answers: what it writes to a set of prompts, with the exact ids of both."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import accelerate
import pyarrow as pa
import torch
import transformers
from datasets import Dataset, Features, List, Value, concatenate_datasets
from tqdm.auto import tqdm
from transformers import AutoTokenizer, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from spec_kd._private import create_model_from_path, get_config_model_id
from spec_kd.data.prompts import Prompts, prepare_prompts, render_prompt_ids
from spec_kd.data.shards import ShardStore
from spec_kd.heads import unwrap_peft
from spec_kd.vocabulary import ProcessingClass, count_real_ids, count_rows, get_tokenizer

SHARD_SCHEMA = pa.schema({"row": pa.int64(), "completion_ids": pa.list_(pa.int32()), "finish_reason": pa.string()})


def generate_responses(
    target: PreTrainedModel | str,
    prompts: Prompts,
    *,
    processing_class: ProcessingClass | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    batch_size: int = 8,
    seed: int = 0,
    output_dir: str | None = None,
    shard_size: int = 512,
    show_progress: bool = True,
) -> Dataset:
    """Lets the target answer every prompt: the text that a draft is distilled and evaluated on.

    Greedy, or sampled from the plain softmax at `temperature`. The target's own `generation_config` (its sampling,
    top-k, penalties, forced tokens) does not count, except for its EOS ids, which end a response together with the
    tokenizer's. Ids beyond the tokenizer's vocabulary (padded rows of the head) are never written.

    With `output_dir` a killed run continues after its last whole shard and ends with the data set of an uninterrupted
    one: batches are planned up front (longest prompts first, so that running out of memory shows at once) and each has
    its own seed. The finished set lies in `output_dir/responses.parquet`; the same call again only reads it.
    Several processes may share an `output_dir`, but each does all the work: put the call under
    `accelerator.main_process_first()`.

    Args:
        target (`PreTrainedModel` or `str`):
            The model, or a path or Hub id to load it from (in its own dtype). Modes are restored afterwards.
        prompts (`list[str]`, `list` of conversations, or `Dataset`):
            A data set has `prompt` (text or messages, with `tools` as list or JSON text, and `chat_template_kwargs`
            where wanted) or `prompt_ids`. Its other columns are kept; `completion`, `completion_ids` and
            `finish_reason` are replaced.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            The target's. Loaded from where the target came from by default.
        max_new_tokens (`int`): Most tokens of a response, the EOS included.
        temperature (`float`): 0.0 means greedy.
        batch_size (`int`): Prompts at a time.
        seed (`int`): Of the sampling. The same seed, prompts, batch size and target give the same set.
        output_dir (`str`, *optional*): Where to keep shards and the finished set.
        shard_size (`int`): Responses in a shard, rounded to whole batches.
        show_progress (`bool`): Whether to show a progress bar.

    Returns:
        `Dataset` in the order of the prompts, with `prompt`, `completion` (messages if the prompt is a conversation,
        else text; decoded without special tokens, for people), `prompt_ids`, `completion_ids` (lists of int32; the EOS
        included if the target wrote it, nothing behind it) and `finish_reason` (`"stop"` or `"length"`).

    Raises:
        `ValueError`: Before any generation: no prompts, missing columns, an option out of its range, no EOS id, a
            prompt that leaves no room for `max_new_tokens` in the target's context, ids that the target does not
            have, or an `output_dir` with the responses of other settings.
        `OSError`: `output_dir` cannot be written to.
    """
    for name, value, least in (
        ("max_new_tokens", max_new_tokens, 1),
        ("batch_size", batch_size, 1),
        ("shard_size", shard_size, 1),
        ("temperature", temperature, 0),
    ):
        if value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}.")
    dataset, rows = prepare_prompts(prompts)
    store = ShardStore(output_dir) if output_dir is not None else None
    target, processing_class = _load(target, processing_class)
    eos_ids, pad_id = find_special_ids(target, processing_class)
    prompt_ids = render_prompt_ids(rows, processing_class)
    _check_prompts_fit(prompt_ids, target, max_new_tokens)

    plan = _plan(prompt_ids, batch_size, shard_size)
    if store is not None:
        fingerprint = {
            "max_new_tokens": max_new_tokens,
            "temperature": float(temperature),
            "batch_size": batch_size,
            "seed": seed,
            "shard_size": shard_size,
            "eos_token_ids": eos_ids,
            "real_vocab_size": count_real_ids(processing_class),
            "prompts": hashlib.sha256(repr(prompt_ids).encode()).hexdigest(),
            "target": _hash_model(target),
        }
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        store.open_run(fingerprint, {"target_name": get_config_model_id(target.config), **versions})

    sampler = _Sampler(target, max_new_tokens, temperature, eos_ids, pad_id, count_real_ids(processing_class))
    responses = {}
    with tqdm(total=len(prompt_ids), desc="Target responses", disable=not show_progress) as progress, sampler:
        for shard, batches in enumerate(plan):
            table = store.read(shard) if store is not None else None
            if table is not None:
                progress.update(len(table))
            else:
                written = []
                for index, batch in batches:
                    written += zip(
                        batch, sampler.answer([prompt_ids[i] for i in batch], f"{seed}:{index}"), strict=True
                    )
                    progress.update(len(batch))
                columns = [[i for i, _ in written], [ids for _, (ids, _) in written], [why for _, (_, why) in written]]
                table = pa.table(columns, schema=SHARD_SCHEMA)
                if store is not None:
                    store.write(shard, table)
            for row in table.to_pylist():
                responses[row["row"]] = (row["completion_ids"], row["finish_reason"])
    dataset = _assemble(dataset, prompt_ids, [responses[i] for i in range(len(prompt_ids))], processing_class)
    if store is not None:
        store.finish(dataset)
    return dataset


class _RealIdsOnly(LogitsProcessor):
    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self.vocab_size :] = -torch.inf  # (B, V)
        return scores


@dataclass
class _Sampler:
    """The target with a neutral generation config, for as long as the context lasts."""

    target: PreTrainedModel
    max_new_tokens: int
    temperature: float
    eos_ids: list[int]
    pad_id: int
    vocab_size: int

    def __enter__(self) -> "_Sampler":
        # What `generate` is not told it takes from `model.generation_config`, so that is replaced, not only overridden.
        self._modes = [(module, module.training) for module in self.target.modules()]
        self._shipped_config = self.target.generation_config
        sampling = {"do_sample": True, "temperature": float(self.temperature), "top_k": 0, "top_p": 1.0}
        self.target.generation_config = GenerationConfig(
            **(sampling if self.temperature > 0 else {"do_sample": False}),
            max_new_tokens=self.max_new_tokens,
            eos_token_id=self.eos_ids,
            pad_token_id=self.pad_id,
            use_cache=True,
        )
        self.target.eval()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.target.generation_config = self._shipped_config
        for module, is_training in self._modes:
            module.training = is_training

    def answer(self, prompts: list[list[int]], seed: str) -> list[tuple[list[int], str]]:
        """Completion ids and finish reason of every prompt of a batch."""
        length = max(map(len, prompts))
        padded = [[self.pad_id] * (length - len(ids)) + ids for ids in prompts]
        mask = [[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts]
        device = self.target.get_input_embeddings().weight.device
        with _seeded(seed, device):
            output = self.target.generate(
                input_ids=torch.tensor(padded, device=device),  # (B, L)
                attention_mask=torch.tensor(mask, device=device),
                generation_config=self.target.generation_config,
                logits_processor=LogitsProcessorList([_RealIdsOnly(self.vocab_size)]),
            )
        return [self._cut_after_eos(ids) for ids in output[:, length:].tolist()]

    def _cut_after_eos(self, ids: list[int]) -> tuple[list[int], str]:
        end = next((i for i, token in enumerate(ids) if token in self.eos_ids), None)
        return (ids, "length") if end is None else (ids[: end + 1], "stop")


@contextmanager
def _seeded(seed: str, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big"))
        yield


def _load(
    target: PreTrainedModel | str, processing_class: ProcessingClass | None
) -> tuple[PreTrainedModel, ProcessingClass]:
    name = target if isinstance(target, str) else get_config_model_id(target.config)
    if processing_class is None:
        if not name:
            raise ValueError(
                "The target was not loaded from anywhere, so its tokenizer is unknown: give `processing_class`."
            )
        processing_class = AutoTokenizer.from_pretrained(name)
    if isinstance(target, str):
        state = accelerate.PartialState()
        # "auto" spreads a target over all cards, which only one process can do
        placement = {"device_map": state.device} if state.num_processes > 1 and state.device.type == "cuda" else {}
        target = create_model_from_path(target, dtype="auto", **placement)
    elif getattr(getattr(target, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError("A target with a prompt-learning adapter is not supported: its virtual tokens have no ids.")
    return unwrap_peft(target), processing_class


def find_special_ids(target: PreTrainedModel, processing_class: ProcessingClass) -> tuple[list[int], int]:
    """EOS ids of the target (its generation config's and its tokenizer's) and a pad id; raises without any EOS."""
    tokenizer = get_tokenizer(processing_class)
    shipped = target.generation_config.eos_token_id
    eos_ids = set(shipped if isinstance(shipped, list) else [shipped]) | {tokenizer.eos_token_id}
    eos_ids = sorted(eos_ids - {None})
    if not eos_ids:
        raise ValueError(
            "Neither the target's generation config nor its tokenizer has an EOS token, so no response would ever end: "
            "set `processing_class.eos_token`."
        )
    return eos_ids, tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos_ids[0]


def _check_prompts_fit(prompt_ids: list[list[int]], target: PreTrainedModel, max_new_tokens: int) -> None:
    limit = getattr(target.config.get_text_config(), "max_position_embeddings", None)
    too_long = [i for i, ids in enumerate(prompt_ids) if limit is not None and len(ids) + max_new_tokens > limit]
    if too_long:
        longest = max(too_long, key=lambda i: len(prompt_ids[i]))
        raise ValueError(
            f"{len(too_long)} of {len(prompt_ids)} prompts leave no room for `max_new_tokens={max_new_tokens}` in the "
            f"target's {limit} positions; the longest is row {longest} with {len(prompt_ids[longest])} tokens. Remove "
            "them or lower `max_new_tokens`."
        )
    rows, highest = count_rows(target.get_input_embeddings()), max(map(max, prompt_ids))
    if highest >= rows:
        raise ValueError(f"The prompts contain id {highest}, but the target has {rows}: they are of another tokenizer.")


def _plan(prompt_ids: list[list[int]], batch_size: int, shard_size: int) -> list[list[tuple[int, list[int]]]]:
    """Shards of numbered batches of row numbers, longest prompts first."""
    order = sorted(range(len(prompt_ids)), key=lambda i: -len(prompt_ids[i]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    per_shard = max(1, shard_size // batch_size)
    return [list(enumerate(batches))[i : i + per_shard] for i in range(0, len(batches), per_shard)]


def _hash_model(model: PreTrainedModel) -> str:
    """Hash over the architecture and up to 64 evenly spaced values of every weight."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if weight.numel() and not weight.is_meta:
            flat = weight.detach().flatten()
            values = flat[:: max(1, len(flat) // 64)][:64].cpu().contiguous()
            digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _assemble(
    dataset: Dataset,
    prompt_ids: list[list[int]],
    responses: list[tuple[list[int], str]],
    processing_class: ProcessingClass,
) -> Dataset:
    tokenizer = get_tokenizer(processing_class)
    completion_ids = [ids for ids, _ in responses]
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    text, ids = Value("string"), List(Value("int32"))
    columns = {
        "completion": (texts, text),
        "prompt_ids": (prompt_ids, ids),
        "completion_ids": (completion_ids, ids),
        "finish_reason": ([why for _, why in responses], text),
    }
    if "prompt" not in dataset.column_names:
        decoded = tokenizer.batch_decode(prompt_ids, clean_up_tokenization_spaces=False)
        columns = {"prompt": (decoded, text), **columns}
    elif not isinstance(dataset[0]["prompt"], str):
        messages = [[{"role": "assistant", "content": content}] for content in texts]
        columns["completion"] = (messages, List({"role": text, "content": text}))
    written = Dataset.from_dict(
        {name: values for name, (values, _) in columns.items()},
        features=Features({name: feature for name, (_, feature) in columns.items()}),
    )
    kept = dataset.select_columns([name for name in dataset.column_names if name not in columns])
    return concatenate_datasets([kept, written], axis=1) if kept.column_names else written
