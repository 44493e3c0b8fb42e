"""Counted operations against counts from the shapes, and PixelLM against LISA."""

import pytest

from pixellm.errors import ConfigError
from pixellm.model.flops import compare_flops, count_flops

TEXT = 100


def test_the_language_model_costs_two_operations_per_weight_and_token_and_its_attention() -> None:
    positions, width, mlp, layers, vocabulary = 256 + TEXT, 4096, 11008, 32, 32008
    weights = layers * (4 * width**2 + 3 * width * mlp) + width * vocabulary
    attention = layers * 2 * 2 * positions**2 * width
    wanted = (2 * positions * weights + attention) / 1e12
    assert count_flops("pixellm-7b", text_tokens=TEXT).tflops["language"] == pytest.approx(wanted, rel=1e-3)


def test_the_vision_tower_is_counted_up_to_the_deepest_feature_only() -> None:
    tokens, width, layers = 1025, 1024, 23
    wanted = 2 * tokens * layers * 12 * width**2 + layers * 4 * tokens**2 * width + 2 * 1024 * width * 3 * 14 * 14
    assert count_flops("pixellm-7b").tflops["vision"] == pytest.approx(wanted / 1e12, rel=1e-3)


def test_sam_costs_its_published_three_tera_multiply_adds() -> None:
    assert count_flops("lisa-7b").tflops["sam_encoder"] / 2 == pytest.approx(2.98, rel=0.02)


@pytest.mark.parametrize(("size", "most"), [("7b", 0.55), ("13b", 0.70)])
def test_pixellm_is_cheaper_than_lisa_by_about_the_papers_share(size: str, most: float) -> None:
    comparison = compare_flops(f"pixellm-{size}", f"lisa-{size}")
    assert comparison.ratio <= most
    assert comparison.ratio == pytest.approx(comparison.paper_ratio, abs=0.05)
    numbers = comparison.to_json_dict()
    languages = [numbers["tflops"][f"{name}-{size}"]["language"] for name in ("pixellm", "lisa")]
    assert languages[0] == pytest.approx(languages[1], rel=1e-5)  # five rows of the vocabulary more: the codebook
    assert f"{TEXT} text tokens" in numbers["convention"]


def test_more_targets_cost_the_decoder_only() -> None:
    one, many = count_flops("tiny", num_targets=1), count_flops("tiny", num_targets=9)
    assert many.tflops["decoder"] > 3 * one.tflops["decoder"]
    assert {k: v for k, v in one.tflops.items() if k != "decoder"} == {
        k: v for k, v in many.tflops.items() if k != "decoder"
    }


def test_lisa_rec_reads_a_question_per_target_and_pays_for_the_llava_that_names_them() -> None:
    three = count_flops("lisa-7b-rec", num_targets=3).tflops
    llava, lisa = count_flops("lisa-13b").tflops, count_flops("lisa-7b", num_targets=3).tflops
    assert three["llava"] == llava["vision"] + llava["projectors"] + llava["language"]  # once for all targets
    assert three["language"] == 3 * lisa["language"]
    assert three["sam_encoder"] == lisa["sam_encoder"]


def test_clipseg_looks_at_the_picture_once_per_phrase() -> None:
    # ViT-B/16 at 352 pixels: 485 positions, 12 layers of 12·768² weights and attention, its patches; the rest is small.
    positions, width = 485, 768
    tower = 12 * (2 * positions * 12 * width**2 + 4 * positions**2 * width) + 2 * 484 * width * 3 * 16**2
    assert count_flops("clipseg").total_tflops == pytest.approx(tower / 1e12, rel=0.1)
    assert count_flops("clipseg", num_targets=3).total_tflops == pytest.approx(3 * count_flops("clipseg").total_tflops)


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown preset"):
        count_flops("lisa-70b")
