"""A model small enough to run without a cache in a test, that talks and points a lot although nobody trained it."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pixellm.model.config import PixelLMConfig
from pixellm.model.modeling import PixelLMForConditionalGeneration
from pixellm.model.processing import PixelLMProcessor

sys.path.append(str(Path(__file__).parent))  # for `from micro import …`

MICRO: dict[str, Any] = {
    "text_config": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4},
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,
        "patch_size": 14,
    },
    "image_size": 84,
    "image_token_grid": 3,
    "decoder_hidden_size": 32,
    "decoder_num_heads": 2,
    "decoder_mlp_size": 48,
}


class TalkativeModel(PixelLMForConditionalGeneration):
    """An untrained model whose logits lean towards starting groups and towards ending the answer."""

    def __init__(self, config: PixelLMConfig) -> None:
        super().__init__(config)
        lean = torch.zeros(config.text_config.vocab_size)
        lean[config.codebook_token_ids[0]] = 1.0
        lean[config.text_config.eos_token_id] = 1.0
        self.register_buffer("lean", lean, persistent=False)

    def lm_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().lm_logits(hidden) + self.lean.to(hidden.dtype)


def build_micro(seed: int = 0, **overrides: Any) -> tuple[TalkativeModel, PixelLMProcessor]:
    """A micro model with its processor, drawn from `seed`."""
    torch.manual_seed(seed)
    settings = MICRO | overrides
    model = TalkativeModel(PixelLMConfig.from_preset("tiny", **settings)).eval()
    return model, PixelLMProcessor.for_preset("tiny", **settings)


@pytest.fixture(scope="session")
def micro() -> tuple[TalkativeModel, PixelLMProcessor]:
    return build_micro()


@pytest.fixture(scope="session")
def micro_factory() -> Callable[..., tuple[TalkativeModel, PixelLMProcessor]]:
    return build_micro


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Five pictures of different shapes, two of them with padding below, two with padding at the right."""
    rng = np.random.default_rng(0)
    shapes = [(60, 90), (120, 50), (84, 84), (33, 200), (200, 40)]
    return [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for h, w in shapes]


@pytest.fixture
def micro_engine(micro: tuple[TalkativeModel, PixelLMProcessor]) -> Iterator[Any]:
    from pixellm.model.engine import PixelLMEngine

    with PixelLMEngine(*micro, max_batch_size=4) as engine:
        yield engine
