"""Initial values beyond transformers' own: what lets a network of a few million weights learn in minutes."""

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from pixellm.model.modeling import PixelLMForConditionalGeneration


@torch.no_grad()
def redraw_towers(model: "PixelLMForConditionalGeneration") -> None:
    """Redraws both towers, the head and the codebook's head with `initializer_range`, embeddings with `embedding_initializer_range`.

    Args:
        model: changed in place; left alone where the config gives None, and on the meta device.
    """
    std, embedding_std = model.config.initializer_range, model.config.embedding_initializer_range
    if model.lm_head.weight.is_meta:
        return
    for tower in (model.vision_tower, model.language_model, model.lm_head, model.codebook.head):
        for module in tower.modules():
            if isinstance(module, nn.Embedding) and embedding_std is not None:
                module.weight.normal_(std=embedding_std)
            elif isinstance(module, (nn.Linear, nn.Conv2d)) and std is not None:
                module.weight.normal_(std=std)
    if embedding_std is not None:
        model.vision_tower.embeddings.class_embedding.normal_(std=embedding_std)
