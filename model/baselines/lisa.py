"""LISA (arXiv 2308.00692): LLaVA, a `[SEG]` token, and Segment Anything as encoder and decoder of masks.

The hidden state that predicts `[SEG]` goes through an MLP and prompts SAM's mask decoder as a point would. It is a
PixelLM with other parts behind the language model: it trains in the same job and answers in the same engine.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SamConfig
from transformers.models.sam.modeling_sam import SamMaskDecoder, SamVisionEncoder

from pixellm.model.backbone import ImageFeatures
from pixellm.model.baselines import pictures
from pixellm.model.baselines.lisa_config import LisaConfig
from pixellm.model.codebook import SegmentationCodebook
from pixellm.model.config import PixelLMConfig
from pixellm.model.decoder import DecodedMasks, FourierPositions
from pixellm.model.modeling import PixelLMForConditionalGeneration
from pixellm.model.processing import SAM_MEAN, SAM_STD
from pixellm.model.vision import pool_to_grid, pool_valid, valid_patches


class LisaForConditionalGeneration(PixelLMForConditionalGeneration):
    """A picture and a question in, words and a mask for each `[SEG]` out."""

    config: LisaConfig
    config_class = LisaConfig
    never_trained = (
        "decoder.mask_decoder.iou_prediction_head.",
        *(f"decoder.mask_decoder.output_hypernetworks_mlps.{number}." for number in (1, 2, 3)),
        "vision_tower.post_layernorm.",
    )
    _no_split_modules = ["LlamaDecoderLayer", "CLIPEncoderLayer", "SamVisionLayer"]  # noqa: RUF012

    def set_trainable_parts(self, parts: tuple[str, ...] | list[str] | set[str]) -> None:
        """Lets exactly these parts train; SAM's encoder is part of `vision`."""
        super().set_trainable_parts(parts)
        if self.config.freeze_projector:
            self.image_projector.requires_grad_(False)

    def encode_images(self, pixel_values: Tensor, image_valid_hw: Tensor) -> ImageFeatures:
        """LLaVA's image tokens, and SAM's image embeddings as the only scale; see `PixelLM…encode_images`."""
        config = self.config
        pixels, valid = clip_pixels(pixel_values, image_valid_hw, config)
        states = self.vision_tower.hidden_states(pixels, valid, config.vision_layers, config.position_resize)
        image_tokens = self.image_projector(pool_to_grid(states[0], config.image_token_grid))
        embeddings = self.sam_encoder(pixel_values.to(self.sam_encoder.dtype)).last_hidden_state
        return ImageFeatures(image_tokens, pool_valid(valid, config.image_token_grid), embeddings[:, None])

    def _build_decoder_features(self, config: PixelLMConfig) -> None:
        assert isinstance(config, LisaConfig)
        self.sam_encoder = SamVisionEncoder(config.sam_config.vision_config)

    def _build_mask_parts(self, config: PixelLMConfig) -> None:
        assert isinstance(config, LisaConfig)
        config.sam_config.mask_decoder_config._attn_implementation = config._attn_implementation  # as SamModel does
        self.codebook = SegmentationCodebook(config.text_config.hidden_size, config.decoder_hidden_size, 1, 1, "mean")
        self.decoder = SamMaskHead(config.sam_config)  # type: ignore[assignment]


class SamMaskHead(nn.Module):
    """SAM's mask decoder, prompted with one embedding per target."""

    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        size = config.mask_decoder_config.hidden_size
        self.mask_decoder = SamMaskDecoder(config.mask_decoder_config)
        self.no_mask_embed = nn.Embedding(1, size)
        self.positions = FourierPositions(size)

    def forward(self, embeds_MGC: Tensor, scales_IGCHW: Tensor, image_index_M: Tensor) -> DecodedMasks:
        """Decodes all targets in one batch.

        Args:
            embeds_MGC: `[M, 1, C]` prompts.
            scales_IGCHW: `[I, 1, C, g, g]` SAM's image embeddings.
            image_index_M: `[M]` long, the picture of each target.

        Returns:
            Mask logits at `4g`.
        """
        grid, count = scales_IGCHW.shape[-1], len(embeds_MGC)
        if not count:
            return DecodedMasks(scales_IGCHW.new_zeros(0, 4 * grid, 4 * grid, dtype=torch.float32), [], [])
        image_MCHW = scales_IGCHW[image_index_M, 0]
        positions = self.positions(grid).to(image_MCHW.dtype).t().unflatten(1, (grid, grid))
        dense = self.no_mask_embed(image_index_M.new_zeros(1))[:, :, None, None].to(image_MCHW.dtype)
        logits, quality = self.mask_decoder(
            image_embeddings=image_MCHW,
            image_positional_embeddings=positions.expand(count, -1, -1, -1),
            sparse_prompt_embeddings=embeds_MGC[:, None].to(image_MCHW.dtype),
            dense_prompt_embeddings=dense.expand_as(image_MCHW),
            multimask_output=False,
        )
        mask_logits = logits[:, 0, 0].float()
        return DecodedMasks(mask_logits, [mask_logits], [quality[:, 0, 0]])


def clip_pixels(pixel_values: Tensor, image_valid_hw: Tensor, config: LisaConfig) -> tuple[Tensor, Tensor]:
    """What the CLIP tower sees of the canvas.

    Args:
        pixel_values: `[I, 3, S, S]` in SAM's statistics.
        image_valid_hw: `[I, 2]` rows and columns that hold the picture.
        config: `clip_view`, sizes.

    Returns:
        `[I, 3, s, s]` and which of its patches hold picture, `[I, g, g]` bool.
    """
    size, grid = config.clip_size, config.patch_grid
    if config.clip_view == "canvas":
        if size != config.image_size:
            pixel_values = F.interpolate(pixel_values, (size, size), mode="bilinear", antialias=True)
        valid_hw = (image_valid_hw.to(pixel_values.device) * size + config.image_size - 1) // config.image_size
        return pixel_values, valid_patches(valid_hw, grid, config.vision_config.patch_size)
    views = []
    for picture, (rows, columns) in zip(pixel_values, image_valid_hw.tolist(), strict=True):
        scale = size / min(rows, columns)
        wanted = (max(size, round(rows * scale)), max(size, round(columns * scale)))
        resized = F.interpolate(
            picture[None, :, :rows, :columns].float(), wanted, mode="bicubic", antialias=True, align_corners=False
        )
        top, left = (wanted[0] - size) // 2, (wanted[1] - size) // 2
        views.append(resized[0, :, top : top + size, left : left + size])
    crops = torch.stack(views)
    sam_mean, sam_std, mean, std = (
        torch.tensor(values, device=crops.device)[:, None, None] for values in (SAM_MEAN, SAM_STD, *pictures.CLIP)
    )
    levels = (crops * sam_std + sam_mean).clamp(0, 255) / 255
    valid = torch.ones(len(crops), grid, grid, dtype=torch.bool, device=crops.device)
    return ((levels - mean) / std).to(pixel_values.dtype), valid
