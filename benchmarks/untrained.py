"""Models that no training made, for benchmarks that look at the platform: their answers need not be good."""

from pathlib import Path

import torch

from pixellm.model.config import PixelLMConfig
from pixellm.model.modeling import PixelLMForConditionalGeneration
from pixellm.model.processing import PixelLMProcessor


def write_untrained(preset: str, folder: Path, *, answers_with_masks: bool = False) -> Path:
    """A seeded model folder of a preset's sizes; with `answers_with_masks` every answer is nothing but masks."""
    torch.manual_seed(0)
    model = PixelLMForConditionalGeneration(PixelLMConfig.from_preset(preset))
    processor = PixelLMProcessor.for_preset(preset)
    if answers_with_masks:
        start_groups(model, processor)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def start_groups(model: PixelLMForConditionalGeneration, processor: PixelLMProcessor) -> None:
    """Makes the start of a group the likeliest next token, whatever came before."""
    model.lm_head.weight.zero_()
    model.lm_head.weight[processor.token_ids.codebook[0]] = 1.0
    model.language_model.norm.weight.fill_(1.0)
