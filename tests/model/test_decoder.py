"""The pixel decoder: SAM's transformer, eq. 1 of the paper, and targets that do not disturb each other."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.sam.configuration_sam import SamMaskDecoderConfig
from transformers.models.sam.modeling_sam import SamTwoWayTransformer

from pixellm.model.attention import TwoWayTransformer
from pixellm.model.decoder import FourierPositions, PixelDecoder, ScaleFusion


def decoder(num_scales: int = 2, fusion: str = "learned") -> PixelDecoder:
    torch.manual_seed(0)
    return PixelDecoder(16, 2, 44, 2, num_scales, fusion).eval()


def inputs(num_scales: int = 2, num_targets: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(num_targets, num_scales, 16, generator=generator)
    scales = torch.randn(3, num_scales, 16, 6, 6, generator=generator)
    return embeds, scales, torch.arange(num_targets) % 3


def test_the_transformer_is_sams() -> None:
    config = SamMaskDecoderConfig(hidden_size=16, num_attention_heads=2, mlp_dim=44, num_hidden_layers=2)
    config.layer_norm_eps = 1e-5  # SAM's own; transformers' default differs
    config._attn_implementation = "eager"
    sam, ours = SamTwoWayTransformer(config).eval(), TwoWayTransformer(16, 2, 44, 2).eval()
    weights = {
        key.replace("layer_norm_final_attn", "norm_final_attn").replace("layer_norm", "norm"): value
        for key, value in sam.state_dict().items()
    }
    ours.load_state_dict(weights)
    tokens, image, positions = torch.randn(3, 6, 16), torch.randn(3, 16, 5, 5), torch.randn(1, 16, 5, 5)
    with torch.no_grad():
        wanted = sam(tokens[:, None], image, positions.expand(3, -1, -1, -1), None)
        got = ours(tokens, image.flatten(2).mT, positions[0].flatten(1).T)
    torch.testing.assert_close(got[0], wanted[0][:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1], wanted[1][:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("num_scales", "side"), [(1, 12), (2, 24), (3, 24)])
def test_masks_have_the_finest_scales_resolution(num_scales: int, side: int) -> None:
    masks = decoder(num_scales)(*inputs(num_scales))
    assert masks.mask_logits.shape == (5, side, side)
    assert [logits.shape[-1] for logits in masks.level_logits] == [12, 24, 24][:num_scales]
    assert masks.mask_logits.dtype == torch.float32


def test_a_target_is_decoded_the_same_alone_and_among_others() -> None:
    model, (embeds, scales, images) = decoder(), inputs()
    with torch.no_grad():
        together = model(embeds, scales, images).mask_logits
        for k in range(5):
            alone = model(embeds[k : k + 1], scales[images[k]][None], torch.zeros(1, dtype=torch.long)).mask_logits
            torch.testing.assert_close(alone[0], together[k], rtol=1e-4, atol=1e-4)


def test_no_targets_give_no_masks() -> None:
    embeds, scales, images = inputs()
    assert decoder()(embeds[:0], scales, images[:0]).mask_logits.shape == (0, 24, 24)


def test_each_scale_reads_its_own_embedding_and_features_and_the_mask_before_it() -> None:
    model, (embeds, scales, images) = decoder(3), inputs(3)
    with torch.no_grad():
        before = model(embeds, scales, images).level_logits
        for level in range(3):
            changed = scales.clone()
            changed[:, level] += torch.randn(16, 6, 6)
            after = model(embeds, changed, images).level_logits
            same = [torch.allclose(a, b) for a, b in zip(before, after, strict=True)]
            assert same == [i < level for i in range(3)]


def test_the_source_of_a_finer_scale_is_multiplied_by_one_plus_the_probability_of_the_coarser_mask() -> None:
    model, (_, scales, images) = decoder(), inputs()
    logits = torch.randn(5, 12, 12)
    with torch.no_grad():
        source, _ = model._source(scales[:, 1], images, [logits])
        upsampled = model.upsample_2x(scales[:, 1])[images]
    dense = model.no_mask_embed.weight.view(1, 16, 1, 1)
    torch.testing.assert_close(source, upsampled * (1 + logits.sigmoid()[:, None]) + dense)


def test_the_result_is_the_weighted_sum_of_all_scales_with_weights_that_sum_to_one() -> None:
    model = decoder()
    model.scale_fusion.values.data = torch.tensor([0.3, -1.1])
    weights = torch.tensor([0.3, -1.1]).exp() / torch.tensor([0.3, -1.1]).exp().sum()
    with torch.no_grad():
        masks = model(*inputs())
    coarse = F.interpolate(masks.level_logits[0][:, None], (24, 24), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(masks.mask_logits, weights[0] * coarse + weights[1] * masks.level_logits[1])


def test_learned_weights_start_as_the_constant_ones() -> None:
    for num_scales in (1, 2, 3):
        torch.testing.assert_close(ScaleFusion(num_scales)(), torch.full((num_scales,), 1 / num_scales))
    learned, mean = decoder(fusion="learned"), decoder(fusion="mean")
    mean.load_state_dict({k: v for k, v in learned.state_dict().items() if "scale_fusion" not in k})
    torch.testing.assert_close(learned(*inputs()).mask_logits, mean(*inputs()).mask_logits)
    assert not list(mean.scale_fusion.parameters())


def test_positions_put_x_before_y_at_cell_centres() -> None:
    positions = FourierPositions(8)
    encoded = positions(4).view(4, 4, 8)
    row, column = 1, 3
    angles = 2 * torch.pi * ((2 * torch.tensor([(column + 0.5) / 4, (row + 0.5) / 4]) - 1) @ positions.matrix)
    torch.testing.assert_close(encoded[row, column], torch.cat([angles.sin(), angles.cos()]))
    assert "matrix" in positions.state_dict()
