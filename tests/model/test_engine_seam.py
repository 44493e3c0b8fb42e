"""The engine knows a network by its seam alone: the released model's golden answers, and a network of another make."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engine_reference import answer_alone
from torch import Tensor, nn

from pixellm.model.backbone import ImageFeatures, MultimodalBackbone
from pixellm.model.conversation import Turn
from pixellm.model.engine import GenerationOptions, PixelLMEngine, SegmentRequest
from pixellm.model.images import PreparedImage
from pixellm.model.processing import PixelLMProcessor

WIDTH, VOCAB_PICTURE_TOKENS, SIDE = 20, 9, 84


class GoldenProcessor:
    """Stands for the processor of the golden model, whose tokenizer is not part of the golden numbers."""

    def __init__(self, official: dict[str, Any], pixel_values: Tensor) -> None:
        self.token_ids = SimpleNamespace(
            codebook=tuple(official["seg_token_ids"]), im_start=official["im_start_id"], im_end=official["im_end_id"]
        )
        self.tokenizer = SimpleNamespace(
            eos_token_id=official["llm"]["eos_token_id"], decode=lambda ids, **_: " ".join(map(str, ids))
        )
        self._pixel_values = pixel_values

    def check_matches(self, config: Any) -> None:
        assert tuple(config.codebook_token_ids) == self.token_ids.codebook

    def normalise(self, pixels: Tensor, valid_hw: Tensor) -> Tensor:
        return self._pixel_values[pixels[:, 0, 0, 0].long()]


@pytest.fixture(scope="module")
def golden_case(golden_dir: Path) -> Any:
    import sys

    sys.path.append(str(golden_dir.parents[1]))
    from benchmarks import golden_e2e

    return golden_e2e.load_case(golden_e2e.e2e_members(sorted(golden_dir.glob("e2e_a_*")))["a"])


def test_the_released_models_golden_answers_come_out_of_one_running_batch(golden_case: Any) -> None:
    golden, model = golden_case.golden, golden_case.model
    engine = PixelLMEngine(
        model, GoldenProcessor(golden_case.official, golden_case.inputs["pixel_values"]), max_batch_size=4
    )
    with engine:
        handles = []
        for j in range(6):
            picture = int(golden[f"gen.{j}.picture"])
            pixels = np.full((448, 448, 3), picture, np.uint8)
            valid, own = (tuple(map(int, golden[key][picture])) for key in ("in.clip_resize", "in.original_size"))
            prompt: list[int] = []
            for token in golden[f"gen.{j}.prompt_ids"][0].tolist():
                prompt += [model.config.image_token_id] * model.config.num_image_tokens if token < 0 else [token]
            options = GenerationOptions(max_new_tokens=40, keep_logits=True)
            handles.append(engine.submit_prepared(PreparedImage(pixels, valid, own), prompt, options))
        for j, handle in enumerate(handles):
            result, start = handle.result(60), golden[f"gen.{j}.prompt_ids"].shape[1]
            expected = golden[f"gen.{j}.output_ids"][0, start:].tolist()
            assert [*result.token_ids, 2] == expected
            logits = np.stack([target.mask_logits for target in result.targets])
            wanted = golden[f"gen.{j}.mask_logits"]
            np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-5 * max(1.0, np.abs(wanted).max()))
            scores = [target.score for target in result.targets]
            np.testing.assert_allclose(scores, golden[f"gen.{j}.mask_scores"], rtol=1e-4, atol=1e-5)


class OtherBackbone(nn.Module):
    """A network of another make: one attention layer with learned positions and two heads, pictures as means of tiles,
    masks as products of an embedding with a feature map."""

    def __init__(self, processor: PixelLMProcessor) -> None:
        super().__init__()
        torch.manual_seed(7)
        vocab = processor.token_ids.vocab_size
        self.config = SimpleNamespace(
            codebook_token_ids=list(processor.token_ids.codebook),
            im_start_id=processor.token_ids.im_start,
            im_end_id=processor.token_ids.im_end,
            image_size=SIDE,
            num_image_tokens=VOCAB_PICTURE_TOKENS,
            text_config=SimpleNamespace(vocab_size=vocab, max_position_embeddings=400, eos_token_id=2),
        )
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.embedding, self.positions = nn.Embedding(vocab, WIDTH), nn.Embedding(400, WIDTH)
        self.tiles, self.qkv, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, vocab)
        self.group_head, self.maps = nn.Linear(6 * WIDTH, 2 * 4), nn.Conv2d(3, 8, 1)
        with torch.no_grad():
            self.qkv.weight *= 3

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def encode_images(self, pixel_values: Tensor, image_valid_hw: Tensor) -> ImageFeatures:
        tiles = nn.functional.adaptive_avg_pool2d(pixel_values, 3)
        scales = self.maps(nn.functional.adaptive_avg_pool2d(pixel_values, 5)).unflatten(1, (2, 4))
        starts = torch.arange(3) * SIDE // 3
        valid = (starts < image_valid_hw[:, :1])[:, :, None] & (starts < image_valid_hw[:, 1:])[:, None]
        return ImageFeatures(self.tiles(tiles.flatten(2).transpose(1, 2)), valid.flatten(1), scales)

    def embed_inputs(
        self, input_ids: Tensor, features: ImageFeatures, image_index: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        is_image = input_ids < 0
        embeds = self.embedding(input_ids.clamp_min(0))
        embeds = embeds.masked_scatter(is_image[..., None], features.image_tokens[image_index])
        return embeds, torch.ones_like(is_image).masked_scatter(is_image, features.token_valid[image_index])

    def language_forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Any = None,
        use_cache: bool = False,
    ) -> tuple[Tensor, Any]:
        hidden = inputs_embeds + self.positions(position_ids)
        query, key, value = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(hidden).chunk(3, -1))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, 0)
        if attention_mask.ndim == 2:
            count, length = query.shape[2], key.shape[2]
            causal = torch.ones(count, length, dtype=torch.bool).tril(length - count)
            attention_mask = causal & attention_mask[:, None, None].bool()
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attention_mask)
        return torch.tanh(hidden + 4 * mixed.transpose(1, 2).flatten(2)) * 3, past_key_values

    def lm_logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)

    def codebook_embeds(self, hidden_MJD: Tensor) -> Tensor:
        return self.group_head(hidden_MJD.flatten(1)).unflatten(1, (2, 4))

    def decode_masks(self, embeds_MGC: Tensor, scales: Tensor, image_index_M: Tensor) -> Tensor:
        return torch.einsum("mgc,mgchw->mhw", embeds_MGC, scales[image_index_M])


def test_a_network_of_another_make_answers_through_the_engine_as_it_does_alone(
    pictures: Any, micro: Any, find_leans: Any
) -> None:
    processor = micro[1]
    model = OtherBackbone(processor).eval()
    for token, lean in find_leans(model, processor, {processor.token_ids.codebook[0]: 0.3, 2: 0.03}).items():
        model.head.bias.data[token] += lean
    assert isinstance(model, MultimodalBackbone)
    requests = [
        SegmentRequest(picture, question, GenerationOptions(max_new_tokens=40, keep_logits=True))
        for picture in pictures
        for question in ("Segment the cat.", "Where are the dog and the frisbee?")
    ]
    with PixelLMEngine(model, processor, max_batch_size=3) as engine:
        results = engine.segment_batch(requests)
    assert sum(len(result.targets) for result in results) > 5
    for request, result in zip(requests, results, strict=True):
        ids, logits = answer_alone(model, processor, request.image, request.prompt, 40)
        assert list(result.token_ids) == ids
        for target in result.targets:
            np.testing.assert_allclose(target.mask_logits, logits[target.index], atol=1e-4)
    assert processor.encode_prompt([Turn("a")])
