"""`serving.json`: written by an export, read back, and shown by the card."""

import dataclasses
import json

import pytest
from example_report import build_report
from fake_llama_cpp import write_tools
from tiny import build_llama

from spec_kd.files import compute_sum
from spec_kd.hub import CardFacts, GGUFError, ServingFile, export_draft
from spec_kd.parallel import ParallelDrafting, write_parallel_drafting
from spec_kd.serving import SERVING_ENGINES


@pytest.fixture
def target(tokenizer, tmp_path):
    """Folder of a target with the draft's 261 rows."""
    build_llama(seed=1).save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    return tmp_path / "target"


@pytest.fixture
def options(tokenizer, target):
    return {"processing_class": tokenizer, "target": target, "serving_engines": ["vllm", "llama.cpp"]}


def test_what_is_written_is_read_back(draft, options, tmp_path):
    report = dataclasses.replace(build_report(), serving_engine="vllm")
    folder = export_draft(draft, tmp_path / "my-draft", **options, num_assistant_tokens=4, report=report)
    serving = ServingFile.read(folder)
    assert (serving.draft, serving.target, serving.num_assistant_tokens) == ("my-draft", "target", 4)
    assert serving.quantization is None and list(serving.engines) == ["vllm", "llama.cpp"]
    for name, served in serving.engines.items():
        engine = SERVING_ENGINES[name]
        assert served.source == engine.source and served.command == engine.write_command("my-draft", "target", 4)
        assert served.findings == [] and served.passed == [check.name for check in engine.checks]
    expected = serving.engines["vllm"].expected
    assert list(expected) == [setting.name for setting in report.draft.settings]
    for setting in report.draft.settings:
        rate = setting.at_gamma(4).acceptance_rate
        assert expected[setting.name]["acceptance_rate"] == {"value": rate.value, "low": rate.low, "high": rate.high}
        fewer = setting.at_gamma(4).without["looping"]
        assert expected[setting.name]["left_out"] == {"looping": 0.125}
        without = expected[setting.name]["without"]["looping"]
        assert without["block_efficiency"]["value"] == fewer.block_efficiency.value
        assert without["predicted_speedup"]["1"]["value"] == fewer.predicted_speedup["1"].value
    assert serving.engines["llama.cpp"].expected == {}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(serving.files)
    assert all(compute_sum(folder / name) == digest for name, digest in serving.files.items())
    assert str(tmp_path) not in (folder / "serving.json").read_text()
    serving.write(tmp_path)
    assert ServingFile.read(tmp_path) == serving
    assert (tmp_path / "serving.json").read_bytes() == (folder / "serving.json").read_bytes()


def test_the_card_shows_what_is_expected(draft, options, tmp_path):
    report = dataclasses.replace(build_report(), serving_engine="vllm")
    folder = export_draft(draft, tmp_path / "draft", **options, num_assistant_tokens=4, report=report)
    card = (folder / "README.md").read_text()
    setting = report.draft.settings[0]
    assert "### Expected when served\n\nWith 4 drafted tokens a round:" in card
    assert f"| vllm | {setting.name} | {setting.at_gamma(4).acceptance_rate.value:.3f} [" in card
    fewer = setting.at_gamma(4).without["looping"].acceptance_rate.value
    assert f"| vllm | {setting.name}, without looping responses (12.5%) | {fewer:.3f} [" in card
    assert '"num_speculative_tokens": 4' in card and "found nothing against this draft in vllm, llama.cpp" in card
    facts = CardFacts.read(card)
    assert facts.target_name == "target" and list(facts.expected) == ["vllm"]
    # the next form of the draft was not measured
    draft.model.embed_tokens.weight.data += 1
    export_draft(draft, folder, processing_class=options["processing_class"])
    assert "Expected when served" not in (folder / "README.md").read_text() and not (folder / "serving.json").exists()


def test_checks_that_failed_are_told_apart(draft, options, tmp_path):
    folder = export_draft(
        draft, tmp_path / "draft", **options, target_vocab_size=288, refuse_findings=False
    )  # vLLM refuses 288 rows beside 261
    vllm = ServingFile.read(folder).engines["vllm"]
    assert [found["check"] for found in vllm.findings] == ["unequal_rows"] and "288" in vllm.findings[0]["what"]
    assert "unequal_rows" not in vllm.passed and "adapter_draft" in vllm.passed


def test_gguf_files_of_both_models(draft, options, tmp_path):
    tools, folder = write_tools(tmp_path / "llama.cpp"), tmp_path / "draft"
    export_draft(draft, folder, **options, llama_cpp_dir=tools, quantization="Q8_0")
    serving = ServingFile.read(folder)
    names = ["gguf/draft-Q8_0.gguf", "gguf/target-Q8_0.gguf"]
    assert serving.quantization == "Q8_0" and [name for name in serving.files if name.endswith(".gguf")] == names
    assert all(compute_sum(folder / name) == serving.files[name] for name in names)
    command = serving.engines["llama.cpp"].command
    assert command.startswith(f"llama-server -m {names[1]} -md {names[0]} --spec-type draft-simple")
    assert "GGUF files: `gguf/draft-Q8_0.gguf`, `gguf/target-Q8_0.gguf`." in (folder / "README.md").read_text()
    # the target's is there already; the draft is another one
    draft.model.embed_tokens.weight.data += 1
    before = {name: (folder / name).stat().st_mtime_ns for name in names}
    export_draft(draft, folder, **options, llama_cpp_dir=tools, quantization="Q8_0")
    changed = [name for name in names if (folder / name).stat().st_mtime_ns != before[name]]
    assert changed == [names[0]]
    write_tools(tools, "raise SystemExit(1)")
    draft.model.embed_tokens.weight.data += 1
    with pytest.raises(GGUFError, match="status 1"):
        export_draft(draft, folder, **options, llama_cpp_dir=tools, quantization="Q8_0")
    assert not (folder / "serving.json").exists() and (folder / "model.safetensors").exists()


def test_what_does_not_fit_is_refused_before_anything_is_written(draft, options, tmp_path):
    folder, report = tmp_path / "draft", dataclasses.replace(build_report(), serving_engine="sglang")
    with pytest.raises(ValueError, match="The report is for 'sglang', which is not among `serving_engines`"):
        export_draft(draft, folder, **options, report=report)
    report = dataclasses.replace(report, serving_engine="vllm")
    with pytest.raises(ValueError, match=r"no metrics with 99 drafted tokens.*`gammas=\[99\]`"):
        export_draft(draft, folder, **options, report=report, num_assistant_tokens=99)
    with pytest.raises(ValueError, match=r"has no convert_hf_to_gguf\.py"):
        export_draft(draft, folder, **options, llama_cpp_dir=tmp_path)
    with pytest.raises(ValueError, match="Add it to `serving_engines`"):
        export_draft(draft, folder, **{**options, "serving_engines": ["vllm"]}, llama_cpp_dir=tmp_path)
    with pytest.raises(ValueError, match="`llama_cpp_dir` needs `merge_adapter=True`"):
        export_draft(draft, folder, **options, llama_cpp_dir=tmp_path, merge_adapter=False)
    with pytest.raises(ValueError, match="`num_assistant_tokens` is 0"):
        export_draft(draft, folder, **options, num_assistant_tokens=0)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda values: values.update(format=2), r"has format 2, but this version reads 1\. Update spec_kd"),
        (lambda values: values.pop("format"), r"is damaged \(it has no 'format'\)\. Export the draft again"),
        (lambda values: values.pop("draft"), "is damaged .*Export the draft again"),
        (lambda values: values["engines"].update(vllm={"source": ""}), "is damaged .*Export the draft again"),
        (lambda values: values.update(engines=[]), "is damaged .*Export the draft again"),
    ],
)
def test_a_file_of_another_form_is_refused(draft, options, tmp_path, change, expected):
    path = export_draft(draft, tmp_path / "draft", **options) / "serving.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=expected):
        ServingFile.read(path.parent)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        ServingFile.read(path.parent)


def test_a_parallel_draft_has_its_commands(draft, options, tmp_path):
    write_parallel_drafting(draft.config, ParallelDrafting(260, 4))
    with pytest.raises(ValueError, match=r"llama.cpp drafts one by one: The draft drafts 4 tokens in one pass"):
        export_draft(draft, tmp_path / "draft", **options, num_assistant_tokens=4)
    options["serving_engines"] = ["vllm", "tensorrt-llm"]
    folder = export_draft(draft, tmp_path / "draft", **options, num_assistant_tokens=4)
    config = json.loads((folder / "config.json").read_text())
    assert (config["pard_token"], config["num_parallel_tokens"]) == (260, 4)
    commands = {name: served.command for name, served in ServingFile.read(folder).engines.items()}
    assert '"parallel_drafting": true' in commands["vllm"] and "PARDDecodingConfig" in commands["tensorrt-llm"]
    card = (folder / "README.md").read_text()
    assert "parallel_drafting" in card and "PARDDecodingConfig" in card
    assert "llama-server" not in card and "assistant_model" not in card


def test_commands_end_drafts_early_where_the_engine_can(draft, options, tmp_path):
    serving = ServingFile.read(export_draft(draft, tmp_path / "early", **options, assistant_confidence_threshold=0.5))
    assert serving.assistant_confidence_threshold == 0.5
    assert serving.engines["llama.cpp"].command.endswith("--spec-draft-p-min 0.5")
    assert "0.5" not in serving.engines["vllm"].command
    with pytest.raises(ValueError, match="no engine of `serving_engines` ends drafts early"):
        export_draft(
            draft, tmp_path / "no", **options | {"serving_engines": ["vllm"]}, assistant_confidence_threshold=0.5
        )
    assert not (tmp_path / "no").exists()
