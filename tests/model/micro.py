"""A network of a few thousand weights whose sizes all differ, so that a transposition cannot pass unseen."""

from typing import Any

import torch

from pixellm.model.config import PixelLMConfig
from pixellm.model.modeling import PixelLMForConditionalGeneration


def micro_config(**overrides: Any) -> PixelLMConfig:
    fields: dict[str, Any] = {
        "text_config": {
            "vocab_size": 61,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "pad_token_id": 0,
        },
        "vision_config": {
            "hidden_size": 20,
            "intermediate_size": 28,
            "num_hidden_layers": 5,
            "num_attention_heads": 2,
            "patch_size": 4,
            "image_size": 16,
        },
        "image_size": 32,
        "image_token_grid": 3,
        "projector_hidden_size": 36,
        "decoder_hidden_size": 32,
        "decoder_num_heads": 2,
        "decoder_mlp_size": 44,
        "vision_feature_layers": [-2, -4, -5][: overrides.get("num_scales", 2)],
        "initializer_range": 0.1,
        "embedding_initializer_range": 0.5,
    }
    for part in ("text_config", "vision_config"):
        fields[part] |= overrides.pop(part, {})
    return PixelLMConfig(**(fields | overrides))


def micro_model(seed: int = 0, **overrides: Any) -> PixelLMForConditionalGeneration:
    torch.manual_seed(seed)
    return PixelLMForConditionalGeneration(micro_config(**overrides))


def micro_batch(config: PixelLMConfig, targets_per_row: tuple[int, ...] = (2, 0, 3), seed: int = 0) -> dict[str, Any]:
    """Two pictures; row 0 asks about picture 1, the others about picture 0; row r has so many groups."""
    generator = torch.Generator().manual_seed(seed)
    picture = [config.im_start_id, *[config.image_token_id] * config.num_image_tokens, config.im_end_id]
    rows = [
        [1, 5 + row, *picture, 9, *[t for _ in range(count) for t in (12 + row, *config.codebook_token_ids)], 2]
        for row, count in enumerate(targets_per_row)
    ]
    length = max(len(row) for row in rows)
    input_ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    attention_mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    answer = len(picture) + 3
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, :answer] = -100
    num_targets = sum(targets_per_row)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "pixel_values": torch.randn(2, 3, config.image_size, config.image_size, generator=generator),
        "image_valid_hw": torch.tensor([[config.image_size, 21], [17, config.image_size]]),
        "image_index": torch.tensor([1] + [0] * (len(rows) - 1)),
        "labels": labels,
        "target_masks": (torch.rand(num_targets, 23, 23, generator=generator) > 0.5).float(),
        "target_rows": torch.arange(len(rows)).repeat_interleave(torch.tensor(targets_per_row)),
    }
