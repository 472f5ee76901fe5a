"""Drafts made from a target or a donor: what is kept, what is refused, and what they can do before training."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from spec_kd import ServingCosts, init_draft
from spec_kd.drafts.importance import measure_activity
from spec_kd.drafts.slicing import choose_heads, choose_layers, find_principal_directions
from spec_kd.drafts.transplant import match_tokens, read_token_bytes
from tests.tiny import build_llama, build_tokenizer

SHAPE = {"vocab_size": 261, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1, "max_position_embeddings": 512}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def responses():
    torch.manual_seed(0)
    texts = torch.randint(5, 261, (6, 21)).tolist()
    return [{"prompt_ids": text[:12], "completion_ids": text[12:]} for text in texts]


def make(target, tokenizer, responses=None, **options):
    return init_draft(target, processing_class=tokenizer, responses=responses, show_progress=False, **options)


def read_logits(model, ids=range(5, 40)):
    with torch.no_grad():
        return model(torch.tensor([list(ids)])).logits.double()


def test_a_draft_without_a_change_is_the_target(tokenizer, responses):
    target = build_llama(layers=3)
    found = make(target, tokenizer, responses)
    assert found.layers == [0, 1, 2]
    assert torch.equal(read_logits(found.draft), read_logits(target))
    assert found.draft is not target and found.num_parameters == target.num_parameters()
    assert found.num_bytes == 2 * found.num_parameters and found.num_head_parameters == 261 * 32


@pytest.mark.parametrize("tie", [True, False])
def test_named_layers_are_kept_and_numbered_again(tokenizer, tie):
    target = build_llama(layers=4, tie=tie)
    found = make(target, tokenizer, layers=[0, 3])
    assert (found.layers, found.alpha, found.draft.config.num_hidden_layers) == ([0, 3], None, 2)
    assert [layer.self_attn.layer_idx for layer in found.draft.model.layers] == [0, 1]
    assert torch.equal(found.draft.model.layers[1].mlp.up_proj.weight, target.model.layers[3].mlp.up_proj.weight)
    assert len(target.model.layers) == 4  # the target is as it was
    text = torch.tensor([list(range(5, 20))])
    generated = [
        found.draft.generate(text, max_new_tokens=8, use_cache=cache, do_sample=False) for cache in (True, False)
    ]
    assert torch.equal(*generated)


def test_the_layers_with_most_influence_are_kept(tokenizer, responses):
    target = build_llama(layers=5)
    for index in (1, 3):  # layers that hardly change anything
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            target.model.layers[index].get_submodule(name).weight.data *= 1e-4
    found = make(target, tokenizer, responses, num_hidden_layers=3)
    assert found.layers == [0, 2, 4]
    assert (read_logits(found.draft) - read_logits(target)).abs().max() < 1e-2
    assert found.alpha is not None and 0 <= found.alpha <= 1


def test_influence_is_one_minus_the_cosine(responses):
    model = build_llama(layers=2)
    texts = [[*row["prompt_ids"], *row["completion_ids"]] for row in responses]
    cosines = torch.zeros(2, dtype=torch.float64)
    for text in texts:
        captured = []
        handle = model.model.norm.register_forward_pre_hook(lambda _module, args: captured.append(args[0]))  # noqa: B023
        with torch.no_grad():
            states = list(model(torch.tensor([text]), output_hidden_states=True).hidden_states)
        handle.remove()
        states[-1] = captured[0]  # before the last norm
        for index in range(2):
            cosines[index] += torch.cosine_similarity(states[index].double(), states[index + 1].double(), -1).sum()
    expected = 1 - cosines / sum(map(len, texts))
    assert torch.allclose(measure_activity(model, texts, reads_parts=False).influence, expected, atol=1e-6)


def test_weights_of_heads_and_neurons_are_what_they_write(responses):
    model = build_llama(layers=1)
    texts = [[*row["prompt_ids"], *row["completion_ids"]] for row in responses]
    inputs = {}
    layer = model.model.layers[0]
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        layer.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, name=name: inputs.setdefault(name, []).append(args[0][0].double())
        )
    activity = measure_activity(model, texts, reads_parts=True)
    for name, size, found in (("self_attn.o_proj", 8, activity.heads), ("mlp.down_proj", 1, activity.neurons)):
        weight = layer.get_submodule(name).weight.detach().double()
        states = torch.cat(inputs[name])
        expected = [
            (states[:, start : start + size] @ weight[:, start : start + size].T).square().sum(-1).mean()
            for start in range(0, states.shape[1], size)
        ]
        assert torch.allclose(found[0], torch.stack(expected), rtol=1e-6)


def build_qwen(cls, config_cls, tie):
    torch.manual_seed(0)
    model = cls(config_cls(**SHAPE, **HEADS, head_dim=8, tie_word_embeddings=tie)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize(
    "build",
    [
        lambda tie: build_llama(layers=3, tie=tie),
        lambda tie: build_qwen(Qwen2ForCausalLM, Qwen2Config, tie),
        lambda tie: build_qwen(Qwen3ForCausalLM, Qwen3Config, tie),
    ],
    ids=["llama", "qwen2", "qwen3"],
)
@pytest.mark.parametrize("tie", [True, False])
def test_slicing_is_exact_where_nothing_is_lost(tokenizer, responses, build, tie):
    """Hidden states that lie in a subspace, heads and neurons that write nothing: the narrow draft is the target."""
    target = build(tie)
    torch.manual_seed(1)
    basis = torch.linalg.qr(torch.randn(32, 32)).Q[:, :24]
    inside = basis @ basis.T
    target.model.embed_tokens.weight.data @= inside
    for layer in target.model.layers:
        layer.self_attn.o_proj.weight.data[:, 16:] = 0  # the second key and value head with its two heads
        layer.mlp.down_proj.weight.data[:, 48:] = 0
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            module.weight.data = inside @ module.weight.data
    found = make(
        target, tokenizer, responses, hidden_size=24, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1
    )
    assert not found.draft.config.tie_word_embeddings
    assert type(found.draft) is type(target)
    assert found.draft.config.hidden_size == 24 and found.draft.config.head_dim == 8
    assert (read_logits(found.draft) - read_logits(target)).abs().max() < 1e-4


def test_a_tied_narrow_draft_keeps_the_scales_of_the_last_norm_as_far_as_it_can(tokenizer, responses):
    target = build_llama(layers=2)  # its scales are all one, which a rotation leaves alone
    basis = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0))).Q[:, :24]
    target.model.embed_tokens.weight.data @= basis @ basis.T
    for layer in target.model.layers:
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            module.weight.data = basis @ basis.T @ module.weight.data
    found = make(target, tokenizer, responses, hidden_size=24, tie_word_embeddings=True)
    assert found.draft.get_output_embeddings().weight is found.draft.get_input_embeddings().weight
    assert (read_logits(found.draft) - read_logits(target)).abs().max() < 1e-4


def test_principal_directions_hold_most_of_the_square():
    torch.manual_seed(0)
    states = [torch.randn(50, 6).double() * torch.tensor([9.0, 1.0, 5.0, 0.1, 3.0, 0.2]).double()]
    found = find_principal_directions(states, 3)
    assert torch.allclose(found.T @ found, torch.eye(3).double(), atol=1e-9)
    values = torch.linalg.eigvalsh(states[0].T @ states[0])
    assert torch.allclose((states[0] @ found).square().sum(), values[-3:].sum())


def test_layers_and_heads_are_chosen_in_their_order():
    assert choose_layers(torch.tensor([0.1, 0.9, 0.2, 0.8]), 2) == [1, 3]
    weights = torch.tensor([1.0, 2.0, 3.0, 9.0, 0.0, 0.0])  # key and value head 0 serves heads 0 to 2
    shared, heads = choose_heads(weights, num_shared=2, kept_shared=1, kept_heads=2)
    assert (shared.tolist(), heads.tolist()) == ([1], [3, 4])
    shared, heads = choose_heads(weights, num_shared=2, kept_shared=2, kept_heads=4)
    assert (shared.tolist(), heads.tolist()) == ([0, 1], [1, 2, 3, 4])


def test_fresh_layers_on_projected_embeddings(tokenizer, responses):
    target = build_llama(layers=3, tie=False)
    found, again, other = (
        make(target, tokenizer, responses, fresh_layers=True, num_hidden_layers=2, hidden_size=16, seed=seed)
        for seed in (0, 0, 1)
    )
    config = found.draft.config
    assert (config.model_type, config.num_hidden_layers, config.hidden_size, found.layers) == ("llama", 2, 16, [])
    assert (config.num_attention_heads, config.intermediate_size) == (1, 64)
    assert torch.equal(read_logits(found.draft), read_logits(again.draft))
    assert not torch.equal(
        found.draft.model.layers[0].mlp.up_proj.weight, other.draft.model.layers[0].mlp.up_proj.weight
    )
    kept = found.draft.model.embed_tokens.weight.double()
    assert torch.equal(kept, other.draft.model.embed_tokens.weight.double())
    assert kept.square().sum() > 0.4 * target.model.embed_tokens.weight.double().square().sum()


def test_fresh_layers_of_the_donors_width_need_no_sample(tokenizer):
    target = build_llama(layers=3)
    found = make(target, tokenizer, fresh_layers=True, num_hidden_layers=1, num_attention_heads=4)
    assert torch.equal(found.draft.model.embed_tokens.weight, target.model.embed_tokens.weight)
    assert found.alpha is None


def test_the_draft_has_the_targets_tokenizer_length_ids_and_rows(tokenizer, responses, tmp_path):
    target = build_llama(layers=2, vocab_size=264)
    target.config.max_position_embeddings = 300
    target.config.eos_token_id = 1
    found = make(target, tokenizer, responses, num_hidden_layers=1, hidden_size=16)
    found.save_pretrained(tmp_path / "draft")
    draft = AutoModelForCausalLM.from_pretrained(tmp_path / "draft")
    assert draft.config.vocab_size == 264 and draft.get_output_embeddings().weight.shape == (264, 16)
    assert draft.config.max_position_embeddings == 300
    assert draft.generation_config.eos_token_id == 1 and not draft.generation_config.do_sample
    saved = AutoTokenizer.from_pretrained(tmp_path / "draft")
    assert saved.get_vocab() == tokenizer.get_vocab() and saved.chat_template == tokenizer.chat_template
    assert torch.allclose(read_logits(draft), read_logits(found.draft))


def test_alpha_of_sampled_responses_reads_the_target(tokenizer, responses):
    target = build_llama(layers=2)
    assert make(target, tokenizer, responses, temperature=1.0).alpha == pytest.approx(1.0, abs=1e-6)
    assert make(target, tokenizer, responses, temperature=1.0, num_hidden_layers=1).alpha < 0.99


# Another tokenizer ----------------------------------------------------------------------------------------------------


def build_other_tokenizer():
    """Bytes in another order, with the pair "ab" as a token and another name for EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    vocab = {token: number for number, token in enumerate(["<eos>", *alphabet, "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def test_each_id_is_matched_by_its_bytes_its_pieces_or_its_role(tokenizer):
    other = build_other_tokenizer()
    matched = match_tokens(donor=tokenizer, target=other)
    assert matched[other.convert_tokens_to_ids("a")] == [tokenizer.convert_tokens_to_ids("a")]
    assert matched[other.convert_tokens_to_ids("ab")] == tokenizer.convert_tokens_to_ids(["a", "b"])
    assert matched[other.eos_token_id] == [tokenizer.eos_token_id]
    assert len(matched) == len(other)
    assert read_token_bytes(other)[other.convert_tokens_to_ids("ab")] == b"ab"


def test_sentencepiece_tokens_are_matched_by_their_bytes(tokenizer):
    vocab = {"<unk>": 0, "<0x0A>": 1, "\u2581": 2, "\u2581a": 3, "b": 4}
    pieces = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(
            models.BPE(vocab=vocab, merges=[("\u2581", "a")] if "a" in vocab else [], unk_token="<unk>")
        ),
        unk_token="<unk>",
    )
    assert read_token_bytes(pieces) == {0: b"<unk>", 1: b"\n", 2: b" ", 3: b" a", 4: b"b"}
    matched = match_tokens(donor=tokenizer, target=pieces)
    assert matched[1] == [tokenizer("\n", add_special_tokens=False)["input_ids"][0]]
    assert matched[3] == tokenizer(" a", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("tie", [True, False])
def test_a_donor_with_another_tokenizer_reads_the_targets_ids(tokenizer, tie):
    """The target has the donor's bytes under other ids: after the transplant it reads the same text the same way."""
    other, donor = build_other_tokenizer(), build_llama(layers=2, tie=tie)
    target = build_llama(layers=2, vocab_size=258, seed=1)
    found = init_draft(
        target, processing_class=other, donor=donor, donor_processing_class=tokenizer, show_progress=False
    )
    assert found.matched_ids == pytest.approx(257 / 258)
    assert found.draft.config.vocab_size == 258
    text = "hello, world"
    theirs, ours = (one(text, add_special_tokens=False)["input_ids"] for one in (tokenizer, other))
    with torch.no_grad():
        expected = donor(torch.tensor([theirs])).logits[0, -1]
        logits = found.draft(torch.tensor([ours])).logits[0, -1]
    for letter in "abcxyz ":
        assert logits[other.convert_tokens_to_ids(letter.replace(" ", "Ġ"))] == pytest.approx(
            float(expected[tokenizer.convert_tokens_to_ids(letter.replace(" ", "Ġ"))]), abs=1e-5
        )
    embedding = found.draft.get_input_embeddings().weight
    pieces = donor.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(["a", "b"])].mean(0)
    assert torch.allclose(embedding[other.convert_tokens_to_ids("ab")], pieces, atol=1e-6)


def test_a_donor_with_another_tokenizer_is_cut_on_the_text_of_the_samples(tokenizer):
    other, donor = build_other_tokenizer(), build_llama(layers=3)
    target = build_llama(layers=2, vocab_size=258, seed=1)
    rows = [{"prompt_ids": list(range(40, 60)), "completion_ids": list(range(60, 70))}] * 3
    found = init_draft(
        target, processing_class=other, donor=donor, donor_processing_class=tokenizer, responses=rows,
        num_hidden_layers=2, hidden_size=16, show_progress=False,
    )  # fmt: skip
    assert found.draft.config.hidden_size == 16 and len(found.layers) == 2 and found.alpha is not None


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_hidden_layers": 2}, "Sample text decides"),
        ({"hidden_size": 16}, "Sample text decides"),
        ({"num_hidden_layers": 9}, "has 3 layers, and 9 are asked for"),
        ({"layers": [0, 7]}, r"has 3 layers, and \[0, 7\] are asked for"),
        ({"layers": [1, 0]}, "must rise"),
        ({"layers": [0], "num_hidden_layers": 1}, "Leave them out"),
        ({"hidden_size": 64}, r"cannot grow: hidden_size=64 \(donor: 32\)"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "no multiple"),
        ({"num_key_value_heads": 1}, "at most 2 times"),
        ({"fresh_layers": True, "hidden_size": 48}, "larger than the donor's 32"),
        ({"fresh_layers": True, "num_attention_heads": 5}, "does not split into 5 heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ],
)
def test_a_shape_that_cannot_be_made_is_refused(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        make(build_llama(layers=3), tokenizer, **options)


def test_widths_of_another_family_are_refused(tokenizer, responses):
    target = GemmaForCausalLM(GemmaConfig(**SHAPE, **HEADS, head_dim=8))
    with pytest.raises(ValueError, match="'gemma' donor cannot be cut"):
        make(target, tokenizer, responses, hidden_size=16)
    assert make(target, tokenizer, responses, num_hidden_layers=1).draft.config.num_hidden_layers == 1


@pytest.mark.parametrize("options", [{"layers": [0]}, {"hidden_size": 16}, {"fresh_layers": True}], ids=str)
def test_a_head_of_its_own_cannot_be_tied(tokenizer, responses, options):
    with pytest.raises(ValueError, match="matrix of its own, which would be lost"):
        make(build_llama(layers=2, tie=False), tokenizer, responses, tie_word_embeddings=True, **options)


def test_a_donor_without_a_norm_before_its_head_is_refused(tokenizer):
    target = GPT2LMHeadModel(GPT2Config(vocab_size=261, n_embd=32, n_layer=2, n_head=4))
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no `norm`"):
        make(target, tokenizer, fresh_layers=True, num_attention_heads=4)


def test_the_cost_of_a_step_is_known_where_costs_are(tokenizer):
    target = build_llama(layers=2).requires_grad_(False)
    costs = ServingCosts(cost_ratio=0.03, round_cost={2: 1.3})
    found = make(target, tokenizer, layers=[0], costs=costs)
    assert found.cost_ratio == 0.03 and "a step costs 0.030 of the target's" in found.summary
    assert make(target, tokenizer, layers=[0]).cost_ratio is None
    assert make(target, tokenizer, layers=[0], costs=ServingCosts(round_cost={2: 1.3})).cost_ratio is None
    assert all(weight.requires_grad for weight in found.draft.parameters())  # of a frozen target
    assert not any(weight.requires_grad for weight in target.parameters())


def test_a_shared_matrix_can_be_split(tokenizer):
    target = build_llama(layers=2)
    found = make(target, tokenizer, layers=[0], tie_word_embeddings=False)
    assert found.draft.get_output_embeddings().weight is not found.draft.get_input_embeddings().weight
    assert found.num_parameters == make(target, tokenizer, layers=[0]).num_parameters + 261 * 32
