"""The vision tower: CLIP itself at its own size, and padding that nothing may see."""

import numpy as np
import pytest
import torch
from micro import micro_config, micro_model
from transformers import CLIPVisionModel

from pixellm.model.vision import VisionTower, pool_to_grid, pool_valid, resize_positions, valid_patches


def test_without_padding_at_its_own_size_the_tower_is_clip() -> None:
    config = micro_config().vision_config
    tower = VisionTower(config).eval()
    clip = CLIPVisionModel(config).eval()
    clip.load_state_dict(tower.state_dict())
    pixels = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        ours = tower.hidden_states(pixels, torch.ones(3, 4, 4, dtype=torch.bool), [4, 2, 0], "correct")
        theirs = clip(pixels, output_hidden_states=True).hidden_states
    for layer, states in zip([4, 2, 0], ours, strict=True):
        torch.testing.assert_close(states, theirs[layer][:, 1:], rtol=1e-5, atol=1e-5)


def test_pixels_of_padding_change_no_feature_of_the_picture() -> None:
    model = micro_model().eval()
    pixels = torch.randn(1, 3, 32, 32)
    valid_hw = torch.tensor([[32, 18]])  # columns 0..19 belong to patches with real pixels
    noisy = pixels.clone()
    noisy[..., 20:] = 7.0
    with torch.no_grad():
        states = [
            model.vision_tower.hidden_states(p, valid_patches(valid_hw, 8, 4), [4, 2], "correct")
            for p in (pixels, noisy)
        ]
    for clean, changed in zip(*states, strict=True):
        torch.testing.assert_close(clean.view(8, 8, -1)[:, :5], changed.view(8, 8, -1)[:, :5])
        assert not torch.allclose(clean, changed)


@pytest.mark.parametrize("hw", [(32, 32), (1, 32), (32, 1), (5, 13), (4, 8)])
def test_a_patch_is_valid_when_it_holds_a_real_pixel(hw: tuple[int, int]) -> None:
    pixels = np.zeros((32, 32), dtype=bool)
    pixels[: hw[0], : hw[1]] = True
    wanted = pixels.reshape(8, 4, 8, 4).any((1, 3))
    np.testing.assert_array_equal(valid_patches(torch.tensor([hw]), 8, 4)[0].numpy(), wanted)


def test_image_tokens_are_valid_where_the_nearest_patch_is() -> None:
    valid = torch.rand(2, 8, 8) > 0.5
    got = pool_valid(valid, 3).view(2, 3, 3)
    for row in range(3):
        for column in range(3):
            torch.testing.assert_close(got[:, row, column], valid[:, row * 8 // 3, column * 8 // 3])


@pytest.mark.parametrize("mode", ["correct", "released"])
def test_a_position_table_of_the_right_size_is_left_alone(mode: str) -> None:
    table = torch.randn(17, 6)
    assert resize_positions(table, 4, mode) is table


def test_positions_are_interpolated_between_neighbours() -> None:
    row, column = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    table = torch.cat([torch.full((1, 2), 99.0), torch.stack([row, column], -1).reshape(16, 2)])
    resized = resize_positions(table, 8, "correct")
    assert resized[0].tolist() == [99.0, 99.0]
    centres = ((torch.arange(8) + 0.5) / 2 - 0.5).clamp(0, 3)
    torch.testing.assert_close(resized[1:].view(8, 8, 2)[:, 3, 0], centres)
    torch.testing.assert_close(resized[1:].view(8, 8, 2)[5, :, 1], centres)


def test_pooling_halves_a_map_by_averaging_neighbours() -> None:
    features = torch.randn(2, 64, 5)
    wanted = features.view(2, 4, 2, 4, 2, 5).mean((2, 4)).reshape(2, 16, 5)
    torch.testing.assert_close(pool_to_grid(features, 4), wanted, rtol=1e-5, atol=1e-6)


def test_layers_above_the_deepest_feature_do_not_train() -> None:
    model = micro_model()
    frozen = {name for name, p in model.named_parameters() if name.startswith("vision") and not p.requires_grad}
    assert any(".layers.4." in name for name in frozen)
    assert not any(".layers.3." in name for name in frozen)
