"""The small models of a run: a generic target, its specialized version and a generic draft, built once and cached.

    tokenizer -> generic target (general data) -> domain target (domain data, some general)
              -> generic draft  (general data only, until its held-out loss is flat)

Each stage is written to a temporary folder and renamed when it is complete, so a killed build resumes at the stage it
was in. The cache key covers the recipe, the data and the code of the training, so nothing stale is ever loaded.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .language_model_training import Budget, EncodedRow, encode_rows, train_language_model

logger = get_logger(__name__)

SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Words with their space, single digits, and runs of punctuation (`": {"` is one piece: half the ids of a JSON schema).
PIECES = r" ?\p{L}+|\d|[^\p{L}\d]*[^\p{L}\d\s]|\s+"
SOURCES = ("models.py", "language_model_training.py")

GENERAL_TARGET = Budget(max_steps=800, tokens_per_step=512, learning_rate=1.5e-3, eval_steps=200)
DOMAIN_TARGET = Budget(max_steps=1000, tokens_per_step=512, learning_rate=1.5e-3, eval_steps=200)
GENERAL_DRAFT = Budget(max_steps=4000, until_flat=True, tokens_per_step=512, learning_rate=2e-3, eval_steps=150)


@dataclass(frozen=True)
class ModelSize:
    """Shape of a Llama with tied embeddings."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int


@dataclass(frozen=True)
class BuildRecipe:
    """Everything that decides what is built, besides the data.

    Args:
        vocab_size (`int`): Ids of the tokenizer.
        max_length (`int`): Longest training row in ids; longer ones are left out and counted in the log.
        target, draft (`ModelSize`): Shapes.
        general_target, domain_target, general_draft (`Budget`): How long each is trained.
        general_share (`float`): Share of general rows in the domain target's data, so that it does not forget them all.
        seed (`int`): Seed of initialization and data order.
    """

    vocab_size: int = 1536
    max_length: int = 448
    target: ModelSize = ModelSize(192, 512, 4, 6)
    draft: ModelSize = ModelSize(128, 352, 2, 4)
    general_target: Budget = GENERAL_TARGET
    domain_target: Budget = DOMAIN_TARGET
    general_draft: Budget = GENERAL_DRAFT
    general_share: float = 0.2
    seed: int = 0


@dataclass(frozen=True)
class Corpus:
    """Prompt-completion rows of the domain and of general data; the tests of both are never trained on."""

    domain_train: list[dict]
    domain_test: list[dict]
    general_train: list[dict]
    general_test: list[dict]


@dataclass(frozen=True)
class BuiltModels:
    """Folders (model and tokenizer) of a build, and how each was trained.

    Args:
        generic_target, domain_target, generic_draft (`str`): Loadable with `from_pretrained`.
        records (`dict[str, dict]`): What `train_language_model` returned for each of the three.
    """

    generic_target: str
    domain_target: str
    generic_draft: str
    records: dict[str, dict]

    @cached_property
    def draft_curve(self) -> list[tuple[int, float]]:
        """Held-out loss (nats per completion token) of the generic draft over its steps."""
        return [(step, loss) for step, loss, _ in self.records["generic_draft"]["curve"]]


def find_cache_dir() -> Path:
    """`SPEC_KD_CACHE`, or `~/.cache/spec_kd`."""
    return Path(os.environ.get("SPEC_KD_CACHE") or Path.home() / ".cache" / "spec_kd")


def hash_build(recipe: BuildRecipe, corpus: Corpus) -> str:
    """The cache key: recipe, data and code."""
    digest = hashlib.sha256(json.dumps([asdict(recipe), asdict(corpus)], sort_keys=True).encode())
    for name in SOURCES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()[:16]


def build_tokenizer(rows: list[dict], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with single digits and a chat template, trained on all messages of `rows`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (message["content"] for row in rows for message in row["prompt"] + row["completion"])
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL_TOKENS[0],
        eos_token=SPECIAL_TOKENS[1],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_llama(size: ModelSize, tokenizer: PreTrainedTokenizerFast, max_length: int, seed: int) -> LlamaForCausalLM:
    """A float32 Llama with fresh weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        **asdict(size),
        num_key_value_heads=size.num_attention_heads,
        # Room for a completion after the longest prompt.
        max_position_embeddings=2 * max_length,
        # The usual 0.02 is for wide models; at this width copying from the prompt is learned far later with it.
        initializer_range=0.06,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def build_stage(folder: Path, build: Callable[[Path], None]) -> Path:
    """Lets `build` fill a temporary folder and renames it to `folder`, unless `folder` is there."""
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        build(partial)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():  # another process was faster: its result is as good
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def build_models(recipe: BuildRecipe, corpus: Corpus, cache_dir: Path | None = None) -> BuiltModels:
    """Builds the three models, or loads what earlier calls built.

    Args:
        recipe (`BuildRecipe`): Sizes and budgets.
        corpus (`Corpus`): Data.
        cache_dir (`Path`, *optional*): Defaults to `find_cache_dir()`.

    Returns:
        `BuiltModels`: Folders and training records. With several processes one builds and the others wait.
    """
    root = (cache_dir or find_cache_dir()) / hash_build(recipe, corpus)
    with PartialState().main_process_first():
        tokenizer_dir = build_stage(root / "tokenizer", lambda folder: save_tokenizer(recipe, corpus, folder))
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
        encoded: dict[str, list[EncodedRow]] = {}

        def encode(name: str) -> list[EncodedRow]:
            if name not in encoded:
                encoded[name], dropped = encode_rows(tokenizer, getattr(corpus, name), recipe.max_length)
                if not encoded[name]:
                    raise ValueError(f"All rows of `{name}` are longer than max_length={recipe.max_length} ids.")
                if dropped:
                    logger.info(f"{name}: {dropped} rows over {recipe.max_length} ids are left out of the training.")
            return encoded[name]

        def train(folder: Path, model: LlamaForCausalLM, rows: list, held_out: str, budget: Budget, text: str) -> None:
            record = train_language_model(
                model,
                rows,
                encode(held_out),
                budget,
                seed=recipe.seed,
                description=f"building: {text}",
                checkpoint=root / f".{text.replace(' ', '_')}.pt",
            )
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            (folder / "training.json").write_text(json.dumps(record, indent=1), encoding="utf-8")

        def train_generic_target(folder: Path) -> None:
            model = build_llama(recipe.target, tokenizer, recipe.max_length, recipe.seed)
            train(folder, model, encode("general_train"), "general_test", recipe.general_target, "generic target")

        def train_domain_target(folder: Path) -> None:
            model = AutoModelForCausalLM.from_pretrained(root / "generic_target", dtype=torch.float32)
            domain = encode("domain_train")
            share = recipe.general_share
            general = encode("general_train")[: int(len(domain) * share / (1 - share))]
            train(folder, model, domain + general, "domain_test", recipe.domain_target, "domain target")

        def train_generic_draft(folder: Path) -> None:
            model = build_llama(recipe.draft, tokenizer, recipe.max_length, recipe.seed + 1)
            train(folder, model, encode("general_train"), "general_test", recipe.general_draft, "generic draft")

        stages = {
            "generic_target": train_generic_target,
            "domain_target": train_domain_target,
            "generic_draft": train_generic_draft,
        }
        folders = {name: build_stage(root / name, build) for name, build in stages.items()}
    records = {name: json.loads((path / "training.json").read_text("utf-8")) for name, path in folders.items()}
    if recipe.general_draft.until_flat and not records["generic_draft"]["is_flat"]:
        logger.warning(
            f"The generic draft's held-out loss was still falling after {recipe.general_draft.max_steps} steps: a part "
            "of any gain in acceptance may be plain training. Raise its budget."
        )
    return BuiltModels(**{name: str(path) for name, path in folders.items()}, records=records)


def save_tokenizer(recipe: BuildRecipe, corpus: Corpus, folder: Path) -> None:
    """Trains the tokenizer on the training rows of both corpora."""
    build_tokenizer(corpus.domain_train + corpus.general_train, recipe.vocab_size).save_pretrained(folder)
