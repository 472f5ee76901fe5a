"""Signals that passed through other hands: what is not of its row, or no distribution, is refused before training."""

import dataclasses
import math

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets
from tiny import build_llama, build_tokenizer

from spec_kd import WhiteBoxDistillConfig, WhiteBoxDistillTrainer, generate_responses
from spec_kd.data.responses import score_completions
from spec_kd.data.signal_checks import CHECKSUM_COLUMN, compute_checksum
from spec_kd.data.teacher_signal import TeacherInfo, pack_sparse
from spec_kd.data.token_columns import LOGPROB_COLUMN, REFERENCE_COLUMN, SPARSE_COLUMN, read_token_column
from spec_kd.evaluation import replay
from spec_kd.losses import SparseDistribution

LENGTH = 6
METHODS = {
    "token_only": {},
    "sampled_counts": {"num_draws": 16},
    "sampled_logprobs": {"num_draws": 16},
    "top_k_tail": {"signal_top_k": 8},
}


@pytest.fixture(scope="module")
def distilled():
    """Rows of equal length, so that shifting them leaves every size right."""
    target, tokenizer = build_llama(seed=1), build_tokenizer()
    texts = generate_responses(
        target, [f"{i} and so" for i in range(10)], processing_class=tokenizer, max_new_tokens=LENGTH,
        temperature=1.0, show_progress=False,
    )  # fmt: skip
    texts = texts.filter(lambda row: len(row["completion_ids"]) == LENGTH)
    assert len(texts) >= 4
    return {
        name: score_completions(
            target, texts, processing_class=tokenizer, teacher_signal=name, sampling_temperature=1.0,
            max_new_tokens=LENGTH, show_progress=False, **numbers,
        )
        for name, numbers in METHODS.items()
    }  # fmt: skip


def check(dataset, **options):
    """Builds the trainer, which is where everything is to be found out."""
    args = WhiteBoxDistillConfig(
        output_dir=options.pop("output_dir"), use_cpu=True, report_to=[], gradient_checkpointing=False, max_steps=1
    )
    return WhiteBoxDistillTrainer(
        model=build_llama(seed=0), args=args, train_dataset=dataset, processing_class=build_tokenizer(), **options
    )


def replace(dataset, name, values):
    return dataset.remove_columns([name]).add_column(name, values, feature=dataset.features[name])


def rotate(dataset, name):
    values = dataset[name][:]
    return replace(dataset, name, values[1:] + values[:1])


@pytest.mark.parametrize("method", METHODS)
def test_a_signal_rotated_by_one_row_is_refused(method, distilled, tmp_path):
    dataset = distilled[method]
    column = LOGPROB_COLUMN if method == "token_only" else "teacher_signal"
    check(dataset, output_dir=str(tmp_path))
    for shifted in (rotate(dataset, column), rotate(dataset, "prompt_ids"), rotate(dataset, "completion_ids")):
        with pytest.raises(ValueError, match=rf"Row 0: `{column}` does not belong to its `prompt_ids`"):
            check(shifted, output_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"Row 0.*does not belong"):  # all of the teacher's together
        check(rotate(rotate(dataset, column), CHECKSUM_COLUMN), output_dir=str(tmp_path))
    shuffled = dataset.shuffle(seed=0).select(range(3))  # whole rows may go where they like
    check(shuffled, output_dir=str(tmp_path))


@pytest.mark.parametrize("method", ["sampled_logprobs", "top_k_tail"])
def test_without_a_checksum_two_columns_that_disagree_are_refused(method, distilled, tmp_path):
    dataset = distilled[method].remove_columns([CHECKSUM_COLUMN])
    check(dataset, output_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"Row \d: .*different log-probabilities of the token written at \d"):
        check(rotate(dataset, "teacher_signal"), output_dir=str(tmp_path))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.5])
@pytest.mark.parametrize("has_checksum", [True, False])
def test_numbers_that_are_no_log_probabilities_name_their_row(value, has_checksum, distilled, tmp_path):
    dataset = distilled["token_only"]
    values = dataset[LOGPROB_COLUMN][:]
    values[2][3] = value
    broken = replace(dataset, LOGPROB_COLUMN, values)
    if not has_checksum:
        broken = broken.remove_columns([CHECKSUM_COLUMN])
    with pytest.raises(ValueError, match=rf"Row 2: `{LOGPROB_COLUMN}` has {value} at token 3"):
        check(broken, output_dir=str(tmp_path))
    with pytest.raises(ValueError, match=rf"Row 2: `{LOGPROB_COLUMN}` has {value}"):
        replay(build_llama(seed=0), None, broken, temperature=1.0, max_new_tokens=LENGTH)


def make_signal_row(info, ids, log_p):
    return {
        "prompt_ids": [7, 8], "completion_ids": [9], "teacher_info": info.to_json(),
        "teacher_signal": pack_sparse(SparseDistribution([np.array(ids)], [np.array(log_p)]), info),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ids", "log_p", "message"),
    [
        (list(range(16)), [0.0] * 16, r"Row 5: the ids kept at token 0 have a probability of 16 together"),
        ([3, 3, *range(4, 18)], [-3.0] * 16, "or one is there twice"),
        ([*range(15), 300], [-3.0] * 16, r"Row 5: the teacher signal has the id 300 at token 0, beyond the 261"),
    ],
    ids=["mass of 16", "an id twice", "beyond the vocabulary"],
)
def test_signals_that_are_no_distributions_name_their_row(ids, log_p, message, distilled):
    info = TeacherInfo.from_json(distilled["top_k_tail"][0]["teacher_info"])
    info = dataclasses.replace(info, top_k=16)
    with pytest.raises(ValueError, match=message):
        read_token_column(make_signal_row(info, ids, log_p), SPARSE_COLUMN, "Row 5")


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.3])
def test_what_is_no_log_probability_is_not_packed(value, distilled):
    info = TeacherInfo.from_json(distilled["top_k_tail"][0]["teacher_info"])
    with pytest.raises(ValueError, match="no log-probability"):
        make_signal_row(info, list(range(8)), [value] + [-3.0] * 7)


def test_two_targets_in_one_set_are_refused(distilled, tmp_path):
    other = score_completions(
        build_llama(seed=2), distilled["token_only"], processing_class=build_tokenizer(), teacher_signal="token_only",
        sampling_temperature=1.0, max_new_tokens=LENGTH, show_progress=False,
    )  # fmt: skip
    both = concatenate_datasets([distilled["token_only"], other])
    with pytest.raises(ValueError, match="signals of two targets"):
        check(both, output_dir=str(tmp_path))
    stream = check(both.to_iterable_dataset(), output_dir=str(tmp_path), eval_dataset=None).train_dataset
    with pytest.raises(ValueError, match="signals of two targets"):
        list(stream)


def test_ids_beyond_the_vocabulary_name_their_row(tmp_path):
    for value in (261, -1, 10_000):
        rows = [{"prompt_ids": [7, 8], "completion_ids": [9, 1]} for _ in range(4)]
        rows[3]["completion_ids"][0] = value
        with pytest.raises(ValueError, match=rf"Row 3 of the train dataset has the id {value} in `completion_ids`"):
            check(Dataset.from_list(rows), output_dir=str(tmp_path), teacher_model=build_llama(seed=1))
    rows = [{"input_ids": [7, 8, 300], "labels": [-100, 8, 9]}]
    with pytest.raises(ValueError, match=r"Row 0 .* id 300 in `input_ids`"):
        check(Dataset.from_list(rows), output_dir=str(tmp_path), teacher_model=build_llama(seed=1))
    stream = Dataset.from_list([{"input_ids": [7, 8], "labels": [-100, 8]}, *rows]).to_iterable_dataset()
    trainer = check(stream, output_dir=str(tmp_path), teacher_model=build_llama(seed=1), eval_dataset=None)
    with pytest.raises(ValueError, match=r"Row 1 .* id 300"):
        list(trainer.train_dataset)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_reference_scores_are_divergences(value):
    row = {"completion_ids": [5, 6], REFERENCE_COLUMN: [0.5, value]}
    with pytest.raises(ValueError, match=f"Row 1: `{REFERENCE_COLUMN}` has a number that is no KL"):
        read_token_column(row, REFERENCE_COLUMN, "Row 1")


def test_the_checksum_covers_every_part():
    base = ([1, 2], [3, 4], [-0.5, -1.0], b"ab")
    sums = {tuple(compute_checksum(*base))}
    for changed in (([1], [2, 3, 4]), ([1, 2], [4, 3]), ([2, 1], [3, 4])):
        sums.add(tuple(compute_checksum(*changed, *base[2:])))
    assert len(sums) == 4 and all(0 <= number < 2**63 for pair in sums for number in pair)
    first = compute_checksum(*base)
    assert compute_checksum(*base[:2], [-0.5, -1.5], b"ab")[0] != first[0]
    assert compute_checksum(*base[:3], b"ac")[1] != first[1]


def test_rows_without_a_completion_are_counted_without_a_limit_too(tmp_path, caplog):
    rows = [{"prompt_ids": [7, 8], "completion_ids": [9, 1] if i % 2 else []} for i in range(8)]
    args = WhiteBoxDistillConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], gradient_checkpointing=False, max_length=None
    )
    named = {"args": args, "processing_class": build_tokenizer(), "teacher_model": build_llama(seed=1)}
    WhiteBoxDistillTrainer(model=build_llama(), train_dataset=Dataset.from_list(rows), **named)
    assert "4 of 8 rows have no completion token and teach nothing" in caplog.text
    with pytest.raises(ValueError, match="All 4 completions of the train dataset are empty"):
        WhiteBoxDistillTrainer(model=build_llama(), train_dataset=Dataset.from_list(rows[::2]), **named)
