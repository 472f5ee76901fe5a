"""Replay under a grammar: against brute force over the whole vocabulary, and loops that decode as engines do."""

import copy
import json
from functools import partial

import pytest
import torch
from datasets import Dataset
from engine_loops import draft_in_parallel, pick, sample, serve
from tiny import build_llama
from toy_grammar import EOS, GRAMMAR, NUM_IDS, make_allow, write_under

from spec_kd import evaluate_draft
from spec_kd.data.responses import generate_responses
from spec_kd.engines import ServerEngine, TransformersEngine
from spec_kd.evaluation.assisted import RecordedRun, _neutral_pair
from spec_kd.evaluation.response_replay import replay, score_responses
from spec_kd.parallel import ParallelDrafting, write_parallel_drafting
from spec_kd.sampling.options import SamplingOptions
from spec_kd.sampling.response_format import ResponseFormat
from spec_kd.sampling.token_masks import TokenMasks, fill_empty_alternatives, unpack
from spec_kd.serving import find_serving_engine

pytest.importorskip("xgrammar")
LIMIT = 10
FORMAT = ResponseFormat("grammar", GRAMMAR)


@pytest.fixture(scope="module")
def pair(tokenizer):
    """(draft, target) that like the grammar's tokens, but propose others often enough."""
    target = build_llama(3, layers=4, tie=False)
    draft = build_llama(3, layers=4, tie=False)
    with torch.no_grad():
        for p in draft.parameters():
            p.add_(0.03 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        for model in (draft, target):
            model.lm_head.weight[tokenizer("abcdefghijklm,,]").input_ids] *= 2.5
    return draft, target


@pytest.fixture(scope="module")
def allow(tokenizer):
    return make_allow(tokenizer)


def write_rows(target, prompts, temperature, allow):
    return [
        {"prompt_ids": prompt, "completion_ids": write_under(target, prompt, LIMIT, temperature, allow, seed)}
        for seed, prompt in enumerate(prompts)
    ]


def compute_reference(draft, target, row, temperature, sampling, engine, allow):
    """a_i and alpha of each token, from float64 logits of each text and the toy grammar's own masks."""
    ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
    start = len(row["prompt_ids"]) - 1
    with torch.no_grad():
        q, p = (m(input_ids=ids).logits[0, start:-1, :NUM_IDS].double() for m in (draft, target))
    tokens = row["completion_ids"]
    refused = ~torch.stack([allow(tokens[:i]) for i in range(len(tokens))])
    p = p.masked_fill(refused, -torch.inf)
    if engine in ("transformers", "mlx-lm"):
        q = q.masked_fill(refused, -torch.inf)
    tokens = torch.tensor(tokens)
    index, choice = torch.arange(len(tokens)), q.argmax(-1)
    if temperature == 0:
        a = (choice == tokens).double()
        return a, a
    p, q = (p / temperature).softmax(-1), q / temperature
    if engine == "llama.cpp" and sampling == "stochastic":
        q = q.masked_fill(q < q.topk(10).values[:, -1:], -torch.inf)
    q = q.softmax(-1)
    if sampling == "greedy":
        return (choice == tokens).double(), p[index, choice]
    if sampling == "matching":
        return q[index, tokens], (p * q).sum(-1)
    return (q / p)[index, tokens].clamp(max=1), torch.minimum(p, q).sum(-1)


@pytest.mark.parametrize(
    ("engine", "sampling"),
    [
        ("llama.cpp", "greedy"), ("llama.cpp", "stochastic"), ("vllm", "greedy"), ("vllm", "stochastic"),
        ("sglang", "greedy"), ("transformers", "stochastic"), ("tensorrt-llm", "greedy"), ("mlx-lm", "matching"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_scores_equal_a_dense_reference(pair, prompts, tokenizer, allow, engine, sampling, temperature):
    draft, target = pair
    rows = write_rows(target, prompts, temperature, allow)
    masked = engine if engine != "tensorrt-llm" else "transformers"  # both models, as there
    scores = score_responses(
        draft, target, rows, temperature=temperature, serving_engine=engine, draft_sampling=sampling, batch_size=5,
        grammar=GRAMMAR, processing_class=tokenizer,
    )  # fmt: skip
    for i, row in enumerate(rows):
        a, alpha = compute_reference(draft, target, row, temperature, sampling, masked, allow)
        torch.testing.assert_close(scores.acceptance[i, : len(a)], a, atol=1e-5, rtol=0)
        torch.testing.assert_close(scores.values["alpha"][i, : len(a)], alpha, atol=1e-5, rtol=0)
    if temperature > 0:
        free = score_responses(
            draft, target, rows, temperature=temperature, serving_engine=engine, draft_sampling=sampling
        )
        assert (scores.alpha_sum - free.alpha_sum).abs().max() > 0.5  # the mask matters


@pytest.mark.parametrize("choose", [pick, sample])
@pytest.mark.parametrize("engine", ["llama.cpp", "vllm", "sglang"])
@pytest.mark.parametrize("gamma", [1, 4])
def test_counts_are_those_of_the_engine(pair, prompts, tokenizer, allow, engine, gamma, choose):
    draft, target = pair
    served = [serve(engine, draft, target, prompt, gamma, EOS, LIMIT, choose, allow) for prompt in prompts]
    rows = [{"prompt_ids": p, "completion_ids": text} for p, (text, _) in zip(prompts, served, strict=True)]
    temperature = 0.0 if choose is pick else 1.0
    scores = score_responses(
        draft, target, rows, temperature=temperature, serving_engine=engine, num_past_end_tokens=gamma,
        grammar=GRAMMAR, processing_class=tokenizer,
    )  # fmt: skip
    metrics = scores.replay(gamma, LIMIT)
    rounds = [rounds for _, rounds in served]
    ends = [text[-1] == EOS for text, _ in served]
    assert any(ends) and not all(ends)
    # At temperature 1 vLLM's tokens after the limit are known in expectation only
    exact = [i for i in range(len(rows)) if choose is pick or engine != "vllm" or ends[i]]
    assert [metrics.accepted[i] for i in exact] == [sum(accepted for _, accepted in rounds[i]) for i in exact]
    assert metrics.target_calls.tolist() == [len(one) for one in rounds] or engine == "llama.cpp"
    if find_serving_engine(engine).counting.counts_drafted_past_end:
        assert metrics.drafted.tolist() == [sum(count for count, _ in one) for one in rounds]
    assert 0 < metrics.accepted.sum() < metrics.drafted.sum()
    if engine == "vllm":  # drafts are cut
        assert metrics.drafted.sum() < sum(len(one) for one in rounds) * gamma


@pytest.mark.parametrize("choose", [pick, sample])
@pytest.mark.parametrize("gamma", [2, 4])
def test_counts_of_a_parallel_draft_are_those_of_vllm(pair, prompts, tokenizer, allow, gamma, choose):
    target, draft = pair[1], copy.deepcopy(pair[0])
    mask = tokenizer("m").input_ids[0]  # an id that the grammar takes, so that untrained masks are accepted by chance
    write_parallel_drafting(draft.config, ParallelDrafting(mask, gamma))
    propose = partial(draft_in_parallel, mask)
    served = [serve("vllm", draft, target, prompt, gamma, EOS, LIMIT, choose, allow, propose) for prompt in prompts]
    rows = [{"prompt_ids": p, "completion_ids": text} for p, (text, _) in zip(prompts, served, strict=True)]
    options = {
        "temperature": 0.0 if choose is pick else 1.0, "num_past_end_tokens": gamma, "grammar": GRAMMAR,
        "processing_class": tokenizer,
    }  # fmt: skip
    metrics = score_responses(draft, target, rows, serving_engine="vllm", **options).replay(gamma, LIMIT)
    rounds, ends = [one for _, one in served], [text[-1] == EOS for text, _ in served]
    assert any(ends) and not all(ends)
    # At temperature 1 tokens after the limit are known in expectation only
    exact = [i for i in range(len(rows)) if choose is pick or ends[i]]
    assert [metrics.accepted[i] for i in exact] == [sum(accepted for _, accepted in rounds[i]) for i in exact]
    assert metrics.target_calls.tolist() == list(map(len, rounds))
    assert metrics.drafted.tolist() == [sum(count for count, _ in one) for one in rounds]
    assert 0 < metrics.accepted.sum() < metrics.drafted.sum() < sum(map(len, rounds)) * gamma
    with pytest.raises(ValueError, match="What transformers does with a parallel draft under a JSON schema"):
        score_responses(draft, target, rows, **options)


@pytest.mark.parametrize("is_parallel", [False, True])
def test_a_sampled_draft_is_cut_as_often_as_in_many_runs(pair, prompts, tokenizer, allow, is_parallel):
    """vLLM's probabilistic drafts on one text: what replay expects, against rounds that are drawn."""
    draft, target = copy.deepcopy(pair[0]), pair[1]
    gamma, prompt = 2, prompts[0]
    mask = tokenizer("m").input_ids
    if is_parallel:
        write_parallel_drafting(draft.config, ParallelDrafting(mask[0], gamma))
    text = write_under(target, prompt, LIMIT, 1.0, allow, seed=5)
    row = {"prompt_ids": prompt, "completion_ids": text}
    with torch.no_grad():
        logits = [target(input_ids=torch.tensor([prompt + text[:i]])).logits[0, -1].double() for i in range(len(text))]
    p = [one.masked_fill(~allow(text[:i]), -torch.inf).softmax(-1) for i, one in enumerate(logits)]
    random, cache, runs, drafted_in_all = torch.Generator().manual_seed(0), {}, 150, 0

    def propose(at, drafted):
        ids = prompt + text[:at] + (mask * len(drafted) if is_parallel else drafted)
        if tuple(ids) not in cache:
            with torch.no_grad():
                cache[tuple(ids)] = draft(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(-1)
        return cache[tuple(ids)]

    for _ in range(runs):
        at = 1
        while at < len(text):
            # A draft that keeps to the text as long as its tokens are accepted there, as in a run that wrote this text
            drafted, accepted = [], 0
            while len(drafted) < gamma and at + accepted < len(text) and accepted == len(drafted):
                q, i = propose(at, drafted), at + accepted
                if torch.rand(1, generator=random) < min(1.0, (q[text[i]] / p[i][text[i]]).item()):
                    drafted.append(text[i])
                    accepted += 1
                else:
                    drafted.append(int(torch.multinomial((q - p[i]).clamp(min=0), 1, generator=random)))
            while len(drafted) < gamma:
                drafted.append(int(torch.multinomial(propose(at, drafted), 1, generator=random)))
            for k, token in enumerate(drafted):
                is_allowed = allow(text[:at] + drafted[:k])
                if is_allowed is None or not is_allowed[token]:
                    break
                drafted_in_all += 1
            at += accepted + 1
    metrics = replay(
        draft, target, [row] * 100, temperature=1.0, max_new_tokens=LIMIT, num_assistant_tokens=gamma, batch_size=100,
        serving_engine="vllm", draft_sampling="stochastic", grammar=GRAMMAR, processing_class=tokenizer,
    )  # fmt: skip
    assert metrics.drafted.mean() == pytest.approx(drafted_in_all / runs, rel=0.1)


def test_masks_are_those_of_the_grammar(tokenizer, allow):
    masks = TokenMasks(tokenizer, NUM_IDS, [EOS])
    for text in ("[a]", "[abc,d]", "[x,yz,abc]"):
        ids = [*tokenizer(text).input_ids, EOS]
        allowed = unpack(masks.build(FORMAT, (), ids), NUM_IDS)
        assert allowed.tolist() == torch.stack([allow(ids[:i]) for i in range(len(ids))]).tolist()
        assert masks.build(FORMAT, ids[:3], ids[3:]).equal(masks.build(FORMAT, (), ids)[3:])
        drafts = [(len(ids), [EOS]), (0, ids), (2, [EOS]), (0, [*ids[:2], EOS])]
        assert masks.count_allowed(FORMAT, ids, drafts) == [0, len(ids), 0, 2]


def test_a_json_schema_masks_its_keys_and_rows_have_formats_of_their_own(pair, tokenizer):
    draft, target = pair
    schema = {"type": "object", "properties": {"n": {"enum": [1]}}, "required": ["n"], "additionalProperties": False}
    rows = [
        {"prompt_ids": [7, 8], "completion_ids": tokenizer(text).input_ids, "response_format": wanted}
        for text, wanted in (
            ('{"n":1}', json.dumps({"type": "json_schema", "json_schema": {"schema": schema}})),
            ("[ab]", {"type": "grammar", "grammar": GRAMMAR}),
            ("free", None),
            ("free", {"type": "text"}),
        )
    ]
    options = {"temperature": 1.0, "serving_engine": "llama.cpp", "processing_class": tokenizer}
    scores = score_responses(draft, target, rows, **options, measure_entropy=True)
    free = score_responses(draft, target, [{**row, "response_format": None} for row in rows], **options)
    entropy = scores.values["target_entropy"]
    assert entropy[0, 3] == 0 and entropy[1, 0] == 0  # only `n` and only `[` are allowed there
    assert (scores.alpha_sum == free.alpha_sum).tolist() == [False, False, True, True]


def test_a_completion_that_does_not_fit_is_named_with_its_token(pair, tokenizer):
    rows = [{"prompt_ids": [7], "completion_ids": tokenizer(text).input_ids} for text in ("[ab]", "[ab ]")]
    options = {"temperature": 0.0, "max_new_tokens": LIMIT, "serving_engine": "llama.cpp"}
    with pytest.raises(ValueError, match=r"Token 3 of the completion of row 1 \(id \d+\) does not fit its grammar"):
        replay(*pair, rows, **options, grammar=GRAMMAR, processing_class=tokenizer)
    with pytest.raises(ValueError, match="Pass `processing_class`"):
        replay(*pair, rows, **options, grammar=GRAMMAR)
    with pytest.raises(ValueError, match="The grammar of row 0 cannot be read by XGrammar"):
        replay(*pair, rows, **options, grammar="root ::= (", processing_class=tokenizer)
    with pytest.raises(ValueError, match="OpenVINO GenAI does with a draft under a JSON schema or a grammar is not"):
        replay(*pair, rows, **{**options, "serving_engine": "openvino"}, grammar=GRAMMAR, processing_class=tokenizer)
    with pytest.raises(ValueError, match=r"llama\.cpp cuts by `top_k` and `top_p` before it masks"):
        replay(*pair, rows, **{**options, "temperature": 1.0}, top_k=5, grammar=GRAMMAR, processing_class=tokenizer)


def test_stored_log_probabilities_are_not_enough(pair, prompts, tokenizer):
    draft, target = pair
    rows = generate_responses(
        TransformersEngine(target, tokenizer), Dataset.from_dict({"prompt_ids": prompts[:2]}), max_new_tokens=3,
        temperature=1.0, teacher_signal="token_only", show_progress=False,
    )  # fmt: skip
    anything = "root ::= [^z]*"
    rows = rows.add_column("response_format", [json.dumps({"type": "grammar", "grammar": anything})] * 2)
    options = {"temperature": 1.0, "serving_engine": "llama.cpp", "processing_class": tokenizer}
    with pytest.raises(ValueError, match="Stored log-probabilities do not say how a grammar masks"):
        score_responses(draft, None, rows, **options)


def test_empty_alternatives_get_their_quotes():
    grammar = 'root ::= | " " | "\\"|" ( | [|)] ) # a | comment\nws ::= ( "a" | ) \n'
    filled = fill_empty_alternatives(grammar)
    assert filled == 'root ::= "" | " " | "\\"|" ( "" | [|)] ) # a | comment\nws ::= ( "a" | "" ) \n'
    assert fill_empty_alternatives(filled) == filled


def test_an_evaluation_writes_and_replays_under_formats(pair, prompts, tokenizer, allow, tmp_path):
    draft, target = pair
    wanted = json.dumps({"type": "grammar", "grammar": GRAMMAR})
    rows = Dataset.from_dict({"prompt_ids": prompts, "response_format": [wanted] * 6 + [None] * 6})
    options = {
        "processing_class": tokenizer, "max_new_tokens": LIMIT, "temperatures": [0.0], "gammas": [2], "costs": "none",
        "num_assistant_tokens": 2, "serving_engine": "vllm", "show_progress": False,
    }  # fmt: skip
    report = evaluate_draft(draft, target, rows, output_dir=str(tmp_path), **options)
    written = generate_responses(
        TransformersEngine(target, tokenizer, response_formats=[FORMAT] * 6 + [None] * 6), rows,
        max_new_tokens=LIMIT, temperature=0.0, show_progress=False,
    )  # fmt: skip
    for seed, (prompt, row) in enumerate(zip(prompts, written, strict=True)):
        text = write_under(target, prompt, LIMIT, 0.0, allow, seed)
        assert (row["completion_ids"] == text) is (seed < 6)
    metrics = replay(
        draft, target, written, temperature=0.0, max_new_tokens=LIMIT, num_assistant_tokens=2, serving_engine="vllm",
        processing_class=tokenizer, show_progress=False,
    )  # fmt: skip
    setting = report.draft.settings[0]
    assert setting.at_gamma(2).acceptance_rate == metrics.acceptance_rate
    with pytest.raises(ValueError, match="`num_assisted_prompts` runs assisted generation, which writes free text"):
        evaluate_draft(draft, target, rows, **options, grammar=GRAMMAR, num_assisted_prompts=1)
    elsewhere = ServerEngine("target", tokenizer, "http://localhost:1/v1")
    with pytest.raises(ValueError, match="the target must be a transformers model"):
        evaluate_draft(draft, elsewhere, rows, **options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_assisted_generation_of_transformers_is_replayed(pair, prompts, tokenizer, allow, temperature):
    """The real thing: `generate(assistant_model=..., prefix_allowed_tokens_fn=...)`, round by round."""
    draft, target = pair
    options = SamplingOptions(temperature=temperature, max_new_tokens=LIMIT)
    runs = []
    with _neutral_pair(target, draft, options, 3, EOS) as config:
        for seed, prompt in enumerate(prompts * (1 if temperature == 0 else 3)):

            def list_allowed(_, ids, prompt=prompt):
                is_allowed = allow(ids[len(prompt) :].tolist())
                return [EOS] if is_allowed is None else is_allowed.nonzero().flatten().tolist()

            runs.append(
                RecordedRun(
                    target, prompt, seed, assistant_model=draft, generation_config=config,
                    prefix_allowed_tokens_fn=list_allowed,
                )
            )  # fmt: skip
    rows = [
        {"prompt_ids": prompt, "completion_ids": run.completion}
        for prompt, run in zip(prompts * len(runs), runs, strict=False)
    ]
    metrics = replay(
        draft, target, rows, temperature=temperature, max_new_tokens=LIMIT, num_assistant_tokens=3, grammar=GRAMMAR,
        processing_class=tokenizer, show_progress=False,
    )  # fmt: skip
    accepted = torch.tensor([sum(one.accepted for one in run.rounds) for run in runs])
    if temperature == 0:
        assert metrics.accepted.tolist() == accepted.tolist()
        assert metrics.target_calls.tolist() == [len(run.rounds) for run in runs]
        free = replay(
            draft, target, rows, temperature=0.0, max_new_tokens=LIMIT, num_assistant_tokens=3, show_progress=False
        )
        assert metrics.accepted.sum() > free.accepted.sum()  # forced tokens are proposed
    else:
        error = (accepted - torch.from_numpy(metrics.accepted)).double()
        assert abs(error.mean()) < 3 * error.std() / len(runs) ** 0.5
