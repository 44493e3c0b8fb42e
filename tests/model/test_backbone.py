"""The seam: PixelLM implements it, and codebook and decoder serve whatever else does."""

import torch
from micro import micro_batch, micro_model
from torch import Tensor, nn

from pixellm.model.backbone import ImageFeatures, MultimodalBackbone
from pixellm.model.codebook import SegmentationCodebook, find_groups, gather_groups
from pixellm.model.decoder import PixelDecoder


class RecurrentBackbone(nn.Module):
    """A network of another make and shape: colours for vision, a GRU for language, its state for a cache."""

    codebook_token_ids = (7, 8, 9)

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.to_token, self.to_map = nn.Embedding(11, 13), nn.Linear(3, 13), nn.Conv2d(3, 32, 1)
        self.language, self.head = nn.GRU(13, 13, batch_first=True), nn.Linear(13, 11)
        self.codebook = SegmentationCodebook(13, 32, 1, 3, "learned")
        self.decoder = PixelDecoder(32, 4, 20, 2, 3, "learned")

    def encode_images(self, pixel_values: Tensor, image_valid_hw: Tensor) -> ImageFeatures:
        tokens = self.to_token(pixel_values.mean((2, 3)))[:, None].expand(-1, 2, -1)
        maps = self.to_map(nn.functional.adaptive_avg_pool2d(pixel_values, 5))
        valid = torch.ones(len(pixel_values), 2, dtype=torch.bool)
        return ImageFeatures(tokens, valid, maps[:, None].expand(-1, 3, -1, -1, -1))

    def embed_inputs(
        self, input_ids: Tensor, features: ImageFeatures, image_index: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        embeds = self.embed(input_ids.clamp(min=0))
        embeds[input_ids < 0] = features.image_tokens[image_index].flatten(0, 1)
        return embeds, torch.ones_like(input_ids, dtype=torch.bool)

    def language_forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Tensor | None = None,
        use_cache: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        hidden, state = self.language(inputs_embeds, past_key_values)
        return hidden, state if use_cache else None

    def lm_logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)

    def codebook_embeds(self, hidden_MJD: Tensor) -> Tensor:
        return self.codebook(hidden_MJD)

    def decode_masks(self, embeds_MGC: Tensor, scales: Tensor, image_index_M: Tensor) -> Tensor:
        return self.decoder(embeds_MGC, scales, image_index_M).mask_logits


def masks_through_the_seam(
    backbone: MultimodalBackbone,
    codebook: list[int],
    input_ids: Tensor,
    pixels: Tensor,
    valid_hw: Tensor,
    images: Tensor,
) -> tuple[Tensor, Tensor]:
    """Logits and masks, by the seam's methods alone."""
    features = backbone.encode_images(pixels, valid_hw)
    embeds, mask = backbone.embed_inputs(input_ids, features, images)
    hidden, _ = backbone.language_forward(embeds, mask, torch.arange(input_ids.shape[1])[None])
    rows, positions = find_groups(input_ids, codebook)
    groups = backbone.codebook_embeds(gather_groups(hidden, rows, positions, len(codebook)))
    return backbone.lm_logits(hidden), backbone.decode_masks(groups, features.scales, images[rows])


def test_a_network_of_another_make_decodes_masks_that_train() -> None:
    backbone = RecurrentBackbone()
    assert isinstance(backbone, MultimodalBackbone)
    input_ids = torch.tensor([[1, -1, -1, 4, 7, 8, 9, 2], [-1, -1, 7, 8, 9, 7, 8, 9]])
    arguments = (torch.randn(2, 3, 17, 19), torch.tensor([[17, 19]] * 2), torch.tensor([1, 0]))
    logits, masks = masks_through_the_seam(backbone, [7, 8, 9], input_ids, *arguments)
    assert logits.shape == (2, 8, 11)
    assert masks.shape == (3, 20, 20)
    masks.square().mean().backward()
    assert backbone.language.weight_ih_l0.grad is not None
    assert backbone.to_map.weight.grad.abs().sum() > 0


def test_forward_is_the_seams_steps() -> None:
    model = micro_model().eval()
    assert isinstance(model, MultimodalBackbone)
    batch = micro_batch(model.config, (2, 2, 2))
    assert batch["attention_mask"].all()
    with torch.no_grad():
        output = model(**batch)
        logits, masks = masks_through_the_seam(
            model,
            model.config.codebook_token_ids,
            batch["input_ids"],
            batch["pixel_values"],
            batch["image_valid_hw"],
            batch["image_index"],
        )
    assert torch.equal(logits, output.logits)
    assert torch.equal(masks, output.mask_logits)


def test_features_are_picked_and_joined_by_picture() -> None:
    features = ImageFeatures(torch.randn(3, 2, 5), torch.rand(3, 2) > 0.5, torch.randn(3, 1, 4, 6, 6))
    again = ImageFeatures.cat([features.index(0), features.index(slice(1, 3))])
    assert len(again) == 3
    for name in ("image_tokens", "token_valid", "scales"):
        assert torch.equal(getattr(again, name), getattr(features, name))
    assert torch.equal(features.index(torch.tensor([2, 2])).scales, features.scales[[2, 2]])
