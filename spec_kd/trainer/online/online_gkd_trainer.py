"""Training on completions that are written while it runs."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
)
from transformers.generation import ContinuousBatchingConfig
from trl.models import unwrap_model_for_generation

from spec_kd._private import disable_dropout_in_model
from spec_kd.data.token_columns import TokenColumnCollator
from spec_kd.decoding.ragged_model import check_reversible
from spec_kd.engines.base import Completion
from spec_kd.heads import unwrap_peft
from spec_kd.loading import choose_processing_class, find_processing_class
from spec_kd.open_types import Arguments, JsonObject
from spec_kd.sampling.options import SamplingOptions
from spec_kd.trainer.arguments import as_config, get_load_options
from spec_kd.trainer.online.continuous_batching import ContinuousSource
from spec_kd.trainer.online.on_policy import (
    CompletionSource,
    RepeatedWindows,
    add_placeholders,
    check_live_models,
    check_room,
    draw_rows,
    find_prompt,
    is_prompts_only,
    is_same_window,
    read_rows,
)
from spec_kd.trainer.online.online_gkd_config import OnlineGKDConfig
from spec_kd.trainer.online.prompt_evaluation import PromptEvaluation, prepare_prompts_only
from spec_kd.trainer.online.streaming import RequestServer, ServedCompletion, ServedTeacher, describe_served_signal
from spec_kd.trainer.online.vllm_writer import VLLMWriter, check_vllm
from spec_kd.trainer.online.window import Window, WindowCallback
from spec_kd.trainer.teachers.stored import check_stored_teacher
from spec_kd.trainer.training_data import AnyDataset, EvalDataset
from spec_kd.trainer.white_box_distill_trainer import WhiteBoxDistillTrainer
from spec_kd.vocabulary import ProcessingClass, get_tokenizer

logger = get_logger(__name__)


class OnlineGKDTrainer(PromptEvaluation, WhiteBoxDistillTrainer):
    """
    Online distillation: the draft learns from the target on text that is generated while it trains. It is
    [`WhiteBoxDistillTrainer`] with another source of completions.

    `mode="on_policy"` (GKD, Agarwal et al., arXiv 2306.13649): for all examples of an optimizer step on a process at
    once, it is drawn whose completion is generated anew; the rest keep that of the dataset.

    `mode="streaming"` (Online Speculative Decoding, Liu et al., arXiv 2310.07177): the dataset is a stream of
    requests, taken in its order. They are served by speculative decoding with the draft as it is, `update_interval` of
    them on every process; then the draft learns from what serving showed: the target's distribution, reduced to the
    `served_signal` pass by pass, where it rejected a drafted token. The target makes no pass besides those of serving.
    Resuming skips the requests that were served; a stream that cannot be read again wants `ignore_data_skip=True`.

    What is drawn and sampled follows from the seed, the step and the process. Evaluation is on the dataset's
    completions; where it has prompts only, on ones that are generated as in training.

    Logged besides the metrics of [`WhiteBoxDistillTrainer`]: `on_policy_share` (of the examples),
    `generated_tokens_per_second`, `time/generation_share` (of a step's time), `completions/mean_length` (tokens) and
    `completions/clipped_ratio` (share without an EOS within `max_new_tokens`) of what was generated; when streaming
    also `stream/acceptance_rate`, `stream/block_efficiency` (tokens per target pass) and `stream/rejected_share` (of
    the tokens) of the requests as they were served. Mind that `alpha_on_data` is over the tokens of the loss: mostly
    the draft's own text on policy, the rejected ones when streaming.

    Args:
        model (`str` or `PreTrainedModel`): The draft.
        args ([`OnlineGKDConfig`], *optional*): Configuration; an `SFTConfig` is taken over.
        train_dataset (`Dataset` or `IterableDataset`):
            As for [`WhiteBoxDistillTrainer`], a prompt and one completion per row; with `lmbda=1`, and when streaming,
            a `prompt` (and `tools`, `chat_template_kwargs`) or `prompt_ids` is enough.
        processing_class (`PreTrainedTokenizerBase`, *optional*): As for [`WhiteBoxDistillTrainer`].
        teacher_model (`str` or `PreTrainedModel`, *optional*): The target, unless the configuration names it.
        ref_model (`str` or `PreTrainedModel`, *optional*): As for [`WhiteBoxDistillTrainer`].

    All other arguments are those of [`WhiteBoxDistillTrainer`], in its order.

    Raises:
        ValueError: Without a live teacher, for prompts that leave no room for `max_new_tokens`, a dataset without
            completions unless `lmbda=1`, and as [`WhiteBoxDistillTrainer`].

    Example:

    ```python
    from spec_kd import OnlineGKDConfig, OnlineGKDTrainer

    trainer = OnlineGKDTrainer(
        model="my-org/draft",
        teacher_model="my-org/target",
        args=OnlineGKDConfig(lmbda=1.0, max_new_tokens=256),
        train_dataset=prompts,
    )
    trainer.train()
    ```
    """

    _name = "OnlineGKD"
    _config_class = OnlineGKDConfig
    _method = "online (on-policy) distillation"
    _tag_names = (*WhiteBoxDistillTrainer._tag_names, "on-policy")

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: EvalDataset | None = None,
        processing_class: ProcessingClass | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], Arguments] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[[dict], str] | None = None,
        *,
        teacher_model: str | PreTrainedModel | None = None,
        ref_model: str | PreTrainedModel | None = None,
        teacher_processing_class: ProcessingClass | None = None,
    ):
        args = as_config(args, self._config_class, model)
        if args.mode == "streaming":
            self._method = "online (streaming) distillation"
            self._tag_names = (*WhiteBoxDistillTrainer._tag_names, "online-speculative-decoding")
        teacher_model = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
        check_live_models(args, teacher_model, ref_model)
        if args.use_vllm:
            check_vllm(args, model, args.world_size)
        has_prompts = train_dataset is not None and is_prompts_only(train_dataset)
        if has_prompts and args.lmbda < 1:
            raise ValueError(
                f"The training dataset has prompts only, but `lmbda={args.lmbda}` takes completions from it as "
                "well. Set `lmbda=1`, or write them with `spec_kd.generate_responses(target, prompts)`."
            )
        processing_class = processing_class or choose_processing_class(
            find_processing_class(model, get_load_options(args, args.model_init_kwargs)),
            teacher_processing_class
            or find_processing_class(teacher_model, get_load_options(args, args.teacher_model_init_kwargs)),
        )
        if processing_class is not None:  # else the base class says what is missing
            train_dataset = add_placeholders(train_dataset, processing_class) if has_prompts else train_dataset
            prepared = prepare_prompts_only(eval_dataset, processing_class, args.lmbda, args.mode)
            self._evaluates_prompts = prepared is not None
            eval_dataset = eval_dataset if prepared is None else prepared
        if args.num_iterations > 1 and isinstance(train_dataset, IterableDataset):
            raise ValueError(
                f"`num_iterations={args.num_iterations}` repeats the examples of an optimizer step, which needs a "
                "`Dataset` with a length. Set it to 1 for an `IterableDataset`."
            )
        super().__init__(
            model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            compute_loss_func,
            compute_metrics,
            callbacks,
            optimizers,
            optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics,
            quantization_config,
            peft_config,
            formatting_func,
            teacher_model=teacher_model,
            ref_model=ref_model,
            teacher_processing_class=teacher_processing_class,
        )
        if args.mode == "on_policy":
            logger.warning(args.describe())
        if args.disable_dropout:
            disable_dropout_in_model(self.model)
        if args.lmbda > 0:
            self._check_generation()  # before vLLM starts
        self._source = self._build_source()
        self._window: Window | None = None
        if args.lmbda > 0:
            self.add_callback(WindowCallback(self))

    def _build_source(self) -> CompletionSource | RequestServer | VLLMWriter:
        args = self.args
        options = SamplingOptions(
            max_new_tokens=args.max_new_tokens,
            temperature=args.generation_temperature,
            top_k=args.top_k,
            top_p=args.top_p,
        )
        if args.use_vllm:
            return VLLMWriter(self.model, self.accelerator, self.processing_class, options, args)
        common = {
            "options": options,
            "processing_class": self.processing_class,
            "batch_size": args.generation_batch_size,
        }
        if args.use_transformers_continuous_batching:
            config = ContinuousBatchingConfig(**(args.transformers_continuous_batching_config or {}))
            source = ContinuousSource(sample_from=args.sample_from, config=config, **common)
            source.check(self._readers[args.sample_from])
            return source
        if args.mode == "on_policy":
            return CompletionSource(sample_from=args.sample_from, mix=args.mix, **common)
        target = self._readers["target"]
        info = describe_served_signal(
            target, self.processing_class, options, args.build_signal_spec(), self.token_loss.temperature
        )
        check_stored_teacher(info, self.token_loss, self.processing_class)
        self._teacher = ServedTeacher(info, self._teacher)
        return RequestServer(
            info=info,
            num_assistant_tokens=args.num_assistant_tokens,
            draft_sampling=args.draft_sampling,
            trained_positions=args.trained_positions,
            **common,
        )

    def _check_generation(self) -> None:
        if self.is_fsdp_enabled:
            raise ValueError(
                f"`lmbda={self.args.lmbda}` generates with the models, which FSDP shards. Train with DDP or DeepSpeed."
            )
        is_streaming = self.args.mode == "streaming"
        if is_streaming or self.args.sample_from == "mixed":
            check_reversible(unwrap_peft(self._readers["target"]), "target")
        if is_streaming:
            check_reversible(unwrap_peft(self._readers["draft"]), "draft")
        if isinstance(self.train_dataset, Dataset):
            rows = self.train_dataset.select_columns(["input_ids", "labels"])
            self._check_room(rows, "the training dataset")

    def _check_room(self, rows: Iterable[dict[str, list[int]]], name: str) -> None:
        check_room(rows, self._readers, self.args.max_new_tokens, name, vLLM=self.args.vllm_max_model_length)

    @property
    def _readers(self) -> dict[str, PreTrainedModel]:
        """All models that read generated text, as far as their configs go."""
        models = {"draft": self.model, "target": self._teacher.model}
        if self._reference is not None:
            models["reference"] = self._reference.model
        return {role: self.accelerator.unwrap_model(model) for role, model in models.items()}

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if self.args.num_iterations == 1:
            return sampler
        window = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return RepeatedWindows(sampler, window, self.args.num_iterations, seed)

    def _load_run_state(self, checkpoint: Path | None) -> None:
        self._window = None
        if checkpoint is not None and (path := self._find_window_file(checkpoint)).exists():
            self._window = Window(**torch.load(path, map_location="cpu", weights_only=True))

    def _join_turns(self, args: OnlineGKDConfig) -> bool:
        return args.lmbda == 0  # one completion is generated for a row, in place of its labels

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[JsonObject], torch.Tensor | int | None]:
        """As `Trainer.get_batch_samples`, with generated completions; loss tokens are counted on those."""
        if self.args.lmbda == 0 or self._is_at_end():
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        self._clock.start_step()
        batches = list(islice(epoch_iterator, num_batches))
        window = self._window
        if window is not None and window.uses < self.args.num_iterations and is_same_window(batches, window.source):
            window.uses += 1
        elif batches:
            with self._clock.measure("generation"):
                self._window = self._generate_window(batches, device)
        generated = self._window.batches if batches else batches
        samples, num_tokens = super().get_batch_samples(iter(generated), num_batches, device)
        if isinstance(num_tokens, torch.Tensor):
            num_tokens = num_tokens.clamp(min=1)  # a window in which nothing was rejected has nothing to teach
        return samples, num_tokens

    def _generate_window(self, batches: list[JsonObject], device: torch.device) -> "Window":
        start = time.perf_counter()
        self.check_weights(with_frozen=self._first_step is None)  # what a NaN writes is not text
        rows = [read_rows(batch) for batch in batches]
        seed = f"{self.args.seed}:{self.state.global_step}:{self.args.process_index}"
        is_drawn = draw_rows(sum(map(len, rows)), self.args.lmbda, f"{seed}:draw")
        drawn = [row for row, is_one in zip((row for batch in rows for row in batch), is_drawn, strict=True) if is_one]
        if not isinstance(self.train_dataset, Dataset):
            self._check_room(drawn, f"step {self.state.global_step}")
        prompts = [find_prompt(row, f"Row {i} of step {self.state.global_step}") for i, row in enumerate(drawn)]
        # entered without prompts too: under ZeRO-3 all processes gather the parameters together
        with self._whole_models() as models:
            completions = self._source.write(models, prompts, seed)
        written = list(zip(prompts, completions, strict=True))
        collate = self.data_collator
        if self.args.mode == "streaming":
            collate = TokenColumnCollator(collate)
        flags, generated, rebuilt = iter(is_drawn), iter(written), []
        for batch, batch_rows in zip(batches, rows, strict=True):
            are_drawn = list(islice(flags, len(batch_rows)))
            if any(are_drawn):
                new_rows = [
                    self._source.make_row(*next(generated)) if is_one else row
                    for is_one, row in zip(are_drawn, batch_rows, strict=True)
                ]
                batch = collate(new_rows)
            rebuilt.append(batch)
        self._log_generation(completions, len(is_drawn), time.perf_counter() - start, device)
        texts = [[prompt, completion.ids] for prompt, completion in written]
        return Window(source=batches, batches=rebuilt, texts=texts)

    @contextmanager
    def _whole_models(self) -> Iterator[dict[str, PreTrainedModel]]:
        """The models that write, unwrapped and with all their parameters, without gradient checkpointing."""
        wrapped = {"draft": self.model_wrapped, "target": self._teacher.model}
        options = {"gradient_checkpointing_kwargs": self.args.gradient_checkpointing_kwargs}
        with ExitStack() as stack:
            yield {
                name: unwrap_peft(
                    stack.enter_context(unwrap_model_for_generation(wrapped[name], self.accelerator, **options))
                )
                for name in self._source.writers
            }

    def _log_generation(
        self, completions: list[Completion], num_rows: int, seconds: float, device: torch.device
    ) -> None:
        served = [completion for completion in completions if isinstance(completion, ServedCompletion)]
        rounds = [record for completion in served for record in completion.rounds]
        own = {
            "tokens": sum(len(completion.ids) for completion in completions),
            "clipped": sum(completion.finish_reason == "length" for completion in completions),
            "completions": len(completions),
            "rows": num_rows,
            "rounds": len(rounds),
            "drafted": sum(record.drafted for record in rounds),
            "accepted": sum(record.accepted for record in rounds),
            "rejected": sum(len(completion.rejected_positions) for completion in served),
        }
        counts = self.accelerator.gather(torch.tensor([list(own.values())], device=device)).sum(dim=0).tolist()
        total = dict(zip(own, counts, strict=True))
        seconds = self.accelerator.gather(torch.tensor([seconds], device=device)).max().item()
        self._log_value("on_policy_share", total["completions"] / total["rows"])
        if total["completions"]:
            self._log_value("generated_tokens_per_second", total["tokens"] / seconds)
            self._log_value("completions/mean_length", total["tokens"] / total["completions"])
            self._log_value("completions/clipped_ratio", total["clipped"] / total["completions"])
        if total["rounds"]:
            self._log_value("stream/block_efficiency", total["tokens"] / total["rounds"])
            self._log_value("stream/acceptance_rate", total["accepted"] / max(total["drafted"], 1))
            self._log_value("stream/rejected_share", total["rejected"] / total["tokens"])

    def _log_value(self, name: str, value: float) -> None:
        self._metrics["train"][name].append(value)

    def _find_window_file(self, checkpoint: Path) -> Path:
        return checkpoint / f"on_policy_window_{self.args.process_index}.pt"

    def _save_run_state(self, checkpoint: Path) -> None:
        """The window, if its completions are to be used again (`num_iterations`)."""
        path = self._find_window_file(checkpoint)
        if self._window is None or self._window.uses >= self.args.num_iterations:
            path.unlink(missing_ok=True)  # of a checkpoint that is written over
            return
        torch.save(vars(self._window), path)

    def _write_texts(self) -> None:
        if self._window is None:
            return
        tokenizer = get_tokenizer(self.processing_class)
        path = Path(self.args.output_dir, "completions", f"step-{self.state.global_step}.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for prompt, completion in self._window.texts:
                text = {"prompt": tokenizer.decode(prompt), "completion": tokenizer.decode(completion)}
                file.write(json.dumps(text, ensure_ascii=False) + "\n")
