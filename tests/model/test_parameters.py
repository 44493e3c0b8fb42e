"""Parameter counts per part of every preset, counted here from the shapes that the paper and the towers prescribe."""

from collections import Counter

import pytest
import torch

from pixellm.model.config import PixelLMConfig
from pixellm.model.modeling import PARTS, PixelLMForConditionalGeneration

# name: (D, language MLP, layers, vocabulary), (vision width, MLP, layers, patch, positions), projector hidden,
# (C, decoder MLP)
SHAPES = {
    "tiny": ((192, 512, 4, 1008), (128, 512, 6, 16, 145), 256, (64, 256)),
    "small": ((512, 1408, 12, 1008), (384, 1536, 12, 14, 577), 1024, (128, 512)),
    "pixellm-7b": ((4096, 11008, 32, 32008), (1024, 4096, 24, 14, 577), 8192, (256, 2048)),
    "pixellm-13b": ((5120, 13824, 40, 32008), (1024, 4096, 24, 14, 577), 8192, (256, 2048)),
}
TOKENS_PER_SCALE, NUM_SCALES, DEPTH, MASK_TOKENS = 3, 2, 2, 4


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def attention(width: int, inner: int) -> int:
    return 3 * linear(width, inner) + linear(inner, width)


def vision(width: int, mlp: int, layers: int, patch: int, positions: int) -> int:
    norm = 2 * width
    layer = attention(width, width) + linear(width, mlp) + linear(mlp, width) + 2 * norm
    return 3 * patch * patch * width + width + positions * width + layers * layer + 2 * norm


def language(width: int, mlp: int, layers: int) -> int:
    return layers * (4 * width * width + 3 * width * mlp + 2 * width) + width


def decoder(width: int, mlp: int) -> int:
    norm, eighth = 2 * width, width // 8
    block = (
        attention(width, width) + 2 * attention(width, width // 2) + linear(width, mlp) + linear(mlp, width) + 4 * norm
    )
    transformer = DEPTH * block + attention(width, width // 2) + norm
    embeddings = (1 + MASK_TOKENS + NUM_SCALES + 1) * width
    upsample = 4 * width * width + width + norm
    output = 4 * width * eighth + eighth + 2 * eighth
    mask_head = 2 * linear(width, width) + linear(width, eighth)
    iou_head = 2 * linear(width, width) + linear(width, MASK_TOKENS)
    return NUM_SCALES * transformer + embeddings + upsample + output + mask_head + iou_head + NUM_SCALES


def wanted(name: str) -> dict[str, int]:
    (size, mlp, layers, vocabulary), tower, hidden, (width, decoder_mlp) = SHAPES[name]
    return {
        "vision": vision(*tower),
        "projectors": 2 * (linear(tower[0], hidden) + linear(hidden, size)),
        "language": language(size, mlp, layers),
        "embeddings": 2 * vocabulary * size,
        "codebook": linear(size, size) + linear(size, width) + NUM_SCALES * TOKENS_PER_SCALE * width * width,
        "decoder": decoder(width, decoder_mlp),
        "neck": size * width + 2 * width + 9 * width * width + 2 * width,
    }


@pytest.mark.parametrize("name", SHAPES)
def test_every_part_has_the_parameters_that_its_shapes_prescribe(name: str) -> None:
    with torch.device("meta"):
        model = PixelLMForConditionalGeneration(PixelLMConfig.from_preset(name))
    counts: Counter[str] = Counter()
    for parameter_name, parameter in model.named_parameters():
        counts[model.part_of(parameter_name)] += parameter.numel()
    assert dict(counts) == wanted(name)
    assert set(counts) | {"lora"} == set(PARTS)


def test_the_sizes_are_what_the_presets_are_called() -> None:
    totals = {name: sum(wanted(name).values()) for name in SHAPES}
    assert 3.5e6 < totals["tiny"] < 4.5e6
    assert 60e6 < totals["small"] < 100e6
    assert 7.0e9 < totals["pixellm-7b"] < 7.3e9
    assert 13.2e9 < totals["pixellm-13b"] < 13.6e9
