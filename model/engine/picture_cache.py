"""Remembers pictures that were looked at: their features and the key/value states of the prompt up to them.

Several questions about one picture then share its vision pass and, since every prompt starts with the same words and
the picture, that part of the prompt; questions about different pictures share the words in front of it. Least recently
used pictures leave first; the bound is in bytes.
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

import torch

from pixellm.model.backbone import ImageFeatures
from pixellm.model.engine.kv_cache import LayerStates
from pixellm.model.images import PreparedImage


@dataclass(frozen=True)
class PromptPrefix:
    """Key/value states of the first positions of a prompt.

    Attributes:
        ids: the ids of those positions; a prompt that starts otherwise cannot use them.
        states: per layer, keys and values [heads, length, width].
    """

    ids: tuple[int, ...]
    states: list[LayerStates]

    def fits(self, prompt_ids: list[int]) -> bool:
        """Whether a prompt starts with these positions and goes on behind them."""
        length = len(self.ids)
        return length < len(prompt_ids) and tuple(prompt_ids[:length]) == self.ids

    @property
    def num_bytes(self) -> int:
        """Memory of the states."""
        return sum(_num_bytes(keys) + _num_bytes(values) for keys, values in self.states)


@dataclass
class _Entry:
    features: ImageFeatures
    prefix: PromptPrefix | None = None

    @property
    def num_bytes(self) -> int:
        tensors = (self.features.image_tokens, self.features.token_valid, self.features.scales)
        return sum(map(_num_bytes, tensors)) + (self.prefix.num_bytes if self.prefix else 0)


class PictureCache:
    """Least-recently-used features and prompt prefixes by picture digest. Used by the step loop alone."""

    def __init__(self, max_bytes: int) -> None:
        """Takes the bound; 0 remembers nothing."""
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_hits = 0
        self.num_misses = 0
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._words: PromptPrefix | None = None

    def __len__(self) -> int:
        """Pictures held."""
        return len(self._entries)

    def features(self, digest: bytes) -> ImageFeatures | None:
        """Looks a picture up and counts the hit or miss."""
        entry = self._entries.get(digest)
        if entry is None:
            self.num_misses += 1
            return None
        self.num_hits += 1
        self._entries.move_to_end(digest)
        return entry.features

    def prefix(self, digest: bytes, prompt_ids: list[int]) -> PromptPrefix | None:
        """The longest remembered prefix that a prompt starts with and goes on behind: picture included, or words."""
        entry = self._entries.get(digest)
        for prefix in (entry.prefix if entry else None, self._words):
            if prefix is not None and prefix.fits(prompt_ids):
                return prefix
        return None

    def add_words(self, prefix: PromptPrefix) -> None:
        """Remembers the words that every prompt starts with: one short prefix, outside the bound."""
        self._words = prefix

    @property
    def wants_words(self) -> bool:
        """Whether the words in front of pictures are not remembered yet."""
        return self._words is None

    def add_features(self, digest: bytes, features: ImageFeatures) -> None:
        """Remembers a picture's features (of one picture), unless they alone exceed the bound."""
        self._put(digest, _Entry(features))

    def add_prefix(self, digest: bytes, prefix: PromptPrefix) -> None:
        """Remembers a prefix beside the features, where both fit into the bound."""
        entry = self._entries.get(digest)
        if entry is None or entry.prefix is not None or entry.num_bytes + prefix.num_bytes > self.max_bytes:
            return
        self._put(digest, _Entry(entry.features, prefix))

    def wants_prefix(self, digest: bytes) -> bool:
        """Whether the picture is held without a prefix."""
        entry = self._entries.get(digest)
        return entry is not None and entry.prefix is None

    def _put(self, digest: bytes, entry: _Entry) -> None:
        old = self._entries.pop(digest, None)
        self.num_bytes -= old.num_bytes if old else 0
        if entry.num_bytes > self.max_bytes:
            return
        self._entries[digest] = entry
        self.num_bytes += entry.num_bytes
        while self.num_bytes > self.max_bytes:
            _, evicted = self._entries.popitem(last=False)
            self.num_bytes -= evicted.num_bytes


def picture_digest(picture: PreparedImage) -> bytes:
    """A digest of what the network sees of a picture; the original size counts only where it changes that."""
    digest = hashlib.blake2b(picture.pixels.tobytes(), digest_size=16)
    digest.update(repr(picture.valid_hw).encode())
    return digest.digest()


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
