"""Presets, their options, and the errors that say what to change."""

import pytest
import torch
from micro import micro_config

from pixellm.errors import ConfigError
from pixellm.model.config import PixelLMConfig
from pixellm.model.modeling import PixelLMForConditionalGeneration
from pixellm.model.presets import CLIP_H_LAION, PRESETS
from pixellm.model.tokenization import add_codebook_tokens, load_tiny_tokenizer


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(("tokens_per_scale", "num_scales"), [(1, 1), (2, 3), (4, 2)])
def test_every_preset_takes_every_codebook_and_builds_without_memory(
    name: str, tokens_per_scale: int, num_scales: int
) -> None:
    config = PixelLMConfig.from_preset(name, tokens_per_scale=tokens_per_scale, num_scales=num_scales)
    assert config.group_size == tokens_per_scale * num_scales == len(config.codebook_token_ids)
    with torch.device("meta"):
        model = PixelLMForConditionalGeneration(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert len(model.decoder.transformer) == num_scales == len(config.vision_layers)


def test_ids_of_the_small_presets_are_the_shipped_tokenizers() -> None:
    config = PixelLMConfig.from_preset("tiny", tokens_per_scale=2)
    tokenizer = load_tiny_tokenizer()
    add_codebook_tokens(tokenizer, 2, 2)
    names = [f"[SEG{i}]" for i in range(4)]
    assert config.codebook_token_ids == tokenizer.convert_tokens_to_ids(names)
    assert [config.im_start_id, config.im_end_id] == tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"])
    assert config.text_config.vocab_size == len(tokenizer)
    assert config.text_config.eos_token_id == tokenizer.eos_token_id


def test_the_papers_shapes_follow_llamas_vocabulary() -> None:
    config = PixelLMConfig.from_preset("pixellm-7b")
    assert config.codebook_token_ids == [32000, 32001, 32002, 32003, 32004, 32005]
    assert (config.im_start_id, config.im_end_id, config.text_config.vocab_size) == (32006, 32007, 32008)
    assert (config.image_size, config.patch_grid, config.num_image_tokens, config.mask_grid) == (448, 32, 256, 128)
    assert config.vision_layers == [23, 14]


@pytest.mark.parametrize("image_size", [224, 336, 448])
def test_another_tower_and_resolution_fit_any_preset(image_size: int) -> None:
    config = PixelLMConfig.from_preset(
        "pixellm-7b", vision_config=CLIP_H_LAION, image_size=image_size, image_token_grid=image_size // 28
    )
    with torch.device("meta"):
        model = PixelLMForConditionalGeneration(config)
    assert model.vision_tower.embeddings.position_embedding.weight.shape == (257, 1280)
    assert config.mask_grid == 4 * image_size // 14


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("tinny", {}, "did you mean 'tiny'"),
        ("tiny", {"token_per_scale": 2}, "did you mean 'tokens_per_scale'"),
        ("tiny", {"tokens_per_scale": 5}, "1 to 4 tokens per scale"),
        ("tiny", {"num_scales": 4}, "1 to 3 scales"),
        ("tiny", {"token_fusion": "none"}, "token_fusion is 'none'; choose one of learned, mean"),
        ("tiny", {"vision_feature_layers": [-2]}, "wanted 2 hidden-state indices"),
        ("tiny", {"vision_feature_layers": [-2, -9]}, "a tower with 6 layers"),
        ("tiny", {"image_size": 225}, "image_size 225 is no multiple"),
        ("tiny", {"decoder_num_heads": 5}, "multiple of decoder_num_heads"),
        ("tiny", {"target_refinement_alpha": 0.5}, "1 switches it off"),
        ("tiny", {"codebook_token_ids": [1, 2]}, "6 . 2 different ids"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(name: str, overrides: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PixelLMConfig.from_preset(name, **overrides)


def test_a_config_survives_its_json() -> None:
    config = micro_config(tokens_per_scale=2, num_scales=3, target_refinement_alpha=1.5)
    again = PixelLMConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert again.text_config.hidden_size == 24
