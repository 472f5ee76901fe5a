"""Which tokens a JSON schema or a grammar allows at each position of a completion; XGrammar knows, as in vLLM."""

import re
from collections.abc import Sequence
from types import ModuleType

import torch
from transformers import LogitsProcessor

from spec_kd.open_types import Argument
from spec_kd.sampling.response_format import GRAMMAR, ResponseFormat
from spec_kd.vocabulary import ProcessingClass, get_tokenizer

WORD_BITS = 32  # of XGrammar's masks
# Of GBNF: a text, a set of characters, a comment, and what stands between alternatives
GBNF_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*|::=|[|()]|[^\s"\[#|()]+')


class TokenMasks:
    """The ids that formats allow, for one tokenizer.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): The target's.
        vocab_size (`int`): Number of real ids.
        eos_ids (`Sequence[int]`): Ids that end a completion; they are allowed where the grammar can end.

    Raises:
        ImportError: XGrammar is missing.
    """

    def __init__(self, processing_class: ProcessingClass, vocab_size: int, eos_ids: Sequence[int]):
        self._xgrammar, self.vocab_size = _import_xgrammar(), vocab_size
        info = self._xgrammar.TokenizerInfo.from_huggingface(
            get_tokenizer(processing_class), vocab_size=vocab_size, stop_token_ids=list(eos_ids)
        )
        self._compiler = self._xgrammar.GrammarCompiler(info)
        self._compiled: dict[ResponseFormat, Argument] = {}

    def check(self, wanted: ResponseFormat, completion: Sequence[int], name: str) -> None:
        """Raises `ValueError` for a format that cannot be compiled, or the first token that it does not allow.

        Args:
            wanted (`ResponseFormat`): The format.
            completion (`Sequence[int]`): Ids that were written under it.
            name (`str`): Name of the row, for errors.
        """
        try:
            self._match(wanted)
        except RuntimeError as error:
            raise ValueError(f"The {wanted.kind} of {name} cannot be read by XGrammar: {error}") from error
        num_allowed = self.count_allowed(wanted, completion, [(0, completion)])[0]
        if num_allowed < len(completion):
            raise ValueError(
                f"Token {num_allowed} of the completion of {name} (id {completion[num_allowed]}) does not fit its "
                f"{wanted.kind}. The server held it to another one, such as one with other whitespace: pass the "
                "grammar that the server used."
            )

    def count_allowed(
        self, wanted: ResponseFormat, completion: Sequence[int], drafts: Sequence[tuple[int, Sequence[int]]]
    ) -> list[int]:
        """Number of tokens of each draft before the first one that is not allowed.

        Args:
            wanted (`ResponseFormat`): The format.
            completion (`Sequence[int]`): Ids that are allowed.
            drafts (`Sequence[tuple[int, Sequence[int]]]`): Drafts, each with the token of the completion at which it
                begins.
        """
        matcher, numbers, num_read = self._match(wanted), [0] * len(drafts), 0
        for number in sorted(range(len(drafts)), key=lambda number: drafts[number][0]):
            at, draft = drafts[number]
            self._accept(matcher, completion[num_read:at])
            num_read = at
            numbers[number] = self._accept(matcher, draft)
            matcher.rollback(numbers[number])
        return numbers

    def _accept(self, matcher: Argument, tokens: Sequence[int]) -> int:
        for number, token in enumerate(tokens):
            if matcher.is_terminated() or not matcher.accept_token(int(token)):
                return number
        return len(tokens)

    def build(self, wanted: ResponseFormat, written: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        """The mask at each of the `tokens` that follow `written`.

        Returns:
            `torch.Tensor`: int32 `(n, words)`, see [`unpack`]. All ids are allowed after the first refused token.
        """
        words = free_words(len(tokens), self.vocab_size)
        matcher = self._match(wanted)
        self._accept(matcher, written)
        for number, token in enumerate(tokens):
            if matcher.is_terminated():
                break
            matcher.fill_next_token_bitmask(words, number)
            if not matcher.accept_token(int(token)):
                break
        return words

    def _match(self, wanted: ResponseFormat) -> Argument:
        if wanted not in self._compiled:
            if wanted.kind == GRAMMAR:
                compiled = self._compiler.compile_grammar(fill_empty_alternatives(wanted.text))
            else:
                compiled = self._compiler.compile_json_schema(wanted.text)
            self._compiled[wanted] = compiled
        return self._xgrammar.GrammarMatcher(self._compiled[wanted])


class AllowedIdsOnly(LogitsProcessor):
    """Rules out the ids that the format of a row does not allow. It reads nothing but the ids, so drafts may be undone.

    Args:
        masks (`TokenMasks`): Masks for the tokenizer.
        wanted (`Sequence[ResponseFormat | None]`): Format of each row; `None` for free text.
        prompt_length (`int`): Number of ids before the completion, padding included.
    """

    def __init__(self, masks: TokenMasks, wanted: Sequence[ResponseFormat | None], prompt_length: int):
        self._masks, self._wanted, self._prompt_length = masks, wanted, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores `(B, V)` with -inf at the ids that are not allowed."""
        written = input_ids[:, self._prompt_length :].tolist()
        words = [
            free_words(1, self._masks.vocab_size) if wanted is None else self._masks.build(wanted, ids, (0,))
            for wanted, ids in zip(self._wanted, written, strict=True)
        ]
        is_refused = ~unpack(torch.cat(words), self._masks.vocab_size).to(scores.device)
        scores[:, : self._masks.vocab_size].masked_fill_(is_refused, -torch.inf)
        return scores


def free_words(num_tokens: int, vocab_size: int) -> torch.Tensor:
    """Masks that allow every id, int32 `(num_tokens, words)`."""
    return torch.full((num_tokens, -(-vocab_size // WORD_BITS)), -1, dtype=torch.int32)


def unpack(words: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Whether each id is allowed, bool `(n, vocab_size)`, from masks of one bit for each id, int32 `(n, words)`."""
    bits = torch.arange(WORD_BITS, dtype=torch.int32, device=words.device)
    return ((words[:, :, None] >> bits) & 1).flatten(1)[:, :vocab_size].bool()


def fill_empty_alternatives(grammar: str) -> str:
    """A grammar in GBNF with `""` for alternatives that llama.cpp lets be empty, and XGrammar does not."""
    parts, end, last = [], 0, ""
    for token in GBNF_TOKEN.finditer(grammar):
        if token[0].startswith("#"):
            continue
        if token[0] in ("|", ")") and last in ("::=", "(", "|"):
            parts += [grammar[end : token.start()], '"" ']
            end = token.start()
        last = token[0]
    return "".join([*parts, grammar[end:]])


def _import_xgrammar() -> ModuleType:
    """Imports XGrammar, which the extra `structured` installs."""
    try:
        import xgrammar
    except ImportError as error:
        raise ImportError(
            f"JSON schemas and grammars need the `xgrammar` package, which cannot be imported ({error}). Install it: "
            "pip install spec_kd[structured]"
        ) from error
    return xgrammar
