"""Baselines: one interface, LISA's own parts against transformers', its converter, and full sizes without memory."""

from pathlib import Path

import numpy as np
import pytest
import torch
from baseline_folders import BASELINES, write_lisa, write_llava
from PIL import Image
from safetensors.torch import save_file
from transformers import SamConfig, SamModel
from typer.testing import CliRunner

from pixellm.cli import app
from pixellm.errors import ConfigError, ModelLoadError
from pixellm.model.baselines import text_prompted
from pixellm.model.baselines.lisa import LisaForConditionalGeneration, clip_pixels
from pixellm.model.baselines.lisa_config import LisaConfig
from pixellm.model.baselines.lisa_convert import convert_lisa, lisa_name
from pixellm.model.baselines.lisa_rec import noun_phrases, one_question
from pixellm.model.baselines.off_the_shelf import CLIPSEG, GROUNDING_DINO, SAM2, SAM3, build_published
from pixellm.model.config import PixelLMConfig
from pixellm.model.conversation import MERGED_ANSWER, merge_targets
from pixellm.model.engine import PixelLMEngine
from pixellm.model.networks import load_config, load_network, meta_network
from pixellm.model.processing import PixelLMProcessor
from pixellm.model.segmentation import Segmenter, merged
from pixellm.model.segmenter import open_segmenter
from pixellm.model.tokenization import load_tiny_tokenizer

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 100, 3), dtype=np.uint8))
QUESTIONS = ("Segment the cat and the dog.", "How can I cross the lake?")


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_is_a_segmenter_and_answers_in_the_pictures_own_size(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_prompted, "BOX_THRESHOLD", 0.0)  # random weights are sure of nothing
    monkeypatch.setattr(text_prompted, "SAM3_THRESHOLD", 0.0)
    segmenter = open_segmenter(BASELINES[name](tmp_path / name), max_new_tokens=12)
    assert isinstance(segmenter, Segmenter)
    try:
        answers = segmenter.segment_many([(PICTURE, question) for question in QUESTIONS])
        swapped = segmenter.segment_many([(PICTURE, question) for question in QUESTIONS[::-1]])
        assert segmenter.segment_many([]) == []
    finally:
        segmenter.close()
    assert len(answers) == 2
    assert any(answer.masks for answer in answers)
    for answer, again in zip(answers, swapped[::-1], strict=True):
        assert len(answer.phrases) == len(answer.masks)
        assert all(mask.shape == (60, 100) and mask.dtype == np.bool_ for mask in answer.masks)
        assert all(f"[{number}]" in answer.text for number in range(1, len(answer.masks) + 1))
        assert (answer.text, answer.phrases) == (again.text, again.phrases)


def test_the_original_lisa_has_one_mask_for_all_targets(tmp_path: Path) -> None:
    several, one = (
        open_segmenter(write_lisa(tmp_path / variant, variant), max_new_tokens=3) for variant in ("lisa_aug", "lisa")
    )
    (many,), (single,) = (segmenter.segment_many([(PICTURE, QUESTIONS[0])]) for segmenter in (several, one))
    several.close()
    one.close()
    assert len(many.masks) == 3
    assert len(single.masks) == 1
    np.testing.assert_array_equal(single.masks[0], np.logical_or.reduce(many.masks))


def test_merging_keeps_the_words_and_one_number() -> None:
    left, right = np.array([[True, False]]), np.array([[False, True]])
    both = merged("The cat [1] and the dog [2].", [left, right])
    assert both.text == "The cat [1] and the dog."
    np.testing.assert_array_equal(both.masks[0], [[True, True]])
    assert merged("Nothing.", []).masks == ()


def test_targets_of_a_question_are_merged_for_training_and_nothing_else_changes() -> None:
    masks = [np.eye(4, dtype=np.uint8)[[row]] for row in range(3)]
    turns = [("Both?", "a {seg} and b {seg}", 2), ("What?", "A dog.", 0), ("One?", "c {seg}", 1)]
    merged_turns, unions = merge_targets(turns, masks)
    assert merged_turns == [("Both?", MERGED_ANSWER, 1), ("What?", "A dog.", 0), ("One?", MERGED_ANSWER, 1)]
    np.testing.assert_array_equal(unions, [[[1, 1, 0, 0]], [[0, 0, 1, 0]]])
    example = PixelLMProcessor.for_preset("lisa-tiny").encode_sample(
        PICTURE, [turns[0]], [np.ones((60, 100), bool), np.zeros((60, 100), bool)], 24
    )
    assert example.masks.shape == (1, 24, 24)


def test_phrases_of_an_answer_are_told_apart() -> None:
    assert noun_phrases("The cat, a red ball and the dog.") == ["The cat", "a red ball", "the dog"]
    assert noun_phrases("1. kayak\n2. paddle\n- kayak") == ["kayak", "paddle"]
    assert noun_phrases("cat [1], dog [2].") == ["cat", "dog"]
    assert noun_phrases(" .") == []
    assert one_question("red ball") == "Please segment the red ball."
    assert one_question("a red ball") == "Please segment a red ball."


def test_a_question_that_names_objects_is_prompted_phrase_by_phrase() -> None:
    assert text_prompted.prompts_of("Please segment the cat, a dog and the hat.") == ["the cat", "a dog", "the hat"]
    assert text_prompted.prompts_of("How can I cross the lake?") == ["How can I cross the lake"]


def test_boxes_are_taken_best_first_without_duplicates() -> None:
    boxes = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.5, 0.49], [0.5, 0.5, 1.0, 1.0], [0.1, 0.1, 0.2, 0.2]])
    kept = text_prompted.best_boxes(boxes, torch.tensor([0.6, 0.9, 0.5, 0.1]), 0.35)
    torch.testing.assert_close(kept, boxes[[1, 2]])


def test_clip_sees_the_middle_of_the_picture_as_released() -> None:
    config = LisaConfig.from_preset("lisa-tiny", clip_view="crop")
    processor = PixelLMProcessor.for_preset("lisa-tiny")
    columns = np.zeros((96, 192, 3), dtype=np.uint8)
    columns[:, 48:144] = 255  # the middle square is white
    picture = processor.prepare_image(Image.fromarray(columns))
    valid_hw = torch.tensor([picture.valid_hw])
    pixels, valid = clip_pixels(processor.normalise(picture.pixels[None], valid_hw), valid_hw, config)
    white = (255 - torch.tensor([122.7709, 116.7460, 104.0937])) / torch.tensor([68.5005, 66.6322, 70.3232])
    torch.testing.assert_close(pixels[0, :, 20:-20, 20:-20].mean((1, 2)), white, atol=1e-2, rtol=0)
    assert valid.all()


@pytest.mark.parametrize(("preset", "billions"), [("lisa-7b", 7.70), ("lisa-13b", 13.99)])
def test_full_size_lisa_builds_without_memory(preset: str, billions: float) -> None:
    network = meta_network(PixelLMConfig.from_preset(preset))
    assert sum(p.numel() for p in network.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)
    network.set_trainable_parts({"projectors", "embeddings", "codebook", "decoder"})
    trained = {name.split(".")[0] for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {"language_model", "lm_head", "codebook", "decoder"}  # SAM's encoder, CLIP, projector: frozen


@pytest.mark.parametrize(
    ("name", "millions"), [(CLIPSEG, 150.7), (GROUNDING_DINO, 233.0), (SAM2, 217.0), (SAM3, 840.0)]
)
def test_published_networks_build_without_memory_at_their_published_sizes(name: str, millions: float) -> None:
    network = build_published(name)
    assert all(parameter.is_meta for parameter in network.parameters())
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, rel=0.03)


def test_a_sam_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="decoder_hidden_size is 32"):
        PixelLMConfig.from_preset("lisa-tiny", decoder_hidden_size=32)
    with pytest.raises(ConfigError, match="variant is 'best'"):
        PixelLMConfig.from_preset("lisa-tiny", variant="best")


def test_lisas_sam_is_transformers_sam_prompted_with_an_embedding(released: Path, tmp_path: Path) -> None:
    # The test writes random weights of transformers' SamModel under the released names; converted, both must agree.
    report = convert_lisa(released, tmp_path / "ours", released / "clip", decoder_num_heads=8)
    assert report.has_tokenizer
    assert len(report.unused) == 5 + 10  # SAM's point prompts, its mask prompts
    network = load_network(tmp_path / "ours")
    assert isinstance(network, LisaForConditionalGeneration)
    torch.manual_seed(1)
    pixels, prompts = torch.randn(2, 3, 64, 64), torch.randn(3, 1, 64)
    sam = _random_sam()
    with torch.no_grad():
        features = network.encode_images(pixels, torch.tensor([[64, 64], [48, 64]]))
        wanted = sam.get_image_embeddings(pixels)
        torch.testing.assert_close(features.scales[:, 0], wanted)
        images = torch.tensor([1, 0, 1])
        ours = network.decode_masks(prompts, features.scales, images)
        dense = sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(3, -1, 4, 4)
        theirs, _ = sam.mask_decoder(
            wanted[images],
            sam.get_image_wide_positional_embeddings().expand(3, -1, -1, -1),
            prompts[:, None],
            dense,
            multimask_output=False,
        )
    torch.testing.assert_close(ours, theirs[:, 0, 0])
    assert ours.shape[-1] == network.config.mask_grid == 16


def test_a_converted_lisa_answers(released: Path, tmp_path: Path) -> None:
    command = ["convert", "lisa", str(released), str(tmp_path / "ours"), "--vision", str(released / "clip")]
    said = CliRunner().invoke(app, [*command, "--variant", "lisa_aug"])
    assert said.exit_code == 0, said.output
    assert load_config(tmp_path / "ours").merges_targets is False
    with PixelLMEngine.from_pretrained(tmp_path / "ours") as engine:
        assert engine.segment(PICTURE, QUESTIONS[0], max_new_tokens=4).usage.image_tokens == 4
        assert engine.processor.token_ids.codebook == (engine.model.config.codebook_token_ids[0],)


def test_a_released_checkpoint_that_lacks_a_key_is_refused_by_name(released: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(released / "model.safetensors")
    del weights["model.visual_model.mask_decoder.iou_token.weight"]
    weights["model.extra"] = torch.zeros(1)
    save_file(weights, released / "model.safetensors")
    with pytest.raises(
        ModelLoadError, match=r"1 missing: decoder\.mask_decoder\.iou_token\.weight.*1 unknown: model\.extra"
    ):
        convert_lisa(released, tmp_path / "ours", released / "clip")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("model.layers.31.self_attn.q_proj.weight", "language_model.layers.31.self_attn.q_proj.weight"),
        ("model.mm_projector.weight", "image_projector.layers.0.weight"),
        ("model.mm_projector.2.bias", "image_projector.layers.2.bias"),
        ("model.text_hidden_fcs.0.2.bias", "codebook.head.2.bias"),
        (
            "model.visual_model.mask_decoder.transformer.layers.1.cross_attn_image_to_token.q_proj.weight",
            "decoder.mask_decoder.transformer.layers.1.cross_attn_image_to_token.q_proj.weight",
        ),
    ],
)
def test_released_names_are_known(theirs: str, ours: str) -> None:
    assert lisa_name(theirs) == ours


def test_a_llava_answers_in_words_only(tmp_path: Path) -> None:
    words = open_segmenter(write_llava(tmp_path / "llava"), max_new_tokens=3)
    (answer,) = words.segment_many([(PICTURE, QUESTIONS[1])])
    assert answer.text
    assert answer.masks == ()


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A checkpoint in the released layout, written key by key: SAM's weights are those of `_random_sam`."""
    torch.manual_seed(2)
    folder, width, vocabulary = tmp_path / "released", 48, 0
    folder.mkdir()
    tokenizer = load_tiny_tokenizer()
    tokenizer.add_tokens(["[SEG]"])
    tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    vocabulary = len(tokenizer)
    shapes = {"model.embed_tokens.weight": (vocabulary, width), "lm_head.weight": (vocabulary, width)}
    shapes |= {
        "model.norm.weight": (width,),
        "model.mm_projector.weight": (width, 32),
        "model.mm_projector.bias": (width,),
    }
    for layer in range(2):
        for name in "qkvo":
            shapes[f"model.layers.{layer}.self_attn.{name}_proj.weight"] = (width, width)
        for name, shape in (("gate", (96, width)), ("up", (96, width)), ("down", (width, 96))):
            shapes[f"model.layers.{layer}.mlp.{name}_proj.weight"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{name}.weight"] = (width,)
    for index, out in (("0", width), ("2", 64)):
        shapes[f"model.text_hidden_fcs.0.{index}.weight"] = (out, width)
        shapes[f"model.text_hidden_fcs.0.{index}.bias"] = (out,)
    weights = {name: torch.randn(shape) * 0.1 for name, shape in shapes.items()}
    weights |= {f"model.visual_model.{_sam_key(name)}": w.clone() for name, w in _random_sam().state_dict().items()
                if "shared_" not in name}  # fmt: skip
    matrix = _random_sam().state_dict()["shared_image_embedding.positional_embedding"].clone()
    weights["model.visual_model.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"] = matrix
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text('{"num_attention_heads": 4, "rms_norm_eps": 1e-6, "model_type": "llava"}')
    _write_clip(folder / "clip")
    return folder


def _random_sam() -> SamModel:
    torch.manual_seed(0)
    config = SamConfig(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "mlp_dim": 48,
            "image_size": 64,
            "global_attn_indexes": [1],
            "window_size": 2,
            "output_channels": 64,
            "num_pos_feats": 32,
        },
        prompt_encoder_config={"hidden_size": 64, "image_size": 64, "mask_input_channels": 16},
        mask_decoder_config={"hidden_size": 64, "mlp_dim": 80, "iou_head_hidden_dim": 56},
    )
    sam = SamModel(config).eval()
    with torch.no_grad():
        for parameter in sam.parameters():
            parameter.normal_(std=0.2)
    return sam


def _sam_key(name: str) -> str:
    """The authors' name of one of transformers' weights of SAM."""
    pairs = [
        ("vision_encoder.", "image_encoder."),
        ("patch_embed.projection", "patch_embed.proj"),
        ("image_encoder.layers.", "image_encoder.blocks."),
        ("neck.conv1", "neck.0"),
        ("neck.layer_norm1", "neck.1"),
        ("neck.conv2", "neck.2"),
        ("neck.layer_norm2", "neck.3"),
        ("layer_norm_final_attn", "norm_final_attn"),
        (".layer_norm", ".norm"),
        ("upscale_conv1", "output_upscaling.0"),
        ("upscale_layer_norm", "output_upscaling.1"),
        ("upscale_conv2", "output_upscaling.3"),
        ("prompt_encoder.point_embed.", "prompt_encoder.point_embeddings."),
        ("mask_embed.conv1", "mask_downscaling.0"),
        ("mask_embed.norm1", "mask_downscaling.1"),
        ("mask_embed.conv2", "mask_downscaling.3"),
        ("mask_embed.norm2", "mask_downscaling.4"),
        ("mask_embed.conv3", "mask_downscaling.6"),
    ]
    if name.startswith("mask_decoder.") and ("mlps" in name or "iou_prediction_head" in name):
        name = name.replace("layers.0", "layers.1").replace("proj_in", "layers.0").replace("proj_out", "layers.2")
    for theirs, released in pairs:
        name = name.replace(theirs, released)
    return name


def _write_clip(folder: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(3)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    CLIPVisionModel(config).save_pretrained(folder)
