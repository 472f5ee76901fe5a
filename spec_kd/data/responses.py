"""The target answers: what it writes to a set of prompts, with the exact ids and, where asked, its probabilities."""

import hashlib
import json
from collections.abc import Iterable, Iterator

import torch
import transformers
from datasets import Dataset
from transformers import PreTrainedModel

from spec_kd.checks import check_dataset, check_int, check_number, check_text, read_path
from spec_kd.data.assembly import add_responses, add_signal
from spec_kd.data.id_lists import IdLists
from spec_kd.data.prompt_rendering import Prompts, prepare_prompts, render_prompt_ids
from spec_kd.data.sharded_runs import PromptRows, plan_batches, run_plan
from spec_kd.data.shards import ShardStore
from spec_kd.data.teacher_signal import TeacherInfo
from spec_kd.data.unidentified_tokens import Answer, check_on_unidentified_token, complete_batch, report_dropped
from spec_kd.data.unusable_prompts import check_on_unusable_prompt, complete_usable, find_unusable, report_skipped
from spec_kd.engines.base import Engine, PromptBatch, SignalSpec
from spec_kd.engines.sparse_recorder import complete_request
from spec_kd.engines.transformers import TransformersEngine
from spec_kd.progress import RowProgress
from spec_kd.sampling.options import SamplingOptions
from spec_kd.stored_sets import check_stored_set
from spec_kd.vocabulary import ProcessingClass, count_real_ids, fingerprint_tokenizer


def generate_responses(
    target: PreTrainedModel | str | Engine,
    prompts: Prompts,
    *,
    processing_class: ProcessingClass | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    teacher_signal: str | SignalSpec | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    on_unidentified_token: str = "raise",
    on_unusable_prompt: str = "raise",
    output_dir: str | None = None,
    shard_size: int = 512,
    show_progress: bool | RowProgress = True,
) -> Dataset:
    """Lets the target answer every prompt: the text that a draft is distilled and evaluated on.

    Greedy, or sampled from the plain softmax at `temperature`. The target's own `generation_config` (its sampling,
    top-k, penalties, forced tokens) does not count, except for its EOS ids, which end a response together with the
    tokenizer's. Ids beyond the tokenizer's vocabulary (padded rows of the head) are never written.

    With a `teacher_signal` the same pass keeps what white-box distillation needs of the target's distribution, and a
    draft can be trained and evaluated without the target from then on. The text does not depend on it.

    With `output_dir` a killed run continues after its last whole shard; with the transformers engine it ends with the
    dataset of an uninterrupted one: batches are planned up front (longest prompts first, so that running out of memory
    shows at once) and each has its own seed. The finished set lies in `output_dir/responses.parquet`; the same call
    again asks the target nothing. Under `accelerate launch` the processes share the shards of an `output_dir` between
    them; without one each does all the work.

    With `output_dir` the responses need not fit into memory: of them one shard is held while it is made, and 1024 rows
    while the finished set is written, which is returned memory-mapped (from a copy in `output_dir/.arrow`). Prompts
    take about 200 bytes each. Without `output_dir` everything is in memory.

    Args:
        target (`PreTrainedModel`, `str` or `Engine`):
            The model, or a path or Hub id to load it from (in its own dtype); modes are restored afterwards. Or an
            engine that runs it elsewhere ([`ServerEngine`], [`VLLMEngine`]).
        prompts (`list[str]`, `list` of conversations, or `Dataset`):
            A dataset has `prompt` (text or messages, with `tools` as list or JSON text, and `chat_template_kwargs`
            where wanted) or `prompt_ids`. Its other columns are kept; `completion`, `completion_ids`, `finish_reason`
            and the teacher's columns are replaced.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            The target's. Loaded from where the target came from by default.
        max_new_tokens (`int`): Most tokens of a response, the EOS included.
        temperature (`float`): 0.0 means greedy.
        top_k (`int`), top_p (`float`):
            Sample from the most likely ids only, so many or of so much mass; 0 and 1.0 for all. With the transformers
            engine, and for text alone: a `teacher_signal` is of the whole distribution.
        teacher_signal (`str` or `SignalSpec`, *optional*):
            What to keep of the distribution at every token: `"token_only"`, `"sampled_counts"`, `"sampled_logprobs"`
            or `"top_k_tail"` (what each may be used for: `spec_kd.losses.SPARSE_METHODS`), or a request with numbers
            of its own.
        batch_size (`int`, *optional*):
            Prompts handed to the engine at a time: 8 by default for transformers; a whole shard for engines that batch
            and queue on their own.
        seed (`int`): Of the sampling. The same seed, prompts, batch size and target give the same set.
        on_unidentified_token (`str`):
            What to do about answers of a server of which the exact ids are not known, because it names tokens in a way
            that is not exactly one id (or, from vLLM, ids of padded rows of the head). `"raise"` stops the job, with
            the finished shards kept. `"drop"` goes on and leaves these rows out: the set then has fewer rows than
            there are prompts, and a warning at the end says how many, why, and which (the first 20). Shards remember
            them, so that a resumed run has the same rows. A folder begun with `"raise"` can be continued with
            `"drop"`.
        on_unusable_prompt (`str`, *optional*, defaults to `"raise"`):
            What to do about prompts that the target cannot take, such as those that are too long for a server.
            `"raise"`: those that the engine knows stop the job before it begins; those that a server refuses stop it
            once all others are answered, which are kept in `output_dir`, and are asked again by the next call.
            `"skip"` leaves them out, with a warning that says how many and why; a resumed run leaves out the same.
        output_dir (`str`, *optional*): Where to keep shards and the finished set.
        shard_size (`int`): Responses in a shard, rounded to whole batches.
        show_progress (`bool` or [`RowProgress`]):
            Whether to show a progress bar of rows, with tokens a second; or the bar of the work that this is a part of.

    Returns:
        `Dataset` in the order of the prompts, with `prompt`, `completion` (messages if the prompt is a conversation,
        else text; decoded without special tokens, for people), `prompt_ids`, `completion_ids` (lists of int32; the EOS
        included if the target wrote it, nothing behind it) and `finish_reason` (`"stop"` or `"length"`); with a signal
        `teacher_token_logprobs` (list of float32), `teacher_signal` (bytes, where there is more than the token's own
        log-probability) and `teacher_info` (JSON, see [`TeacherInfo`]).

    Raises:
        `ValueError`: Before any generation: no prompts, missing columns, an option out of its range, no EOS id, a
            prompt that leaves no room for `max_new_tokens` in the target's context, ids that the target does not
            have, a signal that the engine cannot give, or an `output_dir` with the responses of other settings. After
            it: `on_unidentified_token="drop"` leaves no row.
        `UnidentifiedTokensError`: With `on_unidentified_token="raise"`, after the batch concerned.
        `UnusablePromptError`: With `on_unusable_prompt="raise"`; names the rows.
        `BlockingIOError`: Another process is at work in `output_dir`, with an engine that would answer otherwise.
        `OSError`: `output_dir` cannot be written to.
    """
    signal = None if teacher_signal is None else _read_signal(teacher_signal)
    options = SamplingOptions(max_new_tokens, temperature, top_k, top_p, seed)
    check_options(options, signal, batch_size, shard_size, on_unidentified_token, on_unusable_prompt)
    check_target(target)
    output_dir = read_path("output_dir", output_dir, is_optional=True)
    dataset, rows = prepare_prompts(prompts)
    store = ShardStore(output_dir) if output_dir is not None else None
    engine, processing_class = as_engine(target, processing_class)
    batch_size = batch_size or getattr(engine, "default_batch_size", shard_size)
    prompt_ids = IdLists(render_prompt_ids(rows, processing_class), store.folder if store is not None else None)
    unusable = find_unusable(engine, prompt_ids, options, signal, on_unusable_prompt)
    info = None
    if signal is not None:
        info = describe_teacher(engine, processing_class, signal, options.temperature, max_new_tokens)
    if store is not None:
        _open_run(
            store, engine, processing_class, prompt_ids, signal,
            max_new_tokens=max_new_tokens, temperature=options.temperature, batch_size=batch_size, seed=seed,
            shard_size=shard_size, **({"top_k": top_k, "top_p": top_p} if options.is_truncated else {}),
        )  # fmt: skip
    vocab_size = count_real_ids(processing_class)

    def answer(batch: PromptRows, index: int) -> list[Answer]:
        def ask(rows: list[int]) -> list[Answer]:
            texts = PromptBatch([prompt_ids[row] for row in rows], rows, batch.tell)
            return complete_batch(
                lambda: engine.generate(texts, options, signal, f"{seed}:{index}"),
                rows,
                vocab_size,
                on_unidentified_token,
            )

        return complete_usable(batch, unusable, ask)

    answers = run_plan(
        plan_batches(prompt_ids.lengths.tolist(), batch_size, shard_size),
        answer,
        store,
        info,
        "Target responses",
        on_unidentified_token=on_unidentified_token,
        on_unusable_prompt=on_unusable_prompt,
        is_reproducible=engine.is_reproducible,
        show_progress=show_progress,
    )
    report_skipped(answers.unusable, answers.num_rows)
    report_dropped(answers.unidentified, answers.num_rows - len(answers.unusable))
    return add_responses(dataset, prompt_ids, answers, processing_class, info, store)


def score_completions(
    target: PreTrainedModel | str | Engine,
    dataset: Dataset,
    *,
    processing_class: ProcessingClass | None = None,
    teacher_signal: str | SignalSpec = "sampled_logprobs",
    sampling_temperature: float | None = None,
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    on_unidentified_token: str = "raise",
    on_unusable_prompt: str = "raise",
    output_dir: str | None = None,
    shard_size: int = 512,
    show_progress: bool | RowProgress = True,
) -> Dataset:
    """Adds the teacher signal to completions that exist already, such as logs of what the target served.

    One teacher-forced pass over `prompt_ids` + `completion_ids`; log-probabilities are those of the plain softmax.
    Resumable, and as frugal with memory, as [`generate_responses`], whose other arguments and errors it has.

    Args:
        dataset (`Dataset`): With `prompt_ids` and `completion_ids`; teacher columns it has are replaced.
        teacher_signal (`str` or `SignalSpec`, *optional*, defaults to `"sampled_logprobs"`): What to keep.
        sampling_temperature (`float`, *optional*):
            At which the text was sampled, 0.0 for greedy. Where it is not known, what rests on it (exact replay, the
            written token as a draw from p) is refused later.
        max_new_tokens (`int`, *optional*): The limit that the text was written under, for replay.

    Returns:
        `Dataset`: The rows with the teacher's columns.
    """
    check_target(target)
    check_dataset("dataset", dataset)
    check_number("sampling_temperature", sampling_temperature, 0, is_optional=True, reason="0 is greedy.")
    check_int("max_new_tokens", max_new_tokens, is_optional=True)
    check_int("batch_size", batch_size, is_optional=True)
    check_int("shard_size", shard_size)
    check_int("seed", seed, None)
    output_dir = read_path("output_dir", output_dir, is_optional=True)
    if not {"prompt_ids", "completion_ids"} <= set(dataset.column_names):
        raise ValueError(
            f"The dataset has the columns {dataset.column_names}; log-probabilities belong to ids, which are "
            "`prompt_ids` and `completion_ids`. Tokenize what the target saw and wrote, with its own tokenizer."
        )
    check_on_unidentified_token(on_unidentified_token)
    check_on_unusable_prompt(on_unusable_prompt)
    check_stored_set(dataset)
    signal = _read_signal(teacher_signal)
    store = ShardStore(output_dir) if output_dir is not None else None
    starts: list[int] = []
    texts = IdLists(_join_ids(dataset, starts), store.folder if store is not None else None)
    engine, processing_class = as_engine(target, processing_class)
    batch_size = batch_size or getattr(engine, "default_batch_size", shard_size)
    unusable = find_unusable(engine, texts, None, signal, on_unusable_prompt)
    info = describe_teacher(engine, processing_class, signal, sampling_temperature, max_new_tokens, is_scored=True)
    if store is not None:
        _open_run(
            store, engine, processing_class, texts, signal,
            prompt_lengths=_hash(starts), sampling_temperature=sampling_temperature, max_new_tokens=max_new_tokens,
            batch_size=batch_size, seed=seed, shard_size=shard_size,
        )  # fmt: skip
    vocab_size = count_real_ids(processing_class)

    def answer(batch: PromptRows, index: int) -> list[Answer]:
        def ask(rows: list[int]) -> list[Answer]:
            prompts = PromptBatch([texts[row][: starts[row]] for row in rows], rows, batch.tell)
            completions = [texts[row][starts[row] :] for row in rows]
            return complete_batch(
                lambda: engine.score(prompts, completions, signal, f"{seed}:{index}"),
                rows,
                vocab_size,
                on_unidentified_token,
            )

        return complete_usable(batch, unusable, ask)

    answers = run_plan(
        plan_batches(texts.lengths.tolist(), batch_size, shard_size),
        answer,
        store,
        info,
        "Teacher scores",
        on_unidentified_token=on_unidentified_token,
        on_unusable_prompt=on_unusable_prompt,
        is_reproducible=engine.is_reproducible,
        show_progress=show_progress,
    )
    report_skipped(answers.unusable, answers.num_rows)
    report_dropped(answers.unidentified, answers.num_rows - len(answers.unusable))
    return add_signal(dataset, answers, info, store)


def _join_ids(dataset: Dataset, starts: list[int]) -> Iterator[list[int]]:
    """Every prompt with its completion; appends to `starts` where the completion begins."""
    names = ("prompt_ids", "completion_ids")
    for index, row in enumerate(dataset.select_columns(list(names)).with_format(None)):
        for name in names:
            if not row[name]:
                raise ValueError(f"`{name}` of row {index} is empty, so there is nothing to score. Remove such rows.")
        starts.append(len(row["prompt_ids"]))
        yield row["prompt_ids"] + row["completion_ids"]


def as_engine(
    target: PreTrainedModel | str | Engine, processing_class: ProcessingClass | None
) -> tuple[Engine, ProcessingClass]:
    """The engine that runs a target, and the target's processing class; raises as [`check_target`]."""
    check_target(target)
    if isinstance(target, str | torch.nn.Module):
        target = TransformersEngine(target, processing_class)
    processing_class = processing_class or getattr(target, "processing_class", None)
    if processing_class is None:
        raise ValueError(f"The engine {target.name!r} does not say which tokenizer it has: give `processing_class`.")
    return target, processing_class


def check_target(target: PreTrainedModel | str | Engine) -> None:
    """Raises `ValueError` for a target that is neither a model, nor text that names one, nor an engine."""
    if isinstance(target, str):
        check_text("target", target)
    elif not isinstance(target, torch.nn.Module) and not callable(getattr(target, "generate", None)):
        raise ValueError(f"`target` is {target!r:.80}, but must be a model, its path or Hub id, or an engine.")


def describe_teacher(
    engine: Engine,
    processing_class: ProcessingClass,
    signal: SignalSpec,
    sampling_temperature: float | None,
    max_new_tokens: int | None,
    is_scored: bool = False,
) -> TeacherInfo:
    """What the teacher columns are of. Scored and greedy text has the log-probabilities of the plain softmax."""
    is_processed = engine.logprobs_mode == "processed" and not is_scored and bool(sampling_temperature)
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
        logprobs_mode="processed" if is_processed else "raw",
        logprobs_temperature=float(sampling_temperature or 1) if is_processed else 1.0,
    )


def check_options(
    options: SamplingOptions,
    signal: SignalSpec | None,
    batch_size: int | None,
    shard_size: int,
    on_unidentified_token: str,
    on_unusable_prompt: str = "raise",
) -> None:
    """Raises `ValueError` for options of [`generate_responses`] that are wrong whatever the prompts and the target."""
    check_int("batch_size", batch_size, is_optional=True)
    check_int("shard_size", shard_size)
    check_on_unidentified_token(on_unidentified_token)
    check_on_unusable_prompt(on_unusable_prompt)
    if options.is_truncated and signal is not None:
        raise ValueError(
            f"`teacher_signal={signal.method!r}` is of the whole distribution, and text sampled with `top_k="
            f"{options.top_k}` and `top_p={options.top_p}` is not drawn from it. Leave one of them out, or add the "
            "signal afterwards with `score_completions`."
        )


def _read_signal(signal: str | SignalSpec) -> SignalSpec:
    return complete_request(SignalSpec(signal) if isinstance(signal, str) else signal)


def _open_run(
    store: ShardStore,
    engine: Engine,
    processing_class: ProcessingClass,
    ids: IdLists,
    signal: SignalSpec | None,
    **settings: object,
) -> None:
    fingerprint = {
        **settings,
        "signal": None if signal is None else vars(signal),
        "engine": engine.name,
        "prompts": _hash(ids),
        "tokenizer": fingerprint_tokenizer(processing_class),
        **engine.describe(),
    }
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    store.open_run(fingerprint, {"target_name": getattr(engine, "target_name", None), **versions})


def _hash(values: Iterable[object]) -> str:
    """Of the list with these values, which need not exist."""
    digest = hashlib.sha256(b"[")
    for index, value in enumerate(values):
        digest.update(f"{', ' if index else ''}{value!r}".encode())
    digest.update(b"]")
    return digest.hexdigest()
