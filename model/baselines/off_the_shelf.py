"""Networks of others at the sizes that are published, built without their weights: for operations and shapes."""

from typing import Any

import torch
from torch import nn

CLIPSEG, GROUNDING_DINO, SAM2, SAM3 = "clipseg", "grounding-dino", "sam2", "sam3"


def build_published(name: str, device: str = "meta") -> nn.Module:
    """The network of a published checkpoint, weights not loaded.

    Args:
        name: `CLIPSEG` (`CIDAS/clipseg-rd64-refined`), `GROUNDING_DINO` (`IDEA-Research/grounding-dino-base`), `SAM2`
            (`facebook/sam2.1-hiera-large`) or `SAM3` (`facebook/sam3`).
        device: where it is built.
    """
    with torch.device(device):
        network: nn.Module = _BUILDERS[name]()
    # Some parameters of Grounding DINO are made on the CPU whatever the device.
    return network.to(device).eval().requires_grad_(False)


def _clipseg() -> Any:
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation  # slow import

    vision = {"patch_size": 16, "image_size": 224}
    config = CLIPSegConfig(vision_config=vision, reduce_dim=64, use_complex_transposed_convolution=True)
    return CLIPSegForImageSegmentation(config)


def _grounding_dino() -> Any:
    from transformers import BertConfig, GroundingDinoConfig, GroundingDinoForObjectDetection, SwinConfig

    swin = SwinConfig(
        image_size=384,
        embed_dim=128,
        depths=[2, 2, 18, 2],
        num_heads=[4, 8, 16, 32],
        window_size=12,
        out_indices=[2, 3, 4],
    )
    return GroundingDinoForObjectDetection(GroundingDinoConfig(backbone_config=swin, text_config=BertConfig()))


def _sam2() -> Any:
    from transformers import Sam2Config, Sam2HieraDetConfig, Sam2Model, Sam2VisionConfig

    hiera = Sam2HieraDetConfig(
        hidden_size=144,
        num_attention_heads=2,
        blocks_per_stage=[2, 6, 36, 4],
        embed_dim_per_stage=[144, 288, 576, 1152],
        num_attention_heads_per_stage=[2, 4, 8, 16],
        window_size_per_stage=[8, 4, 16, 8],
        global_attention_blocks=[23, 33, 43],
    )
    vision = Sam2VisionConfig(backbone_config=hiera, backbone_channel_list=[1152, 576, 288, 144])
    return Sam2Model(Sam2Config(vision_config=vision))


def _sam3() -> Any:
    from transformers import Sam3Config, Sam3Model

    return Sam3Model(Sam3Config())


_BUILDERS = {CLIPSEG: _clipseg, GROUNDING_DINO: _grounding_dino, SAM2: _sam2, SAM3: _sam3}
