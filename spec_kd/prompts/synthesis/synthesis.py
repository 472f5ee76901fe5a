"""Scenario III: the target itself writes the prompts (Magpie, Xu et al. 2024, arXiv 2406.08464)."""

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import accelerate
import pyarrow.parquet as pq
import torch
import transformers
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedModel

from spec_kd.data.prompt_rendering import Prompts, prepare_prompts
from spec_kd.data.responses import as_engine, check_target
from spec_kd.data.shards import ShardStore
from spec_kd.engines.base import Engine
from spec_kd.engines.transformers import TransformersEngine
from spec_kd.files import replacing
from spec_kd.open_types import Argument
from spec_kd.options import read_path, resolve_options
from spec_kd.progress import RowProgress
from spec_kd.prompts.deduplication import NearDuplicateIndex, normalize_text
from spec_kd.prompts.filters import TextFilter, list_user_texts
from spec_kd.prompts.synthesis.conversation_writer import ConversationWriter
from spec_kd.prompts.synthesis.options import Conversation, SynthesisOptions
from spec_kd.prompts.synthesis.pre_query import derive_pre_queries, derive_turn_end
from spec_kd.prompts.tool_catalog import dump_tools
from spec_kd.sampling.options import SamplingOptions
from spec_kd.stored_sets import find_own_sum
from spec_kd.vocabulary import ProcessingClass, fingerprint_tokenizer

WORK_FOLDER = ".rounds"  # hidden, so that `load_dataset(output_dir)` finds only the finished set
FINISHED = "queries.parquet"
ASKED_PER_QUERY = 10
LOWEST_YIELD = 0.1
FEATURES = {
    "prompt": List({"role": Value("string"), "content": Value("string")}),
    **dict.fromkeys(("tools", "scenario", "source", "conversation_id"), Value("string")),
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SynthesisReport:
    """Counts of conversations in a synthesis.

    Args:
        num_queries (`int`): Number of queries that were wanted.
        asked (`int`): Number of conversations begun: `kept`, `surplus` and all `dropped`.
        kept (`int`): Number of conversations in the dataset.
        surplus (`int`): Number of good conversations beyond the wanted ones.
        dropped (`dict[str, int]`): Number of dropped conversations by reason, the most frequent first: those of
            [`TextFilter.find_fault`], `"unfinished"` (the turn did not end within `max_new_tokens`),
            `"special_tokens"`, `"test_overlap"`, `"near_duplicate"`, `"unfinished_completion"`, `"empty_completion"`,
            `"context_full"`, `"not_text"` (the prompt has no text, which a server needs), `"unidentified_tokens"` (a
            server did not say which tokens it wrote).
        by_sampling (`list[dict]`): For each temperature and top-p the number of conversations begun, and of good ones.
        rounds (`int`): Number of rounds.
    """

    num_queries: int
    asked: int
    kept: int
    surplus: int
    dropped: dict[str, int]
    by_sampling: list[dict[str, float]]
    rounds: int

    @property
    def is_complete(self) -> bool:
        """Whether as many queries are kept as were wanted."""
        return self.kept >= self.num_queries

    @property
    def share_good(self) -> float:
        """The yield: the share of conversations begun that passed all filters."""
        return (self.kept + self.surplus) / self.asked

    def to_dict(self) -> dict[str, object]:
        """The report as JSON values."""
        return {**asdict(self), "is_complete": self.is_complete, "share_good": self.share_good}


@dataclass(frozen=True)
class SyntheticQueries:
    """The prompts that a target wrote, as [`synthesize_queries`] returns them.

    Args:
        dataset (`Dataset`): The prompts.
        report (`SynthesisReport`): Counts of conversations begun, kept and dropped.
    """

    dataset: Dataset
    report: SynthesisReport


def synthesize_queries(
    target: PreTrainedModel | str | Engine,
    options: SynthesisOptions | None = None,
    *,
    processing_class: ProcessingClass | None = None,
    text_filter: TextFilter | None = None,
    test_set: Prompts | None = None,
    output_dir: str | None = None,
    show_progress: bool = True,
    **given: Argument,
) -> SyntheticQueries:
    """Lets an aligned target write its own prompts, for domains without logs and without datasets.

    The target gets its chat template up to the user's turn, and writes that turn. The turns are filtered, and new
    conversations are begun until `num_queries` are kept or `max_asked` were begun. A target that was trained only on
    assistant turns writes little of use here: look at the report before you use many.

    With `output_dir` a killed call continues where it was, as [`generate_responses`] does, and ends with the same set.
    `num_queries` and `max_asked` may then be different; rounds that stay the same are not written again. Templates that
    show today's date (Llama-3.2) give another prompt every day. Fix the date with
    `chat_template_kwargs={"date_string": "26 Jul 2024"}`.

    Args:
        target (`PreTrainedModel`, `str` or `Engine`):
            The target, as for [`generate_responses`]. A model stops at the end of the user's turn. An engine that you
            made stops at its own EOS ids, and what it writes after the turn is cut off. If the template ends the user's
            turn with another token (Mistral's `[/INST]`), make the engine with
            `eos_token_ids=[..., *derive_turn_end(tokenizer).ids]` to avoid this work.
        options (`SynthesisOptions`, *optional*): Options of the synthesis, of which `num_queries` has no default.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            The target's; by default loaded from the same place as the target.
        text_filter (`TextFilter`, *optional*): Limits of length, repetition and language; its defaults by default.
        test_set (`list` or `Dataset`, *optional*):
            Prompts, as for [`generate_responses`], that must not be written again: every user's turn is compared. No
            comparison by default.
        output_dir (`str`, *optional*):
            Folder or address of the work and of the finished set (`queries.parquet`). By default nothing is written.
        show_progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.
        given: The fields of [`SynthesisOptions`] as keywords.

    Returns:
        `SyntheticQueries`: A `dataset` with `prompt` (messages, a user's turn last), `tools` (JSON text or `None`),
        `scenario` (`"synthetic"`), `source` (the target's name) and `conversation_id`; and the `report`. Fewer rows
        than wanted are no error, but there is a warning.

    Raises:
        ValueError: Before any generation: an option is out of its range, the chat template does not show the system
            prompt or the tools, a prompt does not fit into the context, or `output_dir` has the work of other options.
        OSError: `output_dir` cannot be written to.
    """
    options = resolve_options(SynthesisOptions, options, given)
    check_target(target)
    output_dir = read_path("output_dir", output_dir, is_optional=True, takes_address=True)
    text_filter = TextFilter() if text_filter is None else text_filter
    test_texts, test_hash = _index_test_set(test_set, options.near_duplicate_threshold)
    engine, processing_class = as_engine(target, processing_class)
    if engine is not target and isinstance(engine, TransformersEngine):  # ours, so it can stop where the turn ends
        turn_end = derive_turn_end(processing_class, chat_template_kwargs=options.chat_template_kwargs)
        engine.eos_ids = sorted({*engine.eos_ids, *turn_end.ids})
    pre_queries = derive_pre_queries(options, processing_class)
    for temperature, top_p in options.samplings:
        sampling = SamplingOptions(options.max_new_tokens, temperature, top_p=top_p, seed=options.seed)
        engine.check(pre_queries, sampling, None)
    settings = {
        **options.describe(),
        "tools": _hash(options.tools),
        "text_filter": asdict(text_filter),
        "test_set": test_hash,
        "engine": engine.name,
        "tokenizer": fingerprint_tokenizer(processing_class),
        "pre_queries": _hash(pre_queries),
        **engine.describe(),
    }
    settings = json.loads(json.dumps(settings))  # as they are read from the folder
    store = ShardStore(output_dir) if output_dir is not None else None
    if store is not None:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        store.open_run(settings, {"target_name": engine.target_name, **versions})
    folder = None if store is None else f"{store.name}/{WORK_FOLDER}"
    writer = ConversationWriter(engine, processing_class, options, text_filter, test_texts, folder)
    kept, report = _write_conversations(writer, options, show_progress)
    source, prefix = engine.target_name or engine.name, f"synthetic-{_hash(settings)[:8]}"
    dataset = _build_dataset(kept, source, prefix, options.chat_template_kwargs)
    if store is not None:
        _save(dataset, store.output_dir / FINISHED)
    return SyntheticQueries(dataset, report)


def _write_conversations(
    writer: ConversationWriter, options: SynthesisOptions, show_progress: bool
) -> tuple[list[Conversation], SynthesisReport]:
    """Writes rounds of conversations until enough are good; returns those that are kept, and the report."""
    num_queries, threshold = options.num_queries, options.near_duplicate_threshold
    max_asked = ASKED_PER_QUERY * num_queries if options.max_asked is None else options.max_asked
    written = None if threshold is None else NearDuplicateIndex(threshold, compare_ends=True)
    asked, good, dropped = Counter[tuple[float, float]](), Counter[tuple[float, float]](), Counter[str]()
    kept: list[Conversation] = []
    num_rounds = 0
    is_main = accelerate.PartialState().is_main_process
    with RowProgress(num_queries, "Synthetic queries", show_progress and is_main) as progress:
        while len(kept) < num_queries and (num_asked := asked.total()) < max_asked:
            share = max(good.total() / num_asked, LOWEST_YIELD) if num_asked else 1.0
            num_missing = num_queries - len(kept)
            count = min(options.round_size, max_asked - num_asked, math.ceil(num_missing / share))
            conversations = [options.plan(index) for index in range(num_asked, num_asked + count)]
            writer.write(conversations, progress)
            for conversation in conversations:
                if conversation.fault is None and written is not None:
                    is_repeated = written.find_and_add([normalize_text(conversation.turns)])[0]
                    conversation.fault = "near_duplicate" if is_repeated else None
            passed = [conversation for conversation in conversations if conversation.fault is None]
            asked.update(conversation.sampling for conversation in conversations)
            good.update(conversation.sampling for conversation in passed)
            dropped.update(conversation.fault for conversation in conversations if conversation.fault is not None)
            kept += passed[:num_missing]
            num_rounds += 1
            progress.advance(num_rows=min(len(passed), num_missing))
    report = SynthesisReport(
        num_queries=num_queries,
        asked=asked.total(),
        kept=len(kept),
        surplus=good.total() - len(kept),
        dropped=dict(dropped.most_common()),
        by_sampling=[
            {"temperature": temperature, "top_p": top_p, "asked": count, "good": good[temperature, top_p]}
            for (temperature, top_p), count in sorted(asked.items())
        ],
        rounds=num_rounds,
    )
    if not report.is_complete and is_main:
        logger.warning(
            "%d of %d queries were kept of %d asked for, the most that `max_asked` allows. Dropped: %s.",
            report.kept, num_queries, report.asked, report.dropped,
        )  # fmt: skip
    return kept, report


def _index_test_set(prompts: Prompts | None, threshold: float | None) -> tuple[NearDuplicateIndex, str | None]:
    """The user's turns of a test set, and a hash of them; `None` for the hash without a test set."""
    index = NearDuplicateIndex() if threshold is None else NearDuplicateIndex(threshold)
    if prompts is None:
        return index, None
    dataset, rows = prepare_prompts(prompts)
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"`test_set` has the columns {dataset.column_names}, but its texts are compared: give a `prompt`."
        )
    texts = [text for row in rows for text in list_user_texts(row["prompt"])]
    for text in texts:
        index.add(text)
    return index, _hash(texts)


def _build_dataset(
    conversations: Sequence[Conversation],
    source: str,
    prefix: str,
    chat_template_kwargs: Mapping[str, object] | None,
) -> Dataset:
    extra = {"chat_template_kwargs": dict(chat_template_kwargs)} if chat_template_kwargs else {}
    rows = [
        {
            "prompt": conversation.prompt,
            "tools": dump_tools(conversation.tools) if conversation.tools else None,
            "scenario": "synthetic",
            "source": source,
            "conversation_id": f"{prefix}-{conversation.index}",
            **extra,
        }
        for conversation in conversations
    ]
    features = Features({**FEATURES, **(Dataset.from_list([extra]).features if extra else {})})
    return Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)


def _save(dataset: Dataset, path: Path) -> None:
    state = accelerate.PartialState()
    if state.is_main_process:
        schema = dataset.features.arrow_schema  # the features are metadata in it, as `to_parquet` writes them
        with replacing(path, find_own_sum(path)) as file:
            pq.write_table(dataset.data.table.cast(schema), file, write_page_checksum=True)
    state.wait_for_everyone()


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
