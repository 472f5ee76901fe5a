"""A script of TRL with the class swapped: the same arguments, the same data formats, the same rows and parameters."""

import copy
import inspect

import pytest
import torch
from datasets import Dataset, DatasetDict
from tiny import build_llama, build_tokenizer
from trl import SFTConfig, SFTTrainer

from spec_kd import BlackBoxSFTTrainer, OnlineGKDTrainer
from spec_kd import WhiteBoxDistillTrainer as WhiteBoxTrainer
from spec_kd.vocabulary import VocabularyMismatchError

LONG_PROMPTS = [
    {"prompt": "a longer question", "completion": "yes, an answer"},
    {"prompt": "b", "completion": "no"},
    {"prompt": "a much longer question than that", "completion": "maybe so"},
]
TEXTS = [{"text": "What the target wrote."}, {"text": "And more of it, and a bit more."}]


def make_trainer(trainer_class, options, rows, tokenizer=None, **overrides):
    """With `SFTConfig` for `SFTTrainer` as well, and a teacher where one is needed."""
    named = {k: overrides.pop(k) for k in list(overrides) if k in ("formatting_func", "eval_dataset", "teacher_model")}
    config_class = SFTConfig if trainer_class is SFTTrainer else trainer_class._config_class
    if trainer_class is SFTTrainer:
        overrides.pop("assume_target_completions", None)
    if issubclass(trainer_class, WhiteBoxTrainer):
        named.setdefault("teacher_model", build_llama(seed=1))
    return trainer_class(
        model=build_llama(seed=0), args=config_class(**{**options, "bf16": False, **overrides}),
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer or build_tokenizer(), **named,
    )  # fmt: skip


def read_rows(trainer):
    return [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in trainer.train_dataset]


@pytest.mark.parametrize("trainer_class", [BlackBoxSFTTrainer, WhiteBoxTrainer, OnlineGKDTrainer])
def test_arguments_are_those_of_sft_trainer_in_its_order(trainer_class):
    expected = list(inspect.signature(SFTTrainer.__init__).parameters)
    own = inspect.signature(trainer_class.__init__).parameters
    assert list(own)[: len(expected)] == expected
    kinds = {parameter.kind for name, parameter in own.items()}
    assert not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    for name, parameter in inspect.signature(SFTTrainer.__init__).parameters.items():
        assert own[name].default == parameter.default, name
    assert all(parameter.annotation is not parameter.empty for name, parameter in own.items() if name != "self")


def test_positional_arguments_and_tags(options, rows):
    args = SFTConfig(**options, bf16=False)
    trainer = BlackBoxSFTTrainer(build_llama(), args, None, Dataset.from_list(rows), None, build_tokenizer())
    assert {"trl", "sft", "spec_kd"} <= set(trainer.model.model_tags)


@pytest.mark.parametrize(
    "overrides",
    [
        {"max_length": 12},
        {"max_length": 12, "truncation_mode": "keep_end"},
        {"max_length": 12, "packing": True, "packing_strategy": "wrapped"},
        {"max_length": 12, "packing": True, "packing_strategy": "bfd_split"},
        {"max_length": 60, "packing": True},
        {"completion_only_loss": False},
    ],
)
def test_rows_are_those_of_sft_trainer(options, overrides):
    trained = [
        read_rows(make_trainer(trainer_class, options, LONG_PROMPTS, **overrides))
        for trainer_class in (SFTTrainer, BlackBoxSFTTrainer, WhiteBoxTrainer)
    ]
    assert trained[0] == trained[1] == trained[2]


@pytest.mark.parametrize("strategy", ["wrapped", "bfd_split"])
def test_packing_that_splits_rows_says_nothing_of_cut_ones(options, strategy, caplog):
    rows = [{"prompt": "a prompt beyond the length", "completion": "yes"}] * 3
    overrides = {"max_length": 8, "packing": True, "packing_strategy": strategy}
    with caplog.at_level("WARNING"):
        trainer = make_trainer(BlackBoxSFTTrainer, options, rows, **overrides)
    assert sum(label != -100 for row in read_rows(trainer) for label in row["labels"]) == 3 * 4
    assert "teach nothing" not in caplog.text


def test_keep_end_counts_what_it_cuts(options, caplog):
    rows = [{"prompt_ids": [5] * 10, "completion_ids": [7, 1]}, {"prompt_ids": [5], "completion_ids": [7, 1]}]
    with caplog.at_level("WARNING"):
        trainer = make_trainer(BlackBoxSFTTrainer, options, rows, max_length=4, truncation_mode="keep_end")
    assert "cuts 1 of 2 rows; 0 rows" in caplog.text
    assert read_rows(trainer)[0] == {"input_ids": [5, 5, 7, 1], "labels": [-100, -100, 7, 1]}


def test_completion_only_loss_is_honored_with_ids(options):
    rows = [{"prompt_ids": [5, 6], "completion_ids": [7, 1]}]
    for trainer_class in (BlackBoxSFTTrainer, WhiteBoxTrainer):
        assert read_rows(make_trainer(trainer_class, options, rows))[0]["labels"] == [-100, -100, 7, 1]
        trainer = make_trainer(trainer_class, options, rows, completion_only_loss=False)
        assert read_rows(trainer)[0]["labels"] == [5, 6, 7, 1]


def test_masks_beside_ids_say_what_is_trained(options):
    ids = {"input_ids": [5, 6, 7, 1]}
    for columns, labels in (
        ({"completion_mask": [0, 0, 1, 1]}, [-100, -100, 7, 1]),
        ({"assistant_masks": [0, 1, 0, 1]}, [-100, 6, -100, 1]),
        ({"completion_mask": [0, 0, 1, 1], "assistant_masks": [0, 1, 0, 1]}, [-100, -100, -100, 1]),
        ({"labels": [5, -100, 7, -100], "assistant_masks": [1, 1, 1, 1]}, [5, -100, 7, -100]),
    ):
        trainer = make_trainer(BlackBoxSFTTrainer, options, [{**ids, **columns}])
        assert read_rows(trainer)[0]["labels"] == labels, columns
    everything = make_trainer(
        BlackBoxSFTTrainer, options, [{**ids, "completion_mask": [0, 0, 1, 1]}], completion_only_loss=False
    )
    assert read_rows(everything)[0]["labels"] == [5, 6, 7, 1]


def test_evaluation_rows_of_another_format_than_the_training_rows(options, rows):
    """TRL decides by the first training row whether prompts are trained on, for all datasets."""
    held_out = Dataset.from_list(LONG_PROMPTS)
    trainer = make_trainer(BlackBoxSFTTrainer, options, rows, eval_dataset=held_out)
    assert trainer.eval_dataset[1]["labels"][0] == -100
    masked = Dataset.from_list([{"input_ids": [5, 6, 7, 1], "completion_mask": [0, 0, 1, 1]}])
    assert trainer._prepare_dataset(masked, trainer.processing_class, trainer.args, False, None, "test")["labels"] == [
        [-100, -100, 7, 1]
    ]
    with pytest.raises(ValueError, match=r"eval dataset has the columns \['text'\]"):
        trainer.evaluate(Dataset.from_list(TEXTS))


@pytest.mark.parametrize("trainer_class", [BlackBoxSFTTrainer, WhiteBoxTrainer])
def test_rows_that_do_not_say_what_the_target_wrote_need_one_option(options, trainer_class):
    def format_row(row):
        return f"Q: {row['question']} A: {row['answer']}"

    questions = [{"question": "a", "answer": "b"}]
    for rows, named in ((TEXTS, {}), ([{"input_ids": [5, 6, 1]}], {}), (questions, {"formatting_func": format_row})):
        with pytest.raises(ValueError, match="assume_target_completions=True"):
            make_trainer(trainer_class, options, rows, **named)
        trained = [
            read_rows(make_trainer(cls, options, rows, assume_target_completions=True, **named))
            for cls in (SFTTrainer, trainer_class)
        ]
        assert trained[0] == trained[1]


def test_columns_are_checked_after_the_formatting_function(options):
    """TRL reads `messages` beside the text that the function returned, and ignores the text."""
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    trainer = make_trainer(
        BlackBoxSFTTrainer, options, rows, formatting_func=lambda row: row["messages"][1]["content"] * 3,
        assume_target_completions=True,
    )  # fmt: skip
    assert build_tokenizer().decode(read_rows(trainer)[0]["labels"]) == "bbb<|end|>"


def test_messages_need_no_option_and_no_markers_in_the_template(options):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 4
    for overrides in ({}, {"assistant_only_loss": True}, {"assume_target_completions": True}):
        trainer = make_trainer(BlackBoxSFTTrainer, options, rows, **overrides)
        labels = [label for label in read_rows(trainer)[0]["labels"] if label != -100]
        assert build_tokenizer().decode(labels) == "b<|end|>", overrides
        assert trainer.args.assistant_only_loss == overrides.get("assistant_only_loss", False)


def test_a_dictionary_of_splits_is_refused_by_name(options):
    dataset = DatasetDict({"train": Dataset.from_list(TEXTS), "test": Dataset.from_list(TEXTS)})
    with pytest.raises(TypeError, match=r"DatasetDict with the splits \['train', 'test'\]"):
        BlackBoxSFTTrainer(build_llama(), SFTConfig(**options, bf16=False), train_dataset=dataset,
                           processing_class=build_tokenizer())  # fmt: skip


def test_ids_cannot_skip_preparation(options, rows):
    with pytest.raises(ValueError, match="skip_prepare_dataset=True"):
        make_trainer(BlackBoxSFTTrainer, options, rows, dataset_kwargs={"skip_prepare_dataset": True})


def test_the_callers_configuration_is_not_touched(options, rows):
    args = SFTConfig(**options, bf16=False, model_init_kwargs={"dtype": torch.float16})
    before = copy.deepcopy(vars(args))
    trainer = BlackBoxSFTTrainer(build_llama(), args, None, Dataset.from_list(rows), None, build_tokenizer())
    assert trainer.args.model_init_kwargs == {"dtype": torch.float16}
    trainer.args.model_init_kwargs["dtype"] = "changed"
    trainer.args.accelerator_config.split_batches = True
    for name in ("model_init_kwargs", "accelerator_config", "learning_rate", "completion_only_loss"):
        assert getattr(args, name) == before[name], name


@pytest.fixture
def remote_folder(tmp_path, tokenizer):
    """A model whose classes come with it, as `trust_remote_code=True` loads them."""
    folder = tmp_path / "remote"
    build_llama(seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "remote_llama.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n"
        "class RemoteConfig(LlamaConfig):\n    model_type = 'remote_llama'\n\n"
        "class RemoteForCausalLM(LlamaForCausalLM):\n    config_class = RemoteConfig\n"
    )
    config = (folder / "config.json").read_text().replace('"model_type": "llama"', '"model_type": "remote_llama"')
    config = config.replace("LlamaForCausalLM", "RemoteForCausalLM")
    names = '"auto_map": {"AutoConfig": "remote_llama.RemoteConfig", '
    names += '"AutoModelForCausalLM": "remote_llama.RemoteForCausalLM"},'
    (folder / "config.json").write_text(config.replace("{", "{" + names, 1))
    return str(folder)


@pytest.mark.parametrize("trainer_class", [BlackBoxSFTTrainer, WhiteBoxTrainer])
def test_trusted_code_is_trusted_for_config_tokenizer_draft_and_teacher(remote_folder, options, rows, trainer_class):
    named = {"teacher_model": remote_folder} if trainer_class is WhiteBoxTrainer else {}
    dataset = Dataset.from_list(rows)
    with pytest.raises(ValueError, match="custom code"):
        trainer_class(remote_folder, SFTConfig(**options, bf16=False), train_dataset=dataset, **named)
    args = SFTConfig(**options, bf16=False, trust_remote_code=True)
    trainer = trainer_class(remote_folder, args, train_dataset=dataset, **named)
    assert type(trainer.model).__name__ == "RemoteForCausalLM"
    trainer.train()


@pytest.fixture
def template_folder(tmp_path):
    """Where a chat template is cloned from: the tokenizer, and one that has a token more."""

    def build(*tokens):
        other = build_tokenizer()
        other.add_tokens(list(tokens), special_tokens=True)
        other.chat_template = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
        other.save_pretrained(tmp_path / f"template-{len(tokens)}")
        return str(tmp_path / f"template-{len(tokens)}")

    return build


def test_a_cloned_template_may_fill_up_the_drafts_rows(template_folder, options):
    """TRL adds dummy tokens up to a multiple of 64; the loss stays over the ids that the target has."""
    rows = [{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}] * 4
    trainer = make_trainer(WhiteBoxTrainer, options, rows, chat_template_path=template_folder())
    assert trainer.model.config.vocab_size == 320 and trainer.teacher_model.config.vocab_size == 261
    trainer.train()
    assert all(torch.isfinite(torch.tensor(log["loss"])) for log in trainer.state.log_history if "loss" in log)
    with pytest.raises(ValueError, match="cannot cut the draft to the target's 261 rows"):
        make_trainer(WhiteBoxTrainer, options, rows, chat_template_path=template_folder(), align_vocabulary=True)


def test_a_cloned_template_with_tokens_that_the_target_cannot_read_is_refused(template_folder, options):
    rows = [{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}] * 4
    path = template_folder("<|new|>")
    with pytest.raises(VocabularyMismatchError, match=r"adds 1 tokens .*'<\|new\|>'"):
        make_trainer(WhiteBoxTrainer, options, rows, chat_template_path=path)
    padded = build_llama(seed=1, vocab_size=384)  # a target that the tokenizer was given for
    trainer = make_trainer(WhiteBoxTrainer, options, rows, chat_template_path=path, teacher_model=padded)
    trainer.train()


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"max_length": 12},
        {"max_length": 12, "truncation_mode": "keep_end"},
        {"max_length": 32, "packing": True},
        {"max_length": 32, "packing": True, "packing_strategy": "wrapped"},
        {"max_length": None, "padding_free": True},
        {"shuffle_dataset": True},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"completion_only_loss": False},
        {"gradient_checkpointing": True},
        {"label_smoothing_factor": 0.1},
        {"loss_type": "dft"},
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_parameters_are_bitwise_those_of_sft_trainer(options, overrides):
    rows = [{"prompt": f"{i} plus {i}", "completion": f" is {2 * i}, I think"} for i in range(8)]
    trained = []
    for trainer_class in (SFTTrainer, BlackBoxSFTTrainer):
        trainer = make_trainer(trainer_class, options, rows, **overrides)
        trainer.train()
        trained.append(trainer.model.state_dict())
    for name, value in trained[0].items():
        assert torch.equal(value, trained[1][name]), name
