"""Initial values beyond transformers' own: what lets a network of a few million weights learn in minutes."""

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from pixellm.model.modeling import PixelLMForConditionalGeneration


@torch.no_grad()
def redraw(model: "PixelLMForConditionalGeneration") -> None:
    """Redraws what the config gives other initial values for; left alone on the meta device.

    `initializer_range` is for both towers and the head, `embedding_initializer_range` for their embeddings,
    `new_parts_initializer` for the linear and convolution layers of projectors, codebook, neck and decoder, and
    `decoder_token_range` for the decoder's fixed tokens: torch draws them from N(0, 1), and beside them a target's
    embedding, which starts near 0.1, is hardly seen.

    Args:
        model: changed in place.
    """
    if model.lm_head.weight.is_meta:
        return
    config = model.config
    _redraw_towers(model, config.initializer_range, config.embedding_initializer_range)
    if config.new_parts_initializer == "xavier":
        for part in ("image_projector", "decoder_projector", "codebook", "neck", "decoder"):
            for module in _modules_of(model, part):
                if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                    nn.init.xavier_uniform_(module.weight)
    if config.decoder_token_range is not None:
        for table in _modules_of(model, "decoder"):
            if isinstance(table, nn.Embedding):
                table.weight.normal_(std=config.decoder_token_range)


def _redraw_towers(model: "PixelLMForConditionalGeneration", std: float | None, embedding_std: float | None) -> None:
    for tower in ("vision_tower", "language_model", "lm_head", "sam_encoder"):
        for module in _modules_of(model, tower):
            if isinstance(module, nn.Embedding) and embedding_std is not None:
                module.weight.normal_(std=embedding_std)
            elif isinstance(module, (nn.Linear, nn.Conv2d)) and std is not None:
                module.weight.normal_(std=std)
    if embedding_std is not None:
        model.vision_tower.embeddings.class_embedding.normal_(std=embedding_std)


def _modules_of(model: nn.Module, part: str) -> list[nn.Module]:
    """All modules of a part; none where the network lacks it."""
    return list(getattr(model, part).modules()) if hasattr(model, part) else []
