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
from pixellm.model.tokenization import load_tiny_tokenizer

sys.path.append(str(Path(__file__).parent))  # for `from micro import …`, `from engine_reference import …`

MICRO: dict[str, Any] = {
    "text_config": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4},
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,
        "patch_size": 14,
        "image_size": 56,
    },
    "image_size": 84,
    "image_token_grid": 3,
    "vision_feature_layers": [-2, -3, -5],
    "projector_hidden_size": 48,
    "decoder_hidden_size": 32,
    "decoder_num_heads": 2,
    "decoder_mlp_size": 48,
    "initializer_range": 0.1,
    "embedding_initializer_range": 0.5,
}


class TalkativeModel(PixelLMForConditionalGeneration):
    """An untrained model whose logits lean towards starting groups and, less, towards ending the answer."""

    def __init__(self, config: PixelLMConfig) -> None:
        super().__init__(config)
        self.register_buffer("lean", torch.zeros(config.text_config.vocab_size), persistent=False)

    def lm_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().lm_logits(hidden) + self.lean.to(hidden.dtype)


@torch.inference_mode()
def leans(model: Any, processor: PixelLMProcessor, shares: dict[int, float]) -> dict[int, float]:
    """What to add to the logits of some tokens so that each is the best at about its share of positions."""
    pixels = np.random.default_rng(1).integers(0, 255, (1, processor.image_size, processor.image_size, 3), np.uint8)
    valid = torch.tensor([[processor.image_size] * 2])
    features = model.encode_images(processor.normalise(pixels, valid), valid)
    words = torch.randint(3, 900, (200,), generator=torch.Generator().manual_seed(2)).tolist()
    ids = torch.tensor([processor.encode_prompt("a") + words])
    embeds, mask = model.embed_inputs(ids, features, torch.zeros(1, dtype=torch.long))
    logits = model.lm_logits(model.language_forward(embeds, mask, torch.arange(ids.shape[1])[None])[0][0, -200:])
    rest = logits.clone()
    rest[:, [*processor.token_ids.codebook, *shares]] = float("-inf")
    return {token: float((rest.amax(-1) - logits[:, token]).quantile(share)) for token, share in shares.items()}


def build_micro(**overrides: Any) -> tuple[TalkativeModel, PixelLMProcessor]:
    """A micro model with its processor: of the first seed whose answers differ in length and hold words and groups."""
    from engine_reference import answer_alone  # beside this file, on the path set above

    settings = MICRO | overrides
    settings["vision_feature_layers"] = settings["vision_feature_layers"][: settings.get("num_scales", 2)]
    config = PixelLMConfig.from_preset("tiny", **settings)
    processor = PixelLMProcessor.for_config(config, load_tiny_tokenizer())
    group_start = processor.token_ids.codebook[0]
    for seed in range(100):
        torch.manual_seed(seed)
        model = TalkativeModel(config).eval()
        for token, lean in leans(model, processor, {group_start: 0.2, 2: 0.05}).items():
            model.lean[token] = lean
        answers = [answer_alone(model, processor, noise_pictures()[0], q, 40)[0] for q in ("cat", "the dog")]
        used = {token for answer in answers for token in answer}
        if group_start in used and len(used) > 12 + config.group_size and len(answers[0]) != len(answers[1]):
            return model, processor
    raise AssertionError("no seed of 100 gives a model that talks and points")


@pytest.fixture(scope="session")
def micro() -> tuple[TalkativeModel, PixelLMProcessor]:
    return build_micro()


@pytest.fixture(scope="session")
def micro_factory() -> Callable[..., tuple[TalkativeModel, PixelLMProcessor]]:
    return build_micro


@pytest.fixture(scope="session")
def find_leans() -> Callable[..., dict[int, float]]:
    return leans


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Five pictures of different shapes, two of them with padding below, two with padding at the right."""
    return noise_pictures()


def noise_pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    shapes = [(60, 90), (120, 50), (84, 84), (33, 200), (200, 40)]
    return [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for h, w in shapes]


@pytest.fixture
def micro_engine(micro: tuple[TalkativeModel, PixelLMProcessor]) -> Iterator[Any]:
    from pixellm.model.engine import PixelLMEngine

    with PixelLMEngine(*micro, max_batch_size=4) as engine:
        yield engine
