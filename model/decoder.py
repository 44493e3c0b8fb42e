"""The pixel decoder D (paper Sec. 3.1, eq. 1): fused codebook embeddings + multi-scale features → mask logits.

Scales are decoded from the deepest up. Scale 0 reads the g×g feature map; every later one a map upsampled to 2g×2g and
multiplied by `σ(m) + 1` of the mask before it. The result is `Σ γ_ℓ m_ℓ` with `Σ γ = 1`. Layer for layer after SAM's
mask decoder.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from pixellm.model.attention import TwoWayTransformer

NUM_MASK_TOKENS = 4
"""SAM's mask tokens. Mask 0 is used; the others take part in attention only."""


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of `[M, C, H, W]`, eps 1e-6."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises each pixel's channels."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class FeatureNeck(nn.Sequential):
    """Conv1×1, LayerNorm, Conv3×3, LayerNorm: projected vision features `[I, C_in, g, g]` → `[I, C, g, g]`."""

    def __init__(self, in_size: int, size: int) -> None:
        super().__init__(
            nn.Conv2d(in_size, size, 1, bias=False),
            ChannelLayerNorm(size),
            nn.Conv2d(size, size, 3, padding=1, bias=False),
            ChannelLayerNorm(size),
        )


class FourierPositions(nn.Module):
    """SAM's random Fourier positions: a fixed random matrix, kept in the checkpoint and never re-drawn."""

    matrix: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.empty(2, size // 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the matrix from N(0, 1)."""
        init.normal_(self.matrix)

    def forward(self, grid: int) -> Tensor:
        """Encodes the cell centres of a `grid × grid` map; returns `[grid², C]` (x before y, sines before cosines)."""
        centres = (torch.arange(grid, device=self.matrix.device, dtype=torch.float32) + 0.5) / grid
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        angles = 2 * math.pi * ((2 * torch.stack([x, y], dim=-1) - 1) @ self.matrix.float())
        return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(0, 1).to(self.matrix.dtype)


class MLP(nn.Module):
    """Three linear layers with ReLU between."""

    def __init__(self, in_size: int, hidden_size: int, out_size: int) -> None:
        super().__init__()
        sizes = [in_size, hidden_size, hidden_size, out_size]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[…, in_size]` to `[…, out_size]`."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class ScaleFusion(nn.Module):
    """γ: softmax of learned values, so that Σγ = 1; starts as the released constant 1/L."""

    def __init__(self, num_scales: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(num_scales))

    def reset_parameters(self) -> None:
        """Equal weights."""
        init.zeros_(self.values)

    def forward(self) -> Tensor:
        """The weights, `[G]` fp32, summing to 1."""
        return self.values.float().softmax(0)


class EqualScaleFusion(nn.Module):
    """The released constant γ = 1/L, without parameters."""

    def __init__(self, num_scales: int) -> None:
        super().__init__()
        self.num_scales = num_scales

    def forward(self) -> Tensor:
        """The weights, `[G]` fp32, all 1/L."""
        return torch.full((self.num_scales,), 1.0 / self.num_scales)


@dataclass
class DecodedMasks:
    """What the decoder makes of M targets.

    Attributes:
        mask_logits: `[M, h, h]` fp32, `Σ γ_ℓ m_ℓ` at the finest scale's resolution.
        level_logits: one `[M, h_ℓ, h_ℓ]` per scale, deepest first.
        iou_logits: one `[M]` per scale: SAM's quality head, which no loss trains.
    """

    mask_logits: Tensor
    level_logits: list[Tensor]
    iou_logits: list[Tensor]


class PixelDecoder(nn.Module):
    """L two-way transformers in sequence, from the deepest scale to the finest."""

    def __init__(
        self,
        size: int,
        num_heads: int,
        mlp_size: int,
        depth: int,
        num_scales: int,
        fusion: str,
        iou_size: int | None = None,
    ) -> None:
        super().__init__()
        self.transformer = nn.ModuleList(TwoWayTransformer(size, num_heads, mlp_size, depth) for _ in range(num_scales))
        self.iou_token = nn.Embedding(1, size)
        self.mask_tokens = nn.Embedding(NUM_MASK_TOKENS, size)
        self.level_embed = nn.Embedding(num_scales, size)
        self.no_mask_embed = nn.Embedding(1, size)
        self.coarse_positions = FourierPositions(size)
        if num_scales > 1:
            self.fine_positions = FourierPositions(size)
            self.upsample_2x = nn.Sequential(nn.ConvTranspose2d(size, size, 2, 2), ChannelLayerNorm(size), nn.GELU())
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(size, size // 8, 2, 2), ChannelLayerNorm(size // 8), nn.GELU()
        )
        self.mask_head = MLP(size, size, size // 8)
        self.iou_head = MLP(size, iou_size or size, NUM_MASK_TOKENS)
        self.iou_head.requires_grad_(False)
        self.scale_fusion = ScaleFusion(num_scales) if fusion == "learned" else EqualScaleFusion(num_scales)

    def forward(self, embeds_MGC: Tensor, scales_IGCHW: Tensor, image_index_M: Tensor) -> DecodedMasks:
        """Decodes all targets in one batch.

        Args:
            embeds_MGC: `[M, G, C]` fused codebook embeddings, deepest scale first.
            scales_IGCHW: `[I, G, C, g, g]` neck features of each picture.
            image_index_M: `[M]` long, the picture of each target.

        Returns:
            Mask logits at `2g` (one scale) or `4g`.
        """
        level_logits: list[Tensor] = []
        iou_logits: list[Tensor] = []
        for level in range(len(self.transformer)):
            image_MCHW, positions = self._source(scales_IGCHW[:, level], image_index_M, level_logits)
            logits, iou = self._decode_level(level, embeds_MGC[:, level], image_MCHW, positions)
            level_logits.append(logits)
            iou_logits.append(iou)
        return DecodedMasks(self._fuse(level_logits), level_logits, iou_logits)

    def _source(self, features: Tensor, image_index: Tensor, previous: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Each target's image map `[M, C, h, h]` (eq. 1) and its positions `[h², C]`."""
        dense = _rows(self.no_mask_embed)[:, :, None, None]
        if not previous:
            return (features + dense)[image_index], self.coarse_positions(features.shape[-1])
        upsampled = self.upsample_2x(features)
        grid = upsampled.shape[-1]
        guide = _resize(previous[-1][:, None].float(), grid).to(features.dtype)
        return upsampled[image_index] * (guide.sigmoid() + 1) + dense, self.fine_positions(grid)

    def _decode_level(
        self, level: int, embeds_MC: Tensor, image_MCHW: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        grid = image_MCHW.shape[-1]
        fixed = torch.cat([_rows(self.iou_token), _rows(self.mask_tokens)])
        tokens = torch.cat([fixed.expand(len(embeds_MC), -1, -1), embeds_MC[:, None].to(fixed.dtype)], dim=1)
        tokens = tokens + _rows(self.level_embed)[level]
        positions = positions.to(image_MCHW.dtype)  # computed in fp32
        tokens, image_MPC = self.transformer[level](tokens, image_MCHW.flatten(2).transpose(1, 2), positions)
        upscaled = self.output_upscaling(image_MPC.transpose(1, 2).unflatten(2, (grid, grid)))
        logits = torch.einsum("mc,mchw->mhw", self.mask_head(tokens[:, 1]), upscaled)
        return logits, self.iou_head(tokens[:, 0])[:, 0]

    def _fuse(self, level_logits: list[Tensor]) -> Tensor:
        side = level_logits[-1].shape[-1]
        weights = self.scale_fusion()
        maps = [_resize(logits[:, None].float(), side)[:, 0] for logits in level_logits]
        return sum((weights[i] * maps[i] for i in range(len(maps))), start=torch.zeros_like(maps[0]))


def _rows(table: nn.Embedding) -> Tensor:
    """All rows, by calling the module: sharded training (ZeRO 3) gathers a weight only around its module's forward."""
    return table(torch.arange(table.num_embeddings, device=table.weight.device))


def _resize(maps: Tensor, side: int) -> Tensor:
    if maps.shape[-1] == side:
        return maps
    return F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)
