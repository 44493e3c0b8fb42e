"""Tokens that PixelLM adds to a language model's vocabulary, and words that can never become them.

Any Hugging Face tokenizer works: the shipped tiny one (`assets/tiny_tokenizer`, trained by
`assets/train_tiny_tokenizer.py`) or a real Llama tokenizer. Codebook tokens are `[SEG0] … [SEG{N·L−1}]` (`[SEG]` when
N·L = 1), added as ordinary tokens, then `<im_start>` and `<im_end>` as special ones (reference.md, "Vocabulary and
prompt"). Ids are always looked up by name, never assumed: assumed ids are how masks turn into noise with another
tokenizer.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixellm.errors import ConfigError, ModelLoadError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TINY_TOKENIZER_DIR = Path(__file__).parent / "assets" / "tiny_tokenizer"
IM_START = "<im_start>"
IM_END = "<im_end>"


@dataclass(frozen=True)
class CodebookTokenIds:
    """Vocabulary ids of the tokens that PixelLM adds.

    Attributes:
        codebook: the N·L ids of one group in order; the first N belong to scale 0, the deepest.
        im_start: id in front of the picture positions.
        im_end: id behind them.
        vocab_size: number of rows that the embedding needs.
    """

    codebook: tuple[int, ...]
    im_start: int
    im_end: int
    vocab_size: int


def codebook_token_names(tokens_per_scale: int, num_scales: int) -> list[str]:
    """Names of one group's tokens in order: `[SEG]` alone, or `[SEG0] … [SEG{N·L−1}]`."""
    count = tokens_per_scale * num_scales
    if tokens_per_scale < 1 or num_scales < 1:
        raise ConfigError(
            f"tokens_per_scale={tokens_per_scale} and num_scales={num_scales} must both be at least 1: "
            "the codebook needs one token per scale or more"
        )
    return ["[SEG]"] if count == 1 else [f"[SEG{i}]" for i in range(count)]


def load_tiny_tokenizer() -> "PreTrainedTokenizerBase":
    """Loads the shipped byte-level BPE tokenizer, without codebook tokens."""
    from transformers import PreTrainedTokenizerFast  # slow import

    return PreTrainedTokenizerFast.from_pretrained(TINY_TOKENIZER_DIR)


def add_codebook_tokens(
    tokenizer: "PreTrainedTokenizerBase", tokens_per_scale: int, num_scales: int
) -> CodebookTokenIds:
    """Adds the codebook and picture-marker tokens in place (those already there keep their ids).

    Args:
        tokenizer: any Hugging Face tokenizer; its pad token becomes its unk token, as released.
        tokens_per_scale: N, codebook tokens per scale.
        num_scales: L, scales of vision features.

    Returns:
        The ids, looked up by name.
    """
    from transformers import AddedToken  # slow import

    names = codebook_token_names(tokens_per_scale, num_scales)
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in names])
    tokenizer.add_tokens(
        [AddedToken(name, normalized=False, special=True) for name in (IM_START, IM_END)], special_tokens=True
    )
    if tokenizer.unk_token is not None:
        tokenizer.pad_token = tokenizer.unk_token
    return find_codebook_tokens(tokenizer, tokens_per_scale, num_scales)


def find_codebook_tokens(
    tokenizer: "PreTrainedTokenizerBase", tokens_per_scale: int, num_scales: int
) -> CodebookTokenIds:
    """Looks the added tokens up by name.

    Raises:
        ModelLoadError: the tokenizer lacks one of them.
    """
    names = [*codebook_token_names(tokens_per_scale, num_scales), IM_START, IM_END]
    vocab = tokenizer.get_vocab()
    missing = [name for name in names if name not in vocab]
    if missing:
        raise ModelLoadError(
            f"the tokenizer has no {', '.join(missing)}; a model with {tokens_per_scale} tokens per scale and "
            f"{num_scales} scales needs them: load the tokenizer saved with the model, or call add_codebook_tokens"
        )
    ids = [int(i) for i in tokenizer.convert_tokens_to_ids(names)]
    return CodebookTokenIds(tuple(ids[:-2]), ids[-2], ids[-1], len(tokenizer))


class PlainTextEncoder:
    """Encodes words as words: whatever the text, no control token comes out.

    It is the same tokenizer with its added tokens taken out, so `[SEG0]`, `</s>` or `<im_start>` typed by a user are
    spelled in pieces like any other text. A control id that the vocabulary's own merges could still build (some
    SentencePiece vocabularies hold `</s>` as a piece) is replaced by the ids of its characters.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Takes the added tokens out of a copy of `tokenizer`, which must be a fast (Rust-backed) one."""
        from tokenizers import Tokenizer  # slow import

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelLoadError(
                f"{type(tokenizer).__name__} has no fast tokenizer behind it; save it with a tokenizer.json"
            )
        state: dict[str, Any] = json.loads(backend.to_str())
        added = list(state["added_tokens"])
        state.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
        self._plain = Tokenizer.from_str(json.dumps(state))
        # unk is no control token: it is what a tokenizer without byte fallback makes of an unknown character.
        self._control = {int(t["id"]): str(t["content"]) for t in added if t["id"] != tokenizer.unk_token_id}

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids that `encode` never returns: every added token of the tokenizer but unk."""
        return frozenset(self._control)

    def encode(self, text: str) -> list[int]:
        """Encodes `text` without bos, eos or any control token.

        Args:
            text: any string. It is read as the start of a section: the tokenizer's own prefix space applies.

        Returns:
            Vocabulary ids; empty for an empty text.
        """
        if not text:
            return []
        ids: list[int] = []
        for token_id in self._plain.encode(text, add_special_tokens=False).ids:
            ids.extend(self._spell(token_id) if token_id in self._control else [token_id])
        return ids

    def _spell(self, control_id: int) -> list[int]:
        found = [self._plain.token_to_id(character) for character in self._control[control_id]]
        return [i for i in found if i is not None and i not in self._control]
