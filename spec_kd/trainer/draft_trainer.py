"""What every trainer of a draft shares: its data path, its checks, its card, and saving drafts that can be served."""

import copy
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import DistributedType
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
)
from trl import is_conversational

from spec_kd._private import get_config_model_id, suspend_zero3_init
from spec_kd.data.token_columns import TokenColumnCollator, check_ids, check_token_columns, find_token_columns
from spec_kd.data.training_rows import count_cut_rows, cut_and_pack, report_unlabeled_rows, to_training_rows
from spec_kd.escaping import is_hub_id, make_public_name
from spec_kd.files import explain_full_disk
from spec_kd.hub import CardFacts, carry_model_card, export_draft, extend_model_card
from spec_kd.hub.card import is_generated, remove_paths
from spec_kd.loading import find_adapter, find_processing_class, load_model
from spec_kd.open_types import Arguments, Call, JsonObject
from spec_kd.options import refuse
from spec_kd.probes import check_is_causal_lm, check_packing, check_padding
from spec_kd.secrets import strip_secrets
from spec_kd.serving.check import ServingFinding, check_saved_form
from spec_kd.trainer.arguments import (
    ID_COLUMNS,
    IMAGE_COLUMNS,
    AnyDataset,
    EvalDataset,
    FormattingFunction,
    as_config,
    check_dataset,
    check_datasets,
    check_output_dir,
    check_tokens,
    find_columns,
    find_dataset_name,
    get_load_options,
)
from spec_kd.trainer.budget import BudgetedTraining
from spec_kd.trainer.checkpoint_sums import is_checkpoint_name
from spec_kd.trainer.configs import DraftConfig
from spec_kd.trainer.finite_guard import FiniteGuard
from spec_kd.trainer.parallel_training import ParallelTraining
from spec_kd.trainer.sharded_training import ShardedTraining
from spec_kd.trainer.teachers.stored import find_target_name
from spec_kd.vocabulary import ProcessingClass, check_alignable, count_real_ids

logger = get_logger(__name__)


class DraftTrainer(FiniteGuard, BudgetedTraining, ParallelTraining, ShardedTraining):
    """[`~trl.SFTTrainer`] for a draft model: the base class of every trainer of this package.

    It takes `prompt_ids` + `completion_ids` besides TRL's formats, counts what `max_length` cuts, passes itself to
    callbacks with a `bind` method, and saves drafts that a server can load. The arguments are those of
    [`~trl.SFTTrainer`], in its order.

    Attributes:
        dataset_name (`str`, *optional*), target_name (`str`, *optional*):
            Folder or Hub id for the model card, as far as the dataset says it. Set them if it does not.
    """

    args: DraftConfig
    model: PreTrainedModel
    processing_class: ProcessingClass
    _tag_names: tuple[str, ...] = ("trl", "sft", "spec_kd", "speculative-decoding", "draft-model")  # type: ignore[assignment]  # a list in TRL, which reads it only
    _config_class: type[DraftConfig] = DraftConfig
    _method: str
    _card_tags: str | list[str] | None = None

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
    ):
        args = as_config(args, self._config_class, model)
        options = get_load_options(args, args.model_init_kwargs)
        processing_class = processing_class or find_processing_class(model, options)
        check_output_dir(args.output_dir)
        check_tokens(processing_class, args)
        train_dataset = check_datasets(args, train_dataset, eval_dataset, formatting_func)
        self.dataset_name, self.target_name = find_dataset_name(train_dataset), find_target_name(train_dataset)
        if isinstance(model, str) and find_adapter(model, options) is not None:
            options |= {} if quantization_config is None else {"quantization_config": quantization_config}
            placement = {} if args.distributed_state.distributed_type == DistributedType.NO else {"device_map": None}
            model = load_model(model, is_trainable=True, **{**options, **placement})
            quantization_config = None
        assistant_only_loss = args.assistant_only_loss
        if is_conversational(next(iter(train_dataset))) and not IMAGE_COLUMNS & find_columns(train_dataset):
            args.assistant_only_loss = False  # the rows get their labels from us, whatever the chat template
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            quantization_config=quantization_config,
            peft_config=peft_config,
            formatting_func=formatting_func,
        )
        args.assistant_only_loss = assistant_only_loss
        if self._used_token_columns:
            self.data_collator = TokenColumnCollator(self.data_collator)
        self._check_reading(self.model, "draft")
        self._prepare_parallel()
        self._check_export()
        self._serving_findings = self._check_serving()
        for callback in self.callback_handler.callbacks:
            self._bind(callback)

    def _check_reading(self, model: PreTrainedModel, role: str) -> None:
        """Raises `ValueError` for a model that reads sequences of a batch differently than each alone."""
        check_is_causal_lm(model, role)
        (check_packing if self.padding_free else check_padding)(model, role)

    def _check_export(self) -> None:
        if not self.args.align_vocabulary:
            return
        check_alignable(self.model)
        rows, ids = self._get_target_vocab_size(), count_real_ids(self.processing_class)
        refuse(
            (
                is_peft_model(self.model) and not self.args.merge_adapter,
                "`align_vocabulary=True` changes the rows of the base model, which a saved LoRA adapter does not "
                "contain. Set `merge_adapter=True` as well.",
            ),
            (
                rows is None,
                "`align_vocabulary=True` needs to know the rows of the target's head. Set `target_vocab_size` to "
                "`target.config.vocab_size`.",
            ),
            (
                rows is not None and rows < ids,
                f"`align_vocabulary=True` cannot cut the draft to the target's {rows} rows: its tokenizer has {ids} "
                "ids. Train with the target's tokenizer, and with a chat template that adds no tokens.",
            ),
        )

    def _check_serving(self) -> list[ServingFinding]:
        """What the engines asked for would make of the draft, in the form in which it will be saved; logs it."""
        if not (engines := self.args.serving_engines):
            return []
        target = self.args.serving_target or self._find_target_name()
        if not target:
            raise ValueError(
                "`serving_engines` needs to know the target. Set `serving_target` to its folder or Hub id."
            )
        findings = check_saved_form(
            self.accelerator.unwrap_model(self.model), self.processing_class, str(self.args.output_dir), target,
            engines, merge_adapter=self.args.merge_adapter,
            rows=self._get_target_vocab_size() if self.args.align_vocabulary else None,
        )  # fmt: skip
        for finding in findings:
            logger.warning(str(finding))
        return findings

    def _find_target_name(self) -> str | None:
        """Folder or Hub id of the target, where it is known."""
        return self.target_name

    def _bind(self, callback: TrainerCallback) -> None:
        if hasattr(callback, "bind"):
            callback.bind(self)

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """As `Trainer.add_callback`; a callback with a `bind` method is given this trainer."""
        super().add_callback(callback)
        self._bind(self.callback_handler.callbacks[-1])

    @property
    def _used_token_columns(self) -> tuple[str, ...]:
        """Columns with an entry per token that this trainer's loss reads, if the training set has them."""
        return ()

    def _join_turns(self, args: DraftConfig) -> bool:
        """Whether a row may have several turns of the target."""
        return True

    def _prepare_dataset(  # type: ignore[override]  # `args` is our own configuration
        self,
        dataset: AnyDataset,
        processing_class: ProcessingClass,
        args: DraftConfig,
        packing: bool,
        formatting_func: FormattingFunction | None,
        dataset_name: str,
    ) -> AnyDataset:
        if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        check_dataset(args, dataset, dataset_name, formatting_func)
        if IMAGE_COLUMNS & find_columns(dataset):
            raise ValueError(
                f"The {dataset_name} dataset has images and the training set has none. Give both the same columns."
            )
        if formatting_func is not None and not ID_COLUMNS & find_columns(dataset):
            text, columns = args.dataset_text_field, list(find_columns(dataset))
            dataset = dataset.map(lambda row: {text: formatting_func(row)}, remove_columns=columns)
        columns = [name for name in find_token_columns(dataset) if name in self._used_token_columns]
        check_token_columns(dataset, columns, dataset_name)
        dataset = check_ids(dataset, count_real_ids(processing_class), dataset_name)
        dataset = to_training_rows(
            dataset,
            processing_class,
            token_columns=columns,
            completion_only_loss=args.completion_only_loss,
            join_turns=self._join_turns(args),
            num_proc=args.dataset_num_proc,
            name=dataset_name,
        )
        is_limited = isinstance(dataset, Dataset) and args.max_length is not None
        if is_limited and not columns:
            # TRL cuts and drops rows without a message: prepare without a limit, count, then let TRL apply the limit
            unlimited = copy.copy(args)
            unlimited.max_length, unlimited.shuffle_dataset = None, False
            dataset = super()._prepare_dataset(dataset, processing_class, unlimited, False, None, dataset_name)
        if is_limited:
            self._report_cut_rows(dataset, args, packing, dataset_name)
        elif isinstance(dataset, Dataset):
            report_unlabeled_rows(dataset, dataset_name)
        if not columns:
            return super()._prepare_dataset(dataset, processing_class, args, packing, None, dataset_name)
        return cut_and_pack(
            dataset,
            columns,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            packing_strategy=args.packing_strategy if packing else None,
            shuffle_seed=args.seed if args.shuffle_dataset else None,
            name=dataset_name,
        )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns  # type: ignore[assignment]  # set by the call before
        columns += [name for name in self._used_token_columns if name not in columns]

    @staticmethod
    def _report_cut_rows(dataset: Dataset, args: DraftConfig, packing: bool, name: str) -> None:
        cut, lost = count_cut_rows(
            dataset,
            args.max_length,
            truncation_mode=args.truncation_mode,
            packing_strategy=args.packing_strategy if packing else None,
        )
        if lost == len(dataset):
            raise ValueError(
                f"All {lost} completions of the {name} dataset lie beyond `max_length={args.max_length}` or are "
                "empty: nothing is left to learn from. Raise `max_length` above the prompt lengths."
            )
        if cut or lost:
            logger.warning(
                f"{name} dataset: `max_length={args.max_length}` cuts {cut} of {len(dataset)} rows; {lost} rows have "
                "no completion token within it and teach nothing. Raise `max_length` to keep them whole."
            )

    def _get_target_vocab_size(self) -> int | None:
        """Number of rows of the target's head, if known."""
        return self.args.target_vocab_size

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`; outside of checkpoints, `merge_adapter` and `align_vocabulary` are carried out."""
        output_dir = str(self.args.output_dir if output_dir is None else output_dir)
        super().save_model(output_dir, _internal_call)
        if not is_checkpoint_name(output_dir):
            self._export(output_dir)  # a checkpoint's weights must fit its optimizer state
        if self.args.should_save:
            self._save_card(Path(output_dir))

    def _export(self, output_dir: str) -> None:
        does_merge = self.args.merge_adapter and is_peft_model(self.model)
        if not (does_merge or self.args.align_vocabulary):
            return
        if self.args.should_save:
            is_sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
            with suspend_zero3_init():
                export_draft(
                    output_dir if is_sharded else self.accelerator.unwrap_model(self.model),
                    output_dir,
                    processing_class=self.processing_class,
                    target_vocab_size=self._get_target_vocab_size() if self.args.align_vocabulary else None,
                )
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: JsonObject | None = None) -> None:
        """As `Trainer._save`; the options that it pickles, which `push_to_hub` uploads, have no secrets."""
        args = self.args
        public = copy.copy(args)
        public.__dict__ = strip_secrets(vars(args), None)
        self.args = public
        try:
            with explain_full_disk(output_dir or str(args.output_dir), "the last whole checkpoint is kept"):
                super()._save(output_dir, state_dict)
        finally:
            self.args = args

    def _describe_training(self) -> JsonObject:
        """What the model card says about the method, besides its name."""
        return {"target_name": self.target_name}

    def create_model_card(  # type: ignore[override]  # as of TRL's trainers
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """A draft's model card: TRL's, with the target, the acceptance before and after, and serving commands.

        Args:
            model_name (`str`, *optional*): The draft's name; by default its Hub id, or the folder's name.
            dataset_name (`str`, *optional*): Folder or Hub id; by default `dataset_name` of this trainer.
            tags (`str` or `list[str]`, *optional*): Further tags.
        """
        self.dataset_name = dataset_name or self.dataset_name
        self._card_tags = self._card_tags if tags is None else tags
        output_dir = str(self.args.output_dir)
        hub_model_id = self.hub_model_id or self.args.hub_model_id
        model_name = make_public_name(model_name or hub_model_id or os.path.abspath(output_dir))
        is_public = self.dataset_name is not None and is_hub_id(self.dataset_name)
        super().create_model_card(
            model_name=model_name.split("/")[-1],
            dataset_name=self.dataset_name if is_public else None,
            tags=self._card_tags,
        )
        if self.is_world_process_zero():
            before, after = find_acceptance_metrics(self.state.log_history)
            extend_model_card(
                Path(output_dir) / "README.md",
                CardFacts(
                    method=self._method,
                    dataset_name=self.dataset_name,
                    draft_name=hub_model_id or model_name,
                    base_name=get_config_model_id(self.model.config),
                    metrics_before=before,
                    metrics=after,
                    serving_engines=self.args.serving_engines or (),
                    findings=list(map(asdict, self._serving_findings)),
                    **self._describe_training(),
                ),
            )

    def _save_card(self, folder: Path) -> None:
        """Writes the card of a saved draft over PEFT's, which does not describe it and names local folders."""
        card, own = folder / "README.md", Path(str(self.args.output_dir)) / "README.md"
        if card.is_file() and not is_generated(card):
            remove_paths(card)  # the user's own card, to which PEFT adds
        elif folder.resolve() == own.parent.resolve():
            self.create_model_card()
        elif card.exists() or not is_checkpoint_name(folder):  # the output folder's card is for all checkpoints
            if not own.exists():
                self.create_model_card()
            shutil.copy(own, card)
            carry_model_card(None, folder, keep_name=True)


Metrics = dict[str, float]


def find_acceptance_metrics(log_history: list[Metrics]) -> tuple[Metrics | None, Metrics | None]:
    """The first and the last metrics that `SpeculativeEvalCallback` logged; `None` where there are none."""
    logs = [
        {key: log[key] for key in sorted(log) if re.search(r"alpha_(greedy|t[\d.]+)|acceptance|block_eff", key)}
        for log in log_history
        if any(key.endswith("block_efficiency") for key in log)
    ]
    return logs[0] if len(logs) > 1 else None, logs[-1] if logs else None
