"""GGUF export with stand-ins for the tools of llama.cpp, and with the real ones in SPEC_KD_LLAMA_CPP if it is set."""

import json
import logging
import os

import pytest
from fake_llama_cpp import read_calls, write_tools
from tiny import build_llama
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from spec_kd.hub.gguf import GGUFError, export_gguf


@pytest.fixture
def model(tmp_path):
    """Folder of a model; its weights are read by nobody here."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps({"dtype": "bfloat16"}))
    (tmp_path / "model/model.safetensors").write_bytes(b"weights")
    return tmp_path / "model"


@pytest.fixture
def tools(tmp_path):
    return write_tools(tmp_path / "llama.cpp")


def test_a_whole_file_of_the_same_model_is_used_again(model, tools, tmp_path):
    output = tmp_path / "out/draft.gguf"
    assert export_gguf(model, output, llama_cpp_dir=tools) == output
    assert output.read_bytes() == b"GGUFf16"
    assert sorted(path.name for path in output.parent.iterdir()) == [".draft.gguf.json", "draft.gguf"]
    (model / "README.md").write_text("a card")
    (model / "serving.json").write_text("{}")
    export_gguf(model, output, llama_cpp_dir=tools)
    assert read_calls(tools) == ["f16"]
    output.write_bytes(b"GGU")  # cut off
    export_gguf(model, output, llama_cpp_dir=tools)
    assert output.read_bytes() == b"GGUFf16" and len(read_calls(tools)) == 2
    (model / "model.safetensors").write_bytes(b"others")
    export_gguf(model, output, llama_cpp_dir=tools)
    export_gguf(model, output, llama_cpp_dir=tools, quantization="f32")
    assert read_calls(tools) == ["f16", "f16", "f16", "f32"] and output.read_bytes() == b"GGUFf32"


@pytest.mark.parametrize(
    ("config", "full"), [({"dtype": "bfloat16"}, "bf16"), ({"torch_dtype": "float16"}, "f16"), ({}, "f32")]
)
def test_a_quantized_file_is_made_of_one_that_loses_nothing(model, tools, tmp_path, caplog, config, full):
    (model / "config.json").write_text(json.dumps(config))
    output = tmp_path / "out/draft-Q4_K_M.gguf"
    with caplog.at_level(logging.WARNING):
        export_gguf(model, output, llama_cpp_dir=tools, quantization="Q4_K_M")
    assert output.read_bytes() == f"GGUF{full}Q4_K_M".encode()
    assert "3 of 9 tensors of `draft-Q4_K_M.gguf` have rows that Q4_K_M does not fit" in caplog.text
    assert sorted(path.name for path in output.parent.iterdir()) == [".draft-Q4_K_M.gguf.json", output.name]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            "import sys; print('ERROR:hf-to-gguf:Model NewForCausalLM is not supported'); sys.exit(1)",
            r"py failed with status 1\. This llama\.cpp does not know the architecture NewForCausalLM: update it",
        ),
        ("raise NotImplementedError('BPE pre-tokenizer was not recognized')", "does not know the tokenizer: save the"),
        ("import absent_package", r"failed with status 1\. Its Python \(`.*`\) has no absent_package: install"),
        ("import os; print('reading'); os.kill(os.getpid(), 9)", r"was killed by SIGKILL, maybe for its memory\.\n"),
        ("print('done')", r"convert_hf_to_gguf\.py wrote no GGUF file\.\ndone$"),
        ("for n in range(99): print('line', n)\nraise SystemExit(2)", r"status 2\.\nline 91\n(line 9\d\n){6}line 98$"),
    ],
)
@pytest.mark.parametrize("quantization", ["f16", "Q8_0"])
def test_what_a_failed_tool_says(model, tools, tmp_path, script, expected, quantization):
    output = tmp_path / "out/draft.gguf"
    export_gguf(model, output, llama_cpp_dir=tools, quantization="f32")
    write_tools(tools, script)
    with pytest.raises(GGUFError, match=expected):
        export_gguf(model, output, llama_cpp_dir=tools, quantization=quantization)
    assert output.read_bytes() == b"GGUFf32", "an earlier file is as it was"
    assert sorted(path.name for path in output.parent.iterdir()) == [".draft.gguf.json", "draft.gguf"]
    write_tools(tools)
    export_gguf(model, output, llama_cpp_dir=tools, quantization=quantization)
    assert output.read_bytes() != b"GGUFf32"


def test_a_full_disk_is_named(model, tools, tmp_path):
    write_tools(tools, "print('OSError: [Errno 28] No space left on device'); raise SystemExit(1)")
    with pytest.raises(
        OSError, match=r"could not be written \(No space left on device\); an earlier file is as it was"
    ):
        export_gguf(model, tmp_path / "draft.gguf", llama_cpp_dir=tools)


def test_a_python_beside_the_converter_is_preferred(model, tools, tmp_path):
    python = tools / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nfor last; do :; done\nprintf GGUFown > "$last"\n')
    python.chmod(0o755)
    # the folder may be one of links, as a build folder is
    (tmp_path / "source").mkdir()
    os.replace(tools / "convert_hf_to_gguf.py", tmp_path / "source/convert_hf_to_gguf.py")
    (tools / "convert_hf_to_gguf.py").symlink_to(tmp_path / "source/convert_hf_to_gguf.py")
    assert export_gguf(model, tmp_path / "draft.gguf", llama_cpp_dir=tools).read_bytes() == b"GGUFown"


def test_what_cannot_be_exported_is_refused_before_work(model, tools, tmp_path):
    output, options = tmp_path / "out/draft.gguf", {"llama_cpp_dir": tools}
    with pytest.raises(ValueError, match="`quantization` is 'Q3', but must be one of f32, f16"):
        export_gguf(model, output, **options, quantization="Q3")
    with pytest.raises(ValueError, match=r"has no convert_hf_to_gguf\.py"):
        export_gguf(model, output, llama_cpp_dir=tmp_path)
    (tools / "build/bin/llama-quantize").unlink()
    with pytest.raises(ValueError, match=r"needs llama-quantize, .* Build it: `cmake"):
        export_gguf(model, output, **options, quantization="Q8_0")
    with pytest.raises(ValueError, match="neither a folder nor a name on the Hub"):
        export_gguf(tmp_path / "absent", output, **options)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        export_gguf(tools, output, **options)
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is a LoRA adapter\. Merge it first"):
        export_gguf(model, output, **options)
    assert not output.parent.exists() and not (tools / "calls.txt").exists()


def build_byte_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE tokenizer of bytes with a fallback, a kind that llama.cpp's converter knows without a list of names."""
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(
        models.BPE({text: number for number, text in enumerate(texts)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


REAL = os.environ.get("SPEC_KD_LLAMA_CPP")


@pytest.mark.skipif(REAL is None, reason="SPEC_KD_LLAMA_CPP names no folder of llama.cpp")
def test_the_tools_of_llama_cpp(tmp_path):
    gguf = pytest.importorskip("gguf")
    build_llama(seed=0, hidden_size=64, vocab_size=259).save_pretrained(tmp_path / "model")
    build_byte_tokenizer().save_pretrained(tmp_path / "model")
    for quantization in ("f16", "Q8_0", "Q4_0"):
        output = tmp_path / f"draft-{quantization}.gguf"
        export_gguf(tmp_path / "model", output, llama_cpp_dir=REAL, quantization=quantization)
        types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(output).tensors}
        assert types["blk.0.ffn_up.weight"] == quantization.upper()
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "architectures": ["NewForCausalLM"]}))
    with pytest.raises(GGUFError, match="does not know the architecture NewForCausalLM"):
        export_gguf(tmp_path / "model", tmp_path / "new.gguf", llama_cpp_dir=REAL)
