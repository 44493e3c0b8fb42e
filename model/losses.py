"""Training objectives (paper Sec. 3.2): text cross-entropy, target refinement loss with α, dice. No loop over pictures.

All targets of a batch are packed in one `[M, h, w]`; which of them belong to the same question is an index. Constants
(dice scale 1000, eps 1e-6, Σ_k/(K + 1e-8)) are the released ones.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

DICE_SCALE = 1000.0
DICE_EPS = 1e-6
COUNT_EPS = 1e-8


def overlap_pixels(mask_logits: Tensor, questions: Tensor) -> Tensor:
    """Marks pixels where two or more targets of the same question are predicted (logit > 0).

    Args:
        mask_logits: `[M, h, w]`.
        questions: `[M]` long, question of each target.

    Returns:
        `[M, h, w]` bool, the same for all targets of a question.
    """
    predicted = (mask_logits.detach() > 0).float()
    num_questions = int(questions.max()) + 1 if len(questions) else 0
    counts = predicted.new_zeros(num_questions, *predicted.shape[1:]).index_add(0, questions, predicted)
    return counts[questions] >= 2


def refinement_losses(mask_logits: Tensor, targets: Tensor, questions: Tensor, alpha: float, valid: Tensor) -> Tensor:
    """`L_ref` of each target: per-pixel BCE weighted with A ∈ {1, α}, averaged over valid pixels.

    Args:
        mask_logits: `[M, h, w]` fp32.
        targets: `[M, h, w]` float in 0..1.
        questions: `[M]` long; overlap counts only between targets of one question.
        alpha: weight where targets overlap; 1 gives plain BCE.
        valid: `[M, h, w]` bool, false at padding.

    Returns:
        `[M]`.
    """
    bce = F.binary_cross_entropy_with_logits(mask_logits, targets, reduction="none")
    if alpha != 1:
        bce = torch.where(overlap_pixels(mask_logits, questions), alpha * bce, bce)
    return (bce * valid).flatten(1).sum(1) / valid.flatten(1).sum(1).clamp(min=1)


def dice_losses(mask_logits: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """Dice loss of each target over its valid pixels; shapes as in `refinement_losses`. Returns `[M]`."""
    probabilities = (mask_logits.sigmoid() * valid).flatten(1)
    targets = (targets * valid).flatten(1)
    numerator = 2 * (probabilities / DICE_SCALE * targets).sum(1)
    denominator = (probabilities / DICE_SCALE).sum(1) + (targets / DICE_SCALE).sum(1)
    return 1 - (numerator + DICE_EPS) / (denominator + DICE_EPS)


def mean_over_targets(losses: Tensor) -> Tensor:
    """Σ_k / (K + 1e-8): 0 where there are no targets."""
    return losses.sum() / (len(losses) + COUNT_EPS)


def text_loss(logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
    """Next-token cross-entropy, averaged over the supervised positions of the batch.

    Args:
        logits_BLV: `[B, L, V]`.
        labels_BL: `[B, L]` long, −100 where not supervised; position t is predicted at t − 1.

    Returns:
        Scalar fp32; 0 where nothing is supervised.
    """
    labels = labels_BL[:, 1:].flatten()
    total = F.cross_entropy(logits_BLV[:, :-1].flatten(0, 1).float(), labels, ignore_index=-100, reduction="sum")
    return total / (labels != -100).sum().clamp(min=1)


def valid_pixels(image_valid_hw: Tensor, image_index_M: Tensor, image_size: int, side: int) -> Tensor:
    """Marks mask pixels whose centre lies on real pixels of the padded canvas.

    Args:
        image_valid_hw: `[I, 2]` long, rows and columns of real pixels on the canvas.
        image_index_M: `[M]` long, picture of each target.
        image_size: S, side of the canvas.
        side: h, side of the masks.

    Returns:
        `[M, h, h]` bool.
    """
    centres = (torch.arange(side, device=image_valid_hw.device) + 0.5) * (image_size / side)
    inside = centres[None, None, :] < image_valid_hw[image_index_M][:, :, None]
    return inside[:, 0, :, None] & inside[:, 1, None, :]
