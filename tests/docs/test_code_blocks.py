"""Every code block of the README and the docs runs: Python on tiny models, commands and recipes through their parsers.

A block after `<!-- not run: REASON -->` is only compiled.
"""

import gzip
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
from datasets import load_dataset
from tiny import build_llama

from spec_kd import generate_responses
from spec_kd.cli.main import parse_command
from spec_kd.cli.recipe import load_recipe
from spec_kd.evaluation.report.sections import SECTIONS
from spec_kd.losses import DIVERGENCES, SPARSE_METHODS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^\n]+) -->\s*)?^```(?P<language>python|bash|yaml)\n(?P<code>.*?)^```", re.M | re.S
)

# What makes the blocks small: real names become tiny models and files, and big numbers small ones.
REPLACEMENTS = {
    '"my-org/target"': 'folder + "/target"',
    '"my-org/draft"': 'folder + "/draft"',
    'load_dataset("my-org/my-prompts")': 'load_dataset(folder + "/my-prompts")',
    '"qiaojin/PubMedQA", config_name="pqa_labeled", prompt_column="question"': (
        'folder + "/questions.jsonl", prompt_column="question"'
    ),
    "temperature=1.0,": "temperature=1.0, max_new_tokens=6,",
    'serving_engine="vllm"': 'serving_engine="vllm", max_new_tokens=6, gammas=(5,), costs=None',
    'mode="streaming"': 'mode="streaming", max_new_tokens=6',
    "num_assistant_tokens=5)]": "num_assistant_tokens=5, max_new_tokens=6)]",
    '"written": written.dataset': '"written": curated',  # a tiny target writes nothing that the filters keep
    "20_000": "4",
    "max_steps=10_000": "max_steps=1, per_device_train_batch_size=2",
    "update_interval=64": "update_interval=2",
    "num_train_epochs=6": "max_steps=1",
    "range(100": "range(2",
    "152_064": "261",
    "batch_sizes=(1, 8)": "batch_sizes=(1,)",
    "num_hidden_layers=4": "num_hidden_layers=1",
    "hidden_size=192": "hidden_size=16",
    "intermediate_size=512": "intermediate_size=32",
    "num_attention_heads=3": "num_attention_heads=2",
    '"128x2", "192x4"': '"16x1", "16x2"',
}


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    code: str
    is_run: bool


def find_blocks(language: str) -> list[Block]:
    blocks = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            if match["language"] == language:
                line = text.count("\n", 0, match.start("code")) + 1
                blocks.append(Block(page, line, language, match["code"], match["reason"] is None))
    return blocks


def name_block(value) -> str:
    return f"{value.page.relative_to(ROOT)}:{value.line}" if isinstance(value, Block) else str(value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> str:
    """Tiny models, prompts and logs under the names that the pages use."""
    folder = tmp_path_factory.mktemp("docs")
    for name, seed in (("target", 1), ("draft", 0), ("domain-draft", 2)):
        build_llama(seed=seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    questions = [f"What is {word}?" for word in ("a cell", "an atom", "a leaf", "a wing", "a bone", "an eye")]
    (folder / "questions.jsonl").write_text("".join(f'{{"question": "{text}"}}\n' for text in questions))
    (folder / "my-prompts").mkdir()
    for split in ("train", "test"):
        rows = "".join(f'{{"prompt": [{{"role": "user", "content": "{text} {split}"}}]}}\n' for text in questions)
        (folder / "my-prompts" / f"{split}.jsonl").write_text(rows)
    (folder / "logs").mkdir()
    for i, text in enumerate(questions):
        row = f'{{"messages": [{{"role": "user", "content": "{text} {text[::-1]}"}}]}}\n'
        (folder / "logs" / f"2026-{i}.jsonl.gz").write_bytes(gzip.compress(row.encode()))
    return str(folder)


def shrink(code: str) -> str:
    for name, replacement in REPLACEMENTS.items():
        code = code.replace(name, replacement)
    return code


@pytest.fixture
def registered():
    """A page may register a divergence, a sparse method or a report section; other tests do not see it."""
    registries = (DIVERGENCES, SPARSE_METHODS)
    before, sections = [dict(registry) for registry in registries], list(SECTIONS)
    yield
    SECTIONS[:] = sections
    for registry, known in zip(registries, before, strict=True):
        registry.clear()
        registry.update(known)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.page == page for b in find_blocks("python"))], ids=str
)
def test_python_blocks_run(page, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("logs", "domain-draft"):
        Path(name).symlink_to(Path(folder, name))
    prompts = load_dataset(folder + "/my-prompts")
    responses = generate_responses(
        folder + "/target", prompts["train"], temperature=1.0, max_new_tokens=6, teacher_signal="sampled_logprobs"
    )
    # What a page uses without making it
    namespace = {"folder": folder, "prompts": prompts, "responses": responses, "requests": prompts["train"]}
    for block in find_blocks("python"):
        if block.page != page:
            continue
        code = compile("\n" * (block.line - 1) + shrink(block.code), str(page), "exec")
        if block.is_run:
            exec(code, namespace)


@pytest.mark.parametrize("block", find_blocks("yaml"), ids=name_block)
def test_recipes_are_valid(block, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(block.code)
    assert load_recipe(path).output_dir


@pytest.mark.parametrize("block", find_blocks("bash"), ids=name_block)
def test_commands_are_parsed(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("costs").mkdir()
    Path("costs/costs.json").write_text('{"cost_ratio": 0.1, "verify_cost": {"5": 1.1}}')  # is read with the options
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["spec-kd"]:
            assert parse_command(words[1:])


def test_every_replacement_is_still_of_use():
    text = "".join(block.code for block in find_blocks("python"))
    assert [name for name in REPLACEMENTS if name not in text] == []
