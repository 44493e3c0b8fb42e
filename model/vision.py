"""The CLIP tower at another resolution than its own, with padding kept out of attention.

Only hidden states are used, never the pooled output, so layers above the deepest feature do not run. The position
table is resized by linear interpolation (paper Sec. 5.1); `"released"` repeats the released resize, which takes the
last row for CLS.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings


def resize_positions(table: Tensor, grid: int, mode: str) -> Tensor:
    """Resizes a CLIP position table to another grid, bilinearly in fp32.

    Args:
        table: `[1 + n², D]`, CLS first.
        grid: side of the wanted grid.
        mode: `"correct"`, or `"released"` (rows but the last are taken as the grid, the last as CLS, and put back so).

    Returns:
        `[1 + grid², D]` in the table's dtype. A table of the right size comes back unchanged.
    """
    side = round((table.shape[0] - 1) ** 0.5)
    if side == grid:
        return table
    cls_row, rows = (table[:1], table[1:]) if mode == "correct" else (table[-1:], table[:-1])
    maps = rows.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(maps, size=(grid, grid), mode="bilinear", align_corners=False)
    resized = resized.permute(0, 2, 3, 1).reshape(grid * grid, -1).to(table.dtype)
    return torch.cat([cls_row, resized] if mode == "correct" else [resized, cls_row])


def valid_patches(image_valid_hw: Tensor, grid: int, patch_size: int) -> Tensor:
    """Marks the patches that hold at least one row and column of real pixels.

    Args:
        image_valid_hw: `[I, 2]` long, rows and columns of real pixels; the rest of the canvas is padding.
        grid: patches per side.
        patch_size: pixels per patch side.

    Returns:
        `[I, grid, grid]` bool.
    """
    starts = torch.arange(grid, device=image_valid_hw.device) * patch_size
    rows = starts[None, :] < image_valid_hw[:, :1]
    columns = starts[None, :] < image_valid_hw[:, 1:]
    return rows[:, :, None] & columns[:, None, :]


class CanvasEmbeddings(CLIPVisionEmbeddings):
    """CLIP's patch, CLS and position embeddings for a canvas of any size.

    Every weight is used inside the forward of the module that owns it: sharded training (ZeRO 3) has it only there.
    """

    def forward(self, pixel_values: Tensor, position_resize: str) -> Tensor:
        """Embeds `[I, 3, S, S]` as `[I, 1 + g·g, D]`, positions resized as `position_resize` says."""
        patches = self.patch_embedding(pixel_values.to(self.class_embedding.dtype))
        grid = patches.shape[-1]
        rows = torch.arange(self.num_positions, device=patches.device)
        positions = resize_positions(self.position_embedding(rows), grid, position_resize)
        cls_token = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([cls_token, patches.flatten(2).transpose(1, 2)], dim=1) + positions


class VisionTower(CLIPVisionModel):
    """CLIP's vision transformer, returning hidden states of a padded canvas of any size."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__(config)
        self.embeddings = CanvasEmbeddings(config)
        self._init_weights(self.embeddings)

    def hidden_states(
        self, pixel_values: Tensor, patch_valid: Tensor, layers: list[int], position_resize: str
    ) -> list[Tensor]:
        """Runs the tower up to its deepest wanted layer.

        Args:
            pixel_values: `[I, 3, S, S]`, normalised, zero where padded.
            patch_valid: `[I, g, g]` bool; invalid patches are no attention keys (CLS always is).
            layers: hidden-state indices, 0 = embeddings.
            position_resize: `"correct"` or `"released"`.

        Returns:
            One `[I, g·g, D]` per wanted layer, without CLS.
        """
        hidden = self.pre_layrnorm(self.embeddings(pixel_values, position_resize))
        mask = _key_mask(patch_valid, hidden.dtype)
        kept = {0: hidden}
        for index, layer in enumerate(self.encoder.layers[: max(layers)]):
            hidden = layer(hidden, mask)
            if index + 1 in layers:
                kept[index + 1] = hidden
        return [kept[index][:, 1:] for index in layers]


def _key_mask(patch_valid: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask `[I, 1, 1 + P, 1 + P]`: 0 at CLS and real patches, the dtype's minimum at padding."""
    invalid = F.pad(~patch_valid.flatten(1), (1, 0), value=False)
    keys = torch.zeros(invalid.shape, dtype=dtype, device=invalid.device)
    keys = keys.masked_fill(invalid, torch.finfo(dtype).min)
    return keys[:, None, None, :].expand(-1, 1, invalid.shape[1], -1)


class Projector(nn.Module):
    """Maps vision features to another width: Linear, GELU, Linear, or a single Linear."""

    def __init__(self, in_size: int, hidden_size: int, out_size: int, kind: str) -> None:
        super().__init__()
        if kind == "linear":
            self.layers = nn.Sequential(nn.Linear(in_size, out_size))
        else:
            self.layers = nn.Sequential(nn.Linear(in_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, out_size))

    def forward(self, features: Tensor) -> Tensor:
        """Projects `[…, in_size]` to `[…, out_size]`."""
        return self.layers(features)


def pool_to_grid(features_IPD: Tensor, grid: int) -> Tensor:
    """Resizes a square map of patch features to `grid × grid`, bilinearly in fp32.

    Args:
        features_IPD: `[I, P, D]` with P a square number.
        grid: side of the wanted grid.

    Returns:
        `[I, grid², D]` in the input's dtype.
    """
    side = round(features_IPD.shape[1] ** 0.5)
    if side == grid:
        return features_IPD
    maps = features_IPD.float().transpose(1, 2).reshape(len(features_IPD), -1, side, side)
    resized = F.interpolate(maps, size=(grid, grid), mode="bilinear", align_corners=False)
    return resized.flatten(2).transpose(1, 2).to(features_IPD.dtype)


def pool_valid(patch_valid: Tensor, grid: int) -> Tensor:
    """Nearest resize of `[I, g, g]` bool to `[I, grid²]` bool: which image tokens the language model may attend to."""
    resized = F.interpolate(patch_valid[:, None].float(), size=(grid, grid), mode="nearest")
    return resized.flatten(1) > 0
