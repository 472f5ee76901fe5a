"""`spec-kd export`: a draft as servers load it, with `serving.json` and GGUF files."""

from dataclasses import replace

from example_report import build_report
from fake_llama_cpp import write_tools

from spec_kd.evaluation import save_report
from spec_kd.hub import ServingFile


def test_a_draft_for_two_engines(call, models, tmp_path):
    save_report(replace(build_report(), serving_engine="vllm"), tmp_path / "report")
    files = ("--draft", models / "draft", "--target", models / "target", "--output_dir", tmp_path / "out")
    engines = ("--serving_engines", "vllm", "llama.cpp", "--report", tmp_path / "report/report.json")
    gguf = ("--llama_cpp_dir", write_tools(tmp_path / "llama.cpp"), "--quantization", "Q4_0")
    status, _, said = call("export", *files, *engines, *gguf)
    assert status == 2 and "The draft has 261 vocabulary rows" in said and not list((tmp_path / "out").iterdir())
    status, result, said = call("export", *files, *engines, *gguf, "--target_vocab_size", 288)
    assert status == 0 and f"export: the draft is in {tmp_path / 'out'}" in said
    serving = ServingFile.read(tmp_path / "out")
    assert result["commands"] == {name: served.command for name, served in serving.engines.items()}
    assert result["findings"] == [] and "gguf/target-Q4_0.gguf" in result["files"]
    assert list(serving.engines["vllm"].expected)


def test_a_draft_for_no_engine(call, models, tmp_path):
    status, result, _ = call("export", "--draft", models / "draft", "--output_dir", tmp_path / "out")
    assert status == 0 and result["output_dir"] == str(tmp_path / "out") and "commands" not in result
    assert (tmp_path / "out/model.safetensors").exists() and not (tmp_path / "out/serving.json").exists()


def test_wrong_input(call, models, tmp_path):
    files = ("--draft", models / "draft", "--output_dir", tmp_path / "out")
    status, _, said = call("export", *files, "--report", tmp_path / "report.json")
    assert status == 2 and "needs `target` and `serving_engines`" in said
    status, _, said = call("export", *files, "--target", tmp_path / "absent")
    assert status == 2 and "does not exist" in said
    assert not (tmp_path / "out").exists()
