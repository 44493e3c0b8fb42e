"""Runs what the scheduler decided through the network: pictures, prompts, tokens and groups. Knows no policy.

Three shapes of forward: a chunk of one prompt; one token for every row at once; the remaining tokens of a group for the
rows that have just started one. Rows keep their own place in the cache, so a row's numbers do not depend on the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pixellm.errors import DataError
from pixellm.model.backbone import ImageFeatures, MultimodalBackbone
from pixellm.model.engine.kv_cache import SlotCache
from pixellm.model.engine.picture_cache import PictureCache, PromptPrefix
from pixellm.model.images import PreparedImage

_SHORTEST_COMPILED_LENGTH = 256


@dataclass
class Row:
    """A request's place in the cache.

    Attributes:
        prompt_ids: picture positions included.
        digest: of the picture.
        num_words: positions in front of the picture.
        num_picture: positions of the picture.
        features: of the picture, once it has been looked at.
        row: cache row.
        length: positions that are in the cache.
        last_hidden_D: state of the last position, which predicts the next token; None while the prompt runs.
        embeds_PD: the prompt's embeddings while it runs.
    """

    prompt_ids: list[int]
    digest: bytes
    num_words: int = 0
    num_picture: int = 0
    features: ImageFeatures | None = None
    row: int = -1
    length: int = 0
    last_hidden_D: torch.Tensor | None = None
    embeds_PD: torch.Tensor | None = None

    @property
    def prompt_left(self) -> int:
        """Prompt positions that are not in the cache yet."""
        return max(len(self.prompt_ids) - self.length, 0)


class Runner:
    """Executes forwards for rows. Used by the step loop alone."""

    def __init__(
        self,
        model: MultimodalBackbone,
        embed_tokens: Callable[[torch.Tensor], torch.Tensor],
        cache: SlotCache,
        pictures: PictureCache,
        *,
        mask_form: str,
        reuse_prefix: bool,
        compile_decode: bool = False,
    ) -> None:
        """Takes the network and the caches.

        Args:
            model: the network behind its seam.
            embed_tokens: ids [B, Q] → embeddings [B, Q, D].
            cache: one row per running request.
            pictures: remembered pictures.
            mask_form: attention masks as "bool" or "additive" [B, 1, Q, keys], or "keys" [B, keys] for kernels that
                take no other (groups then run row by row).
            reuse_prefix: remember key/value states of prompts up to the picture.
            compile_decode: compile the forward of one token per row.
        """
        self._model = model
        self._embed_tokens = embed_tokens
        self.cache = cache
        self.pictures = pictures
        self._mask_form = mask_form
        self._reuse_prefix = reuse_prefix
        self._is_compiled = compile_decode
        self._dtype = embed_tokens(torch.zeros((1, 1), dtype=torch.long, device=cache.device)).dtype
        self._forward_tokens = self._forward
        if compile_decode:
            cache.fix_capacity()
            mode = "reduce-overhead" if cache.device.type == "cuda" else "default"
            self._forward_tokens = torch.compile(self._forward, mode=mode, dynamic=False)

    def look_at(
        self, rows: Sequence[Row], pictures: Sequence[PreparedImage], pixels: Callable[..., torch.Tensor]
    ) -> None:
        """Fills in the rows' features: remembered ones, and one vision pass over all new pictures.

        Args:
            rows: that lack features.
            pictures: one per row.
            pixels: turns uint8 [I, S, S, 3] and [I, 2] valid sizes into the network's input.
        """
        new: dict[bytes, PreparedImage] = {}
        known: dict[bytes, ImageFeatures] = {}
        for row, picture in zip(rows, pictures, strict=True):
            if row.digest in known or row.digest in new:
                continue
            features = self.pictures.features(row.digest)
            if features is None:
                new[row.digest] = picture
            else:
                known[row.digest] = features
        if new:
            valid_hw = torch.tensor([picture.valid_hw for picture in new.values()], device=self.cache.device)
            stacked = torch.stack([torch.from_numpy(picture.pixels) for picture in new.values()])
            features = self._model.encode_images(pixels(stacked.to(self.cache.device), valid_hw), valid_hw)
            for place, digest in enumerate(new):
                known[digest] = _one_picture(features, place, len(new))
                self.pictures.add_features(digest, known[digest])
        for row in rows:
            row.features = known[row.digest]

    def admit(self, row: Row) -> None:
        """Gives a row its place in the cache and, where its picture's prompt prefix is remembered, its start."""
        if row.features is None:
            raise DataError("a row was admitted before its picture was looked at")
        row.row = self.cache.allocate()
        ids = torch.tensor([row.prompt_ids], device=self.cache.device)
        embeds, attendable = self._model.embed_inputs(ids, row.features, ids.new_zeros(1))
        row.embeds_PD = embeds[0]
        self.cache.mark_valid(row.row, attendable[0])
        prefix = self.pictures.prefix(row.digest, row.prompt_ids) if self._reuse_prefix else None
        if prefix is not None:
            self.cache.import_row(row.row, prefix.states)
            row.length = len(prefix.ids)

    def prefill(self, row: Row, count: int) -> None:
        """Runs the next `count` positions of a prompt, at most `row.prompt_left`."""
        assert row.embeds_PD is not None
        start, end = row.length, row.length + count
        self.cache.begin_row(row.row, start, count)
        keys_valid = self.cache.valid[row.row : row.row + 1, :end]
        positions = torch.arange(start, end, device=self.cache.device)[None]
        mask = self._mask() if self._mask_form == "additive" else keys_valid
        hidden = self._forward(row.embeds_PD[None, start:end], mask, positions)
        row.length = end
        if row.prompt_left == 0:
            row.last_hidden_D = hidden[0, -1]
            row.embeds_PD = None
        if self._reuse_prefix:
            self._remember_prefixes(row, start)

    def decode_tokens(self, rows: Sequence[Row], tokens: Sequence[int], others: Sequence[Row]) -> None:
        """Runs one token for each of some rows in one forward over a span of the cache, which is read without a copy.

        Args:
            rows: that advance.
            tokens: one per row.
            others: that hold a place in the cache but do not advance. Where they lie in the span, they run a filler at
                their own next position, which their next forward overwrites.
        """
        span = self.cache.num_rows if self._is_compiled else max(row.row for row in rows) + 1
        ids, positions = [0] * span, [0] * span
        for row in others:
            if row.row < span:
                positions[row.row] = row.length
        for row, token in zip(rows, tokens, strict=True):
            ids[row.row], positions[row.row] = token, row.length
        self.cache.ensure_capacity(max(positions) + 1)
        ids_BQ, positions_BQ = torch.tensor([ids, positions], device=self.cache.device)[..., None]
        self.cache.begin_span(positions_BQ[:, 0], self._attended(max(row.length for row in rows) + 1))
        hidden = self._forward_tokens(self._embed_tokens(ids_BQ), self._mask(), positions_BQ)
        if self._is_compiled:
            hidden = hidden.clone()  # a CUDA graph writes its next output to the same place
        for row in rows:
            row.length += 1
            row.last_hidden_D = hidden[row.row, 0]

    def decode_group(self, rows: Sequence[Row], group: Sequence[int]) -> list[torch.Tensor]:
        """Runs a whole group for each of some rows.

        Args:
            rows: that have just chosen a group's first token.
            group: its J ids.

        Returns:
            Per row [J, D]: the states that predict the group's tokens, the first from the row's last position.
        """
        if self._mask_form == "keys" and len(rows) > 1:
            return [states for row in rows for states in self.decode_group([row], group)]
        device, count = self.cache.device, len(group)
        starts = torch.tensor([row.length for row in rows], device=device)
        length = max(row.length for row in rows) + count
        self.cache.begin_rows(torch.tensor([row.row for row in rows], device=device), starts, count, length)
        ids = torch.tensor([list(group)], device=device).expand(len(rows), -1)
        positions = starts[:, None] + torch.arange(count, device=device)
        hidden = self._forward(self._embed_tokens(ids), self._mask(), positions)
        states = []
        for place, row in enumerate(rows):
            assert row.last_hidden_D is not None
            states.append(torch.cat([row.last_hidden_D[None], hidden[place, :-1]]))
            row.length += count
            row.last_hidden_D = hidden[place, -1]
        return states

    def release(self, row: Row) -> None:
        """Takes a row's place in the cache back."""
        if row.row >= 0:
            self.cache.release(row.row)
            row.row = -1

    def compact(self, rows: Sequence[Row]) -> None:
        """Moves high rows into free low ones, so that the span that every step runs is no longer than it must be."""
        taken = {row.row for row in rows}
        for row in sorted(rows, key=lambda r: -r.row):
            lowest = next((place for place in range(row.row) if place not in taken), None)
            if lowest is None:
                return
            taken.add(lowest)
            taken.remove(row.row)
            self.cache.move(row.row, lowest)
            row.row = lowest

    def logits(self, rows: Sequence[Row]) -> torch.Tensor:
        """Next-token logits [B, V] of rows that have run their last position."""
        return self._model.lm_logits(torch.stack([row.last_hidden_D for row in rows if row.last_hidden_D is not None]))

    def _remember_prefixes(self, row: Row, start: int) -> None:
        """Keeps the states of the words in front of the picture and of the picture, once they have just been run."""
        words, picture = row.num_words, row.num_words + row.num_picture
        if start < words <= row.length and self.pictures.wants_words:
            self.pictures.add_words(self._prefix(row, words))
        if start < picture <= row.length and row.num_picture and self.pictures.wants_prefix(row.digest):
            self.pictures.add_prefix(row.digest, self._prefix(row, picture))

    def _prefix(self, row: Row, length: int) -> PromptPrefix:
        return PromptPrefix(tuple(row.prompt_ids[:length]), self.cache.export_row(row.row, length))

    def _forward(self, embeds: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden, _ = self._model.language_forward(embeds, mask, positions, self.cache, use_cache=True)
        return hidden

    def _mask(self) -> torch.Tensor:
        allowed = self.cache.allowed_keys()
        if self._mask_form == "keys":
            return allowed[:, -1]
        if self._mask_form == "additive":
            zeros = torch.zeros_like(allowed, dtype=self._dtype)
            return zeros.masked_fill(~allowed, torch.finfo(self._dtype).min)[:, None]
        return allowed[:, None]

    def _attended(self, length: int) -> int:
        """Keys that a forward over the span reads: as many as needed, or a power of two where graphs are compiled."""
        if not self._is_compiled:
            return length
        return min(max(_SHORTEST_COMPILED_LENGTH, 1 << (length - 1).bit_length()), self.cache.capacity)


def _one_picture(features: ImageFeatures, place: int, count: int) -> ImageFeatures:
    """One picture's features, owning its memory so that the others can be forgotten."""
    if count == 1:
        return features
    picked = features.index(place)
    return ImageFeatures(picked.image_tokens.clone(), picked.token_valid.clone(), picked.scales.clone())
