"""One name for one thing: names that were retired occur nowhere in code, YAML, help or docs.

`docs/glossary.md` says what each remaining name means. What lies on disk may carry an old name: samples of old files
and the table that converts them are left out.
"""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OF_DISK = ("OLD_KEYS = ", "STORED_NAMES = ")  # lines that read what was written under an old name
SUFFIXES = {".py", ".md", ".yaml", ".yml", ".toml", ".cfg", ".html", ".sh"}
LEFT_OUT = (
    "tests/test_names.py",
    "CHANGELOG.md",
    "benchmarks/results/",
    "spec_kd/cli/old_names.yaml",  # what `spec-kd convert` replaces
    "tests/cli/test_convert.py",
    "tests/cli/old_formats/",
    "tests/data/old_formats/",
    "tests/prompts/old/",
)

IDENTIFIERS = {
    "AcceptanceFigures": "AcceptanceMetrics",
    "AssistedFigures": "AssistedMetrics",
    "AnswerReader": "CompletionReader",
    "BatchAnswers": "BatchOutputs",
    "CachedSignal": "StoredTargets",
    "CachedTeacher": "StoredTeacher",
    "GrowingLayer": "GrowingCacheLayer",
    "MalformedAnswerError": "MalformedResponseError",
    "SLOT_COLUMN": "SPARSE_COLUMN",
    "SLOT_TENSORS": "SPARSE_TENSORS",
    "SignalRequest": "SignalSpec",
    "SlotRecorder": "SparseRecorder",
    "SparseTargets": "SparseTensors",
    "SpeculativeText": "SpeculativeCompletion",
    "TeacherSignal": "LiveTargets",
    "TextInProgress": "CompletionInProgress",
    "TextRows": "ResponseRows",
    "TextScores": "ResponseScores",
    "TokenSlots": "SparseDistribution",
    "UnansweredPromptsError": "MissingCompletionsError",
    "UnmappedTokensError": "UnidentifiedTokensError",
    "answer_column": "completion_column",
    "assume_target_wrote": "assume_target_completions",
    "cached_teacher": "stored_teacher",
    "collect_figures": "collect_metrics",
    "find_written_text": "find_rendered_completion",
    "keep_answers": "keep_completions",
    "keeps_text": "keep_text",
    "logprobs_are": "logprobs_mode",
    "max_answer_tokens": "max_completion_tokens",
    "measures_entropy": "measure_entropy",
    "on_unmapped": "on_unidentified_token",
    "pack_slots": "pack_sparse",
    "prompts_ids": "prompt_ids",
    "score_texts": "score_responses",
    "shows_prompt_text": "show_prompt_text",
    "tabulate_figures": "tabulate_metrics",
    "taking_turns": "interleaved_training",
    "tool_catalogue": "tool_catalog",
    "unpack_slots": "unpack_sparse",
}
MODULES = {
    "spec_kd.queries": "spec_kd.prompts",
    "spec_kd.data.prompts": "spec_kd.data.prompt_rendering",
    "spec_kd.data.unmapped": "spec_kd.data.outcomes",
    "spec_kd.data.written_text": "spec_kd.data.rendered_completion",
    "spec_kd.decoding.growing_layer": "spec_kd.decoding.ragged_model",
    "spec_kd.decoding.inputs": "spec_kd.sampling.prompts",
    "spec_kd.decoding.warpers": "spec_kd.sampling.generation",
    "spec_kd.engines.slots": "spec_kd.engines.transformers",
    "spec_kd.evaluation.clock": "spec_kd.evaluation.cost",
    "spec_kd.evaluation.figures": "spec_kd.evaluation.metrics",
    "spec_kd.evaluation.replay": "spec_kd.evaluation.response_replay",
    "spec_kd.evaluation.report.words": "spec_kd.evaluation.report.rendering",
    "spec_kd.trainer.cached_teacher": "spec_kd.trainer.teachers.stored",
    "spec_kd.trainer.on_policy": "spec_kd.trainer.online",
    "spec_kd.trainer.streaming": "spec_kd.trainer.online",
}
VALUES = {  # a pattern, and what replaced it
    r"method: white-box": "method: white_box",
    r"method: black-box": "method: black_box",
    r"method: online-gkd": "method: online_gkd",
    r"train (white-box|black-box|online-gkd)": "train white_box, train black_box, train online_gkd",
    r"^queries:": "prompts:",
    r"spec-kd queries": "spec-kd prompts",
    r"evaluate_draft\([^)]*\bengine=": "serving_engine=",
}
SPELLINGS = {
    r"\bdata sets?\b": "dataset",
    r"\boptimis\w*": "optimize",
    r"\w*tokenis\w*": "tokenize",
    r"\bnormalis\w*": "normalize",
    r"\binitialis\w*": "initialize",
    r"\bspecialis\w*": "specialize",
    r"\bquantis\w*": "quantize",
    r"\bbehaviour\w*": "behavior",
    r"\bcolour\w*": "color",
    r"\bcatalogue\w*": "catalog",
    r"\bmade anew\b": "created again",
    r"\bwhat there is no word on\b": "`None` if unknown",
}


def list_files():
    """Tracked text files of the project, those with old names on purpose left out."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )
    if names == [""]:  # a copy without its history
        names = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if not {".venv", ".git"} & set(path.parts)]
    return [
        ROOT / name for name in names
        if Path(name).suffix in SUFFIXES and not any(part in name for part in LEFT_OUT) and (ROOT / name).is_file()
    ]  # fmt: skip


@pytest.fixture(scope="module")
def lines():
    return [
        (f"{path.relative_to(ROOT)}:{number}", line)
        for path in list_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if not line.startswith(OF_DISK)
    ]


def find(lines, patterns, flags=0):
    """Lines with one of the patterns, and what to write instead."""
    whole = re.compile("|".join(f"(?:{pattern})" for pattern in patterns), flags)
    found = []
    for where, line in lines:
        if whole.search(line):
            new = next(new for pattern, new in patterns.items() if re.search(pattern, line, flags))
            found.append(f"{where}: {line.strip()[:80]} -> {new}")
    return found


def test_retired_identifiers_are_gone(lines):
    assert find(lines, {rf"\b{old}\b": new for old, new in IDENTIFIERS.items()}) == []


def test_retired_modules_are_gone(lines):
    assert find(lines, {rf"\b{re.escape(old)}\b": new for old, new in MODULES.items()}) == []
    for old, new in MODULES.items():
        assert not (ROOT / f"{old.replace('.', '/')}.py").exists(), old
        assert (ROOT / f"{new.replace('.', '/')}.py").exists() or (ROOT / new.replace(".", "/")).is_dir(), new


def test_retired_values_are_gone(lines):
    assert find(lines, VALUES) == []


def test_spelling_is_american(lines):
    assert find(lines, SPELLINGS, re.IGNORECASE) == []


def test_the_search_finds_what_it_looks_for():
    lines = [("a.py:1", "x = TokenSlots()"), ("b.md:2", "a data set"), ("c.yaml:3", "queries:")]
    assert find(lines, {rf"\b{old}\b": new for old, new in IDENTIFIERS.items()})[0].endswith("-> SparseDistribution")
    assert find(lines, SPELLINGS, re.IGNORECASE)[0].startswith("b.md:2") and find(lines, VALUES)[0].startswith(
        "c.yaml:3"
    )


def test_every_public_name_is_in_the_api_reference():
    import spec_kd

    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    assert [name for name in spec_kd.__all__ if not re.search(rf"spec_kd\.{name}\b", text)] == []
