"""The target completes prompts: responses with their exact ids and, if asked, what was kept of its distribution."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import cast

import pyarrow as pa
import torch
import transformers
from datasets import Dataset
from transformers import PreTrainedModel

from spec_kd.data.assembly import add_responses, add_signal
from spec_kd.data.outcomes import find_unusable, report_outcomes
from spec_kd.data.prompt_rendering import Prompts, prepare_prompts, render_prompt_ids
from spec_kd.data.response_options import ResponseOptions, ScoreOptions
from spec_kd.data.shard_tasks import Batch, ShardTask
from spec_kd.data.sharded_runs import RunResult, plan_batches, run_plan
from spec_kd.data.shards import IdLists, ShardStore
from spec_kd.data.teacher_signal import TeacherInfo
from spec_kd.engines.base import Engine
from spec_kd.engines.transformers import TransformersEngine
from spec_kd.losses import SignalSpec
from spec_kd.open_types import Argument
from spec_kd.options import check_dataset, check_text, read_path, resolve_options
from spec_kd.progress import RowProgress
from spec_kd.stored_sets import check_stored_set
from spec_kd.vocabulary import ProcessingClass, count_real_ids, fingerprint_tokenizer


def generate_responses(
    target: PreTrainedModel | str | Engine,
    prompts: Prompts,
    options: ResponseOptions | None = None,
    *,
    processing_class: ProcessingClass | None = None,
    output_dir: str | None = None,
    show_progress: bool | RowProgress = True,
    **given: Argument,
) -> Dataset:
    """Lets the target complete every prompt: the responses that a draft is distilled and evaluated on.

    Completions are sampled from the plain softmax at `temperature`, 1 by default. The target's own `generation_config`
    (sampling, top-k, penalties, forced tokens) does not count, except for its EOS ids, which end a completion together
    with the tokenizer's. Ids beyond the tokenizer's vocabulary (padded rows of the head) are never written.

    With a `teacher_signal` the same pass keeps what white-box distillation needs of the target's distribution, and a
    draft can be trained and evaluated without the target from then on. The completions do not depend on the signal.

    With `output_dir` a killed run continues after its last whole shard. With the transformers engine it ends with the
    dataset of an uninterrupted run: batches are planned before the first one (longest prompts first, so that running
    out of memory shows at once) and each has its own seed. The finished set lies in `output_dir/responses.parquet`, and
    the same call again returns it without asking the target. Under `accelerate launch` the processes share the shards
    of an `output_dir`; without one each process does all the work.

    With `output_dir` the responses need not fit into memory: one shard is held while it is made, and 1024 rows while
    the finished set is written. The set is returned memory-mapped, from a copy in `output_dir/.arrow`. Prompts take
    about 200 bytes each. Without `output_dir` everything is in memory.

    Args:
        target (`PreTrainedModel`, `str` or `Engine`):
            The model, or a path or Hub id to load it from (in its own dtype); modes are restored afterwards. Or an
            engine that runs it elsewhere ([`ServerEngine`], [`VLLMEngine`], [`RayEngine`] on many machines).
        prompts (`list[str]`, `list` of conversations, or `Dataset`):
            A dataset has `prompt` (text or messages, with `tools` as list or JSON text, and `chat_template_kwargs`
            where wanted) or `prompt_ids`. Its other columns are kept; `completion`, `completion_ids`, `finish_reason`
            and the teacher's columns are replaced.
        options (`ResponseOptions`, *optional*): How to sample, what to keep, and how to deal with what goes wrong.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            The target's. Loaded from where the target came from by default.
        output_dir (`str`, *optional*):
            Folder or address (`s3://...`) for the shards and the finished set; by default nothing is written.
        show_progress (`bool` or [`RowProgress`], *optional*, defaults to `True`):
            Whether to show a progress bar of rows, with tokens per second; or the bar of the work that this is part of.
        given: The fields of [`ResponseOptions`] as keywords, such as `max_new_tokens`, `temperature`,
            `teacher_signal` and `batch_size`.

    Returns:
        `Dataset` in the order of the prompts, with `prompt`, `completion` (messages if the prompt is a conversation,
        else text; decoded without special tokens, for people), `prompt_ids`, `completion_ids` (lists of int32; the EOS
        included if the target wrote it, nothing after it) and `finish_reason` (`"stop"` or `"length"`); with a signal
        `teacher_token_logprobs` (list of float32), `teacher_signal` (bytes, where there is more than the token's own
        log-probability) and `teacher_info` (JSON, see [`TeacherInfo`]).

    Raises:
        TypeError: For a keyword that is no option, or prompts of another form.
        ValueError: Before any generation: no prompts, missing columns, an option out of its range, no EOS id, a
            prompt that leaves no room for `max_new_tokens` in the target's context, ids that the target does not
            have, a signal that the engine cannot give, or an `output_dir` with the responses of other settings. After
            it: `on_unidentified_token="drop"` leaves no row.
        UnidentifiedTokensError: With `on_unidentified_token="raise"`, after the batch concerned.
        UnusablePromptError: With `on_unusable_prompt="raise"`; names the rows. Prompts that the engine knows to be
            unusable raise before any generation; those that a server refuses raise once all others are completed, and
            the next call asks only for these again.
        BlockingIOError: Another process works in `output_dir`, with an engine that would write other completions.
        OSError: `output_dir` cannot be written to.
    """
    options = resolve_options(ResponseOptions, options, given)
    check_target(target)
    output_dir = read_path("output_dir", output_dir, is_optional=True, takes_address=True)
    dataset, rows = prepare_prompts(prompts)
    store = ShardStore(output_dir) if output_dir is not None else None
    engine, processing_class = as_engine(target, processing_class)
    ids = IdLists(render_prompt_ids(rows, processing_class), store.folder if store is not None else None)
    result, info = _run(engine, processing_class, ids, None, store, options, show_progress)
    return add_responses(dataset, ids, result, processing_class, info, store)


def score_completions(
    target: PreTrainedModel | str | Engine,
    dataset: Dataset,
    options: ScoreOptions | None = None,
    *,
    processing_class: ProcessingClass | None = None,
    output_dir: str | None = None,
    show_progress: bool | RowProgress = True,
    **given: Argument,
) -> Dataset:
    """Adds the teacher signal to completions that exist already, such as logs of what the target served.

    One teacher-forced pass over `prompt_ids` + `completion_ids`; log-probabilities are those of the plain softmax.
    It resumes, shares work between processes and uses memory as [`generate_responses`] does.

    Args:
        target (`PreTrainedModel`, `str` or `Engine`): As for [`generate_responses`].
        dataset (`Dataset`): Has `prompt_ids` and `completion_ids`; teacher columns that it has are replaced.
        options (`ScoreOptions`, *optional*): What to keep, and what is known of the completions.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*): As for [`generate_responses`].
        output_dir (`str`, *optional*): As for [`generate_responses`].
        show_progress (`bool` or [`RowProgress`], *optional*, defaults to `True`): As for [`generate_responses`].
        given: The fields of [`ScoreOptions`] as keywords, such as `teacher_signal` and `sampling_temperature`.

    Returns:
        `Dataset`: The rows with the teacher's columns.

    Raises:
        ValueError: For a dataset without ids or with an empty row, and as [`generate_responses`], whose other errors
            this function has as well.
    """
    options = resolve_options(ScoreOptions, options, given)
    check_target(target)
    check_dataset("dataset", dataset)
    output_dir = read_path("output_dir", output_dir, is_optional=True, takes_address=True)
    if not {"prompt_ids", "completion_ids"} <= set(dataset.column_names):
        raise ValueError(
            f"The dataset has the columns {dataset.column_names}; log-probabilities belong to ids, which are "
            "`prompt_ids` and `completion_ids`. Tokenize what the target saw and wrote, with its own tokenizer."
        )
    check_stored_set(dataset)
    store = ShardStore(output_dir) if output_dir is not None else None
    starts: list[int] = []
    ids = IdLists(_join_ids(dataset, starts), store.folder if store is not None else None)
    engine, processing_class = as_engine(target, processing_class)
    result, info = _run(engine, processing_class, ids, starts, store, options, show_progress)
    return add_signal(dataset, result, cast(TeacherInfo, info), store)


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
    """The engine that runs a target, which [`check_target`] has checked, and the target's processing class.

    Raises:
        `ValueError`: The target is an engine without a processing class, and none is given.
    """
    if isinstance(target, str | torch.nn.Module):
        target = TransformersEngine(target, processing_class)
    if (processing_class := processing_class or target.processing_class) is None:
        raise ValueError(f"The engine {target.name!r} does not say which tokenizer it has: give `processing_class`.")
    return target, processing_class


def check_target(target: PreTrainedModel | str | Engine) -> None:
    """Raises `ValueError` for a target that is neither a model, nor text that names one, nor an engine."""
    if isinstance(target, str):
        check_text("target", target)
    elif not isinstance(target, torch.nn.Module | Engine):
        raise ValueError(f"`target` is {target!r:.80}, but must be a model, its path or Hub id, or an engine.")


def _run(
    engine: Engine,
    processing_class: ProcessingClass,
    ids: IdLists,
    starts: Sequence[int] | None,
    store: ShardStore | None,
    options: ResponseOptions | ScoreOptions,
    show_progress: bool | RowProgress,
) -> tuple[RunResult, TeacherInfo | None]:
    """Runs an engine over all rows of a dataset: what generating and scoring have in common.

    Args:
        engine (`Engine`): Runs the target.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): The target's.
        ids (`IdLists`): What the engine reads of every row.
        starts (`Sequence[int]`, *optional*): Where the completion of every row begins, if completions are scored.
        store (`ShardStore`, *optional*): Where the run is kept.
        options (`ResponseOptions` or `ScoreOptions`): Options of the run.
        show_progress (`bool` or `RowProgress`): As for [`generate_responses`].

    Returns:
        The outcomes of all rows, and what their teacher columns are of, if there is a signal.
    """
    sampling = options if isinstance(options, ResponseOptions) else None
    batch_size = options.batch_size or engine.default_batch_size or options.shard_size
    unusable = find_unusable(engine, ids, sampling, options.signal, options.on_unusable_prompt)
    info = None if options.signal is None else describe_teacher(engine, processing_class, options)
    if store is not None:
        fingerprint = {
            **options.list_settings(),
            **({} if starts is None else {"prompt_lengths": _hash(starts)}),
            "batch_size": batch_size,
            "signal": options.signal and asdict(options.signal),
            "engine": engine.name,
            "prompts": _hash(ids),
            "tokenizer": fingerprint_tokenizer(processing_class),
            **engine.describe(),
        }
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        store.open_run(fingerprint, {"target_name": engine.target_name, **versions})
    vocab_size = count_real_ids(processing_class)

    def make_task(number: int, batches: list[Batch], found: pa.Table | None) -> ShardTask:
        rows = [row for _, batch in batches for row in batch]
        ends = {row: None if starts is None else starts[row] for row in rows}
        return ShardTask(
            number,
            batches,
            {row: ids[row][:end] for row, end in ends.items()},
            {row: ids[row][end:] for row, end in ends.items() if end is not None},
            options,
            vocab_size,
            info,
            {row: unusable[row] for row in rows if row in unusable},
            found,
        )

    plan = plan_batches(ids.lengths.tolist(), batch_size, options.shard_size)
    description = "Teacher scores" if options.is_scored else "Target responses"
    result = run_plan(plan, engine, make_task, store, options, description, show_progress)
    report_outcomes(result.unusable, result.unidentified, result.num_rows)
    return result, info


def describe_teacher(
    engine: Engine, processing_class: ProcessingClass, options: ResponseOptions | ScoreOptions
) -> TeacherInfo:
    """What the teacher columns of a run are of.

    Scored and greedy completions have the log-probabilities of the plain softmax.
    """
    signal, temperature = cast(SignalSpec, options.signal), options.sampling_temperature
    is_processed = engine.logprobs_mode == "processed" and not options.is_scored and bool(temperature)
    identity = engine.describe()
    return TeacherInfo(
        target_name=engine.target_name,
        target=str(identity.get("target") or json.dumps(identity, sort_keys=True)),
        tokenizer=fingerprint_tokenizer(processing_class),
        vocab_size=count_real_ids(processing_class),
        engine=engine.name,
        **asdict(signal),
        sampling_temperature=temperature,
        max_new_tokens=options.max_new_tokens,
        logprobs_mode="processed" if is_processed else "raw",
        logprobs_temperature=float(temperature or 1) if is_processed else 1.0,
    )


def _hash(values: Iterable[object]) -> str:
    """SHA-256 of the JSON list with these values, which is never held as a whole."""
    digest = hashlib.sha256(b"[")
    for index, value in enumerate(values):
        digest.update(f"{', ' if index else ''}{json.dumps(value)}".encode())
    digest.update(b"]")
    return digest.hexdigest()
