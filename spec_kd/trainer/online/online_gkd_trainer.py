"""Training on completions that are generated while it runs."""

import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain, compress, islice
from pathlib import Path
from typing import cast

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

from spec_kd._private import disable_dropout_in_model
from spec_kd.data.token_columns import TokenColumnCollator
from spec_kd.decoding.ragged_model import check_reversible
from spec_kd.engines.base import Completion
from spec_kd.heads import unwrap_peft
from spec_kd.open_types import Arguments, Call, JsonObject
from spec_kd.sampling.prompts import get_max_length
from spec_kd.trainer.arguments import AnyDataset, BatchSamples, EvalDataset, as_config
from spec_kd.trainer.configs import to_dict
from spec_kd.trainer.online.generating_trainer import GeneratingTrainer
from spec_kd.trainer.online.online_gkd_config import OnlineGKDConfig
from spec_kd.trainer.online.request_server import RequestServer
from spec_kd.trainer.online.rows import (
    RepeatedWindows,
    Window,
    add_placeholders,
    check_row_room,
    complete_evaluation_prompts,
    draw_rows,
    find_prompt,
    is_prompts_only,
    number_rows,
    read_rows,
)
from spec_kd.trainer.online.vllm_writer import VLLMWriter, check_vllm
from spec_kd.trainer.online.writers import CompletionWriter, ContinuousBatchingWriter, ModelWriter
from spec_kd.trainer.teachers.live import LiveTeacher
from spec_kd.trainer.teachers.stored import ServedTeacher, check_stored_teacher, describe_served_signal
from spec_kd.trainer.white_box_distill_trainer import WhiteBoxDistillTrainer
from spec_kd.vocabulary import ProcessingClass, get_tokenizer

logger = get_logger(__name__)


class OnlineGKDTrainer(GeneratingTrainer):
    """Online distillation: the draft learns from the target on completions that are generated while it trains.

    It is [`WhiteBoxDistillTrainer`] with another source of completions.

    `mode="on_policy"` (GKD, Agarwal et al., arXiv 2306.13649): each example gets a new completion with probability
    `lmbda`, written by the draft, the target or both; the others keep that of the dataset. The completions of an
    optimizer step are generated together.

    `mode="streaming"` (Online Speculative Decoding, Liu et al., arXiv 2310.07177): the dataset is a stream of
    requests, taken in its order. Each process serves `update_interval` of them by speculative decoding with the
    current draft; then the draft learns from the tokens that the target rejected, or from all of them. Each pass of
    the target is reduced to the `served_signal`, so the target makes no pass besides those of serving. Resuming skips
    the requests that were served; for a stream that cannot be read again, set `ignore_data_skip=True`.

    What is drawn and sampled for an example follows from the seed, the step and its number among the examples of the
    step, so another number of processes changes nothing. With vLLM, with continuous batching and in streaming it also
    depends on the other examples of its process. Evaluation uses the completions of the evaluation dataset, or
    generates them as in training if it has prompts only.

    Logged besides the metrics of [`WhiteBoxDistillTrainer`]: `on_policy_share` (share of the examples),
    `generated_tokens_per_second`, `time/generation_share` (share of a step's time), `completions/mean_length` (tokens)
    and `completions/clipped_ratio` (share of the completions without an EOS within `max_new_tokens`); when streaming
    also `stream/acceptance_rate`, `stream/block_efficiency` (tokens per target pass) and `stream/rejected_share`
    (share of the tokens) of the requests as they were served. `alpha_on_data` is measured on the tokens of the loss:
    mostly on the draft's own completions with `"on_policy"`, on rejected tokens with `"streaming"`.

    Args:
        model (`str` or `PreTrainedModel`): The draft.
        args ([`OnlineGKDConfig`], *optional*): Configuration; one of TRL is converted.
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
    _config_class: type[OnlineGKDConfig] = OnlineGKDConfig
    _method = "online (on-policy) distillation"
    _tag_names: tuple[str, ...] = (*WhiteBoxDistillTrainer._tag_names, "on-policy")  # type: ignore[assignment]  # TRL has a list

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: EvalDataset | None = None,
        processing_class: ProcessingClass | None = None,
        compute_loss_func: Call[torch.Tensor] | None = None,
        compute_metrics: Callable[[EvalPrediction], JsonObject] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], Arguments] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[[JsonObject], str] | None = None,
        *,
        teacher_model: str | PreTrainedModel | None = None,
        ref_model: str | PreTrainedModel | None = None,
        teacher_processing_class: ProcessingClass | None = None,
    ):
        args = as_config(args, self._config_class, model)
        if args.mode == "streaming":
            self._method = "online (streaming) distillation"
            self._tag_names = (*WhiteBoxDistillTrainer._tag_names, "online-speculative-decoding")
        args.check_inputs(teacher_model, ref_model, isinstance(train_dataset, IterableDataset))
        if args.use_vllm:
            check_vllm(args, model, args.world_size)
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
        self._writer = self._build_writer()
        self._window: Window | None = None

    def _complete_datasets(  # type: ignore[override]  # `args` is our own configuration
        self,
        args: OnlineGKDConfig,
        train_dataset: AnyDataset | None,
        eval_dataset: EvalDataset | None,
        processing_class: ProcessingClass,
    ) -> tuple[AnyDataset | None, EvalDataset | None]:
        if train_dataset is not None and is_prompts_only(train_dataset):
            if args.lmbda < 1:
                raise ValueError(
                    f"The training dataset has prompts only, but `lmbda={args.lmbda}` takes completions from it as "
                    "well. Set `lmbda=1`, or write them with `spec_kd.generate_responses(target, prompts)`."
                )
            train_dataset = add_placeholders(train_dataset, processing_class)
        eval_dataset, self._evaluates_prompts = complete_evaluation_prompts(
            eval_dataset, processing_class, args.lmbda, args.mode
        )
        return train_dataset, eval_dataset

    def _build_writer(self) -> CompletionWriter:
        """The writer of completions; a server of requests is the teacher's source as well."""
        args, options = self.args, self.args.build_sampling_options()
        common = (options, self.processing_class, args.generation_batch_size)
        if args.use_vllm:
            return VLLMWriter(self.model, self.accelerator, self.processing_class, options, args)
        if args.mode == "streaming":
            info = describe_served_signal(
                self._readers["target"],
                self.processing_class,
                options,
                args.build_signal_spec(),
                self.token_loss.temperature,
            )
            check_stored_teacher(info, self.token_loss, self.processing_class)
            self._teacher = ServedTeacher(info, cast(LiveTeacher, self._teacher))
            return RequestServer(*common, info=info, streaming=args)
        if not args.use_transformers_continuous_batching:
            return ModelWriter(*common, sample_from=args.sample_from, mix=args.mix)
        config = ContinuousBatchingConfig(**to_dict(args.transformers_continuous_batching_config))
        writer = ContinuousBatchingWriter(*common, sample_from=args.sample_from, config=config)
        writer.check(self._readers[args.sample_from])
        return writer

    def _check_generation(self) -> None:
        is_streaming = self.args.mode == "streaming"
        if is_streaming or self.args.sample_from == "mixed":
            check_reversible(unwrap_peft(self._readers["target"]), "target")
        if is_streaming:
            check_reversible(unwrap_peft(self._readers["draft"]), "draft")
        if isinstance(self.train_dataset, Dataset):
            rows = self.train_dataset.select_columns(["input_ids", "labels"])
            self._check_room(rows, "the training dataset")

    def _check_room(self, rows: Iterable[dict[str, list[int]]], name: str) -> None:
        limits = {role: get_max_length(model) for role, model in self._readers.items()}
        limits["vLLM"] = self.args.vllm_max_model_length
        check_row_room(rows, limits, self.args.max_new_tokens, name)

    @property
    def _readers(self) -> dict[str, PreTrainedModel]:
        """All models that read generated completions, without the wrappers of distributed training."""
        models = {"draft": self.model, "target": self._teacher.model}
        if self._reference is not None:
            models["reference"] = self._reference.model
        return {role: self.accelerator.unwrap_model(model) for role, model in models.items()}

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler[int] | None:
        sampler = super()._get_train_sampler(train_dataset)
        if self.args.num_iterations == 1:
            return sampler
        window = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return RepeatedWindows(cast(Collection[int], sampler), window, self.args.num_iterations, seed)

    def _load_run_state(self, checkpoint: Path | None) -> None:
        self._window = None
        if checkpoint is not None and (path := self._find_window_file(checkpoint)).exists():
            self._window = Window.load(path)

    def _count_dataset_tokens(self) -> int | None:
        return None if self.args.lmbda > 0 else super()._count_dataset_tokens()  # completions are yet to be written

    def _join_turns(self, args: OnlineGKDConfig) -> bool:  # type: ignore[override]  # as above, `args`
        return args.lmbda == 0  # one completion is generated for a row, in place of its labels

    def get_batch_samples(
        self, epoch_iterator: Iterator[JsonObject], num_batches: int, device: torch.device
    ) -> BatchSamples:
        """As `Trainer.get_batch_samples`, with generated completions; loss tokens are counted on those."""
        if self.args.lmbda == 0 or self._is_at_end():
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        self._clock.start_step()
        batches = list(islice(epoch_iterator, num_batches))
        window = self._window
        if window is not None and window.uses < self.args.num_iterations and window.holds(batches):
            window.uses += 1
        elif batches:
            with self._clock.measure("generation"):
                self._window = self._generate_window(batches, device)
        generated = self._window.batches if self._window and batches else batches
        samples, num_tokens = super().get_batch_samples(iter(generated), num_batches, device)
        if isinstance(num_tokens, torch.Tensor):
            num_tokens = num_tokens.clamp(min=1)  # a window in which nothing was rejected has nothing to teach
        return samples, num_tokens

    def _generate_window(self, batches: list[JsonObject], device: torch.device) -> Window:
        start, step = time.perf_counter(), self.state.global_step
        self.check_weights(with_frozen=self._first_step is None)  # a model with a NaN writes nothing of use
        rows = [read_rows(batch) for batch in batches]
        seed, args = f"{self.args.seed}:{step}", self.args
        numbers = number_rows(list(map(len, rows)), args.train_batch_size, args.process_index, args.world_size)
        is_drawn = draw_rows(numbers, args.lmbda, seed)
        drawn = list(compress(chain(*rows), is_drawn))
        if not isinstance(self.train_dataset, Dataset):
            self._check_room(drawn, f"step {step}")
        prompts = [find_prompt(row, f"Row {i} of step {step}") for i, row in enumerate(drawn)]
        completions = self._write(prompts, seed, list(compress(numbers, is_drawn)))
        collate = TokenColumnCollator(self.data_collator)
        flags, generated = iter(is_drawn), map(self._writer.make_row, prompts, completions)
        rebuilt = []
        for batch, batch_rows in zip(batches, rows, strict=True):
            are_drawn = list(islice(flags, len(batch_rows)))
            new = [next(generated) if is_one else row for is_one, row in zip(are_drawn, batch_rows, strict=True)]
            rebuilt.append(collate(new) if any(are_drawn) else batch)
        self._log_generation(completions, len(is_drawn), time.perf_counter() - start, device)
        responses = [[prompt, completion.ids] for prompt, completion in zip(prompts, completions, strict=True)]
        return Window(source=batches, batches=rebuilt, generated=responses)

    def _log_generation(
        self, completions: Sequence[Completion], num_rows: int, seconds: float, device: torch.device
    ) -> None:
        own = {"rows": num_rows, **self._writer.count(completions)}
        counts = self.accelerator.gather(torch.tensor([list(own.values())], device=device)).sum(dim=0).tolist()
        total = dict(zip(own, counts, strict=True))
        seconds = self.accelerator.gather(torch.tensor([seconds], device=device)).max().item()
        metrics = {"on_policy_share": total["completions"] / total["rows"]}
        if total["completions"]:
            metrics["generated_tokens_per_second"] = total["tokens"] / seconds
            metrics |= self._writer.to_metrics(total)
        for name, value in metrics.items():
            self._metrics["train"][name].append(value)

    def _find_window_file(self, checkpoint: Path) -> Path:
        return checkpoint / f"on_policy_window_{self.args.process_index}.pt"

    def _save_run_state(self, checkpoint: Path) -> None:
        """Saves the window if its completions are to be used again (`num_iterations`)."""
        path = self._find_window_file(checkpoint)
        if self._window is None or self._window.uses >= self.args.num_iterations:
            path.unlink(missing_ok=True)  # left by a checkpoint that is overwritten
            return
        self._window.save(path)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`; with `log_completions` the latest completions are written beside the loss."""
        super().log(logs, start_time)
        if self.args.log_completions and "loss" in logs and self._window and self.is_world_process_zero():
            tokenizer = get_tokenizer(self.processing_class)
            path = Path(str(self.args.output_dir), "completions", f"step-{self.state.global_step}.jsonl")
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = [
                {"prompt": tokenizer.decode(prompt), "completion": tokenizer.decode(completion)}
                for prompt, completion in self._window.generated
            ]
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
