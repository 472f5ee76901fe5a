"""The target answers: what it writes to a set of prompts, with the exact ids and, where asked, its probabilities."""

import hashlib
import json
from collections.abc import Sequence

import torch
import transformers
from datasets import Dataset, Features, List, Value, concatenate_datasets
from transformers import PreTrainedModel

from spec_kd.data.prompts import Prompts, prepare_prompts, render_prompt_ids
from spec_kd.data.sharded_runs import plan_batches, run_plan
from spec_kd.data.shards import ShardStore
from spec_kd.data.teacher_signal import TeacherInfo
from spec_kd.engines.base import Engine, SamplingOptions, SignalRequest
from spec_kd.engines.slots import complete_request
from spec_kd.engines.transformers import TransformersEngine
from spec_kd.vocabulary import ProcessingClass, count_real_ids, fingerprint_tokenizer, get_tokenizer

TEACHER_COLUMNS = ("teacher_token_logprobs", "teacher_signal", "teacher_info")


def generate_responses(
    target: PreTrainedModel | str | Engine,
    prompts: Prompts,
    *,
    processing_class: ProcessingClass | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    teacher_signal: str | SignalRequest | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    output_dir: str | None = None,
    shard_size: int = 512,
    show_progress: bool = True,
) -> Dataset:
    """Lets the target answer every prompt: the text that a draft is distilled and evaluated on.

    Greedy, or sampled from the plain softmax at `temperature`. The target's own `generation_config` (its sampling,
    top-k, penalties, forced tokens) does not count, except for its EOS ids, which end a response together with the
    tokenizer's. Ids beyond the tokenizer's vocabulary (padded rows of the head) are never written.

    With a `teacher_signal` the same pass keeps what white-box distillation needs of the target's distribution, and a
    draft can be trained and evaluated without the target from then on. The text does not depend on it.

    With `output_dir` a killed run continues after its last whole shard; with the transformers engine it ends with the
    data set of an uninterrupted one: batches are planned up front (longest prompts first, so that running out of memory
    shows at once) and each has its own seed. The finished set lies in `output_dir/responses.parquet`; the same call
    again only reads it. Under `accelerate launch` the processes share the shards of an `output_dir` between them;
    without one each does all the work.

    Args:
        target (`PreTrainedModel`, `str` or `Engine`):
            The model, or a path or Hub id to load it from (in its own dtype); modes are restored afterwards. Or an
            engine that runs it elsewhere ([`ServerEngine`], [`VLLMEngine`]).
        prompts (`list[str]`, `list` of conversations, or `Dataset`):
            A data set has `prompt` (text or messages, with `tools` as list or JSON text, and `chat_template_kwargs`
            where wanted) or `prompt_ids`. Its other columns are kept; `completion`, `completion_ids`, `finish_reason`
            and the teacher's columns are replaced.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            The target's. Loaded from where the target came from by default.
        max_new_tokens (`int`): Most tokens of a response, the EOS included.
        temperature (`float`): 0.0 means greedy.
        teacher_signal (`str` or `SignalRequest`, *optional*):
            What to keep of the distribution at every token: `"token_only"`, `"sampled_counts"`, `"sampled_logprobs"`
            or `"top_k_tail"` (what each may be used for: `spec_kd.losses.SPARSE_METHODS`), or a request with numbers
            of its own.
        batch_size (`int`, *optional*):
            Prompts handed to the engine at a time: 8 by default for transformers; a whole shard for engines that batch
            and queue on their own.
        seed (`int`): Of the sampling. The same seed, prompts, batch size and target give the same set.
        output_dir (`str`, *optional*): Where to keep shards and the finished set.
        shard_size (`int`): Responses in a shard, rounded to whole batches.
        show_progress (`bool`): Whether to show a progress bar.

    Returns:
        `Dataset` in the order of the prompts, with `prompt`, `completion` (messages if the prompt is a conversation,
        else text; decoded without special tokens, for people), `prompt_ids`, `completion_ids` (lists of int32; the EOS
        included if the target wrote it, nothing behind it) and `finish_reason` (`"stop"` or `"length"`); with a signal
        `teacher_token_logprobs` (list of float32), `teacher_signal` (bytes, where there is more than the token's own
        log-probability) and `teacher_info` (JSON, see [`TeacherInfo`]).

    Raises:
        `ValueError`: Before any generation: no prompts, missing columns, an option out of its range, no EOS id, a
            prompt that leaves no room for `max_new_tokens` in the target's context, ids that the target does not
            have, a signal that the engine cannot give, or an `output_dir` with the responses of other settings.
        `OSError`: `output_dir` cannot be written to.
    """
    for name, value, least in (
        ("max_new_tokens", max_new_tokens, 1),
        ("batch_size", 1 if batch_size is None else batch_size, 1),
        ("shard_size", shard_size, 1),
        ("temperature", temperature, 0),
    ):
        if value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}.")
    signal = _read_signal(teacher_signal)
    dataset, rows = prepare_prompts(prompts)
    store = ShardStore(output_dir) if output_dir is not None else None
    engine, processing_class = as_engine(target, processing_class)
    batch_size = batch_size or getattr(engine, "default_batch_size", shard_size)
    prompt_ids = render_prompt_ids(rows, processing_class)
    options = SamplingOptions(max_new_tokens, float(temperature), seed)
    engine.check(prompt_ids, options, signal)
    info = None
    if signal is not None:
        info = describe_teacher(engine, processing_class, signal, options.temperature, max_new_tokens)
    if store is not None:
        _open_run(
            store, engine, processing_class, prompt_ids, signal,
            max_new_tokens=max_new_tokens, temperature=options.temperature, batch_size=batch_size, seed=seed,
            shard_size=shard_size,
        )  # fmt: skip

    def answer(batch: list[int], index: int):
        return engine.generate([prompt_ids[i] for i in batch], options, signal, f"{seed}:{index}")

    plan = plan_batches([len(ids) for ids in prompt_ids], batch_size, shard_size)
    responses = run_plan(plan, answer, store, info, "Target responses", show_progress)
    _check_written_ids(responses, count_real_ids(processing_class))
    dataset = _assemble(dataset, prompt_ids, responses, processing_class)
    if info is not None:
        dataset = _add_teacher_columns(dataset, responses, info)
    if store is not None:
        store.finish(dataset)
    return dataset


def score_completions(
    target: PreTrainedModel | str | Engine,
    dataset: Dataset,
    *,
    processing_class: ProcessingClass | None = None,
    teacher_signal: str | SignalRequest = "sampled_logprobs",
    sampling_temperature: float | None = None,
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    output_dir: str | None = None,
    shard_size: int = 512,
    show_progress: bool = True,
) -> Dataset:
    """Adds the teacher signal to completions that exist already, such as logs of what the target served.

    One teacher-forced pass over `prompt_ids` + `completion_ids`; log-probabilities are those of the plain softmax.
    Resumable as [`generate_responses`], whose other arguments and errors it has.

    Args:
        dataset (`Dataset`): With `prompt_ids` and `completion_ids`; teacher columns it has are replaced.
        teacher_signal (`str` or `SignalRequest`, *optional*, defaults to `"sampled_logprobs"`): What to keep.
        sampling_temperature (`float`, *optional*):
            At which the text was sampled, 0.0 for greedy. Where it is not known, what rests on it (exact replay, the
            written token as a draw from p) is refused later.
        max_new_tokens (`int`, *optional*): The limit that the text was written under, for replay.

    Returns:
        `Dataset`: The rows with the teacher's columns.
    """
    if not {"prompt_ids", "completion_ids"} <= set(dataset.column_names):
        raise ValueError(
            f"The data set has the columns {dataset.column_names}; log-probabilities belong to ids, which are "
            "`prompt_ids` and `completion_ids`. Tokenize what the target saw and wrote, with its own tokenizer."
        )
    prompt_ids, completion_ids = dataset["prompt_ids"][:], dataset["completion_ids"][:]
    for name, column in (("prompt_ids", prompt_ids), ("completion_ids", completion_ids)):
        empty = [i for i, ids in enumerate(column) if not ids]
        if empty:
            raise ValueError(f"`{name}` of row {empty[0]} is empty ({len(empty)} rows in all). Remove such rows.")
    signal = _read_signal(teacher_signal)
    store = ShardStore(output_dir) if output_dir is not None else None
    engine, processing_class = as_engine(target, processing_class)
    batch_size = batch_size or getattr(engine, "default_batch_size", shard_size)
    whole = [prompt + completion for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
    engine.check(whole, SamplingOptions(max_new_tokens=0), signal)
    info = describe_teacher(engine, processing_class, signal, sampling_temperature, max_new_tokens, is_scored=True)
    if store is not None:
        _open_run(
            store, engine, processing_class, whole, signal,
            prompt_lengths=[len(ids) for ids in prompt_ids], sampling_temperature=sampling_temperature,
            max_new_tokens=max_new_tokens, batch_size=batch_size, seed=seed, shard_size=shard_size,
        )  # fmt: skip

    def answer(batch: list[int], index: int):
        texts = [[column[i] for i in batch] for column in (prompt_ids, completion_ids)]
        return engine.score(*texts, signal, f"{seed}:{index}")

    plan = plan_batches([len(ids) for ids in whole], batch_size, shard_size)
    scored = run_plan(plan, answer, store, info, "Teacher scores", show_progress)
    dataset = dataset.remove_columns([name for name in TEACHER_COLUMNS if name in dataset.column_names])
    dataset = _add_teacher_columns(dataset, scored, info)
    if store is not None:
        store.finish(dataset)
    return dataset


def as_engine(
    target: PreTrainedModel | str | Engine, processing_class: ProcessingClass | None
) -> tuple[Engine, ProcessingClass]:
    """The engine that runs a target, and the target's processing class."""
    if isinstance(target, str | torch.nn.Module):
        target = TransformersEngine(target, processing_class)
    processing_class = processing_class or getattr(target, "processing_class", None)
    if processing_class is None:
        raise ValueError(f"The engine {target.name!r} does not say which tokenizer it has: give `processing_class`.")
    return target, processing_class


def describe_teacher(
    engine: Engine,
    processing_class: ProcessingClass,
    signal: SignalRequest,
    sampling_temperature: float | None,
    max_new_tokens: int | None,
    is_scored: bool = False,
) -> TeacherInfo:
    """What the teacher columns are of. Scored and greedy text has the log-probabilities of the plain softmax."""
    is_processed = engine.logprobs_are == "processed" and not is_scored and bool(sampling_temperature)
    identity = engine.describe()
    return TeacherInfo(
        target_name=getattr(engine, "target_name", None),
        target=str(identity.get("target") or json.dumps(identity, sort_keys=True)),
        tokenizer=fingerprint_tokenizer(processing_class),
        vocab_size=count_real_ids(processing_class),
        engine=engine.name,
        method=signal.method,
        num_draws=signal.num_draws,
        top_k=signal.top_k,
        sampling_temperature=sampling_temperature,
        max_new_tokens=max_new_tokens,
        logprobs_are="processed" if is_processed else "raw",
        logprobs_temperature=float(sampling_temperature) if is_processed else 1.0,
    )


def _read_signal(signal: str | SignalRequest | None) -> SignalRequest | None:
    if signal is None:
        return None
    return complete_request(SignalRequest(signal) if isinstance(signal, str) else signal)


def _open_run(store, engine, processing_class, ids: list[list[int]], signal: SignalRequest | None, **settings) -> None:
    fingerprint = {
        **settings,
        "signal": None if signal is None else vars(signal),
        "engine": engine.name,
        "prompts": hashlib.sha256(repr(ids).encode()).hexdigest(),
        "tokenizer": fingerprint_tokenizer(processing_class),
        **engine.describe(),
    }
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    store.open_run(fingerprint, {"target_name": getattr(engine, "target_name", None), **versions})


def _check_written_ids(responses: Sequence[dict], vocab_size: int) -> None:
    """An engine that does not mask the padded rows of a head can write ids that no tokenizer knows."""
    beyond = [row["row"] for row in responses if max(row["completion_ids"], default=0) >= vocab_size]
    if beyond:
        raise ValueError(
            f"{len(beyond)} responses (the first is row {beyond[0]}) contain ids from {vocab_size} on, which the "
            "tokenizer does not have: padded rows of the target's head. Remove these prompts, or use the transformers "
            "engine, which never writes such ids."
        )


def _add_teacher_columns(dataset: Dataset, responses: Sequence[dict], info: TeacherInfo) -> Dataset:
    columns = {"teacher_token_logprobs": List(Value("float32"))}
    if responses[0]["teacher_signal"] is not None:
        columns["teacher_signal"] = Value("binary")
    content = {name: [row[name] for row in responses] for name in columns}
    content["teacher_info"] = [info.to_json()] * len(responses)
    features = Features({**columns, "teacher_info": Value("string")})
    return concatenate_datasets([dataset, Dataset.from_dict(content, features=features)], axis=1)


def _assemble(
    dataset: Dataset, prompt_ids: list[list[int]], responses: list[dict], processing_class: ProcessingClass
) -> Dataset:
    tokenizer = get_tokenizer(processing_class)
    completion_ids = [row["completion_ids"] for row in responses]
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    text, ids = Value("string"), List(Value("int32"))
    columns = {
        "completion": (texts, text),
        "prompt_ids": (prompt_ids, ids),
        "completion_ids": (completion_ids, ids),
        "finish_reason": ([row["finish_reason"] for row in responses], text),
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
    replaced = {*columns, *TEACHER_COLUMNS}
    kept = dataset.select_columns([name for name in dataset.column_names if name not in replaced])
    return concatenate_datasets([kept, written], axis=1) if kept.column_names else written
