"""Asks a running server, with and without a draft, and keeps its completions, counts and times."""

import hashlib
import json
import math
import os
from collections.abc import Sequence

from spec_kd.data.prompt_rendering import Prompts, prepare_prompts, render_prompt_ids
from spec_kd.engines.base import Completion, MissingCompletionsError
from spec_kd.engines.server.client import ServerRequestError
from spec_kd.engines.server.connection import find_root, hide_userinfo
from spec_kd.engines.server.engine import ServerEngine
from spec_kd.engines.server.logprobs import UnidentifiedTokensError
from spec_kd.evaluation.observation.options import ObservationOptions
from spec_kd.evaluation.observation.records import Observation, ObservedRequest
from spec_kd.evaluation.observation.store import DRAFT, PLAIN, ObservationStore
from spec_kd.evaluation.response_rows import list_formats
from spec_kd.open_types import Argument, JsonObject
from spec_kd.options import resolve_options
from spec_kd.progress import RowProgress
from spec_kd.sampling.prompts import PromptBatch
from spec_kd.sampling.response_format import ResponseFormat, hash_formats
from spec_kd.serving import SERVING_ENGINES
from spec_kd.serving.observer import DraftCounts
from spec_kd.vocabulary import ProcessingClass

NUM_TOKENS_TO_DRAFT = 16  # a server that wrote so many without a drafted token will never draft
MISSING_PAGES = (401, 403, 404, 405, 500, 501)


def observe_serving(
    url: str,
    prompts: Prompts,
    options: ObservationOptions | None = None,
    *,
    processing_class: ProcessingClass,
    plain_url: str | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    show_progress: bool = True,
    **given: Argument,
) -> Observation:
    """Asks a running server to complete prompts, and reads how many tokens it drafted, accepted and wrote a second.

    Prompts are rendered as [`~spec_kd.evaluate_draft`] renders them, and sent as ids. Counts come from each answer
    where the server tells them there (llama-server always; vLLM with `--per-request-spec-decode-metrics detailed`;
    SGLang), and from its counters under `/metrics` before and after. Times are the server's own where it tells them,
    else those of whole requests.

    Args:
        url (`str`): Address of a server with the draft, such as `"http://localhost:8000"`.
        prompts (`list[str]`, `list` of conversations, or `Dataset`):
            Prompts as [`~spec_kd.data.generate_responses`] takes them. A column `response_format` says what each
            completion is held to, as for [`~spec_kd.replay`]; it is sent in the engine's own form.
        options (`ObservationOptions`, *optional*): What is asked; the defaults of [`ObservationOptions`] by default.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): The target's.
        plain_url (`str`, *optional*):
            Address of a server with the same target and no draft, for the speed-up. With `concurrency=1` each prompt is
            sent to both, one after the other.
        output_dir (`str` or `os.PathLike`, *optional*):
            Folder for the answers, with which a killed run continues. By default nothing is kept on disk.
        show_progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.
        given: Fields of [`ObservationOptions`] as keywords, which replace those of `options`.

    Returns:
        [`Observation`]; [`~spec_kd.compare_observed`] sets it beside what replay predicts.

    Raises:
        ValueError: An option is out of its range; the server is of another engine, drafts nothing, or tells nothing of
            its drafts; `plain_url` drafts too; or `output_dir` holds an observation with other options.
        ServerRequestError: A request failed for good.
    """
    options = resolve_options(ObservationOptions, options, given)
    dataset, rows = prepare_prompts(prompts)
    prompt_ids = list(render_prompt_ids(rows, processing_class))
    formats = list_formats(dataset, options.response_format)
    servers = {DRAFT: _Server(url, options, processing_class, formats)}
    if plain_url is not None:
        if find_root(plain_url) == find_root(url):
            raise ValueError("`plain_url` is the address of the server with the draft. Start another one without it.")
        servers[PLAIN] = _Server(plain_url, options, processing_class, formats)
    engine = servers[DRAFT].engine
    fingerprint = {
        **options.list_values(),
        "prompts": hashlib.sha256(json.dumps(prompt_ids).encode()).hexdigest(),
        "target": engine.describe(),
        **({"formats": hash_formats(formats)} if formats else {}),
    }
    store = ObservationStore(output_dir, fingerprint)
    with store.alone():
        unusable = _ask_all(servers, store, prompt_ids, options, show_progress)
    asked = {side: [rows[row] for row in sorted(rows)] for side, rows in store.requests.items()}
    if not asked[DRAFT]:
        raise ValueError(f"The server could use none of the prompts. The first: {next(iter(unusable.values()), '')}")
    counts = [counts for counts, _ in store.counters]
    total = counts[0] if counts else None
    for other in counts[1:]:
        total = total and total.plus(other)
    return Observation(
        serving_engine=options.serving_engine,
        model=str(engine.target_name),
        temperature=float(options.temperature),
        max_new_tokens=options.max_new_tokens,
        concurrency=options.concurrency,
        num_assistant_tokens=options.num_assistant_tokens or _find_num_assistant_tokens(asked[DRAFT], total),
        prompt_ids=prompt_ids,
        requests=asked[DRAFT],
        plain_requests=asked[PLAIN],
        counters=total,
        counted_requests=sum(number for _, number in store.counters),
        assistant_confidence_threshold=float(options.assistant_confidence_threshold),
        unusable=unusable,
    )


class _Server:
    """One server: what it is, its counters, and requests to it."""

    def __init__(
        self,
        url: str,
        options: ObservationOptions,
        processing_class: ProcessingClass,
        formats: Sequence[ResponseFormat | None],
    ):
        self.options, self.observer, self.formats = options, options.observer, formats
        self.url = hide_userinfo(find_root(url))
        base_url = f"{find_root(url)}/v1"
        self.engine = ServerEngine(options.model or "", processing_class, base_url, options.server)
        names = self._identify()
        if options.model is None:
            if not names:
                raise ValueError(f"The server at {self.url} lists no model. Pass `model`, the name of its target.")
            self.engine = ServerEngine(names[0], processing_class, base_url, options.server)

    def _identify(self) -> list[str]:
        """Names of the models that the server lists; raises `ValueError` for a server of another engine."""
        try:
            listed = json.loads(self.engine.fetch("/v1/models"))["data"]
        except ServerRequestError as error:
            if error.status_code not in MISSING_PAGES:
                raise
            return []
        except (KeyError, TypeError, ValueError):
            return []
        owners = [one.get("owned_by") for one in listed]
        for other in SERVING_ENGINES.values():
            if other.observer and other.observer.owner in owners and self.observer.owner not in owners:
                raise ValueError(
                    f"The server at {self.url} is {other.title}, not {self.options.engine.title}. Set "
                    f"`serving_engine={other.name!r}`."
                )
        return [one["id"] for one in listed]

    def read_counters(self) -> DraftCounts | None:
        """The server's counters; `None` if it does not show them."""
        try:
            return self.observer.read_metrics(self.engine.fetch("/metrics"))
        except ServerRequestError as error:
            if error.status_code not in MISSING_PAGES:
                raise
            return None

    def ask(
        self, rows: Sequence[int], prompt_ids: Sequence[list[int]], side: str, store: ObservationStore
    ) -> dict[int, str]:
        """Sends the prompts of these rows and keeps each answer; returns why some cannot be used, by row."""
        formats = [self.formats[row] if self.formats else None for row in rows]

        def tell(index: int, completion: Completion, answer: JsonObject, seconds: float) -> None:
            held_to = formats[index] and (self.observer.read_format(answer) or formats[index])
            request = ObservedRequest(
                row=rows[index],
                completion_ids=completion.ids,
                finish_reason=completion.finish_reason,
                request_seconds=seconds,
                decoding_seconds=self.observer.read_decoding_seconds(answer),
                counts=self.observer.read_counts(answer),
                response_format=None if held_to is None else held_to.to_request(),
            )
            if side == PLAIN and request.counts is not None and request.counts.activity:
                raise ValueError(f"The server at {self.url} drafts too. `plain_url` must be one without a draft.")
            store.add_request(side, request)

        native = self.observer.path is not None
        try:
            self.engine.observe(
                PromptBatch([prompt_ids[row] for row in rows], rows),
                self.options.sampling,
                tell,
                [f"{self.options.seed}:{row}" for row in rows],
                path=self.observer.path,
                build_body=self.observer.build_body if native else None,
                translate=self.observer.translate if native else None,
                fields=[{} if wanted is None else self.observer.write_format(wanted) for wanted in formats],
            )
        except MissingCompletionsError as error:
            return {rows[index]: reason for index, reason in error.reasons.items()}
        except UnidentifiedTokensError as error:
            return {rows[index]: f"tokens without an id: {names}" for index, names in enumerate(error.names) if names}
        return {}


def _ask_all(
    servers: dict[str, _Server],
    store: ObservationStore,
    prompt_ids: Sequence[list[int]],
    options: ObservationOptions,
    show_progress: bool,
) -> dict[int, str]:
    """Asks what is missing, and checks that the server drafts as soon as that can be known."""
    missing = [row for row in range(len(prompt_ids)) if any(row not in store.requests[side] for side in servers)]
    size = options.concurrency
    batches = [[row] for row in missing] if size == 1 else [rows for rows in (missing[:size], missing[size:]) if rows]
    before, num_before = servers[DRAFT].read_counters(), len(store.requests[DRAFT])
    is_drafting, unusable = False, dict[int, str]()
    with RowProgress(len(prompt_ids), "Observation", show_progress, len(prompt_ids) - len(missing)) as progress:
        for number, batch in enumerate(batches, start=1):
            for side, server in servers.items():
                if rows := [row for row in batch if row not in store.requests[side]]:
                    unusable |= server.ask(rows, prompt_ids, side, store)
            is_drafting = is_drafting or _is_drafting(servers[DRAFT], store, before, number == len(batches))
            written = (store.requests[DRAFT].get(row) for row in batch)
            progress.advance(sum(len(one.completion_ids) for one in written if one), len(batch))
    if asked := len(store.requests[DRAFT]) - num_before:
        after = servers[DRAFT].read_counters()
        if before is not None and after is not None:
            store.add_counters(after.minus(before), asked)
    return unusable


def _is_drafting(server: _Server, store: ObservationStore, before: DraftCounts | None, is_last: bool) -> bool:
    """Whether the server has drafted; raises `ValueError` where it never will, or where nothing tells."""
    requests = store.requests[DRAFT].values()
    if not requests:
        return False
    told = [one.counts.activity for one in requests if one.counts is not None]
    known = [activity for activity in told if activity is not None]
    if known:
        activity: int | None = sum(known)
    else:
        now = server.read_counters()
        activity = now.minus(before).activity if now is not None and before is not None else None
        if activity is None:
            raise ValueError(
                f"Neither the answers nor the counters of the server at {server.url} tell what it drafted. Start the "
                f"server {server.observer.metrics_hint}."
            )
    written = sum(len(one.completion_ids) - 1 for one in requests)
    if not activity and (is_last or written >= NUM_TOKENS_TO_DRAFT):
        store.forget(DRAFT)  # another server, under the same address, is asked from the first prompt on
        raise ValueError(
            f"The counters did not move while the server at {server.url} wrote {written} tokens: it does not draft. "
            f"{server.observer.drafting_hint}"
        )
    return bool(activity)


def _find_num_assistant_tokens(requests: Sequence[ObservedRequest], total: DraftCounts | None) -> int | None:
    """Tokens drafted in a round, where the number of positions tells, or how many there are of both."""
    told = [counts for counts in (total, *(request.counts for request in requests)) if counts is not None]
    positions = [len(counts.accepted_by_position or ()) for counts in told]
    per_round = [math.ceil(counts.drafted / counts.rounds) for counts in told if counts.drafted and counts.rounds]
    return max([*positions, *per_round], default=0) or None
