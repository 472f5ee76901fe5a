"""Every architecture as target and as draft, against a float64 softmax of the model's own float32 logits.

The reference reads one row at a time, unpadded and without a cache. A refusal counts only where what it says is true.
"""

import copy

import pytest
import torch
from architectures import ROWS, build
from campaign_table import Table
from datasets import Dataset
from tiny import build_llama, build_tokenizer
from trl.trainer.utils import add_fused_lm_head

from spec_kd import (
    BlackBoxSFTConfig,
    BlackBoxSFTTrainer,
    WhiteBoxDistillConfig,
    WhiteBoxDistillTrainer,
    evaluate_draft,
    generate_responses,
    score_completions,
)
from spec_kd.decoding import generate_speculatively
from spec_kd.decoding.ragged_model import RaggedModel
from spec_kd.evaluation import replay
from spec_kd.evaluation.response_replay import score_responses
from spec_kd.heads import LogitHead, compute_last_hidden_states
from spec_kd.hub import export_draft
from spec_kd.loading import load_model
from spec_kd.probes import check_logits_are_known

REAL_IDS = 261
TOLERANCE = 1e-5
PROMPTS = [[5, 6, 7, 8, 9, 30], [40], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20]]
COMPLETIONS = [[50, 51, 52, 1], [60, 61, 62, 63, 64, 65, 1], [70, 1]]
TEXTS = [{"prompt_ids": p, "completion_ids": c} for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
COLUMNS = (
    "logits", "scores", "replay_as_target", "replay_as_draft", "responses", "decoding_as_target", "decoding_as_draft",
    "loss_as_target", "loss_as_draft", "packing_as_target", "packing_as_draft", "black_box", "export",
    "evaluation_as_target", "evaluation_as_draft",
)  # fmt: skip
TABLE = Table("architectures", ROWS, COLUMNS)


def test_cell(cell, outcome, tmp_path):
    model = build(cell.row)
    name, _, role = cell.column.partition("_as_")
    options = {"model": model, "outcome": outcome, "folder": tmp_path} | ({"role": role} if role else {})
    COLUMN_TESTS[name](**options)


@torch.no_grad()
def compute_log_probs(model, ids) -> torch.Tensor:
    """log p `(T, real ids)`, float64, of one text alone."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :, :REAL_IDS].double().log_softmax(-1)


def compute_completion(model, text) -> torch.Tensor:
    """log p `(N, real ids)` at the positions that predict the completion."""
    log_p = compute_log_probs(model, text["prompt_ids"] + text["completion_ids"])
    return log_p[len(text["prompt_ids"]) - 1 : -1]


def write_greedily(model, prompt, max_new_tokens=6):
    ids = list(prompt)
    while len(ids) < len(prompt) + max_new_tokens:
        ids.append(int(compute_log_probs(model, ids)[-1].argmax()))
        if ids[-1] == 1:
            break
    return ids[len(prompt) :]


def pair_up(model, role):
    """(draft, target): the other of the two is a Llama with a head of another size."""
    other = build_llama(seed=1)
    return (other, model) if role == "target" else (model, other)


def check_logits(model, outcome, folder):
    check_logits_are_known(model, "target")
    width = max(len(t["prompt_ids"]) + len(t["completion_ids"]) for t in TEXTS)
    ids, mask = torch.zeros(len(TEXTS), width, dtype=torch.long), torch.zeros(len(TEXTS), width, dtype=torch.long)
    for i, text in enumerate(TEXTS):
        row = text["prompt_ids"] + text["completion_ids"]
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    with torch.no_grad():
        hidden = compute_last_hidden_states(model, model.get_output_embeddings(), input_ids=ids, attention_mask=mask)
        p = LogitHead.of(model, REAL_IDS)(hidden).softmax(-1)  # (B, T, V)
    for i, text in enumerate(TEXTS):
        expected = compute_log_probs(model, text["prompt_ids"] + text["completion_ids"]).exp()
        assert_close(p[i, : len(expected)], expected, outcome)


def assert_close(found, expected, outcome):
    """Within `TOLERANCE`, of numbers or of a tensor."""
    difference = (torch.as_tensor(found).double() - torch.as_tensor(expected).double()).abs().max().item()
    outcome.note(f"{difference:.1e}")
    assert difference < TOLERANCE


def check_scores(model, outcome, folder):
    scored = score_completions(
        model, Dataset.from_list(TEXTS), processing_class=build_tokenizer(), teacher_signal="token_only",
        show_progress=False,
    )  # fmt: skip
    for row in scored:
        ids = torch.tensor(row["completion_ids"])
        expected = compute_completion(model, row).gather(1, ids[:, None])[:, 0]
        assert_close(torch.tensor(row["teacher_token_logprobs"]).exp(), expected.exp(), outcome)


def check_replay(model, role, outcome, folder):
    draft, target = pair_up(model, role)
    options = {"temperature": 1.0, "vocab_size": REAL_IDS, "max_new_tokens": 8}
    scores = score_responses(draft, target, TEXTS, **options)
    for i, text in enumerate(TEXTS):
        q, p = (compute_completion(part, text).exp() for part in (draft, target))
        tokens = torch.tensor(text["completion_ids"])[:, None]
        ratio = (q.gather(1, tokens) / p.gather(1, tokens))[:, 0].clamp(max=1)
        assert_close(scores.values["alpha"][i, : len(tokens)], torch.minimum(p, q).sum(-1), outcome)
        assert_close(scores.acceptance[i, : len(tokens)], ratio, outcome)
    assert replay(draft, target, TEXTS, num_assistant_tokens=2, **options).block_efficiency.value >= 1


def check_responses(model, outcome, folder):
    """Prompts of unequal length in one batch, with the log-probabilities of what was written."""
    options = {"processing_class": build_tokenizer(), "max_new_tokens": 6, "show_progress": False}
    questions = ["how", "a much longer question", "x"]
    expected, plain = [], []
    try:
        texts = generate_responses(model, questions, temperature=0.0, teacher_signal="token_only", **options)
    except (IndexError, RuntimeError, ValueError) as error:
        with pytest.raises(type(error)):  # transformers itself cannot generate with it, alone and without a batch
            model.generate(input_ids=torch.tensor([PROMPTS[0]]), max_new_tokens=3)
        outcome.refused(f"transformers' generate fails: {error}")
        return
    for row in texts:
        expected.append(write_greedily(model, row["prompt_ids"]))
        plain.append(row["completion_ids"])
        tokens = torch.tensor(row["completion_ids"])[:, None]
        log_p = compute_completion(model, row).gather(1, tokens)[:, 0]
        assert_close(torch.tensor(row["teacher_token_logprobs"]).exp(), log_p.exp(), outcome)
    assert plain == expected


def check_decoding(model, role, outcome, folder):
    draft, target = pair_up(model, role)
    options = {"temperature": 0.0, "num_assistant_tokens": 2, "max_new_tokens": 6, "vocab_size": REAL_IDS}
    try:
        text = generate_speculatively(target, draft, PROMPTS, **options)
    except ValueError as error:
        assert_reads_otherwise_in_a_batch(model)
        outcome.refused(str(error))
        return
    assert text.completion_ids == [write_greedily(target, prompt) for prompt in PROMPTS]
    rows = [{"prompt_ids": p, "completion_ids": c} for p, c in zip(PROMPTS, text.completion_ids, strict=True)]
    figures = replay(draft, target, rows, **options)
    assert [len(rounds) for rounds in text.rounds] == figures.target_calls.tolist()


@torch.no_grad()
def assert_reads_otherwise_in_a_batch(model):
    """Whichever way texts are laid out in the cache, what follows a token that was taken back is wrong, or fails."""
    for is_gapless in (False, True):
        try:
            ragged = RaggedModel(model, torch.tensor([2, 0]), REAL_IDS, torch.device("cpu"), is_gapless)
            ragged.read(torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]]))
            ragged.take_back(torch.tensor([0, 2]), [0, 1])
            logits = ragged.read(torch.tensor([[11], [12]]))[:, 0].double().log_softmax(-1)
        except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
            continue
        expected = torch.stack([compute_log_probs(model, ids)[-1] for ids in ([5, 6, 11], [7, 8, 12])])
        assert (logits - expected).abs().max() > 1e-3


def make_trainer(draft, target, folder, **options):
    common = {
        "output_dir": str(folder), "per_device_train_batch_size": len(TEXTS), "report_to": "none", "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False, "router_aux_loss_coef": 0.0,
        "save_strategy": "no", "shuffle_dataset": False, **options,
    }  # fmt: skip
    shared = {"train_dataset": Dataset.from_list(TEXTS), "processing_class": build_tokenizer()}
    if target is None:
        return BlackBoxSFTTrainer(draft, BlackBoxSFTConfig(**common), **shared)
    return WhiteBoxDistillTrainer(draft, WhiteBoxDistillConfig(**common), teacher_model=target, **shared)


@torch.no_grad()
def compute_loss(trainer):
    trainer.model.eval()
    (batch,) = list(trainer.get_train_dataloader())
    return trainer.compute_loss(trainer.model, batch).item()


def compute_expected_loss(draft, target):
    """Forward KL per completion token, or the cross-entropy of the tokens without a target."""
    total, count = 0.0, 0
    for text in TEXTS:
        log_q = compute_completion(draft, text)
        if target is None:
            total -= log_q.gather(1, torch.tensor(text["completion_ids"])[:, None]).sum().item()
        else:
            log_p = compute_completion(target, text)
            total += (log_p.exp() * (log_p - log_q)).sum().item()
        count += len(log_q)
    return total / count


def check_loss(model, role, outcome, folder, **options):
    draft, target = pair_up(model, role)
    expected = compute_expected_loss(draft, target)
    try:
        trainer = make_trainer(copy.deepcopy(draft), target, folder, **options)
    except ValueError as error:
        assert options and "does not keep packed sequences apart" in str(error)
        assert_packed_sequences_read_each_other(model)
        outcome.refused(str(error))
        return
    assert_close(compute_loss(trainer), expected, outcome)


def check_packing(model, role, outcome, folder):
    check_loss(model, role, outcome, folder, packing=True, max_length=64)


@torch.no_grad()
def assert_packed_sequences_read_each_other(model):
    first, second = PROMPTS[0], PROMPTS[2]
    positions = torch.tensor([[*range(len(first)), *range(len(second))]])
    logits = model(input_ids=torch.tensor([first + second]), position_ids=positions, use_cache=False).logits[0]
    packed = logits[len(first) :, :REAL_IDS].double().log_softmax(-1)
    assert (packed - compute_log_probs(model, second)).abs().max() > 1e-3


def check_black_box(model, outcome, folder):
    try:
        trainer = make_trainer(copy.deepcopy(model), None, folder)
    except ValueError as error:
        assert "TRL's fused head" in str(error)
        assert_fused_head_differs(model)
        outcome.refused(str(error))
        return
    with torch.no_grad():  # TRL's loss is over all rows of the head, padding included
        total = count = 0
        for text in TEXTS:
            ids = torch.tensor([text["prompt_ids"] + text["completion_ids"]])
            log_q = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
            log_q = log_q[len(text["prompt_ids"]) - 1 : -1].gather(1, torch.tensor(text["completion_ids"])[:, None])
            total, count = total - log_q.sum().item(), count + len(log_q)
    assert_close(compute_loss(trainer), total / count, outcome)


def assert_fused_head_differs(model):
    patched, ids = copy.deepcopy(model), torch.tensor([PROMPTS[2]])
    add_fused_lm_head(patched, outputs=("log_probs",))
    try:
        with torch.no_grad():
            found = patched(input_ids=ids, labels=ids, fused_lm_head=True).log_probs[0]
            expected = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
    except (AttributeError, IndexError, RuntimeError, TypeError):
        return
    assert (found - expected.gather(1, ids[0, 1:, None])[:, 0]).abs().max() > 1e-3


def check_export(model, outcome, folder):
    try:
        path = export_draft(model, folder, processing_class=build_tokenizer(), target_vocab_size=280)
    except ValueError as error:
        rows = [part.weight.shape[0] for part in (model.get_input_embeddings(), model.get_output_embeddings())]
        assert rows[0] != rows[1] and "cannot be aligned" in str(error)
        outcome.refused(str(error))
        return
    saved = load_model(path)
    assert type(saved) is type(model) and saved.config.get_text_config().vocab_size == 280
    for text in TEXTS:
        found, expected = (compute_completion(part, text) for part in (saved, model))
        assert_close(found.exp(), expected.exp(), outcome)


def check_evaluation(model, role, outcome, folder):
    draft, target = pair_up(model, role)
    questions = ["how", "a much longer question", "x"]
    options = {"processing_class": build_tokenizer(), "max_new_tokens": 6, "show_progress": False}
    try:
        report = evaluate_draft(
            draft, target, questions, gammas=(1, 2), num_assistant_tokens=2, temperatures=(0.0,), **options
        )
    except (IndexError, RuntimeError, ValueError) as error:
        assert role == "target"
        with pytest.raises(type(error)):
            target.generate(input_ids=torch.tensor([PROMPTS[0]]), max_new_tokens=3)
        outcome.refused(f"transformers' generate fails: {error}")
        return
    matches = []
    for row in generate_responses(target, questions, temperature=0.0, **options):
        choice = compute_completion(draft, row).argmax(-1)
        matches += (choice == torch.tensor(row["completion_ids"])).tolist()
    assert_close(report.draft.settings[0].alpha.value, sum(matches) / len(matches), outcome)
    assert bool(report.draft.costs) != bool(report.draft.unmeasured)


COLUMN_TESTS = {
    "logits": check_logits, "scores": check_scores, "replay": check_replay, "responses": check_responses,
    "decoding": check_decoding, "loss": check_loss, "packing": check_packing, "black_box": check_black_box,
    "export": check_export, "evaluation": check_evaluation,
}  # fmt: skip
