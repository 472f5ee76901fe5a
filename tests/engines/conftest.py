import copy

import pytest
import torch
from local_server import TEXTS, LocalServer, build_engine, generate_alone
from tiny import build_llama, build_tokenizer


@pytest.fixture(scope="module")
def writer():
    """A target that writes ASCII and an EOS now and then, so that every token has a text of its own."""
    model = build_llama(seed=2, hidden_size=48, tie=False)
    texts = build_tokenizer().batch_decode([[id] for id in range(261)])
    ascii_ids = [id for id, text in enumerate(texts) if id > 4 and text.isascii()]
    others = sorted(set(range(261)) - {1, *ascii_ids})
    with torch.no_grad():
        model.lm_head.weight[others] = model.lm_head.weight[ascii_ids].mean(0)
        model.lm_head.weight[1] *= 4
    return model


@pytest.fixture(scope="module")
def prompts():
    return build_tokenizer()(TEXTS)["input_ids"]


@pytest.fixture
def serve(writer, tokenizer):
    """Servers by dialect and traits, each with its engine; closed at the end."""
    servers = []

    def start(dialect="vllm", model=writer, engine_options=(), **traits):
        server = LocalServer(model, tokenizer, dialect, **traits).__enter__()
        servers.append(server)
        return server, build_engine(server, **dict(engine_options))

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def half_writer(writer, prompts, tokenizer):
    """A target that writes half a character to some prompts, and which these are."""
    model = copy.deepcopy(writer)
    half = tokenizer("é")["input_ids"][0]
    first = generate_alone(writer, prompts[2])[0]
    with torch.no_grad():  # half a character where there was a whole one
        model.lm_head.weight[half] = model.lm_head.weight[first] * 1.01
    return model, [half in generate_alone(model, prompt) for prompt in prompts]
