"""Mask losses of a packed batch: on the padded canvas at any training resolution, or at each picture's own size.

The canvas path is the default: one resize and one pass over all targets. The original-resolution path repeats the
released losses (upsample to the canvas, crop the real pixels, resize to the picture) and needs a pass per picture,
because pictures differ in size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pixellm.errors import DataError
from pixellm.model.config import PixelLMConfig
from pixellm.model.images import logits_at_original_size
from pixellm.model.losses import dice_losses, mean_over_targets, refinement_losses, valid_pixels


@dataclass
class MaskTargets:
    """Ground truth of M targets.

    Attributes:
        masks: `[M, h, h]` on the canvas, or one `[M_i, H_i, W_i]` per picture.
        rows: `[M]` question of each target.
        images: `[M]` picture of each target.
        image_valid_hw: `[I, 2]` real rows and columns on the canvas.
        original_hw: `[I, 2]` picture sizes, for the second form.
    """

    masks: Tensor | list[Tensor]
    rows: Tensor
    images: Tensor
    image_valid_hw: Tensor
    original_hw: Tensor | None = None


def mask_losses(mask_logits: Tensor, targets: MaskTargets, config: PixelLMConfig) -> dict[str, Tensor]:
    """Weighted `ref` and `dice` losses.

    Args:
        mask_logits: `[M, h', h']` fp32 at decoder resolution.
        targets: their ground truth.
        config: weights, α and canvas size.

    Raises:
        DataError: the number of masks differs from the number of targets.
    """
    num_masks = sum(len(m) for m in targets.masks) if isinstance(targets.masks, list) else len(targets.masks)
    if num_masks != len(mask_logits):
        raise DataError(f"{num_masks} target masks for {len(mask_logits)} codebook groups; pass one mask per group")
    if isinstance(targets.masks, list):
        ref, dice = _original_size_losses(mask_logits, targets, config)
    else:
        ref, dice = _canvas_losses(mask_logits, targets.masks, targets, config)
    return {
        "ref": config.ref_loss_weight * mean_over_targets(ref),
        "dice": config.dice_loss_weight * mean_over_targets(dice),
    }


def _canvas_losses(
    mask_logits: Tensor, masks: Tensor, targets: MaskTargets, config: PixelLMConfig
) -> tuple[Tensor, Tensor]:
    if masks.shape[-1] != mask_logits.shape[-1] and len(mask_logits):
        mask_logits = F.interpolate(mask_logits[:, None], masks.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    elif not len(mask_logits):
        mask_logits = mask_logits.new_zeros(masks.shape)
    masks = masks.to(mask_logits.dtype)
    valid_hw = targets.image_valid_hw.to(masks.device)
    valid = valid_pixels(valid_hw, targets.images, config.image_size, masks.shape[-1])
    return (
        refinement_losses(mask_logits, masks, targets.rows, config.target_refinement_alpha, valid),
        dice_losses(mask_logits, masks, valid),
    )


def _original_size_losses(mask_logits: Tensor, targets: MaskTargets, config: PixelLMConfig) -> tuple[Tensor, Tensor]:
    if targets.original_hw is None:
        raise DataError("target masks at original size need original_hw: pass the pictures' sizes, [I, 2]")
    refs, dices = [mask_logits.new_zeros(0)], [mask_logits.new_zeros(0)]
    for image, masks in enumerate(targets.masks):
        mine = (targets.images == image).nonzero().flatten()
        if len(mine) != len(masks):
            raise DataError(f"picture {image} has {len(masks)} target masks and {len(mine)} codebook groups")
        if not len(mine):
            continue
        valid_hw, original_hw = _pair(targets.image_valid_hw[image]), _pair(targets.original_hw[image])
        logits = logits_at_original_size(mask_logits[mine], config.image_size, valid_hw, original_hw)
        masks = masks.to(logits)
        valid = torch.ones_like(masks, dtype=torch.bool)
        refs.append(refinement_losses(logits, masks, targets.rows[mine], config.target_refinement_alpha, valid))
        dices.append(dice_losses(logits, masks, valid))
    return torch.cat(refs), torch.cat(dices)


def _pair(size: Tensor) -> tuple[int, int]:
    rows, columns = size.tolist()
    return int(rows), int(columns)
