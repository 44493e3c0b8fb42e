"""What the authors' released checkpoints look like: key names, the shapes that they must have, configuration.

Released keys map one to one onto ours by prefix. Weights that the released network holds but never uses in a result
(mask heads 1–3, SAM's point and mask prompts) are checked and then left out.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pixellm.errors import ModelLoadError
from pixellm.model.codebook import TokenFusion
from pixellm.model.config import PixelLMConfig

Shapes = dict[str, tuple[int, ...]]

_PREFIXES = (
    ("language_model.", "model."),
    ("lm_head.", "lm_head."),
    ("image_projector.layers.", "model.mm_projector."),
    ("decoder_projector.layers.", "model.out_mm_projector."),
    ("codebook.head.", "model.text_hidden_fcs.0."),
    ("neck.", "model.image_feature_neck."),
    ("decoder.coarse_positions.matrix", "model.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    ("decoder.fine_positions.matrix", "model.mask_decoder.pe1.positional_encoding_gaussian_matrix"),
    ("decoder.no_mask_embed.", "model.prompt_encoder.no_mask_embed."),
    ("decoder.mask_head.", "model.mask_decoder.output_hypernetworks_mlps.0."),
    ("decoder.iou_head.", "model.mask_decoder.iou_prediction_head."),
    ("decoder.", "model.mask_decoder."),
)
_NOT_WEIGHTS = re.compile(r"rotary_emb\.inv_freq$|position_ids$")
_OTHER_CLIP_PARTS = ("text_model.", "logit_scale", "visual_projection.", "text_projection.")


def official_name(name: str) -> str:
    """The released name of one of our weights (not of the vision tower's, which released files do not hold)."""
    for ours, theirs in _PREFIXES:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise ModelLoadError(f"{name} has no counterpart in the released checkpoints; convert with constant fusion (mean)")


def official_shapes(shapes: Mapping[str, tuple[int, ...]], config: PixelLMConfig) -> tuple[dict[str, str], Shapes]:
    """What a released checkpoint of this size must hold.

    Args:
        shapes: shape of every weight of ours, by our name.
        config: ours.

    Returns:
        Our name by released name, and the shape by released name (of unused weights too).
    """
    ours = {official_name(name): name for name in shapes if not name.startswith("vision_tower.")}
    expected = {released: tuple(shapes[name]) for released, name in ours.items()}
    return ours, expected | _unused_shapes(config.decoder_hidden_size)


def vision_name(key: str) -> str | None:
    """Our name of a CLIP key in Hugging Face layout, or None for the parts of CLIP that are not the vision tower."""
    if key.startswith(_OTHER_CLIP_PARTS) or _NOT_WEIGHTS.search(key):
        return None
    return "vision_tower." + key.removeprefix("vision_model.")


def is_weight(key: str) -> bool:
    """False for buffers that older transformers wrote into checkpoints and that follow from the configuration."""
    return not _NOT_WEIGHTS.search(key)


def list_problems(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Describes missing, unknown and mis-shaped keys, one line per kind; empty where all is well."""
    missing = sorted(expected.keys() - found.keys())
    unknown = sorted(found.keys() - expected.keys())
    shapes = [
        f"{key} is {list(found[key])}, wanted {list(expected[key])}"
        for key in sorted(found.keys() & expected.keys())
        if tuple(found[key]) != tuple(expected[key])
    ]
    kinds = (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
    return [f"{len(keys)} {kind}: {', '.join(keys)}" for kind, keys in kinds if keys]


def config_from_official(
    shapes: Mapping[str, tuple[int, ...]],
    official: Mapping[str, Any],
    vision_config: Mapping[str, Any],
    tokens_per_scale: int,
    num_scales: int,
    **overrides: Any,
) -> PixelLMConfig:
    """Reads our configuration off a released checkpoint.

    Args:
        shapes: shape of every released key; widths and depths come from here.
        official: the released `config.json` (Llama's fields), or the nested form `{"llm": …, "decoder": …, …}`.
        vision_config: fields of the CLIP tower's configuration.
        tokens_per_scale: N, which the released files do not say.
        num_scales: L, likewise.
        **overrides: any field of `PixelLMConfig`.

    Raises:
        ModelLoadError: keys without which no size can be read, or another number of scales.
    """
    text = dict(official.get("llm") or official)
    decoder = dict(official.get("decoder") or {})
    size = _shape(shapes, "model.mask_decoder.iou_token.weight")[1]
    level_count = _shape(shapes, "model.mask_decoder.level_embed.weight")[0]
    if level_count != num_scales:
        raise ModelLoadError(
            f"the checkpoint has {level_count} scales and num_scales is {num_scales}; pass {level_count}"
        )
    vocab_size, hidden_size = _shape(shapes, "model.embed_tokens.weight")
    first_id = vocab_size - tokens_per_scale * num_scales - 2
    patch_size = int(vision_config.get("patch_size", 14))
    fields = {
        "text_config": {
            **{key: text[key] for key in _TEXT_FIELDS if text.get(key) is not None},
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": _shape(shapes, "model.layers.0.mlp.gate_proj.weight")[0],
            "num_hidden_layers": _count(shapes, r"model\.layers\.(\d+)\."),
            "pad_token_id": text.get("pad_token_id") or 0,
        },
        "vision_config": {key: value for key, value in vision_config.items() if key in _VISION_FIELDS},
        "tokens_per_scale": tokens_per_scale,
        "num_scales": num_scales,
        "image_size": vision_config.get("resized_image_size", 448),
        "vision_feature_layers": list(official.get("feature_layers") or [-2, -11, -18][:num_scales]),
        "projector_hidden_size": _shape(shapes, "model.mm_projector.0.weight")[0],
        "decoder_hidden_size": size,
        "decoder_num_heads": int(decoder.get("num_heads") or 8),
        "decoder_mlp_size": _shape(shapes, "model.mask_decoder.transformer.0.layers.0.mlp.lin1.weight")[0],
        "decoder_iou_head_size": _shape(shapes, "model.mask_decoder.iou_prediction_head.layers.0.weight")[0],
        "decoder_depth": _count(shapes, r"model\.mask_decoder\.transformer\.0\.layers\.(\d+)\."),
        "codebook_token_ids": list(
            official.get("seg_token_ids") or range(first_id, first_id + tokens_per_scale * num_scales)
        ),
        "im_start_id": official.get("im_start_id", vocab_size - 2),
        "im_end_id": official.get("im_end_id", vocab_size - 1),
        "token_fusion": "mean",
        "scale_fusion": "mean",
        "position_resize": "released",
        "target_refinement_alpha": 1.0,
    }
    fields["image_token_grid"] = max(1, fields["image_size"] // patch_size // 2)
    return PixelLMConfig(**(fields | overrides))


_TEXT_FIELDS = (
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "max_position_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "hidden_act",
    "bos_token_id",
    "eos_token_id",
)
_VISION_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "projection_dim",
)


def guess_vision_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Reads a CLIP tower's sizes off its weights (64-wide heads, as every CLIP has), for towers without a config."""
    prefix = "vision_model." if any(key.startswith("vision_model.") for key in shapes) else ""
    width, _, patch_size, _ = _shape(shapes, prefix + "embeddings.patch_embedding.weight")
    positions = _shape(shapes, prefix + "embeddings.position_embedding.weight")[0]
    return {
        "hidden_size": width,
        "intermediate_size": _shape(shapes, prefix + "encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": _count(shapes, re.escape(prefix) + r"encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(1, width // 64),
        "patch_size": patch_size,
        "image_size": round((positions - 1) ** 0.5) * patch_size,
    }


def shapes_of(state_dict: Mapping[str, Tensor]) -> Shapes:
    """Shape of every weight, buffers that follow from the configuration left out."""
    return {key: tuple(tensor.shape) for key, tensor in state_dict.items() if is_weight(key)}


def new_parameters(name: str, shape: tuple[int, ...], config: PixelLMConfig) -> Tensor:
    """The value that a learned φ or γ takes on conversion: the released constants."""
    if name == "decoder.scale_fusion.values":
        return torch.zeros(shape)
    return TokenFusion(config.tokens_per_scale, config.num_scales, config.decoder_hidden_size).weight.detach()


def _unused_shapes(size: int) -> Shapes:
    mask_head: Shapes = {"0": (size, size), "1": (size, size), "2": (size // 8, size)}
    shapes: Shapes = {"model.prompt_encoder.not_a_point_embed.weight": (1, size)}
    for i in range(4):
        shapes[f"model.prompt_encoder.point_embeddings.{i}.weight"] = (1, size)
    for i in range(1, 4):
        for layer, shape in mask_head.items():
            key = f"model.mask_decoder.output_hypernetworks_mlps.{i}.layers.{layer}"
            shapes |= {f"{key}.weight": shape, f"{key}.bias": shape[:1]}
    downscaling: Shapes = {"0": (4, 1, 2, 2), "1": (4,), "3": (16, 4, 2, 2), "4": (16,), "6": (size, 16, 1, 1)}
    for layer, shape in downscaling.items():
        key = f"model.prompt_encoder.mask_downscaling.{layer}"
        shapes |= {f"{key}.weight": shape, f"{key}.bias": shape[:1]}
    return shapes


def _shape(shapes: Mapping[str, tuple[int, ...]], key: str) -> tuple[int, ...]:
    if key not in shapes:
        raise ModelLoadError(
            f"the checkpoint has no {key}; wanted all weights of a merged PixelLM release or CLIP tower"
        )
    return tuple(shapes[key])


def _count(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    indices = [int(match.group(1)) for key in shapes if (match := re.match(pattern, key))]
    return max(indices, default=-1) + 1
