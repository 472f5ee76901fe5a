"""Lets the target write both sides of conversations, turn by turn, many conversations at a time."""

from collections.abc import Iterator, Sequence

from datasets import Dataset

from spec_kd.data.prompt_rendering import render_prompt_ids
from spec_kd.data.responses import generate_responses
from spec_kd.engines.base import Engine
from spec_kd.progress import RowProgress
from spec_kd.prompts.deduplication import NearDuplicateIndex, normalize_text
from spec_kd.prompts.filters import TextFilter
from spec_kd.prompts.synthesis.options import Conversation, SynthesisOptions
from spec_kd.prompts.synthesis.pre_query import cut_user_text, derive_pre_query, derive_turn_end
from spec_kd.sampling.generation import derive_seed
from spec_kd.sampling.options import SamplingOptions
from spec_kd.sampling.prompts import UnusablePromptError
from spec_kd.vocabulary import ProcessingClass, get_tokenizer

SEED_BITS = 31
BATCHES_PER_SHARD = 8  # what is lost when a run is killed, if the engine has batches


class ConversationWriter:
    """Writes conversations to their end, or until they have a fault.

    Args:
        engine (`Engine`): Engine that runs the target.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): The target's.
        options (`SynthesisOptions`): Options of the synthesis.
        text_filter (`TextFilter`): Conditions that a user's turn must meet.
        test_texts (`NearDuplicateIndex`): Normalized user turns that must not be written again.
        folder (`str`, *optional*): Folder or address of the engine's work; `None` to keep none.
    """

    def __init__(
        self,
        engine: Engine,
        processing_class: ProcessingClass,
        options: SynthesisOptions,
        text_filter: TextFilter,
        test_texts: NearDuplicateIndex,
        folder: str | None,
    ):
        self._engine, self._options, self._folder = engine, options, folder
        self._processing_class, self._tokenizer = processing_class, get_tokenizer(processing_class)
        self._text_filter, self._test_texts = text_filter, test_texts
        self._batch_size = options.batch_size or engine.default_batch_size  # `None` for all prompts of a round
        self._turn_end = derive_turn_end(processing_class, chat_template_kwargs=options.chat_template_kwargs)

    def write(self, conversations: Sequence[Conversation], progress: RowProgress | None = None) -> None:
        """Writes all turns of the conversations, until each is complete or has a fault.

        Args:
            conversations (`Sequence[Conversation]`): Conversations of one round, which are changed.
            progress (`RowProgress`, *optional*): Bar that counts the tokens; none by default.
        """
        self._progress: RowProgress | bool = progress or False
        name = f"{conversations[0].index:08d}-{len(conversations)}"
        active = list(conversations)
        for turn in range(max(self._options.num_turns)):
            self._write_user_turns(active, f"{name}/user-{turn}")
            active = [c for c in active if c.fault is None and not c.is_complete]
            self._write_completions(active, f"{name}/answers-{turn}")  # so named in the folders of earlier runs
            active = [c for c in active if c.fault is None]

    def _write_user_turns(self, conversations: Sequence[Conversation], name: str) -> None:
        for number, (temperature, top_p) in enumerate(sorted({c.sampling for c in conversations})):
            group = [c for c in conversations if c.sampling == (temperature, top_p)]
            pre_queries = [
                derive_pre_query(
                    self._processing_class,
                    system_prompt=c.system_prompt,
                    tools=c.tools,
                    messages=c.turns,
                    chat_template_kwargs=self._options.chat_template_kwargs,
                )
                for c in group
            ]
            group_name = f"{name}-{number}"
            seed = derive_seed(f"{self._options.seed}:{group_name}", SEED_BITS)
            sampling = SamplingOptions(self._options.max_new_tokens, temperature, top_p=top_p, seed=seed)
            for conversation, ids, finish_reason in self._generate(group, pre_queries, sampling, group_name):
                text, fault = cut_user_text(ids, finish_reason, self._turn_end, self._processing_class)
                conversation.fault = fault or self._find_fault(text)
                conversation.turns.append({"role": "user", "content": text})

    def _write_completions(self, conversations: Sequence[Conversation], name: str) -> None:
        variables = self._options.chat_template_kwargs or {}
        rows = ({"prompt": c.prompt, "tools": c.tools, "chat_template_kwargs": variables} for c in conversations)
        prompts = list(render_prompt_ids(rows, self._processing_class))
        sampling = SamplingOptions(self._options.max_completion_tokens, temperature=0.0)
        for conversation, ids, finish_reason in self._generate(conversations, prompts, sampling, name):
            text = str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
            if finish_reason != "stop":
                conversation.fault = "unfinished_completion"
            elif not text.strip():
                conversation.fault = "empty_completion"
            conversation.turns.append({"role": "assistant", "content": text})

    def _generate(
        self, conversations: Sequence[Conversation], prompts: list[list[int]], sampling: SamplingOptions, name: str
    ) -> Iterator[tuple[Conversation, list[int], str]]:
        """The target's completions of the prompts that its engine accepts; the other conversations get a fault."""
        pairs = []
        for conversation, ids in zip(conversations, prompts, strict=True):
            try:
                self._engine.check([ids], sampling, None)
                pairs.append((conversation, ids))
            except UnusablePromptError as error:
                conversation.fault = error.fault
        if not pairs:
            return
        responses = generate_responses(
            self._engine,
            Dataset.from_dict({"prompt_ids": [ids for _, ids in pairs], "position": list(range(len(pairs)))}),
            processing_class=self._processing_class,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            batch_size=self._batch_size,
            seed=sampling.seed,
            on_unidentified_token="drop",
            on_unusable_prompt="skip",
            output_dir=None if self._folder is None else f"{self._folder}/{name}",
            shard_size=BATCHES_PER_SHARD * self._batch_size if self._batch_size else len(pairs),
            show_progress=self._progress,
        )
        for conversation, _ in pairs:
            conversation.fault = "unidentified_tokens"
        for row in responses.select_columns(["position", "completion_ids", "finish_reason"]):
            conversation = pairs[row["position"]][0]
            conversation.fault = None
            yield conversation, row["completion_ids"], row["finish_reason"]

    def _find_fault(self, text: str) -> str | None:
        num_tokens = len(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        fault = self._text_filter.find_fault(text, num_tokens)
        return "test_overlap" if fault is None and self._test_texts.contains(normalize_text(text)) else fault
