"""Acceptance metrics at every evaluation of any `Trainer`, before training included."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import cast

from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spec_kd.acceptance import check_num_assistant_tokens
from spec_kd.data.prompt_rendering import Prompts, prepare_prompts
from spec_kd.data.responses import generate_responses
from spec_kd.evaluation.assisted import generate_assisted
from spec_kd.evaluation.metrics import AcceptanceMetrics, name_temperature
from spec_kd.evaluation.options import DEFAULT_TEMPERATURES, ReplayOptions
from spec_kd.evaluation.response_replay import replay
from spec_kd.evaluation.stored_responses import find_max_new_tokens, split_by_temperature
from spec_kd.evaluation.trackers import log_picture, plot_acceptance
from spec_kd.open_types import Argument, Arguments
from spec_kd.options import check_choice, check_int, check_numbers
from spec_kd.parallel import read_parallel_drafting
from spec_kd.sampling.generation import find_special_ids
from spec_kd.sampling.options import SamplingOptions
from spec_kd.sharding import check_fsdp, whole_model
from spec_kd.vocabulary import ProcessingClass, count_real_ids

METHODS = ("replay", "assisted")
DEFAULT_MAX_NEW_TOKENS = 128


class SpeculativeEvalCallback(TrainerCallback):
    """Measures how well the model in training drafts for its target, at every evaluation and before the first step.

    The target writes one response to each prompt at each temperature, once. Logged are `eval_alpha_greedy`,
    `eval_alpha_t1`, ... (each on responses sampled so) and, for the first temperature, `eval_acceptance_rate`,
    `eval_block_efficiency` and `eval_acceptance_rate_pos_1`, ...; for the others the same with a suffix (`_t1`).
    Beside them stand the shares of looping completions (`eval_share_looping`) and of prompts without the chat template
    (`eval_share_untemplated`), and alpha and block efficiency without these (`eval_alpha_without_looping_greedy`, ...).
    For a parallel draft `eval_alpha_pos_1_greedy`, ... are the alpha of each token of a round.
    `method="assisted"` also logs `eval_tokens_per_second_assisted`, `eval_tokens_per_second_plain` and `eval_speedup`.
    Each of them can be `metric_for_best_model` (with `greater_is_better=True`), and all reach every tracker.
    TensorBoard, W&B and Trackio also get a picture of the acceptance by position if matplotlib is installed.

    A run that continues from a checkpoint does not repeat the evaluation of that checkpoint. With several processes,
    each computes all metrics, and those of process 0 count.

    Args:
        prompts (`list[str]`, `list` of conversations, or `Dataset`):
            Prompts as [`~spec_kd.generate_responses`] takes them. Or responses that it made with a
            `teacher_signal`: the draft is then replayed on these, at their temperatures, and no target is needed.
        target (`PreTrainedModel`, *optional*):
            The target. By default `teacher_model` of the bound trainer, if it has one; not needed with such responses.
        method (`str`, *optional*, defaults to `"replay"`):
            `"replay"` reads the responses in one pass, exact and fast. `"assisted"` generates, and measures the real
            speed; alpha still comes from replay.
        temperatures (`Sequence[float]`, *optional*):
            Temperatures to measure, 0.0 for greedy. By default 0.0 and 1.0, or those of the responses.
        num_assistant_tokens (`int`, *optional*, defaults to `5`): Number of tokens drafted in a round.
        max_new_tokens (`int`, *optional*): Most tokens of a response. By default 128, or the limit of the responses.
        draft_sampling (`str`, *optional*, defaults to `"stochastic"`): `"stochastic"` or `"greedy"`, see [`replay`].
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            The target's. By default that of the bound trainer.
        batch_size (`int`, *optional*, defaults to `8`): Number of prompts at a time.
        vocab_size (`int`, *optional*): Number of real ids. By default that of `processing_class`.
        seed (`int`, *optional*, defaults to `0`): Sampling seed.
        metric_key_prefix (`str`, *optional*, defaults to `"eval"`): Prefix of every name.
        trainer (`Trainer`, *optional*):
            Trainer to bind to. This package's trainers bind themselves; with another trainer, pass it or call [`bind`].
            Unbound, the metrics reach `metric_for_best_model` but no tracker.

    Attributes:
        history (`list[tuple[int, dict[float, AcceptanceMetrics]]]`): Step, and metrics by temperature.

    Raises:
        ValueError: If there are no prompts or an option is out of its range; when training begins, if the run never
            evaluates, has no target or tokenizer, or shards its models by FSDP1.
    """

    def __init__(
        self,
        prompts: Prompts,
        target: PreTrainedModel | None = None,
        *,
        method: str = "replay",
        temperatures: Sequence[float] | None = None,
        num_assistant_tokens: int = 5,
        max_new_tokens: int | None = None,
        draft_sampling: str = "stochastic",
        processing_class: ProcessingClass | None = None,
        batch_size: int = 8,
        vocab_size: int | None = None,
        seed: int = 0,
        metric_key_prefix: str = "eval",
        trainer: Trainer | None = None,
    ):
        prepare_prompts(prompts)
        self._stored = split_by_temperature(prompts)
        temperatures = temperatures if temperatures is not None else tuple(self._stored) or DEFAULT_TEMPERATURES
        if max_new_tokens is None:
            max_new_tokens = find_max_new_tokens(self._stored) or DEFAULT_MAX_NEW_TOKENS
        check_choice("method", method, METHODS)
        check_numbers("temperatures", temperatures, minimum=0)
        check_num_assistant_tokens(num_assistant_tokens)
        check_int("max_new_tokens", max_new_tokens, 2)
        check_int("seed", seed, None)
        if method == "assisted" and draft_sampling == "greedy":
            raise ValueError(
                "`draft_sampling='greedy'` does not exist in transformers' assisted generation, which samples the "
                "draft if it samples the target. Use `method='replay'`."
            )
        self._replay = {
            float(temperature): ReplayOptions(
                temperature=float(temperature),
                max_new_tokens=max_new_tokens,
                vocab_size=vocab_size,
                draft_sampling=draft_sampling,
                batch_size=batch_size,
            )
            for temperature in temperatures
        }
        self.prompts, self.target, self.processing_class, self.trainer = prompts, target, processing_class, trainer
        self.method, self.num_assistant_tokens, self.max_new_tokens = method, num_assistant_tokens, max_new_tokens
        self.temperatures, self.seed, self.metric_key_prefix = tuple(self._replay), seed, metric_key_prefix
        self.history: list[tuple[int, dict[float, AcceptanceMetrics]]] = []
        self._responses: dict[float, Dataset] = {}
        self._users_eval_on_start: bool | None = None

    def bind(self, trainer: Trainer) -> None:
        """Makes `trainer` the one whose model is evaluated and whose trackers get the metrics."""
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Argument
    ) -> None:
        """Checks the set-up, moves before the callbacks that read metrics, and asks for an evaluation at step 0."""
        if args.eval_strategy == "no" or (self.trainer is not None and self.trainer.eval_dataset is None):
            raise ValueError(
                f"SpeculativeEvalCallback runs at evaluations, but this run has none (eval_strategy="
                f"{str(getattr(args.eval_strategy, 'value', args.eval_strategy))!r}"
                f"{', no eval_dataset' if self.trainer is not None and self.trainer.eval_dataset is None else ''}). "
                "Set `eval_strategy='steps'` or `'epoch'` in the training arguments and pass an `eval_dataset`."
            )
        if not self._has_all_responses:
            self._find_target()
        self._find_processing_class()
        if self.trainer is not None:
            check_fsdp(self.trainer.accelerator)
            # `EarlyStoppingCallback` stops counting if it runs before the metric is there
            handler = self.trainer.callback_handler
            handler.callbacks = sorted(handler.callbacks, key=lambda callback: callback is not self)
        # `Trainer` reads the argument right after this event. Early stopping counts every evaluation, so one that
        # repeats the checkpoint's would end a resumed run sooner than an uninterrupted one.
        if state.global_step == 0 and not args.eval_on_start:
            self._users_eval_on_start, args.eval_on_start = args.eval_on_start, True

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        model: nn.Module | None = None,
        **_: Argument,
    ) -> None:
        """Measures the draft, adds the values to `metrics` and logs them."""
        if self._users_eval_on_start is not None:
            args.eval_on_start, self._users_eval_on_start = self._users_eval_on_start, None
        if not self._is_first_dataset(metrics or {}):
            return
        with self._whole_models(args, model) as (draft, target):
            measured = {temperature: self._measure(draft, target, temperature) for temperature in self.temperatures}
        self.history.append((state.global_step, measured))
        values: dict[str, float] = {}
        for i, temperature in enumerate(self.temperatures):
            suffix = f"_{name_temperature(temperature)}" if i else ""
            values |= measured[temperature].to_metrics(self.metric_key_prefix, suffix)
        values = broadcast_object_list([values])[0]
        if metrics is not None:
            metrics.update(values)
        if self.trainer is not None:
            self.trainer.log(dict(values))
            if self.trainer.args.report_to and find_spec("matplotlib") is not None:
                picture = plot_acceptance(measured)
                log_picture(self.trainer, f"{self.metric_key_prefix}/acceptance", picture, state.global_step)

    def _is_first_dataset(self, metrics: dict[str, float]) -> bool:
        """Whether this event is for the only, or the first of several, evaluation datasets."""
        datasets = getattr(self.trainer, "eval_dataset", None)
        if not isinstance(datasets, dict):
            return True
        of_datasets = {n: [k for k in metrics if k.startswith(f"eval_{n}_")] for n in datasets}
        return bool(of_datasets[next(iter(datasets))]) or not any(of_datasets.values())

    @property
    def _has_all_responses(self) -> bool:
        """Whether the target is not needed: its responses are stored, with their log-probabilities."""
        return self.method == "replay" and set(self.temperatures) <= set(self._stored) and self._find_model() is None

    def _find_model(self) -> PreTrainedModel | None:
        return self.target if self.target is not None else getattr(self.trainer, "teacher_model", None)

    def _find_target(self) -> PreTrainedModel:
        target = self._find_model()
        if target is None:
            raise ValueError(
                "SpeculativeEvalCallback has no target. Pass `target=`, bind the callback to a trainer with a "
                "`teacher_model`, or pass responses with a `teacher_signal` at each of the `temperatures` as prompts."
            )
        return target

    def _find_processing_class(self) -> ProcessingClass:
        processing_class = self.processing_class or getattr(self.trainer, "processing_class", None)
        if processing_class is None:
            raise ValueError(
                "SpeculativeEvalCallback has no tokenizer. Pass the target's as `processing_class=`, or bind it to a "
                "trainer that has one."
            )
        return processing_class

    @contextmanager
    def _whole_models(
        self, args: TrainingArguments, model: nn.Module | None
    ) -> Iterator[tuple[PreTrainedModel, PreTrainedModel | None]]:
        """Draft and target (if one is needed) with all their parameters, gathered where they are sharded."""
        target = None if self._has_all_responses else self._find_target()
        if target is not None and target is self.target and target.device.type == "cpu" and args.device.type != "cpu":
            target.to(args.device)  # type: ignore[arg-type]  # a decorator hides the method
        draft = model if self.trainer is None else self.trainer.model
        with ExitStack() as stack:
            if self.trainer is not None and (self.trainer.is_deepspeed_enabled or self.trainer.is_fsdp_enabled):
                options: Arguments = {"gradient_checkpointing_kwargs": args.gradient_checkpointing_kwargs}
                draft, target = (
                    None
                    if wrapped is None
                    else stack.enter_context(whole_model(wrapped, self.trainer.accelerator, **options))
                    for wrapped in (self.trainer.model_wrapped, target)
                )
            elif self.trainer is not None and target is not None:
                target = self.trainer.accelerator.unwrap_model(target)
            yield cast(PreTrainedModel, draft), target

    def _measure(self, draft: PreTrainedModel, target: PreTrainedModel | None, temperature: float) -> AcceptanceMetrics:
        processing_class = self._find_processing_class()
        if self.method == "assisted" and read_parallel_drafting(draft.config) is not None:
            raise ValueError(
                "`method='assisted'` runs transformers' assisted generation, which runs a parallel draft once for each "
                "token. Use `method='replay'`."
            )
        if target is None:
            self._responses[temperature] = self._stored[temperature]
        elif temperature not in self._responses:
            self._responses[temperature] = generate_responses(
                target,
                self.prompts,
                processing_class=processing_class,
                max_new_tokens=self.max_new_tokens,
                temperature=temperature,
                batch_size=self._replay[temperature].batch_size,
                seed=self.seed,
                show_progress=False,
            )
        responses = self._responses[temperature]
        options = self._replay[temperature]
        common: Arguments = {
            "num_assistant_tokens": self.num_assistant_tokens,
            "vocab_size": options.vocab_size or count_real_ids(processing_class),
        }
        replayed = replay(draft, target, responses, options, processing_class=processing_class, **common)
        if self.method == "replay" or target is None:
            return replayed
        assisted = generate_assisted(
            target,
            draft,
            responses["prompt_ids"],
            SamplingOptions(max_new_tokens=self.max_new_tokens, temperature=temperature, seed=self.seed),
            eos_token_id=find_special_ids(target, processing_class)[0],
            measure_speed=True,
            **common,
        )
        return replace(assisted, alpha_sum=replayed.alpha_sum, alpha_tokens=replayed.alpha_tokens, kinds=replayed.kinds)
