"""The seam under the codebook: all that the decoder, losses, engine and training know of a multimodal language model.

`PixelLMForConditionalGeneration` implements it with CLIP and Llama. A newer model that implements these methods can
take their place without a change above: it only has to turn pixels into image tokens and multi-scale maps, put the
tokens into a sequence, and give hidden states, logits and a cache.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass
class ImageFeatures:
    """What one vision pass gives, for I pictures.

    Attributes:
        image_tokens: `[I, T, D]` embeddings in the language model's space.
        token_valid: `[I, T]` bool, false where a token lies on padding.
        scales: `[I, G, C, g, g]` decoder features, deepest scale first.
    """

    image_tokens: Tensor
    token_valid: Tensor
    scales: Tensor

    def index(self, i: int | slice | Tensor) -> "ImageFeatures":
        """Picks pictures; an integer keeps the picture axis (length 1)."""
        picked = slice(i, i + 1) if isinstance(i, int) else i
        return ImageFeatures(self.image_tokens[picked], self.token_valid[picked], self.scales[picked])

    @staticmethod
    def cat(features: "list[ImageFeatures]") -> "ImageFeatures":
        """Joins along the picture axis."""
        return ImageFeatures(
            torch.cat([f.image_tokens for f in features]),
            torch.cat([f.token_valid for f in features]),
            torch.cat([f.scales for f in features]),
        )

    def __len__(self) -> int:
        return len(self.image_tokens)


@runtime_checkable
class MultimodalBackbone(Protocol):
    """A multimodal language model as the codebook sees it. Shapes: legend in `pixellm/model/__init__.py`."""

    def encode_images(self, pixel_values: Tensor, image_valid_hw: Tensor) -> ImageFeatures:
        """One vision pass over `[I, 3, S, S]` with `[I, 2]` real rows and columns."""
        ...

    def embed_inputs(
        self, input_ids: Tensor, features: ImageFeatures, image_index: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embeds `[B, L]` ids with pictures in place; returns `[B, L, D]` and which positions count, `[B, L]` bool."""
        ...

    def language_forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Any | None = None,
        use_cache: bool = False,
    ) -> tuple[Tensor, Any | None]:
        """Runs the language model; returns hidden states `[B, L, D]` after the final norm and the cache."""
        ...

    def lm_logits(self, hidden: Tensor) -> Tensor:
        """`[…, D]` hidden states → `[…, V]` logits."""
        ...

    def codebook_embeds(self, hidden_MJD: Tensor) -> Tensor:
        """`[M, J, D]` states at the positions that predict a group → `[M, G, C]`."""
        ...

    def decode_masks(self, embeds_MGC: Tensor, scales: Tensor, image_index_M: Tensor) -> Tensor:
        """`[M, G, C]` embeddings and `[I, G, C, g, g]` features → mask logits `[M, h, h]` fp32 on the padded canvas."""
        ...
